"""The demo in miniature: its text, its tokenizer, its training, and the checkpoints and figures it leaves behind."""

import json
import re
import subprocess
import sys

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from modeling_deepseek_moe import CheckpointReader
from modeling_deepseek_moe.cli import _demo_model, _demo_run, app
from modeling_deepseek_moe.cli._demo_measure import decode_speeds, fastest_threads, perplexity, resident_bytes
from modeling_deepseek_moe.cli._demo_text import write_corpus

STEPS = 12
SMALL = {
    _demo_model: {"BATCH_ROWS": 4},
    _demo_run: {"HELD_OUT_ROWS": 16, "SHORT": 32, "LONG": 160, "DECODE_TOKENS": 2, "SAMPLE_TOKENS": 4},
}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Output folder and figures of one small run over the demo's own text."""
    out = tmp_path_factory.mktemp("demo") / "out"
    text = out.parent / "text.txt"
    text.write_text(write_corpus(size=40_000), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        for module, constants in SMALL.items():
            for name, value in constants.items():
                patch.setattr(module, name, value)
        return out, _demo_run.run(out, text, steps=STEPS, seconds=1000, seed=0, threads=1)


def test_loss_falls(demo):
    _, figures = demo
    assert figures["steps"] == STEPS
    assert figures["loss_after"] < figures["loss_before"] - 0.5


def test_fp8_keeps_the_perplexity_in_about_half_the_bytes(demo):
    _, figures = demo
    perplexities, resident = figures["perplexity"], figures["resident_bytes"]
    assert perplexities[_demo_run.FP8] == pytest.approx(perplexities[_demo_run.BF16], rel=0.02)
    assert perplexities[_demo_run.BF16] == pytest.approx(perplexities[_demo_run.PLAIN], rel=2e-3)
    assert perplexities[_demo_run.FP8] == pytest.approx(perplexities[_demo_run.PLAIN_FP8], rel=2e-3)
    assert 0.5 < resident[_demo_run.FP8] / resident[_demo_run.BF16] < 0.6


def test_both_checkpoints_load_and_speak(demo):
    out, figures = demo
    for name in ("bf16", "fp8"):
        model = AutoModelForCausalLM.from_pretrained(out / name)
        tokenizer = AutoTokenizer.from_pretrained(out / name)
        messages = [{"role": "user", "content": "Who?"}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        assert ids[0, 0] == tokenizer.bos_token_id and (ids == tokenizer.bos_token_id).sum() == 1
        assert model.generate(ids, max_new_tokens=2, do_sample=False).shape[1] > ids.shape[1]
    codes = CheckpointReader.open(out / "fp8")["model.layers.1.mlp.experts.0.gate_proj.weight"]
    assert codes.dtype == torch.float8_e4m3fn
    assert json.loads((out / "demo.json").read_text()) == json.loads(json.dumps(figures))


def test_resident_bytes_are_the_file(demo):
    out, _ = demo
    held = resident_bytes(AutoModelForCausalLM.from_pretrained(out / "fp8"))
    assert held.total == CheckpointReader.open(out / "fp8").nbytes
    assert held.mapped > held.owned
    assert resident_bytes(AutoModelForCausalLM.from_pretrained(out / "bf16")).mapped == 0


def test_measures_agree_with_the_model(demo):
    out, _ = demo
    model = AutoModelForCausalLM.from_pretrained(out / "bf16", dtype=torch.float32).eval()
    rows = torch.randint(3, 1000, (3, 20), generator=torch.Generator().manual_seed(0))
    loss = torch.stack([model(row[None], labels=row[None]).loss for row in rows]).mean()
    assert perplexity(model, rows, batch=2) == pytest.approx(loss.exp().item(), rel=1e-5)
    assert fastest_threads(model, rows) == torch.get_num_threads() >= 1
    speeds = decode_speeds({"a": model, "b": model}, rows[:1], tokens=2)
    assert set(speeds) == {"a", "b"} and all(speed > 0 for speed in speeds.values())


def test_training_stops_when_time_runs_out():
    budget = _demo_model.Budget(steps=100, seconds=1e-9, console=Console(quiet=True))
    assert budget.fraction_done(50) == 0.5  # not started
    budget.start = 0.0
    assert budget.fraction_done(1) == 1.0
    assert budget.learning_rate_factor(99) == pytest.approx(0.05)


def test_corpus_follows_from_its_seed():
    text = write_corpus(seed=3, size=30_000)
    assert text == write_corpus(seed=3, size=30_000)
    assert text != write_corpus(seed=4, size=30_000)
    assert 30_000 <= len(text) < 32_000
    assert "{" not in text


def test_corpus_is_consistent():
    text = write_corpus(size=200_000)
    sums = re.findall(r"(\d+) ([+−×]) (\d+) = (\d+)", text)
    operations = {"+": int.__add__, "−": int.__sub__, "×": int.__mul__}
    assert len(sums) > 100
    assert all(operations[sign](int(a), int(b)) == int(result) for a, sign, b, result in sums)
    rivers = {}
    for town, river in re.findall(r"(\w+) lies on the (\w+)", text):
        rivers.setdefault(town, set()).add(river)
    assert len(rivers) > 30 and all(len(found) == 1 for found in rivers.values())


def test_tokenizer_is_reproducible_and_lossless():
    documents = write_corpus(size=20_000).split("\n\n")
    first, second = (_demo_model.train_tokenizer(documents, vocab_size=512) for _ in range(2))
    assert first.get_vocab() == second.get_vocab() and len(first) == 512
    text = "Ünïcode, 2026 − 19 = 2007;\n\ttabs"
    ids = first(text)["input_ids"]
    assert ids[0] == first.bos_token_id
    assert first.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize(
    "content, message",
    [
        pytest.param(b"one line", "found 1 paragraphs or lines", id="one-line"),
        pytest.param(b"too\nshort", "found 0 rows of 128 tokens", id="short"),
        pytest.param(b"\xff\xfe\x00binary", "found no UTF-8 text", id="binary"),
    ],
)
def test_unusable_text_is_refused(tmp_path, content, message):
    text = tmp_path / "text.txt"
    text.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        _demo_run.run(tmp_path / "out", text, steps=1, seconds=1, seed=0, threads=1)
    assert not (tmp_path / "out").exists()


def test_the_command_runs_in_a_child_whose_threads_sleep(monkeypatch):
    calls = []
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setattr(subprocess, "call", lambda command, env: calls.append((command, env)) or 7)
    result = CliRunner().invoke(app, ["demo", "--steps", "5", "--out", "somewhere"])
    assert result.exit_code == 7
    [(command, env)] = calls
    assert env["OMP_WAIT_POLICY"] == "PASSIVE"
    assert command[0] == sys.executable
    assert command[3:] == ["demo", "--out", "somewhere", "--steps", "5", "--minutes", "3.0", "--seed", "0"]


def test_absent_text_is_refused(tmp_path):
    with pytest.raises(ValueError, match="found no such file"):
        _demo_run.run(tmp_path / "out", tmp_path / "none", steps=1, seconds=1, seed=0, threads=1)


def test_output_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(ValueError, match="found a file"):
        _demo_run.run(tmp_path / "out", None, steps=1, seconds=1, seed=0, threads=1)
