"""The indexer's choice and attention over it, by their definitions: one query, one head, one key at a time."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers.cache_utils import DynamicCache, DynamicIndexedLayer

from modeling_deepseek_moe.cache import update_indexer
from modeling_deepseek_moe.ops.indexer import reference, select
from modeling_deepseek_moe.ops.sparse_attention import reference as attention
from modeling_deepseek_moe.ops.sparse_attention import sparse_attention


def scores_of(queries, weights, keys):
    return torch.einsum("bsh,bsht->bst", weights, torch.einsum("bshd,btd->bsht", queries, keys).relu())


def tensors(batch=2, length=9, total=23, heads=5, dim=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, length, heads, dim), (batch, length, heads), (batch, total, dim)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def chosen(scores, visible, topk):
    """Row by row with a stable sort."""
    found = torch.full((*scores.shape[:2], min(topk, scores.shape[2])), -1)
    for b in range(scores.shape[0]):
        for s in range(scores.shape[1]):
            order = scores[b, s].masked_fill(~visible[b, s], float("-inf")).sort(descending=True, stable=True).indices
            order = [int(t) for t in order if visible[b, s, t]][:topk]
            found[b, s, : len(order)] = torch.tensor(sorted(order))
    return found


MASKS = ["causal", "padded", "dense", "added"]


def mask_of(kind, batch, length, total):
    """What `select` takes, and which keys ``[B, S, T]`` that lets each query see."""
    causal = torch.arange(total) <= torch.arange(length)[:, None] + total - length
    causal = causal.expand(batch, -1, -1)
    if kind == "causal":
        return None, causal
    if kind == "padded":
        keys = torch.arange(total)[None] >= torch.tensor([0, 17])[:batch, None]
        return keys[:, None, None], causal & keys[:, None]
    dense = causal & (torch.rand(batch, length, total, generator=torch.Generator().manual_seed(1)) < 0.7)
    if kind == "dense":
        return dense[:, None], dense
    return torch.zeros(dense.shape).masked_fill(~dense, torch.finfo(torch.float32).min)[:, None], dense


@pytest.mark.parametrize("workspace", [1 << 24, 64], ids=["one block", "small blocks"])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("topk", [1, 6, 23, 100])
def test_choice_is_the_definition_s(monkeypatch, kind, topk, workspace):
    monkeypatch.setattr(reference, "WORKSPACE", workspace)
    monkeypatch.setattr(reference, "KEYS", 5 if workspace == 64 else 8192)
    queries, weights, keys = tensors()
    mask, visible = mask_of(kind, 2, 9, 23)
    found = select(queries, weights, keys, topk, mask)
    assert found.dtype == torch.int32 and found.shape == (2, 9, min(topk, 23))
    assert torch.equal(found.long(), chosen(scores_of(queries, weights, keys), visible, topk))


@pytest.mark.parametrize("keys_of_a_block", [3, 8192])
def test_of_equal_scores_the_earlier_key(monkeypatch, keys_of_a_block):
    monkeypatch.setattr(reference, "KEYS", keys_of_a_block)
    monkeypatch.setattr(reference, "WORKSPACE", keys_of_a_block)
    queries, weights, keys = torch.ones(1, 8, 1, 2), torch.ones(1, 8, 1), torch.ones(1, 8, 2)
    keys[0, 5] = 2
    found = reference.select(queries, weights, keys, 3)
    assert (
        found[0, -1].tolist() == [0, 1, 5]
        and found[0, 4].tolist() == [0, 1, 2]
        and found[0, 0].tolist() == [0, -1, -1]
    )


@pytest.mark.parametrize("heads", [2, 16])
def test_with_few_heads_equal_scores_are_torchs_to_choose_from(heads):
    """As transformers does; with many, scores are not equal."""
    queries, weights, keys = tensors(heads=heads, length=23)
    scores = scores_of(queries, weights, keys).masked_fill(torch.ones(23, 23).triu(1).bool(), float("-inf"))
    wanted = scores[:, 8:].float().topk(8, dim=-1).indices.sort(dim=-1).values
    assert (scores[:, 8:] == 0).any() == (heads == 2)
    assert torch.equal(select(queries, weights, keys, 8)[:, 8:].long(), wanted)


def test_a_query_that_sees_nothing_chooses_nothing():
    queries, weights, keys = tensors()
    nothing = torch.zeros(2, 1, 9, 23, dtype=torch.bool)
    assert (select(queries, weights, keys, 4, nothing) == -1).all()
    keys[0, 0] = float("nan")  # of a row that is lost already
    assert select(queries, weights, keys, 4).shape == (2, 9, 4)


def latents(batch=2, heads=3, length=7, total=19, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    shapes = (batch, heads, length, 6), (batch, heads, length, 4), (batch, 1, total, 8), (batch, 1, total, 4)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def by_definition(q_nope, q_pe, c_kv, k_pe, indices, weight, scaling):
    """Expanded keys and values, and a mask of all that was not chosen."""
    batch, heads, length, nope = q_nope.shape
    up = (c_kv.squeeze(1) @ weight.T).unflatten(-1, (heads, -1)).transpose(1, 2)
    key = torch.cat((up[..., :nope], k_pe.expand(-1, heads, -1, -1)), dim=-1)
    scores = torch.cat((q_nope, q_pe), dim=-1) @ key.transpose(2, 3) * scaling
    visible = torch.zeros(batch, length, c_kv.shape[2] + 1, dtype=torch.bool)
    visible = visible.scatter(2, indices.long() % (c_kv.shape[2] + 1), True)[..., :-1]
    weights = scores.masked_fill(~visible[:, None], float("-inf")).softmax(-1).nan_to_num(0)
    return (weights @ up[..., nope:]).transpose(1, 2)


@pytest.mark.parametrize("workspace", [1 << 24, 100], ids=["one block", "small blocks"])
def test_attention_and_its_gradients_are_the_definition_s(monkeypatch, workspace):
    monkeypatch.setattr(attention, "WORKSPACE", workspace)
    layer = nn.Linear(8, 3 * (6 + 5), bias=False, dtype=torch.float64)
    arguments = [tensor.requires_grad_() for tensor in latents()]
    queries, weights, keys = tensors(length=7, total=19)
    indices = select(queries, weights, keys, 5)
    indices[0, 2] = -1  # a query that sees nothing
    found = sparse_attention(*arguments, indices, layer, 0.3)
    wanted = by_definition(*arguments, indices, layer.weight, 0.3)
    assert found.shape == (2, 7, 3, 5) and (found - wanted).abs().max() < 1e-12
    assert not found[0, 2].any()
    direction = torch.randn(found.shape, generator=torch.Generator().manual_seed(4), dtype=found.dtype)
    inputs = (*arguments, layer.weight)
    gradients = [
        torch.autograd.grad((output * direction).sum(), inputs, retain_graph=True) for output in (found, wanted)
    ]
    assert all((a - b).abs().max() < 1e-12 for a, b in zip(*gradients, strict=True))


def test_one_query_attends_as_many_do():
    layer = nn.Linear(8, 3 * (6 + 5), bias=False, dtype=torch.float64)
    q_nope, q_pe, c_kv, k_pe = latents()
    indices = select(*tensors(length=7, total=19), 5)
    with torch.no_grad():
        whole = sparse_attention(q_nope, q_pe, c_kv, k_pe, indices, layer, 0.3)
        last = sparse_attention(q_nope[:, :, -1:], q_pe[:, :, -1:], c_kv, k_pe, indices[:, -1:], layer, 0.3)
    assert (whole[:, -1:] - last).abs().max() < 1e-12


def test_offloaded_keys_have_arrived_before_they_are_read(monkeypatch):
    """The layer before fetches them on a stream of the cache's own."""
    order, given, read = [], DynamicCache(), DynamicCache.update_indexer
    given.layer_class_to_replicate = DynamicIndexedLayer
    monkeypatch.setattr(DynamicCache, "update_indexer", lambda *args: order.append("read") or read(*args))
    stream = SimpleNamespace(wait_stream=lambda other: order.append(f"wait for {other}"))
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: stream)
    update_indexer(given, torch.ones(1, 4, 8), 0)
    assert order == ["read"]
    given.offloading, given.prefetch_stream = True, "the fetching stream"
    assert update_indexer(given, torch.ones(1, 1, 8), 0).shape == (1, 5, 8)
    assert order == ["read", "wait for the fetching stream", "read"]
