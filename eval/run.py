"""An evaluation from beginning to end: tasks of a suite, through lm-eval, to a folder of results."""

import datetime
import logging
import math
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval.evaluator import evaluate as run_harness
from lm_eval.tasks import TaskManager

from modeling_deepseek_moe.chat_template import THINK, THINK_END, check_arguments, prompt_end, taken_arguments
from modeling_deepseek_moe.checkpoint.journal import Journal
from modeling_deepseek_moe.eval.benchmarks import QUESTIONS, SCORERS, judge_repeat
from modeling_deepseek_moe.eval.data import HUB
from modeling_deepseek_moe.eval.harness import generation_kwargs
from modeling_deepseek_moe.eval.identity import machine, model_facts, versions
from modeling_deepseek_moe.eval.model import DeepseekLM
from modeling_deepseek_moe.eval.protocols import Protocol, protocol
from modeling_deepseek_moe.eval.results import JOURNAL_FILE, Evaluation, Output, Question, TaskRun, write_evaluation

TASKS = Path(__file__).parent / "tasks"
SEED = 1234


@dataclass(frozen=True, kw_only=True)
class Changes:
    """What departs from the protocol; None leaves a field as it is.

    ``template_args``: arguments of the chat template's own, besides those that the suite gives it.
    """

    shots: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    k: int | None = None
    template_args: dict | None = None

    def apply(self, fields: dict) -> tuple[dict, tuple[str, ...]]:
        """The settings, and what changed, in words. A field that a task does not have stays out of it."""
        settings, changed = dict(fields), []
        for name, value in vars(self).items():
            value = fields[name] | value if name == "template_args" and value is not None else value
            if value is not None and name in fields and value != fields[name]:
                settings[name] = value
                changed.append(f"{name} {value} instead of {fields[name]}")
        return settings, tuple(changed)


def evaluate(
    model,
    tokenizer,
    *,
    suite: str,
    benchmarks: list[str],
    out: Path,
    folder: Path | None = None,
    label: str = "",
    data: str = HUB,
    limit: int | None = None,
    changes: Changes = Changes(),
    batch_size: int | str = "auto",
    cache: str = "dynamic",
    seed: int = SEED,
    command: str = "",
) -> Evaluation:
    """Evaluate, and write ``evaluation.json`` and ``samples/`` into ``out``. Interrupted, the same call goes on.

    Args:
        model: of this package, ready to generate.
        folder: where it came from; without one no run is gone on with, since nothing tells two models apart.
        data: see `load_rows`.
        limit: the first ``limit`` questions of each task; raised later, only the new ones are asked.

    Raises:
        ValueError: an unknown suite or benchmark, a context that is too short, answers of another run in ``out``, bad data.
        FileNotFoundError, ConnectionError, PermissionError: no data.
        ImportError: math-verify is missing, and a task needs it.
    """
    start, chosen = time.perf_counter(), protocol(suite)
    runs = prepare(tokenizer, suite=suite, benchmarks=benchmarks, data=data, changes=changes)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    shared: dict[str, Any] = {name: field.value for name, field in chosen.shared.items()}
    shared["template_args"] = runs[0].settings["template_args"]
    facts = model_facts(model, folder, label or (folder.name if folder else type(model).__name__))
    identity = {"model": facts | {"path": None, "label": None}, "prefill": shared["prefill"], "seed": seed}
    if folder is None:
        (out / JOURNAL_FILE).unlink(missing_ok=True)
    loaded = _load_tasks(runs, data)
    with closing(Journal(out / JOURNAL_FILE, identity)) as journal:
        options: dict[str, Any] = {"batch_size": batch_size, "cache": cache, "journal": journal, "seed": seed}
        options["chat_template_args"] = shared["template_args"]
        lm = DeepseekLM(model, tokenizer=tokenizer, prefill=shared["prefill"], **options)
        how = {"system_instruction": shared["system_prompt"], "apply_chat_template": shared["chat_template"]}
        # bootstrap_iters: the report has intervals of its own
        results = run_harness(lm, loaded, limit=limit, log_samples=True, bootstrap_iters=0, **how)
    samples = _questions(lm, runs, results["samples"], shared["thinking"])
    runs = [TaskRun(**vars(run) | {"harness": _plain(results["results"][run.task])}) for run in runs]
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    fields: dict[str, Any] = {"model": facts, "suite": suite, "protocol": chosen.record(benchmarks)}
    fields |= {"tasks": tuple(runs), "versions": versions(), "machine": machine(), "seeds": {"sampling": seed}}
    seconds = round(time.perf_counter() - start, 1)
    evaluation = Evaluation(**fields, command=command, date=now, seconds=seconds)
    write_evaluation(out, evaluation, samples)
    return evaluation


def check_benchmarks(chosen: Protocol, benchmarks: list[str]) -> None:
    """
    Raises:
        ValueError: a benchmark that the suite does not have, or one twice.
    """
    for benchmark, count in Counter(benchmarks).items():
        if benchmark not in chosen.tasks:
            raise ValueError(f"--tasks: found {benchmark!r}, wanted some of {', '.join(chosen.tasks)} ({chosen.name})")
        if count > 1:
            raise ValueError(f"--tasks: found {benchmark!r} twice")
    if not benchmarks:
        raise ValueError(f"--tasks: found none, wanted some of {', '.join(chosen.tasks)} ({chosen.name})")


def prepare(
    tokenizer, *, suite: str, benchmarks: list[str], data: str = HUB, changes: Changes = Changes()
) -> list[TaskRun]:
    """What will be asked, as far as it is known without a model: call it before one is loaded, it finds all that is wrong.

    Raises:
        As `evaluate`.
    """
    chosen = protocol(suite)
    check_benchmarks(chosen, benchmarks)
    arguments = _template_arguments(tokenizer, chosen, changes.template_args or {})
    runs = []
    for benchmark in benchmarks:
        settings, changed = changes.apply(chosen.values(benchmark) | {"template_args": arguments})
        shots = {"shots": settings["shots"]} if "shots" in settings else {}
        questions, facts = QUESTIONS[benchmark](data=data, **shots)
        described: dict[str, Any] = {"benchmark": benchmark, "data": facts, "rows": len(questions)}
        runs.append(TaskRun(task=chosen.tasks[benchmark], **described, settings=settings, changed=changed))
    return runs


def _template_arguments(tokenizer, chosen: Protocol, given: dict) -> dict:
    """Those of the suite's that the chat template reads; checks that with the user's the prompt says what the suite says.

    Raises:
        ValueError: an argument that the template does not read; a prompt that ends thinking where the suite has it begin, or
            the other way round.
    """
    if not chosen.shared["chat_template"].value:
        if given:
            raise ValueError(
                f"template arguments: found {sorted(given)}, wanted none: {chosen.name} asks without a template"
            )
        return {}
    if not tokenizer.chat_template:
        raise ValueError(f"{tokenizer.name_or_path}: found no chat template, wanted one: is it a base model?")
    check_arguments(tokenizer, given)
    own = taken_arguments(tokenizer, chosen.shared["template_args"].value)
    end, thinking = prompt_end(tokenizer, own | given), chosen.shared["thinking"].value
    if end == (THINK_END if thinking else THINK):
        reads = f"what follows {THINK_END}" if thinking else "all of the text"
        raise ValueError(
            f"{tokenizer.name_or_path}: with the template arguments {own | given} the prompt ends in {end}, and {chosen.name} "
            f"takes {reads} for the answer; wanted {'an open' if thinking else 'no open'} {THINK}: another suite, or "
            'template arguments such as {"thinking": ' + str(bool(thinking)).lower() + "}"
        )
    return own


def _load_tasks(runs: list[TaskRun], data: str) -> dict:
    """lm-eval's tasks, with the settings of the runs."""
    loaded = {}
    for run in runs:  # one by one: they may differ in the number of examples
        chosen = {name: run.settings[name] for name in ("shots", "k") if name in run.settings}
        manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata={"data": str(data), **chosen})
        part = manager.load([run.task])
        task = part["tasks"][run.task]
        if "max_tokens" in run.settings:
            task.set_config("repeats", run.settings["k"])
            task.set_config("generation_kwargs", generation_kwargs(run.settings), update=True)
        loaded = {name: {**loaded.get(name, {}), **entries} for name, entries in part.items()}
    return loaded


def _questions(lm: DeepseekLM, runs: list[TaskRun], samples: dict, thinking: bool) -> dict[str, Iterable[Question]]:
    asked: Counter = Counter()
    questions: dict[str, Iterable[Question]] = {}
    for run in runs:
        ordered = sorted(samples[run.task], key=lambda sample: sample["doc_id"])
        questions[run.task] = [_question(lm, run, sample, asked, thinking) for sample in ordered]
    return questions


def _question(lm: DeepseekLM, run: TaskRun, sample: dict, asked: Counter, thinking: bool) -> Question:
    doc, (prompt, *_) = sample["doc"], sample["arguments"][0]
    if "max_tokens" not in run.settings:
        scores = {"ABCDEFGHIJ"[i]: answer[0][0] for i, answer in enumerate(sample["resps"])}
        if any(math.isnan(score) for score in scores.values()):
            raise ValueError(
                f"{run.task}: question {doc['id']}: found a log-likelihood of NaN: the model's weights or dtype are at fault"
            )
        answer = max(scores, key=scores.get)
        outputs = [Output(text="", answer=answer, right=answer == doc["gold"], scores=scores)]
    else:
        outputs = []
        asks = zip(sample["arguments"], sample["resps"], strict=True)
        for words, options in ((words, options) for (words, options), repeats in asks for _ in repeats):
            made = lm.output(words, options, asked[words])
            asked[words] += 1
            judged = judge_repeat(SCORERS[run.benchmark], doc, made["text"], len(outputs), thinking)
            prompted = {"prompt": words} if "prompt" in judged else {}  # as the model saw it, template and all
            outputs.append(Output(**made, **judged | prompted))
    return Question(
        id=doc["id"],
        question=doc["question"],
        prompt=prompt,
        gold=doc["gold"],
        outputs=tuple(outputs),
        category=doc["category"],
    )


def _plain(figures: dict) -> dict:
    return {name: value for name, value in figures.items() if isinstance(value, int | float) and name != "sample_len"}
