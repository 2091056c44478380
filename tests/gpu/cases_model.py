"""Tokens through whole decoders as `engine.card` runs them, against the layers' own calls: what is handed to which kernel.

Operators get their implementations for tensors of the CPU too, which the interpreter takes.
"""

import copy
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, QuantizedCache, StaticCache

from modeling_deepseek_moe.cache import Fp8StaticCache, prepare_cache
from modeling_deepseek_moe.compat import CACHE_NAME
from modeling_deepseek_moe.engine import card
from modeling_deepseek_moe.ops import _triton, absorbed_attention, block_fp8, mla_project, rms_norm, routing, swiglu
from modeling_deepseek_moe.ops._dispatch import use_backend
from modeling_deepseek_moe.ops._library import LIBRARY

sys.path.append(str(Path(__file__).parent.parent))
from releases import SHAPES, write_release

FOLDERS = (absorbed_attention, block_fp8, mla_project, rms_norm, routing, swiglu)
OPERATORS = [
    call for folder in FOLDERS for call in vars(folder.triton).values() if callable(call) and hasattr(call, "operator")
]
IDS = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(IDS)
MASK[1, :3] = 0  # the second row is padded on the left
POSITIONS = (MASK.cumsum(-1) - 1).clamp(min=0)


@pytest.fixture(autouse=True, scope="module")
def on_the_cpu():
    """Kernels take the CPU's tensors, which they refuse elsewhere."""
    for call in OPERATORS:
        LIBRARY.impl(call.operator._schema.name.partition("::")[2], call.cuda, "CPU")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_triton, "unsupported_reason", lambda *tensors, **named: None)
        yield


def run_on_card(monkeypatch):
    """The model's loop over its layers takes `card.run` for a new token."""

    def calls(model, layers, hidden_states, cache, context):
        if hidden_states.shape[1] > 1:
            return layers
        assert card.unsupported_reason(layers, hidden_states, cache) is None
        return [lambda states, **context: card.run(layers, states, **context)]

    def prepared(cache, config, query_length):
        """On a device one token does not learn how far a static cache is filled."""
        length = prepare_cache(cache, config, query_length)
        return None if query_length == 1 and isinstance(cache, StaticCache) else length

    monkeypatch.setattr("modeling_deepseek_moe.engine.runs._calls", calls)
    monkeypatch.setattr("modeling_deepseek_moe.modeling.prepare_cache", prepared)


CACHES = {
    "growing": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config, max_cache_len=16),
    "growing FP8": lambda config: QuantizedCache("fp8", config),
    "static FP8": lambda config: Fp8StaticCache(config, max_cache_len=16),
}


@torch.no_grad()
def decode(model, kind: str) -> torch.Tensor:
    """Logits of the last tokens, each by itself after a prompt."""
    cache = CACHES[kind](model.config)
    found = []
    with use_backend("auto"):
        for start, end in ((0, 6), (6, 7), (7, 8), (8, 9)):
            out = model(
                IDS[:, start:end],
                attention_mask=MASK[:, :end],
                position_ids=POSITIONS[:, start:end],
                **{CACHE_NAME: cache},
            )
            found.append(out.logits[:, -1])
    return torch.stack(found[1:])


CASES = [  # a shape, whether it is FP8, the attention implementation, and the cache
    ("v3", True, "sdpa", "growing"),
    ("v3", True, "eager", "static"),
    ("v3", False, "eager", "growing"),
    ("v2-lite", True, "sdpa", "static"),
    ("v3", False, "sdpa", "growing FP8"),
    ("v2-lite", False, "sdpa", "static FP8"),
]


@pytest.mark.parametrize("shape, fp8, implementation, cache", CASES)
def test_a_step(tmp_path, monkeypatch, shape, fp8, implementation, cache):
    write_release(tmp_path, SHAPES[shape](), fp8=fp8)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation=implementation)
    wanted = decode(model, cache)
    run_on_card(monkeypatch)
    torch.testing.assert_close(decode(model, cache), wanted, atol=2e-4, rtol=2e-4)


def test_a_hooked_layer_is_called(tmp_path):
    write_release(tmp_path, SHAPES["v3"](), fp8=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(IDS, **{CACHE_NAME: cache})
        states, layers = torch.zeros(2, 1, 64), list(model.model.layers)
        assert card.unsupported_reason(layers, states, cache) is None
        other = copy.deepcopy(layers[1])
        other.register_forward_hook(lambda *_: None)
        assert "with no hook" in card.unsupported_reason([layers[0], other, layers[2]], states, cache)
