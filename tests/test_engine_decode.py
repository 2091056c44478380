"""The CPU engine's fused steps of a decoding layer, next to the layers that they stand for: the same bits, or the same choice."""

import pytest
import torch
from engine_cases import every_isa, needs_engine

from modeling_deepseek_moe import DeepseekV3Config, use_backend
from modeling_deepseek_moe.attention import DeepseekAttention
from modeling_deepseek_moe.engine import reasons
from modeling_deepseek_moe.engine.fused import fused_moe, fused_projections
from modeling_deepseek_moe.formats import FP8
from modeling_deepseek_moe.moe.layer import DeepseekMoE
from modeling_deepseek_moe.moe.router import DeepseekTopkRouter
from modeling_deepseek_moe.ops import block_fp8, experts, moe, routing
from modeling_deepseek_moe.quantized.experts import StackedQuantizedExperts
from modeling_deepseek_moe.quantized.linear import QuantizedLinear

pytestmark = needs_engine


def make_attention(fp8: bool, dtype: torch.dtype, **fields) -> DeepseekAttention:
    torch.manual_seed(0)
    dims = {
        "hidden_size": 200,
        "num_attention_heads": 3,
        "qk_nope_head_dim": 40,
        "qk_rope_head_dim": 16,
        "v_head_dim": 24,
        "kv_lora_rank": 72,
        "q_lora_rank": None,
    }
    attention = DeepseekAttention(DeepseekV3Config(**dims | fields), 0).to(dtype).eval()
    for name, parameter in attention.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 1.5)
    if fp8:
        for name, linear in list(attention.named_children()):
            if isinstance(linear, torch.nn.Linear):
                made = QuantizedLinear(linear.in_features, linear.out_features, False, FP8)
                made.weight.data, made.weight_scale_inv.data = block_fp8.quantize(linear.weight.data.float())
                setattr(attention, name, made)
    else:
        attention = attention.bfloat16()
        for name, norm in attention.named_children():
            if "norm" in name:
                norm.to(dtype)
    return attention.requires_grad_(False)


def tables(batch: int, length: int, rope: int) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.rand(batch, length, rope // 2) * 6
    return angles.cos(), angles.sin()


@every_isa
@pytest.mark.parametrize("interleave", [True, False], ids=["neighbours", "halves"])
@pytest.mark.parametrize("q_lora_rank", [None, 136], ids=["direct", "compressed"])
@pytest.mark.parametrize("fp8", [True, False], ids=["fp8", "bf16"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_projection_has_the_bits_of_its_layers(isa, dtype, fp8, q_lora_rank, interleave):
    attention = make_attention(fp8, dtype, q_lora_rank=q_lora_rank, rope_interleave=interleave)
    for batch, length in ((1, 1), (2, 1), (2, 4)):
        x, positions = torch.randn(batch, length, 200).to(dtype), tables(batch, length, 16)
        with use_backend(isa), torch.no_grad():
            fused = fused_projections(attention, x, positions)
            layers = *attention._queries(x, positions), *attention._latents(x, positions)
        for one, other in zip(fused, layers, strict=True):
            assert one.dtype == other.dtype and torch.equal(one, other)


def test_projection_is_fused_where_nothing_is_attached():
    attention = make_attention(True, torch.bfloat16)
    assert reasons.projections(attention, torch.bfloat16) is None
    assert "torch.bfloat16" in reasons.projections(attention, torch.float32)  # whose norms are of another dtype
    for part in (attention, attention.kv_a_layernorm, attention.q_proj, attention.kv_a_proj_with_mqa):
        hook = part.register_forward_hook(lambda *_: None)
        assert "hook" in reasons.projections(attention, torch.bfloat16)
        hook.remove()
    assert reasons.projections(attention, torch.bfloat16) is None
    attention.q_proj.weight_format = FP8.in_blocks_of((64, 64))
    assert "128 × 128" in reasons.projections(attention, torch.bfloat16)


ROUTERS = {
    "V3": {},
    "Kimi": {"n_group": 1, "topk_group": 1, "n_routed_experts": 48},
    "one expert": {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 1},
    "V2": {"topk_method": "group_limited_greedy", "scoring_func": "softmax", "norm_topk_prob": False},
    "V2-Lite": {"topk_method": "greedy", "scoring_func": "softmax", "norm_topk_prob": False},
    "V2, normalised": {"topk_method": "greedy", "scoring_func": "softmax", "norm_topk_prob": True},
}


def make_router(fields: dict) -> DeepseekTopkRouter:
    torch.manual_seed(1)
    defaults = {"hidden_size": 96, "n_routed_experts": 64, "n_group": 8, "topk_group": 3, "num_experts_per_tok": 6}
    router = DeepseekTopkRouter(DeepseekV3Config(**defaults | {"routed_scaling_factor": 2.5} | fields))
    router.weight.data.normal_()
    if router.e_score_correction_bias is not None:
        router.e_score_correction_bias.uniform_(-0.5, 0.1)
    return router.requires_grad_(False)


@pytest.mark.parametrize("fields", ROUTERS.values(), ids=ROUTERS)
@pytest.mark.parametrize("tokens", [1, 300])
def test_routing_chooses_and_weighs_as_torch_does(tokens, fields):
    router, x = make_router(fields), torch.randn(tokens, 96)
    with torch.no_grad():
        logits, weights, indices = router(x)
        with use_backend("reference"):
            same, wanted_weights, wanted = router(x)
    assert torch.equal(logits, same)
    order, wanted_order = indices.sort().indices, wanted.sort().indices
    assert torch.equal(indices.gather(1, order), wanted.gather(1, wanted_order))
    assert weights.dtype == torch.float32 and indices.dtype == torch.int64
    torch.testing.assert_close(weights.gather(1, order), wanted_weights.gather(1, wanted_order), rtol=2e-6, atol=1e-7)


def make_moe(fp8: bool, shared: int) -> DeepseekMoE:
    torch.manual_seed(2)
    config = DeepseekV3Config(
        hidden_size=160, moe_intermediate_size=72, n_routed_experts=16, n_shared_experts=shared, n_group=4, topk_group=2,
        num_experts_per_tok=5, routed_scaling_factor=2.5, experts_implementation="deepseek_moe",
    )  # fmt: skip
    layer = DeepseekMoE(config).bfloat16().eval()
    for parameter in layer.parameters():
        parameter.data.normal_(std=0.2)
    layer.gate.e_score_correction_bias.uniform_(-0.1, 0.1)
    if fp8:
        dense, layer.experts = layer.experts, StackedQuantizedExperts(config, FP8)
        for index in range(16):
            for name, matrix in layer.experts.matrices(index).items():
                gate, up = dense.gate_up_proj[index].chunk(2)
                source = {"gate_proj": gate, "up_proj": up, "down_proj": dense.down_proj[index]}[name]
                codes, scale = block_fp8.quantize(source.data.float())
                matrix.codes.copy_(codes), matrix.scales.copy_(scale)
        for name, linear in layer.shared_experts.named_children() if shared else ():
            if isinstance(linear, torch.nn.Linear):
                made = QuantizedLinear(linear.in_features, linear.out_features, False, FP8)
                made.weight.data, made.weight_scale_inv.data = block_fp8.quantize(linear.weight.data.float())
                setattr(layer.shared_experts, name, made)
    return layer.requires_grad_(False)


@every_isa
@pytest.mark.parametrize("shared", [0, 2])
@pytest.mark.parametrize("fp8", [True, False], ids=["fp8", "bf16"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_experts_layer_has_the_bits_of_its_parts(isa, dtype, fp8, shared):
    layer = make_moe(fp8, shared)
    with use_backend(isa):
        for shape in ((1, 1, 160), (3, 2, 160)):
            x = torch.randn(shape).to(dtype)
            assert torch.equal(fused_moe(layer, x), layer(x))


def test_experts_layer_is_fused_where_nothing_is_attached():
    layer = make_moe(True, 1)
    assert reasons.moe(layer, torch.bfloat16, 160) is None
    for module in (layer, layer.gate, layer.experts, layer.shared_experts, layer.shared_experts.up_proj):
        hook = module.register_forward_hook(lambda *_: None)
        assert "hook" in reasons.moe(layer, torch.bfloat16, 160)
        hook.remove()
    assert reasons.moe(layer, torch.bfloat16, 160) is None
    layer.gate.float()
    assert "torch.float32" in reasons.moe(layer, torch.bfloat16, 160)


@pytest.mark.parametrize("fp8", [True, False], ids=["fp8", "bf16"])
def test_a_router_trains_alone(fp8):
    layer, x = make_moe(fp8, 1), torch.randn(2, 3, 160, dtype=torch.bfloat16)
    layer.gate.weight.requires_grad_()
    found = torch.autograd.grad(layer(x).float().square().sum(), layer.gate.weight)[0]
    with use_backend("reference"):
        wanted = torch.autograd.grad(layer(x).float().square().sum(), layer.gate.weight)[0]
    assert wanted.norm() > 0
    torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.02 * wanted.abs().max().item())


def test_moved_experts_are_found_again():
    layer, x = make_moe(False, 1), torch.randn(1, 1, 160, dtype=torch.bfloat16)
    before = layer(x)
    old = layer.experts.gate_up_proj.data
    layer.experts.gate_up_proj.data = old.clone()
    old.fill_(torch.nan)
    assert torch.equal(layer(x), before)


def test_experts_layer_refuses_what_does_not_fit():
    layer, x = make_moe(True, 1), torch.randn(1, 1, 160, dtype=torch.bfloat16)
    shared = layer.shared_experts
    parts, stacks = (shared.gate_proj, shared.up_proj, shared.down_proj), experts.operands(layer.experts).stacks
    table = experts.cpu.addresses_of(*stacks)
    good = [x, layer.gate.weight, None, 4, 2, 5, False, True, True, 1.0, table, [], 72, torch.float8_e4m3fn]
    good += [[part.weight for part in parts], [part.weight_scale_inv for part in parts]]
    assert moe.cpu.moe(*good).shape == x.shape
    for place, wrong in (
        (0, x[..., :-1]), (0, x.expand(17, 1, 160)), (1, good[1].float()), (2, torch.zeros(15)), (5, 9), (3, 5),
        (10, table[:-1]), (14, good[14][:2]), (14, [*good[14][:2], good[14][0]]), (15, []), (15, good[15][:2]),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="do not fit"):
            moe.cpu.moe(*(wrong if at == place else value for at, value in enumerate(good)))
    from_stacks = [*good[:10], None, list(stacks), *good[12:]]
    assert torch.equal(moe.cpu.moe(*from_stacks), moe.cpu.moe(*good))
    with pytest.raises(ValueError, match="gate_up"):
        moe.cpu.moe(*good[:10], None, [stack[..., :-1] for stack in stacks], *good[12:])


def test_equal_scores_and_nan_give_experts_that_exist():
    for logits in (torch.zeros(2, 64), torch.full((2, 64), torch.nan), torch.full((2, 64), -torch.inf)):
        for groups in (1, 8):
            _, indices = routing.cpu.route(logits, None, groups, min(groups, 3), 6, False, True, True, 1.0)
            assert all(len(set(row)) == 6 and min(row) >= 0 and max(row) < 64 for row in indices.tolist())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((torch.zeros(2, 64).double(), None, 1, 1, 6), "fp32"),
        ((torch.zeros(2, 64), torch.zeros(63), 1, 1, 6), "bias"),
        ((torch.zeros(2, 64), None, 7, 1, 6), "groups"),
        ((torch.zeros(2, 64), None, 8, 1, 9), "wanted 9 of 64"),
        ((torch.zeros(2, 64), None, 1, 1, 0), "wanted 0 of 64"),
        ((torch.zeros(2, 5000), None, 1, 1, 6), "4096"),
    ],
)
def test_routing_refuses_what_does_not_fit(arguments, words):
    with pytest.raises(ValueError, match=words):
        routing.cpu.route(*arguments, False, True, True, 1.0)
