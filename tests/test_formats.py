"""A weight format is a row of a table: a row that no code knows loads, computes, streams, saves and converts."""

import json
from dataclasses import replace

import pytest
import torch
from releases import SHAPES, same_bits, write_release
from safetensors.torch import load_file, save_file
from transformers import FineGrainedFP8Config

import modeling_deepseek_moe as dsm
from modeling_deepseek_moe import CheckpointError, formats, inspect_checkpoint
from modeling_deepseek_moe.conversion import _job, _table
from modeling_deepseek_moe.conversion._conversion import Options
from modeling_deepseek_moe.formats import FP8, WeightFormat
from modeling_deepseek_moe.ops.block_fp8 import reference
from modeling_deepseek_moe.quantized.linear import QuantizedLinear
from modeling_deepseek_moe.quantized.mapped import MappedExperts
from modeling_deepseek_moe.weights import release_tensors

GROUP = 64


def encode(weight: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows in groups: code = round(w / scale), scale = amax / 127."""
    n, k = weight.shape
    groups = torch.nn.functional.pad(weight.float(), (0, -k % block[1])).view(n, -1, block[1])
    scales = groups.abs().amax(-1) / 127
    scales = torch.where(scales > 0, scales, 1.0)
    codes = (groups / scales.unsqueeze(-1)).round().to(torch.int8)
    return codes.flatten(1)[:, :k].contiguous(), scales


def decode(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype, block: tuple[int, int]) -> torch.Tensor:
    return (codes.float() * scales.repeat_interleave(block[1], dim=1)[:, : codes.shape[1]]).to(dtype)


INT8 = WeightFormat(
    name="toy_int8",
    method="toy",
    fields={"bits": 8},
    implied={},
    code_dtype=torch.int8,
    bits=8,
    block=(1, GROUP),
    scale_dtype=torch.float32,
    scale_suffix="_group_scale",
    encode=encode,
    decode=decode,
)


def pack(weight: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Eight codes of four bits in an element, offset by 8; scale = amax / 7 in bf16."""
    n, k = weight.shape
    groups = torch.nn.functional.pad(weight.float(), (0, -k % block[1])).view(n, -1, block[1])
    scales = (groups.abs().amax(-1) / 7).to(torch.bfloat16)
    scales = torch.where(scales > 0, scales, 1.0)
    codes = (groups / scales.float().unsqueeze(-1)).round().to(torch.int32).flatten(1)[:, :k] + 8
    return sum(codes[:, i::8] << (4 * i) for i in range(8)).to(torch.int32), scales


def unpack(packed: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype, block: tuple[int, int]) -> torch.Tensor:
    codes = torch.stack([(packed >> (4 * i)) & 15 for i in range(8)], dim=-1).flatten(1) - 8
    return (codes * scales.float().repeat_interleave(block[1], dim=1)[:, : codes.shape[1]]).to(dtype)


INT4 = replace(
    INT8,
    name="toy_int4",
    fields={"bits": 4},
    code_dtype=torch.int32,
    bits=4,
    block=(1, 32),
    scale_dtype=torch.bfloat16,
    encode=pack,
    decode=unpack,
)


@pytest.fixture(autouse=True, params=[INT8, INT4], ids=lambda row: row.name)
def toy(request, monkeypatch) -> WeightFormat:
    monkeypatch.setattr(formats, "FORMATS", (*formats.FORMATS, request.param))
    return request.param


@pytest.fixture
def wide(tmp_path) -> dsm.DeepseekV3ForCausalLM:
    """A small model in bf16."""
    write_release(tmp_path / "bf16", SHAPES["v3-mtp"]())
    return dsm.DeepseekV3ForCausalLM.from_pretrained(tmp_path / "bf16", dtype=torch.bfloat16)


@pytest.fixture
def folder(wide, toy, tmp_path):
    wide.save_pretrained(tmp_path / "toy", quantize=toy.name, max_shard_size="200kB")
    return tmp_path / "toy"


def tensors_of(folder) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def logits_of(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 20)[None]).logits


def test_saves(wide, folder, toy):
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"] == {**toy.fields, "quant_method": "toy", "weight_block_size": list(toy.block)}
    stored, specs = tensors_of(folder), release_tensors(wide.config)
    wanted = set(specs) | {f"{name}_group_scale" for name, spec in specs.items() if spec.quantized}
    assert set(stored) == wanted
    for name in [name for name, spec in specs.items() if spec.quantized and ".experts." not in name]:
        codes, scales = toy.encode(wide.get_parameter(name).detach(), toy.block)
        assert same_bits(stored[name], codes) and same_bits(stored[f"{name}_group_scale"], scales), name


def test_loads_and_computes_by_the_reference(folder, tmp_path, toy):
    """The model on codes is the model on the values that they stand for; nothing runs natively but what has kernels."""
    model = dsm.DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    kinds = [type(module) for module in model.modules()]
    assert kinds.count(QuantizedLinear) == len(
        [n for n, s in release_tensors(model.config).items() if s.quantized and ".experts." not in n]
    )
    assert MappedExperts in kinds and all(
        m.weight_format.name == toy.name for m in model.modules() if hasattr(m, "weight_format")
    )
    assert toy.name in str(model.engine_report())
    values = dsm.DeepseekV3ForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=FineGrainedFP8Config(dequantize=True)
    )
    stored = tensors_of(folder)
    for name, parameter in values.named_parameters():
        if f"{name}_group_scale" in stored:
            assert same_bits(
                parameter.detach(), toy.decode(stored[name], stored[f"{name}_group_scale"], torch.float32, toy.block)
            )
    torch.testing.assert_close(logits_of(model), logits_of(values), rtol=1e-4, atol=1e-4)
    prompt = torch.arange(3, 12)[None]
    made = [m.generate(prompt, max_new_tokens=8, do_sample=False) for m in (model, values)]
    assert torch.equal(*made)


def test_gradients_pass(folder):
    model = dsm.DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    states = torch.randn(1, 5, model.config.hidden_size, requires_grad=True)
    model(inputs_embeds=states).logits.sum().backward()
    assert states.grad.isfinite().all() and states.grad.abs().sum() > 0


def test_streams(folder):
    model = dsm.DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    wanted, experts = logits_of(model), sum(m.mapped_bytes for m in model.modules() if isinstance(m, MappedExperts))
    model.set_expert_memory(max(experts // 2, 200_000))  # of a few: an expert takes whole pages there
    assert same_bits(logits_of(model), wanted)
    stats = model.expert_stats()
    assert stats.bytes_read > 0


def test_saves_again_what_it_loaded(folder, tmp_path):
    dsm.DeepseekV3ForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "again", max_shard_size="200kB")
    for file in folder.glob("*.safetensors"):
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()
    assert json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]["quant_method"] == "toy"


def test_plans_and_inspects(folder, toy):

    found = inspect_checkpoint(folder)
    assert not [finding for finding in found.findings if finding.fatal]
    assert found.breakdown.weight_format.name == toy.name
    assert found.breakdown.stored_bytes(found.breakdown.weight_format) == found.total.nbytes
    assert f"{toy.title} in blocks of 1×{toy.block[1]}" in found.architecture["weights"]


@pytest.mark.parametrize("fault", ["shape", "dtype"])
def test_bad_scales_are_named(folder, fault):

    file = sorted(folder.glob("*.safetensors"))[0]
    tensors = load_file(file)
    scale = next(name for name in tensors if name.endswith("_group_scale"))
    tensors[scale] = tensors[scale][:-1] if fault == "shape" else tensors[scale].half()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=scale.replace(".", r"\.")):
        dsm.DeepseekV3ForCausalLM.from_pretrained(folder)


# scale_fmt


def test_powers_of_two():
    torch.manual_seed(0)
    ue8m0 = formats.by_name("fp8_ue8m0")
    weight = torch.randn(200, 300) * torch.logspace(-6, 6, 300)
    codes, scales = ue8m0.quantize(weight)
    amax = FP8.scales(weight) * 448
    wanted = torch.exp2(torch.ceil(torch.log2(amax.double() / 448))).float()
    assert torch.equal(scales, wanted) and torch.equal(ue8m0.scales(weight), wanted)
    wide = scales.repeat_interleave(128, 0)[:200].repeat_interleave(128, 1)[:, :300]
    assert torch.equal(codes.float(), (weight / wide).to(torch.float8_e4m3fn).float())
    with dsm.use_backend("reference"):
        again = ue8m0.quantize(weight)
    assert same_bits(codes, again[0]) and same_bits(scales, again[1])
    # what was quantised by this rule comes back exactly
    back = ue8m0.quantize(ue8m0.dequantize(codes, scales, torch.float32))
    assert same_bits(codes, back[0]) and same_bits(scales, back[1])
    exact = torch.tensor([[2.0**-9 * 448, 1.0]])
    assert reference.scales(exact, (1, 1), True).tolist() == [[2.0**-9, 2.0**-8]]


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"quant_method": "fp8"}, "fp8"),
        ({"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "expert_dtype": "fp8"}, "fp8"),
        ({"quant_method": "fp8", "scale_fmt": None}, "fp8"),
        ({"quant_method": "fp8", "scale_fmt": "ue8m0"}, "fp8_ue8m0"),
        ({"quant_method": "toy"}, "toy"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt='e5m2' is not supported, only 'e4m3'"),
        ({"quant_method": "fp8", "expert_dtype": "fp4"}, "expert_dtype='fp4' is not supported, only 'fp8'"),
        ({"quant_method": "fp8", "scale_fmt": "e5m2"}, "scale_fmt='e5m2' is not supported, only 'ue8m0'"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "weight_block_size"),
        (
            {"quant_method": "awq"},
            "quant_method='awq' is not supported, only 'compressed-tensors' or 'fp8' or 'mx' or 'toy'",
        ),
    ],
)
def test_what_a_config_announces(fields, found):
    try:
        name = formats.of_config(fields).name.partition("_int")[0]
    except ValueError as error:
        assert found in str(error)
    else:
        assert name == found


def test_an_unknown_format_is_named(wide, tmp_path, toy):
    known = " or ".join(repr(row.name) for row in formats.FORMATS)
    assert known.startswith("'fp8' or 'fp8_ue8m0' or 'int4' or ") and known.endswith(repr(toy.name))
    with pytest.raises(ValueError, match=f"quantize='int3' is not supported, wanted {known}"):
        wide.save_pretrained(tmp_path / "out", quantize="int3")
    assert not (tmp_path / "out").exists()


def convert(name: str, folder, out, **options):
    _job.run(_table.make_job(name, folder, Options(**options)), out)
    return tensors_of(out)


def test_converts_there_and_back(wide, folder, tmp_path, toy):
    """The bytes of `save_pretrained`, and the values that they stand for; from fp32 the codes come back by themselves."""
    wide.save_pretrained(tmp_path / "bf16")
    stored = tensors_of(folder)
    made = convert("bf16-to-fp8", tmp_path / "bf16", tmp_path / "made", format=toy.name)
    assert made.keys() == stored.keys() and all(same_bits(made[name], stored[name]) for name in stored)
    config = json.loads((tmp_path / "made" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "toy"
    values = convert("fp8-to-bf16", folder, tmp_path / "fp32", dtype="float32")
    for name in [name for name in stored if f"{name}_group_scale" in stored]:
        wanted = toy.decode(stored[name], stored[f"{name}_group_scale"], torch.float32, toy.block)
        assert same_bits(values[name], wanted), name
    assert not [name for name in values if name.endswith("_group_scale")]
    back = convert("bf16-to-fp8", tmp_path / "fp32", tmp_path / "back", format=toy.name)
    assert all(same_bits(back[name], stored[name]) for name in stored if stored[name].dtype == toy.code_dtype)


def test_ue8m0_is_kept(wide, tmp_path):
    """By saving, by saving like the release, and by conversion; FP8 to fp32 and back keeps every value."""
    wide.save_pretrained(tmp_path / "release", quantize="fp8_ue8m0")
    stored = tensors_of(tmp_path / "release")
    announced = json.loads((tmp_path / "release" / "config.json").read_text())["quantization_config"]
    assert announced["scale_fmt"] == "ue8m0" and announced["quant_method"] == "fp8"
    scales = torch.cat([tensor.flatten() for name, tensor in stored.items() if name.endswith("_scale_inv")])
    assert torch.equal(torch.frexp(scales).mantissa, torch.full_like(scales, 0.5))
    values = dsm.DeepseekV3ForCausalLM.from_pretrained(
        tmp_path / "release", quantization_config=FineGrainedFP8Config(dequantize=True), dtype=torch.float32
    )
    values.save_pretrained(tmp_path / "like", quantize="fp8", like=tmp_path / "release")
    convert("fp8-to-bf16", tmp_path / "release", tmp_path / "fp32", dtype="float32")
    convert("bf16-to-fp8", tmp_path / "fp32", tmp_path / "back", format="fp8_ue8m0")
    convert("bf16-to-fp8", tmp_path / "fp32", tmp_path / "from", scales_from=tmp_path / "release")
    # and where nothing is said, since a config remembers the rule
    convert("bf16-to-fp8", tmp_path / "fp32", tmp_path / "remembered")
    values.save_pretrained(tmp_path / "saved", quantize="fp8")
    form = formats.by_name("fp8_ue8m0")
    for again in ("like", "back", "from", "remembered", "saved"):
        found = tensors_of(tmp_path / again)
        assert found.keys() == stored.keys()
        config = json.loads((tmp_path / again / "config.json").read_text())
        assert config["quantization_config"] == announced and formats.RELEASED not in config, again
        for name in [name for name in stored if f"{name}_scale_inv" in stored]:
            pairs = [(tensors[name], tensors[f"{name}_scale_inv"]) for tensors in (found, stored)]
            # where a block's largest code is 224, twice the codes with half the scale are the same values
            if again not in ("like", "from"):
                pairs = [(form.dequantize(*pair, torch.float32),) for pair in pairs]
            assert all(same_bits(*parts) for parts in zip(*pairs, strict=True)), (again, name)


def test_codes_are_not_turned_into_those_of_another_format(wide, folder, tmp_path, toy):
    """Nor left as they are without a word; in their own format, by its name, they are written as they are."""
    wide.save_pretrained(tmp_path / "fp8", quantize="fp8")
    held = dsm.DeepseekV3ForCausalLM.from_pretrained(tmp_path / "fp8")
    for other in ("fp8_ue8m0", toy.name):
        with pytest.raises(
            ValueError, match=f"quantize='{other}': found weights in 'fp8', wanted floating-point ones"
        ):
            held.save_pretrained(tmp_path / other, quantize=other)
        assert not (tmp_path / other).exists()
    held.save_pretrained(tmp_path / "again", quantize="fp8")
    stored, again = tensors_of(tmp_path / "fp8"), tensors_of(tmp_path / "again")
    assert stored.keys() == again.keys() and all(same_bits(stored[name], again[name]) for name in stored)


# rows that differ from FP8 in one thing


def divide(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype, block: tuple[int, int]) -> torch.Tensor:
    return reference.dequantize(codes, 1 / scales, dtype, block)


def encode_divided(weight: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    codes, scales = reference.quantize(weight, block, False)
    return codes, 1 / scales


def exponents(weight: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    codes, scales = reference.quantize(weight, block, True)
    return codes, scales.to(torch.float8_e8m0fnu)


def by_exponents(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype, block: tuple[int, int]):
    return reference.dequantize(codes, scales.float(), dtype, block)


NEAR_FP8 = {
    "another suffix": replace(FP8, name="near", method="near", scale_suffix="_scale"),
    "scales that divide": replace(
        FP8,
        name="near",
        method="near",
        encode=encode_divided,
        decode=divide,
        linear=None,
        find_scales=None,
        encode_with=None,
    ),
    "exponents for scales": replace(
        FP8,
        name="near",
        method="near",
        scale_dtype=torch.float8_e8m0fnu,
        encode=exponents,
        decode=by_exponents,
        linear=None,
        find_scales=None,
        encode_with=None,
    ),
}


@pytest.mark.parametrize("name", NEAR_FP8)
@pytest.mark.parametrize("stacked", [False, True], ids=["mapped", "stacked"])
def test_rows_near_fp8_are_what_they_say(name, stacked, wide, tmp_path, monkeypatch):
    """The engine's FP8 kernels are for rows that name them; scales are found by the row's own suffix."""
    row = NEAR_FP8[name]
    monkeypatch.setattr(formats, "FORMATS", (*formats.FORMATS, row))
    wide.save_pretrained(tmp_path / "near", quantize="near")
    if stacked:
        monkeypatch.setattr("modeling_deepseek_moe.quantizer._stays_on_cpu", lambda device_map: False)
    model = dsm.DeepseekV3ForCausalLM.from_pretrained(tmp_path / "near", dtype=torch.float32)
    assert any(isinstance(module, MappedExperts) for module in model.modules()) is not stacked
    values = dsm.DeepseekV3ForCausalLM.from_pretrained(
        tmp_path / "near", dtype=torch.float32, quantization_config=FineGrainedFP8Config(dequantize=True)
    )
    torch.testing.assert_close(logits_of(model), logits_of(values), rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        few = [one(torch.arange(3, 6)[None]).logits for one in (model, values)]
    torch.testing.assert_close(*few, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("suffixes", [("", ""), ("_packed", "_packed")])
def test_scales_have_a_name_of_their_own(suffixes):
    with pytest.raises(ValueError, match="scale_suffix"):
        replace(FP8, code_suffix=suffixes[0], scale_suffix=suffixes[1])
