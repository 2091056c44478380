"""Whole operations by libraries of others: our kernels before and after them, and stand-ins (`gpu.libraries`) in their place."""

import pytest
import torch
from gpu.errors import check, poisoned
from gpu.libraries import DEEP_GEMM, FLASH_3, install

from modeling_deepseek_moe.ops import _trials, _triton, block_fp8
from modeling_deepseek_moe.ops._dispatch import BackendError, use_backend
from modeling_deepseek_moe.ops.absorbed_attention import reference
from modeling_deepseek_moe.ops.absorbed_attention import triton as attention
from modeling_deepseek_moe.ops.block_fp8 import triton as fp8
from modeling_deepseek_moe.ops.experts import triton_products as products

E, T, K = 3, 70, 2


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    monkeypatch.setattr(_triton, "capability", lambda device: 90)
    packages = {"sgl-deep-gemm": "0.2.5", "flash-attn-3": "3.0.0"}
    yield install(monkeypatch, packages, deep_gemm=DEEP_GEMM, flash_attn_interface=FLASH_3)
    _trials.forget()


@pytest.mark.parametrize("rows", (3, 300), ids=("few", "many"))
def test_fp8_linear(hopper, rows):
    g = torch.Generator().manual_seed(rows)
    x, bias = poisoned(torch.randn((rows, 256), generator=g).bfloat16()), torch.randn(192, generator=g)
    codes, scale = block_fp8.quantize(torch.randn((192, 256), generator=g))
    with use_backend("deep_gemm" if rows == 3 else "auto"):
        found = fp8.linear.cuda(x, codes, scale, bias)
    wanted = block_fp8.gemm(*block_fp8.quantize_tiles(x), codes, scale).bfloat16() + bias.bfloat16()
    assert torch.equal(found, wanted) and "DeepGEMM (sgl-deep-gemm 0.2.5): 1 µs" in hopper[0]
    with use_backend("triton"):
        own = fp8.linear.cuda(x, codes, scale, bias)
    assert (own - found).float().norm() < 0.05 * found.float().norm() and len(hopper) == 1
    with use_backend("deep_gemm"), pytest.raises(BackendError, match="'deep_gemm' wants N of whole 64"):
        fp8.linear.cuda(x, *block_fp8.quantize(torch.randn(136, 256)), None)


def test_fp8_experts(hopper):
    """Rows that are served elsewhere, and an expert that no one asks for."""
    g = torch.Generator().manual_seed(8)
    x, weights = torch.randn((T, 256), generator=g).bfloat16(), torch.rand((T, K), generator=g)
    indices = torch.tensor([0, 2, E])[torch.rand((T, 3), generator=g).topk(K).indices]
    parts = [
        [block_fp8.quantize(torch.randn(shape, generator=g) * 0.1) for _ in range(E)]
        for shape in ((256, 256), (256, 128))
    ]
    stacks = [
        torch.stack([pair[i].view(torch.uint8) for pair in part]).view(dtype)
        for i, dtype in enumerate((torch.float8_e4m3fn, torch.float32))
        for part in parts
    ]
    found = products.by_codes(x, indices, weights, *stacks)
    with use_backend("triton"):
        own = products.by_codes(x, indices, weights, *stacks)
    served = indices.flatten() < E
    assert hopper[0].startswith("FP8 experts") and "DeepGEMM (sgl-deep-gemm 0.2.5): 1 µs" in hopper[0]
    assert (found - own)[served].norm() < 0.01 * own[served].norm() and not torch.equal(found[served], own[served])
    out = products.combine(found, indices, E, torch.float32)
    assert out.isfinite().all() and torch.allclose(
        out, products.combine(own, indices, E, torch.float32), rtol=0.1, atol=0.1
    )


@pytest.mark.parametrize("in_fp8", (False, True), ids=("bf16", "fp8"))
def test_one_token_over_latents(hopper, in_fp8):
    """The whole of absorbed attention: rotation, W_UK, FlashAttention 3, W_UV."""
    heads, nope, value, g = 4, 32, 48, torch.Generator().manual_seed(9)

    def normal(*shape):
        return torch.randn(shape, generator=g).bfloat16()

    q_nope, q_pe = normal(2, heads, 1, nope), normal(2, heads, 1, 64)
    buffers = normal(2, 1, 60, 512), normal(2, 1, 60, 64)
    c_kv, k_pe = (buffer[:, :, :41] for buffer in buffers)
    plain = torch.randn((heads * (nope + value), 512), generator=g) * 512**-0.5
    weight, scale = block_fp8.quantize(plain) if in_fp8 else (plain.bfloat16(), None)
    arguments = q_nope, q_pe, c_kv, k_pe, None, None, weight, scale, 0.1
    found = attention.decode.cuda(*arguments)
    assert "attention over latents" in hopper[0] and "FlashAttention 3 (flash-attn-3 3.0.0): 1 µs" in hopper[0]

    def defined(dtype):
        dense = weight if scale is None else block_fp8.reference.dequantize(weight, scale, torch.float32, (128, 128))
        w_uk, w_uv = dense.to(dtype).view(heads, -1, 512).tensor_split((nope,), dim=1)
        tensors = [tensor.to(dtype) for tensor in (q_nope, q_pe, c_kv, k_pe)]
        return reference.absorbed_attention(*tensors, None, w_uk, w_uv, 0.1)[0]

    check(found, defined(torch.bfloat16), defined(torch.float64))
    with use_backend("triton"):
        own = attention.decode.cuda(*arguments)
    check(own, defined(torch.bfloat16), defined(torch.float64))
    apart = [
        tensor.transpose(2, 3).contiguous().transpose(2, 3) for tensor in (c_kv, k_pe)
    ]  # values of a row lie apart
    assert torch.equal(attention.decode.cuda(q_nope, q_pe, *apart, *arguments[4:]), found)
    with pytest.raises(
        ValueError, match="triton_mla_decode: found tensors that do not fit"
    ):  # before the library reads them
        attention.decode.cuda(q_nope, q_pe, c_kv, k_pe[:, :, :40], *arguments[4:])
    bounds = torch.tensor([[0, 41]] * 2, dtype=torch.int32)
    with (
        use_backend("flash_attention_3"),
        pytest.raises(BackendError, match="attends to all keys of a cache, found a mask"),
    ):
        attention.decode.cuda(*arguments[:5], bounds, *arguments[6:])
