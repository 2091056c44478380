"""``generate`` and ``chat`` with experts in memory of a set size, and what they tell of it."""

import re

import pytest
from releases import SHAPES, write_release
from test_cli import run, write_tokenizer
from transformers.utils import logging

from modeling_deepseek_moe import Machine
from modeling_deepseek_moe.cli._model import Dtype, Meter, expert_summary, load_model
from modeling_deepseek_moe.streaming import model as streaming_model

EXPERT = 3 * 32 * 64  # bytes of codes
GENERATE = ("--token-ids", "0,50,60", "-n", 8, "--temperature", 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli-streaming") / "fp8"
    config = SHAPES["v3-mtp"]()
    config.vocab_size, config.bos_token_id, config.eos_token_id = 260, 0, 1
    write_release(folder, config, fp8=True, shards=2)
    write_tokenizer(folder)
    return folder


def generate(folder, *options):
    result = run("generate", "-m", folder, *GENERATE, *options)
    assert result.exit_code == 0, result.stderr
    return result


def rows(text: str) -> dict[str, str]:
    """The last table of figures in what was printed."""
    table = text.rpartition("experts\n")[2]
    return dict(re.fullmatch(r"  (\S[\w ]*?)  +(\S.*)", line).groups() for line in table.splitlines())


@pytest.mark.parametrize("memory", ["80KB", "300KB", "0.5MiB", "1gb"])
def test_same_tokens_whatever_is_held(folder, memory):
    plain = generate(folder)
    streamed = generate(folder, "--expert-memory", memory)
    assert streamed.stdout == plain.stdout
    assert "experts" not in plain.stderr + streamed.stderr  # figures only on request


def test_figures_are_those_of_the_run(folder):
    found = rows(generate(folder, "--expert-memory", "300KB", "--stats").stderr)
    assert list(found) == ["speed", "held", "hit rate", "missed", "read", "read ahead", "waited"]
    assert re.fullmatch(r"[\d.,]+ tokens/s", found["speed"])
    assert found["held"].endswith(" of 300.0 kB")
    share, hits, wanted = re.fullmatch(r"(\d+)%, ([\d,]+) of ([\d,]+) wanted", found["hit rate"]).groups()
    assert 0 < int(hits) < int(wanted) and int(share) == round(100 * int(hits) / int(wanted))
    missed = (int(wanted) - int(hits)) * EXPERT
    assert found["missed"].startswith(f"{missed / 1000:.1f} kB, ")
    assert re.match(r"[\d.]+ kB at [\d.]+ [kMG]?B/s, (past|through) the page cache", found["read"])
    assert re.fullmatch(r"[\d.]+ s for the disk, \d+ ms per token", found["waited"])


def test_figures_where_nothing_is_streamed(folder):
    assert "none were streamed (see --expert-memory)" in generate(folder, "--stats").stderr


def test_a_single_token_has_no_speed(folder):
    result = run("generate", "-m", folder, "--token-ids", "5", "-n", 1, "--expert-memory", "1MB", "--stats")
    assert result.exit_code == 0 and "speed" not in rows(result.stderr)


def test_summary_of_a_model_that_did_nothing(folder):
    model = load_model(folder, dtype=Dtype.AUTO, attention=None, device="cpu", dequantize=False, expert_memory="300KB")
    found = rows(expert_summary(model, Meter(None)))
    assert found["hit rate"] == "none was wanted" and found["read"].endswith("nothing was read")


@pytest.mark.parametrize(
    "memory, message",
    [
        ("much", "size 'much' is not a number of bytes such as '500MB', '5GB' or '2GiB'"),
        ("8", "size '8' is not"),
        ("-1GB", "size '-1GB' is not"),
        ("1KB", "expert memory of 1,000 bytes is too small: the least is"),
    ],
)
def test_a_budget_that_cannot_be(folder, memory, message):
    result = run("generate", "-m", folder, *GENERATE, "--expert-memory", memory)
    assert result.exit_code == 2 and result.stdout == ""
    assert message in result.stderr and result.stderr.count("\n") == 1


def test_a_checkpoint_without_fp8_experts(tmp_path):
    write_release(tmp_path / "bf16", SHAPES["v2-lite"]())
    result = run("generate", "-m", tmp_path / "bf16", *GENERATE, "--expert-memory", "1GB")
    assert result.exit_code == 2
    assert "found no experts mapped from files, wanted an FP8 checkpoint loaded on the CPU" in result.stderr


def test_chosen_and_told_where_memory_is_short(folder, monkeypatch, caplog):
    """Nothing is asked for: the experts do not fit, so what is free is used, and one line says so."""
    plain = generate(folder)
    monkeypatch.setattr(streaming_model, "WORKSPACE_BYTES", 0)
    monkeypatch.setattr(streaming_model, "_resident", small_resident(streaming_model._resident))
    monkeypatch.setattr(streaming_model, "probe_machine", lambda measure: Machine(150_000, 150_000, 1, None))
    logging.enable_propagation()
    result = generate(folder, "--stats")
    assert result.stdout == plain.stdout
    assert rows(result.stderr)["held"].endswith(" of 150.0 kB")
    told = [record.message for record in caplog.records if "experts are read as they are needed" in record.message]
    assert len(told) == 1 and "\n" not in told[0]


def small_resident(right):
    """What is no expert, and takes no memory, so that the memory there is goes to experts."""

    class Small:
        nbytes = 0

        def __init__(self, weights):
            self.read = weights.read

    return lambda model, files: Small(right(model, files))


def test_chat_tells_every_turn_its_own(folder):
    options = ("chat", "-m", folder, "-n", 4, "--temperature", 0)
    plain = run(*options, input="Hi\nAnd?\n")
    streamed = run(*options, "--expert-memory", "1GB", "--stats", input="Hi\nAnd?\n")
    assert streamed.exit_code == 0 and streamed.stdout == plain.stdout
    first, second = streamed.stderr.split("experts\n")[1:]
    counts = [re.search(r"([\d,]+) of ([\d,]+) wanted", turn).groups() for turn in (first, second)]
    (hits, wanted), (hits_later, wanted_later) = [[int(count.replace(",", "")) for count in pair] for pair in counts]
    assert 0 < wanted_later < 2 * wanted  # not counted on from the first
    assert hits / wanted < hits_later / wanted_later  # what the first turn read is still there
    assert "experts" not in plain.stderr


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_help_teaches(command):
    text = " ".join(run(command, "--help", env={"COLUMNS": "200"}).stdout.split())
    assert "--expert-memory" in text and "--stats" in text and "8GB" in text
    assert re.search(r"deepseek-moe " + command + r" [^│]*--expert-memory 16GB --stats", text)
