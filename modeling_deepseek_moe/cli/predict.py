"""``deepseek-moe predict``: programs and patches by a model, for a judge; and the judge's verdicts as an evaluation."""

import shlex
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from modeling_deepseek_moe.cli import _model
from modeling_deepseek_moe.cli._console import plural, stderr, stdout


class Kind(StrEnum):
    PROGRAMS = "programs"
    LIVECODEBENCH = "livecodebench"
    CODEFORCES = "codeforces"
    SWEBENCH = "swebench"


KindArgument = Annotated[
    Kind, typer.Argument(help="What for: own problems, LiveCodeBench, Codeforces, or SWE-bench Verified.")
]
ModelOption = Annotated[
    Path | None,
    typer.Option("--model", "-m", help="A checkpoint folder.", show_default="the small one that ships"),
]
DataOption = Annotated[
    Path | None,
    typer.Option(
        help="JSON lines: id, statement, tests; for livecodebench its rows; for codeforces problem, statement; for swebench instance_id, text.",
        show_default="for programs, problems written for this project",
    ),
]
OutOption = Annotated[Path | None, typer.Option(help="Folder for the results.", show_default="runs/KIND")]
JudgedOption = Annotated[
    Path | None,
    typer.Option(help="Verdicts: JSON lines problem, rating, solved; for swebench the official harness' report."),
]
RatingsOption = Annotated[Path | None, typer.Option(help="CSV of rating, percentile: for codeforces' percentile.")]
LabelOption = Annotated[str | None, typer.Option(help="The model's name.", show_default="the folder's")]
MaxTokensOption = Annotated[int, typer.Option(min=1, help="Maximum tokens per answer.")]
TemperatureOption = Annotated[float, typer.Option(min=0, help="0: greedy.")]
TopPOption = Annotated[float, typer.Option(min=0.001, max=1, help="Nucleus sampling threshold.")]
BatchSizeOption = Annotated[str, typer.Option(help="Rows at a time; auto: as many as fit into memory.")]


def predict(
    kind: KindArgument,
    model: ModelOption = None,
    data: DataOption = None,
    out: OutOption = None,
    judged: JudgedOption = None,
    ratings: RatingsOption = None,
    label: LabelOption = None,
    max_tokens: MaxTokensOption = 8192,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    template_args: _model.TemplateArgumentsOption = None,
    batch_size: BatchSizeOption = "auto",
    dtype: _model.DtypeOption = _model.Dtype.AUTO,
    dequantize: _model.DequantizeOption = False,
    trust_remote_code: _model.TrustRemoteCodeOption = False,
    attention: _model.AttentionOption = None,
    device: _model.DeviceOption = "auto",
    expert_memory: _model.ExpertMemoryOption = None,
) -> None:
    """Have a model write programs or patches, in the format of their judges, and read the verdicts back.

    Own problems and LiveCodeBench's are judged at once, in a sandbox without network, processes or files (Linux 5.13 or later). Codeforces and SWE-bench
    are judged by their own tools only: this writes what they take, says how to go on, and with --judged makes an evaluation
    for deepseek-moe report. No figure is made without a verdict.

    \b
    Examples:
      [cyan]deepseek-moe predict programs --max-tokens 200[/]
      [cyan]deepseek-moe predict livecodebench -m DeepSeek-R1 --data test6.jsonl --max-tokens 32768 --temperature 0.6[/]
      [cyan]deepseek-moe predict swebench -m DeepSeek-V3 --data instances.jsonl --out runs/swe[/]
      [cyan]deepseek-moe predict swebench --out runs/swe --judged report.json[/]
      [cyan]deepseek-moe predict codeforces --out runs/cf --judged judged.jsonl --ratings ratings.csv[/]
    """
    from modeling_deepseek_moe.eval.code import handover

    out = out or Path("runs") / kind.value
    if judged is not None:
        _read_verdicts(kind, out, judged, ratings)
        return
    prompts, problems = _questions(kind, data)
    if model is None:
        model, label = _shipped(), label or "tiny checkpoint"
    tokenizer = _model.load_tokenizer(model, trust_remote_code)
    arguments = handover.template_arguments(tokenizer, _model.read_template_arguments(template_args) or {})
    how: dict[str, Any] = {"dtype": dtype, "attention": attention, "device": device, "dequantize": dequantize}
    loaded = _model.load_model(model, **how, expert_memory=expert_memory)
    answers = handover.ask(
        loaded,
        tokenizer,
        prompts,
        out,
        kind=kind.value,
        folder=model,
        label=(label := label or model.resolve().name),
        settings={"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "template_args": arguments},
        batch_size=batch_size,
    )
    texts = [(name, handover.said(answer)) for name, answer in answers.items()]
    _hand_over(kind, out, label, texts, problems, data)


def _shipped() -> Path:
    from modeling_deepseek_moe.tiny import tiny_checkpoint

    stderr().print("[dim]no --model: the small one that ships, which writes no programs[/]")
    return Path(tiny_checkpoint())


def _read_verdicts(kind: Kind, out: Path, judged: Path, ratings: Path | None) -> None:
    from modeling_deepseek_moe.eval.code import handover

    if kind in (Kind.PROGRAMS, Kind.LIVECODEBENCH):
        raise ValueError(f"found --judged, which {kind.value} have no use for: the sandbox judges them")
    if kind is Kind.CODEFORCES:
        _say(out, handover.judge_codeforces(out, judged, ratings))
    else:
        _say(out, handover.judge_swebench(out, judged))


def _questions(kind: Kind, data: Path | None) -> tuple[dict, list]:
    """Prompts by the questions' names, and, where they are judged here, the problems."""
    from modeling_deepseek_moe.eval.code import handover
    from modeling_deepseek_moe.eval.code.livecodebench import read_problems as read_live_problems
    from modeling_deepseek_moe.eval.code.problems import SAMPLES, read_problems
    from modeling_deepseek_moe.eval.code.sandbox import check

    if kind is Kind.PROGRAMS:
        if reason := check():
            stderr().print(f"[dim]programs can write no files here: {escape(reason)}[/]", soft_wrap=True)
        problems = read_problems(data or SAMPLES)
        return {problem.id: problem.prompt for problem in problems}, problems
    if kind is Kind.LIVECODEBENCH and data is not None:
        check()
        live = read_live_problems(data)
        return {problem.id: problem.prompt for problem in live}, live
    if data is None:
        raise ValueError(f"found no --data, wanted the questions of {kind.value} (or --judged, their verdicts)")
    if kind is Kind.CODEFORCES:
        return handover.read_prompts(data, "problem", "statement", handover.program_prompt), []
    return handover.read_prompts(data, "instance_id", "text"), []


def _hand_over(
    kind: Kind, out: Path, label: str, texts: list[tuple[str, str]], problems: list, data: Path | None
) -> None:
    """Judge programs, or write what the judge's own tool takes and say how it is called."""
    from modeling_deepseek_moe.eval.code import handover

    if kind in (Kind.PROGRAMS, Kind.LIVECODEBENCH):
        _say(out, handover.judge_programs(out, problems, str(data) if data else "sample", kind.value))
    elif kind is Kind.CODEFORCES:
        count, missing = handover.codeforces.write_submissions(out / "submissions.jsonl", texts)
        stdout().print(
            f"{out / 'submissions.jsonl'}: {plural(count, 'program')}; {plural(missing, 'answer')} without one",
            soft_wrap=True,
            markup=False,
        )
        stdout().print(
            f"have them judged, then: deepseek-moe predict codeforces --out {shlex.quote(str(out))} --judged FILE",
            markup=False,
        )
    else:
        file = out / "predictions.jsonl"
        count, empty = handover.swebench.write_predictions(file, label, texts)
        stdout().print(
            f"{file}: {plural(count, 'prediction')}, {empty} of them without a patch", soft_wrap=True, markup=False
        )
        stdout().print(
            "with Docker and swebench:", handover.swebench.command(file, out.name), soft_wrap=True, markup=False
        )
        stdout().print(
            f"then: deepseek-moe predict swebench --out {shlex.quote(str(out))} --judged REPORT.json",
            soft_wrap=True,
            markup=False,
        )


def _say(out: Path, evaluation) -> None:
    from modeling_deepseek_moe.eval.results import read_questions
    from modeling_deepseek_moe.eval.statistics import summarise

    (task,) = evaluation.tasks
    scores = summarise(read_questions(out, task.task))
    figures = "".join(f", {name} {value}" for name, value in task.harness.items())
    stdout().print(
        f"{task.benchmark}: {100 * scores.score:.1f} % of {scores.n} right ({100 * scores.low:.1f} to "
        f"{100 * scores.high:.1f}){figures}; page: deepseek-moe report {shlex.quote(str(out))}",
        soft_wrap=True,
        markup=False,
    )
