"""What `plan` says of MTP decoding: bytes of a step, tokens that it makes, and from which acceptance on it pays."""

from functools import cache

import pytest

from modeling_deepseek_moe import DeepseekV3Config, Machine, make_plan, parameter_breakdown
from modeling_deepseek_moe.cli.plan import _mtp_line
from modeling_deepseek_moe.formats import FP8
from modeling_deepseek_moe.machine import Bandwidth
from modeling_deepseek_moe.planning_drafts import experts_read, tokens_per_step

QUANTIZATION = {"quant_method": "fp8", "weight_block_size": [128, 128]}


@cache
def v3(**changes):
    return parameter_breakdown(DeepseekV3Config(quantization_config=QUANTIZATION, **changes))


def machine(gigabytes: int) -> Machine:
    return Machine(gigabytes * 10**9, gigabytes * 10**9, 64, Bandwidth(400e9, 10**9, 3))


def drafting(breakdown, gigabytes: int = 768, **options):
    return make_plan(breakdown, machine(gigabytes), 4096, **options).drafting


def test_a_step_of_v3():
    """The bytes by hand: two tokens choose 15.75 of 256 experts, 8 each; the MTP layer has a layer's experts and a head."""
    found, breakdown = drafting(v3()), v3()
    routed = breakdown.active["routed experts"].nbytes(FP8)
    assert found.plain_bytes == breakdown.active_bytes(FP8) + breakdown.cache_bytes(4096)
    assert found.verify_bytes - found.plain_bytes == pytest.approx(routed * (15.75 / 8 - 1), rel=1e-6)
    expert, attention, shared = 3 * 7168 * 2048, 187.1e6, 3 * 7168 * 2048
    by_hand = 15.75 * expert + attention + shared + 4 * 7168**2 + 2 * 129280 * 7168  # the last two are bf16
    assert found.draft_bytes == pytest.approx(by_hand, rel=0.01)
    assert found.cost == pytest.approx((found.verify_bytes + found.draft_bytes) / found.plain_bytes)


def test_where_it_pays():
    found = drafting(v3())
    assert found.tokens_per_step == 1.85 and found.pays
    assert found.break_even == pytest.approx(found.cost - 1)  # with one draft, 1 + a tokens
    assert not drafting(v3(), acceptance=found.break_even - 0.01).pays
    assert drafting(v3(), acceptance=found.break_even + 0.01).pays
    assert drafting(v3(), acceptance=found.break_even).speedup == pytest.approx(1)


def test_experts_from_a_disk_are_read_twice_for_two_tokens():
    found = drafting(v3(), 64)
    assert found.cost > 1.95 and not found.pays and found.break_even is None
    assert "would not pay even if every draft were right" in _mtp_line(found)


def test_what_is_printed():
    found = drafting(v3(), acceptance=0.5)
    assert f"1.50 tokens at an acceptance of 0.50: × {1.5 / found.cost:.2f}" in _mtp_line(found)
    assert f"It pays above an acceptance of {found.break_even:.2f}, so not here." in _mtp_line(found)
    assert _mtp_line(drafting(v3())).endswith(f"It pays above an acceptance of {found.break_even:.2f}.")


def test_more_layers_draft_more_tokens():
    one, three = drafting(v3()), drafting(v3(num_nextn_predict_layers=3))
    assert three.drafts == 3 and three.tokens_per_step == pytest.approx(1 + 0.85 + 0.85**2 + 0.85**3)
    assert three.draft_bytes > 3 * one.draft_bytes and three.cost > one.cost
    assert tokens_per_step(three.break_even, 3) == pytest.approx(three.cost)


def test_the_experts_of_several_tokens():
    breakdown = v3()
    assert experts_read(breakdown, 1) == pytest.approx(1)
    assert experts_read(breakdown, 2) == pytest.approx((8 + 8 * 248 / 256) / 8)
    assert experts_read(breakdown, 10_000) == pytest.approx(256 / 8)


def test_models_without_what_it_takes():
    assert drafting(v3(num_nextn_predict_layers=0)) is None
    assert drafting(v3(), 16) is None  # does not run at all
    dense = drafting(v3(first_k_dense_replace=61, moe_layer_freq=1))
    assert dense.verify_bytes == dense.plain_bytes


@pytest.mark.parametrize("acceptance", [-0.1, 1.1])
def test_no_probability(acceptance):
    with pytest.raises(ValueError, match=f"acceptance={acceptance} must be between 0 and 1"):
        drafting(v3(), acceptance=acceptance)
