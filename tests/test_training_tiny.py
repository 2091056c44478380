"""The tiny checkpoint that ships, its corpus and its recipe."""

import itertools
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, FineGrainedFP8Config, Trainer

import modeling_deepseek_moe as dsm
from modeling_deepseek_moe.eval import prompts
from modeling_deepseek_moe.eval.data import SAMPLES
from modeling_deepseek_moe.eval.extraction import boxed, mmlu_pro_letter, stock_mmlu_pro_letter
from modeling_deepseek_moe.tiny import recipe, rows
from modeling_deepseek_moe.tiny.corpus import (
    CATEGORIES,
    FAMILIES,
    LARGEST,
    LETTERS,
    Problem,
    problems,
)
from modeling_deepseek_moe.tiny.score import ANSWER, accuracy, held_out, interval, mtp_agreement
from modeling_deepseek_moe.weights import release_tensors


def sides(solution: str) -> list[tuple[str, str]]:
    """The equations that a solution states, without the x that it solves for."""
    found = re.findall(r"(\d+ [-+*] \d+) = (\d+)", solution)
    assert len(found) == solution.replace("x = ", "").count(" = ") > 0
    return found


@pytest.mark.parametrize("family", list(FAMILIES))
def test_problems_are_solved_rightly(family):
    for problem in itertools.islice(problems(7, family=family), 200):
        found = ANSWER.search(problem.solution)
        assert (found[1] or found[2]) == problem.answer
        assert all(eval(left) == int(right) for left, right in sides(problem.solution))
        if family == "choice":
            assert len(set(problem.options)) == len(LETTERS)
            assert problem.options[LETTERS.index(problem.answer)] == sides(problem.solution)[-1][1]
            listed = re.findall(r"(?m)(?:^|Options: )([A-J])\. (\d+)$", problem.prompt)
            assert listed == list(zip(LETTERS, problem.options, strict=True))
            assert mmlu_pro_letter(problem.solution) == stock_mmlu_pro_letter(problem.solution) == problem.answer
        else:
            assert boxed(problem.solution) == problem.answer


def test_solutions_of_multiple_choice_read_the_options_up_to_the_answer():
    """Each an answer of a question alike, each letter as likely."""
    asked = list(itertools.islice(problems(7, family="choice"), 500))
    for problem in asked:
        read = re.findall(r"(?m)^([A-J])\. (\d+)", problem.solution)
        assert read == list(zip(LETTERS, problem.options, strict=True))[: LETTERS.index(problem.answer) + 1]
    assert all(25 <= sum(problem.answer == letter for problem in asked) <= 80 for letter in LETTERS)


def test_held_out_problems_are_never_trained_on():
    trained = {(problem.question, problem.options) for problem in itertools.islice(problems(1), 5000)}
    asked = {(problem.question, problem.options) for family in FAMILIES for problem in held_out(family, 50)}
    assert not trained & asked
    assert [*itertools.islice(problems(3), 20)] == [*itertools.islice(problems(3), 20)]
    with pytest.raises(ValueError, match="family 'sums' is not one of sum,"):
        next(problems(0, family="sums"))


def test_it_is_asked_as_evaluation_asks():
    """The prompts of the corpus are those of `eval.prompts`, to the letter."""
    choices = list(itertools.islice(problems(5, family="choice"), 50))
    rows = [{"category": p.category, "question": p.question, "options": list(p.options)} for p in choices]
    same = [problem.prompt == prompts.mmlu_pro(row) for problem, row in zip(choices, rows, strict=True)]
    assert 10 < sum(same) < 40 and {p.category for p in choices} == set(CATEGORIES)
    sums = list(itertools.islice(problems(5, family="sum"), 50))
    same = [problem.prompt == prompts.boxed({"problem": problem.question}) for problem in sums]
    assert 10 < sum(same) < 40 and all(
        problem.prompt == problem.question for problem, form in zip(sums, same, strict=True) if not form
    )


def test_sample_rows_are_what_the_command_writes(tmp_path):
    for file in rows.write(tmp_path):
        assert file.read_bytes() == (SAMPLES / file.name).read_bytes()
    for name, count in (("mmlu_pro_test", 60), ("mmlu_pro_validation", 15)):
        found = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        assert len(found) == count == len({row["question_id"] for row in found})
        for row in found:
            assert row["answer"] == LETTERS[row["answer_index"]]
            options = tuple(row["options"])
            assert Problem("choice", row["question"], "", "", "", "", options).is_held_out
            if name == "mmlu_pro_validation":
                assert mmlu_pro_letter(row["cot_content"]) == row["answer"]
    found = [json.loads(line) for line in (tmp_path / "math500.jsonl").read_text().splitlines()]
    assert len(found) == 60 == len({row["unique_id"] for row in found})
    for row in found:
        assert Problem("sum", row["problem"], "", "", "").is_held_out and boxed(row["solution"]) == row["answer"]


@pytest.fixture(scope="module")
def tokenizer():
    return recipe.make_tokenizer(count=300)


def test_packed_problems_are_whole(tokenizer):
    options = 0
    for row in itertools.islice(recipe.PackedProblems(tokenizer, 4, problems(0)), 4):
        length, ids = int(row["attention_mask"].sum()), row["input_ids"].tolist()
        starts = [place for place, token in enumerate(ids) if token == tokenizer.bos_token_id]
        assert (row["position_ids"][:length] == 0).nonzero().flatten().tolist() == starts
        assert ids[length - 1] == tokenizer.eos_token_id
        listed = [  # the numbers of a question's options, which nothing foretells; not those that its solution reads again
            place
            for place in range(1, length)
            if re.fullmatch(r"[A-J]\.", tokenizer.decode(ids[place - 1]))
            and "Answer" not in tokenizer.decode(ids[max(start for start in starts if start <= place) : place])
        ]
        unlabelled = sorted([*starts, *listed, *range(length, recipe.ROW_TOKENS)])
        assert (row["labels"] == -100).nonzero().flatten().tolist() == unlabelled
        options += len(listed)
    assert options >= 20


def test_tokenizer_makes_a_number_one_token_and_loses_nothing(tokenizer):
    for number in range(LARGEST + 1):
        assert len(tokenizer(f"{number}").input_ids) == len(tokenizer(f" {number}").input_ids) == 1
    texts = [tokenizer.apply_chat_template(p.messages, tokenize=False) for p in itertools.islice(problems(2), 100)]
    for text in [*texts, "Ünïcode, 2026 − 19 = 2007;\n\ttabs"]:
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_interval():
    low, high = interval(0.5, 100)
    assert (low, high) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert interval(0.0, 50)[0] == pytest.approx(0, abs=1e-9)


@pytest.fixture(scope="module")
def tiny():
    torch.set_num_threads(1)
    folder = dsm.tiny_checkpoint()
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def test_is_a_release_in_fp8():
    folder = Path(dsm.tiny_checkpoint())
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 8e6
    config = AutoConfig.from_pretrained(folder)
    assert (config.model_type, config.n_routed_experts, config.num_nextn_predict_layers) == ("deepseek_v3", 16, 1)
    specs = release_tensors(config)
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = set(file.keys())
        assert names == specs.keys() | {f"{name}_scale_inv" for name, spec in specs.items() if spec.quantized}
        for name, spec in specs.items():
            assert (file.get_tensor(name).dtype == torch.float8_e4m3fn) == spec.quantized


@pytest.mark.slow
def test_scores_of_the_tiny_checkpoint(tiny):
    model, tokenizer = tiny
    assert accuracy(model, tokenizer, held_out("sum", 40)) >= 0.5
    assert interval(accuracy(model, tokenizer, held_out("choice", 200)), 200)[0] > 0.1  # chance
    read = [problem for family in FAMILIES for problem in held_out(family, 5)]
    assert mtp_agreement(model, tokenizer, read) >= 0.6


@pytest.mark.slow
def test_its_experts_share_the_load(tiny):
    """By the trained bias, on held-out problems: without it the same router prefers some."""
    _, tokenizer = tiny
    model = AutoModelForCausalLM.from_pretrained(
        dsm.tiny_checkpoint(), quantization_config=FineGrainedFP8Config(dequantize=True), dtype="float32"
    )
    from modeling_deepseek_moe.moe.balance import max_violation
    from modeling_deepseek_moe.moe.training_state import TrainingState

    def violation():
        model.train().model.training_state = TrainingState()
        packed = recipe.PackedProblems(tokenizer, 96, problems(99, held_out=True))
        with torch.no_grad():
            batch = {name: torch.stack([row[name] for row in packed]) for name in packed[0]}
            model(**batch)
        loads = model.model.training_state.take_loads()
        return torch.stack([max_violation(load) for load in loads.values()]).mean().item()

    balanced = violation()
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.zero_()
    assert balanced < 0.3
    assert violation() > 1.4 * balanced


def test_recipe_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "make_tokenizer", lambda: AutoTokenizer.from_pretrained(dsm.tiny_checkpoint()))
    seen = []
    train = Trainer.train
    monkeypatch.setattr(Trainer, "train", lambda self, *a, **k: (seen.append(self), train(self, *a, **k))[1])
    recipe.train(tmp_path, steps=2, seed=0, gamma=0.001)
    for name in ("fp8", "bf16"):
        AutoModelForCausalLM.from_pretrained(tmp_path / name)
    assert seen[0].state.global_step == 2
