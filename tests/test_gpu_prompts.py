"""Prompts by FlashAttention, without it and without a card: what it is called with, and which attention is not for it.

Functions that compute by plain torch stand in its place, see ``gpu.libraries``.
"""

import contextlib
from functools import partial

import pytest
import torch
from gpu import libraries
from gpu.libraries import BF16, FLASH_3, FLASH_4, install
from transformers import AutoModelForCausalLM

import modeling_deepseek_moe as dsm
from modeling_deepseek_moe.ops import _trials
from modeling_deepseek_moe.ops._dispatch import BackendError, use_backend
from modeling_deepseek_moe.ops.prompt_attention import attend, flash_attention


@pytest.fixture(autouse=True)
def on_a_card(monkeypatch):
    libraries.be_a_card(monkeypatch)
    monkeypatch.setattr(flash_attention, "current", lambda device: contextlib.nullcontext())
    yield
    _trials.forget()


class OnCard(torch.Tensor):
    """A tensor on a CPU that says it is on a card."""

    device = torch.device("cuda", 0)


@pytest.mark.parametrize("library", ("flash_attention_3", "flash_attention_4"))
@pytest.mark.parametrize("gradients", (False, True), ids=("inference", "training"))
def test_prompts(monkeypatch, library, gradients):
    package = library.replace("attention", "attn").replace("_", "-")
    modules = {"flash_attn_interface": FLASH_3} if library[-1] == "3" else {"flash_attn__cute": FLASH_4}
    told = install(monkeypatch, {package: "1.0"}, **modules)
    query, key = (torch.randn(2, 3, 140, 24).to(BF16) for _ in range(2))
    value = torch.randn(2, 3, 140, 40).to(BF16)[..., :16]  # a part of what was projected
    tensors = [tensor.requires_grad_(gradients) for tensor in (query, key, value)]
    own = partial(flash_attention._defined, scaling=0.3)
    cards = [tensor.as_subclass(OnCard) for tensor in tensors]
    reasons = partial(flash_attention.unsuitable, library, *cards)
    assert "no other mask, no bias and no dropout" in reasons(False, 0.3, own)
    assert flash_attention._tried(library, tensors, 0.3, own) is None
    heading = "attention over prompts, with gradients" if gradients else "attention over prompts"
    assert told[0].startswith(f"{heading} torch.bfloat16, 3, 24, 16, 2, 256 on cpu: FlashAttention {library[-1]}")
    found = flash_attention.attend(library, *tensors, 0.3)
    assert found.shape == (2, 140, 3, 16)
    torch.testing.assert_close(found, own(*tensors), rtol=2e-2, atol=2e-2)
    with use_backend(library):
        short = [tensor[:, :, :5] for tensor in cards]
        assert "bf16 or fp16" in flash_attention.unsuitable(library, *map(torch.Tensor.float, short), True, 0.3, own)
    assert "more than 128 tokens" in flash_attention.unsuitable(library, *short, True, 0.3, own)


@pytest.mark.parametrize(
    "others",
    [{"is_causal": False}, {"position_bias": torch.zeros(1, 1, 140, 140)}, {"softcap": 30.0}, {"dropout": 0.1}],
    ids=lambda others: next(iter(others)),
)
def test_attention_that_is_not_plainly_causal_stays_torchs(monkeypatch, others):
    told = install(monkeypatch, {"flash-attn-3": "3.0.0"}, flash_attn_interface=FLASH_3)
    tensors = [torch.randn(1, 2, 140, 16).to(BF16) for _ in range(3)]
    cards, seen = [tensor.as_subclass(OnCard) for tensor in tensors], {}

    def sdpa(module, *tensors, **arguments):
        seen.update(arguments)
        return "torch's", None

    assert attend(sdpa, None, *cards, None, **others)[0] == "torch's" and told == []
    assert all(seen[name] is value for name, value in others.items())
    not_causal = torch.nn.Module()
    not_causal.is_causal = False
    assert attend(sdpa, not_causal, *cards, None)[0] == "torch's" and told == []
    with use_backend("flash_attention_3"), pytest.raises(BackendError, match="attends causally, with no other mask"):
        attend(sdpa, None, *cards, None, **others)


def test_a_model_says_that_it_is_not_causal(monkeypatch):
    model, seen = AutoModelForCausalLM.from_pretrained(dsm.tiny_checkpoint()), []

    def unsuitable(library, query, key, value, is_plain, *_):
        seen.append(is_plain)
        return "is not there"

    monkeypatch.setattr(flash_attention, "unsuitable", unsuitable)
    for is_causal in (True, False):
        model(torch.arange(4, 24).view(1, 20), is_causal=is_causal)
        assert set(seen) == {is_causal}
        seen.clear()
