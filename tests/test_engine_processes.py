"""The CPU engine in threads and forked processes, and two backends in one process."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from engine_calls import differing, every_call, run
from engine_cases import BACKENDS, INSTRUCTION_SETS, needs_engine, random_fp8
from releases import SHAPES, same_bits, write_release
from transformers import AutoModelForCausalLM

from modeling_deepseek_moe import use_backend
from modeling_deepseek_moe.ops import block_fp8

pytestmark = needs_engine


@pytest.mark.parametrize("isa", BACKENDS[-2:], ids=INSTRUCTION_SETS[-2:])
@pytest.mark.slow
def test_threads_change_no_bit(isa):
    """Sizes at which every operator takes as many threads as it may (see ``dsm_threads``)."""
    kept = []
    for tokens in (1, 9, 40):
        calls = every_call(tokens, 900, 2400 if tokens == 1 else 1000, kept=kept)
        with use_backend(isa):
            torch.set_num_threads(1)
            wanted = run(calls)
            for threads in (2, 3, 16):
                torch.set_num_threads(threads)
                assert not differing(run(calls), wanted)


def test_threads_of_python_change_no_bit():
    """Four at once, each with OpenMP threads of its own."""
    kept = []
    calls = every_call(5, 700, 900, kept=kept)
    torch.set_num_threads(2)
    wanted = run(calls)
    start = threading.Barrier(4)

    def work(_):
        torch.set_num_threads(2)
        start.wait()
        return [differing(run(calls), wanted) for _ in range(5)]

    with ThreadPoolExecutor(4) as pool:
        assert not any(names for result in pool.map(work, range(4)) for names in result)


def test_each_thread_has_a_backend_of_its_own():
    """`use_backend` holds in the thread, or task, that says it: two models of a process may run on two backends."""
    codes, scale = random_fp8((300, 400))
    x = torch.randn(2, 400).bfloat16()
    wanted = {}
    for backend in ("reference", *BACKENDS):
        with use_backend(backend):
            wanted[backend] = block_fp8.linear(x, codes, scale)
    assert not same_bits(wanted["reference"], wanted[BACKENDS[-1]])  # else the test would see nothing
    start = threading.Barrier(len(wanted))

    def work(backend):
        with use_backend(backend):
            start.wait()
            return all(same_bits(block_fp8.linear(x, codes, scale), wanted[backend]) for _ in range(200))

    with use_backend("reference"), ThreadPoolExecutor(len(wanted)) as pool:
        assert all(pool.map(work, wanted))
        assert same_bits(block_fp8.linear(x, codes, scale), wanted["reference"])


# Forks. A hang is ended by the timeout, and is a failure.


def in_python(code: str, folder=None) -> str:
    """What a fresh Python prints that runs ``code`` with two OpenMP threads."""
    environment = os.environ | {"OMP_NUM_THREADS": "2", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        check=False,
        capture_output=True,
        text=True,
        timeout=150,
        cwd=folder,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


PRELUDE = """
import os, sys, torch
from engine_calls import differing, every_call, run

def in_child(check):
    child = os.fork()
    if not child:
        failed = 1
        try:
            check()
            failed = 0
        except BaseException as error:
            print(repr(error), file=sys.stderr)
        finally:
            os._exit(failed)
    assert os.waitpid(child, 0)[1] == 0

def look():
    assert not differing(run(calls), wanted)

kept = []
calls = every_call(40, 600, 900, kept=kept)
busy = torch.randn(700, 700)
busy @ busy, busy.exp()  # torch's OpenMP threads exist from here on
"""


@pytest.mark.slow
def test_forked_after_use():
    """By hand, twice over, and by the workers of a DataLoader; the parent keeps its threads."""
    out = in_python(
        PRELUDE
        + """
from torch.utils.data import DataLoader, Dataset

class Data(Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, index):
        return len(differing(run(calls), wanted))

wanted = run(calls)
in_child(look)
in_child(lambda: (look(), in_child(look)))
look()
for threads in (1, 2):
    loader = DataLoader(Data(), num_workers=2, worker_init_fn=lambda _, n=threads: torch.set_num_threads(n))
    assert [batch.item() for batch in loader] == [0] * 4
look()
assert torch.get_num_threads() == 2
print("done")
"""
    )
    assert out == "done\n"


@pytest.mark.slow
def test_forked_before_use(tmp_path):
    """The engine is first loaded in the forked process, which knows of the fork all the same."""
    out = in_python(
        """
import os, torch
from modeling_deepseek_moe.ops import _native, block_fp8
torch.manual_seed(0)
busy = torch.randn(700, 700)
busy @ busy, busy.exp()  # torch's OpenMP threads exist from here on
codes, scale = torch.randint(0, 126, (600, 900), dtype=torch.uint8).view(torch.float8_e4m3fn), torch.rand(5, 8)
x = torch.randn(40, 900)
child = os.fork()
y = block_fp8.linear(x, codes, scale).numpy().tobytes()
assert torch.get_num_threads() == 2
if not child:
    with open("result", "wb") as stream:
        stream.write(y)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
with open("result", "rb") as stream:
    assert stream.read() == y
print("done")
""",
        tmp_path,
    )
    assert out == "done\n"


def test_two_models_on_two_backends(tmp_path):
    """In one process, by turns and at the same time."""
    models = {}
    for backend, name in (("reference", "v3-mtp"), ("cpu", "v3"), ("cpu:baseline", "v3")):
        folder = tmp_path / backend.replace(":", "-")
        write_release(folder, SHAPES[name](), fp8=True)
        models[backend] = AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16")
    ids = torch.arange(12)[None]

    def logits(backend):
        with use_backend(backend), torch.no_grad():
            return models[backend](ids).logits

    wanted = {backend: logits(backend) for backend in models}
    for backend in [*models, *reversed(models)]:
        assert same_bits(logits(backend), wanted[backend])
    with ThreadPoolExecutor(6) as pool:
        jobs = [(backend, pool.submit(logits, backend)) for _ in range(5) for backend in models]
        assert all(same_bits(job.result(), wanted[backend]) for backend, job in jobs)
