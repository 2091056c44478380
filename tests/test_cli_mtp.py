"""``generate`` and ``chat`` with ``--mtp`` and ``--drafts``, and ``plan``'s line on them."""

import json
import re
from pathlib import Path

import pytest
import torch
from test_cli import run, run_json

from modeling_deepseek_moe import Machine
from modeling_deepseek_moe.cli._model import IdStreamer, Meter
from modeling_deepseek_moe.machine import Bandwidth
from modeling_deepseek_moe.modeling import DeepseekMoeForCausalLM
from modeling_deepseek_moe.tiny import tiny_checkpoint

TINY = Path(tiny_checkpoint())
ASKED = ("generate", "-m", TINY, "--temperature", 0)


@pytest.fixture
def asked_of_generate(monkeypatch):
    """What ``use_mtp`` was in each call of `generate`."""
    calls, generate = [], DeepseekMoeForCausalLM.generate

    def noted(self, *args, **kwargs):
        calls.append(kwargs.get("use_mtp"))
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(DeepseekMoeForCausalLM, "generate", noted)
    return calls


@pytest.mark.parametrize(
    "options, wanted",
    [((), None), (("--mtp",), "auto"), (("--drafts", 1), 1), (("--drafts", 3), 3), (("--mtp", "--drafts", 2), 2)],
    ids=str,
)
def test_the_same_answer(asked_of_generate, options, wanted):
    result = run(*ASKED, *options)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.strip().endswith(r"The answer is \boxed{7}.")
    assert asked_of_generate == [wanted]
    shown = re.search(r"MTP: ([\d.]+) tokens a pass, (\d+)% of (\d+) drafts? stood", result.stderr)
    # what auto does depends on the time that steps take
    assert bool(shown) == bool(options) or (wanted == "auto" and "MTP: nothing was drafted" in result.stderr)
    if wanted == 3:
        assert float(shown[1]) > 1.5 and int(shown[2]) > 40


def test_a_conversation(asked_of_generate):
    """Turn after turn on one cache, which the MTP layers have seen none of."""
    lines = "Ada has 3 pens and buys 4 more. How many pens does Ada have now?\n/reset\nWhat is 5 + 4?\nAnd 2 + 2?\n"
    plain, drafted = (
        run("chat", "-m", TINY, "--temperature", 0, "-n", 40, *options, input=lines)
        for options in ((), ("--drafts", 2))
    )
    assert drafted.exit_code == 0, drafted.stderr
    assert drafted.stdout == plain.stdout and r"\boxed{7}" in plain.stdout
    assert asked_of_generate == [None] * 3 + [2] * 3


class TestRefused:
    def test_a_model_without_mtp_layers(self, tmp_path):
        config = json.loads((TINY / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 0}))
        for option in (("--mtp",), ("--drafts", 2)):
            result = run("generate", "-m", tmp_path, "--token-ids", "1,2", *option)
            assert result.exit_code == 2
            words = f"{option[0]}: {tmp_path}: num_nextn_predict_layers: found 0, wanted a model with MTP layers"
            assert words in " ".join(result.stderr.split())

    def test_an_adapter(self, tmp_path):
        result = run(*ASKED, "--mtp", "--adapter", tmp_path)
        assert f"--mtp: found --adapter {tmp_path} with it, wanted one of them" in " ".join(result.stderr.split())
        assert "merge-adapter" in " ".join(result.stderr.split())

    def test_no_draft(self):
        assert run(*ASKED, "--drafts", 0).exit_code == 2


def test_the_meter_counts_tokens_that_come_together(capsys):
    meter = Meter(IdStreamer())
    for value in (torch.tensor([[1, 2, 3]]), torch.tensor([4, 5]), torch.tensor([6])):
        meter.put(value)
    assert (meter.prompt_tokens, meter.new_tokens) == (3, 3)


def test_plan_says_whether_it_pays(monkeypatch):
    machine = Machine(25 * 10**9, 24 * 10**9, 2, Bandwidth(40e9, 10**9, 3))
    monkeypatch.setattr("modeling_deepseek_moe.cli.plan.probe_machine", lambda: machine)
    shown = " ".join(run("plan", TINY).stdout.split())
    assert "MTP (generate --mtp): a step of 1 draft reads" in shown
    assert "for 1.85 tokens at an acceptance of 0.85" in shown
    made, _ = run_json("plan", TINY, "--acceptance", 0.5)
    assert made["drafting"]["tokens_per_step"] == 1.5 and made["drafting"]["acceptance"] == 0.5
