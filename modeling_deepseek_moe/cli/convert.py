"""``deepseek-moe convert``: one format of the family into another, exactly, and resumable."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from modeling_deepseek_moe.cli._console import duration, plural, size, stderr, stdout
from modeling_deepseek_moe.terminal import shown

if TYPE_CHECKING:
    from modeling_deepseek_moe.conversion._job import Job


NameArgument = Annotated[
    str,
    typer.Argument(
        help="fp8-to-bf16, bf16-to-fp8, to-4bit, dtype, reshard, hf-to-native, native-to-hf, mtp, merge-adapter, "
        "consolidate, diff, error or verify.",
        show_default=False,
    ),
]
SourceArgument = Annotated[Path, typer.Argument(metavar="IN", help="A checkpoint folder.", show_default=False)]
OutArgument = Annotated[
    Path | None,
    typer.Argument(metavar="OUT", help="A new folder; for diff the other one; verify has none.", show_default=False),
]
DryRunOption = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Say what would be read and written, how long it may take and whether it fits, then stop.",
    ),
]
WorkersOption = Annotated[int, typer.Option(min=1, help="Shards written at a time.")]
MaxShardSizeOption = Annotated[str, typer.Option(help="Maximum shard size, such as 5GB.")]
DtypeOption = Annotated[
    str | None,
    typer.Option(help="bfloat16, float16 or float32; merge-adapter: of what codes stand for.", show_default=False),
]
ScalesFromOption = Annotated[
    Path | None, typer.Option(help="bf16-to-fp8: the release whose scales are kept.", show_default=False)
]
FormatOption = Annotated[
    str | None,
    typer.Option(
        help="bf16-to-fp8: fp8 (the default) or fp8_ue8m0; to-4bit: int4, nf4, fp4 or mxfp4.", show_default=False
    ),
]
KeepOption = Annotated[
    str | None,
    typer.Option(
        help="to-4bit: parts that stay in bf16, of attention, dense, shared, routed and mtp, with commas.",
        show_default=False,
    ),
]
KeepFp8Option = Annotated[
    str | None, typer.Option(help="to-4bit --format int4: parts that stay in FP8, likewise.", show_default=False)
]
HeadOption = Annotated[
    str | None,
    typer.Option(
        help="to-4bit: fp8 or 4bit, bf16-to-fp8: fp8, for lm_head too, which releases keep in bf16: a third of what "
        "a small model reads for a token.",
        show_default=False,
    ),
]
TextOption = Annotated[
    Path | None,
    typer.Option(
        help="error: a text to read with both models: perplexities and KL of the logits.", show_default=False
    ),
]
WorldSizeOption = Annotated[int | None, typer.Option(help="hf-to-native: ranks.", show_default=False)]
AdapterOption = Annotated[
    list[Path] | None,
    typer.Option(help="merge-adapter: the folder of a LoRA adapter; several in this order.", show_default=False),
]
WeightOption = Annotated[
    list[float] | None,
    typer.Option(help="merge-adapter: how much of each adapter, 1 where none is given.", show_default=False),
]
ActionOption = Annotated[str | None, typer.Option(help="mtp: drop, extract or graft.", show_default=False)]
MtpFromOption = Annotated[
    Path | None, typer.Option(help="mtp --action graft: the folder that has the module.", show_default=False)
]
ConfigOption = Annotated[
    Path | None,
    typer.Option(
        help="consolidate: the model's config.json, or a folder with it, if IN has none.", show_default=False
    ),
]
Sha256Option = Annotated[Path | None, typer.Option(help="verify: write the files' sha256 here.", show_default=False)]
CheckOption = Annotated[
    Path | None, typer.Option(help="verify: a list of sha256 to compare with.", show_default=False)
]


def convert(
    name: NameArgument,
    source: SourceArgument,
    out: OutArgument = None,
    dry_run: DryRunOption = False,
    workers: WorkersOption = 2,
    max_shard_size: MaxShardSizeOption = "5GB",
    dtype: DtypeOption = None,
    scales_from: ScalesFromOption = None,
    format: FormatOption = None,  # noqa: A002 - what the option is called
    world_size: WorldSizeOption = None,
    adapter: AdapterOption = None,
    weight: WeightOption = None,
    action: ActionOption = None,
    mtp_from: MtpFromOption = None,
    keep: KeepOption = None,
    keep_fp8: KeepFp8Option = None,
    head: HeadOption = None,
    config: ConfigOption = None,
    text: TextOption = None,
    sha256: Sha256Option = None,
    check: CheckOption = None,
) -> None:
    """Convert a checkpoint, shard by shard, without a GPU.

    OUT appears once it is complete; until then OUT.partial holds the shards that are finished, and the same command
    goes on from there. diff compares two folders tensor by tensor, error says how far the weights of the second are
    from the first's, verify reads every value of one; exit code 1 if diff or verify find something.

    Examples:
      [cyan]deepseek-moe convert fp8-to-bf16 DeepSeek-V3 DeepSeek-V3-bf16 --dry-run[/]
      [cyan]deepseek-moe convert bf16-to-fp8 DeepSeek-V3-bf16 again --scales-from DeepSeek-V3[/]
      [cyan]deepseek-moe convert diff DeepSeek-V3 again[/]
      [cyan]deepseek-moe convert to-4bit DeepSeek-V3 DeepSeek-V3-int4 --format int4 --keep attention[/]
      [cyan]deepseek-moe convert mtp DeepSeek-V3 without --action drop[/]
      [cyan]deepseek-moe convert merge-adapter DeepSeek-V3 merged --adapter my-lora[/]
      [cyan]deepseek-moe convert consolidate runs/sft/checkpoint-300 trained --config DeepSeek-V3[/]
      [cyan]deepseek-moe convert verify DeepSeek-V3 --sha256 SHA256SUMS[/]
    """
    from modeling_deepseek_moe.conversion import _table
    from modeling_deepseek_moe.conversion._conversion import Options

    adapters, weights = tuple(adapter or ()) or None, tuple(weight or ()) or None
    sizes = max_shard_size, dtype, scales_from, format, world_size
    options = Options(*sizes, adapters, weights, action, mtp_from, keep, keep_fp8, head, config)
    _table.check_options(name, options)
    _refuse_useless(name, out, dry_run, sha256 or check, text)
    if name == "verify":
        _verify(source, sha256, check, workers)
    elif name == "diff":
        _diff(source, out)
    elif name == "error":
        _error(source, out, text)
    else:
        job = _table.make_job(name, source, options)
        (_foretell if dry_run else _write)(job, out, workers)


def _refuse_useless(name: str, out: Path | None, dry_run: bool, sums: Path | None, text: Path | None) -> None:
    """
    Raises:
        ValueError: the conversion has no use for something that was given, or lacks OUT.
    """
    from modeling_deepseek_moe.conversion import _table

    if dry_run and name in _table.READERS:
        raise ValueError(f"{name} writes no checkpoint: it has no use for --dry-run")
    if name != "verify" and sums:
        raise ValueError(f"{name} has no use for --sha256 and --check")
    if name != "error" and text:
        raise ValueError(f"{name} has no use for --text {text}")
    if (out is None) != (name == "verify"):
        raise ValueError(f"{name} wants OUT" if out is None else f"verify writes no folder, found OUT {out}")


def _write(job: "Job", out: Path, workers: int) -> None:
    from modeling_deepseek_moe.conversion import _job

    with _progress(job.name, job.nbytes) as advance:
        before = _job.run(job, out, workers=workers, report=advance)
    stdout().print(f"{escape(str(out))}: {size(job.nbytes)} in {_files(len(job.shards))}", soft_wrap=True)
    for line in (report := tuple(job.report())):
        stdout().print(line, soft_wrap=True, markup=False)
    if report and before:
        stdout().print(f"{_files(before)} were finished before, of which these lines say nothing")


def _foretell(job: "Job", out: Path, workers: int) -> None:
    """What a run would read and write, how long it may take and whether it fits; exit code 1 if it does not."""
    from modeling_deepseek_moe.conversion import _job

    finished = _job.finished_shards(job, out)
    left = sum(plan.nbytes for shard, plans in job.shards.items() if shard not in finished for plan in plans)
    stdout().print(f"reads   {size(job.read_bytes)} in {_files(sum(len(s.reader.files) for s in job.sources))}")
    stdout().print(f"writes  {size(job.nbytes)} in {_files(len(job.shards))} to {escape(str(out))}", soft_wrap=True)
    stdout().print(f"left    {size(left)}; {_files(len(finished))} finished")
    seconds = _job.estimate(job, out, finished, workers)
    stdout().print(f"takes   about {duration(seconds)} with --workers {workers}, going by a few tensors tried now")
    try:
        _job.check_space(job, out, finished)
    except OSError as error:
        stdout().print(f"space   {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(1) from None


def _files(number: int) -> str:
    return plural(number, "file")


@contextlib.contextmanager
def _progress(name: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar with bytes, bytes per second and the time left."""
    console = stderr()
    columns = (TextColumn(name), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total)
        yield lambda nbytes: progress.advance(task, nbytes)


def _verify(folder: Path, sums: Path | None, check: Path | None, workers: int) -> None:
    from modeling_deepseek_moe.conversion import verify

    wanted = verify.read_sums(check) if check else None
    with _progress("verify", verify.folder_bytes(folder)) as advance:
        result = verify.verify(folder, wanted, workers=workers, report=advance)
    for finding in result.findings:
        text = f"{'' if finding.fatal else 'note: '}{finding.where}: {finding.message}"
        stdout().print(shown(text, keep=""), soft_wrap=True, markup=False)
    if sums:
        verify.write_sums(sums, result.sums)
    read = f"{_files(len(result.sums))}, {size(result.nbytes)}"
    if not result.is_sound:
        fatal = sum(finding.fatal for finding in result.findings)
        stdout().print(f"not sound: {plural(fatal, 'finding')} in {read}")
        raise typer.Exit(1)
    stdout().print(f"sound: {read}" + (f", {len(wanted):,} sha256 as wanted" if wanted else ""))


def _error(a: Path, b: Path, text: Path | None) -> None:
    from modeling_deepseek_moe.conversion import error
    from modeling_deepseek_moe.conversion._source import Source

    one, two = Source(a), Source(b)
    with _progress("error", one.reader.nbytes) as advance:
        errors = error.weight_errors(one, two, advance)
    for line in errors.lines():
        stdout().print(line, soft_wrap=True, markup=False)
    if text is not None:
        found = error.logits_error(a, b, text.read_text(encoding="utf-8"))
        stdout().print(
            f"perplexity      {found.perplexity:.4f} and {found.perplexity_made:.4f} on {found.tokens:,} tokens"
        )
        stdout().print(f"KL of logits    {found.divergence:.5f} nats a token")


def _diff(a: Path, b: Path) -> None:
    from modeling_deepseek_moe.conversion._source import Source
    from modeling_deepseek_moe.conversion.diff import differences

    one, two = Source(a), Source(b)
    found, differ = 0, False
    for difference in differences(one, two):
        found += difference.kind != "config"
        differ = True
        text = f"{difference.name}: {difference.kind} {difference.detail}"
        stdout().print(shown(text.rstrip(), keep=""), soft_wrap=True, markup=False)
    if differ:
        stdout().print(f"{plural(found, 'tensor')} {'differs' if found == 1 else 'differ'}")
        raise typer.Exit(1)
    stdout().print(f"identical: {plural(len(one.reader), 'tensor')}, {size(one.reader.nbytes)}")
