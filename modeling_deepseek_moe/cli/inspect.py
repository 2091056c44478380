"""``deepseek-moe inspect``: what a checkpoint folder holds and whether it can be loaded, from its headers."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from modeling_deepseek_moe.anatomy import ParameterBreakdown
from modeling_deepseek_moe.cli._console import count, plural, print_json, size, stderr, stdout
from modeling_deepseek_moe.cli._model import SHIPPED, folder_or_tiny
from modeling_deepseek_moe.engine.report import EngineReport
from modeling_deepseek_moe.inspection import Inspection, inspect_checkpoint
from modeling_deepseek_moe.terminal import shown

TITLES = {
    "file": "files that cannot be read",
    "missing": "missing tensors",
    "surplus": "tensors of layers or experts that the config does not have",
    "shape": "tensors of another shape",
    "dtype": "tensors of an unusable dtype",
    "scale": "FP8 scales",
    "ignored": "unexpected tensors, ignored when loading",
    "no mtp": "no MTP module",
}


def inspect(
    path: Annotated[Path | None, typer.Argument(help="A checkpoint folder.", show_default=SHIPPED)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    limit: Annotated[int, typer.Option(min=1, help="Maximum lines for each kind of problem.")] = 10,
    engine: Annotated[
        bool, typer.Option("--engine", help="Load the model too, and show what the CPU engine runs of it.")
    ] = False,
) -> None:
    """Show what a checkpoint folder holds and whether it would load.

    Reads config.json, the shard index and the safetensors headers, no weights: seconds, even for 685 GB.
    Tensors that are missing, unexpected, of another shape or dtype, and FP8 scales that do not fit are listed;
    only the values of the scales are left to the loading. Exit code 1 if the folder is not loadable as it is.

    With --engine the model is loaded on the CPU, and each part is shown that the CPU engine runs while it decodes, or the
    reason why it does not.

    Examples:
      [cyan]deepseek-moe inspect DeepSeek-V3[/]
      [cyan]deepseek-moe inspect DeepSeek-V3 --json | jq .parameters[/]
      [cyan]deepseek-moe inspect half-a-download && echo complete[/]
      [cyan]deepseek-moe inspect runs/demo/fp8 --engine[/]
    """
    path = folder_or_tiny(path)
    columns = (TextColumn("reading headers"), BarColumn(), MofNCompleteColumn())
    console = stderr()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=None)
        found = inspect_checkpoint(path, lambda done, total: progress.update(task, completed=done, total=total))
    report = _engine_report(path) if engine and found.is_loadable else None
    if as_json:
        print_json(_as_dict(found) | ({} if report is None else {"engine": _engine_dict(report)}))
    else:
        _show(found, limit, stdout())
        if report is not None:
            _show_engine(report, stdout())
    if not found.is_loadable:
        raise typer.Exit(1)


def parameters_dict(breakdown: ParameterBreakdown) -> dict:
    """Parameter counts under the names that ``--json`` uses."""
    return {
        "total": breakdown.parameters,
        "active": breakdown.active_parameters,
        "mtp": breakdown.mtp_parameters,
        "mtp_copies": breakdown.mtp_copies,
        "by_part": {part: entry.parameters for part, entry in breakdown.stored.items()},
        "active_by_part": {part: entry.parameters for part, entry in breakdown.active.items()},
    }


def parameters_lines(breakdown: ParameterBreakdown) -> list[str]:
    """Parameter counts in words."""
    lines = [f"{count(breakdown.parameters)} parameters, {count(breakdown.active_parameters)} active per token"]
    if breakdown.mtp_parameters:
        total = breakdown.parameters + breakdown.mtp_parameters
        lines.append(
            f"+ {count(breakdown.mtp_parameters)} MTP ({count(breakdown.mtp_copies)} copies of embedding and head): "
            f"{count(total)} in all"
        )
    return lines


def show_architecture(architecture: dict[str, str], breakdown: ParameterBreakdown, console: Console) -> None:
    """The config's essentials and the parameter counts, one line each."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="cyan", no_wrap=True)
    grid.add_column()
    for name, text in architecture.items():
        grid.add_row(name, Text(text))  # the config's own words are no markup
    for index, line in enumerate(parameters_lines(breakdown)):
        grid.add_row("" if index else "parameters", line)
    console.print(grid)
    console.print("[dim]active: chosen experts only, embedding as one row, head in full, without MTP[/]")


def _engine_report(path: Path) -> EngineReport:
    import torch
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16  # that of the releases, whatever a copy was saved in
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval().engine_report()


def _engine_dict(report: EngineReport) -> dict:
    rows = {name: reason for name, reason in report.lines()}
    return {"unavailable": report.unavailable, "calls": report.calls, "reasons": rows}


def _show_engine(report: EngineReport, console: Console) -> None:
    console.print()
    if report.unavailable is not None:
        console.print(f"[yellow]The CPU engine {escape(report.unavailable)}[/]")
        return
    table = Table("while decoding", "CPU engine", box=None, header_style="dim", pad_edge=False)
    for name, reason in report.lines():
        table.add_row(escape(name), "[green]native[/]" if reason is None else Text(reason, style="yellow"))
    console.print(table)
    console.print(f"{plural(report.calls, 'call')} of the engine for the layers of a token")


def _as_dict(found: Inspection) -> dict:
    return {
        "folder": found.folder,
        "loadable": found.is_loadable,
        "architecture": found.architecture,
        "parameters": parameters_dict(found.breakdown),
        "shards": found.shards,
        "tensors": found.total.tensors,
        "bytes": found.total.nbytes,
        "dtypes": {dtype: asdict(tally) for dtype, tally in found.dtypes.items()},
        "parts": {part: asdict(tally) for part, tally in found.parts.items()},
        "findings": {
            kind: {"count": len(findings), "list": [asdict(finding) for finding in findings]}
            for kind, findings in found.findings_by_kind().items()
        },
    }


def _show(found: Inspection, limit: int, console: Console) -> None:
    console.print(
        f"[bold]{escape(found.folder)}[/]: {plural(found.total.tensors, 'tensor')}, {size(found.total.nbytes)}, "
        f"{plural(found.shards, 'file')}"
    )
    console.print()
    show_architecture(found.architecture, found.breakdown, console)
    console.print()
    table = Table("part", box=None, header_style="dim", pad_edge=False)
    for header in ("tensors", "parameters", "active", "bytes", "share"):
        table.add_column(header, justify="right", no_wrap=True)
    for part, tally in found.parts.items():
        active = found.breakdown.active.get(part)
        table.add_row(
            part,
            f"{tally.tensors:,}",
            "" if part == "scales" else count(tally.values),
            count(active.parameters) if active else "",
            size(tally.nbytes),
            f"{tally.nbytes / max(found.total.nbytes, 1):.1%}",
        )
    console.print(table)
    console.print()
    table = Table("dtype", box=None, header_style="dim", pad_edge=False)
    for header in ("tensors", "values", "bytes"):
        table.add_column(header, justify="right", no_wrap=True)
    for dtype, tally in sorted(found.dtypes.items(), key=lambda item: -item[1].nbytes):
        table.add_row(escape(dtype), f"{tally.tensors:,}", count(tally.values), size(tally.nbytes))
    console.print(table)
    console.print()
    _show_findings(found, limit, console)


def _show_findings(found: Inspection, limit: int, console: Console) -> None:
    for kind, findings in found.findings_by_kind().items():
        style = "red" if findings[0].fatal else "yellow"
        console.print(f"[{style}]{len(findings):,} × {TITLES[kind]}[/]")
        for finding in findings[:limit]:
            where = f"{finding.where}: " if finding.where else ""
            console.print(f"  {shown(where + finding.message, keep='')}", markup=False, soft_wrap=True)
        if len(findings) > limit:
            console.print(f"  ... and {len(findings) - limit:,} more (--limit, --json)")
    if found.is_loadable:
        console.print("[green]Loadable[/]: names, shapes, dtypes and files agree with the config.")
    else:
        fatal = sum(finding.fatal for finding in found.findings)
        console.print(f"[bold red]Not loadable[/] as it is: {plural(fatal, 'problem')}.")
