"""Checkpoints that transformers' own options make: stacks left stacked, and gaps that the caller asked to be told."""

import pytest
import torch
from releases import SHAPES, write_release
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from modeling_deepseek_moe import CheckpointError
from modeling_deepseek_moe.weights import STACKS

EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.fixture
def release(tmp_path):
    write_release(tmp_path / "release", SHAPES["v3"](), dtype=torch.float32)
    return tmp_path / "release"


def stack_experts(folder, config):
    """Rewrite a folder's experts as transformers stacks them."""
    tensors = load_file(folder / "model.safetensors")
    for layer in range(config.first_k_dense_replace, config.num_hidden_layers):
        experts = f"model.layers.{layer}.mlp.experts"
        for stack, projections in STACKS.items():
            for suffix in ("", "_scale_inv"):
                if f"{experts}.0.{projections[0]}.weight{suffix}" in tensors:
                    tensors[f"{experts}.{stack}{suffix}"] = torch.stack(
                        [
                            torch.cat([tensors.pop(f"{experts}.{e}.{name}.weight{suffix}") for name in projections])
                            for e in range(config.n_routed_experts)
                        ]
                    )
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("fp8", [False, True], ids=["fp32", "fp8"])
def test_stacks_load_as_the_release_does(tmp_path, fp8):
    config = SHAPES["v3"]()
    logits = []
    for folder in (tmp_path / "release", tmp_path / "stacked"):
        write_release(folder, config, fp8=fp8, dtype=torch.float32)
        if folder.name == "stacked":
            stack_experts(folder, config)
        model = AutoModelForCausalLM.from_pretrained(folder)
        logits.append(model(torch.arange(8)[None]).logits)
        model.save_pretrained(tmp_path / f"{folder.name}-saved")
    assert torch.equal(*logits)
    saved = [(tmp_path / f"{name}-saved" / "model.safetensors").read_bytes() for name in ("release", "stacked")]
    assert saved[0] == saved[1]


def test_transformers_own_stacks_load(release, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(release)
    model.save_pretrained(tmp_path / "stacked", save_original_format=False)
    assert "model.layers.1.mlp.experts.gate_up_proj" in load_file(tmp_path / "stacked" / "model.safetensors")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "stacked").state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())


def drop(folder, name):
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "name, missing",
    [
        (EXPERT, "model.layers.1.mlp.experts.gate_up_proj"),
        ("model.layers.2.self_attn.o_proj.weight", "model.layers.2.self_attn.o_proj.weight"),
    ],
    ids=["expert", "attention"],
)
def test_a_gap_is_refused_unless_the_caller_reads_of_it(release, name, missing):
    drop(release, name)
    with pytest.raises(CheckpointError, match=name):
        AutoModelForCausalLM.from_pretrained(release)
    model, info = AutoModelForCausalLM.from_pretrained(release, output_loading_info=True)
    assert info["missing_keys"] == {missing}
    assert torch.isfinite(model(torch.arange(8)[None]).logits).all()
    with pytest.raises(CheckpointError, match=name):  # the request ends with the call
        AutoModelForCausalLM.from_pretrained(release)


def test_a_gap_in_fp8_is_refused_always(tmp_path):
    write_release(tmp_path, SHAPES["v3"](), fp8=True)
    drop(tmp_path, EXPERT)
    with pytest.raises(CheckpointError, match=EXPERT):
        AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
