"""Routing, norms, latents and four-bit linear layers against their definitions."""

import pytest
import torch
import torch.nn.functional as F
from gpu.errors import check, poisoned

from modeling_deepseek_moe.cache import decode_latents, encode_latents
from modeling_deepseek_moe.ops import four_bit
from modeling_deepseek_moe.ops._latent_rows import codes_and_scales, row_bytes
from modeling_deepseek_moe.ops.four_bit import triton as four_bit_triton
from modeling_deepseek_moe.ops.mla_project import triton as mla_project
from modeling_deepseek_moe.ops.rms_norm import reference as norm_reference
from modeling_deepseek_moe.ops.rms_norm import triton as norm
from modeling_deepseek_moe.ops.routing import reference as routing_reference
from modeling_deepseek_moe.ops.routing import triton as routing
from modeling_deepseek_moe.rope import apply_rotary

ROUTINGS = {
    "v3": (64, routing_reference.Routing(8, 4, 6, False, True, True, 2.5), True),
    "v2": (48, routing_reference.Routing(3, 1, 5, True, False, False, 16.0), False),
    "v2-lite": (64, routing_reference.Routing(1, 1, 6, True, False, False, 1.0), False),
    "no-groups": (20, routing_reference.Routing(1, 1, 3, False, False, True, 2.5), True),
}


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


@pytest.mark.parametrize("name", ROUTINGS)
def test_routing(name):
    experts, how, biased = ROUTINGS[name]
    logits, bias = poisoned(random(5, experts)), random(experts, seed=1) * 0.1 if biased else None
    weights, indices = routing.route.cuda(logits, bias, *how)
    wanted_weights, wanted = routing_reference.choose(logits, bias, how)
    order, wanted_order = indices.argsort(-1), wanted.argsort(-1)
    assert torch.equal(indices.gather(1, order), wanted.gather(1, wanted_order))
    torch.testing.assert_close(weights.gather(1, order), wanted_weights.gather(1, wanted_order), rtol=1e-6, atol=0)
    chosen = routing_reference.scores(logits, how).gather(1, indices) + (0 if bias is None else bias[indices])
    assert (chosen.diff(dim=1) <= 0).all()  # the best first


@pytest.mark.parametrize("name", ROUTINGS)
def test_of_equals_the_lowest_index(name):
    """By whole scores, which tie in groups and within them; what a stable sort would choose."""
    experts, how, _ = ROUTINGS[name]
    how = how._replace(softmax=False)
    levels = torch.tensor([0.0, 0.0, 1.0, 2.0])
    logits = levels[torch.randint(0, 4, (6, experts), generator=torch.Generator().manual_seed(3))]
    scores = logits.sigmoid()
    groups = scores.unflatten(1, (how.n_group, -1))
    best = groups.sort(dim=-1, descending=True).values
    best = best[..., :2].sum(-1) if how.group_score_top2 else best[..., 0]
    kept = best.sort(dim=-1, descending=True, stable=True).indices[:, : how.topk_group]
    eligible = torch.zeros_like(best, dtype=torch.bool).scatter_(1, kept, True).unsqueeze(-1).expand_as(groups)
    ranked = scores.masked_fill(~eligible.flatten(1), float("-inf")).sort(dim=-1, descending=True, stable=True)
    assert torch.equal(routing.route.cuda(logits, None, *how)[1], ranked.indices[:, : how.top_k])


def test_routing_of_nan_stays_in_range():
    _, indices = routing.route.cuda(torch.full((1, 20), float("nan")), None, *ROUTINGS["no-groups"][1])
    assert indices.tolist() == [[0, 1, 2]]


def test_routing_refuses():
    with pytest.raises(ValueError, match="wanted 6 of 64 experts in 1 of 16 groups"):
        routing.route.cuda(torch.zeros(1, 64), None, 16, 1, 6, True, False, False, 1.0)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
def test_router_logits(dtype):
    hidden, weight = poisoned(random(3, 200).bfloat16()), poisoned(random(13, 200, seed=1).to(dtype))
    found = routing.logits.cuda(hidden, weight)
    check(found, hidden.float() @ weight.float().T, hidden.double() @ weight.double().T)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32), ids=str)
def test_norms(dtype):
    x, residual, weight = (random(3, 200, seed=seed).to(dtype) for seed in range(3))
    x, residual, weight = poisoned(x), poisoned(residual), poisoned(weight[0])
    exact = norm_reference.rms_norm
    for found, states in (
        (norm.rms_norm.cuda(x, weight, 1e-6), x),
        (norm.add_rms_norm.cuda(x, residual, weight, 1e-6)[1], x + residual),
    ):
        wide = states.double()
        wanted = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6) * weight.double()
        check(found, exact(states, weight, 1e-6), wanted)
    assert torch.equal(norm.add_rms_norm.cuda(x, residual, weight, 1e-6)[0], x + residual)


@pytest.mark.parametrize("interleave", (True, False), ids=("pairs", "halves"))
def test_latents(interleave):
    batch, new, rank, rope, width = 2, 3, 48, 8, 40
    kv, q_a = random(batch, new, rank + rope).bfloat16(), random(batch, new, width).bfloat16()
    weight, q_weight = random(rank).bfloat16(), random(width).bfloat16()
    cos, sin = torch.rand(2, 1, new, rope // 2)
    caches = [torch.zeros(batch, 1, 9, size, dtype=kv.dtype) for size in (rank, rope)]
    slots = torch.tensor([4, 5, 7])
    q = mla_project.latents.cuda(kv, weight, 1e-6, cos, sin, *caches, slots, q_a, q_weight, 1e-5, interleave)
    assert torch.equal(q, norm_reference.rms_norm(q_a, q_weight, 1e-5))
    assert torch.equal(caches[0][:, 0, slots], norm_reference.rms_norm(kv[..., :rank], weight, 1e-6))
    rotated = apply_rotary(kv[..., rank:].unsqueeze(1), cos, sin, interleave)
    torch.testing.assert_close(caches[1][:, :, slots], rotated, rtol=2**-8, atol=0)
    for cache in caches:
        cache[:, :, slots] = 0
        assert not cache.any()
    none = mla_project.latents.cuda(kv, weight, 1e-6, cos, sin, *caches, slots, None, None, 0.0, interleave)
    assert none.numel() == 0


@pytest.mark.parametrize("rank", (48, 256, 192))
def test_latents_in_codes(rank):
    """The very bytes that a cache would make of them, and of a tile of zeros and one that is lost."""
    new, rope = 3, 8
    kv, weight = random(2, new, rank + rope).bfloat16(), random(rank).bfloat16()
    kv[0, 1, 7], weight[:128] = float("nan"), torch.where(torch.arange(min(rank, 128)) < 100, 0.0, weight[:128])
    cos, sin = torch.rand(2, 1, new, rope // 2)
    rows = torch.full((2, 1, 9, row_bytes(rank)), 0xEE, dtype=torch.uint8)
    k_pe, slots = torch.zeros(2, 1, 9, rope, dtype=kv.dtype), torch.tensor([4, 5, 7])
    mla_project.latents.cuda(kv, weight, 1e-6, cos, sin, rows, k_pe, slots, None, None, 0.0, True)
    normed = norm_reference.rms_norm(kv[..., :rank], weight, 1e-6).unsqueeze(1)
    for found, wanted in zip(
        *(codes_and_scales(r, rank) for r in (rows[:, :, slots], encode_latents(normed))), strict=True
    ):
        keep = ~wanted.isnan() if wanted.is_floating_point() else ~normed.isnan()
        assert torch.equal(found[keep], wanted[keep])
    found = decode_latents(rows[:, :, slots], rank, kv.dtype)
    assert torch.equal(found.isnan(), normed.isnan()) and found.isnan().any()
    rows[:, :, slots] = 0xEE
    assert (rows == 0xEE).all()


KINDS = (*four_bit.KINDS, "nested")


def encoded(kind, n, k):
    weight = random(n, k)
    weight[0, :64] *= 2.0**-120  # scales that are small, and some that are subnormal
    name = "nf4" if kind == "nested" else kind
    codes, scales = four_bit.encode(weight, (1, four_bit.KINDS[name].group), kind=name)
    scales = four_bit.nest(scales) if kind == "nested" else scales
    return name, codes, scales, list(scales) if kind == "nested" else [scales]


@pytest.mark.parametrize("kind", KINDS)
def test_four_bit_decodes_to_the_bit(kind):
    name, codes, scales, parts = encoded(kind, 24, 320)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        wanted = four_bit.decode(codes, scales, dtype, (1, four_bit.KINDS[name].group), kind=name)
        assert torch.equal(four_bit_triton.dequantize.cuda(codes, parts, dtype, name), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_four_bit_linear(kind):
    name, codes, scales, parts = encoded(kind, 72, 320)
    for rows, dtype in ((3, torch.bfloat16), (9, torch.float32)):
        x, bias = poisoned(random(rows, 320).to(dtype)), random(72)
        found = four_bit_triton.linear.cuda(x, codes, parts, bias, name)
        weight = [
            four_bit.decode(codes, scales, d, (1, four_bit.KINDS[name].group), kind=name)
            for d in (dtype, torch.float32)
        ]
        check(found, F.linear(x, weight[0], bias.to(dtype)), x.double() @ weight[1].double().T + bias.double())
