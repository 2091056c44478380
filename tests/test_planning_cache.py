"""Plans with latents cached in FP8: bytes by hand and of a cache that was filled, what is said of them, what is refused."""

import json

import pytest
import torch
from typer.testing import CliRunner

from modeling_deepseek_moe import DeepseekV3Config, Machine, make_plan, parameter_breakdown
from modeling_deepseek_moe.anatomy import CONFIGS, read_config
from modeling_deepseek_moe.cache import Fp8StaticCache
from modeling_deepseek_moe.cli.app import app
from modeling_deepseek_moe.hybrid.prediction import Given, predict
from modeling_deepseek_moe.machine import Bandwidth

QUANTIZATION = {"quant_method": "fp8", "weight_block_size": [128, 128]}
K128 = 131_072
BF16, FP8 = 61 * 1152, 61 * 656  # bytes of a token of V3


@pytest.fixture
def folder(tmp_path):
    DeepseekV3Config(quantization_config=QUANTIZATION).save_pretrained(tmp_path)
    return tmp_path


def run_json(*arguments):
    return json.loads(CliRunner().invoke(app, [*map(str, arguments), "--json"]).stdout)


def test_bytes_of_v3(folder):
    config = read_config(folder)
    plain = parameter_breakdown(config)
    coded = plain.with_fp8_latents()
    assert (plain.cache_bytes(), coded.cache_bytes()) == (BF16, FP8)
    assert coded.cache_read_bytes(K128) == K128 * FP8
    machine = Machine(2000 * 10**9, 2000 * 10**9, 64, Bandwidth(400e9, 10**9, 3))
    one, two = (make_plan(found, machine, K128) for found in (plain, coded))
    less = K128 * (BF16 - FP8)
    assert one.options[0].needed_bytes - two.options[0].needed_bytes == less
    assert one.options[0].read_bytes_per_token - two.options[0].read_bytes_per_token == less
    assert any("decodes the whole FP8 cache" in line for line in two.advice)
    assert not any("FP8 cache" in line for line in one.advice)
    given = Given(80 * 10**9, 400e9, 2e12, 25e9)
    apart, coded_apart = (predict(found, config, K128, given)[0] for found in (plain, coded))
    assert apart.gpu_bytes - coded_apart.gpu_bytes == less


def test_bytes_are_those_of_a_cache():
    """Ragged ranks too: rows end with scales, whole words of them."""
    config = DeepseekV3Config(kv_lora_rank=200, qk_rope_head_dim=16, num_hidden_layers=2)
    cache = Fp8StaticCache(config, max_cache_len=7)
    for layer in range(2):
        cache.update(torch.zeros(1, 1, 3, 200).bfloat16(), torch.zeros(1, 1, 3, 16).bfloat16(), layer)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert parameter_breakdown(config).with_fp8_latents().cache_bytes(7) == held


def test_command(folder):
    plain = run_json("plan", folder, "--context", K128)
    coded = run_json("plan", folder, "--context", K128, "--cache", "fp8")
    assert (plain["cache_bytes_per_token"], coded["cache_bytes_per_token"]) == (BF16, FP8)
    assert coded["cache_bytes"] == K128 * FP8
    said = CliRunner().invoke(app, ["plan", str(folder), "--cache", "fp8"], env={"COLUMNS": "200"}).stdout
    assert "40,016 bytes per token in FP8" in said


def test_refused(folder):
    with pytest.raises(ValueError, match="model with indexers"):
        parameter_breakdown(CONFIGS["deepseek_v32"]()).with_fp8_latents()
    found = CliRunner().invoke(app, ["plan", str(folder), "--cache", "fp8", "--train", "lora"])
    assert found.exit_code != 0 and "--cache fp8 with --train" in found.output.replace("\n", " ")
