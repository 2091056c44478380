"""Saves that meet another one, or a kill: one of them is whole, the other is told, and the next load finds one checkpoint."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from releases import SHAPES, write_release
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from modeling_deepseek_moe import CheckpointError
from modeling_deepseek_moe.checkpoint import transaction
from modeling_deepseek_moe.checkpoint.atomic import temporary_path, write_file
from modeling_deepseek_moe.checkpoint.lock import locked_folder
from modeling_deepseek_moe.checkpoint.reader import CheckpointReader
from modeling_deepseek_moe.checkpoint.writer import TensorPlan, write_checkpoint

ONE = {"max_shard_size": "60KB"}
TWO = {"max_shard_size": "90KB"}  # other shards, so that files of the two can be told apart


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def values(folder):
    """One number that both models have everywhere: 1 and 2. Found by the safetensors library alone."""
    found = set()
    for file in folder.glob("*.safetensors"):
        found |= {value for tensor in load_file(file).values() for value in tensor.unique().tolist()}
    return found


def model_of(value):
    model = AutoModelForCausalLM.from_config(SHAPES["v3"](), dtype=torch.bfloat16)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(value)
    return model


@pytest.fixture(scope="module")
def models():
    return model_of(1), model_of(2)


def test_threads_that_save_into_one_folder(tmp_path, models):
    """Either finishes or is refused by name; the folder is whole, and of one of them."""
    outcomes = []
    for turn in range(8):
        folder, start = tmp_path / str(turn), threading.Barrier(2)
        if turn % 2:
            models[0].save_pretrained(folder, **ONE)
        errors = [None, None]

        def save(which, folder=folder, start=start, errors=errors):
            start.wait()
            try:
                models[which].save_pretrained(folder, **(ONE, TWO)[which])
            except BlockingIOError as error:
                errors[which] = error

        threads = [threading.Thread(target=save, args=(which,)) for which in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        refused = [which for which in (0, 1) if errors[which]]
        assert len(refused) < 2
        assert all(str(folder) in str(errors[which]) and "one at a time" in str(errors[which]) for which in refused)
        found = values(folder)
        assert found in ([{2 - refused[0]}] if refused else [{1}, {2}])
        assert not [name for name in names(folder) if name.startswith(".")]
        assert len(CheckpointReader.open(folder))
        outcomes.append(bool(refused))
    assert any(outcomes)  # or the two never met


def test_the_second_save_is_refused_and_the_first_goes_on(tmp_path, models):
    under_way, finish = threading.Event(), threading.Event()

    def wait():
        under_way.set()
        assert finish.wait(60)
        return torch.ones(4)

    plan = TensorPlan("w", torch.float32, (4,), wait)
    first = threading.Thread(target=write_checkpoint, args=(tmp_path / "out", [plan]))
    first.start()
    assert under_way.wait(60)
    with pytest.raises(BlockingIOError, match="another save or conversion") as caught:
        models[0].save_pretrained(tmp_path / "out")
    assert str(tmp_path / "out") in str(caught.value)
    finish.set()
    first.join()
    assert names(tmp_path / "out") == ["model.safetensors"]
    models[0].save_pretrained(tmp_path / "out")  # and then it may
    assert values(tmp_path / "out") == {1}


HOLDER = """
import sys, time
from pathlib import Path
import torch
from modeling_deepseek_moe.checkpoint.writer import TensorPlan, write_checkpoint

def stay():
    yield torch.zeros(1, 4)
    print("holding", flush=True)
    time.sleep(600)

write_checkpoint(sys.argv[1], [TensorPlan("w", torch.float32, (2, 4), stay)])
"""


@pytest.mark.slow
def test_a_process_that_is_killed_leaves_no_lock(tmp_path, models):
    folder = tmp_path / "out"
    models[0].save_pretrained(folder, **ONE)
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, folder], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "holding\n"
    with pytest.raises(BlockingIOError, match="one at a time"):
        models[1].save_pretrained(folder)
    holder.kill()
    holder.wait()
    assert [name for name in names(folder) if name.endswith(".tmp")]
    assert values(folder) == {1}
    AutoModelForCausalLM.from_pretrained(folder)  # what was there is still whole
    models[1].save_pretrained(folder)
    assert names(folder) == ["config.json", "generation_config.json", "model.safetensors"]
    assert values(folder) == {2}


KILLS = """
import json, os, pathlib, shutil, signal, sys
import torch
torch.set_num_threads(1)
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, logging
import modeling_deepseek_moe
logging.set_verbosity_error(), logging.disable_progress_bar()
before, after, work = map(pathlib.Path, sys.argv[1:])
model = AutoModelForCausalLM.from_pretrained(after)
real, moves = pathlib.Path.replace, 0

def in_child(action, die_at):
    if child := os.fork():
        return os.waitpid(child, 0)[1]
    def replace(path, target):
        global moves
        if moves == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        moves += 1
        return real(path, target)
    pathlib.Path.replace = replace
    action()
    os._exit(0)

def save():
    model.save_pretrained(work, max_shard_size="90KB")

found = []
for die_at in range(1000):
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(before, work)
    status = in_child(save, die_at)
    if die_at % 3 == 1:  # a load that is killed while it puts things right
        in_child(lambda: AutoModelForCausalLM.from_pretrained(work), die_at % 5)
    if die_at % 3 == 2:  # another save is next
        model.save_pretrained(work, max_shard_size="90KB")
    config = AutoConfig.from_pretrained(work)  # read before the weights, as AutoModel does
    loaded = AutoModelForCausalLM.from_pretrained(work)
    values = {v for f in work.glob("*.safetensors") for t in load_file(f).values() for v in t.unique().tolist()}
    in_memory = {v for p in loaded.parameters() for v in p.unique().tolist()}
    found.append([die_at, sorted(values), sorted(in_memory), config.routed_scaling_factor])
    if status == 0:
        break
left = [name for name in os.listdir(work) if name.startswith(".")]
print(json.dumps({"found": found, "left": left}))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.slow
def test_killed_before_every_rename(tmp_path, models):
    """The next load finds the old checkpoint or the new one, with its own config, whichever rename was the last."""
    for model, name, settings in ((models[0], "before", ONE), (models[1], "after", TWO)):
        model.config.routed_scaling_factor = {"before": 1.0, "after": 2.0}[name]
        model.save_pretrained(tmp_path / name, **settings)
    arguments = [sys.executable, "-c", KILLS, tmp_path / "before", tmp_path / "after", tmp_path / "work"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(arguments, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert len(result["found"]) > 12 and not result["left"]  # texts, old shards away, new shards in
    for _, on_disk, in_memory, scaling in result["found"]:
        assert on_disk == in_memory == [scaling]
    outcomes = [in_memory for _, _, in_memory, _ in result["found"]]
    assert [1.0] in outcomes and outcomes[-1] == [2.0]


def test_a_save_under_way_is_named_by_a_load(tmp_path, models):
    folder = tmp_path / "out"
    models[0].save_pretrained(folder)
    (folder / transaction.RECORD_NAME).write_text("{}")
    with locked_folder(folder), pytest.raises(CheckpointError, match="a save into it under way"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_what_cannot_be_put_right_is_named(tmp_path, models, monkeypatch):
    """A folder that cannot be written to: the error says what lies there, and nothing of it is lost."""
    folder = tmp_path / "out"
    models[0].save_pretrained(folder)
    old, new = temporary_path(folder / "config.json", "old").name, temporary_path(folder / "config.json").name
    (folder / old).write_text("{}")
    (folder / new).write_text("{}")
    record = {"files": {"config.json": new}, "aside": {"config.json": old}}
    (folder / transaction.RECORD_NAME).write_text(json.dumps(record))

    def replace(self, target):
        raise PermissionError(13, "Permission denied", str(self))

    before = names(folder)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        with pytest.raises(CheckpointError, match=r"killed between its renames.*Permission denied.*save once more"):
            CheckpointReader.open(folder)
    assert names(folder) == before


@pytest.mark.parametrize(
    "record",
    [
        {"files": {"../victim": "../.victim.0123456789abcdef.tmp"}, "aside": {}},
        {"files": {"config.json": ".victim.0123456789abcdef.tmp"}, "aside": {}},
        {"files": {"config.json": "victim"}, "aside": {}},
        {"files": {}, "aside": {"victim": "../.victim.0123456789abcdef.old"}},
        {"files": {}, "aside": {}},
        {"files": [1], "aside": {}},
        {},
    ],
)
def test_a_record_that_came_with_a_folder_moves_nothing(tmp_path, record):
    folder = tmp_path / "folder"
    write_release(folder, SHAPES["v3"]())
    (tmp_path / "victim").write_text("kept")
    (tmp_path / ".victim.0123456789abcdef.tmp").write_text("other")
    (tmp_path / ".victim.0123456789abcdef.old").write_text("other")
    (folder / transaction.RECORD_NAME).write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=r"deepseek-moe-save.json: found .*remove this file"):
        CheckpointReader.open(folder)
    assert (tmp_path / "victim").read_text() == "kept" and len(names(tmp_path)) == 4


def test_a_file_is_written_whole_by_many(tmp_path):
    """No mixture and no leftovers, from threads, whose process ids are alike."""
    file, texts = tmp_path / "new" / "file.json", [str(number) * 200_000 for number in range(8)]
    threads = [threading.Thread(target=write_file, args=(file, text)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert file.read_text() in texts and names(file.parent) == ["file.json"]


def test_a_folder_made_for_nothing_goes_again(tmp_path):
    with locked_folder(tmp_path / "a" / "b"):
        pass
    assert names(tmp_path / "a") == []
    with locked_folder(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "file").write_text("x")
    assert names(tmp_path / "a") == ["b"]
    with pytest.raises(NotADirectoryError, match="found a file"), locked_folder(tmp_path / "a" / "b" / "file"):
        pass
