"""Folders and configs as people have them: other makers' weights, pointers, odd fields, dtypes that differ; each is named."""

import copy
import json
import os
import pickle
import shutil

import pytest
import torch
from releases import SHAPES, write_release
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from typer.testing import CliRunner

import modeling_deepseek_moe as dsm
from modeling_deepseek_moe.cli import app

NORM, EXPERT = "model.layers.1.input_layernorm.weight", "model.layers.1.mlp.experts.3.gate_proj.weight"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "a" * 64 + "\nsize 4302384154\n"
PROMPT = torch.arange(3, 9)[None]


@pytest.fixture
def folder(tmp_path):
    write_release(tmp_path / "release", SHAPES["v3-mtp"](), fp8=True, shards=3)
    return tmp_path / "release"


@pytest.fixture
def single(tmp_path):
    write_release(tmp_path / "release", SHAPES["v3-mtp"](), fp8=True)
    return tmp_path / "release"


def edit(folder, **fields):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def rope(folder, **fields):
    """The folder's ``rope_scaling`` with other fields; ``None`` takes one away."""
    known = json.loads((folder / "config.json").read_text())["rope_scaling"] | fields
    edit(folder, rope_scaling={name: value for name, value in known.items() if value is not None})


def spoil(folder, change):
    """Change a single file's tensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors


def run(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    return result.exit_code, " ".join(result.output.split())


def assert_named_at_every_door(folder, *fragments, error=ValueError):
    """The same words from Python and from the commands."""
    with pytest.raises(error) as caught:
        AutoModelForCausalLM.from_pretrained(folder)
    said = [str(caught.value)]
    generate = ("generate", "-m", folder, "--token-ids", "0,5", "-n", 2)
    for command in (("plan", folder), ("inspect", folder), generate, ("bench", folder)):
        code, output = run(*command)
        assert code == 2, output
        said.append(output)
    for text in said:
        for fragment in fragments:
            assert fragment in text.replace("\n", " "), text


@pytest.mark.parametrize("method", ["awq", "gptq", "blockwise_int8", "bf16", "mxfp4", "nvfp4", None, 8, ["fp8"], {}])
def test_other_makers_quantisation(folder, method):
    edit(folder, quantization_config={"quant_method": method, "bits": 4})
    assert_named_at_every_door(
        folder, "config.json", "quant_method=", "is not supported, only 'compressed-tensors' or 'fp8'"
    )


SCHEME = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}


@pytest.mark.parametrize(
    ("groups", "found"),
    [
        (None, "config_groups=None is not supported, wanted groups"),
        ([SCHEME], "is not supported, wanted groups"),
        ({"group_0": {"weights": None}}, "weights=None is not supported"),
        ({"group_0": {"weights": SCHEME | {"num_bits": 8}}}, "num_bits=8 is not supported, only 4"),
        ({"group_0": {"weights": SCHEME | {"type": "float"}}}, "type='float' is not supported, only 'int'"),
        ({"group_0": {"weights": SCHEME | {"symmetric": False}}}, "symmetric=False is not supported, only True"),
        ({"group_0": {"weights": SCHEME | {"strategy": "channel"}}}, "strategy='channel' is not supported"),
        ({"group_0": {"weights": SCHEME | {"actorder": "group"}}}, "actorder='group' is not supported, only none"),
        ({"group_0": {"weights": SCHEME, "input_activations": {"num_bits": 8}}}, "activations='quantised' is not"),
        ({"group_0": {"weights": SCHEME, "format": "marlin-24"}}, "format='marlin-24' is not supported, only 'pack-"),
        ({"group_0": {"weights": SCHEME | {"group_size": 0}}}, "weight_block_size='[1, 0]' is not supported"),
        ({"group_0": {"weights": SCHEME | {"group_size": 12}}}, "weight_block_size='[1, 12]' is not supported"),
        (
            {"a": {"weights": SCHEME}, "b": {"weights": SCHEME | {"num_bits": 8}}},
            "num_bits=8 is not supported, only 4",
        ),
    ],
)
def test_other_schemes_of_compressed_tensors(folder, groups, found):
    fields = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}
    edit(folder, quantization_config=fields)
    assert_named_at_every_door(folder, "config.json", found)


@pytest.mark.parametrize("value", [3, "fp8", ["fp8"], True])
def test_a_quantisation_that_is_no_object(folder, value):
    edit(folder, quantization_config=value)
    assert_named_at_every_door(folder, "config.json", "quantization_config=", "must be an object")


@pytest.mark.parametrize("value", [None, {}])
def test_no_quantisation_is_none(tmp_path, value):
    write_release(tmp_path / "release", SHAPES["v3"]())
    edit(tmp_path / "release", quantization_config=value)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "release").dtype == torch.bfloat16
    assert run("inspect", tmp_path / "release")[0] == 0


def test_modelopt_weights_with_a_config_left_over(folder):
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "NVFP4"}}))
    fragments = "hf_quant_config.json", "quant_algo: found 'NVFP4'"
    assert_named_at_every_door(folder, *fragments, error=dsm.CheckpointError)
    code, output = run("convert", "fp8-to-bf16", folder, folder.with_name("out"))
    assert code == 2 and all(fragment in output for fragment in fragments)


def test_second_scales_with_a_config_left_over_and_no_word_of_modelopt(folder):
    index = folder / "model.safetensors.index.json"
    if index.exists():
        fields = json.loads(index.read_text())
        fields["weight_map"]["model.layers.1.mlp.gate_proj.weight_scale_2"] = next(iter(fields["weight_map"].values()))
        index.write_text(json.dumps(fields))
    else:
        file = folder / "model.safetensors"
        tensors = load_file(file)
        save_file(tensors | {"model.layers.1.mlp.gate_proj.weight_scale_2": torch.ones(1)}, file)
    assert_named_at_every_door(folder, "weight_scale_2", "NVFP4", error=dsm.CheckpointError)


@pytest.mark.parametrize(
    "name, said",
    [
        ("DeepSeek-Q4_K_M.gguf", "GGUF weights"),
        ("consolidated.safetensors", "consolidated weights"),
        ("model0-mp1.safetensors", "convert native-to-hf"),
        ("model-00001-of-00001.safetensors", "shards without model.safetensors.index.json"),
        ("weights.safetensors", "safetensors under another name"),
    ],
)
def test_weights_of_another_layout(single, name, said):
    (single / "model.safetensors").rename(single / name)
    with pytest.raises(dsm.CheckpointError, match=r"found .*wanted") as caught:
        AutoModelForCausalLM.from_pretrained(single)
    code, output = run("inspect", single)
    assert code == 2
    for text in (str(caught.value), output):
        assert name in text and said in text
    for command in ("plan", "inspect"):  # the file itself
        code, output = run(command, single / name)
        assert code == 2 and name in output and "wanted" in output


@pytest.mark.parametrize("name", ["model-00002-of-00003.safetensors", "model.safetensors.index.json"])
def test_a_git_lfs_pointer(folder, name):
    (folder / name).write_text(POINTER)
    with pytest.raises(dsm.CheckpointError, match=f"{name}: found a git-lfs pointer, wanted .*git lfs pull"):
        AutoModelForCausalLM.from_pretrained(folder)
    assert "git-lfs pointer" in run("inspect", folder)[1]


def test_a_git_lfs_pointer_for_a_tokenizer(tmp_path):
    shutil.copytree(dsm.tiny_checkpoint(), tmp_path / "tiny")
    (tmp_path / "tiny" / "tokenizer.json").write_text(POINTER)
    code, output = run("generate", "-m", tmp_path / "tiny", "hello", "-n", 2)
    assert code == 2 and "tokenizer.json: found a git-lfs pointer" in output


@pytest.mark.parametrize("name", ["sliding_window", "attention_chunk_size", "layer_types", "kv_sharing_modes"])
def test_fields_that_would_cut_the_context(folder, name):
    wanted = AutoModelForCausalLM.from_pretrained(folder).generate(PROMPT, max_new_tokens=8, do_sample=False)
    for value in (False, None, 0) if name != "layer_types" else (None, ["full_attention"] * 3):
        edit(folder, **{name: value})
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert torch.equal(model.generate(PROMPT, max_new_tokens=8, do_sample=False), wanted)
        assert not any(layer.is_sliding for layer in DynamicCache(config=model.config).layers)
    edit(folder, **{name: ["sliding_attention"] * 3 if name == "layer_types" else 8})
    with pytest.raises(ValueError, match=rf"config.json.*{name}="):
        AutoConfig.from_pretrained(folder)


@pytest.mark.parametrize(
    "field, value",
    [
        ("architectures", 127),
        ("architectures", [None]),
        ("dtype", "NaN"),
        ("torch_dtype", 7),
        ("torch_dtype", "int8"),
        ("rope_theta", -1e4),
        ("rope_theta", "wide"),
        ("rope_scaling", "yarn"),
        ("hidden_size", 2**40),
        ("qk_rope_head_dim", 2**31),
        ("vocab_size", 0),
        ("num_labels", 10**12),
        ("num_experts_per_tok", 9),
        ("pad_token_id", 10**6),
        ("rms_norm_eps", float("nan")),
        ("to_dict", 3),
        ("id2label", [3]),
    ],
)
def test_fields_of_wrong_kinds(folder, field, value):
    if field == "dtype":  # which is what counts where both are there
        edit(folder, torch_dtype=None)
    edit(folder, **{field: value})
    with pytest.raises(ValueError, match=field) as caught:
        AutoConfig.from_pretrained(folder)
    assert "config.json" in str(caught.value)


@pytest.mark.parametrize(
    "field, value",
    [
        ("factor", None),
        ("factor", "forty"),
        ("factor", True),
        ("factor", 1e300),
        ("original_max_position_embeddings", False),
        ("beta_fast", 0),
        ("mscale", "one"),
        ("mscale_all_dim", -1),
        ("type", 3),
        ("partial_rotary_factor", 0.5),
        ("full_attention", {"factor": 2}),
    ],
)
def test_ropes_of_wrong_kinds(folder, field, value):
    rope(folder, **{field: value})
    with pytest.raises(ValueError, match=rf"rope_scaling.*{field}=") as caught:
        AutoConfig.from_pretrained(folder)
    assert "config.json" in str(caught.value)


@pytest.mark.parametrize("block", [127, "128", [128, 128, 128], [0, 128], [True, 128], {"a": 1}, [128, 2**40]])
def test_block_sizes_of_wrong_kinds(folder, block):
    known = json.loads((folder / "config.json").read_text())["quantization_config"]
    edit(folder, quantization_config=known | {"weight_block_size": block})
    assert_named_at_every_door(folder, "config.json", "weight_block_size=", "two sizes")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e8m0fnu])
def test_scales_of_other_dtypes_are_named(single, dtype):
    def change(tensors):
        for name in tensors:
            if name.endswith("_scale_inv"):
                tensors[name] = tensors[name].to(dtype)

    spoil(single, change)
    with pytest.raises(dsm.CheckpointError, match=rf"_scale_inv: found dtype {dtype}, wanted torch.float32"):
        AutoModelForCausalLM.from_pretrained(single)


def test_an_expert_of_a_number_without_end(single):
    many = "9" * 5000
    spoil(single, lambda tensors: tensors.update({EXPERT.replace(".3.", f".{many}."): torch.zeros(2)}))
    with pytest.raises(
        dsm.CheckpointError, match=r"model.safetensors: tensor model\.layers.* found a name of 50\d\d char"
    ):
        AutoModelForCausalLM.from_pretrained(single)
    assert "found a name of" in run("inspect", single)[1]


def fine_norms(single):
    """Every norm in fp32, with values that bf16 cannot hold."""

    def change(tensors):
        for name in tensors:
            if "norm" in name:
                tensors[name] = tensors[name].float() + 1e-4

    return spoil(single, change)


def assert_bytes_kept(folder, tensors, *changed):
    saved = load_file(folder / "model.safetensors")
    assert saved.keys() == tensors.keys()
    for name, tensor in tensors.items():
        same = saved[name].dtype == tensor.dtype and torch.equal(
            saved[name].view(torch.uint8), tensor.view(torch.uint8)
        )
        assert same is (name not in changed), name


@pytest.mark.parametrize("how", ["as it is", "copied", "in memory", "of the base model"])
def test_finer_norms_of_a_release_are_kept(single, tmp_path, how):
    tensors = fine_norms(single)
    model = AutoModelForCausalLM.from_pretrained(single)
    assert model.model.norm.weight.dtype == torch.bfloat16  # what it is computed in
    if how == "copied":
        model = copy.deepcopy(model)
    elif how == "in memory":
        for file in single.glob("*.safetensors"):
            file.unlink()
    elif how == "of the base model":
        tensors = {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
        tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
        model = model.model
    model.save_pretrained(tmp_path / "saved")
    assert_bytes_kept(tmp_path / "saved", tensors)


def test_a_norm_that_was_trained_is_saved_as_it_is(single, tmp_path):
    tensors = fine_norms(single)
    model = AutoModelForCausalLM.from_pretrained(single)
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[3] += 1
    model.save_pretrained(tmp_path / "saved")
    assert_bytes_kept(tmp_path / "saved", tensors, NORM)
    saved = load_file(tmp_path / "saved" / "model.safetensors")[NORM]
    assert torch.equal(saved, model.model.layers[1].input_layernorm.weight)


def test_another_dtype_is_the_callers_wish(tmp_path):
    write_release(tmp_path / "release", SHAPES["v3"]())
    edit(tmp_path / "release", torch_dtype="float32")
    spoil(tmp_path / "release", lambda tensors: tensors.update({name: t.float() for name, t in tensors.items()}))
    AutoModelForCausalLM.from_pretrained(tmp_path / "release", dtype="bfloat16").save_pretrained(tmp_path / "saved")
    assert load_file(tmp_path / "saved" / "model.safetensors")[NORM].dtype == torch.bfloat16


def rewrite_in_time(file):
    """Other bytes of the same number, and the time of the old ones."""
    status, data = file.stat(), file.read_bytes()
    with file.open("r+b") as stream:
        stream.write(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("change", [rewrite_in_time, lambda file: os.truncate(file, 5000)], ids=["rewritten", "cut"])
def test_a_file_that_changes_between_two_calls(tmp_path, change, fp8):
    write_release(tmp_path / "release", SHAPES["v3"](), fp8=fp8)
    file = tmp_path / "release" / "model.safetensors"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "release")
    model(PROMPT)
    change(file)
    with pytest.raises(dsm.CheckpointError, match=r"model.safetensors: found \d+ bytes .*wanted"):
        model(PROMPT)


def test_what_changes_no_byte_is_no_change(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder)
    wanted = model(PROMPT).logits
    for number, file in enumerate(sorted(folder.glob("*.safetensors"))):
        file.chmod(0o600)
        os.link(file, tmp_path / f"another-name-{number}")
    assert torch.equal(model(PROMPT).logits, wanted)


def test_a_model_that_left_its_files_does_not_look_at_them(tmp_path):
    write_release(tmp_path / "release", SHAPES["v3"]())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "release").to(torch.float32)
    for buffer in model.buffers():
        buffer.data = buffer.clone()
    other = pickle.loads(pickle.dumps(AutoModelForCausalLM.from_pretrained(tmp_path / "release")))
    os.truncate(tmp_path / "release" / "model.safetensors", 5000)
    assert torch.isfinite(model(PROMPT).logits).all()
    assert torch.isfinite(other(PROMPT).logits).all()
