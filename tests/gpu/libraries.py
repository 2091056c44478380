"""Libraries of others that are not there: modules with their functions' names and parameters that compute by plain torch.

They ask of their operands what the libraries' sources ask (DeepGEMM's csrc/apis, FlashAttention's hopper and cute folders,
Liger's ops). None of the libraries was run.
"""

import sys
from types import ModuleType

import torch
import torch.nn.functional as F

from modeling_deepseek_moe.ops import _libraries, _trials, _triton
from modeling_deepseek_moe.ops.block_fp8 import reference

FP8, FP32, BF16 = torch.float8_e4m3fn, torch.float32, torch.bfloat16


def be_a_card(monkeypatch) -> None:
    """Tensors on a CPU pass for those of an SM90."""
    monkeypatch.setattr(_triton, "refusal", lambda *_: None)
    monkeypatch.setattr(_triton, "capability", lambda device: 90)


def install(monkeypatch, packages: dict[str, str], times=(1.0, 2.0), **modules) -> list[str]:
    """Let packages of such versions be there, and modules with such functions; libraries take the first of ``times``.

    Returns:
        The lines of the log of trials.
    """

    def version(package: str) -> str:
        if package not in packages:
            raise _libraries.PackageNotFoundError(package)
        return packages[package]

    def run(device, theirs, own):
        theirs(), own()
        return times

    told: list[str] = []
    monkeypatch.setattr(_libraries, "version", version)
    monkeypatch.setattr(_trials, "times", run)
    monkeypatch.setattr(_trials.logger, "info", told.append)
    for name, functions in modules.items():
        module = ModuleType(name.replace("__", "."))
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    _trials.forget()
    return told


def _check_codes(codes, scale, tiles: tuple[int, int]) -> None:
    assert codes.dtype == FP8 and codes.is_contiguous() and scale.dtype == FP32
    assert scale.shape[-2:] == (-(-codes.shape[-2] // tiles[0]), codes.shape[-1] // tiles[1])


def _check_rows(codes, scale) -> None:
    _check_codes(codes, scale, (1, 128))
    # one tile after another, rows padded to 16 bytes: else it copies them
    assert scale.stride(0) == 1 and scale.stride(1) % 4 == 0 and scale.stride(1) >= len(codes)


def fp8_gemm_nt(
    a, b, d, c=None, recipe=None, recipe_a=None, recipe_b=None, compiled_dims="", disable_ue8m0_cast=False, alpha=None
):
    _check_rows(*a)
    _check_codes(*b, (128, 128))
    assert b[1].is_contiguous() and d.dtype == BF16 and d.shape == (len(a[0]), len(b[0])) and d.is_contiguous()
    d.copy_(reference.gemm(*a, b[0], b[1].repeat_interleave(128, 0)[: len(b[0])]))


def m_grouped_fp8_gemm_nt_contiguous(
    a, b, d, grouped_layout, recipe=None, recipe_a=None, recipe_b=None, compiled_dims="nk", disable_ue8m0_cast=False
):
    _check_rows(*a)
    _check_codes(*b, (128, 128))
    owners = grouped_layout.view(-1, 128)
    assert grouped_layout.dtype == torch.int32 and len(grouped_layout) == len(a[0]) and d.dtype == BF16
    for number, owner in enumerate(owners[:, 0].tolist()):  # it looks at the first row of a block alone
        rows = slice(128 * number, 128 * number + 128)
        d[rows] = torch.nan
        if owner >= 0:
            scale = b[1][owner].repeat_interleave(128, 0)[: b[0].shape[1]]
            d[rows] = reference.gemm(a[0][rows], a[1][rows], b[0][owner], scale).to(BF16)


DEEP_GEMM = {
    "fp8_gemm_nt": fp8_gemm_nt,
    "m_grouped_fp8_gemm_nt_contiguous": m_grouped_fp8_gemm_nt_contiguous,
}


def _attended(q, k, v, softmax_scale, causal):
    assert q.dtype == k.dtype == v.dtype and q.dtype in (BF16, torch.float16) and q.ndim == 4
    assert all(tensor.stride(-1) == 1 for tensor in (q, k, v)) and q.shape[2] == k.shape[2] == v.shape[2]
    out = F.scaled_dot_product_attention(
        *(tensor.transpose(1, 2).float() for tensor in (q, k, v)), is_causal=causal, scale=softmax_scale
    )
    return out.transpose(1, 2).to(q.dtype)


def flash_attn_func(q, k, v, softmax_scale=None, causal=False, qv=None, window_size=(-1, -1), return_attn_probs=False):
    """FlashAttention 3's."""
    return _attended(q, k, v, softmax_scale, causal)


def flash_attn_with_kvcache(
    q, k_cache, v_cache, k=None, v=None, qv=None, cache_seqlens=None, softmax_scale=None, causal=False, num_splits=0
):
    assert (
        q.shape[1] == 1 and k_cache.shape[2] == v_cache.shape[2] == 1 and k_cache.stride(-1) == v_cache.stride(-1) == 1
    )
    assert q.shape[-1] == k_cache.shape[-1] == 64 and qv.shape[-1] == v_cache.shape[-1] == 512
    scores = torch.einsum("bqhd,bkod->bhqk", q.float(), k_cache.float())
    scores = scores + torch.einsum("bqhd,bkod->bhqk", qv.float(), v_cache.float())
    weights = torch.softmax(scores * softmax_scale, dim=-1)
    return torch.einsum("bhqk,bkod->bqhd", weights, v_cache.float()).to(q.dtype)


FLASH_3 = {"flash_attn_func": flash_attn_func, "flash_attn_with_kvcache": flash_attn_with_kvcache}


def flash_attn_func_4(q, k, v, qv=None, gather_kv_indices=None, softmax_scale=None, causal=False, num_splits=1):
    return _attended(q, k, v, softmax_scale, causal), None


FLASH_4 = {"flash_attn_func": flash_attn_func_4}


class LigerRMSNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, X, W, eps, offset=0.0, casting_mode="llama", in_place=True, row_mode=None):
        assert (offset, casting_mode, in_place) == (0.0, "llama", False) and X.dtype == W.dtype
        ctx.save_for_backward(X, W)
        ctx.eps = eps
        return W * (X.float() * torch.rsqrt(X.float().pow(2).mean(-1, keepdim=True) + eps)).to(X.dtype)

    @staticmethod
    def backward(ctx, dY):
        x, w = (tensor.double() for tensor in ctx.saved_tensors)
        scale, m = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + ctx.eps), dY.double() * w
        dx = scale * (m - x * scale.pow(2) * (m * x).mean(-1, keepdim=True))
        dw = (dY.double() * x * scale).flatten(0, -2).sum(0)
        return dx.to(dY.dtype), dw.to(dY.dtype), None, None, None, None, None


def swiglu_forward(a, b, gate_multiplier=1.0):
    return a, b, F.silu(a.float()).to(a.dtype) * b


def swiglu_backward(a, b, dc, gate_multiplier=1.0):
    assert a.is_contiguous() and b.is_contiguous() and dc.is_contiguous()
    gate, up, gradient = a.float(), b.float(), dc.float()
    sigmoid = torch.sigmoid(gate)
    gradients = gradient * up * (sigmoid + gate * sigmoid * (1 - sigmoid)), gradient * gate * sigmoid
    return a.copy_(gradients[0]), b.copy_(gradients[1])  # over its operands, as Liger does


LIGER = {
    "LigerRMSNormFunction": LigerRMSNormFunction,
    "swiglu_forward": swiglu_forward,
    "swiglu_backward": swiglu_backward,
}
EVERY = {
    "sgl-deep-gemm": "0.2.5",
    "flash-attn-3": "3.0.0",
    "flash-attn-4": "4.0.0b36",
    "liger-kernel": "0.8.5",
    "sgl-flash-mla": "1.0.0",
    "humming-kernels": "0.1.20",
}
