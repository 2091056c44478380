"""Bad input through the public face: errors name file, tensor, found and wanted."""

import json
from pathlib import Path

import pytest
import torch
from damages import DAMAGES
from releases import SHAPES, write_release
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, FineGrainedFP8Config

import modeling_deepseek_moe as dsm

INDEX = "model.safetensors.index.json"
EXPERT = "model.layers.1.mlp.experts.3.gate_proj.weight"
DENSE = "model.layers.0.mlp.down_proj.weight"
FORMATS = pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
SHARDS = pytest.mark.parametrize("shards", [1, 3], ids=["one-file", "shards"])


def release(tmp_path, fp8=False, shards=3, kind="v3-mtp"):
    folder = tmp_path / "release"
    write_release(folder, SHAPES[kind](), fp8=fp8, shards=shards)
    return folder


def file_of(folder, tensor) -> Path:
    """The file that holds a tensor."""
    index = folder / INDEX
    return folder / (json.loads(index.read_text())["weight_map"][tensor] if index.exists() else "model.safetensors")


def change(folder, **changes):
    """Replace tensors, named with ``__`` for ``.``; ``None`` removes one. All of a change's tensors are expected."""
    for name, new in changes.items():
        name = name.replace("__", ".")
        file = file_of(folder, name)
        tensors = load_file(file)
        if new is None:
            del tensors[name]
            edit_index(folder, lambda weight_map, name=name: weight_map.pop(name))
        else:
            tensors[name] = new(tensors[name])
        save_file(tensors, file, metadata={"format": "pt"})


def edit_index(folder, edit):
    if (folder / INDEX).exists():
        index = json.loads((folder / INDEX).read_text())
        edit(index["weight_map"])
        (folder / INDEX).write_text(json.dumps(index))


def edit_config(folder, **fields):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def assert_refused(folder, *fragments, error=dsm.CheckpointError, **kwargs):
    with pytest.raises(error) as caught:
        AutoModelForCausalLM.from_pretrained(folder, **kwargs)
    message = str(caught.value)
    for fragment in (*fragments, "found", "wanted"):
        assert str(fragment) in message


# Damaged files. Each takes a file's bytes and returns the damaged bytes and what the message must say.


@SHARDS
@FORMATS
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_file(tmp_path, damage, fp8, shards):
    folder = release(tmp_path, fp8, shards)
    file = sorted(folder.glob("*.safetensors"))[-1]
    damaged, fragments = damage(file.read_bytes())
    file.write_bytes(damaged)
    assert_refused(folder, file, *fragments)


@FORMATS
def test_absent_shard(tmp_path, fp8):
    folder = release(tmp_path, fp8)
    file = file_of(folder, EXPERT)
    file.unlink()
    assert_refused(folder, folder / INDEX, file.name)


@FORMATS
@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "../release/model-00001-of-00003.safetensors",
        "a/../../model.safetensors",
        "..",
        "C:\\model.safetensors",
        "C:model.safetensors",
        "..\\model.safetensors",
        "\\\\server\\share\\model.safetensors",
        "",
        ".",
    ],
)
def test_index_path_outside(tmp_path, path, fp8):
    folder = release(tmp_path, fp8)
    edit_index(folder, lambda weight_map: weight_map.update({EXPERT: path}))
    assert_refused(folder, folder / INDEX, EXPERT, repr(path), "a path inside")


@FORMATS
@pytest.mark.parametrize(
    "text",
    [
        "{",
        "\xff",
        "[]",
        "{}",
        '{"metadata": {}, "weight_map": {}}',
        '{"metadata": {}, "weight_map": ["lm_head.weight"]}',
        '{"weight_map": {"lm_head.weight": "model-00001-of-00003.safetensors"}}',
    ],
    ids=["cut", "not-text", "list", "no-map", "empty-map", "map-a-list", "no-metadata"],
)
def test_unusable_index(tmp_path, text, fp8):
    folder = release(tmp_path, fp8)
    (folder / INDEX).write_bytes(text.encode("latin-1"))
    assert_refused(folder, folder / INDEX, "weight_map")


@FORMATS
def test_index_names_a_number(tmp_path, fp8):
    folder = release(tmp_path, fp8)
    edit_index(folder, lambda weight_map: weight_map.update({EXPERT: 3}))
    assert_refused(folder, folder / INDEX, EXPERT)


@FORMATS
def test_index_disagrees_with_shards(tmp_path, fp8):
    folder = release(tmp_path, fp8)
    right = file_of(folder, EXPERT).name
    wrong = next(file.name for file in folder.glob("*.safetensors") if file.name != right)
    edit_index(folder, lambda weight_map: weight_map.update({EXPERT: wrong}))
    assert_refused(folder, folder / INDEX, EXPERT, right, wrong)


@FORMATS
def test_index_names_absent_tensor(tmp_path, fp8):
    folder = release(tmp_path, fp8)
    file = file_of(folder, EXPERT)
    edit_index(folder, lambda weight_map: weight_map.update({"model.extra": file.name}))
    assert_refused(folder, folder / INDEX, "model.extra", "absent", file.name)


@FORMATS
def test_duplicate_tensor(tmp_path, fp8):
    folder = release(tmp_path, fp8)
    source = file_of(folder, EXPERT)
    other = next(file for file in folder.glob("*.safetensors") if file != source)
    save_file(load_file(other) | {EXPERT: load_file(source)[EXPERT]}, other)
    assert_refused(folder, EXPERT, source, other)


@FORMATS
def test_pickle_refused(tmp_path, fp8):
    folder = release(tmp_path, fp8, shards=1)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    assert_refused(folder, folder / "pytorch_model.bin", "safetensors")


# Tensors that are not what the config wants.


@SHARDS
@FORMATS
@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.3.eh_proj.weight", DENSE, EXPERT])
def test_missing_tensor(tmp_path, name, fp8, shards):
    folder = release(tmp_path, fp8, shards)
    gone = [name, name + "_scale_inv"] if fp8 and name in (DENSE, EXPERT) else [name]
    change(folder, **dict.fromkeys(gone))
    assert_refused(folder, ".safetensors" if name != "lm_head.weight" else folder, name, "no such tensor", "[")


@FORMATS
@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight", DENSE, EXPERT])
def test_wrong_shape(tmp_path, name, fp8):
    folder = release(tmp_path, fp8)
    wanted = load_file(file_of(folder, name))[name].shape
    change(folder, **{name: lambda tensor: tensor[:-1].contiguous()})
    found = [wanted[0] - 1, *wanted[1:]]
    assert_refused(folder, file_of(folder, name), name, f"found shape {found}", f"wanted {list(wanted)}")


@FORMATS
@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight", DENSE, EXPERT])
def test_integer_weight(tmp_path, name, fp8):
    folder = release(tmp_path, fp8)
    gone = {name + "_scale_inv": None} if fp8 and name in (DENSE, EXPERT) else {}
    change(folder, **gone, **{name: lambda tensor: torch.zeros(tensor.shape, dtype=torch.int8)})
    assert_refused(folder, file_of(folder, name), name, "found dtype torch.int8", "torch.bfloat16")


@FORMATS
def test_fp8_where_none_belongs(tmp_path, fp8):
    folder = release(tmp_path, fp8)
    name = "lm_head.weight"
    change(folder, **{name: lambda tensor: tensor.to(torch.float8_e4m3fn)})
    wanted = "a floating-point tensor" if fp8 else "no FP8 without quantization_config"
    assert_refused(folder, file_of(folder, name), name, "found dtype torch.float8_e4m3fn", wanted)


def test_fp8_without_quantization_config(tmp_path):
    folder = release(tmp_path, fp8=True)
    fields = json.loads((folder / "config.json").read_text())
    del fields["quantization_config"]
    (folder / "config.json").write_text(json.dumps(fields))
    assert_refused(folder, ".safetensors", "found dtype torch.float8_e4m3fn", "no FP8 without quantization_config")


def test_one_bf16_expert_among_fp8(tmp_path):
    folder = release(tmp_path, fp8=True)
    change(folder, **{EXPERT: lambda tensor: tensor.to(torch.bfloat16), EXPERT + "_scale_inv": None})
    assert_refused(folder, file_of(folder, EXPERT), EXPERT, "found dtype torch.bfloat16", "torch.float8_e4m3fn")


DEQUANTISED = pytest.mark.parametrize("dequantize", [False, True], ids=["resident", "dequantised"])


@DEQUANTISED
@pytest.mark.parametrize("name", [DENSE, EXPERT, "model.layers.1.self_attn.o_proj.weight"])
@pytest.mark.parametrize(
    "new, found, wanted",
    [
        pytest.param(None, "FP8 codes without", "fp32 scales [1, 1]", id="missing"),
        pytest.param(lambda scale: scale.expand(2, 1).contiguous(), "shape [2, 1]", "[1, 1]", id="shape"),
        pytest.param(lambda scale: scale.squeeze(), "shape []", "[1, 1]", id="scalar"),
        pytest.param(lambda scale: scale * torch.nan, "nan at [0, 0]", "finite", id="nan"),
        pytest.param(lambda scale: scale * torch.inf, "inf at [0, 0]", "finite", id="inf"),
        pytest.param(lambda scale: -scale, "-0.0", "above zero", id="negative"),
        pytest.param(lambda scale: scale * 0, "0.0 at [0, 0]", "above zero", id="zero"),
        pytest.param(lambda scale: scale.bfloat16(), "dtype torch.bfloat16", "torch.float32", id="dtype"),
    ],
)
def test_bad_scale(tmp_path, name, new, found, wanted, dequantize):
    folder = release(tmp_path, fp8=True)
    scale = name + "_scale_inv"
    file = file_of(folder, name if new is None else scale)
    change(folder, **{scale: new})
    settings = {"quantization_config": FineGrainedFP8Config(dequantize=True)} if dequantize else {}
    assert_refused(folder, file, scale, f"found {found}", wanted, **settings)


@FORMATS
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_bad_router_bias(tmp_path, value, fp8):
    """It picks experts and is in no sum: nothing in the text would show it."""
    folder = release(tmp_path, fp8)
    name = "model.layers.2.mlp.gate.e_score_correction_bias"

    def spoil(bias):
        bias[5] = value
        return bias

    change(folder, **{name: spoil})
    assert_refused(folder, file_of(folder, name), name, f"found {value} at [5]", "finite")


def test_scale_without_codes(tmp_path):
    folder = release(tmp_path, fp8=True)
    change(folder, **{DENSE: lambda tensor: tensor.bfloat16()})
    scale = DENSE + "_scale_inv"
    assert_refused(folder, file_of(folder, scale), scale, "found a scale of torch.bfloat16", "FP8 codes")


@SHARDS
@FORMATS
@pytest.mark.parametrize("experts", [12, 20], ids=["too-many", "too-few"])
def test_expert_count(tmp_path, experts, fp8, shards):
    folder = release(tmp_path, fp8, shards)
    edit_config(folder, n_routed_experts=experts)
    found, wanted = (
        ("found expert 1", "n_routed_experts=12")
        if experts == 12
        else ("found shape [16", "wanted [20")  # the router, which comes first
    )
    assert_refused(folder, ".safetensors: tensor model.layers.1.mlp.", found, wanted)


@FORMATS
def test_experts_missing_from_the_middle(tmp_path, fp8):
    folder = release(tmp_path, fp8)
    for projection in ("gate_proj", "up_proj", "down_proj"):
        name = f"model.layers.2.mlp.experts.7.{projection}.weight"
        change(folder, **dict.fromkeys([name, name + "_scale_inv"] if fp8 else [name]))
    assert_refused(
        folder, ".safetensors", "model.layers.2.mlp.experts.7.gate_proj.weight", "no such tensor", "[32, 64]"
    )


@SHARDS
@FORMATS
@pytest.mark.parametrize(
    "kind, fields, found, wanted",
    [
        pytest.param("v3", {"num_hidden_layers": 2}, "layer 2", "num_hidden_layers=2", id="fewer"),
        pytest.param("v3", {"num_hidden_layers": 4}, "model.layers.3.", "[64]", id="more"),
        pytest.param("v3-mtp", {"num_hidden_layers": 2}, "layer 3", "num_hidden_layers=2", id="mtp-fewer"),
        pytest.param("v3-mtp", {"num_hidden_layers": 4}, "MTP layer 3", "num_hidden_layers=4", id="mtp-more"),
        pytest.param(
            "v3-mtp", {"num_nextn_predict_layers": 0}, "layer 3", "num_nextn_predict_layers=0", id="mtp-not-announced"
        ),
        pytest.param("v3-mtp", {"num_nextn_predict_layers": 2}, "model.layers.4.", "[", id="mtp-too-many-announced"),
    ],
)
def test_layer_count(tmp_path, kind, fields, found, wanted, fp8, shards):
    folder = release(tmp_path, fp8, shards, kind)
    edit_config(folder, **fields)
    assert_refused(folder, folder, "tensor model.layers.", found, wanted)


@FORMATS
@pytest.mark.parametrize("field", ["topk_method", "scoring_func", "hidden_act"])
@pytest.mark.parametrize("load", [AutoConfig, AutoModelForCausalLM], ids=["config", "model"])
def test_unknown_method(tmp_path, load, field, fp8):
    folder = release(tmp_path, fp8)
    edit_config(folder, **{field: "astrology"})
    known = {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "hidden_act": "silu"}[field]
    with pytest.raises(ValueError, match="wanted one of") as caught:
        load.from_pretrained(folder)
    for fragment in (folder / "config.json", f"{field}='astrology'", known):
        assert str(fragment) in str(caught.value)


def test_unknown_rope_scaling(tmp_path):
    folder = release(tmp_path)
    edit_config(folder, rope_scaling={"type": "astrology", "factor": 2.0})
    with pytest.raises(
        ValueError, match=r"(?s)config\.json.*rope_scaling type='astrology'.*wanted one of default.*yarn"
    ):
        AutoConfig.from_pretrained(folder)


def test_field_of_wrong_type(tmp_path):
    folder = release(tmp_path)
    edit_config(folder, hidden_size="wide")
    with pytest.raises(ValueError, match=r"config\.json.*hidden_size"):
        AutoConfig.from_pretrained(folder)


@pytest.mark.parametrize(
    "field, value", [("fmt", "e5m2"), ("activation_scheme", "static"), ("weight_block_size", [128])]
)
def test_unsupported_quantization(tmp_path, field, value):
    folder = release(tmp_path, fp8=True)
    quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
    edit_config(folder, quantization_config=quantization | {field: value})
    with pytest.raises(ValueError, match=field):
        AutoModelForCausalLM.from_pretrained(folder)
