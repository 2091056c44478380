"""Saves and conversions that meet one another or are killed, fifty times each: no byte is lost, and none of two are mixed."""

import json
import os
import subprocess
import sys

import pytest
from releases import SHAPES, write_release

pytestmark = [pytest.mark.long, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]
TURNS = 50
COMMON = """
import json, os, pathlib, random, shutil, signal, sys, threading, time
import torch
import tqdm.auto
# tqdm's own lock is shared by what is forked, and stays taken when its holder is killed; processes of their own have one each
tqdm.auto.tqdm.set_lock(threading.RLock())
torch.set_num_threads(1)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, logging
import modeling_deepseek_moe
from modeling_deepseek_moe.cli import app
logging.set_verbosity_error(), logging.disable_progress_bar()
turns, rng, counts = int(sys.argv[1]), random.Random(0), {}
folders = list(map(pathlib.Path, sys.argv[2:]))

def count(what):
    counts[what] = counts.get(what, 0) + 1

def child(action, *expected):
    pid = os.fork()
    if pid:
        return pid
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    try:
        action()
    except expected:
        os._exit(3)
    os._exit(0)

def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}
"""
# One save is killed at any moment while another process tries its own; then a load, at times another save.
SAVES = """
first, second, work = folders
models = [AutoModelForCausalLM.from_pretrained(folder) for folder in (first, second)]
settings = [{"max_shard_size": "60KB"}, {"max_shard_size": "90KB"}]

def save(which):
    models[which].save_pretrained(work, **settings[which])

wanted = []
for which in (0, 1):
    start = time.monotonic()
    save(which)
    whole = time.monotonic() - start
    wanted.append(contents(work))
    shutil.rmtree(work)
for turn in range(turns):
    if turn % 5 == 0:
        shutil.rmtree(work, ignore_errors=True)
        save(0)
    pids = [child(lambda which=which: save(which), BlockingIOError) for which in (0, 1)]
    time.sleep(rng.uniform(0, 1.5 * whole))
    os.kill(pids[turn % 2], signal.SIGKILL)
    ends = [os.waitpid(pid, 0)[1] for pid in pids]
    count("killed" if os.WIFSIGNALED(ends[turn % 2]) else "in time")
    other = ends[1 - turn % 2]
    assert other in (0, 3 << 8), other
    count("refused" if other else "saved")
    AutoModelForCausalLM.from_pretrained(work)  # ends what was killed
    if turn % 3 == 2:
        save(1)
    found = {name: data for name, data in contents(work).items() if not name.startswith(".")}
    assert found in wanted, (turn, sorted(found))
save(0)
assert contents(work) == wanted[0]  # with nothing left over
print(json.dumps(counts))
"""
# One conversion run twice at the same time, either of the two killed; then run to its end.
CONVERSIONS = """
source, wanted, out = folders

def run(out=out):
    if app(["convert", "fp8-to-bf16", str(source), str(out), "--max-shard-size", "100kB"], standalone_mode=False):
        raise SystemExit(2)

start = time.monotonic()
run(wanted)
whole = time.monotonic() - start
for turn in range(turns):
    pids = []
    for _ in range(2):
        pids.append(child(run, BaseException))
        time.sleep(rng.uniform(0, whole / 4))
    os.kill(pids[turn % 2], signal.SIGKILL)
    ends = [os.waitpid(pid, 0)[1] for pid in pids]
    count("killed" if os.WIFSIGNALED(ends[turn % 2]) else "in time")
    count("refused" if ends[1 - turn % 2] else "finished")
    if 0 in ends:
        assert contents(out) == contents(wanted), turn
    if not out.exists():
        run()
    assert contents(out) == contents(wanted), turn
    shutil.rmtree(out)
    out.with_name(out.name + ".journal").unlink(missing_ok=True)
left = sorted(path.name for path in out.parent.iterdir() if path.name.startswith(out.name))
print(json.dumps(counts | {"left": left}))
"""


def run(script, *folders):
    arguments = [sys.executable, "-c", COMMON + script, str(TURNS), *map(str, folders)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(arguments, env=env, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_saves_that_meet_and_are_killed(tmp_path):
    for seed, name in enumerate(("first", "second")):
        write_release(tmp_path / name, SHAPES["v3"](), fp8=True, seed=seed)
    counts = run(SAVES, tmp_path / "first", tmp_path / "second", tmp_path / "work")
    assert counts["killed"] > TURNS // 5 and counts["refused"] and counts["saved"]


def test_a_conversion_run_twice_at_once_and_killed(tmp_path):
    write_release(tmp_path / "source", SHAPES["v3-mtp"](), fp8=True, shards=3)
    counts = run(CONVERSIONS, tmp_path / "source", tmp_path / "wanted", tmp_path / "out")
    assert counts["killed"] > TURNS // 5 and counts["refused"] and counts["left"] == []
