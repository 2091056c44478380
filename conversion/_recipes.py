"""The conversions by name: what each takes, and the job that it makes of it."""

from pathlib import Path
from typing import NamedTuple

from modeling_deepseek_moe.conversion import casts, merge_adapter, mtp, native
from modeling_deepseek_moe.conversion._job import Job
from modeling_deepseek_moe.conversion._source import Source

from modeling_deepseek_moe.checkpoint.writer import parse_size


class Options(NamedTuple):
    """What a conversion may be told. Those that it has no use for are refused unless they are left alone."""

    max_shard_size: str = "5GB"
    dtype: str | None = None
    scales_from: Path | None = None
    world_size: int | None = None
    adapter: Path | None = None
    action: str | None = None
    mtp_from: Path | None = None


USES = {
    "fp8-to-bf16": {"max_shard_size", "dtype"},
    "bf16-to-fp8": {"max_shard_size", "scales_from"},
    "dtype": {"max_shard_size", "dtype"},
    "reshard": {"max_shard_size"},
    "hf-to-native": {"world_size"},
    "native-to-hf": {"max_shard_size"},
    "mtp": {"max_shard_size", "action", "mtp_from"},
    "merge-adapter": {"max_shard_size", "adapter"},
}

READERS = ("diff", "verify")  # they write no checkpoint, so they are no jobs


def check_options(name: str, options: Options) -> None:
    """Refuse a name that is no conversion's, and options that it has no use for.

    Raises:
        ValueError: either.
    """
    if name not in (*USES, *READERS):
        raise ValueError(f"conversion {name!r} is not known, wanted one of {', '.join((*USES, *READERS))}")
    for option, value in options._asdict().items():
        if option not in USES.get(name, ()) and value != Options._field_defaults[option]:
            raise ValueError(f"{name} has no use for --{option.replace('_', '-')} {value}")


def make_job(name: str, folder: Path, options: Options) -> Job:
    """The job of a named conversion, from headers alone.

    Raises:
        ValueError: no such conversion, options that it has no use for, or without those that it needs.
        CheckpointError: the input is not what the conversion wants.
    """
    check_options(name, options)
    if options.dtype is not None and options.dtype not in casts.WIDE:
        raise ValueError(f"--dtype {options.dtype} is not known, wanted one of {', '.join(casts.WIDE)}")
    told = {key: str(value) for key, value in options._asdict().items() if value is not None}
    if name == "native-to-hf":
        source = native.open_ranks(folder)
        plans, config = native.to_hf(source)
        return Job.of(name, told, [source], plans, config, parse_size(options.max_shard_size))
    source = Source(folder)
    sources = [source]
    if name == "hf-to-native":
        return native.to_native(source, options.world_size or 1, told)
    if name == "fp8-to-bf16":
        plans, config = casts.dequantized(source, options.dtype or "bfloat16")
    elif name == "bf16-to-fp8":
        sources += [Source(options.scales_from)] if options.scales_from else []
        plans, config = casts.quantized(source, *sources[1:])
    elif name == "dtype":
        if options.dtype is None:
            raise ValueError("dtype wants --dtype, such as --dtype float32")
        plans, config = casts.cast(source, options.dtype)
    elif name == "mtp":
        plans, config = _mtp(source, sources, options)
    elif name == "merge-adapter":
        if options.adapter is None:
            raise ValueError("merge-adapter wants --adapter, a folder with adapter_config.json")
        adapter = merge_adapter.Adapter(options.adapter)
        sources.append(adapter.source)
        plans, config = merge_adapter.merged(source, adapter)
    else:
        plans, config = casts.reshard(source)
    return Job.of(name, told, sources, plans, config, parse_size(options.max_shard_size))


def _mtp(source: Source, sources: list[Source], options: Options):
    if options.action not in mtp.ACTIONS:
        raise ValueError(f"--action {options.action} is not known, wanted one of {', '.join(mtp.ACTIONS)}")
    if (options.action == "graft") != (options.mtp_from is not None):
        raise ValueError(f"--action {options.action} and --mtp-from {options.mtp_from}: graft wants it, others do not")
    if options.action == "graft":
        sources.append(Source(options.mtp_from))
        return mtp.graft(source, sources[1])
    return mtp.drop(source) if options.action == "drop" else mtp.extract(source)
