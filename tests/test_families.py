"""The other model types: numbers and tokens of plain transformers, the release's bytes and spelling, and what is refused."""

import json
import math
import re

import pytest
import torch
import transformers
from families import CLASSES, FIELDS, extra_tensors, spelled, write_family
from releases import FP8, same_bits
from safetensors.torch import load_file, save_file
from test_anatomy import rounded
from test_int4_release import ROUTED, announced
from transformers import AutoConfig, AutoModelForCausalLM, FineGrainedFP8Config
from typer.testing import CliRunner

import modeling_deepseek_moe as dsm
from modeling_deepseek_moe import CheckpointError, inspect_checkpoint, read_config
from modeling_deepseek_moe.cli.app import app
from modeling_deepseek_moe.quantized.mapped import MappedExperts
from modeling_deepseek_moe.weights import release_tensors

KINDS = list(FIELDS)
PLAIN = {
    "glm4_moe_lite": ("Glm4MoeLiteConfig", "Glm4MoeLiteForCausalLM"),
    "youtu": ("YoutuConfig", "YoutuForCausalLM"),
    "sarvam_mla": ("SarvamMLAConfig", "DeepseekV3ForCausalLM"),
    "axk1": ("AXK1Config", "AXK1ForCausalLM"),
    "kimi_k25": ("DeepseekV3Config", "DeepseekV3ForCausalLM"),
    "deepseek_v32": ("DeepseekV32Config", "DeepseekV32ForCausalLM"),
    "glm_moe_dsa": ("GlmMoeDsaConfig", "GlmMoeDsaForCausalLM"),
}
IDS = torch.arange(3, 20)[None]


def saved(folder) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def fields_of(folder) -> dict:
    return json.loads((folder / "config.json").read_text())


def edit(folder, **changes) -> None:
    (folder / "config.json").write_text(json.dumps(fields_of(folder) | changes))


@pytest.fixture(scope="module", params=KINDS)
def release(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, folder, write_family(folder, request.param)


def plain(kind, folder):
    config_class, model_class = (getattr(transformers, name, None) for name in PLAIN[kind])
    if config_class is None:
        pytest.skip(f"transformers {transformers.__version__} has no {PLAIN[kind][0]}")
    if kind == "kimi_k25":
        folder = text_alone(folder)
    return model_class.from_pretrained(folder, config=config_class.from_pretrained(folder), dtype=torch.float32).eval()


def text_alone(folder):
    """Kimi-K2.5's text model as a release of its own: transformers' class of the whole gets this package's for it."""
    alone, prefix = folder.with_name(f"{folder.name}-text"), "language_model."
    alone.mkdir()
    (alone / "config.json").write_text(json.dumps(FIELDS["kimi_k25"]["text_config"] | {"model_type": "deepseek_v3"}))
    tensors = {name.removeprefix(prefix): t for name, t in saved(folder).items() if name.startswith(prefix)}
    save_file(tensors, alone / "model.safetensors", metadata={"format": "pt"})
    return alone


def test_fewer_layers_of_axk1_leave_their_norms_out(tmp_path):
    write_family(tmp_path / "a", "axk1")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a", num_hidden_layers=2)
    model.save_pretrained(tmp_path / "b")
    norms = {name for name in saved(tmp_path / "b") if "post_mlp_layernorm" in name}
    assert norms == {f"model.layers.{layer}.post_mlp_layernorm.weight" for layer in (0, 1)}


def test_numbers_and_tokens_are_those_of_transformers(release):
    kind, folder, _ = release
    theirs = plain(kind, folder)
    ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert type(ours).__module__.startswith("modeling_deepseek_moe") and ours.config.model_type == kind
    with torch.no_grad():
        assert (ours(IDS).logits - theirs(input_ids=IDS).logits).abs().max() < 1e-4
        how = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        assert torch.equal(ours.generate(IDS, **how), theirs.generate(input_ids=IDS, **how))


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_release_is_saved_as_it_came(tmp_path, kind, fp8):
    tensors = write_family(tmp_path / "a", kind, fp8=fp8)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    model.save_pretrained(tmp_path / "b")
    again = saved(tmp_path / "b")
    assert again.keys() == tensors.keys()
    assert all(same_bits(again[name], tensor) for name, tensor in tensors.items())
    before, after = fields_of(tmp_path / "a"), fields_of(tmp_path / "b")
    if kind == "kimi_k25":
        text, text_after = before.pop("text_config"), after.pop("text_config")
        assert text.items() <= text_after.items()
    assert {name: after.get(name) for name in before} == before
    assert not inspect_checkpoint(tmp_path / "b").findings


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "youtu"])
def test_fp8_stays_and_streams(tmp_path, kind):
    """Experts are mapped; streamed ones give the same bits, and dequantised ones the same numbers."""
    write_family(tmp_path, kind, fp8=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert any(isinstance(module, MappedExperts) for module in model.modules())
    settings = {"quantization_config": FineGrainedFP8Config(dequantize=True), "dtype": torch.float32}
    exact = AutoModelForCausalLM.from_pretrained(tmp_path, **settings).eval()
    few = IDS[
        :, : getattr(model.config, "index_topk", None)
    ]  # beyond, indexers choose other keys where they round otherwise
    with torch.no_grad():
        mapped, wanted = model(few).logits, exact(few).logits
        assert (mapped.float() - wanted).abs().max() < 0.05 * wanted.abs().max()
        mapped = model(IDS).logits
        model.set_expert_memory(20 * 3 * 64 * 32)
        assert torch.equal(model(IDS).logits, mapped)


def test_axk1_without_biases_routes_as_with_zeros(tmp_path):
    tensors = write_family(tmp_path / "a", "axk1")
    biases = {f"model.layers.{layer}.mlp.gate.e_score_correction_bias": torch.zeros(16) for layer in (1, 2)}
    write_family(tmp_path / "b", "axk1")
    save_file(tensors | biases, tmp_path / "b" / "model.safetensors", metadata={"format": "pt"})
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name).eval() for name in "ab"]
    with torch.no_grad():
        assert torch.equal(models[0](IDS).logits, models[1](IDS).logits)
    models[1].save_pretrained(tmp_path / "c")
    assert saved(tmp_path / "c").keys() == (tensors | biases).keys()
    del biases["model.layers.2.mlp.gate.e_score_correction_bias"]
    save_file(tensors | biases, tmp_path / "b" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.2\.mlp\.gate\.e_score_correction_bias: found no such tensor"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "b")


def test_a_vision_tower_that_is_gone_is_not_saved_without_a_word(tmp_path):
    write_family(tmp_path / "a", "kimi_k25")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    with (tmp_path / "a" / "model.safetensors").open("r+b") as stream:
        stream.truncate(1000)
    with pytest.raises(CheckpointError, match="the file changed after"):
        model.save_pretrained(tmp_path / "b")
    assert not (tmp_path / "b" / "config.json").exists()


def test_text_config_is_read_from_a_release_only():
    with pytest.raises(ValueError, match="text_config must be read by from_dict"):
        dsm.KimiK25Config(text_config={"hidden_size": 64})


def test_layer_types_stand_for_the_first_dense_layers():
    config = dsm.Glm4MoeLiteConfig(
        num_hidden_layers=4, mlp_layer_types=["dense", "dense", "sparse", "sparse", "sparse"]
    )
    assert config.first_k_dense_replace == 2
    fields = json.loads(config.to_json_string())
    assert fields["mlp_layer_types"] == ["dense", "dense", "sparse", "sparse"]
    assert dsm.Glm4MoeLiteConfig.from_dict(fields).first_k_dense_replace == 2


@pytest.mark.parametrize("kind", KINDS)
def test_auto_config_gives_this_package(tmp_path, kind):
    (tmp_path / "config.json").write_text(json.dumps(FIELDS[kind]))
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is CLASSES[kind]
    config.save_pretrained(tmp_path / "again")
    again = AutoConfig.from_pretrained(tmp_path / "again")
    assert type(again) is CLASSES[kind]
    apart = {"_name_or_path", "around"}
    assert {k: v for k, v in again.to_dict().items() if k not in apart} == {
        k: v for k, v in config.to_dict().items() if k not in apart
    }


BAD = {
    "unknown word": (
        "glm4_moe_lite",
        {"mlp_layer_types": ["dense", "sparse", "linear"]},
        "mlp_layer_types=.*'linear'",
    ),
    "too few": ("axk1", {"mlp_layer_types": ["dense"]}, r"mlp_layer_types=\['dense'\] must be"),
    "sparse first": ("axk1", {"mlp_layer_types": ["sparse", "dense", "sparse"]}, "must be 'dense' for the first"),
    "norms of queries": ("glm4_moe_lite", {"use_qk_norm": True}, "use_qk_norm=True is not supported"),
    "experts": ("youtu", {"n_routed_experts": 8}, "n_routed_experts=8 must be null: all layers of youtu are dense"),
    "two spellings": ("sarvam_mla", {"n_routed_experts": 8}, "num_experts=16 and n_routed_experts=8 must be equal"),
    "head width": (
        "sarvam_mla",
        {"q_head_dim": 32},
        r"q_head_dim=32 must be qk_nope_head_dim \+ qk_rope_head_dim = 24",
    ),
    "biases": ("sarvam_mla", {"use_qkv_bias": True}, "use_qkv_bias=True is not supported"),
    "scaled positions": ("axk1", {"llama_4_scaling": {"beta": 0.1}}, "llama_4_scaling=.* is not supported"),
    "no text": ("kimi_k25", {"text_config": "kimi_k2"}, "text_config='kimi_k2' must be an object"),
    "other text": (
        "kimi_k25",
        {"text_config": {"model_type": "kimi_linear"}},
        "text_config: model_type='kimi_linear' must be",
    ),
    "an indexer": ("glm4_moe_lite", {"index_topk": 2048}, "index_topk=2048: sparse attention"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_what_is_not_understood_is_refused_by_name(tmp_path, case):
    kind, changes, message = BAD[case]
    (tmp_path / "config.json").write_text(json.dumps(FIELDS[kind] | changes))
    with pytest.raises(ValueError, match=message) as found:
        read_config(tmp_path)
    assert "config.json" in str(found.value)
    with pytest.raises(ValueError, match=message):
        AutoConfig.from_pretrained(tmp_path)


def test_sparse_attention_is_not_loaded_as_dense(tmp_path):
    """DeepSeek-V3.2's tensors under another model type, and its own model type over one tensor of them."""
    tensors = write_family(tmp_path, "glm4_moe_lite")
    indexer = {"model.layers.0.self_attn.indexer.wk.weight": torch.zeros(4, 64)}
    save_file(tensors | indexer, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"indexer\.wk\.weight: found an indexer's tensor"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not inspect_checkpoint(tmp_path).is_loadable
    edit(tmp_path, model_type="deepseek_v32", index_topk=8)
    with pytest.raises(CheckpointError, match=r"indexer\.\w+\.weight: found "):
        AutoModelForCausalLM.from_pretrained(tmp_path)


PUBLISHED = {
    "glm4_moe_lite": ("30", "3.6"),
    "youtu": ("1.96", "1.96"),
    "sarvam_mla": ("106", "11"),
    "axk1": ("519", "32"),
    "kimi_k25": ("1.0e+03", "32"),
    "deepseek_v32": ("672", "37"),
    "glm_moe_dsa": ("744", "41"),  # 40B are published: the head is 1B
}


@pytest.mark.parametrize("kind", KINDS)
def test_published_sizes(kind):
    total, active = PUBLISHED[kind]
    breakdown = dsm.parameter_breakdown(CLASSES[kind]())
    assert rounded(breakdown.parameters, total) == total
    assert rounded(breakdown.active_parameters, active) == active


def write_headers(folder, fields, int4: bool = False, fp8: bool = False) -> None:
    """A release's folder with its real headers in sparse files of the right size, and no data."""
    config = CLASSES[fields["model_type"]].from_dict(dict(fields))
    tensors = {}
    for own, spec in release_tensors(config).items():
        name = spelled(config.model_type, own)
        if int4 and ".mlp.experts." in own:
            rows, columns = spec.shape
            tensors[f"{name}_packed"] = ("I32", (rows, columns // 8))
            tensors[f"{name}_scale"] = ("BF16", (rows, columns // 32))
            tensors[f"{name}_shape"] = ("I32", (2,))
        elif fp8 and spec.quantized:
            tensors[name] = ("F8_E4M3", spec.shape)
            tensors[f"{name}_scale_inv"] = ("F32", tuple(-(-size // 128) for size in spec.shape))
        else:
            tensors[name] = ("F32" if name.endswith("bias") else "BF16", spec.shape)
    tensors |= {name: ("BF16", tuple(tensor.shape)) for name, tensor in extra_tensors(config.model_type).items()}
    (folder / "config.json").write_text(json.dumps(fields))
    header, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * {"I32": 4, "F32": 4, "BF16": 2, "F8_E4M3": 1}[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    try:
        with (folder / "model.safetensors").open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(8 + len(text) + end)
    except OSError as error:
        pytest.skip(f"no sparse files of {end / 1e9:.0f} GB here: {error}")


def real_fields(kind: str) -> dict:
    """As the release writes them, with the sizes that this package has as its defaults."""
    fields = json.loads(CLASSES[kind]().to_json_string(use_diff=True))
    return fields | {"architectures": FIELDS[kind]["architectures"]}


@pytest.mark.parametrize(
    "kind, values, gigabytes",
    [("glm4_moe_lite", 31.2, 62.4), ("sarvam_mla", 106.0, 212.1), ("youtu", 1.96, 3.92)],
    ids=["GLM-4.7-Flash", "Sarvam-105B", "Youtu-LLM-2B"],
)
def test_published_sizes_from_headers(tmp_path, kind, values, gigabytes):
    """The Hub counts an MTP layer too: 31B of GLM-4.7-Flash."""
    fields = real_fields(kind)
    if kind == "glm4_moe_lite":
        fields["num_nextn_predict_layers"] = 1
    write_headers(tmp_path, fields, int4=False)
    found = inspect_checkpoint(tmp_path)
    assert found.is_loadable and not found.findings
    assert found.total.values / 1e9 == pytest.approx(values, rel=0.005)
    assert found.total.nbytes / 1e9 == pytest.approx(gigabytes, rel=0.005)


@pytest.mark.parametrize(
    "kind, fp8, values, gigabytes",
    [
        pytest.param("deepseek_v32", True, 685.4, 690.5, id="DeepSeek-V3.2"),
        pytest.param("glm_moe_dsa", False, 755.8, 1511.5, id="GLM-5"),
        pytest.param("glm_moe_dsa", True, 755.8, 758, id="GLM-5-FP8", marks=pytest.mark.long),
    ],
)
def test_sparse_attention_from_headers(tmp_path, kind, fp8, values, gigabytes):
    """685B are published with the MTP layer, and GLM-5's 744B without: 743.9B and 11.9B."""
    fields = real_fields(kind) | {"num_nextn_predict_layers": 1}
    if fp8:
        fields["quantization_config"] = dict(FP8)
    write_headers(tmp_path, fields, fp8=fp8)
    found = inspect_checkpoint(tmp_path)
    assert found.is_loadable and not found.findings
    assert found.total.values / 1e9 == pytest.approx(values, rel=0.001)
    assert found.total.nbytes / 1e9 == pytest.approx(gigabytes, rel=0.01)


@pytest.mark.long
def test_kimi_k25_from_headers(tmp_path):
    """208,000 tensors: 1T of weights in INT4 groups of 32, the rest in bf16, a vision tower's tensors next to them."""
    fields = real_fields("kimi_k25")
    fields["text_config"]["quantization_config"] = announced(ROUTED)
    write_headers(tmp_path, fields, int4=True)
    found = inspect_checkpoint(tmp_path)
    assert found.is_loadable and not found.findings
    assert found.breakdown.parameters / 1e12 == pytest.approx(1.026, rel=0.001)
    assert found.total.nbytes / 1e9 == pytest.approx(595, rel=0.005)  # the release's 595 GB
    assert found.parts["other"].tensors == 3


def test_names_do_not_touch_those_of_deepseek():
    names = dsm.DeepseekV3Config.names
    for name in (
        "model.layers.1.mlp.experts.0.up_proj.weight",
        "language_model.x",
        "vision_tower.y",
        "lm_head.weight",
    ):
        assert names.own(name) == names.released(name) == name
        assert not names.is_carried(name) and not names.is_optional(name)
    theirs = dsm.AXK1Config.names
    name = "model.layers.4.post_mlp_layernorm.weight"
    assert theirs.own(theirs.own(name)) == theirs.own(name) == name.replace(".post_", ".mlp.post_")
    assert theirs.released(theirs.own(name)) == name
    assert re.fullmatch(r"language_model\.\w+", dsm.KimiK25Config.names.released("x"))


@pytest.mark.parametrize("kind", KINDS)
def test_conversions_keep_the_release_s_names(tmp_path, kind):
    """FP8 → bf16 → FP8 gives the first folder's codes back; INT4 loads; what no layer reads goes along."""
    tensors = write_family(tmp_path / "fp8", kind, fp8=True)
    convert("fp8-to-bf16", tmp_path / "fp8", tmp_path / "bf16", "--dtype", "float32")
    wide = saved(tmp_path / "bf16")
    assert wide.keys() == {name for name in tensors if not name.endswith("_scale_inv")}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "bf16", dtype=torch.float32).eval()
    settings = {"quantization_config": FineGrainedFP8Config(dequantize=True), "dtype": torch.float32}
    exact = AutoModelForCausalLM.from_pretrained(tmp_path / "fp8", **settings).eval()
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, exact(IDS).logits)
    convert("bf16-to-fp8", tmp_path / "bf16", tmp_path / "again", "--scales-from", tmp_path / "fp8")
    again = saved(tmp_path / "again")
    assert again.keys() == tensors.keys() and all(same_bits(again[name], tensors[name]) for name in tensors)
    convert("to-4bit", tmp_path / "fp8", tmp_path / "int4", "--format", "int4")
    found = inspect_checkpoint(tmp_path / "int4")
    assert found.is_loadable and not found.findings and found.breakdown.weight_format.name == "int4"
    assert found.total.nbytes == found.breakdown.stored_bytes(found.breakdown.weight_format) + sum(
        tensor.nbytes for tensor in extra_tensors(kind).values()
    ) - (0 if kind != "axk1" else 2 * 16 * 4)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(tmp_path / "int4").eval()(IDS).logits
    assert (logits.float() - exact(IDS).logits).norm() < 0.8 * exact(IDS).logits.norm()  # routers choose otherwise


def convert(name, source, target, *options):
    done = CliRunner().invoke(app, ["convert", name, str(source), str(target), *map(str, options)])
    assert done.exit_code == 0, done.output
