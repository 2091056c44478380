"""``deepseek-moe train --lora`` and ``--qlora``: an adapter on each kind of base, resumed, used by the other commands and merged."""

import itertools
import json
import re

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, FineGrainedFP8Config
from typer.testing import CliRunner

import modeling_deepseek_moe as dsm
from modeling_deepseek_moe.cli import _model, app
from modeling_deepseek_moe.cli._train_lora import PARTS, LoraOptions, check_rank, find_targets
from modeling_deepseek_moe.cli._train_run import read_options
from modeling_deepseek_moe.tiny.corpus import problems

peft = pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")
IDS = torch.arange(10, 42)[None]
BASES = {
    "bf16": ("bf16", ["--lora"]),
    "fp8": ("fp8", ["--lora"]),
    "nf4": ("bf16", ["--qlora"]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tiny checkpoint as it is and in bf16, and chats that it was not taught."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("lora")
    (root / "fp8").symlink_to(dsm.tiny_checkpoint())
    dequantize = FineGrainedFP8Config(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(root / "fp8", quantization_config=dequantize, dtype=torch.bfloat16)
    model.save_pretrained(root / "bf16")
    AutoTokenizer.from_pretrained(root / "fp8").save_pretrained(root / "bf16")
    rows = [
        {"messages": [problem.messages[0], {"role": "assistant", "content": f"It is {len(problem.question)}."}]}
        for problem in itertools.islice(problems(0, family="sum"), 32)
    ]
    (root / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def train(folder, base, out, *flags):
    settings = {
        "model": folder / base,
        "train_file": folder / "chat.jsonl",
        "output_dir": folder / out,
        "max_length": 128,
        "packing": True,
        "max_steps": 8,
        "learning_rate": 5e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_steps": 4,
        "per_device_train_batch_size": 2,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    }
    options = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    return CliRunner().invoke(app, ["train", *options, *map(str, flags)])


def losses(out):
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def tensors(file):
    with safe_open(file, "pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118


@pytest.fixture(scope="module")
def trained(folder):
    """Each base's adapter, by its name."""

    def run(name):
        base, flags = BASES[name]
        if not (folder / f"{name}-adapter").exists():
            result = train(folder, base, f"{name}-adapter", *flags)
            assert result.exit_code == 0, result.output
            assert "(an adapter)" in result.output
        return folder / base, folder / f"{name}-adapter"

    return run


@pytest.mark.parametrize("name", BASES)
def test_an_adapter_is_trained_saved_and_used(trained, name):
    base, adapter = trained(name)
    found = losses(adapter)
    assert len(found) == 8 and found[-1] < 0.6 * found[0]
    assert not list(adapter.glob("model*.safetensors"))
    written = tensors(adapter / "adapter_model.safetensors")
    assert written and all(".lora_" in key and key.startswith("base_model.model.") for key in written)
    assert all(tensor.abs().sum() > 0 for tensor in written.values())
    assert not any(".mlp.gate." in key or ".layers.5." in key for key in written)  # routers, MTP

    how = {"dtype": _model.Dtype.FLOAT32, "attention": None, "device": "cpu", "dequantize": False}
    used = _model.load_model(base, **how, adapter=adapter)
    theirs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, num_nextn_predict_layers=0)
    plain = theirs(IDS).logits
    theirs = peft.PeftModel.from_pretrained(theirs, adapter).eval()
    with torch.no_grad():
        torch.testing.assert_close(used(IDS).logits, theirs(IDS).logits, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(used(IDS).logits, plain, atol=0.1)


@pytest.mark.parametrize("name", BASES)
def test_resumed_training_goes_on_exactly(folder, trained, name):
    (base, adapter), flags = trained(name), BASES[name][1]
    again = train(folder, base.name, f"{name}-again", *flags, "--resume_from_checkpoint", adapter / "checkpoint-4")
    assert again.exit_code == 0, again.output
    assert losses(folder / f"{name}-again") == losses(adapter)
    before, after = (tensors(out / "adapter_model.safetensors") for out in (adapter, folder / f"{name}-again"))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_the_adapter_is_merged(trained, folder):
    base, adapter = trained("bf16")
    command = ["convert", "merge-adapter", str(base), str(folder / "merged"), "--adapter", str(adapter)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    how = {"dtype": _model.Dtype.FLOAT32, "attention": None, "device": "cpu", "dequantize": False}
    with torch.no_grad():
        merged = _model.load_model(folder / "merged", **how)(IDS).logits
        used = _model.load_model(base, **how, adapter=adapter)(IDS).logits
    assert (merged - used).norm() < 0.02 * used.norm()  # bf16's rounding of the merged weights


@pytest.mark.slow
def test_checkpointing_and_optimizers_of_8_bits(folder):
    result = train(
        folder, "bf16", "paged", "--qlora", "--optim", "paged_adamw_8bit", "--gradient_checkpointing", "true"
    )
    assert result.exit_code == 0, result.output
    assert "optim=paged_adamw_8bit: its states are not paged on a CPU" in result.output
    found = losses(folder / "paged")
    assert found[-1] < 0.6 * found[0]
    state = torch.load(folder / "paged" / "checkpoint-8" / "optimizer.pt", weights_only=False)["state"]
    dtypes = {leaf.dtype for leaf in torch.utils._pytree.tree_leaves(state) if torch.is_tensor(leaf)}
    assert torch.uint8 in dtypes  # those of matrices of 4,096 values and more


@pytest.mark.parametrize(
    ("flags", "file", "words"),
    [
        (["--lora"], "model.safetensors", "found no adapter_model.safetensors"),
        ([], "adapter_model.safetensors", "found it damaged or cut short"),
    ],
)
def test_a_checkpoint_of_the_other_kind_is_no_place_to_resume_from(folder, tmp_path, flags, file, words):
    (tmp_path / file).write_bytes(b"")
    (tmp_path / "trainer_state.json").write_text('{"global_step": 4}')
    result = train(folder, "bf16", "none", *flags, "--resume_from_checkpoint", tmp_path)
    assert result.exit_code == 2 and words in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--lora", "--qlora"], "found lora and qlora, wanted one"),
        (["--lora_rank", "8"], "found lora_rank without lora or qlora"),
        (["--lora", "--lora_rank", "0"], "lora_rank=0 must be at least 1"),
        (["--lora", "--lora_alpha", "0"], "lora_alpha=0.0 must be above 0"),
        (["--lora", "--lora_dropout", "1"], "lora_dropout=1.0 must be at least 0 and below 1"),
        (
            ["--lora", "--lora_targets", "router"],
            "lora_targets: found router, wanted all, parts (attention, dense, shared, experts)",
        ),
        (["--lora", "--lora_targets", ","], "lora_targets: found none"),
        (["--lora", "--fp8"], "found lora and fp8, wanted one"),
        (["--qlora", "--load_balance_gamma", "0.001"], "biases of routers are no part of an adapter"),
    ],
)
def test_options_that_cannot_be_meant(flags, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        read_options(None, ["--model", "a", "--train_file", "b", *flags])


@pytest.mark.parametrize("flags", [["--lora"], ["--qlora", "--lora_targets", "attention, experts"]])
def test_a_rank_above_the_experts_is_refused_before_anything_is_loaded(folder, tmp_path, flags):
    config = AutoConfig.from_pretrained(folder / "fp8")
    config.save_pretrained(tmp_path)  # and no weights
    most = min(config.hidden_size, config.moe_intermediate_size)
    options = [
        "--model",
        tmp_path,
        "--train_file",
        folder / "chat.jsonl",
        "--use_cpu",
        "true",
        "--lora_rank",
        most + 1,
    ]
    result = CliRunner().invoke(app, ["train", *map(str, options), *flags])
    assert result.exit_code == 2
    assert f"lora_rank: found {most + 1}, wanted at most {most}" in " ".join(result.output.split())
    check_rank(LoraOptions(lora=True, lora_rank=most), config)
    check_rank(LoraOptions(lora=True, lora_rank=most + 1, lora_targets="attention,shared"), config)


def test_an_adapter_needs_a_model():
    with pytest.raises(ValueError, match="found lora and config, wanted a model"):
        read_options(None, ["--config", "a", "--tokenizer", "t", "--train_file", "b", "--lora"])


def test_defaults_of_an_adapter_and_of_a_model():
    options = [read_options(None, ["--model", "a", "--train_file", "b", *flags])[0] for flags in ([], ["--lora"])]
    names = ("dtype", "load_balance_gamma", "balance_alpha", "mtp_weight")
    assert [tuple(getattr(one, name) for name in names) for one in options] == [
        ("float32", 0.001, 0.0001, 0.3),
        ("bfloat16", 0.0, 0.0, 0.0),
    ]
    assert (options[1].rank, options[1].alpha) == (16, 32)


def test_targets_are_parts_or_names(folder):
    model = AutoModelForCausalLM.from_pretrained(folder / "bf16")
    modules, parameters = find_targets(model, "all")
    assert parameters == sorted(PARTS["experts"])
    assert {"kv_b_proj", "mlp.gate_proj", "shared_experts.down_proj"} <= set(modules)
    assert find_targets(model, "attention, experts")[0] == sorted(
        name for name in PARTS["attention"] if name != "q_proj"
    )
    assert find_targets(model, "o_proj") == (["o_proj"], [])
    with pytest.raises(ValueError, match="found q_proj, of which the model has no layer"):
        find_targets(model, "q_proj")


def test_an_adapter_that_is_none(folder):
    for name, found in (("nowhere", "no such folder"), ("bf16", r"no adapter_config\.json")):
        result = CliRunner().invoke(app, ["generate", "-m", str(folder / "fp8"), "--adapter", str(folder / name)])
        assert result.exit_code == 2 and found.replace("\\", "") in " ".join(result.output.split())


def test_an_evaluation_tells_adapters_apart(folder, trained):
    from modeling_deepseek_moe.eval.identity import model_facts

    base, adapter = trained("bf16")
    how = {"dtype": _model.Dtype.FLOAT32, "attention": None, "device": "cpu", "dequantize": False}
    model = _model.load_model(base, **how, adapter=adapter)
    first = model_facts(model, base, "a")
    assert first["adapters"] == model_facts(model, base, "a")["adapters"] and list(first["adapters"]) == ["default"]
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora_B" in name)[0, 0] += 1
    assert model_facts(model, base, "a")["adapters"] != first["adapters"]
    assert "adapters" not in model_facts(_model.load_model(base, **how), base, "a")
