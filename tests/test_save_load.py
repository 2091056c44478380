"""Load → save keeps every bit; FP8 written from bf16; saved folders load elsewhere; saving needs no second copy."""

import json
from pathlib import Path

import pytest
import torch
from releases import (
    COMMON,
    FP8,
    SHAPES,
    V3,
    dequantize_independently,
    quantize_independently,
    same_bits,
    write_release,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, FineGrainedFP8Config

import modeling_deepseek_moe as dsm
from modeling_deepseek_moe import quantizer
from modeling_deepseek_moe.quantized.experts import StackedQuantizedExperts
from modeling_deepseek_moe.quantized.mapped import MappedExperts

INDEX = "model.safetensors.index.json"
SCALE = "_scale_inv"
FORMATS = pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
KINDS = pytest.mark.parametrize("kind", SHAPES)
# every width ragged: 160 rows of kv_a_proj, experts of 192 or 40, hidden size 136
RAGGED = {"kv_lora_rank": 152, "hidden_size": 136, "q_lora_rank": 200, "v_head_dim": 40, "num_nextn_predict_layers": 1}


def read(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, by the safetensors library; the index has to agree with what the files hold."""
    files = {file.name: load_file(file) for file in folder.glob("*.safetensors")}
    if (folder / INDEX).exists():
        weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
        assert weight_map == {name: file for file, tensors in files.items() for name in tensors}
    else:
        assert list(files) == ["model.safetensors"]
    return {name: tensor for tensors in files.values() for name, tensor in tensors.items()}


def fields(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def edit_config(folder: Path, **changes) -> None:
    (folder / "config.json").write_text(json.dumps(fields(folder) | changes))


def assert_same_tensors(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not same_bits(found[name], wanted[name])] == []


def assert_same_fields(found: dict, wanted: dict) -> None:
    """Every field of ``wanted`` with its value and type; 10000 is not 10000.0."""
    assert {name: json.dumps(found.get(name), sort_keys=True) for name in wanted} == {
        name: json.dumps(value, sort_keys=True) for name, value in wanted.items()
    }


def resave(folder: Path, to: Path, auto_class=AutoModelForCausalLM, **kwargs):
    model = auto_class.from_pretrained(folder)
    model.save_pretrained(to, **kwargs)
    return model


def logits(model) -> torch.Tensor:
    ids = torch.randint(3, 128, (2, 17), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(ids).logits.float()


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


# Bit for bit.


@pytest.mark.parametrize(
    "shards, size", [(1, "5GB"), (3, "100KB"), (2, "1KB")], ids=["one-file", "shards", "tiny-shards"]
)
@FORMATS
@KINDS
def test_round_trip(tmp_path, kind, fp8, shards, size):
    tensors = write_release(tmp_path / "a", SHAPES[kind](), fp8=fp8, shards=shards)
    resave(tmp_path / "a", tmp_path / "b", max_shard_size=size)
    assert_same_tensors(read(tmp_path / "b"), tensors)
    assert_same_fields(fields(tmp_path / "b"), fields(tmp_path / "a"))
    assert fields(tmp_path / "b").get("quantization_config") == (FP8 if fp8 else None)
    files = sorted(tmp_path.joinpath("b").glob("*.safetensors"))
    limit = {"5GB": 10**9, "100KB": 10**5, "1KB": 10**3}[size]
    assert all(file.stat().st_size < limit + 50_000 or len(load_file(file)) == 1 for file in files)
    assert (len(files) == 1) == (shards == 1)


@FORMATS
def test_reading_and_writing_again_changes_nothing(tmp_path, fp8):
    """Byte for byte, once the order of tensors is this package's."""
    write_release(tmp_path / "a", SHAPES["v3-mtp"](), fp8=fp8)
    for source, target in ("ab", "bc"):
        resave(tmp_path / source, tmp_path / target, max_shard_size="200KB")
    files = [{file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in "bc"]
    assert files[0] == files[1]


def test_round_trip_of_stacked_fp8(tmp_path, monkeypatch):
    """The home that FP8 experts have on a GPU."""
    tensors = write_release(tmp_path / "a", ragged(40), fp8=True)
    mapped = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    monkeypatch.setattr(quantizer, "_stays_on_cpu", lambda device_map: False)
    stacked = resave(tmp_path / "a", tmp_path / "b")
    assert isinstance(mapped.model.layers[1].mlp.experts, MappedExperts)
    assert isinstance(stacked.model.layers[1].mlp.experts, StackedQuantizedExperts)
    assert_same_tensors(read(tmp_path / "b"), tensors)
    assert relative(logits(stacked), logits(mapped)) < 1e-2


def ragged(width: int):
    return dsm.DeepseekV3Config(**(COMMON | V3 | RAGGED | {"moe_intermediate_size": width}))


@pytest.mark.parametrize("width", [192, 40, 130])
def test_ragged_fp8(tmp_path, width):
    tensors = write_release(tmp_path / "a", ragged(width), fp8=True, shards=2)
    assert tensors["model.layers.1.self_attn.kv_a_proj_with_mqa.weight" + SCALE].shape == (2, 2)
    assert tensors["model.layers.1.mlp.experts.0.down_proj.weight" + SCALE].shape == (2, -(-width // 128))
    resave(tmp_path / "a", tmp_path / "b")
    assert_same_tensors(read(tmp_path / "b"), tensors)
    resident = AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype="float32")
    plain = {name: tensor for name, tensor in tensors.items() if not name.endswith(SCALE)}
    for name, tensor in plain.items():
        if tensor.dtype == torch.float8_e4m3fn:
            plain[name] = dequantize_independently(tensor, tensors[name + SCALE]).float()
    (tmp_path / "c").mkdir()
    save_file(plain, tmp_path / "c" / "model.safetensors", metadata={"format": "pt"})
    ragged(width).save_pretrained(tmp_path / "c")
    # the grouped kernels take no experts of 130
    stacked = AutoModelForCausalLM.from_pretrained(tmp_path / "c", dtype="float32", experts_implementation="eager")
    assert relative(logits(resident), logits(stacked)) < 1e-5


@FORMATS
def test_saving_given_state_dict(tmp_path, fp8):
    """As `Trainer` saves."""
    tensors = write_release(tmp_path / "a", SHAPES["v3-mtp"](), fp8=fp8)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    model.save_pretrained(tmp_path / "b", state_dict=model.state_dict())
    assert_same_tensors(read(tmp_path / "b"), tensors)


@FORMATS
def test_saving_onto_its_own_files(tmp_path, fp8):
    """The model goes on reading the files it is mapped from, though they have no name any more."""
    tensors = write_release(tmp_path / "a", SHAPES["v3-mtp"](), fp8=fp8, shards=3)
    (tmp_path / "a" / "tokenizer.json").write_text("{}")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    before = logits(model)
    for size in ("100KB", "5GB", "300KB"):
        model.save_pretrained(tmp_path / "a", max_shard_size=size)
        assert_same_tensors(read(tmp_path / "a"), tensors)
        assert torch.equal(logits(model), before)
    assert (tmp_path / "a" / "tokenizer.json").read_text() == "{}"
    assert not [path for path in (tmp_path / "a").iterdir() if path.name.startswith(".")]


def test_single_file_comes_before_an_index(tmp_path):
    """As transformers has it; an index of shards that are long gone does no harm then."""
    tensors = write_release(tmp_path / "a", SHAPES["v3"]())
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (tmp_path / "a" / INDEX).write_text(json.dumps(index))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert same_bits(model.lm_head.weight.detach(), tensors["lm_head.weight"])
    model.save_pretrained(tmp_path / "a")
    assert_same_tensors(read(tmp_path / "a"), tensors)  # the old index is gone


def test_bf16_bias_stays_bf16(tmp_path):
    """Moonlight's is released in bf16; it is held in fp32, and written so once it no longer fits bf16."""
    tensors = write_release(tmp_path / "a", SHAPES["moonlight"]())
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    tensors |= {key: tensor.bfloat16() for key, tensor in tensors.items() if key.endswith("e_score_correction_bias")}
    save_file(tensors, tmp_path / "a" / "model.safetensors", metadata={"format": "pt"})
    model = resave(tmp_path / "a", tmp_path / "b")
    assert model.model.layers[1].mlp.gate.e_score_correction_bias.dtype == torch.float32
    assert_same_tensors(read(tmp_path / "b"), tensors)
    model.model.layers[1].mlp.gate.e_score_correction_bias += 1e-5
    model.save_pretrained(tmp_path / "b")
    saved = read(tmp_path / "b")
    assert torch.equal(saved[name], model.model.layers[1].mlp.gate.e_score_correction_bias)
    assert saved[name.replace("layers.1", "layers.2")].dtype == torch.bfloat16


@FORMATS
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_other_dtypes(tmp_path, dtype, fp8):
    tensors = write_release(tmp_path / "a", SHAPES["v3"](), fp8=fp8)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=dtype)
    model.save_pretrained(tmp_path / "b")
    kept = {torch.float8_e4m3fn, torch.float32}
    assert_same_tensors(
        read(tmp_path / "b"),
        {name: t if t.dtype in kept else t.to(getattr(torch, dtype)) for name, t in tensors.items()},
    )
    assert fields(tmp_path / "b")["torch_dtype"] == dtype
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "b").dtype == getattr(torch, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_fp8_model_is_cast_and_saved(tmp_path, dtype):
    """Casting a resident model casts what is not FP8."""
    tensors = write_release(tmp_path / "a", SHAPES["v3"](), fp8=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a").to(dtype)
    assert torch.isfinite(logits(model)).all()
    model.save_pretrained(tmp_path / "b")
    saved = read(tmp_path / "b")
    quantized = [name for name in tensors if name.endswith(SCALE) or name + SCALE in tensors]
    assert quantized
    assert all(same_bits(saved[name], tensors[name]) for name in quantized)
    assert saved["lm_head.weight"].dtype == dtype


# The config.


# Other heads.


@FORMATS
def test_headless(tmp_path, fp8):
    """A bare model keeps everything but the head, under names without the prefix, as transformers writes it."""
    tensors = write_release(tmp_path / "a", SHAPES["v3-mtp"](), fp8=fp8, shards=2)
    bare = resave(tmp_path / "a", tmp_path / "b", AutoModel)
    assert type(bare).__name__ == "DeepseekV3Model"
    wanted = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    assert_same_tensors(read(tmp_path / "b"), wanted)
    assert fields(tmp_path / "b")["architectures"] == ["DeepseekV3Model"]
    resave(tmp_path / "b", tmp_path / "c", AutoModel)
    assert_same_tensors(read(tmp_path / "c"), wanted)
    with_head, info = AutoModelForCausalLM.from_pretrained(tmp_path / "b", output_loading_info=True)
    assert set(info["missing_keys"]) == {"lm_head.weight"}
    assert not info["unexpected_keys"]
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    with_head.lm_head.weight.data = whole.lm_head.weight.data
    assert torch.equal(logits(with_head), logits(whole))
    whole.model.save_pretrained(tmp_path / "d")
    assert_same_tensors(read(tmp_path / "d"), wanted)


@FORMATS
def test_classifier(tmp_path, fp8):
    tensors = write_release(tmp_path / "a", SHAPES["v3"](), fp8=fp8)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "a", num_labels=3)
    model.save_pretrained(tmp_path / "b")
    del tensors["lm_head.weight"]
    assert_same_tensors(read(tmp_path / "b"), tensors | {"score.weight": model.score.weight.detach()})
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "b")
    assert again.num_labels == 3
    assert torch.equal(logits(again), logits(model))


@FORMATS
@pytest.mark.parametrize("stored", [False, True], ids=["head-absent", "head-stored"])
def test_tied_embeddings(tmp_path, stored, fp8):
    config = SHAPES["v3"]()
    config.tie_word_embeddings = True
    tensors = write_release(tmp_path / "a", config, fp8=fp8)
    assert "lm_head.weight" not in tensors
    if stored:  # some releases keep the copy
        both = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
        save_file(both, tmp_path / "a" / "model.safetensors", metadata={"format": "pt"})
    model = resave(tmp_path / "a", tmp_path / "b")
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert_same_tensors(read(tmp_path / "b"), tensors)
    assert fields(tmp_path / "b")["tie_word_embeddings"] is True
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "b")), logits(model))


# bf16 → FP8.


@pytest.mark.parametrize("kind", [*SHAPES, "ragged"])
def test_quantised_save(tmp_path, kind):
    config = ragged(192) if kind == "ragged" else SHAPES[kind]()
    tensors = write_release(tmp_path / "a", config)
    resave(tmp_path / "a", tmp_path / "b", quantize="fp8", max_shard_size="200KB")
    like = write_release(tmp_path / "like", config, fp8=True)  # which tensors a release keeps in FP8
    wanted = {}
    for name, tensor in tensors.items():
        if name + SCALE in like:
            wanted[name], wanted[name + SCALE] = quantize_independently(tensor)
        else:
            wanted[name] = tensor
    assert_same_tensors(read(tmp_path / "b"), wanted)
    assert_same_fields(fields(tmp_path / "b"), fields(tmp_path / "a") | {"quantization_config": FP8})
    resave(tmp_path / "b", tmp_path / "c")
    assert_same_tensors(read(tmp_path / "c"), wanted)


def test_quantised_save_reads_back(tmp_path):
    tensors = write_release(tmp_path / "a", SHAPES["v3-mtp"](), dtype=torch.float32)
    original = resave(tmp_path / "a", tmp_path / "b", quantize="fp8")
    resident = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert isinstance(resident.model.layers[1].mlp.experts, MappedExperts)
    dequantised = AutoModelForCausalLM.from_pretrained(
        tmp_path / "b", quantization_config=FineGrainedFP8Config(dequantize=True)
    )
    assert dequantised.dtype == torch.float32
    assert relative(logits(resident), logits(dequantised)) < 1e-5
    wanted = logits(original)
    assert (logits(dequantised) - wanted).norm() < 0.2 * wanted.norm()  # FP8's own error, on random weights
    name = "model.layers.0.mlp.up_proj.weight"
    codes, scales = quantize_independently(tensors[name])
    found = dequantised.get_parameter(name)
    assert torch.equal(found, dequantize_independently(codes, scales).float())


def test_quantising_an_fp8_model_changes_nothing(tmp_path):
    tensors = write_release(tmp_path / "a", SHAPES["v3-mtp"](), fp8=True)
    resave(tmp_path / "a", tmp_path / "b", quantize="fp8")
    assert_same_tensors(read(tmp_path / "b"), tensors)


def test_fp8_dequantised_and_quantised_again(tmp_path):
    """Codes come back bit for bit; scales but for the last bit, unless fp32 holds 448 · scale."""
    tensors = write_release(tmp_path / "a", ragged(192), fp8=True)
    for name, scale in tensors.items():
        if name.endswith(SCALE):
            tensors[name.removesuffix(SCALE)].view(torch.uint8)[::128, ::128] = 0x7E  # the largest code, 448
            if ".experts." in name:
                scale.view(torch.int32).bitwise_and_(~0x7)  # so that fp32 holds 448 · scale
    save_file(tensors, tmp_path / "a" / "model.safetensors", metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "a", dtype="float32", quantization_config=FineGrainedFP8Config(dequantize=True)
    )
    model.save_pretrained(tmp_path / "b", quantize="fp8")
    saved = read(tmp_path / "b")
    assert saved.keys() == tensors.keys()
    for name, tensor in tensors.items():
        if name.endswith(SCALE):
            apart = (saved[name].view(torch.int32) - tensor.view(torch.int32)).abs().max()
            assert apart <= (0 if ".experts." in name else 1)
        elif tensor.dtype == torch.float8_e4m3fn:
            assert torch.equal(saved[name].float(), tensor.float())


def test_dequantised_save(tmp_path):
    """Saved as it is, a dequantised model is a plain bf16 release."""
    tensors = write_release(tmp_path / "a", SHAPES["v3-mtp"](), fp8=True)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "a", quantization_config=FineGrainedFP8Config(dequantize=True)
    )
    model.save_pretrained(tmp_path / "b")
    wanted = {name: tensor for name, tensor in tensors.items() if not name.endswith(SCALE)}
    for name, tensor in wanted.items():
        if tensor.dtype == torch.float8_e4m3fn:
            wanted[name] = dequantize_independently(tensor, tensors[name + SCALE]).float().bfloat16()
    assert_same_tensors(read(tmp_path / "b"), wanted)
    assert "quantization_config" not in fields(tmp_path / "b")


# In a process that never imports this package.


# Memory.


def test_a_config_says_the_dtype_of_what_is_written_like_a_release(tmp_path):
    model = dsm.DeepseekV3ForCausalLM(SHAPES["v3"]()).bfloat16()
    model.save_pretrained(tmp_path / "release")
    wide = AutoModelForCausalLM.from_pretrained(tmp_path / "release", dtype=torch.float32)
    with torch.no_grad():
        wide.lm_head.weight.add_(1)
    wide.save_pretrained(tmp_path / "trained", like=tmp_path / "release")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    assert again.config.dtype == again.lm_head.weight.dtype == torch.bfloat16
