"""Weights of other sizes than the config's: what does not fit is torch's error, what was pruned throughout runs as before."""

import copy

import pytest
import torch
from engine_cases import needs_engine
from next_token_cases import decoding, load
from releases import SHAPES, write_release
from torch import nn

from modeling_deepseek_moe.engine.plan import SLOT

pytestmark = needs_engine
HALF = slice(None, None, 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("v3")
    write_release(path, SHAPES["v3"](), fp8=False)
    return path


@pytest.fixture
def model(folder):
    return load(folder)


def narrow(module: nn.Module, name: str, rows=slice(None), columns=slice(None)) -> None:
    """Keep some rows and columns of a parameter."""
    kept = getattr(module, name).data[rows]
    setattr(module, name, nn.Parameter((kept if kept.ndim == 1 else kept[:, columns]).contiguous()))


@torch.no_grad()
def step(model, cache) -> torch.Tensor:
    return model(torch.tensor([[7]]), cache=cache).logits


NAMES = [
    *(f"layers.2.self_attn.{name}" for name in ("q_a_proj", "q_a_layernorm", "q_b_proj", "kv_a_proj_with_mqa")),
    *(f"layers.2.self_attn.{name}" for name in ("kv_a_layernorm", "kv_b_proj", "o_proj")),
    *("layers.2.input_layernorm", "layers.2.post_attention_layernorm", "norm"),
    *(f"layers.0.mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")),
    *(f"layers.2.mlp.shared_experts.{name}" for name in ("gate_proj", "up_proj", "down_proj")),
]


@pytest.mark.parametrize(
    ("name", "side"),
    [(name, side) for name in NAMES for side in ("rows", "columns") if side == "rows" or "norm" not in name],
)
def test_a_weight_that_does_not_fit_is_an_error(model, name, side):
    layer = model.model.get_submodule(name)
    cache = decoding(model)
    narrow(layer, "weight", **{side: HALF})
    with pytest.raises((RuntimeError, ValueError)):
        step(model, cache)
    assert "needs a weight of" in str(model.engine_report())


@pytest.mark.parametrize(
    "part", ["gate.weight", "gate.e_score_correction_bias", "experts.gate_up_proj", "experts.down_proj"]
)
def test_experts_that_do_not_fit_their_router_are_an_error(model, part):
    mlp = model.model.layers[2].mlp
    cache = decoding(model)
    owner, name = part.split(".")
    if name == "e_score_correction_bias":
        mlp.gate.e_score_correction_bias = mlp.gate.e_score_correction_bias[HALF].contiguous()
    else:
        narrow(mlp.get_submodule(owner), name, rows=HALF)
    with pytest.raises((RuntimeError, ValueError, IndexError)):
        step(model, cache)


def test_mlps_that_were_pruned_throughout_run_in_the_engine(model, by_layers):
    cache = decoding(model)
    for mlp in (model.model.layers[0].mlp, model.model.layers[2].mlp.shared_experts):
        for name in ("gate_proj", "up_proj"):
            narrow(getattr(mlp, name), "weight", rows=HALF)
        narrow(mlp.down_proj, "weight", columns=HALF)
    before = copy.deepcopy(cache)
    found = step(model, cache)
    assert model.model.__dict__[SLOT].runs_all
    assert torch.equal(found, by_layers(step, model, before))


def test_codes_without_the_scales_of_their_blocks_are_an_error(tmp_path):
    config = SHAPES["v3"]()
    config.intermediate_size = 256
    write_release(tmp_path, config, fp8=True)
    model = load(tmp_path)
    cache = decoding(model)
    mlp = model.model.layers[0].mlp
    for name in ("gate_proj", "up_proj"):
        layer = getattr(mlp, name)
        layer.weight = nn.Parameter(layer.weight.data[:128].contiguous(), requires_grad=False)
    mlp.down_proj.weight = nn.Parameter(mlp.down_proj.weight.data[:, :128].contiguous(), requires_grad=False)
    with pytest.raises(ValueError, match="found scales"):
        step(model, cache)
    assert "gate_proj: needs scales [1, 1], found [2, 1]" in str(model.engine_report())
