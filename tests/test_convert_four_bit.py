"""``convert to-4bit``: what it writes is what compressed-tensors and bitsandbytes would, and ``error`` says what it costs."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from releases import SHAPES, dequantize_independently, same_bits, write_release
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, FineGrainedFP8Config
from transformers.quantizers.quantizers_utils import should_convert_module
from typer.testing import CliRunner

import modeling_deepseek_moe as dsm
from modeling_deepseek_moe import CheckpointError, formats, inspect_checkpoint
from modeling_deepseek_moe.cli.app import app
from modeling_deepseek_moe.conversion import _job, _table
from modeling_deepseek_moe.conversion._conversion import Options
from modeling_deepseek_moe.conversion._source import Source
from modeling_deepseek_moe.conversion.error import logits_error, weight_errors
from modeling_deepseek_moe.formats.announcements import with_group
from modeling_deepseek_moe.ops import four_bit
from modeling_deepseek_moe.quantized.linear import QuantizedLinear
from modeling_deepseek_moe.quantized.mapped import MappedExperts
from modeling_deepseek_moe.tiny.corpus import FAMILIES
from modeling_deepseek_moe.tiny.score import held_out
from modeling_deepseek_moe.weights import release_tensors


def wide_config():
    """Rows of whole groups of 64, but for queries: their latent has 96 values."""
    config = SHAPES["v3-mtp"]()
    config.moe_intermediate_size, config.q_lora_rank, config.kv_lora_rank, config.n_routed_experts = 64, 96, 64, 4
    config.n_group, config.topk_group, config.num_experts_per_tok = 2, 1, 2
    config.intermediate_size = 128
    return config


@pytest.fixture(scope="module", params=[False, True], ids=["bf16", "fp8"])
def source(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "release"
    write_release(folder, wide_config(), fp8=request.param, shards=3)
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def values_of(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a release in bf16 or FP8, these in fp32."""
    stored = tensors_of(folder)
    return {
        name: dequantize_independently(tensor, stored[f"{name}_scale_inv"]).float()
        if f"{name}_scale_inv" in stored
        else tensor
        for name, tensor in stored.items()
        if not name.endswith("_scale_inv")
    }


def make(source: Path, out: Path, **options) -> dict[str, torch.Tensor]:
    _job.run(_table.make_job("to-4bit", source, Options(**options)), out)
    return tensors_of(out)


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("kind", ["int4", "mxfp4"])
def test_codes_and_scales(source, tmp_path, kind):
    """Of each linear layer's weight; all else as it was. The folder loads mapped and computes with the codes."""
    made, values, form = make(source, tmp_path / "out", format=kind), values_of(source), formats.by_name(kind)
    specs, packed = release_tensors(wide_config()), form.code_suffix
    for name, spec in specs.items():
        if not spec.quantized:
            assert same_bits(made.pop(name), values[name]), name
            continue
        codes, scales = four_bit.encode(values[name], (1, 32), kind=kind)
        assert same_bits(made.pop(name + packed), codes) and same_bits(made.pop(f"{name}_scale"), scales), name
        if kind == "int4":
            assert same_bits(made.pop(f"{name}_shape"), torch.tensor(spec.shape, dtype=torch.int32))
    assert not made
    assert formats.of_config(config_of(tmp_path / "out")["quantization_config"]).name == kind
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert sum(isinstance(module, MappedExperts) for module in model.modules()) == 3
    found = inspect_checkpoint(tmp_path / "out")
    assert not found.findings and found.breakdown.stored_bytes(form) == found.total.nbytes


def test_the_config_names_what_is_left(source, tmp_path):
    make(source, tmp_path / "out", format="int4", keep="attention,shared")
    made = tensors_of(tmp_path / "out")
    ignored = config_of(tmp_path / "out")["quantization_config"]["ignore"]
    assert "lm_head" in ignored and r"re:model\.layers\.\d+\.mlp\.gate$" in ignored
    for name, spec in release_tensors(wide_config()).items():
        is_kept = spec.part in ("attention", "shared experts") or not spec.quantized
        assert (name in made) == is_kept, name
        if is_kept and spec.quantized:
            wanted = values_of(source)[name].bfloat16()
            assert same_bits(made[name], wanted), name
    found = inspect_checkpoint(tmp_path / "out")
    assert not found.findings
    assert found.breakdown.stored_bytes(found.breakdown.weight_format) == found.total.nbytes


def test_parts_stay_in_fp8(source, tmp_path):
    """From FP8 to the byte; from bf16 as ``bf16-to-fp8`` makes them. Both kinds load, compute, save and are counted."""
    made = make(source, tmp_path / "out", format="int4", keep_fp8="attention,shared", keep="dense")
    stored = tensors_of(source)
    fp8 = formats.by_name("fp8_block")
    for name, spec in release_tensors(wide_config()).items():
        if spec.part in ("attention", "shared experts") and spec.quantized:
            pair = made[name], made[f"{name}_scale"]
            kept = f"{name}_scale_inv" in stored
            wanted = (stored[name], stored[f"{name}_scale_inv"]) if kept else fp8.quantize(stored[name])
            assert all(same_bits(*parts) for parts in zip(pair, wanted, strict=True)), name
        elif spec.part == "dense":
            assert made[name].dtype == torch.bfloat16
        elif spec.quantized and spec.shape[1] % 32 == 0:
            assert f"{name}_packed" in made
    found = inspect_checkpoint(tmp_path / "out")
    assert not found.findings and "INT4 in blocks of 1×32 and FP8 BLOCK in" in found.architecture["weights"]
    assert found.breakdown.stored_bytes(found.breakdown.weight_format) == found.total.nbytes
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    names = {m.weight_format.name for m in model.modules() if isinstance(m, QuantizedLinear)}
    assert names == {"int4", "fp8_block"}
    settings = {"quantization_config": FineGrainedFP8Config(dequantize=True), "dtype": torch.float32}
    values = AutoModelForCausalLM.from_pretrained(tmp_path / "out", **settings)
    with torch.no_grad():
        logits = [m(torch.arange(3, 20)[None]).logits for m in (model, values)]
    torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-3)
    AutoModelForCausalLM.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "again")
    again = tensors_of(tmp_path / "again")
    assert again.keys() == made.keys() and all(same_bits(again[name], made[name]) for name in made)
    assert config_of(tmp_path / "again")["quantization_config"] == config_of(tmp_path / "out")["quantization_config"]
    _job.run(_table.make_job("fp8-to-bf16", tmp_path / "out", Options(dtype="float32")), tmp_path / "fp32")
    wide, parameters = tensors_of(tmp_path / "fp32"), dict(values.named_parameters())
    assert wide.keys() == release_tensors(wide_config()).keys()
    assert all(torch.equal(wide[name].float(), parameters[name]) for name in parameters if ".experts." not in name)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_layout_of_bitsandbytes(tmp_path, kind):
    """Name by name what a ``Linear4bit`` of the same weight has in its state dict, to the byte."""
    functional = pytest.importorskip("bitsandbytes").functional
    write_release(tmp_path / "release", wide_config())
    made, values = make(tmp_path / "release", tmp_path / "out", format=kind), values_of(tmp_path / "release")
    coded = 0
    for name, spec in release_tensors(wide_config()).items():
        if not spec.quantized or spec.shape[1] % 64:
            assert same_bits(made.pop(name), values[name]), name
            continue
        codes, state = functional.quantize_4bit(values[name], blocksize=64, quant_type=kind)
        assert same_bits(made.pop(name), codes), name
        for suffix, tensor in state.as_dict(packed=True).items():
            assert same_bits(made.pop(f"{name}.{suffix}"), tensor), (name, suffix)
        coded += 1
    assert coded and not made
    config = config_of(tmp_path / "out")["quantization_config"]
    assert config["quant_method"] == "bitsandbytes" and config["bnb_4bit_quant_type"] == kind
    assert "lm_head" in config["llm_int8_skip_modules"]
    assert not should_convert_module("model.layers.0.self_attn.q_b_proj", config["llm_int8_skip_modules"])
    assert should_convert_module("model.layers.0.self_attn.o_proj", config["llm_int8_skip_modules"])


def test_goes_on_after_an_interruption(source, tmp_path):
    wanted = make(source, tmp_path / "whole", format="int4", max_shard_size="20kB")
    job = _table.make_job("to-4bit", source, Options(format="int4", max_shard_size="20kB"))
    written = itertools.count()

    def stop(nbytes: int) -> None:
        if next(written) == 200:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _job.run(job, tmp_path / "out", report=stop)
    assert not (tmp_path / "out").exists()
    job = _table.make_job("to-4bit", source, Options(format="int4", max_shard_size="20kB"))
    assert 0 < len(_job.finished_shards(job, tmp_path / "out")) < len(job.shards)
    _job.run(job, tmp_path / "out")
    found = tensors_of(tmp_path / "out")
    assert found.keys() == wanted.keys() and all(same_bits(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("kind", ["int4", "nf4"])
def test_errors_by_part(source, tmp_path, kind):
    """Those that the run states are those that ``error`` finds, and the definition's."""
    job = _table.make_job("to-4bit", source, Options(format=kind))
    _job.run(job, tmp_path / "out")
    stated, values = list(job.report()), values_of(source)
    found = weight_errors(Source(source), Source(tmp_path / "out")).relative()
    sums: dict[str, list[float]] = {}
    form = formats.by_name(kind)
    for name, spec in release_tensors(wide_config()).items():
        if spec.quantized:
            part, own = sums.setdefault(spec.part, [0.0, 0.0]), values[name]
            made = form.dequantize(*form.quantize(own), torch.float32) if form.fits(spec.shape) else own.bfloat16()
            part[0] += (made.double() - own.double()).square().sum().item()
            part[1] += own.double().square().sum().item()
    assert found.keys() == {*sums, "all"}
    for part, (off, own) in sums.items():
        assert found[part] == pytest.approx(math.sqrt(off / own), rel=1e-9)
        if kind == "int4" or part == "dense":  # of others some weights have no whole groups of 64, and stay
            assert any(line.startswith(part) and f"{found[part]:.4f}" in line for line in stated)
    assert 0.05 < found["all"] < 0.15


@pytest.mark.slow
def test_what_it_costs_the_tiny_checkpoint(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(dsm.tiny_checkpoint())
    read = [problem for family in FAMILIES for problem in held_out(family, 8)]
    text = tmp_path / "text.txt"
    text.write_text("".join(tokenizer.apply_chat_template(problem.messages, tokenize=False) for problem in read))
    same = logits_error(dsm.tiny_checkpoint(), dsm.tiny_checkpoint(), text.read_text())
    assert same.divergence == 0 and same.perplexity == same.perplexity_made < 3
    source = Path(dsm.tiny_checkpoint())
    make(source, tmp_path / "int4", format="int4")
    found = logits_error(source, tmp_path / "int4", text.read_text())
    assert found.tokens == same.tokens and found.perplexity == same.perplexity
    assert 0 < found.divergence < 1e-3 and abs(found.perplexity_made / found.perplexity - 1) < 0.01
    run = CliRunner().invoke(app, ["convert", "error", str(source), str(tmp_path / "int4"), "--text", str(text)])
    assert run.exit_code == 0, run.output
    assert f"{found.perplexity_made:.4f}" in run.output and "routed experts" in run.output


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--format", "int3"], "--format int3 is not known, wanted one of int4, mxfp4, nf4, fp4"),
        ([], "to-4bit wants --format"),
        (["--format", "fp8"], "--format fp8 is not known"),
        (["--format", "int4", "--keep", "router"], "--keep router is not known, wanted some of attention"),
        (["--format", "int4", "--keep", "attention,dense,shared,routed,mtp"], "no weight to quantise"),
        (["--format", "nf4", "--keep-fp8", "attention"], "--keep-fp8 attention goes with --format int4"),
        (["--format", "int4", "--keep", "mtp", "--keep-fp8", "mtp"], "--keep and --keep-fp8 both name mtp"),
        (["--format", "int4", "--dtype", "float32"], "has no use for --dtype"),
        (["--format", "int4", "--text", "x"], "has no use for --text"),
    ],
)
def test_options_are_named(source, tmp_path, options, said):
    run = CliRunner().invoke(app, ["convert", "to-4bit", str(source), str(tmp_path / "out"), *options])
    assert run.exit_code == 2 and said in " ".join(run.output.split())
    assert not (tmp_path / "out").exists()


def test_four_bits_are_not_quantised_again(source, tmp_path):
    make(source, tmp_path / "int4", format="int4")
    with pytest.raises(CheckpointError, match=r"weight_packed: found I32 .*, wanted .* in FP8, BF16, F16 or F32"):
        make(tmp_path / "int4", tmp_path / "again", format="mxfp4")


@pytest.mark.parametrize("kind", ["int4", "mxfp4", "nf4", "fp4"])
def test_saving_writes_the_same(tmp_path, kind):
    write_release(tmp_path / "release", wide_config())
    made = make(tmp_path / "release", tmp_path / "made", format=kind)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "release")
    model.save_pretrained(tmp_path / "saved", quantize=kind)
    saved = tensors_of(tmp_path / "saved")
    assert saved.keys() == made.keys() and all(same_bits(saved[name], made[name]) for name in made)
    one, two = (config_of(tmp_path / folder)["quantization_config"] for folder in ("made", "saved"))
    assert one == two


def test_compressed_tensors_reads_the_config():
    quantization = pytest.importorskip("compressed_tensors.quantization")
    int4, fp8 = (formats.by_name(name).quantization_config(["lm_head"]) for name in ("int4", "fp8_block"))
    found = quantization.QuantizationConfig.model_validate(with_group(int4, fp8, ["re:.*self_attn.*"]))
    first, second = found.config_groups.values()
    assert (first.format, first.weights.num_bits, first.weights.group_size) == ("pack-quantized", 4, 32)
    assert (second.format, second.weights.block_structure) == ("float-quantized", [128, 128])
    assert second.targets == ["re:.*self_attn.*"] and found.ignore == ["lm_head"]
