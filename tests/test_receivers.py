"""Folders saved here, tensor by tensor in the parameters of the engines that serve them: each is read, and none is missing."""

import re
from functools import cache
from pathlib import Path

import pytest
import torch
from receivers import ktransformers, llamacpp, loaders, sglang, vllm
from receivers.table import Folder, missing
from releases import SHAPES, write_release
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, FineGrainedFP8Config
from typer.testing import CliRunner

import modeling_deepseek_moe as dsm
from modeling_deepseek_moe.cli.app import app
from modeling_deepseek_moe.mtp import share_mtp_weights

ENGINES = {"vllm": vllm, "sglang": sglang, "llama.cpp": llamacpp, "ktransformers": ktransformers}
# Left unread by design, of the MTP layer: SGLang drafts with the model's embedding and head; a GGUF has no MTP layers.
COPIES = r"model\.layers\.5\.(embed_tokens|shared_head\.head)\.weight"
UNREAD = {"vllm": r"(?!)", "sglang": COPIES, "llama.cpp": r"model\.layers\.5\..*", "ktransformers": COPIES}
RUNS = {"vllm": ("vllm", loaders.load_by_vllm), "sglang": ("sglang", loaders.load_by_sglang)}
RUNS["ktransformers"] = ("kt_kernel", loaders.load_by_ktransformers)


def load(folder=None, **settings):
    return AutoModelForCausalLM.from_pretrained(folder or dsm.tiny_checkpoint(), **settings)


def wide(dtype=torch.float32):
    return load(quantization_config=FineGrainedFP8Config(dequantize=True), dtype=dtype)


def trained(folder: Path) -> None:
    """A step of AdamW on all weights, MTP layers too; then FP8 again, where nothing changed the release's own."""
    model = wide().train()
    share_mtp_weights(model)  # as the MTP loss does: one embedding, and one head
    ids = torch.arange(3, 35)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    torch.optim.AdamW(model.parameters(), 1e-3).step()
    model.to(torch.bfloat16).save_pretrained(folder, quantize="fp8", like=dsm.tiny_checkpoint())


def merged(folder: Path) -> None:
    """An adapter on attention and experts, merged into the FP8 folder."""
    peft = pytest.importorskip("peft")
    settings = {"target_modules": ["q_b_proj", "o_proj"], "target_parameters": ["mlp.experts.down_proj"]}
    adapter = folder.parent / "adapter"
    peft.get_peft_model(load(), peft.LoraConfig(r=2, init_lora_weights=False, **settings)).save_pretrained(adapter)
    convert("merge-adapter", dsm.tiny_checkpoint(), folder, "--adapter", adapter)


def convert(*arguments) -> None:
    result = CliRunner().invoke(app, ["convert", *map(str, arguments)])
    assert result.exit_code == 0, result.output


def v2_lite(folder: Path) -> None:
    write_release(folder / "release", SHAPES["v2-lite"]())
    load(folder / "release").save_pretrained(folder)


def int4_attention_wide(folder: Path) -> None:
    """As Moonshot releases INT4: experts alone in codes."""
    convert("to-4bit", dsm.tiny_checkpoint(), folder, "--format", "int4", "--keep", "attention,dense,shared,mtp")


def nf4(folder: Path) -> None:
    pytest.importorskip("bitsandbytes")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    load(quantization_config=config, dtype=torch.bfloat16).save_pretrained(folder)


FOLDERS = {
    "fp8": lambda folder: load().save_pretrained(folder),
    "bf16": lambda folder: wide(torch.bfloat16).save_pretrained(folder),
    "shards": lambda folder: load().save_pretrained(folder, max_shard_size="1MB"),
    "trained": trained,
    "merged": merged,
    "v2-lite": v2_lite,
    "int4": lambda folder: wide(torch.bfloat16).save_pretrained(folder, quantize="int4"),
    "int4-experts": int4_attention_wide,
    "nf4": nf4,
    "mxfp4": lambda folder: wide(torch.bfloat16).save_pretrained(folder, quantize="mxfp4"),
}
# What an engine does not take, and why: docs/serving.md says so too.
REFUSED = {(engine, name): "no such method" for engine in ENGINES for name in ("nf4", "mxfp4")}
# The shapes of both halves of the query's and key-value latents, concatenated, are no shape.
REFUSED |= {("sglang", "int4"): r"fused_qkv_a_proj_with_mqa.weight_shape", ("ktransformers", "int4"): r"weight_shape"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders by name, each written once."""
    parent = tmp_path_factory.mktemp("saved")

    @cache
    def of(name: str) -> Folder:
        FOLDERS[name](parent / name)
        return Folder(parent / name)

    return of


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("engine", ENGINES)
def test_every_tensor_is_read_and_none_is_missing(engine, name, saved):
    folder, table = saved(name), ENGINES[engine]
    assert set(folder.fields["architectures"]) <= table.ARCHITECTURES
    why = REFUSED.get((engine, name))
    if why == "no such method":
        assert folder.quantization["quant_method"] not in table.METHODS
        return
    assert not folder.quantization or folder.quantization["quant_method"] in table.METHODS
    parameters = table.models(folder)
    if why:
        with pytest.raises(AssertionError, match=why):
            table.load(folder, parameters)
        return
    unread = table.load(folder, parameters)
    assert [name for name in unread if not re.fullmatch(UNREAD[engine], name)] == []
    assert [place for model in parameters for place in missing(model)] == []


@pytest.mark.parametrize("name", [name for name in FOLDERS if name not in ("nf4", "mxfp4")])
@pytest.mark.parametrize("engine", RUNS)
def test_the_engines_own_loader_does_the_same(engine, name, saved):
    package, run = RUNS[engine]
    root = loaders.source_of(package)
    if root is None:
        pytest.skip(f"{package} is not installed: RECEIVERS=/folder with its unpacked wheel, or pip install {package}")
    folder, table = saved(name), ENGINES[engine]
    parameters, ours = table.models(folder), table.models(folder)
    if engine == "ktransformers":  # the rest is SGLang's
        run(root, folder, parameters)
        parameters = parameters[:1]
    elif (engine, name) in REFUSED:
        with pytest.raises(AssertionError, match=REFUSED[engine, name]):
            run(root, folder, parameters)
        return
    else:
        run(root, folder, parameters)
    assert [place for model in parameters for place in missing(model)] == []
    assert [list(model) for model in parameters] == [list(model) for model in ours[: len(parameters)]]


def test_a_tensor_too_few_or_of_another_shape_is_noticed(saved, tmp_path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(saved("fp8").path / "model.safetensors")
    (tmp_path / "config.json").write_text((saved("fp8").path / "config.json").read_text())
    gone = "model.layers.3.mlp.experts.7.up_proj.weight_scale_inv"
    for engine, table in ENGINES.items():
        save_file({name: tensor for name, tensor in tensors.items() if name != gone}, tmp_path / "model.safetensors")
        parameters = table.models(Folder(tmp_path))
        table.load(Folder(tmp_path), parameters)
        assert len([place for model in parameters for place in missing(model)]) == 1, engine
        save_file(tensors | {gone: tensors[gone][:, :0]}, tmp_path / "model.safetensors")
        with pytest.raises(AssertionError, match="wanted"):
            table.load(Folder(tmp_path), table.models(Folder(tmp_path)))
