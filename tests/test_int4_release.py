"""A release whose routed experts are INT4 as compressed-tensors packs them (Kimi-K2-Thinking), written without this package's writer."""

import json
from pathlib import Path

import pytest
import torch
from releases import SHAPES, same_bits
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, FineGrainedFP8Config
from typer.testing import CliRunner

import modeling_deepseek_moe as dsm
from modeling_deepseek_moe import CheckpointError, CheckpointReader, inspect_checkpoint
from modeling_deepseek_moe.cli.app import app
from modeling_deepseek_moe.conversion import _job, _table
from modeling_deepseek_moe.conversion._conversion import Options
from modeling_deepseek_moe.quantized.experts import StackedQuantizedExperts
from modeling_deepseek_moe.quantized.linear import QuantizedLinear
from modeling_deepseek_moe.quantized.mapped import MappedExperts
from modeling_deepseek_moe.release import Release
from modeling_deepseek_moe.weights import release_tensors

SCHEME = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True, "dynamic": False}
ROUTED = ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up|gate_up|down)_proj.*"]


def announced(ignore: list[str]) -> dict:
    group = {"targets": ["Linear"], "weights": SCHEME, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "config_groups": {"group_0": group},
        "ignore": ignore,
    }


def unpack(packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """By the definition: nibble by nibble, in fp64."""
    n, k = packed.shape[0], packed.shape[1] * 8
    out = torch.empty((n, k), dtype=torch.float64)
    for column in range(k):
        code = ((packed[:, column // 8].long() >> (4 * (column % 8))) & 15) - 8
        out[:, column] = code * scale[:, column // 32].double()
    return out


def write_int4(folder: Path, config, *, linears: bool = False, shape_dtype=torch.int32) -> dict[str, torch.Tensor]:
    """Random codes and scales for routed experts, and with ``linears`` for all that is FP8 in other releases."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, spec in release_tensors(config).items():
        if spec.quantized and (linears or ".experts." in name) and spec.shape[1] % 32 == 0:
            n, k = spec.shape
            packed = torch.randint(-(1 << 31), 1 << 31, (n, k // 8), generator=generator).to(torch.int32)
            scale = (torch.rand((n, k // 32), generator=generator) + 0.5) * 0.02
            shape = torch.tensor([n, k], dtype=shape_dtype)
            tensors |= {f"{name}_packed": packed, f"{name}_scale": scale.bfloat16(), f"{name}_shape": shape}
        elif name.endswith("e_score_correction_bias"):
            tensors[name] = torch.randn(spec.shape, generator=generator) * 0.3
        else:
            tensors[name] = (torch.randn(spec.shape, generator=generator) * 0.1).bfloat16()
    folder.mkdir(parents=True)
    fields = json.loads(config.to_json_string(use_diff=True)) | {"torch_dtype": "bfloat16"}
    fields |= {
        "architectures": ["DeepseekV3ForCausalLM"],
        "quantization_config": announced(ROUTED[:1] if linears else ROUTED),
    }
    (folder / "config.json").write_text(json.dumps(fields))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors


@pytest.fixture(params=[False, True], ids=["experts", "all"])
def folder(request, tmp_path) -> Path:
    write_int4(tmp_path / "int4", SHAPES["kimi"](), linears=request.param)
    return tmp_path / "int4"


@pytest.fixture
def experts(tmp_path) -> Path:
    write_int4(tmp_path / "int4", SHAPES["kimi"]())
    return tmp_path / "int4"


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def spoil(folder: Path, change) -> None:
    tensors = tensors_of(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def logits_of(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 20)[None]).logits


def dequantised(folder: Path):
    settings = {"quantization_config": FineGrainedFP8Config(dequantize=True), "dtype": torch.float32}
    return AutoModelForCausalLM.from_pretrained(folder, **settings)


def test_dequantised_values(folder):
    stored = tensors_of(folder)
    model = dequantised(folder)
    state = model.state_dict()
    for name in [name.removesuffix("_packed") for name in stored if name.endswith("_packed")]:
        wanted = unpack(stored[f"{name}_packed"], stored[f"{name}_scale"]).float()
        if ".experts." not in name:
            assert torch.equal(state[name], wanted), name
    prefix, packed = (
        "model.layers.1.mlp.experts",
        lambda p: (stored[f"{p}.weight_packed"], stored[f"{p}.weight_scale"]),
    )
    for expert in (0, 15):
        rows = [unpack(*packed(f"{prefix}.{expert}.{name}")).float() for name in ("gate_proj", "up_proj")]
        assert torch.equal(state[f"{prefix}.gate_up_proj"][expert], torch.cat(rows))
        assert torch.equal(
            state[f"{prefix}.down_proj"][expert], unpack(*packed(f"{prefix}.{expert}.down_proj")).float()
        )


def test_scales_stay_in_the_file(folder):
    reader = CheckpointReader.open(folder)
    release = Release(reader, AutoConfig.from_pretrained(folder))
    release.check(needs_head=True)
    stored = tensors_of(folder)
    scales = [name for name in stored if name.endswith("_scale")]
    assert scales
    for name in scales:
        found = release.tensor(name)
        assert same_bits(found, stored[name]) and reader.mapped.find(found) == (reader[name].file, reader[name].start)


def test_one_expert_whose_scales_lie_misaligned(experts):
    """Then no scales of its layer are read from the files, where C takes one address for all."""
    stored = tensors_of(experts)
    wanted = logits_of(AutoModelForCausalLM.from_pretrained(experts))
    odd = "model.layers.1.mlp.experts.0.gate_proj.weight_scale"
    scales = stored.pop(odd)
    text = json.dumps(
        {odd: {"dtype": "BF16", "shape": list(scales.shape), "data_offsets": [0, scales.nbytes]}}
    ).encode()
    text += b" " * (1 - len(text) % 2)
    raw = scales.view(torch.uint8).numpy().tobytes()
    (experts / "odd.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + raw)
    (experts / "model.safetensors").unlink()
    save_file(stored, experts / "even.safetensors", metadata={"format": "pt"})
    weight_map = {**dict.fromkeys(stored, "even.safetensors"), odd: "odd.safetensors"}
    (experts / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    model = AutoModelForCausalLM.from_pretrained(experts)
    assert same_bits(logits_of(model), wanted)
    found = [layer for layer in model.modules() if isinstance(layer, MappedExperts)]
    in_files = [[bool(layer.files.find(pair.scales)) for pair in layer.matrices(3).values()] for layer in found]
    assert in_files == [[False] * 3, [True] * 3]


@pytest.mark.parametrize("stacked", [False, True], ids=["mapped", "stacked"])
def test_drafts_of_mtp_layers_in_codes(tmp_path, stacked, monkeypatch):
    if stacked:
        monkeypatch.setattr("modeling_deepseek_moe.quantizer._stays_on_cpu", lambda device_map: False)
    write_int4(tmp_path / "int4", SHAPES["v3-mtp"]())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "int4", dtype=torch.float32)
    experts = StackedQuantizedExperts if stacked else MappedExperts
    assert isinstance(model.model.mtp_layers[0].mlp.experts, experts)
    ids, settings = torch.randint(3, 128, (2, 9)), {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    wanted = model.generate(ids, **settings)
    assert torch.equal(model.generate(ids, **settings, use_mtp=2), wanted) and model.draft_stats.drafted


@pytest.mark.parametrize("stacked", [False, True], ids=["mapped", "stacked"])
def test_computes_with_the_codes(folder, stacked, monkeypatch):
    if stacked:
        monkeypatch.setattr("modeling_deepseek_moe.quantizer._stays_on_cpu", lambda device_map: False)
    stored = tensors_of(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    kinds = [type(module) for module in model.modules()]
    linears = [name for name in stored if name.endswith("_packed") and ".experts." not in name]
    assert kinds.count(QuantizedLinear) == len(linears)
    assert kinds.count(StackedQuantizedExperts if stacked else MappedExperts) == 2
    wanted = dequantised(folder)
    torch.testing.assert_close(logits_of(model), logits_of(wanted), rtol=1e-4, atol=1e-4)
    made = [m.generate(torch.arange(3, 12)[None], max_new_tokens=8, do_sample=False) for m in (model, wanted)]
    assert torch.equal(*made)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_saves_the_same_bytes(tmp_path, dtype):
    stored = write_int4(tmp_path / "int4", SHAPES["kimi"](), linears=True, shape_dtype=dtype)
    for stacked in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            if stacked:
                patch.setattr("modeling_deepseek_moe.quantizer._stays_on_cpu", lambda device_map: False)
            model = AutoModelForCausalLM.from_pretrained(tmp_path / "int4")
        model.save_pretrained(tmp_path / f"again{stacked}", max_shard_size="100kB")
        again = tensors_of(tmp_path / f"again{stacked}")
        assert again.keys() == stored.keys() and all(same_bits(again[name], stored[name]) for name in stored)
        config = json.loads((tmp_path / f"again{stacked}" / "config.json").read_text())
        assert config["quantization_config"] == announced(ROUTED[:1])


def test_streams(experts):
    model = AutoModelForCausalLM.from_pretrained(experts)
    layers = [module for module in model.modules() if isinstance(module, MappedExperts)]
    values = sum(layer.num_mapped for layer in layers)
    assert values == 2 * 16 * 3 * 64 * 32
    assert sum(layer.mapped_bytes for layer in layers) == values // 2 + 2 * values // 32  # codes and bf16 scales
    held = {tensor.data_ptr() for layer in layers for pair in layer.matrices(3).values() for tensor in pair}
    assert all(layers[0].files.find(pair.scales) for pair in layers[0].matrices(3).values()) and len(held) == 12
    wanted = logits_of(model)
    with dsm.use_backend("reference"):
        by_reference = logits_of(model)
    model.set_expert_memory("600kB")  # fewer than the 32 experts, which take whole pages there
    assert same_bits(logits_of(model), wanted)
    stats = model.expert_stats()
    assert stats.hits + stats.misses > 0 and stats.bytes_read % (3 * 32 * 64 // 2 + 3 * 2 * 64) == 0 < stats.bytes_read
    with dsm.use_backend("reference"):
        assert same_bits(logits_of(model), by_reference)


def test_inspects_and_plans(folder):
    found = inspect_checkpoint(folder)
    assert not found.findings and found.breakdown.weight_format.name == "int4"
    assert "INT4 in blocks of 1×32" in found.architecture["weights"]
    form = found.breakdown.weight_format
    assert found.breakdown.stored_bytes(form) == found.total.nbytes
    assert found.breakdown.stored["routed experts"].quantized == 2 * 16 * 3 * 64 * 32
    assert (found.breakdown.stored["attention"].quantized > 0) == ("self_attn" not in str(folder_ignores(folder)))
    result = CliRunner().invoke(app, ["plan", str(folder)])
    assert result.exit_code == 0 and "int4" in result.output


def folder_ignores(folder: Path) -> list[str]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]["ignore"]


WEIGHT = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.update({f"{WEIGHT}_packed": t[f"{WEIGHT}_packed"][:, :-1].clone()}), r"shape \[32, 7\], wanted \[32, 8\]"),
        (lambda t: t.update({f"{WEIGHT}_packed": t[f"{WEIGHT}_packed"].long()}), "dtype torch.int64"),
        (lambda t: t.update({f"{WEIGHT}_scale": t[f"{WEIGHT}_scale"][:, :-1].clone()}), r"shape \[32, 1\], wanted \[32, 2\]"),
        (lambda t: t.update({f"{WEIGHT}_scale": t[f"{WEIGHT}_scale"].float()}), "dtype torch.float32, wanted torch.bfloat16"),
        (lambda t: t.pop(f"{WEIGHT}_scale"), f"INT4 codes without {WEIGHT}_scale"),
        (lambda t: t.pop(f"{WEIGHT}_packed"), "a scale of nothing, wanted INT4 codes"),
        (lambda t: t.update({f"{WEIGHT}_shape": torch.tensor([32, 63], dtype=torch.int32)}), r"found \[32, 63\], wanted \[32, 64\]"),
        (lambda t: t.update({f"{WEIGHT}_shape": torch.tensor([32.0, 64.0])}), "dtype torch.float32, wanted torch.int32"),
        (lambda t: t.update({f"{WEIGHT}_scale": torch.zeros_like(t[f"{WEIGHT}_scale"])}), "finite scales above zero"),
        (lambda t: t.update({WEIGHT: torch.ones(32, 64).bfloat16()}), "wanted one of them"),
    ],
    ids=["packed", "codes", "scales", "fp32 scales", "no scales", "no codes", "shape", "shape dtype", "zeros", "both"],
)  # fmt: skip
def test_bad_tensors_are_named(experts, change, said):
    spoil(experts, change)
    with pytest.raises(CheckpointError, match=said) as caught:
        AutoModelForCausalLM.from_pretrained(experts)
    assert WEIGHT in str(caught.value) and "model.safetensors" in str(caught.value)


def test_another_group_size_is_named(experts):
    config = json.loads((experts / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"] = 64
    (experts / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"shape \[32, 2\], wanted \[32, 1\] for \[32, 64\] in blocks \(1, 64\)"):
        AutoModelForCausalLM.from_pretrained(experts)


def test_codes_that_no_config_announces(experts):
    config = json.loads((experts / "config.json").read_text())
    del config["quantization_config"]
    (experts / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="wanted no INT4 without quantization_config"):
        AutoModelForCausalLM.from_pretrained(experts)


def convert(name: str, folder: Path, out: Path, **options) -> dict[str, torch.Tensor]:
    _job.run(_table.make_job(name, folder, Options(**options)), out)
    return tensors_of(out)


def test_converts_there_and_back(folder, tmp_path):
    stored = tensors_of(folder)
    values = convert("fp8-to-bf16", folder, tmp_path / "fp32", dtype="float32")
    codes = {name.removesuffix("_packed") for name in stored if name.endswith("_packed")}
    assert values.keys() == {name for name in stored if "weight_" not in name} | codes
    for name in codes:
        wanted = unpack(stored[f"{name}_packed"], stored[f"{name}_scale"]).float()
        assert torch.equal(values[name], wanted), name
    assert "quantization_config" not in json.loads((tmp_path / "fp32" / "config.json").read_text())
    fp8 = convert("bf16-to-fp8", tmp_path / "fp32", tmp_path / "fp8")
    assert all(fp8[name].dtype == torch.float8_e4m3fn for name in codes)
    result = CliRunner().invoke(app, ["convert", "diff", str(folder), str(folder)])
    assert result.exit_code == 0 and "identical" in result.output
    result = CliRunner().invoke(app, ["convert", "verify", str(folder)])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("name", ["int4", "mxfp4"])
def test_saves_quantised(name, tmp_path):
    """Weights whose rows are no whole number of groups stay as they are, and the config names them."""
    config = SHAPES["v3-mtp"]()
    source = dsm.DeepseekV3ForCausalLM(config).to(torch.bfloat16)
    source.save_pretrained(tmp_path / "four", quantize=name)
    stored = tensors_of(tmp_path / "four")
    wide = [n for n, spec in release_tensors(config).items() if spec.quantized and spec.shape[1] % 32]
    assert wide and all(stored[n].dtype == torch.bfloat16 for n in wide)
    model = dsm.DeepseekV3ForCausalLM.from_pretrained(tmp_path / "four", dtype=torch.float32)
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    assert layers and all(layer.weight_format.name == name for layer in layers)
    torch.testing.assert_close(logits_of(model), logits_of(dequantised(tmp_path / "four")), rtol=1e-4, atol=1e-4)
    found = inspect_checkpoint(tmp_path / "four")
    assert not found.findings and found.breakdown.stored_bytes(found.breakdown.weight_format) == found.total.nbytes
    model.save_pretrained(tmp_path / "again")
    again = tensors_of(tmp_path / "again")
    assert again.keys() == stored.keys()
    assert all(
        same_bits(again[n], stored[n]) for n in stored if stored[n].dtype not in (torch.bfloat16,) or "_scale" in n
    )
