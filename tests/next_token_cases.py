"""What the tests of a token's one call share: a model, its steps, and which of them were taken in that call."""

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from modeling_deepseek_moe.engine.next_token import NextToken

KINDS = [("v3", False), ("v3", True), ("v2", False)]  # of release, and whether it is in FP8


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()


def note_steps(patch: pytest.MonkeyPatch) -> list[int]:
    """The positions of the steps that are taken in one call."""
    positions, run = [], NextToken.run

    def noted(self, plan, input_ids, cache, past_length):
        positions.append(past_length)
        return run(self, plan, input_ids, cache, past_length)

    patch.setattr(NextToken, "run", noted)
    return positions


def ids(rows: int, length: int) -> torch.Tensor:
    return torch.randint(3, 128, (rows, length), generator=torch.Generator().manual_seed(length))


@torch.no_grad()
def steps(model, rows=2, count=5, between=None, **asked) -> torch.Tensor:
    """Logits of a prompt of 9 tokens, and of ``count`` more; ``between`` is called with the model before the fourth."""
    cache = DynamicCache(config=model.config)
    found = [model(ids(rows, 9), cache=cache).logits[:, -1]]
    for step in range(count):
        if between is not None and step == 3:
            between(model)
        new = {name: make(rows, 9 + step) for name, make in asked.items()}
        found.append(model(torch.full((rows, 1), 5 + step), cache=cache, **new).logits[:, -1])
    assert cache.get_seq_length() == 9 + count
    return torch.stack(found)


@torch.no_grad()
def decoding(model, rows=1) -> DynamicCache:
    """The cache of a model that would take the next step in one call."""
    cache = DynamicCache(config=model.config)
    for length in (9, 1, 1):
        model(ids(rows, length), cache=cache)
    return cache
