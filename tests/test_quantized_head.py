"""A head that is codes: made by conversions that are asked for it, announced, loaded, saved and told of as such."""

import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from releases import SHAPES, same_bits, write_release
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config
from transformers.quantizers.quantizers_utils import should_convert_module
from typer.testing import CliRunner

import modeling_deepseek_moe as dsm
from modeling_deepseek_moe import parameter_breakdown
from modeling_deepseek_moe.anatomy import read_config
from modeling_deepseek_moe.cli.app import app
from modeling_deepseek_moe.conversion import _job, _table
from modeling_deepseek_moe.conversion._conversion import Options
from modeling_deepseek_moe.conversion._source import Source
from modeling_deepseek_moe.conversion.error import weight_errors
from modeling_deepseek_moe.mtp import SharedModule, share_mtp_weights
from modeling_deepseek_moe.quantized.linear import QuantizedLinear

IDS = torch.tensor([[3, 5, 7, 11, 13]])
# conversion, its options, the folder that it starts from, the row of the head's codes
MADE = {
    "int4": ("to-4bit", {"format": "int4", "head": "4bit"}, "fp8", "int4"),
    "int4-fp8": ("to-4bit", {"format": "int4", "head": "fp8"}, "fp8", "fp8_block"),
    "mxfp4": ("to-4bit", {"format": "mxfp4", "head": "4bit"}, "bf16", "mxfp4"),
    "fp8": ("bf16-to-fp8", {"head": "fp8"}, "bf16", "fp8"),
}


def small_config():
    """Rows of whole groups of 64, one MTP layer."""
    config = SHAPES["v3-mtp"]()
    config.moe_intermediate_size, config.q_lora_rank, config.kv_lora_rank, config.n_routed_experts = 64, 64, 64, 4
    config.n_group, config.topk_group, config.num_experts_per_tok, config.intermediate_size = 2, 1, 2, 128
    return config


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sources")
    for name in ("bf16", "fp8"):
        write_release(folder / name, small_config(), fp8=name == "fp8")
    return {name: folder / name for name in ("bf16", "fp8")}


def make(name: str, source: Path, out: Path, **options) -> Path:
    _job.run(_table.make_job(name, source, Options(**options)), out)
    return out


@pytest.fixture(scope="module")
def made(sources, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("made")
    return {kind: make(name, sources[start], folder / kind, **o) for kind, (name, o, start, _) in MADE.items()}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("kind", MADE)
def test_it_loads_as_codes_and_computes_with_them(made, kind):
    model = AutoModelForCausalLM.from_pretrained(made[kind], dtype=torch.float32)
    wide = AutoModelForCausalLM.from_pretrained(
        made[kind], dtype=torch.float32, quantization_config=FineGrainedFP8Config(dequantize=True)
    )
    heads = model.lm_head, model.model.mtp_layers[0].shared_head.head
    assert all(type(head) is QuantizedLinear and head.weight_format.name == MADE[kind][3] for head in heads)
    hidden = torch.randn(3, model.config.hidden_size)
    with torch.no_grad():
        torch.testing.assert_close(model.lm_head(hidden), F.linear(hidden, wide.lm_head.weight), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model(IDS).logits, wide(IDS).logits, rtol=1e-3, atol=1e-4)
    assert model.generate(IDS, max_new_tokens=4, do_sample=False).shape[1] == 9


@pytest.mark.parametrize("kind", MADE)
def test_it_is_saved_as_it_was(made, tmp_path, kind):
    model = AutoModelForCausalLM.from_pretrained(made[kind])
    model.save_pretrained(tmp_path / "saved")
    before, after = tensors_of(made[kind]), tensors_of(tmp_path / "saved")
    assert before.keys() == after.keys() and all(same_bits(before[name], after[name]) for name in before)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (made[kind], tmp_path / "saved")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]


@pytest.mark.parametrize("kind", MADE)
def test_mtp_layers_may_share_it(made, tmp_path, kind):
    model = AutoModelForCausalLM.from_pretrained(made[kind])
    assert share_mtp_weights(model) and isinstance(model.model.mtp_layers[0].shared_head.head, SharedModule)
    model.save_pretrained(tmp_path / "saved")
    before, after = tensors_of(made[kind]), tensors_of(tmp_path / "saved")
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        copied = re.sub(r"model\.layers\.\d+\.shared_head\.head", "lm_head", name)
        copied = re.sub(r"model\.layers\.\d+\.embed_tokens", "model.embed_tokens", copied)
        assert same_bits(tensor, before[copied])


@pytest.mark.parametrize("kind", MADE)
def test_sizes_are_the_files(made, kind):
    breakdown, tensors = parameter_breakdown(read_config(made[kind])), tensors_of(made[kind])
    head = sum(tensor.nbytes for name, tensor in tensors.items() if name.startswith("lm_head."))
    assert breakdown.stored["head"].nbytes(breakdown.weight_format) == head < 2 * breakdown.stored["head"].parameters
    assert breakdown.stored_bytes(breakdown.weight_format) == sum(tensor.nbytes for tensor in tensors.values())
    assert dsm.inspect_checkpoint(made[kind]).is_loadable


def test_transformers_would_take_the_lists_at_their_word(made):
    """An empty list of modules that are not converted: with none its quantiser keeps the head in floating point."""
    fields = {
        kind: json.loads((folder / "config.json").read_text())["quantization_config"] for kind, folder in made.items()
    }
    for kind in ("fp8", "mxfp4"):
        assert fields[kind]["modules_to_not_convert"] == [] and should_convert_module("lm_head", [])
    assert "lm_head" not in fields["int4"]["ignore"]
    assert "lm_head" in fields["int4-fp8"]["config_groups"]["group_1"]["targets"]


@pytest.mark.parametrize("kind", MADE)
def test_it_comes_back_in_floating_point(made, tmp_path, kind):
    wide = tensors_of(make("fp8-to-bf16", made[kind], tmp_path / "wide"))
    model = AutoModelForCausalLM.from_pretrained(made[kind], dtype=torch.bfloat16)
    assert same_bits(wide["lm_head.weight"], model.lm_head.dequantized(torch.bfloat16))
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "wide").lm_head) is torch.nn.Linear


def test_scales_come_from_a_release_with_such_a_head(made, tmp_path):
    make("fp8-to-bf16", made["fp8"], tmp_path / "wide")
    again = make("bf16-to-fp8", tmp_path / "wide", tmp_path / "again", scales_from=made["fp8"])
    before, after = tensors_of(made["fp8"]), tensors_of(again)
    assert before.keys() == after.keys() and all(same_bits(before[name], after[name]) for name in before)


def test_what_it_costs_is_said(sources, made):
    found = weight_errors(Source(sources["fp8"]), Source(made["int4"])).relative()
    assert 0.05 < found["head"] < 0.15
    assert "head" not in weight_errors(Source(sources["fp8"]), Source(sources["fp8"])).relative()


def test_bitsandbytes_reads_it(sources, tmp_path):
    bnb = pytest.importorskip("bitsandbytes")
    folder = make("to-4bit", sources["bf16"], tmp_path / "nf4", format="nf4", head="4bit")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(model.lm_head, bnb.nn.Linear4bit)
    with torch.no_grad():
        logits = model(IDS).logits.float()
    wide = AutoModelForCausalLM.from_pretrained(folder).dequantize()
    with torch.no_grad():
        assert F.cosine_similarity(logits, wide(IDS).logits.float(), dim=-1).min() > 0.999
    breakdown = parameter_breakdown(read_config(folder))
    assert breakdown.stored["head"].quantized == breakdown.stored["head"].parameters
    with pytest.raises(ValueError, match=r"resize_token_embeddings: lm_head: found codes in torch.uint8"):
        AutoModelForCausalLM.from_pretrained(folder).resize_token_embeddings(300)


def test_no_rows_are_added_to_codes(made):
    model = AutoModelForCausalLM.from_pretrained(made["int4"])
    with pytest.raises(
        ValueError, match=r"lm_head: found codes in torch.int32, wanted floating-point weights to add rows"
    ):
        model.resize_token_embeddings(model.config.vocab_size + 8)


def test_deepseeks_own_code_has_no_codes_for_it(made, tmp_path):
    with pytest.raises(dsm.CheckpointError, match=r"tensor lm_head.weight: found codes, wanted the head in bf16"):
        make("hf-to-native", made["fp8"], tmp_path / "native", world_size=1)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["to-4bit", "--format", "int4", "--head", "int4"], "--head int4 is not known, wanted one of fp8, 4bit"),
        (["to-4bit", "--format", "nf4", "--head", "fp8"], "--head fp8 goes with --format int4"),
        (["bf16-to-fp8", "--head", "4bit"], "--head 4bit is not known, wanted fp8"),
        (["bf16-to-fp8", "--head", "fp8", "--scales-from", "{fp8}"], "--head goes without --scales-from"),
        (["fp8-to-bf16", "--head", "fp8"], "has no use for --head"),
    ],
)
def test_what_cannot_be_is_refused(sources, tmp_path, command, said):
    command = [part.format(**sources) for part in command]
    run = CliRunner().invoke(app, ["convert", command[0], str(sources["bf16"]), str(tmp_path / "out"), *command[1:]])
    assert run.exit_code == 2 and said in " ".join(run.output.split())
    assert not (tmp_path / "out").exists()


def test_the_embedding_is_no_head(tmp_path):
    config = small_config()
    config.tie_word_embeddings, config.num_nextn_predict_layers = True, 0
    write_release(tmp_path / "tied", config)
    with pytest.raises(ValueError, match=r"--head 4bit: .*tie_word_embeddings=True, wanted a head of its own"):
        make("to-4bit", tmp_path / "tied", tmp_path / "out", format="int4", head="4bit")
