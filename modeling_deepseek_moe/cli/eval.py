"""``deepseek-moe eval``: a model on MMLU-Pro, MATH and others, as DeepSeek measured, with an interval."""

import shlex
import sys
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from modeling_deepseek_moe.cli import _model
from modeling_deepseek_moe.cli._console import duration, print_json, stderr, stdout

if TYPE_CHECKING:
    from modeling_deepseek_moe.eval.run import Changes

DEFAULT_TASKS = "mmlu_pro,math500"
# The small model that ships writes short answers and has a short context: how it departs from the protocol.
SMALL = {"shots": 0, "max_tokens": 160}
WHAT, HOW, CHANGES = "What", "How", "Departures from the suite's protocol (the report names them)"


class Suite(StrEnum):
    """Whose protocol: a test holds these against ``protocols.yaml``."""

    V3_CHAT = "v3-chat"
    R1 = "r1"
    V3_2 = "v3.2"
    K2_5 = "k2.5"
    V3_BASE = "v3-base"


class CacheKind(StrEnum):
    DYNAMIC = "dynamic"
    STATIC = "static"


ModelOption = Annotated[
    Path | None,
    typer.Option(
        "--model", "-m", help="A checkpoint folder.", show_default="the small one that ships", rich_help_panel=WHAT
    ),
]
SuiteOption = Annotated[
    Suite,
    typer.Option(
        help="Whose prompts, limits and sampling: DeepSeek-V3 chat, R1, V3.2, Kimi K2.5, or V3-Base.",
        rich_help_panel=WHAT,
    ),
]
TasksOption = Annotated[
    str,
    typer.Option(
        help="mmlu_pro, math500, gpqa_diamond, aime24; r1 and later: aime25, aime26, hmmt_feb25; v3-base: mmlu_pro, math.",
        rich_help_panel=WHAT,
    ),
]
DataOption = Annotated[
    str | None,
    typer.Option(
        help="hub; a folder with mmlu_pro_test.jsonl, math500.jsonl ...; or sample: rows written for this project.",
        show_default="hub; sample without --model",
        rich_help_panel=WHAT,
    ),
]
LimitOption = Annotated[
    int | None, typer.Option(min=1, help="Evaluate only the first N questions of each task.", rich_help_panel=WHAT)
]
OutOption = Annotated[
    Path | None,
    typer.Option(
        help="Folder for the results; the same folder again goes on where it was interrupted.",
        show_default="runs/eval-MODEL-SUITE",
        rich_help_panel=WHAT,
    ),
]
LabelOption = Annotated[
    str | None,
    typer.Option(help="The model's name in the report.", show_default="the folder's", rich_help_panel=WHAT),
]
BatchSizeOption = Annotated[
    str, typer.Option(help="Rows at a time; auto: as many as fit into memory.", rich_help_panel=HOW)
]
CacheOption = Annotated[CacheKind, typer.Option(help="Kind of key-value cache.", rich_help_panel=HOW)]
SeedOption = Annotated[int, typer.Option(help="Seed of sampling.", rich_help_panel=HOW)]
ShotsOption = Annotated[int | None, typer.Option(min=0, help="Examples in the prompt.", rich_help_panel=CHANGES)]
MaxTokensOption = Annotated[
    int | None, typer.Option(min=1, help="Maximum tokens per answer.", rich_help_panel=CHANGES)
]
KOption = Annotated[int | None, typer.Option(min=1, help="Answers to each question.", rich_help_panel=CHANGES)]
TemperatureOption = Annotated[float | None, typer.Option(min=0, help="0: greedy.", rich_help_panel=CHANGES)]
TopPOption = Annotated[
    float | None, typer.Option(min=0.001, max=1, help="Nucleus sampling threshold.", rich_help_panel=CHANGES)
]
AsJsonOption = Annotated[bool, typer.Option("--json", help="Print the scores as JSON.")]


def eval(  # noqa: A001  the command's name
    model: ModelOption = None,
    suite: SuiteOption = Suite.V3_CHAT,
    tasks: TasksOption = DEFAULT_TASKS,
    data: DataOption = None,
    limit: LimitOption = None,
    out: OutOption = None,
    label: LabelOption = None,
    batch_size: BatchSizeOption = "auto",
    cache: CacheOption = CacheKind.DYNAMIC,
    seed: SeedOption = 1234,
    shots: ShotsOption = None,
    max_tokens: MaxTokensOption = None,
    k: KOption = None,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    template_args: _model.TemplateArgumentsOption = None,
    adapter: _model.AdapterOption = None,
    dtype: _model.DtypeOption = _model.Dtype.AUTO,
    dequantize: _model.DequantizeOption = False,
    trust_remote_code: _model.TrustRemoteCodeOption = False,
    attention: _model.AttentionOption = None,
    device: _model.DeviceOption = "auto",
    expert_memory: _model.ExpertMemoryOption = None,
    as_json: AsJsonOption = False,
) -> None:
    """Score a model on MMLU-Pro, MATH-500 and others under DeepSeek's own protocol, and report it next to the published figures.

    With no options it shows the whole path in minutes: the small model that ships, on rows in the benchmarks' formats, whose
    scores are no benchmark's. A folder gets every prompt, output and verdict; an interrupted run goes on when called again.

    \b
    Examples:
      [cyan]deepseek-moe eval[/]
      [cyan]deepseek-moe eval --model DeepSeek-V3 --suite v3-chat --tasks mmlu_pro,math500 --limit 200[/]
      [cyan]deepseek-moe eval -m DeepSeek-R1 --suite r1 --tasks aime24 --k 8[/]
      [cyan]deepseek-moe eval -m my-model --data my-rows --tasks math500 --out runs/mine[/]
      [cyan]deepseek-moe report runs/mine runs/other[/]   two models, question by question
    """
    _check_installed()
    from modeling_deepseek_moe.eval.protocols import protocol
    from modeling_deepseek_moe.eval.run import Changes, check_benchmarks, evaluate, prepare

    benchmarks = [name.strip() for name in tasks.split(",") if name.strip()]
    check_benchmarks(protocol(suite.value), benchmarks)
    _check_batch_size(batch_size)
    changes = Changes(shots=shots, max_tokens=max_tokens, temperature=temperature, top_p=top_p, k=k)
    changes = replace(changes, template_args=_model.read_template_arguments(template_args))
    if model is None:
        model, label, data, changes = _shipped(), label or "tiny checkpoint", data or "sample", _small(changes)
    label = label or model.resolve().name
    out = out or Path("runs", f"eval-{label.replace(' ', '-').replace('/', '-')}-{suite.value}")
    tokenizer = _model.load_tokenizer(model, trust_remote_code)
    asked: dict[str, Any] = {"suite": suite.value, "benchmarks": benchmarks, "data": data or "hub", "changes": changes}
    prepare(tokenizer, **asked)
    how: dict[str, Any] = {"dtype": dtype, "attention": attention, "device": device, "dequantize": dequantize}
    loaded = _model.load_model(model, **how, expert_memory=expert_memory, adapter=adapter)
    asked |= {"folder": model, "label": label, "out": out, "limit": limit, "batch_size": batch_size}
    done = evaluate(loaded, tokenizer, **asked, cache=cache.value, seed=seed, command=_command())
    _show(done, out, label, as_json)


def _check_batch_size(text: str) -> None:
    if text != "auto" and not (text.isdecimal() and int(text)):
        raise ValueError(f"--batch-size: found {text!r}, wanted a number of at least 1, or auto")


def _command() -> str:
    return shlex.join(["deepseek-moe", *sys.argv[1:]])


def _small(changes: "Changes") -> "Changes":
    """Within what the small model can: where nothing else was asked for."""
    small: dict[str, Any] = {name: part for name, part in SMALL.items() if getattr(changes, name) is None}
    return replace(changes, **small)


def _shipped() -> Path:
    from modeling_deepseek_moe.tiny import tiny_checkpoint

    stderr().print("[dim]no --model: the small one that ships, short answers, no examples[/]")
    return Path(tiny_checkpoint())


def _show(done, out: Path, label: str, as_json: bool) -> None:
    """The scores of an ``eval.results.Evaluation`` that was written to ``out``."""
    from modeling_deepseek_moe.eval.results import read_questions
    from modeling_deepseek_moe.eval.statistics import summarise

    scores = [(task, summarise(read_questions(out, task.task))) for task in done.tasks]
    if as_json:
        tasks = {task.benchmark: vars(one) | {"rows": task.rows, "data": task.data["source"]} for task, one in scores}
        print_json({"folder": str(out), "seconds": done.seconds, "tasks": tasks})
        return
    stdout().print(_table(label, done.suite, scores))
    for task in done.tasks:
        if task.changed:
            stdout().print(
                f"{task.benchmark} departs from {done.suite}: {'; '.join(task.changed)}", soft_wrap=True, markup=False
            )
    stdout().print(
        f"{out} in {duration(done.seconds)}; page: deepseek-moe report {shlex.quote(str(out))}",
        soft_wrap=True,
        markup=False,
    )


def _check_installed() -> None:
    for module, package in (("lm_eval", "lm-eval"), ("math_verify", "math-verify")):
        try:
            __import__(module)
        except ImportError:
            raise ImportError(f'eval needs {package}: pip install "modeling_deepseek_moe[eval]"') from None


def _table(label: str, suite: str, scores: list[tuple]) -> Table:
    table = Table(title=f"{escape(label)}, {suite}, in %; with 95 % intervals", title_justify="left")
    for name in ("", "score", "questions", "each", "no answer", "cut off", "lm-eval reads"):
        table.add_column(name, justify="right" if name else "left")
    for task, one in scores:
        table.add_row(
            escape(task.benchmark) + (", sample rows" if task.data["source"] == "sample" else ""),
            f"{_percent(one.score)} ({_percent(one.low)} to {_percent(one.high)})",
            f"{one.n:,}" if one.n == task.rows else f"{one.n:,} of {task.rows:,}",
            f"×{one.k}",
            _percent(one.no_answer),
            _percent(one.truncated),
            _percent(one.stock),
        )
    return table


def _percent(part: float | None) -> str:
    return "–" if part is None else f"{100 * part:.1f}"
