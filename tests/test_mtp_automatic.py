"""``use_mtp="auto"``: drafts are tried on an account, go on where they pay, and never cost much; clocks are made up."""

import itertools
import random

import pytest
import torch
from releases import SHAPES

import modeling_deepseek_moe as dsm
from modeling_deepseek_moe.decoding.choose import ALLOWED, CLEARLY, DRAFTED_STEPS, Choice
from modeling_deepseek_moe.decoding.expected import Expected, expect
from modeling_deepseek_moe.decoding.loop import DraftStats

PROMISES, DOES_NOT = Expected(1, 1.5, 1.7), Expected(1, 1.88, 2.5)


def write(monkeypatch, tokens: int, expected: Expected, cost: float, acceptance, first: float = 0.0):
    """A text of one row, in plain steps' time: when each token was there, and what each step drafted.

    Args:
        acceptance: of the draft for a token, by its place.
        first: what a drafted step takes besides after a plain one.
    """
    now, chance = [0.0], random.Random(0)
    monkeypatch.setattr("modeling_deepseek_moe.decoding.choose.time.perf_counter", lambda: now[0])
    choice, stats, drafted, times = Choice(1, expected), DraftStats(), [], []
    while stats.tokens < tokens:
        with choice.step(min(1, tokens - stats.tokens - 1), stats) as count:
            now[0] += (cost + first * (drafted[-1:] != [1])) if count else 1.0
            made = 1 + (chance.random() < acceptance(stats.tokens)) if count else 1
            stats.tokens, stats.row_steps = stats.tokens + made, stats.row_steps + 1
        drafted.append(count)
        times += [now[0]] * made
    return choice, times, drafted


@pytest.mark.parametrize("expected", [PROMISES, DOES_NOT], ids=["promised", "not promised"])
@pytest.mark.parametrize("cost", [1.3, 1.9, 2.2, 4.0])
@pytest.mark.parametrize("acceptance", [0.0, 0.6, 0.8, 0.9])
def test_no_text_takes_much_longer_than_a_plain_one(monkeypatch, expected, cost, acceptance):
    """At whichever token it ends: by the share that may be lost, and what a step took longer than was reckoned."""
    _, times, _ = write(monkeypatch, 1000, expected, cost, lambda _: acceptance, first=0.5)
    surprise = max(0.0, cost + 0.5 - CLEARLY * expected.first) + max(0.0, cost - CLEARLY * expected.cost)
    slack = surprise + 0.1  # clocks of steps that give two tokens
    assert all(time <= (1 + ALLOWED) * (place + 1) + slack for place, time in enumerate(times))
    assert times[-1] <= 1.03 * len(times)
    if cost <= CLEARLY * expected.cost - 0.5:  # nothing surprises
        assert all(time <= (place + 1) / 0.97 + 0.1 for place, time in enumerate(times))


@pytest.mark.parametrize("cost", [1.4, 1.6])
def test_reading_what_was_said_meanwhile_is_no_part_of_what_a_draft_costs(monkeypatch, cost):
    """Each run of drafts begins with a step that takes thrice a plain one: those after it pay, and are measured by themselves."""
    choice, times, _ = write(monkeypatch, 3000, PROMISES, cost, lambda _: 0.9, first=3 - cost)
    assert choice.pays and times[-1] < 0.95 * 3000


@pytest.mark.parametrize("expected", [PROMISES, DOES_NOT], ids=["promised", "not promised"])
def test_what_pays_is_found(monkeypatch, expected):
    choice, times, drafted = write(monkeypatch, 1000, expected, 1.3, lambda _: 0.9)
    assert choice.pays and times[-1] < 0.85 * 1000
    if expected is PROMISES:
        assert drafted.index(1) < 50 and all(drafted[drafted.index(1) : -1]) and times[-1] < 0.73 * 1000


@pytest.mark.parametrize(
    ("cost", "acceptance", "steps"),
    [(1.5, 0.2, DRAFTED_STEPS), (2.5, 1.0, 1), (2.1, 1.0, 2)],  # the latter two no draft could make up for
)
def test_what_does_not_pay_is_left(monkeypatch, cost, acceptance, steps):
    choice, _, drafted = write(monkeypatch, 2000, PROMISES, cost, lambda _: acceptance)
    measured = sum(a == b == 1 for a, b in itertools.pairwise(drafted))
    assert choice.pays is False and 0 < measured <= steps


def test_drafts_that_stop_paying_are_left(monkeypatch):
    choice, times, drafted = write(monkeypatch, 1000, PROMISES, 1.4, lambda place: 0.95 if place < 500 else 0.1)
    assert times[499] < 400 and times[999] - times[499] < 1.03 * 500
    assert choice.pays is False and not any(drafted[-200:])


def test_the_bytes_say_beforehand_where_nothing_pays(caplog):
    """A large vocabulary and few layers: a draft reads as much as the model. The text is that of plain decoding, by its loop."""
    torch.manual_seed(0)
    model = dsm.DeepseekV3ForCausalLM(SHAPES["v3-mtp"]()).eval()
    expected = expect(model, 1, 1, 32)
    assert expected.hopeless() is None and expected.first >= expected.cost > 1
    config = SHAPES["v3-mtp"]()
    config.vocab_size = 60000
    model = dsm.DeepseekV3ForCausalLM(config).eval()
    expected = expect(model, 1, 1, 32)
    assert expected.cost > 1.9 and "takes" in expected.hopeless()
    ids = torch.randint(3, 60, (2, 9))
    settings = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    wanted = model.generate(ids, **settings)
    assert torch.equal(model.generate(ids, use_mtp="auto", **settings), wanted)
    stats = model.draft_stats
    assert stats.reason == expect(model, 2, 1, 32).hopeless() and (stats.steps, stats.tokens_per_pass) == (0, 1.0)
    assert torch.equal(model.generate(ids, use_mtp=True, **settings), wanted)
    assert model.draft_stats.reason is None and model.draft_stats.drafted
    with pytest.raises(ValueError, match="use_mtp='auto': num_beams=2 does not go with it"):
        model.generate(ids, use_mtp="auto", num_beams=2, **settings)


def test_bytes_are_those_of_the_model_as_it_is():
    """Codes of mapped files, and the same dequantised: the parts weigh the same relative to one another, nearly."""
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    found = []
    for settings in ({}, {"quantization_config": FineGrainedFP8Config(dequantize=True), "dtype": torch.bfloat16}):
        model = AutoModelForCausalLM.from_pretrained(dsm.tiny_checkpoint(), **settings).eval()
        found.append(expect(model, 1, 1, 32).cost)
    assert found[0] == pytest.approx(found[1], rel=0.1) and 1.3 < found[0] < 1.7
