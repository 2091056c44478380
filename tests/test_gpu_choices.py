"""What decides between kernels for GPUs, without one: refusals by name, and tiles that every card has."""

import pytest
import torch
from gpu import libraries
from transformers import AutoModelForCausalLM

import modeling_deepseek_moe as dsm
from modeling_deepseek_moe import use_backend
from modeling_deepseek_moe.bnb.formats import INT8
from modeling_deepseek_moe.ops import absorbed_attention, block_fp8, four_bit
from modeling_deepseek_moe.ops._dispatch import BackendError
from modeling_deepseek_moe.ops.absorbed_attention import Pages
from modeling_deepseek_moe.ops.absorbed_attention import triton as attention
from modeling_deepseek_moe.ops.block_fp8 import scaled_mm
from modeling_deepseek_moe.ops.block_fp8 import triton as fp8
from modeling_deepseek_moe.ops.experts import grouped
from modeling_deepseek_moe.ops.experts.operands import Operands
from modeling_deepseek_moe.ops.four_bit import product
from modeling_deepseek_moe.ops.four_bit import triton as four_bit_triton
from modeling_deepseek_moe.ops.rms_norm import add_rms_norm, rms_norm

CARDS = (80, 86, 89, 90, 120)
CPU = torch.device("cpu")


def test_a_backend_asked_for_by_name_says_what_it_needs():
    codes, scale = block_fp8.quantize(torch.ones(8, 128))
    with use_backend("triton"), pytest.raises(BackendError, match="FP8 linear: backend 'triton' needs CUDA, got cpu"):
        block_fp8.linear(torch.ones(1, 128), codes, scale)
    with use_backend("triton"), pytest.raises(BackendError, match="FP8 dequantize: backend 'triton' needs CUDA"):
        block_fp8.dequantize(codes, scale, torch.bfloat16)
    codes, scales = four_bit.encode(torch.ones(8, 128), (1, 32), kind="int4")
    with use_backend("triton"), pytest.raises(BackendError, match="four-bit linear: backend 'triton' needs CUDA"):
        product.linear(torch.ones(1, 128), codes, scales, None, (1, 32), kind="int4")


def test_other_blocks_and_odd_rows_are_named():
    codes = torch.zeros(8, 130, dtype=torch.float8_e4m3fn)
    assert "blocks of 128 × 128 only, found (64, 64)" in fp8.unsupported_weight(codes, (64, 64))
    assert "whole number of words, found [8, 130]" in fp8.unsupported_weight(codes, (128, 128))
    assert "groups of 32 columns only" in four_bit_triton.unsupported_codes("int4", codes, codes, (1, 64))


def test_more_than_one_token_is_named():
    q = torch.zeros(1, 2, 3, 8)
    assert attention.unsupported_reason(q, q, q, q, None, q) == "is for one new token, found 3"


def test_the_product_of_codes_by_torch_is_for_whole_blocks_on_one_generation():
    assert "whole blocks" in scaled_mm.unsuitable(CPU, torch.empty(576, 7168))
    assert "whole blocks" in scaled_mm.unsuitable(CPU, torch.empty(256, 1408))
    assert scaled_mm.unsuitable(CPU, torch.empty(256, 1536)) == "has blocks of 128 × 128 on SM90 only"


@pytest.mark.parametrize("card", CARDS)
def test_every_card_has_tiles(card):
    for heads in (1, 16, 17, 64, 128):
        for dtype in (torch.bfloat16, torch.float32):
            assert all(side & (side - 1) == 0 for side in attention.tiles(card, heads, dtype)[:3])
    for rows in (1, 9, 17, 33, 65, 5000):
        block_m, block_n, warps, _ = fp8.tile(card, rows, 2112, 108)
        assert block_m >= min(rows, 64) and block_n >= 16 * min(warps, 4)
        assert 128 % block_n == 0  # the rows of a program share the scales of their block


def test_pages_are_attended_to_with_a_weight_that_is_made_once(monkeypatch):
    """Weights of a quantiser's layers, or of layers with an adapter, are decoded first."""
    layer = AutoModelForCausalLM.from_pretrained(dsm.tiny_checkpoint()).model.layers[0].self_attn
    queries = torch.zeros(1, layer.num_heads, 3, sum(layer.query_dims)).split(layer.query_dims, dim=-1)
    written, made, used = [], [], []

    class Cache:
        is_decoding = True

        def located(self, layer_idx):
            rows = torch.zeros(9, sum(layer.kv_dims) // 2)
            return Pages(rows, rows, torch.arange(9), torch.tensor([0, 2, 5, 9], dtype=torch.int32), 4)

        def write(self, *latents):
            written.append(latents)

    def make(kv_b_proj, like):
        made.append(kv_b_proj.weight.detach().clone())
        return made[-1]

    layer.kv_b_proj.register_forward_hook(lambda *_: None)
    libraries.be_a_card(monkeypatch)
    monkeypatch.setattr(absorbed_attention, "kept_weight_of", make)
    monkeypatch.setattr(absorbed_attention.triton_pages, "decode", lambda *given: used.append(given))
    assert layer._of_requests(*queries, None, None, Cache()) is None
    assert len(written) == len(made) == len(used) == 1 and used[0][7] is made[0]


def test_int8_experts_are_said_to_have_no_kernel(monkeypatch):
    libraries.be_a_card(monkeypatch)
    module = type("Experts", (torch.nn.Module,), {"stacked": lambda self: {}})()
    module.act_fn, module.weight_format = torch.nn.SiLU(), INT8
    monkeypatch.setattr(grouped, "_operands", lambda *_: Operands((), None, 32, torch.int8))
    reason = grouped.refuses(module, torch.zeros(2, 8).bfloat16(), torch.zeros(2, 2))
    assert reason == "has no kernels for experts in torch.int8"


def test_groups_of_codes_have_tiles():
    for rows in (1, 8, 9, 17, 64):
        for columns in (576, 24576):
            sides = four_bit_triton.tile_of_groups(rows, columns, 132)[:3]
            assert all(side & (side - 1) == 0 for side in sides) and sides[0] >= min(rows, 32)


def test_splits_fill_a_card_and_no_more():
    assert attention.splits(1, 1, 8192, 132) == attention.MOST_SPLITS
    assert attention.splits(64, 1, 8192, 132) == 5
    assert attention.splits(1, 8, 100, 132) == 1
    assert attention.splits(400, 2, 8192, 132) == 1


def test_scales_of_blocks_are_those_of_their_rows():
    a = block_fp8.quantize_tiles(torch.randn(5, 300))
    b, scale = block_fp8.quantize(torch.randn(140, 300))
    by_rows = block_fp8.gemm(*a, b, block_fp8.row_scales(scale, 140))
    assert torch.equal(block_fp8.gemm(*a, b, scale), by_rows)
    with pytest.raises(ValueError, match=r"B is .* wanted torch.float8_e4m3fn with scales \[2, 3\]"):
        block_fp8.gemm(*a, b, scale[:1])


def test_a_residual_and_its_norm():
    x, residual, weight = torch.randn(3, 4, 32).bfloat16()[0:1], torch.randn(1, 4, 32).bfloat16(), torch.randn(32)
    total, normed = add_rms_norm(x, residual, weight.bfloat16(), 1e-6)
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, rms_norm(x + residual, weight.bfloat16(), 1e-6))
