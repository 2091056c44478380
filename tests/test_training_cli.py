"""``deepseek-moe train`` and ``report``: options, data, a run from an FP8 release to an FP8 release, and its drawing."""

import itertools
import json
import re
import sys

import pytest
import torch
from releases import SHAPES, same_bits, write_release
from safetensors import safe_open
from transformers import AutoModelForCausalLM, Trainer
from typer.testing import CliRunner

from modeling_deepseek_moe.cli import app
from modeling_deepseek_moe.cli._train_data import Collator, Rows, load_documents, pack
from modeling_deepseek_moe.cli._train_run import read_options
from modeling_deepseek_moe.tiny.corpus import problems
from modeling_deepseek_moe.tiny.recipe import make_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(count=300)


def write_lines(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def chat(count=24):
    return [{"messages": problem.messages} for problem in itertools.islice(problems(0), count)]


def test_only_the_assistant_is_learned(tokenizer, tmp_path):
    documents = load_documents(write_lines(tmp_path / "chat.jsonl", chat()), tokenizer, 512, True)
    for document, row in zip(documents, chat(), strict=True):
        learned = [token for token in document["labels"] if token != -100]
        assert tokenizer.decode(learned) == f" {row['messages'][1]['content']}<eos>"
        assert tokenizer.decode(document["input_ids"]).startswith("<bos>Question: ")
    everything = load_documents(str(tmp_path / "chat.jsonl"), tokenizer, 512, False)
    assert all(document["labels"] == document["input_ids"] for document in everything)


def test_text_and_tokens(tokenizer, tmp_path):
    documents = load_documents(write_lines(tmp_path / "a.jsonl", [{"text": "Ada has 3 pens."}]), tokenizer, 512, True)
    assert tokenizer.decode(documents[0]["input_ids"]) == "Ada has 3 pens.<eos>"
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, -100, 7]}, {"input_ids": [9], "labels": [9]}]
    assert load_documents(write_lines(tmp_path / "b.jsonl", rows), tokenizer, 512, True) == [rows[0]]


def test_packed_rows():
    documents = [{"input_ids": list(range(n)), "labels": list(range(n))} for n in (3, 4, 2, 6, 9)]
    rows = pack(documents, 8)
    assert [[len(document["input_ids"]) for document in row] for row in rows] == [[3, 4], [2, 6], [9]]
    row = Rows(rows)[0]
    assert row["position_ids"] == [0, 1, 2, 0, 1, 2, 3]
    assert row["labels"] == [-100, 1, 2, -100, 1, 2, 3]
    batch = Collator(7, packed=True)([Rows(rows)[0], Rows(rows)[2]])
    assert batch["attention_mask"].tolist() == [[1] * 7 + [0] * 2, [1] * 9]
    assert batch["input_ids"][0, 7:].tolist() == [7, 7]
    assert batch["labels"][0, 7:].tolist() == [-100, -100]
    assert "position_ids" not in Collator(7, packed=False)([Rows(rows)[0]])


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.csv", "", "found .csv, wanted one of .jsonl"),
        ("a.jsonl", '{"prompt": "x"}\n', r"found columns \['prompt'\], wanted one of messages"),
        ("a.jsonl", '{"input_ids": [1, 2], "labels": [-100, -100]}\n', "no token to learn"),
    ],
)
def test_data_that_cannot_be_used(tokenizer, tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        load_documents(str(tmp_path / name), tokenizer, 64, True)


def test_a_chat_template_without_marks_learns_the_same(tokenizer, tmp_path):
    plain = make_tokenizer(count=300)
    plain.chat_template = plain.chat_template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    file = write_lines(tmp_path / "chat.jsonl", chat(2))
    assert load_documents(file, plain, 512, True) == load_documents(file, tokenizer, 512, True)
    assert load_documents(file, plain, 512, False) == load_documents(file, tokenizer, 512, False)


def test_flags_win_over_the_file(tmp_path):
    (tmp_path / "r.yaml").write_text(f"model: here\ntrain_file: a\nlearning_rate: 1e-4\noutput_dir: {tmp_path}\n")
    options, training = read_options(tmp_path / "r.yaml", ["--learning_rate", "3e-4", "--fp8", "true"])
    assert (options.model, options.fp8, training.learning_rate) == ("here", True, 3e-4)
    assert read_options(tmp_path / "r.yaml", [])[1].learning_rate == 1e-4


@pytest.mark.parametrize(
    "yaml, flags, message",
    [
        ("model: a\ntrain_file: b\nlerning_rate: 1\n", [], "found lerning_rate, wanted options"),
        ("model: a\ntrain_file: b\n", ["--lerning_rate", "1"], "found --lerning_rate 1, wanted options"),
        ("- a\n", [], "found list, wanted options by name"),
        ("train_file: b\n", [], "found neither of model and config"),
        ("model: a\n", [], "found no train_file"),
        ("config: a\ntrain_file: b\n", [], "found a config without a tokenizer"),
        ("model: a\ntrain_file: b\ndtype: int8\n", [], "dtype='int8' is not supported"),
        ("model: a\ntrain_file: b\nmax_length: 1\n", [], "max_length=1 is too short, wanted at least 2"),
        (
            "model: a\ntrain_file: b\nmax_length: 4.5\n",
            [],
            r"r.yaml: argument --max_length.*: invalid int value: '4.5'",
        ),
        ("model: a\ntrain_file: b\npacking: maybe\n", [], r"r.yaml: argument --packing: .*maybe"),
        ("model: a\ntrain_file: b\n", ["--max_steps", "x"], r"r.yaml and flags: argument --max_steps.*: invalid int"),
        ("model: [a\n", [], r"r.yaml: found no YAML \("),
    ],
)
def test_options_that_cannot_be_meant(tmp_path, yaml, flags, message):
    (tmp_path / "r.yaml").write_text(yaml)
    with pytest.raises(ValueError, match=message):
        read_options(tmp_path / "r.yaml", flags)


def test_a_recipe_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"no\.yaml: found no such file, wanted a YAML file of options"):
        read_options(tmp_path / "no.yaml", [])
    with pytest.raises(ValueError, match="found a folder, wanted a YAML file of options"):
        read_options(tmp_path, [])
    result = CliRunner().invoke(app, ["train", str(tmp_path / "no.yaml")])
    assert result.exit_code == 2
    assert "no.yaml: found no such file" in "".join(result.output.split("\n"))


def test_null_in_a_recipe_is_the_default(tmp_path):
    (tmp_path / "r.yaml").write_text("model: a\ntrain_file: b\nmax_length:\neval_file:\nreport_to: [none]\n")
    options, training = read_options(tmp_path / "r.yaml", [])
    assert (options.max_length, options.eval_file, training.report_to) == (1024, None, [])
    assert (training.logging_steps, training.logging_first_step) == (10, True)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, tokenizer):
    """A router's tuning from an FP8 release: all other weights stay."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("cli")
    config = SHAPES["v3-mtp"]()
    config.vocab_size = len(tokenizer)
    write_release(folder / "release", config, fp8=True)
    tokenizer.save_pretrained(folder / "release")
    settings = {
        "model": str(folder / "release"),
        "train_file": write_lines(folder / "chat.jsonl", chat()),
        "eval_file": write_lines(folder / "eval.jsonl", chat(4)),
        "output_dir": str(folder / "out"),
        "packing": True,
        "max_length": 128,
        "max_steps": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    }
    (folder / "recipe.yaml").write_text("".join(f"{name}: {json.dumps(value)}\n" for name, value in settings.items()))
    return folder


def tensors(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def test_from_an_fp8_release_to_one(tuned):
    result = CliRunner().invoke(app, ["train", str(tuned / "recipe.yaml"), "--learning_rate", "1e-3"])
    assert result.exit_code == 0, result.output
    assert "FP8 release" in result.output
    before, after = tensors(tuned / "release"), tensors(tuned / "out")
    assert {name: (t.dtype, t.shape) for name, t in after.items()} == {
        name: (t.dtype, t.shape) for name, t in before.items()
    }
    moved = [name for name in before if not same_bits(before[name], after[name])]
    assert "model.layers.1.mlp.gate.weight" in moved
    history = json.loads((tuned / "out" / "trainer_state.json").read_text())["log_history"]
    assert len([entry for entry in history if "mtp_loss" in entry]) == 4
    AutoModelForCausalLM.from_pretrained(tuned / "out")


def test_untouched_tensors_keep_their_bytes(tuned):
    flags = {"learning_rate": 0, "mtp_weight": 0, "dtype": "bfloat16", "output_dir": tuned / "still"}
    flags = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    result = CliRunner().invoke(app, ["train", str(tuned / "recipe.yaml"), *flags])
    assert result.exit_code == 0, result.output
    before, after = tensors(tuned / "release"), tensors(tuned / "still")
    moved = {name for name in before if not same_bits(before[name], after[name])}
    assert moved == {f"model.layers.{layer}.mlp.gate.e_score_correction_bias" for layer in (1, 2)}


@pytest.mark.parametrize(
    "optim, dtype, moments",
    [
        pytest.param("adamw_bnb_8bit", "float32", {torch.uint8, torch.float32}, id="bitsandbytes-8bit"),
        pytest.param("adamw_torch", "bfloat16", {torch.bfloat16}, id="bf16-weights"),
        pytest.param("stable_adamw", "bfloat16", {torch.bfloat16}, id="optimi-kahan"),
    ],
)
def test_moments_of_low_precision(tuned, monkeypatch, optim, dtype, moments):
    """As docs/training.md says: 8 bits by bitsandbytes, small tensors in fp32; bf16 where the weights are."""
    pytest.importorskip({"adamw_bnb_8bit": "bitsandbytes", "stable_adamw": "optimi"}.get(optim, "torch"))
    seen = []
    train = Trainer.train
    monkeypatch.setattr(Trainer, "train", lambda self, *a, **k: (seen.append(self), train(self, *a, **k))[1])
    flags = {"optim": optim, "dtype": dtype, "learning_rate": 1e-3, "output_dir": tuned / optim}
    flags = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    result = CliRunner().invoke(app, ["train", str(tuned / "recipe.yaml"), *flags])
    assert result.exit_code == 0, result.output
    states = seen[0].optimizer.state.values()
    found = {
        state[name].dtype
        for state in states
        for name in ("exp_avg", "exp_avg_sq", "state1", "state2")
        if name in state
    }
    assert found == moments
    before, after = tensors(tuned / "release"), tensors(tuned / optim)
    assert not same_bits(before["model.layers.1.mlp.gate.weight"], after["model.layers.1.mlp.gate.weight"])
    AutoModelForCausalLM.from_pretrained(tuned / optim)


@pytest.mark.slow
def test_bf16_moments_beside_fp32_weights(tuned, monkeypatch):
    """AdamW's own steps but for the rounding of its moments, which resume as they were saved."""
    heavyball = pytest.importorskip("heavyball")
    seen = []
    train = Trainer.train
    monkeypatch.setattr(Trainer, "train", lambda self, *a, **k: (seen.append(self), train(self, *a, **k))[1])

    def run(name, **more):
        settings = {"learning_rate": 3e-3, "max_steps": 8, "lr_scheduler_type": "constant", "output_dir": tuned / name}
        flags = [text for flag, value in (settings | more).items() for text in (f"--{flag}", str(value))]
        result = CliRunner().invoke(app, ["train", str(tuned / "recipe.yaml"), *flags])
        assert result.exit_code == 0, result.output
        return [entry["lm_loss"] for entry in seen[-1].state.log_history if "lm_loss" in entry]

    found = run("bf16-moments", bf16_moments=True, save_strategy="steps", save_steps=4)
    assert found[-1] < found[0] - 0.5
    again = run("resumed", bf16_moments=True, resume_from_checkpoint=tuned / "bf16-moments" / "checkpoint-4")
    assert again == found
    for trainer in seen:
        optimizer = trainer.optimizer.optimizer  # inside accelerate's
        assert isinstance(optimizer, heavyball.AdamW)
        leaves = torch.utils._pytree.tree_leaves(optimizer.state_dict()["state"])
        assert {leaf.dtype for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.ndim} == {torch.bfloat16}
        assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    assert found == pytest.approx(run("fp32-moments"), rel=5e-3)


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "need heavyball: pip install heavyball"),
        (["--optim", "sgd"], "found optim='sgd', wanted 'adamw_torch'"),
    ],
)
def test_moments_that_cannot_be(tuned, monkeypatch, flags, message):
    monkeypatch.setitem(sys.modules, "heavyball", None)
    result = CliRunner().invoke(app, ["train", str(tuned / "recipe.yaml"), "--bf16_moments", "True", *flags])
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


def test_errors_are_one_line(tuned):
    result = CliRunner().invoke(app, ["train", str(tuned / "recipe.yaml"), "--dtype", "int8"])
    assert result.exit_code == 2
    assert "dtype='int8'" in result.output


def test_report_draws_the_run(tuned, tmp_path):
    if not (tuned / "out").exists():
        test_from_an_fp8_release_to_one(tuned)
    result = CliRunner().invoke(app, ["report", str(tuned / "out"), "--out", str(tmp_path), "--json"])
    assert result.exit_code == 0, result.output
    last = json.loads(result.stdout)
    assert last["step"] == 4
    assert {"max_vio", "lm_loss", "eval_loss"} <= last.keys()
    page = (tmp_path / "report.html").read_text()
    for section in ("losses", "balance", "course", "load"):
        assert f'<section id="{section}">' in page
    layers = json.loads((tuned / "out" / "expert_load.jsonl").read_text().splitlines()[0])["load"]
    assert page.count("data:image/png;base64,") == 1 + len(layers)
    assert not re.search(r"""(src|href)=["']?http""", page)
    numbers = json.loads((tmp_path / "report.json").read_text())
    assert numbers["last"] == last and numbers["history"][0]["step"] == 1


def test_heat_map_is_load_over_mean():
    from modeling_deepseek_moe.cli._report_draw import relative

    loads = [{"step": step, "load": {"1": [step, 3 * step]}} for step in range(1, 401)]
    values = relative(loads, "1")
    assert values.shape == (200, 2)
    assert values.tolist() == [[0.5, 1.5]] * 200


def test_report_of_no_training(tmp_path):
    result = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert result.exit_code == 2
    assert "found no trainer_state.json" in result.output
