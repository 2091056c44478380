"""Attention over a long cache a chunk of keys at a time, and prompts by blocks, compared with one softmax in fp64."""

import pytest
import torch
from releases import SHAPES
from torch.profiler import ProfilerActivity, profile

import modeling_deepseek_moe as dsm
from modeling_deepseek_moe import attention_chunks as chunks
from modeling_deepseek_moe.compat import CACHE_NAME

BATCH, HEADS, LENGTH, KEYS, WIDTH, VALUE = 2, 3, 20, 70, 24, 16
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
FLASH = "aten::_scaled_dot_product_flash_attention_for_cpu"


def tensors(dtype, value=VALUE):
    torch.manual_seed(0)
    shapes = (HEADS, LENGTH, WIDTH), (HEADS, KEYS, WIDTH), (HEADS, KEYS, value)
    return [torch.randn(BATCH, *shape, dtype=dtype) for shape in shapes]


def visible(mask_kind):
    """Which keys each row sees: all before it, without the second row's padding; its first queries see nothing."""
    allowed = torch.ones(LENGTH, KEYS, dtype=torch.bool).tril(KEYS - LENGTH)[None, None].repeat(BATCH, 1, 1, 1)
    if mask_kind != "causal":
        allowed[1, :, :, :30] = False
        allowed[1, :, :5] = False
    return allowed


def mask_of(mask_kind, allowed, dtype):
    if mask_kind == "causal":
        return None
    if mask_kind == "boolean":
        return allowed
    if mask_kind == "fp32":  # as under autocast
        dtype = torch.float32
    lowest = -torch.inf if mask_kind == "minus infinity" else torch.finfo(dtype).min
    return torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, lowest)


@pytest.mark.parametrize("form", ["attend", "_matmul"])
@pytest.mark.parametrize("mask_kind", ["causal", "boolean", "minimum", "minus infinity", "fp32"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("chunk", [1, 16, 32, KEYS])
def test_chunks_make_one_softmax(monkeypatch, form, mask_kind, dtype, chunk):
    monkeypatch.setattr(chunks, "WORKSPACE_SCORES", 7 * BATCH * HEADS * chunk)  # several rows at a time
    query, key, value = tensors(dtype)
    allowed = visible(mask_kind)
    mask = mask_of(mask_kind, allowed, dtype)
    total = None
    for start in range(0, KEYS, chunk):
        keys = slice(start, min(start + chunk, KEYS))
        own = getattr(chunks, form)(query, key[:, :, keys], value[:, :, keys], mask, keys, KEYS, 0.3)
        total = chunks.merge(total, own)
    found = chunks.finish(*total, dtype)
    scores = (query.double() @ key.double().transpose(2, 3) * 0.3).masked_fill(~allowed, -torch.inf)
    wanted = (scores.softmax(-1).nan_to_num() @ value.double()).transpose(1, 2)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=TOLERANCE[dtype])


def test_values_wider_than_keys():
    query, key, value = tensors(torch.float64, WIDTH + 8)
    output, norm = chunks.attend(query, key, value, None, slice(0, KEYS), KEYS, 0.3)
    scores = (query @ key.transpose(2, 3) * 0.3).masked_fill(~visible("causal"), -torch.inf)
    torch.testing.assert_close(
        chunks.finish(output, norm, torch.float64), (scores.softmax(-1) @ value).transpose(1, 2)
    )


def test_gradients_pass_through_chunks():
    leaves = [tensor.requires_grad_() for tensor in tensors(torch.float64)]
    query, key, value = leaves
    total = None
    for keys in (slice(0, 40), slice(40, KEYS)):
        own = chunks.attend(query, key[:, :, keys], value[:, :, keys], None, keys, KEYS, 0.3)
        total = chunks.merge(total, own)
    chunks.finish(*total, torch.float64).square().sum().backward()
    found = [leaf.grad for leaf in leaves]
    scores = (query @ key.transpose(2, 3) * 0.3).masked_fill(~visible("causal"), -torch.inf)
    wanted = torch.autograd.grad((scores.softmax(-1) @ value).square().sum(), leaves)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


def operators(run):
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        run()
    return {event.key for event in profiled.key_averages()}


@pytest.mark.parametrize("training", [False, True])
def test_prompts_and_training_attend_by_blocks(training):
    """Without the scores of all pairs: neither in a prompt, nor in one over a cache, nor in training."""
    model = dsm.DeepseekV3ForCausalLM(SHAPES["moonlight"]()).train(training)
    ids = torch.arange(48)[None]
    if training:

        def step():
            model(ids, labels=ids, mla_path="expanded").loss.backward()

        assert FLASH in operators(step)
        return
    with torch.no_grad():
        assert FLASH in operators(lambda: model(ids, mla_path="expanded"))
        cache = model(ids[:, :20], use_cache=True)[CACHE_NAME]
        assert FLASH in operators(lambda: model(ids[:, 20:], cache=cache, mla_path="expanded"))
