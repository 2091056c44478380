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
        help="fp8-to-bf16, bf16-to-fp8, dtype, reshard, hf-to-native, native-to-hf, mtp, merge-adapter, diff or "
        "verify.",
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
DtypeOption = Annotated[str | None, typer.Option(help="bfloat16, float16 or float32.", show_default=False)]
ScalesFromOption = Annotated[
    Path | None, typer.Option(help="bf16-to-fp8: the release whose scales are kept.", show_default=False)
]
FormatOption = Annotated[
    str | None, typer.Option(help="bf16-to-fp8: fp8 (the default) or fp8_ue8m0.", show_default=False)
]
WorldSizeOption = Annotated[int | None, typer.Option(help="hf-to-native: ranks.", show_default=False)]
AdapterOption = Annotated[
    Path | None, typer.Option(help="merge-adapter: the folder of a LoRA adapter.", show_default=False)
]
ActionOption = Annotated[str | None, typer.Option(help="mtp: drop, extract or graft.", show_default=False)]
MtpFromOption = Annotated[
    Path | None, typer.Option(help="mtp --action graft: the folder that has the module.", show_default=False)
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
    action: ActionOption = None,
    mtp_from: MtpFromOption = None,
    sha256: Sha256Option = None,
    check: CheckOption = None,
) -> None:
    """Convert a checkpoint, shard by shard, without a GPU.

    OUT appears once it is complete; until then OUT.partial holds the shards that are finished, and the same command
    goes on from there. diff compares two folders tensor by tensor, verify reads every value of one; exit code 1 if
    they find something.

    Examples:
      [cyan]deepseek-moe convert fp8-to-bf16 DeepSeek-V3 DeepSeek-V3-bf16 --dry-run[/]
      [cyan]deepseek-moe convert bf16-to-fp8 DeepSeek-V3-bf16 again --scales-from DeepSeek-V3[/]
      [cyan]deepseek-moe convert diff DeepSeek-V3 again[/]
      [cyan]deepseek-moe convert mtp DeepSeek-V3 without --action drop[/]
      [cyan]deepseek-moe convert merge-adapter DeepSeek-V3 merged --adapter my-lora[/]
      [cyan]deepseek-moe convert verify DeepSeek-V3 --sha256 SHA256SUMS[/]
    """
    from modeling_deepseek_moe.conversion import _job, _table
    from modeling_deepseek_moe.conversion._conversion import Options

    options = Options(max_shard_size, dtype, scales_from, format, world_size, adapter, action, mtp_from)
    _table.check_options(name, options)
    if dry_run and name in _table.READERS:
        raise ValueError(f"{name} writes no checkpoint: it has no use for --dry-run")
    if name == "verify":
        if out is not None:
            raise ValueError(f"verify writes no folder, found OUT {out}")
        _verify(source, sha256, check, workers)
        return
    if sha256 or check:
        raise ValueError(f"{name} has no use for --sha256 and --check")
    if out is None:
        raise ValueError(f"{name} wants OUT")
    if name == "diff":
        _diff(source, out)
        return
    job = _table.make_job(name, source, options)
    if dry_run:
        _foretell(job, out, workers)
        return
    with _progress(name, job.nbytes) as advance:
        _job.run(job, out, workers=workers, report=advance)
    stdout().print(f"{escape(str(out))}: {size(job.nbytes)} in {_files(len(job.shards))}", soft_wrap=True)


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
