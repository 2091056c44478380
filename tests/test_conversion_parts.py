"""MTP modules moved between folders, adapters merged, releases verified, and runs killed again and again."""

import hashlib
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from releases import SHAPES, dequantize_independently, quantize_independently, same_bits, write_release
from safetensors.torch import load_file, save_file
from test_conversion_roundtrip import CONFIG, assert_same, convert, ok, read
from transformers import AutoModelForCausalLM, DeepseekV3ForCausalLM, FineGrainedFP8Config

from modeling_deepseek_moe.weights import release_tensors

O_PROJ = "model.layers.0.self_attn.o_proj.weight"


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    folder = tmp_path_factory.mktemp("release") / "fp8"
    return folder, write_release(folder, CONFIG, fp8=True, shards=3)


def refused(*arguments):
    result = convert(*arguments)
    assert result.exit_code == 2, result.output
    return " ".join(result.output.split())


def test_mtp_there_and_back(release, tmp_path):
    folder, tensors = release
    ok("mtp", folder, tmp_path / "without", "--action", "drop")
    ok("mtp", folder, tmp_path / "module", "--action", "extract")
    assert_same(tmp_path / "without", {name: t for name, t in tensors.items() if ".layers.2." not in name})
    assert_same(tmp_path / "module", {name: t for name, t in tensors.items() if ".layers.2." in name})
    assert json.loads((tmp_path / "without" / "config.json").read_text())["num_nextn_predict_layers"] == 0
    ok("mtp", tmp_path / "without", tmp_path / "again", "--action", "graft", "--mtp-from", tmp_path / "module")
    assert "identical" in ok("diff", folder, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["num_nextn_predict_layers"] == 1
    assert "sound" in ok("verify", tmp_path / "again")

    graft = ("--action", "graft", "--mtp-from")
    assert "drop it" in refused("mtp", folder, tmp_path / "x", *graft, tmp_path / "module")
    assert "wanted an MTP module" in refused("mtp", tmp_path / "without", tmp_path / "x", "--action", "drop")
    assert "graft wants it" in refused("mtp", folder, tmp_path / "x", "--action", "graft")
    ok("fp8-to-bf16", tmp_path / "module", tmp_path / "wide")
    assert "convert one" in refused("mtp", tmp_path / "without", tmp_path / "x", *graft, tmp_path / "wide")
    write_release(tmp_path / "other", SHAPES["v3-mtp"](), fp8=True)
    assert "found" in refused("mtp", tmp_path / "without", tmp_path / "x", *graft, tmp_path / "other")


def lora(folder, tensors, **config):
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    fields = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none"} | config
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return folder


def pair(generator, rows, columns, rank=4, weight=O_PROJ):
    key = f"base_model.model.{weight.removesuffix('.weight')}.lora_"
    return {
        f"{key}A.weight": torch.randn(rank, columns, generator=generator),
        f"{key}B.weight": torch.randn(rows, rank, generator=generator) * 0.1,
    }


@pytest.mark.parametrize("use_rslora", [False, True])
def test_merged_adapter_is_peft_s(tmp_path, use_rslora):
    peft = pytest.importorskip("peft")
    write_release(tmp_path / "base", SHAPES["v3"]())
    model = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=12,
        target_modules=["q_a_proj", "kv_a_proj_with_mqa", "o_proj"],
        rank_pattern={"o_proj": 8},
        alpha_pattern={r"layers\.1\.self_attn\.q_a_proj": 3},
        use_rslora=use_rslora,
        init_lora_weights=False,
    )
    torch.manual_seed(0)
    model = peft.get_peft_model(model, config)
    model.save_pretrained(tmp_path / "adapter")
    ok("merge-adapter", tmp_path / "base", tmp_path / "merged", "--adapter", tmp_path / "adapter")
    wanted = model.merge_and_unload().state_dict()
    found, changed = read(tmp_path / "merged"), 0
    for name, base in read(tmp_path / "base").items():
        if name.endswith(("q_a_proj.weight", "kv_a_proj_with_mqa.weight", "o_proj.weight")):
            torch.testing.assert_close(found[name], wanted[name], rtol=2**-7, atol=1e-6)
            changed += not same_bits(found[name], base)
        else:
            assert same_bits(found[name], base), name
    assert changed == 9


def test_merging_leaves_other_blocks_alone(release, tmp_path):
    folder, tensors = release
    generator = torch.Generator().manual_seed(0)
    name = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"  # 192 rows: a whole block and half of one
    adapter = pair(generator, 192, 128, weight=name)
    adapter[next(key for key in adapter if "lora_B" in key)][:128] = 0
    adapter |= pair(generator, 128, 1024)
    lora(tmp_path / "adapter", adapter)
    ok("merge-adapter", folder, tmp_path / "merged", "--adapter", tmp_path / "adapter", "--workers", 2)
    found = read(tmp_path / "merged")
    touched = {name, name + "_scale_inv", O_PROJ, O_PROJ + "_scale_inv"}
    assert [n for n in tensors if not same_bits(found[n], tensors[n])] == [n for n in tensors if n in touched]
    assert same_bits(found[name][:128], tensors[name][:128])
    assert found[name + "_scale_inv"][0, 0] == tensors[name + "_scale_inv"][0, 0]
    for weight in (name, O_PROJ):
        key = f"base_model.model.{weight.removesuffix('.weight')}.lora_"
        delta = adapter[f"{key}B.weight"].double() @ adapter[f"{key}A.weight"].double() * 2
        wanted = dequantize_independently(tensors[weight], tensors[weight + "_scale_inv"]) + delta
        got = dequantize_independently(found[weight], found[weight + "_scale_inv"])
        apart = (got - wanted)[128 if weight == name else 0 :].abs()
        # half a step near 448 is 16
        assert 0 < apart.max() <= wanted.abs().max() * 16 / 448 * 1.001


def test_adapters_of_others_are_refused(release, tmp_path):
    folder, _ = release
    generator = torch.Generator().manual_seed(0)
    good = pair(generator, 128, 1024)
    key = next(iter(good))
    cases = {
        "wanted an adapter of this model": ({"base_model.model.model.h.0.attn.lora_A.weight": good[key]}, {}),
        "wanted rank 4": (pair(generator, 64, 1024), {}),
        "wanted rank 16": (good, {"r": 16}),
        "wanted both": ({key: good[key]}, {}),
        "use_dora True and no lora_magnitude_vector": (good, {"use_dora": True}),
        "wanted LORA": (good, {"peft_type": "IA3"}),
        "as lm_head.weight": ({"base_model.model.lm_head.weight": good[key]}, {}),
        "NaN or Inf": (good | {key: good[key] * torch.nan}, {}),
    }
    for number, (message, (tensors, config)) in enumerate(cases.items()):
        adapter = lora(tmp_path / f"adapter{number}", tensors, **config)
        assert message in refused("merge-adapter", folder, tmp_path / "out", "--adapter", adapter), message
        assert not (tmp_path / "out").exists()


def test_verify(release, tmp_path):
    folder, _ = release
    sums = tmp_path / "sums"
    assert "sound" in ok("verify", folder, "--sha256", sums, "--workers", 2)
    listed = dict(reversed(line.split("  ")) for line in sums.read_text().splitlines())
    assert listed == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    assert "sha256 as wanted" in ok("verify", folder, "--check", sums)
    kept = load_file(folder / "model-00001-of-00003.safetensors")
    codes = next(name for name, tensor in kept.items() if tensor.dtype == torch.float8_e4m3fn)
    norm = next(name for name, tensor in kept.items() if name.endswith("norm.weight"))
    scale = next(name for name in kept if name.endswith("_scale_inv"))
    for name, value, message in (
        (codes, torch.nan, "NaN codes"),
        (norm, torch.inf, "NaN or Inf"),
        (scale, 0, "scale"),
    ):
        bad = tmp_path / f"bad-{message}"
        bad.mkdir()
        for path in folder.iterdir():
            (bad / path.name).write_bytes(path.read_bytes())
        changed = kept | {name: kept[name].clone()}
        changed[name].view(-1)[-1] = value
        save_file(changed, bad / "model-00001-of-00003.safetensors", metadata={"format": "pt"})
        result = convert("verify", bad, "--check", sums)
        assert result.exit_code == 1 and name in result.output and message in result.output
        assert "wanted " + listed["model-00001-of-00003.safetensors"] in result.output
    assert "no use for --dtype" in refused("verify", folder, "--dtype", "float32")
    assert "no use for --dry-run" in refused("verify", folder, "--dry-run")
    nested = tmp_path / "nested"  # an index may name shards of folders inside
    (nested / "weights").mkdir(parents=True)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] = {key: f"weights/{file}" for key, file in index["weight_map"].items()}
    (nested / "model.safetensors.index.json").write_text(json.dumps(index))
    (nested / "config.json").write_text((folder / "config.json").read_text())
    for file in folder.glob("*.safetensors"):
        (nested / "weights" / file.name).write_bytes((bad / file.name).read_bytes())
    result = convert("verify", nested)
    assert result.exit_code == 1 and scale in result.output
    del kept[norm]
    save_file(kept, bad / "model-00001-of-00003.safetensors", metadata={"format": "pt"})
    result = convert("verify", bad)
    assert result.exit_code == 1 and norm in result.output


def test_blocks_of_a_large_ragged_weight(tmp_path):
    """Several blocks both ways, ragged both ways, magnitudes apart, zeros: against the definition in fp64."""
    config = CONFIG.to_dict() | {"hidden_size": 328, "kv_lora_rank": 200, "intermediate_size": 440}
    tensors = write_release(tmp_path / "bf16", type(CONFIG)(**config))
    name = "model.layers.0.mlp.down_proj.weight"
    tensors[name][:128, :128] = 0
    tensors[name][128:256] *= 1e4
    tensors[name][256:, 300:] *= 1e-6
    save_file(tensors, tmp_path / "bf16" / "model.safetensors", metadata={"format": "pt"})
    ok("bf16-to-fp8", tmp_path / "bf16", tmp_path / "fp8")
    found = read(tmp_path / "fp8")
    assert found[name + "_scale_inv"].shape == (3, 4)
    for scale in [name for name in found if name.endswith("_scale_inv")]:
        weight = scale.removesuffix("_scale_inv")
        codes, scales = quantize_independently(tensors[weight])
        assert same_bits(found[scale], scales) and same_bits(found[weight], codes), weight


def test_diff_looks_at_how_codes_are_announced(tmp_path):
    write_release(tmp_path / "one", CONFIG, fp8=True)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    file = tmp_path / "two" / "config.json"
    fields = json.loads(file.read_text())
    fields["quantization_config"]["scale_fmt"] = "ue8m0"
    file.write_text(json.dumps(fields))
    done = convert("diff", tmp_path / "one", tmp_path / "two")
    assert done.exit_code == 1
    assert 'quantization_config.scale_fmt: config none and "ue8m0"' in done.output
    assert "0 tensors differ" in done.output


def test_fp8_comes_back_from_fp32_by_itself(tmp_path):
    """Without the release at hand: every block's scale to the last bit, if the block uses E4M3's largest value."""
    tensors = write_release(tmp_path / "fp8", CONFIG, fp8=True)
    for name in tensors:
        if name.endswith("_scale_inv"):
            weight = tensors[name.removesuffix("_scale_inv")]
            weight[:: min(128, len(weight)), ::128] = -448.0
            weight[128::128, ::128] = 448.0
    save_file(tensors, tmp_path / "fp8" / "model.safetensors", metadata={"format": "pt"})
    ok("fp8-to-bf16", tmp_path / "fp8", tmp_path / "wide", "--dtype", "float32")
    ok("bf16-to-fp8", tmp_path / "wide", tmp_path / "again")
    assert "identical" in ok("diff", tmp_path / "fp8", tmp_path / "again")
    scales = torch.cat([tensor.flatten() for name, tensor in tensors.items() if name.endswith("_scale_inv")])
    assert ((scales * 448) / 448 != scales).any()  # or this would show nothing


def test_plain_transformers_reads_what_was_quantised(tmp_path):
    """Dequantised there, resident here: the logits of the bf16 weights rounded to E4M3 by the definition."""
    fields = CONFIG.to_dict() | {"q_lora_rank": 128, "kv_lora_rank": 64, "num_nextn_predict_layers": 0}
    config = type(CONFIG)(**fields)
    tensors = write_release(tmp_path / "bf16", config)
    ok("bf16-to-fp8", tmp_path / "bf16", tmp_path / "fp8")
    rounded = dict(tensors)
    for name, spec in release_tensors(config).items():
        if spec.quantized:
            rounded[name] = dequantize_independently(*quantize_independently(tensors[name])).float()
    write_release(tmp_path / "rounded", config)
    save_file(rounded, tmp_path / "rounded" / "model.safetensors", metadata={"format": "pt"})
    ids = torch.arange(48)[None]

    def logits(family, folder):
        with torch.no_grad():
            return family.from_pretrained(tmp_path / folder, dtype=torch.float32)(ids).logits

    wanted = logits(DeepseekV3ForCausalLM, "rounded")
    torch.testing.assert_close(logits(AutoModelForCausalLM, "fp8"), wanted, rtol=1e-4, atol=1e-4)
    there = {"quantization_config": FineGrainedFP8Config(dequantize=True), "dtype": torch.bfloat16}
    with torch.no_grad():  # there FP8 is dequantised to bf16
        plain = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "fp8", **there).float()(ids).logits
    assert ((plain - wanted).norm() / wanted.norm()).item() < 0.01
    before = logits(DeepseekV3ForCausalLM, "bf16")
    print(f"what E4M3 changed: {(wanted - before).norm() / before.norm():.3f} of the logits")


@pytest.mark.parametrize("fp8", [True, False], ids=["fp8", "bf16"])
def test_rank_files_have_what_deepseek_s_model_has(release, tmp_path, fp8):
    """Every parameter of DeepSeek's inference model on one rank of two, and nothing else: it loads strictly."""
    folder = release[0]
    if not fp8:
        folder = tmp_path / "bf16"
        write_release(folder, CONFIG)
    ok("hf-to-native", folder, tmp_path / "native", "--world-size", 2)
    wanted = {"embed.weight": (64, 128), "norm.weight": (128,), "head.weight": (64, 128)}

    def linear(name, rows, columns):
        wanted[f"{name}.weight"] = (rows, columns)
        if fp8:
            wanted[f"{name}.scale"] = (-(-rows // 128), -(-columns // 128))

    def swiglu(name, width):
        linear(f"{name}w1", width, 128), linear(f"{name}w2", 128, width), linear(f"{name}w3", width, 128)

    for layer in ("layers.0.", "layers.1."):
        wanted |= {f"{layer}attn_norm.weight": (128,), f"{layer}ffn_norm.weight": (128,)}
        wanted |= {f"{layer}attn.q_norm.weight": (24,), f"{layer}attn.kv_norm.weight": (128,)}
        linear(f"{layer}attn.wq_a", 24, 128)
        linear(f"{layer}attn.wq_b", 16 * 128 // 2, 24)
        linear(f"{layer}attn.wkv_a", 192, 128)
        linear(f"{layer}attn.wkv_b", 16 * 128 // 2, 128)
        linear(f"{layer}attn.wo", 128, 16 * 64 // 2)
    swiglu("layers.0.ffn.", 512)
    wanted |= {"layers.1.ffn.gate.weight": (8, 128), "layers.1.ffn.gate.bias": (8,)}
    for expert in range(4, 8):
        swiglu(f"layers.1.ffn.experts.{expert}.", 1024)
    swiglu("layers.1.ffn.shared_experts.", 512)
    rank = load_file(tmp_path / "native" / "model1-mp2.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in rank.items()} == wanted
    assert all(".layers.2." in name for name in load_file(tmp_path / "native" / "mtp.safetensors"))


KILLS = """
import os, random, shutil, signal, sys, time
from modeling_deepseek_moe.cli import app
source, wanted, out = sys.argv[1:]

def run(out):
    app(["convert", "fp8-to-bf16", source, out, "--max-shard-size", "100kB"], standalone_mode=False)

def contents(folder):
    return {name: open(os.path.join(folder, name), "rb").read() for name in os.listdir(folder)}

start = time.monotonic()
run(wanted)
whole = time.monotonic() - start
rng, kills, finished = random.Random(0), 0, 0
while kills < 20:
    child = os.fork()
    if not child:
        run(out)
        os._exit(0)
    time.sleep(rng.uniform(0, whole / 4))
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    kills += os.WIFSIGNALED(status) and not os.path.exists(out)
    if os.path.exists(out):
        assert contents(out) == contents(wanted)
        shutil.rmtree(out)
        journal = out + ".journal"
        if os.path.exists(journal):
            os.unlink(journal)
        finished += 1
if not os.path.exists(out):
    run(out)
assert contents(out) == contents(wanted)
print(kills, "kills", finished, "finished between them")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.slow
def test_killed_twenty_times(release, tmp_path):
    arguments = [sys.executable, "-c", KILLS, release[0], tmp_path / "wanted", tmp_path / "out"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(arguments, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0 and "20 kills" in done.stdout, done.stdout + done.stderr


def test_dry_run_estimates_and_finds_bad_scales(release, tmp_path):
    folder, tensors = release
    assert "takes   about" in ok("fp8-to-bf16", folder, tmp_path / "out", "--dry-run")
    write_release(tmp_path / "bad", CONFIG, fp8=True)
    name = O_PROJ + "_scale_inv"
    save_file(tensors | {name: tensors[name] * torch.nan}, tmp_path / "bad" / "model.safetensors")
    assert name in refused("fp8-to-bf16", tmp_path / "bad", tmp_path / "out")
    assert not (tmp_path / "out").exists()
