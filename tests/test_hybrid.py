"""A device smaller than the model: what lies and is computed where, and that it changes no result."""

import copy
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from releases import SHAPES, write_release
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from typer.testing import CliRunner

from modeling_deepseek_moe.anatomy import parameter_breakdown
from modeling_deepseek_moe.cli import app, plan
from modeling_deepseek_moe.formats import FP8, by_name
from modeling_deepseek_moe.hybrid.costs import CPU, DEVICE, Layer, Rates, faster, measure_rates, seconds_on_cpu
from modeling_deepseek_moe.hybrid.held import UseCounts
from modeling_deepseek_moe.hybrid.layer import HybridMoE
from modeling_deepseek_moe.hybrid.placement import (
    DEVICE_WORKSPACE,
    Sizes,
    device_of,
    expand,
    experts_apart,
    is_hybrid,
    take_experts_out,
)
from modeling_deepseek_moe.hybrid.places import ExpertPlaces
from modeling_deepseek_moe.hybrid.prediction import CROSSING_SECONDS, Given, predict
from modeling_deepseek_moe.hybrid.slots import ExpertSlots
from modeling_deepseek_moe.machine import Bandwidth, Machine
from modeling_deepseek_moe.ops._dispatch import use_backend
from modeling_deepseek_moe.planning import MEMORY_EFFICIENCY
from modeling_deepseek_moe.quantized.experts import StackedQuantizedExperts

CASES = Path(__file__).with_name("hybrid_cases.py")
V3 = Layer(num_experts=256, top_k=8, expert_bytes=44_050_000, expert_values=44_040_192)
DESKTOP = Rates(cpu_bytes=60e9, cpu_operations=1e12, link_bytes=25e9, device_operations=100e12)


@pytest.mark.kernels
def test_on_a_device():
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", str(CASES)]
    found = subprocess.run(
        command,
        check=False,
        capture_output=True,
        text=True,
        cwd=CASES.parent,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert found.returncode == 0, found.stdout[-4000:] + found.stderr[-2000:]
    assert "failed" not in found.stdout and "skipped" not in found.stdout


def test_where_a_layer_is_faster():
    assert faster(V3, 1, DESKTOP) == CPU
    assert faster(V3, 4096, DESKTOP) == DEVICE  # 361 TF: seconds on the CPU
    assert faster(V3, 1, DESKTOP, held=0.9) == DEVICE
    slow = Rates(cpu_bytes=10e9, cpu_operations=1e11, link_bytes=25e9, device_operations=100e12)
    assert faster(V3, 1, slow) == DEVICE
    assert V3.hit(1) == pytest.approx(8) and V3.hit(10**6) == pytest.approx(256)
    assert seconds_on_cpu(V3, 1, DESKTOP) == pytest.approx(8 * 44_050_000 / 60e9)


def test_a_probe_finds_rates():
    rates = measure_rates(torch.device("cpu"), seconds=0.01)
    assert all(
        rate > 1e6 for rate in (rates.cpu_bytes, rates.cpu_operations, rates.link_bytes, rates.device_operations)
    )


def test_when_experts_stay_on_the_cpu():
    sizes = Sizes(experts=600, rest=17, cache=3)
    least = 20 + DEVICE_WORKSPACE
    assert is_hybrid(sizes, [least]) and is_hybrid(sizes, [least, 100])
    assert not is_hybrid(sizes, [least - 1])  # accelerate's own way
    assert not is_hybrid(sizes, [600 + least])
    assert not is_hybrid(sizes, [least, 600])
    assert not is_hybrid(sizes, []) and not is_hybrid(Sizes(0, 17, 3), [least])
    breakdown = parameter_breakdown(SHAPES["v3"]())
    assert Sizes.of(breakdown).experts == 2 * 16 * 3 * 64 * 32 * 2
    assert Sizes.of(breakdown, itemsize=4).experts == 2 * Sizes.of(breakdown).experts
    plain, fp8 = (Sizes.of(replace(breakdown, weight_format=FP8), dequantized=whole) for whole in (True, False))
    assert plain == Sizes.of(breakdown) and fp8.experts < plain.experts


def test_maps():
    config = SHAPES["v3-mtp"]()
    found = experts_apart(config, 0)
    assert found == {"": 0} | {f"model.layers.{layer}.mlp.experts": "cpu" for layer in (1, 2, 3)}
    assert expand({"": 0, "model.layers.*.mlp.experts": "cpu"}, config) == found
    assert device_of(found, "model.layers.1.mlp.experts") == "cpu"
    assert device_of(found, "model.layers.1.mlp.gate") == 0 and device_of({"a": 1}, "b") is None
    with pytest.raises(ValueError, match=r"found 'layers\.\*\.\*', wanted one \*"):
        expand({"layers.*.*": "cpu"}, config)


def test_what_bitsandbytes_quantiser_is_not_shown():
    """Experts on the CPU next to an accelerator; all that transformers itself is to see stays in the map."""
    experts = "model.layers.1.mlp.experts"
    wish, config = BitsAndBytesConfig(load_in_4bit=True), SHAPES["v3"]()

    def take(device_map, wanted=wish):
        own = dict(device_map)
        return take_experts_out(own, lambda: config, wanted), own

    assert take({"": 0, experts: "cpu"}) == ({experts: "cpu"}, {"": 0})
    assert take({"": 0, experts: "cpu", "lm_head": "cpu"}) == ({experts: "cpu"}, {"": 0, "lm_head": "cpu"})
    wide = BitsAndBytesConfig(load_in_4bit=True, llm_int8_enable_fp32_cpu_offload=True)
    for given, wanted in (
        ({"": "cpu", experts: "cpu"}, wish),
        ({"": 0, experts: "cpu"}, wide),
        ({"": 0, experts: 1}, wish),
    ):
        assert take(given, wanted) == ({}, given)
    assert take({"": 0, experts: "cpu"}, None) == ({}, {"": 0, experts: "cpu"})
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    assert take({"": 0, experts: "cpu"}, None) == ({experts: "cpu"}, {"": 0})


def test_the_most_used():
    counts = UseCounts([1, 4], num_experts=3)
    assert counts.most_used(4) == [(1, 0), (4, 0), (1, 1), (4, 1)]  # nothing known: of all layers alike
    counts.add(4, torch.tensor([[2, 2], [1, 3]]))  # 3 is no expert
    assert counts.most_used(3) == [(4, 2), (4, 1), (1, 0)]
    assert np.array_equal(counts.counts_LE, [[0, 0, 0], [0, 1, 2]])


def test_gradients_go_back_across(tmp_path):
    write_release(tmp_path, SHAPES["v3"]())
    layer = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).model.layers[1].mlp
    hybrid = HybridMoE.of(layer, ExpertPlaces(torch.device("cpu"), {1: layer.experts}, 4))
    hidden = torch.randn(2, 5, 64)
    grads = []
    for module in (layer, hybrid, copy.deepcopy(hybrid)):
        x = hidden.clone().requires_grad_()
        module(x).square().sum().backward()
        grads.append(x.grad)
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], grads[2])
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(hybrid)(hidden), layer(hidden))


@pytest.mark.parametrize("fp8", [True, False], ids=["fp8", "bf16"])
def test_experts_computed_together(tmp_path, fp8):
    write_release(tmp_path, SHAPES["v3"](), fp8=fp8)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    experts = model.model.layers[1].mlp.experts
    hidden, indices, weights = (
        torch.randn(5, 64),
        torch.stack([torch.randperm(16)[:4] for _ in range(5)]),
        torch.rand(5, 4),
    )
    wanted = sorted(set(indices.flatten().tolist()))
    with torch.no_grad():
        for count in (4, 16):
            slots = ExpertSlots(model.config, experts, count, torch.device("cpu"))
            found = slots._run_together(1, experts, hidden, indices, weights, wanted)
            torch.testing.assert_close(found, experts(hidden, indices, weights), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["int4", "nf4", "fp4", "mxfp4"])
def test_four_bit_experts_in_slots(form):
    """Codes and scales arrive byte by byte, and an expert gives the bits that it gives where it lies."""
    config, row, seed = SHAPES["v3"](), by_name(form), torch.Generator().manual_seed(0)
    config.moe_intermediate_size = 64  # whole groups
    experts = StackedQuantizedExperts(config, row)
    for index in range(experts.num_experts):
        for matrix in experts.matrices(index).values():
            codes, scales = row.quantize(torch.randn(64, 64, generator=seed) / 8)
            matrix.codes.view(torch.uint8).copy_(codes.view(torch.uint8))
            matrix.scales.view(torch.uint8).copy_(scales.view(torch.uint8))
    slots = ExpertSlots(config, experts, 4, torch.device("cpu"))
    for index in (3, 5):
        slot = slots.bring(1, experts, index)
        copied, own = (module.matrices(at).values() for module, at in ((slots._pool, slot), (experts, index)))
        for found, wanted in zip(copied, own, strict=True):
            assert all(
                torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(found, wanted, strict=True)
            )
    hidden, weights = torch.randn(5, 64, generator=seed), torch.rand(5, 4, generator=seed)
    indices = torch.tensor([[3, 5, 0, 9]]).expand(5, 4)
    with torch.no_grad(), use_backend("reference"):
        found = slots.run(1, experts, hidden, indices, weights, [0, 3, 5, 9])
        torch.testing.assert_close(found, experts(hidden, indices, weights), rtol=1e-4, atol=1e-4)
    assert slots.stats().misses == 4 and slots.stats().hits >= 2


def test_a_prediction():
    config = SHAPES["v3"]()
    breakdown = parameter_breakdown(config)
    experts, active = (sizes["routed experts"].nbytes(FP8) for sizes in (breakdown.stored, breakdown.active))
    given = Given(2 * DEVICE_WORKSPACE, cpu_bandwidth=1e9, gpu_bandwidth=1e12, link_bandwidth=25e9)
    (*_, whole) = predict(breakdown, config, 16, given)
    assert whole.held_share == 1 and whole.cpu_bytes == 0 and whole.link_seconds == 0
    given = replace(given, gpu_bytes=whole.gpu_bytes - experts // 2)
    rest, *_, most = predict(breakdown, config, 16, given)
    assert rest.held_share == 0 and rest.cpu_bytes == experts
    assert rest.cpu_seconds == pytest.approx(active / 1e9 / MEMORY_EFFICIENCY)
    assert rest.link_seconds == pytest.approx(2 * (4 * 64 / 25e9 + CROSSING_SECONDS))
    assert 0 < most.held_share < 1 and most.gpu_bytes <= given.gpu_bytes
    assert most.tokens_per_second > rest.tokens_per_second
    assert predict(breakdown, config, 16, replace(given, gpu_bytes=DEVICE_WORKSPACE)) == ()
    with pytest.raises(ValueError, match="cpu_bandwidth: found 0, wanted more than 0"):
        predict(breakdown, config, 16, replace(given, cpu_bandwidth=0))


def test_plan_tells_of_a_gpu(monkeypatch):
    machine = Machine(64 << 30, 60 << 30, 8, Bandwidth(60e9, 1 << 30, 3))
    monkeypatch.setattr(plan, "probe_machine", lambda: machine)
    found = CliRunner().invoke(app, ["plan", "--gpu", "24GB", "--gpu-speed", "1TB", "--json"])
    assert found.exit_code == 0, found.output
    (*_, last) = json.loads(found.stdout)["gpu_and_cpu"]
    assert last["held_share"] == 1 and last["tokens_per_second"] > 0
    assert "experts on the GPU" in CliRunner().invoke(app, ["plan", "--gpu", "24GB"]).stdout
    for arguments in (["--gpu", "1MB"], ["--link-speed", "5GB"]):
        refused = CliRunner().invoke(app, ["plan", *arguments])
        assert refused.exit_code == 2 and "found" in refused.output
