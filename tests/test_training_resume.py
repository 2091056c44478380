"""``deepseek-moe train``: evaluations that count labels, the checkpoint to go on from, a report of a run with no options of its own."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Trainer, TrainingArguments
from typer.testing import CliRunner

import modeling_deepseek_moe as dsm
from modeling_deepseek_moe.cli import app
from modeling_deepseek_moe.cli._train_data import Collator, Rows, pack
from modeling_deepseek_moe.cli._train_options import checkpoint_to_resume

DOCS = Path(__file__).resolve().parents[1] / "docs" / "training.md"
TEXTS = [{"text": f"Ada has {number} pens and buys {number} more."} for number in range(2, 12)]


@pytest.fixture(scope="module")
def model():
    dequantised = FineGrainedFP8Config(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(
        dsm.tiny_checkpoint(), quantization_config=dequantised, dtype="float32"
    )


@pytest.fixture(scope="module")
def documents():
    """Of unlike lengths, and unlike shares of them learned."""
    draw = torch.Generator().manual_seed(0)
    found = []
    for length in (5, 9, 17, 3, 30, 12, 7):
        ids = torch.randint(5, 600, (length,), generator=draw).tolist()
        found.append({"input_ids": ids, "labels": [-100] * (length // 3) + ids[length // 3 :]})
    return found


@pytest.fixture(scope="module")
def mean_over_labels(model, documents):
    losses = []
    for document in documents:
        with torch.no_grad():
            logits = model.eval()(torch.tensor([document["input_ids"]])).logits[0, :-1]
        labels = torch.tensor(document["labels"][1:])
        losses.append(torch.nn.functional.cross_entropy(logits, labels, reduction="none")[labels != -100])
    return torch.cat(losses).mean().item()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("batch", [1, 2, 3, 8])
def test_eval_loss_is_the_mean_over_labels(model, documents, mean_over_labels, tmp_path, batch, packed):
    rows = Rows(pack(documents, 32) if packed else [[document] for document in documents])
    arguments = TrainingArguments(
        str(tmp_path), per_device_eval_batch_size=batch, report_to=[], use_cpu=True, disable_tqdm=True
    )
    trainer = Trainer(model, arguments, eval_dataset=rows, data_collator=Collator(2, packed))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(mean_over_labels, rel=1e-5)


def test_weights_of_rows_do_not_touch_training(model, documents):
    """There the labels of all micro-batches are counted: each label weighs the same."""
    batch = Collator(2, False)([Rows([[document] for document in documents])[index] for index in range(3)])
    model.train()
    with torch.no_grad():
        weighted = model(**batch).loss
        batch.pop("row_weights")
        assert torch.equal(weighted, model(**batch).loss)


def run(folder, *flags, check=True):
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in TEXTS))
    settings = {"model": dsm.tiny_checkpoint(), "train_file": folder / "rows.jsonl", "output_dir": folder / "out"}
    settings |= {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "max_length": 64}
    options = [str(text) for name, value in settings.items() for text in (f"--{name}", value)]
    result = CliRunner().invoke(app, ["train", *options, *map(str, flags)])
    assert not check or result.exit_code == 0, result.output
    return result


def history(folder):
    return json.loads((folder / "out" / "trainer_state.json").read_text())["log_history"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoints 1 and 2 of two steps."""
    folder = tmp_path_factory.mktemp("saved")
    run(folder, "--max_steps", 2, "--save_strategy", "steps", "--save_steps", 1)
    return folder


@pytest.fixture
def again(saved, tmp_path):
    shutil.copytree(saved / "out", tmp_path / "out")
    return tmp_path


def wanted_from(folder, choice):
    return checkpoint_to_resume(TrainingArguments(str(folder / "out"), resume_from_checkpoint=choice, report_to=[]))


def test_the_newest_checkpoint_is_the_one_of_most_steps(again):
    shutil.copytree(again / "out" / "checkpoint-2", again / "out" / "checkpoint-10")
    (again / "out" / "checkpoint-best").mkdir()
    for choice in ("true", "True", True):
        assert wanted_from(again, choice) == str(again / "out" / "checkpoint-10")
    for choice in (None, "false", "False", False):
        assert wanted_from(again, choice) is None
    assert wanted_from(again, str(again / "out" / "checkpoint-1")) == str(again / "out" / "checkpoint-1")


def test_true_resumes_the_newest(again):
    run(again, "--max_steps", 4, "--resume_from_checkpoint", "true")
    steps = [entry["step"] for entry in history(again) if "loss" in entry]
    assert steps == [1, 2, 4]  # the first and the last of each run, and nothing twice
    loads = [json.loads(line)["step"] for line in (again / "out" / "expert_load.jsonl").read_text().splitlines()]
    assert loads == steps


def cut(file, size=100):
    file.write_bytes(file.read_bytes()[:size])


@pytest.mark.parametrize(
    "damage, fault",
    [
        (lambda folder: (folder / "trainer_state.json").unlink(), r"trainer_state.json: found no such file"),
        (lambda folder: cut(folder / "trainer_state.json"), r"trainer_state.json: found a file that is not JSON"),
        (lambda folder: cut(folder / "model.safetensors"), "model.safetensors"),
        (lambda folder: (folder / "model.safetensors").unlink(), "safetensors"),
        (lambda folder: cut(folder / "optimizer.pt"), "optimizer.pt damaged or cut short"),
    ],
    ids=["no-state", "cut-state", "cut-weights", "no-weights", "cut-moments"],
)
def test_a_broken_newest_checkpoint_is_named(again, damage, fault):
    damage(again / "out" / "checkpoint-2")
    message = rf"checkpoint-2: found .*{fault}.*wanted a whole checkpoint.*checkpoint-1 is whole"
    with pytest.raises(ValueError, match=message):
        wanted_from(again, "true")
    result = run(again, "--resume_from_checkpoint", "true", check=False)
    assert result.exit_code == 2 and "checkpoint-2" in result.output


def test_nothing_to_resume_from_is_said(tmp_path):
    with pytest.raises(ValueError, match="found no checkpoint-N, wanted one to resume from"):
        wanted_from(tmp_path, "true")
    with pytest.raises(ValueError, match="nowhere: found no such folder, wanted a whole checkpoint"):
        wanted_from(tmp_path, str(tmp_path / "nowhere"))


def test_a_short_run_without_options_can_be_reported(tmp_path):
    run(tmp_path, "--max_steps", 3, "--eval_file", tmp_path / "rows.jsonl")
    assert [entry["step"] for entry in history(tmp_path) if "lm_loss" in entry] == [1, 3]
    result = CliRunner().invoke(app, ["report", str(tmp_path / "out"), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["step"] == 3


@pytest.mark.pages
def test_the_recipe_of_the_docs_runs_as_printed(tmp_path, monkeypatch):
    """Its files by its commands, in order, in an empty folder."""
    text = DOCS.read_text(encoding="utf-8")
    section = text[text.index("## From the command line") :]
    python, recipe = (re.search(rf"```{kind}\n(.*?)```", section, re.DOTALL)[1] for kind in ("python", "yaml"))
    monkeypatch.chdir(tmp_path)
    exec(python, {})
    Path("recipe.yaml").write_text(recipe, encoding="utf-8")
    result = CliRunner().invoke(app, ["train", "recipe.yaml", "--use_cpu", "true", "--report_to", "none"])
    assert result.exit_code == 0, result.output
    assert "eval loss" in result.output
    result = CliRunner().invoke(app, ["report", "runs/sft"])
    assert result.exit_code == 0, result.output
