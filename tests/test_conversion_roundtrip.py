"""Conversions there and back: every bit, checked with safetensors' own reader and an independent quantiser."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from releases import SHAPES, dequantize_independently, quantize_independently, same_bits, write_release
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DeepseekV3ForCausalLM
from typer.testing import CliRunner

from modeling_deepseek_moe import DeepseekV3Config
from modeling_deepseek_moe.cli import app

# Ragged (kv_a_proj_with_mqa has 192 rows), and still divisible by 8 ranks × 128 wherever ranks share an FP8 weight.
CONFIG = DeepseekV3Config(
    vocab_size=128,
    hidden_size=128,
    intermediate_size=1024,
    moe_intermediate_size=1024,
    num_hidden_layers=2,
    num_attention_heads=16,
    q_lora_rank=24,
    kv_lora_rank=128,
    qk_nope_head_dim=64,
    qk_rope_head_dim=64,
    v_head_dim=64,
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=1,
    n_shared_experts=1,
    first_k_dense_replace=1,
    num_nextn_predict_layers=1,
    max_position_embeddings=256,
)


def convert(*arguments):
    return CliRunner().invoke(app, ["convert", *map(str, arguments)])


def ok(*arguments):
    result = convert(*arguments)
    assert result.exit_code == 0, result.output + str(result.exception)
    return result.output


def read(folder):
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def assert_same(folder, wanted):
    found = read(folder)
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not same_bits(found[name], wanted[name])] == []


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    folder = tmp_path_factory.mktemp("release") / "fp8"
    tensors = write_release(folder, CONFIG, fp8=True, shards=3)
    (folder / "tokenizer.json").write_text('{"a": 1}')
    return folder, tensors


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_fp8_wide_fp8(release, tmp_path, dtype):
    folder, tensors = release
    ok("fp8-to-bf16", folder, tmp_path / "wide", "--dtype", dtype, "--workers", 2)
    wide = read(tmp_path / "wide")
    name = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    wanted = dequantize_independently(tensors[name], tensors[name + "_scale_inv"]).to(getattr(torch, dtype))
    assert same_bits(wide[name], wanted)
    config = json.loads((tmp_path / "wide" / "config.json").read_text())
    assert "quantization_config" not in config and config["torch_dtype"] == dtype
    assert (tmp_path / "wide" / "tokenizer.json").read_text() == '{"a": 1}'
    ok("bf16-to-fp8", tmp_path / "wide", tmp_path / "again", "--scales-from", folder, "--max-shard-size", "1MB")
    assert_same(tmp_path / "again", tensors)
    assert "identical" in ok("diff", folder, tmp_path / "again")
    assert convert("diff", folder, tmp_path / "wide").exit_code == 1


@pytest.mark.parametrize("world", [1, 2, 4, 8])
@pytest.mark.parametrize("fp8", [True, False], ids=["fp8", "bf16"])
def test_native_and_back(release, tmp_path, world, fp8):
    folder, tensors = release
    if not fp8:
        folder = tmp_path / "bf16"
        tensors = write_release(folder, CONFIG)
    ok("hf-to-native", folder, tmp_path / "native", "--world-size", world)
    rank = load_file(tmp_path / "native" / f"model{world - 1}-mp{world}.safetensors")
    expert = "model.layers.1.mlp.experts.7.down_proj.weight"
    assert same_bits(rank["layers.1.ffn.experts.7.w2.weight"], tensors[expert])
    part = tensors["model.layers.0.self_attn.o_proj.weight"].view(torch.uint8 if fp8 else torch.int16)
    found = rank["layers.0.attn.wo.weight"].view(part.dtype)
    assert torch.equal(found, part.chunk(world, dim=1)[-1])
    assert "layers.1.ffn.gate.bias" in rank and ("layers.0.attn.wkv_a.scale" in rank) == fp8
    ok("native-to-hf", tmp_path / "native", tmp_path / "back")
    assert_same(tmp_path / "back", tensors)


def test_reshard(release, tmp_path):
    folder, tensors = release
    ok("reshard", folder, tmp_path / "small", "--max-shard-size", "300kB")
    assert len(list((tmp_path / "small").glob("*.safetensors"))) > 5
    assert_same(tmp_path / "small", tensors)


def test_bf16_to_fp8_and_plain_transformers(tmp_path):
    tensors = write_release(tmp_path / "bf16", SHAPES["v3"]())
    ok("bf16-to-fp8", tmp_path / "bf16", tmp_path / "fp8")
    found = read(tmp_path / "fp8")
    checked = 0
    for name in [name for name in found if name.endswith("_scale_inv")]:
        codes, scales = quantize_independently(tensors[name.removesuffix("_scale_inv")])
        assert same_bits(found[name], scales) and same_bits(found[name.removesuffix("_scale_inv")], codes), name
        checked += 1
    assert checked > 100
    ok("fp8-to-bf16", tmp_path / "fp8", tmp_path / "again")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        ours = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)(ids).logits
        plain = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)(ids).logits
        resident = AutoModelForCausalLM.from_pretrained(tmp_path / "fp8")(ids).logits
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)
    assert torch.isfinite(resident).all()


@pytest.mark.slow
def test_killed_and_resumed(release, tmp_path):
    folder, _ = release
    ok("fp8-to-bf16", folder, tmp_path / "wanted", "--max-shard-size", "200kB")
    wanted = {path.name: path.read_bytes() for path in (tmp_path / "wanted").iterdir()}
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    arguments = [
        sys.executable,
        "-m",
        "modeling_deepseek_moe.conversion",
        "fp8-to-bf16",
        folder,
        out,
        "--max-shard-size",
        "200kB",
    ]
    generator = random.Random(0)
    process = subprocess.Popen(arguments, env=os.environ | {"OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 60
    target = generator.randint(1, 8)
    while process.poll() is None and len(list(partial.glob("model*"))) < target:
        assert time.monotonic() < deadline
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not out.exists()
    before = {path.name: path.stat().st_mtime_ns for path in partial.glob("model*")}
    lines = (tmp_path / "out.journal").read_text().split("\n")[1:-1]
    noted = {json.loads(line)["key"] for line in lines}
    result = convert("fp8-to-bf16", folder, out, "--max-shard-size", "300kB")
    assert result.exit_code == 2 and "other inputs or options" in result.output
    ok("fp8-to-bf16", folder, out, "--max-shard-size", "200kB")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == wanted
    assert noted and all((out / name).stat().st_mtime_ns == before[name] for name in noted)


def test_dry_run_and_refusals(release, tmp_path):
    folder, tensors = release
    assert "writes" in ok("fp8-to-bf16", folder, tmp_path / "out", "--dry-run")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "there").mkdir()
    assert convert("reshard", folder, tmp_path / "there").exit_code == 2
    name = "model.layers.0.self_attn.o_proj.weight"
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "config.json").write_text((folder / "config.json").read_text())
    save_file({key: value for key, value in tensors.items() if key != name + "_scale_inv"}, bad / "model.safetensors")
    result = convert("fp8-to-bf16", bad, tmp_path / "out")
    assert result.exit_code == 2 and name in result.output and "wanted its scales" in result.output
    result = convert("dtype", folder, tmp_path / "out", "--dtype", "float32")
    assert result.exit_code == 2 and "FP8 checkpoint" in result.output
    ok("hf-to-native", folder, tmp_path / "native", "--world-size", 2)
    (tmp_path / "native" / "model0-mp4.safetensors").write_bytes(b"")
    result = convert("native-to-hf", tmp_path / "native", tmp_path / "out")
    assert result.exit_code == 2 and "another world size" in result.output
    ok("fp8-to-bf16", folder, tmp_path / "wide")
    other = tmp_path / "other"
    write_release(other, CONFIG, fp8=True, seed=1)
    result = convert("bf16-to-fp8", tmp_path / "wide", tmp_path / "out", "--scales-from", other)
    assert result.exit_code == 2 and "no FP8 code gives" in result.output
    assert not (tmp_path / "out").exists()
