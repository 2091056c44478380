"""The conversions by name, and the job that each makes of a folder and options."""

from pathlib import Path

from modeling_deepseek_moe.checkpoint.writer import parse_size, plan_shards
from modeling_deepseek_moe.conversion import (
    bf16_to_fp8,
    consolidate,
    dtype,
    fp8_to_bf16,
    hf_to_native,
    merge_adapter,
    mtp,
    native_to_hf,
    reshard,
    to_4bit,
)
from modeling_deepseek_moe.conversion._conversion import Conversion, Options, check_unused
from modeling_deepseek_moe.conversion._job import Job

CONVERSIONS: dict[str, Conversion] = {
    module.CONVERSION.name: module.CONVERSION
    for module in (
        *(fp8_to_bf16, bf16_to_fp8, dtype, reshard, hf_to_native, native_to_hf, mtp, merge_adapter, to_4bit),
        consolidate,
    )
}
READERS = ("diff", "error", "verify")  # they write no checkpoint


def check_options(name: str, options: Options) -> None:
    """Refuse a name that is none of a conversion or reader, and options that it has no use for, or is without.

    Raises:
        ValueError: names it.
    """
    if name in READERS:
        check_unused(name, options)
    elif name in CONVERSIONS:
        CONVERSIONS[name].check(options)
    else:
        raise ValueError(f"conversion {name!r} is not known, wanted one of {', '.join((*CONVERSIONS, *READERS))}")


def make_job(name: str, folder: Path, options: Options) -> Job:
    """The job of a named conversion, from headers alone.

    Raises:
        ValueError: as `check_options`, or a value of an option that the conversion does not know.
        CheckpointError: the input is not what the conversion wants.
    """
    check_options(name, options)
    conversion = CONVERSIONS[name]
    source = conversion.open(folder)
    made = conversion.plan(source, options)
    if isinstance(made.tensors, dict):
        shards, with_index = made.tensors, False
    else:
        shards = plan_shards(made.tensors, parse_size(options.max_shard_size))
        with_index = len(shards) > 1
    told = {key: str(value) for key, value in options._asdict().items() if value is not None}
    sources = [source, *made.also_read]
    return Job(name, told, sources, shards, made.config, with_index, made.report, made.decided_by)
