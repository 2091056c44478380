"""Absorbed attention of one new token: kernels against the definition, with NaN wherever nothing may be read."""

import pytest
import torch
from gpu.errors import check

from modeling_deepseek_moe.cache import decode_latents, encode_latents
from modeling_deepseek_moe.ops import _triton, block_fp8
from modeling_deepseek_moe.ops.absorbed_attention import reference, triton
from modeling_deepseek_moe.rope import apply_rotary

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


class Case:
    """Inputs of one call, from a seed; keys outside of their rows' bounds are NaN."""

    def __init__(self, dtype, heads, dims, begin, end, fp8=False, in_codes=False):
        self.dtype, self.heads, self.begin, self.end, self.in_codes = dtype, heads, begin, end, in_codes
        self.nope, self.value, self.rope, self.rank = dims
        seed = torch.Generator().manual_seed(heads)
        batch, length = len(begin), max(end)

        def normal(*shape):
            return torch.randn(shape, generator=seed).to(dtype)

        self.q_nope, self.q_pe = normal(batch, heads, 1, self.nope), normal(batch, heads, 1, self.rope)
        self.c_kv, self.k_pe = normal(batch, 1, length, self.rank), normal(batch, 1, length, self.rope)
        if in_codes:  # what is attended to is what the codes say
            self.rows = encode_latents(self.c_kv)
            self.c_kv = decode_latents(self.rows, self.rank, dtype)
        weight = torch.randn(heads * (self.nope + self.value), self.rank, generator=seed) * self.rank**-0.5
        self.weight, self.scale = block_fp8.quantize(weight) if fp8 else (weight.to(dtype), None)
        self.cos, self.sin = torch.rand(2, 1, 1, self.rope // 2, generator=seed)
        at = torch.arange(length)
        self.mask = ((at >= torch.tensor(begin)[:, None]) & (at < torch.tensor(end)[:, None]))[:, None, None]
        self.scaling = (self.nope + self.rope) ** -0.5

    def caches(self):
        """Buffers with room past the end, as `LatentLayer` keeps them."""
        made = []
        for cached in (self.rows if self.in_codes else self.c_kv, self.k_pe):
            nothing = 0xFF if cached.dtype == torch.uint8 else float("nan")  # the codes and the scales of NaN
            shape = *cached.shape[:2], cached.shape[2] + 7, cached.shape[3]
            buffer = torch.full(shape, nothing, dtype=cached.dtype)
            for row, (begin, end) in enumerate(zip(self.begin, self.end, strict=True)):
                buffer[row, :, begin:end] = cached[row, :, begin:end]
            made.append(buffer)
        return made

    def defined(self, dtype, rotate=False, mask=None):
        weight = self.weight.to(dtype)
        if self.scale is not None:
            wide = torch.promote_types(dtype, FP32)
            weight = block_fp8.reference.dequantize(
                self.weight, self.scale, FP32 if wide == torch.float64 else dtype, (128, 128)
            ).to(dtype)
        w_uk, w_uv = weight.view(self.heads, -1, self.rank).tensor_split((self.nope,), dim=1)
        q_pe = self.q_pe.to(dtype)
        if rotate:
            q_pe = apply_rotary(q_pe, self.cos, self.sin, True)
        tensors = self.q_nope.to(dtype), q_pe, self.c_kv.to(dtype), self.k_pe.to(dtype)
        mask = self.mask if mask is None else mask
        return reference.absorbed_attention(*tensors, mask, w_uk, w_uv, self.scaling)[0]

    def check(self, found, rotate=False, mask=None):
        seen = (self.mask if mask is None else mask)[:, 0, 0].any(-1)
        assert (found[~seen] == 0).all()
        wanted, same = self.defined(torch.float64, rotate, mask), self.defined(self.dtype, rotate, mask)
        check(found[seen], same[seen], wanted[seen])


def attend(case, mask, bounds, tables=()):
    caches = case.caches() if mask is None else [cache[:, :, : mask.shape[3]] for cache in case.caches()]
    return triton.decode.cuda(
        case.q_nope, case.q_pe, *caches, mask, bounds, case.weight, case.scale, case.scaling, *tables
    )


@pytest.fixture(autouse=True)
def short_splits(monkeypatch):
    monkeypatch.setattr(triton, "BLOCK_KEYS", 16)


@pytest.mark.parametrize("dtype", (BF16, FP16, FP32), ids=str)
def test_rows_with_bounds(dtype):
    """Left padding, an unused end, a row of nothing, heads that fill no block."""
    case = Case(dtype, 20, (24, 40, 8, 48), (5, 0, 8), (40, 1, 8))
    bounds = triton.key_bounds.cuda(case.mask)
    assert bounds.tolist() == [[5, 40], [0, 1], [0, 0]]
    case.check(attend(case, None, bounds))


@pytest.mark.parametrize("heads", (16, 33))
def test_heads(heads):
    case = Case(BF16, heads, (32, 32, 16, 64), (0,), (50,))
    case.check(attend(case, None, torch.tensor([[0, 50]], dtype=torch.int32)))


@pytest.mark.parametrize("dtype, heads, rank", ((BF16, 16, 256), (BF16, 128, 48), (FP32, 20, 192)), ids=str)
@pytest.mark.parametrize("native", (False, True), ids=("SM80", "SM89"))
def test_latents_in_codes(monkeypatch, native, dtype, heads, rank):
    """Tiles that are whole, cut off and not there; left padding and a row of nothing."""
    monkeypatch.setattr(_triton, "capability", lambda device: 89 if native else 80)
    case = Case(dtype, heads, (24, 40, 8, rank), (5, 0, 8), (40, 1, 8), in_codes=True)
    case.check(attend(case, None, triton.key_bounds.cuda(case.mask)))


@pytest.mark.parametrize("in_codes", (False, True))
def test_lost_latents_are_seen(in_codes):
    case = Case(BF16, 16, (24, 40, 8, 48), (0,), (20,), in_codes=in_codes)
    case.c_kv[0, 0, 3, 5] = float("nan")
    case.rows = encode_latents(case.c_kv)
    assert attend(case, None, torch.tensor([[0, 20]], dtype=torch.int32)).isnan().any()


def test_holes_in_the_mask_and_rotation_and_codes():
    case = Case(BF16, 16, (24, 40, 8, 48), (5, 0), (33, 40), fp8=True)
    mask = case.mask.clone()
    mask[:, :, :, 7:23] = False
    found = attend(case, mask, triton.key_bounds.cuda(case.mask), (case.cos, case.sin))
    case.check(found, rotate=True, mask=mask)


def test_added_mask():
    case = Case(BF16, 16, (32, 32, 16, 64), (0, 0), (37, 37))
    mask = torch.zeros(2, 1, 1, 37).masked_fill(torch.arange(37) < 9, torch.finfo(torch.float32).min)
    case.mask = mask == 0
    case.check(attend(case, mask, torch.tensor([[0, 37]] * 2, dtype=torch.int32)))


def test_one_mask_for_all_rows():
    case = Case(BF16, 16, (32, 32, 16, 64), (0, 0), (37, 37))
    mask = (torch.arange(37) >= 9)[None, None, None]
    case.mask = mask.expand(2, 1, 1, 37)
    case.check(attend(case, mask, torch.tensor([[0, 37]] * 2, dtype=torch.int32)))


@pytest.mark.parametrize("broken", ("weight", "bounds", "scale"))
def test_refuses_what_does_not_fit(broken):
    case = Case(BF16, 16, (32, 32, 16, 64), (0,), (20,), fp8=True)
    bounds = torch.zeros(1, 2, dtype=torch.int32)
    if broken == "weight":
        case.weight = case.weight[:-1]
    elif broken == "bounds":
        bounds = bounds.long()
    else:
        case.scale = case.scale[:-1]
    with pytest.raises(ValueError, match="do not fit"):
        attend(case, None, bounds)
