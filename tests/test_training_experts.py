"""Experts as they train on a CPU, one at a time, next to the definition in plain torch and its own gradients."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import modeling_deepseek_moe as dsm
from modeling_deepseek_moe.moe.experts import DeepseekExperts

TOKENS, TOP_K, EXPERTS, HIDDEN = 50, 3, 8, 96
ELSEWHERE = EXPERTS  # the index of a slot that another expert-parallel rank serves
NAMES = ("output", "hidden states", "weights", "gate_up_proj", "down_proj")


def make_experts(implementation, seed=0):
    torch.manual_seed(seed)
    module = DeepseekExperts(
        dsm.DeepseekV3Config(
            hidden_size=HIDDEN,
            moe_intermediate_size=40,
            n_routed_experts=EXPERTS,
            num_experts_per_tok=TOP_K,
            n_group=1,
            topk_group=1,
            experts_implementation=implementation,
        )
    ).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return module


def make_inputs(tokens=TOKENS, hit=EXPERTS):
    """Routed to the first ``hit`` experts alone."""
    generator = torch.Generator().manual_seed(1)
    indices = torch.rand(tokens, hit, generator=generator).argsort(1)[:, :TOP_K]
    hidden = torch.randn(tokens, HIDDEN, generator=generator, dtype=torch.float64)
    weights = torch.rand(tokens, TOP_K, generator=generator, dtype=torch.float64)
    return hidden, indices, weights


def run(module, hidden, indices, weights, dtype=torch.float64, autocast=False):
    """Output and gradients, in fp64, of the module in ``dtype``; the router's weights stay in fp32 or fp64."""
    module = copy.deepcopy(module).to(dtype)
    hidden = hidden.detach().clone().to(dtype).requires_grad_()
    weights = weights.detach().clone().to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = module(hidden, indices, weights)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype)
    out.backward(cotangent)
    found = (out.detach(), hidden.grad, weights.grad, module.gate_up_proj.grad, module.down_proj.grad)
    return {name: value.double() for name, value in zip(NAMES, found, strict=True)}


def error(found, wanted):
    return ((found - wanted).norm() / wanted.norm()).item()


def test_autocast_casts_the_hidden_states_once():
    class Casts(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            is_cast = isinstance(out, torch.Tensor) and out.dtype == torch.bfloat16 and args[0].dtype == torch.float32
            Casts.count += is_cast and out.shape == (TOKENS, HIDDEN)
            return out

    hidden, indices, weights = make_inputs()
    module, weights = make_experts("deepseek_moe").float(), weights.float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16), Casts():
        module(hidden.float().requires_grad_(), indices, weights)
    assert Casts.count == 1


@pytest.mark.parametrize("hit", [EXPERTS, TOP_K], ids=["all", "few"])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_gradients_are_the_definition_s(hit, elsewhere):
    hidden, indices, weights = make_inputs(hit=hit)
    if elsewhere:
        indices[3, 1] = indices[7] = ELSEWHERE
    found, wanted = (run(make_experts(name), hidden, indices, weights) for name in ("deepseek_moe", "eager"))
    for name in NAMES:
        assert error(found[name], wanted[name]) < 1e-13, name
    if elsewhere:
        assert not found["output"][7].any() and not found["weights"][7].any()
    assert not found["gate_up_proj"][hit:].any()


@pytest.mark.parametrize(("dtype", "autocast"), [(torch.float32, True), (torch.bfloat16, False)])
def test_bf16_is_no_further_from_fp64_than_the_definition(dtype, autocast):
    inputs = make_inputs(tokens=400)
    exact = run(make_experts("eager"), *inputs)
    found, plain = (run(make_experts(name), *inputs, dtype, autocast) for name in ("deepseek_moe", "eager"))
    for name in NAMES:
        assert error(found[name], exact[name]) < 1.1 * error(plain[name], exact[name]), name


def test_a_step_takes_this_path_and_another_implementation_its_own():
    hidden, indices, weights = make_inputs()
    names = [
        make_experts(name)(hidden.requires_grad_(), indices, weights).grad_fn.name()
        for name in ("deepseek_moe", "eager")
    ]
    assert names[0] == "RoutedSwiGluBackward" and names[1] != names[0]


@pytest.mark.parametrize("trained", NAMES[1:])
def test_one_gradient_alone(trained):
    hidden, indices, weights = make_inputs()
    wanted = run(make_experts("deepseek_moe"), hidden, indices, weights)[trained]
    module = make_experts("deepseek_moe").requires_grad_(False)
    tensors = dict(zip(NAMES[1:], (hidden, weights, module.gate_up_proj, module.down_proj), strict=True))
    tensors[trained].requires_grad_()
    out = module(hidden, indices, weights)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype))
    assert torch.equal(tensors[trained].grad, wanted)
    assert [name for name, tensor in tensors.items() if tensor.grad is not None] == [trained]


def test_weights_are_not_cast_to_narrower_hidden_states():
    """Without autocast no one asked for that: the products are those of fp32 weights, as in transformers, rounded once."""
    hidden, indices, weights = make_inputs(tokens=400)
    module, hidden = make_experts("deepseek_moe").float(), hidden.bfloat16()
    exact = module(hidden.float(), indices, weights)
    assert error(module(hidden, indices, weights).float(), exact) < 2.5e-3  # in bf16 throughout: 6e-3


def test_one_token():
    found, wanted = (run(make_experts(name), *make_inputs(tokens=1)) for name in ("deepseek_moe", "eager"))
    for name in NAMES:
        torch.testing.assert_close(found[name], wanted[name])


def test_no_token():
    found = run(make_experts("deepseek_moe"), *make_inputs(tokens=0))
    assert found["output"].shape == found["hidden states"].shape == (0, HIDDEN)
    assert not found["gate_up_proj"].any() and not found["down_proj"].any()


def test_kept_for_the_backward_pass_is_one_product():
    """Hidden states, weights of slots, gate and up: none of the gathered rows or outputs."""
    kept = []
    hidden, indices, weights = make_inputs()
    module = make_experts("deepseek_moe")
    parameters = {parameter.data_ptr() for parameter in module.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        module(hidden.requires_grad_(), indices, weights)
    sizes = [tensor.numel() for tensor in kept if tensor.data_ptr() not in parameters]
    assert sorted(sizes) == sorted([TOKENS * HIDDEN, TOKENS * TOP_K, TOKENS * TOP_K * 2 * 40])
