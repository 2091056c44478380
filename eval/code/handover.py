"""Ask a model for programs or patches, keep what it wrote, and make an evaluation of it once somebody has judged.

``answers.jsonl`` holds a question a line with what the model wrote; ``asked.json`` the model and how it was asked. Own problems are
judged here, in the sandbox; Codeforces and SWE-bench by their own judges, whose verdicts come back in a file.
"""

import datetime
import json
import logging
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from modeling_deepseek_moe.chat_template import THINK, THINK_END, check_arguments, end_mark
from modeling_deepseek_moe.checkpoint.atomic import write_file
from modeling_deepseek_moe.checkpoint.journal import Journal, to_json
from modeling_deepseek_moe.eval.code import codeforces, livecodebench, swebench
from modeling_deepseek_moe.eval.code.livecodebench import LiveProblem
from modeling_deepseek_moe.eval.code.problems import PROMPT, Problem, Verdict, judge
from modeling_deepseek_moe.eval.data import SAMPLE
from modeling_deepseek_moe.eval.extraction import after_thinking
from modeling_deepseek_moe.eval.harness import generation_kwargs
from modeling_deepseek_moe.eval.identity import machine, model_facts, versions
from modeling_deepseek_moe.eval.results import (
    JOURNAL_FILE,
    Evaluation,
    Output,
    Question,
    TaskRun,
    write_evaluation,
)

ANSWERS, ASKED = "answers.jsonl", "asked.json"
ASSUMED = {"status": "assumed", "source": "no wording is documented"}


def read_prompts(file: Path, key: str, text: str, prompt: Callable[[str], str] = str) -> dict[str, str]:
    """Id -> prompt, of JSON lines with the fields ``key`` and ``text``.

    Raises:
        ValueError: a line lacks them, or an id comes twice; the message names it.
    """
    prompts = {}
    with Path(file).open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                name, words = row[key], row[text]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{file}:{number}: {error}; wanted JSON with {key!r} and {text!r}") from None
            for field, value in ((key, name), (text, words)):
                if not isinstance(value, str) or not value.strip():
                    raise ValueError(f"{file}:{number}: {field}: found {value!r:.80}, wanted text")
            if name in prompts:
                raise ValueError(f"{file}:{number}: {key}: found {name!r} twice, wanted each once")
            prompts[name] = prompt(words)
    if not prompts:
        raise ValueError(f"{file}: found no lines, wanted at least one with {key!r} and {text!r}")
    return prompts


def program_prompt(statement: str) -> str:
    return PROMPT + statement


def template_arguments(tokenizer, given: dict) -> dict:
    """``given``, which is for a chat template.

    Raises:
        ValueError: the template does not read them, or there is none.
    """
    if given and not tokenizer.chat_template:
        raise ValueError(f"{tokenizer.name_or_path}: found template arguments {sorted(given)} and no chat template")
    if given:
        check_arguments(tokenizer, given)
    return given


def said(answer: dict) -> str:
    """The text of an answer after its thinking; empty where that never ended."""
    text = answer["text"]
    return after_thinking(text) if end_mark(answer["prompt"]) == THINK or THINK_END in text else text


def ask(
    model,
    tokenizer,
    prompts: dict[str, str],
    out: Path,
    *,
    kind: str,
    folder: Path,
    label: str,
    settings: dict,
    **options,
) -> dict[str, dict]:
    """Id -> ``{"prompt", "text", "tokens", "truncated"}``; written to ``out`` too. Interrupted, the same call goes on.

    Args:
        settings: ``max_tokens``, ``temperature``, ``top_p``, and the chat template's ``template_args`` if there are some.
        options: of `DeepseekLM`.
    """
    from lm_eval.api.instance import Instance

    from modeling_deepseek_moe.eval.model import DeepseekLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    start, facts = time.perf_counter(), model_facts(model, folder, label)
    journal = Journal(out / JOURNAL_FILE, {"model": facts | {"path": None, "label": None}, "kind": kind})
    options["chat_template_args"] = settings.get("template_args", {})
    lm = DeepseekLM(model, tokenizer=tokenizer, journal=journal, **options)
    given = {**generation_kwargs(settings), "until": []}
    turns = {
        name: lm.apply_chat_template([{"role": "user", "content": prompt}]) if tokenizer.chat_template else prompt
        for name, prompt in prompts.items()
    }
    try:
        outputs = lm.outputs(
            [Instance("generate_until", {}, (turn, given), i) for i, turn in enumerate(turns.values())]
        )
    finally:
        journal.close()
    answers = {
        name: {"question": prompts[name], "prompt": turn, **output}
        for (name, turn), output in zip(turns.items(), outputs, strict=True)
    }
    asked = {"kind": kind, "model": facts, "settings": settings, "seconds": round(time.perf_counter() - start, 1)}
    lines = (to_json({"id": name, **answer}) + "\n" for name, answer in answers.items())
    write_file(out / ANSWERS, "".join(lines))
    write_file(out / ASKED, json.dumps(asked, indent=1) + "\n")
    return answers


def read_answers(out: Path, kind: str) -> tuple[dict, dict[str, dict]]:
    """What `ask` left.

    Raises:
        FileNotFoundError: nothing was asked there. ValueError: something else was.
    """
    if not (out / ASKED).is_file():
        raise FileNotFoundError(f"{out}: found no {ASKED}, wanted a folder in which a model was asked for {kind}")
    asked = json.loads((out / ASKED).read_text(encoding="utf-8"))
    if asked["kind"] != kind:
        raise ValueError(f"{out}: found answers to {asked['kind']}, wanted {kind}")
    with (out / ANSWERS).open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return asked, {row.pop("id"): row for row in rows}


def judge_programs(
    out: Path, problems: Iterable[Problem | LiveProblem], source: str, kind: str = "programs"
) -> Evaluation:
    """Run every program of the answers in ``out`` in the sandbox.

    Args:
        kind: "programs", or "livecodebench" for its problems.
        source: "sample", or the file of the problems.

    Raises:
        OSError: this machine has no sandbox.
    """
    asked, answers = read_answers(out, kind)
    verdicts = {problem.id: _judged(problem, said(answers[problem.id])) for problem in problems}
    judged = {name: (verdict.verdict, verdict.accepted) for name, verdict in verdicts.items()}
    return _write(out, asked, answers, judged, len(judged), source, {})


def _judged(problem: Problem | LiveProblem, text: str) -> Verdict:
    return livecodebench.judge(problem, text) if isinstance(problem, LiveProblem) else judge(problem, text)


def judge_codeforces(out: Path, judged: Path, table: Path | None) -> Evaluation:
    """Of the judge's verdicts: the rating and, with a table, the percentile. See `codeforces`."""
    asked, answers = read_answers(out, "codeforces")
    verdicts = codeforces.read_judged(judged)
    if unknown := sorted(verdicts.keys() - answers.keys()):
        raise ValueError(f"{judged}: found a verdict on {unknown[0]!r}, which was not asked in {out}")
    value = codeforces.rating(verdicts.values())
    figures = {"rating": round(value)} | (
        {"percentile": round(codeforces.percentile(value, table), 1)} if table else {}
    )
    told = {name: ("solved" if solved else "not solved", solved) for name, (_, solved) in verdicts.items()}
    return _write(out, asked, answers, told, len(told), str(judged), figures)


def judge_swebench(out: Path, report: Path) -> Evaluation:
    """Of the official harness' report: every instance that was asked, resolved or not."""
    asked, answers = read_answers(out, "swebench")
    resolved, total = swebench.read_report(report, answers)
    verdicts = {name: ("resolved" if name in resolved else "not resolved", name in resolved) for name in answers}
    return _write(out, asked, answers, verdicts, total, str(report), {})


def _write(
    out: Path, asked: dict, answers: dict, verdicts: dict[str, tuple[str, bool]], rows: int, source: str, figures: dict
) -> Evaluation:
    kind = asked["kind"]
    questions = []
    for name, (verdict, right) in verdicts.items():
        answer = answers[name]
        made = {field: answer[field] for field in ("text", "tokens", "truncated")}
        output = Output(**made, answer=None if verdict == "no program" else verdict, right=right)
        questions.append(
            Question(
                id=name, question=answer["question"], prompt=answer["prompt"], gold="", outputs=(output,), category=""
            )
        )
    data = {"source": SAMPLE if source == SAMPLE else "folder", "path": source, "revision": None, "sha256": None}
    task = TaskRun(task=kind, benchmark=kind, data=data, rows=rows, settings=asked["settings"], harness=figures)
    evaluation = Evaluation(
        model=asked["model"],
        suite=kind,
        protocol={"name": kind, "fields": {name: {"value": v} | ASSUMED for name, v in asked["settings"].items()}},
        tasks=(task,),
        versions=versions(),
        seeds={},
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        seconds=asked["seconds"],
        machine=machine(),
    )
    write_evaluation(out, evaluation, {kind: questions})
    return evaluation
