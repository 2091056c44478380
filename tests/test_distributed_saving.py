"""A release written by all ranks, each its part; and what every rank is told where one of them differs or fails."""

import json
import re
from pathlib import Path

import pytest
from distributed_runs import on_ranks
from releases import SHAPES, write_release
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from modeling_deepseek_moe import CheckpointReader
from modeling_deepseek_moe.cli import app
from modeling_deepseek_moe.distributed.checkpoints import fault_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    folder = tmp_path_factory.mktemp("release")
    write_release(folder, SHAPES["v3-mtp"]())
    return folder


@pytest.fixture(scope="module")
def ranks(release, tmp_path_factory):
    folder, settings = tmp_path_factory.mktemp("ranks"), {"release": str(release)}
    return folder, on_ranks(folder, 2, ("save", "save", settings), ("refusals", "refusals", settings))


@pytest.fixture(scope="module")
def alone(release, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    model = AutoModelForCausalLM.from_pretrained(release, dtype="float32")
    for name, quantize in (("plain", None), ("fp8", "fp8"), ("int4", "int4")):
        model.save_pretrained(folder / name, quantize=quantize)
    return folder


def assert_same_bytes(found, wanted):
    found, wanted = CheckpointReader.open(found), CheckpointReader.open(wanted)
    assert list(found.keys() ^ wanted.keys()) == []
    for name, info in wanted.items():
        assert (found[name].dtype, found[name].shape) == (info.dtype, info.shape), name
        assert bytes_of(found, name) == bytes_of(wanted, name), name


def bytes_of(reader, name):
    info = reader[name]
    with open(info.file, "rb") as stream:
        stream.seek(info.start)
        return stream.read(info.nbytes)


@pytest.mark.parametrize("form", ["plain", "fp8", "int4"])
def test_bytes_and_config_are_those_of_one_process(ranks, alone, form):
    folder = ranks[0] / "save" / form
    assert_same_bytes(folder, alone / form)
    assert (folder / "config.json").read_text() == (alone / form / "config.json").read_text()
    assert not list(folder.glob(".*"))


def test_each_rank_writes_a_share(ranks):
    reader = CheckpointReader.open(ranks[0] / "save" / "fp8")
    first, second = (sum(info.nbytes for info in reader.values() if info.file == file) for file in reader.files)
    assert 0.8 < first / second < 1.25


def test_what_accelerate_writes_is_consolidated(ranks, alone, release, tmp_path):
    checkpoint = ranks[0] / "save" / "checkpoint-1"
    assert fault_of(checkpoint) is None
    command = ["convert", "consolidate", str(checkpoint), str(tmp_path / "out"), "--config", str(release)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert_same_bytes(tmp_path / "out", alone / "plain")


@pytest.mark.parametrize(
    "what, on_first, on_second",
    [
        ("config", *["rank 1: config.num_experts_per_tok: found 3, wanted 4 as on rank 0"] * 2),
        ("version", *['rank 1: package.transformers: found "0.1", wanted'] * 2),
        ("shard", "rank 1 failed: ", "nowhere: found neither model.safetensors"),
        ("nan", "rank 1 could not save (ValueError: ", "found NaN or Inf"),
        ("same", *["nothing"] * 2),
    ],
)
def test_every_rank_is_told(ranks, what, on_first, on_second):
    first, second = (found[what] for found in ranks[1]["refusals"])
    assert on_first in first and on_second in second


def test_a_save_that_failed_leaves_nothing(ranks):
    assert ranks[1]["refusals"][0]["left"] == []


@pytest.mark.parametrize("form", ["", "-fp8"])
def test_a_rank_takes_little_besides_its_part(form):
    """`benchmarks/save_ranks.py` measured it, of 10 GB on four ranks; the page's figures are these."""
    root = Path(__file__).resolve().parents[1]
    found = json.loads((root / "benchmarks" / "results" / f"save_ranks{form}.json").read_text())
    assert len(found["rows"]) == 4 and sum(row["part"] for row in found["rows"]) > 10e9
    assert all(row["peak"] - row["part"] < 1e9 for row in found["rows"])
    page = (root / "docs" / "distributed-training.md").read_text()
    said = re.search(r"parts of ([\d.]+) GB took ([\d.]+) GB at most.*\n.*in FP8 ([\d.]+) GB", page)
    assert said[1] == f"{found['rows'][0]['part'] / 1e9:.2f}"
    assert said[3 if form else 2] == f"{max(row['peak'] for row in found['rows']) / 1e9:.2f}"
    if "consolidate" in found:
        assert f"which took {found['consolidate']['peak'] / 1e9:.2f} GB" in page
