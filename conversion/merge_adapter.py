"""``merge-adapter``: LoRA adapters, as peft saves them, into the weights that they were trained on: W + s·B·A.

Computed in fp64 and rounded once. In a quantised checkpoint, in fp32, only the blocks that change get new codes and a new
scale; all others, and tensors that no adapter changes, keep their bytes. ``--dtype`` makes floating-point weights of all codes.
"""

import itertools
import math
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from modeling_deepseek_moe.checkpoint.headers import DTYPE_NAMES, CheckpointError, TensorInfo
from modeling_deepseek_moe.checkpoint.writer import TensorPlan
from modeling_deepseek_moe.conversion._adapter import Adapter
from modeling_deepseek_moe.conversion._bitsandbytes import BitsAndBytesSource, MadeTogether, open_folder
from modeling_deepseek_moe.conversion._blocks import WIDE, CodesAndScales, wide_dtype, with_dtype
from modeling_deepseek_moe.conversion._changes import Change, LowRank, Step, Tokens, Whole, round_once
from modeling_deepseek_moe.conversion._conversion import Conversion, Options, Output
from modeling_deepseek_moe.conversion._report import Report, Tally
from modeling_deepseek_moe.conversion._source import Source, as_is
from modeling_deepseek_moe.formats import WeightFormat, memory


class Weighted(NamedTuple):
    """A change of an adapter, and how much of it is wanted."""

    change: Change
    weight: float
    adapter: Path


def plan(source: Source, options: Options) -> Output:
    """The checkpoint with the adapters in it, one after the other, in its own format, or codes in the floats of ``--dtype``.

    Raises:
        CheckpointError: a tensor of an adapter that has no place in the checkpoint, or a weight that cannot be changed.
        ValueError: another number of ``--weight`` than of ``--adapter``.
    """
    assert options.adapter is not None, "a conversion's required options are there"
    adapters = [Adapter(folder) for folder in options.adapter]
    weights = options.weight or (1.0,) * len(adapters)
    if len(weights) != len(adapters) or not all(map(math.isfinite, weights)):
        raise ValueError(
            f"--weight: found {list(weights)}, wanted a finite number for each of {len(adapters)} adapters"
        )
    source.check_scales_have_weights()
    changes: dict[str, list[Weighted]] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for name, own in adapter.changes(source).items():
            changes.setdefault(name, []).extend(Weighted(change, weight, adapter.folder) for change in own)
    for name, own in changes.items():
        _refuse_lost(name, own)
    report = Report()
    if options.dtype is not None:
        plans, config = _in_floats(source, options.dtype, changes, report)
    else:
        plans, config = _in_codes(source, changes, report), source.config
    return Output(
        plans,
        config,
        also_read=tuple(adapter.source for adapter in adapters),
        report=report.lines,
        decided_by=[adapter.config for adapter in adapters],
    )


def _tally(source: Source, name: str, tensors: int = 1) -> Callable[[], Tally]:
    return partial(Tally, source.specs[name].part if name in source.specs else "other", tensors)


def _in_codes(source: Source, changes: dict[str, list[Weighted]], report: Report) -> list[TensorPlan]:
    """The checkpoint's own tensors: codes stay codes."""
    plans: list[TensorPlan] = []
    renewed: set[str] = set()
    held = threading.local()
    for info in source.reader.values():
        weight, suffix = source.split(info.name)
        own = changes.get(weight)
        if own is not None and isinstance(source, BitsAndBytesSource) and source.is_codes(source.reader[weight]):
            if weight not in renewed:  # what is made together is written together, and waits for nothing else
                made = _renewed(source, source.reader[weight], own, report, held)
                plans += made
                renewed |= {weight, *(plan.name for plan in made)}
            if info.name in renewed:
                continue
            own = None
        if own is None or any(suffix in form.others for form in source.weight_formats):
            report.untouched += 1
            plans.append(as_is(source, info))
        elif suffix is None:
            plans += _plans(source, info, weight, own, report)
    return plans


def _in_floats(
    source: Source, dtype_name: str, changes: dict[str, list[Weighted]], report: Report
) -> tuple[list[TensorPlan], dict]:
    """What codes stand for in the dtype of that name, and everything else as it was; and the config that says so.

    Raises:
        CheckpointError: there are no codes.
    """
    dtype, plans = wide_dtype(dtype_name), []
    if not any(map(source.is_codes, source.reader.values())):
        raise CheckpointError(
            f"{source.folder}: found no codes, wanted some for --dtype {dtype_name}: of floating-point weights `deepseek-moe convert "
            "dtype` makes others"
        )
    for info in source.reader.values():
        name, suffix = source.split(info.name)
        if suffix is not None:
            continue
        own, is_codes = changes.get(name, []), source.is_codes(info)
        if not own and not is_codes:
            report.untouched += 1
            plans.append(as_is(source, info))
            continue
        report.decoded += not own
        target, shape = (dtype, source.value_shape(name)) if is_codes else (info.dtype, info.shape)
        _check_floats(source, info)
        make = partial(_merge, source, info, target, own, _tally(source, name), report)
        plans.append(TensorPlan(name, target, shape, make))
    first = source.weight_format
    return plans, with_dtype(source.config, dtype_name) | ({} if first.foreign else memory(first))


def _check_floats(source: Source, info: TensorInfo) -> None:
    if not source.is_codes(info) and info.dtype not in WIDE.values():
        raise CheckpointError(f"{info.file}: tensor {info.name}: found {DTYPE_NAMES[info.dtype]}, wanted floats")


def _plans(source: Source, info: TensorInfo, name: str, changes: list[Weighted], report: Report) -> list[TensorPlan]:
    """Of a weight that changes; of codes with their scales."""
    _check_floats(source, info)
    form = source.format_of(info)
    if form is not None:
        scales = source.scale_of(info)
        make = partial(_merge_codes, source, info, form, scales, changes, _tally(source, name, 2), report)
        return CodesAndScales(make).plans(name, form.value_shape(info.shape), form)[:2]
    make = partial(_merge, source, info, info.dtype, changes, _tally(source, name), report)
    return [TensorPlan(name, info.dtype, info.shape, make)]


def _renewed(
    source: BitsAndBytesSource, info: TensorInfo, changes: list[Weighted], report: Report, held: threading.local
) -> list[TensorPlan]:
    """Of bitsandbytes' codes that change: codes and scales."""
    infos = [info, *source.scale_infos(info)]
    make = partial(_renew, source, info, changes, _tally(source, info.name, len(infos)), report)
    made = MadeTogether(make, held)
    return [TensorPlan(own.name, own.dtype, own.shape, partial(made.take, own.name)) for own in infos]


def _refuse_lost(name: str, changes: list[Weighted]) -> None:
    """
    Raises:
        CheckpointError: an adapter would take the place of what an earlier one did, or begins from a weight that is no longer
            the base's.
    """
    for earlier, later in itertools.pairwise(changes):
        replaces = isinstance(later.change, Whole | Tokens)
        begins = isinstance(later.change, LowRank) and later.change.beginning is not None
        if earlier.adapter != later.adapter and (replaces or begins):
            raise CheckpointError(
                f"{later.adapter}: found an adapter of {name} that {'takes its place' if replaces else 'begins from it'}, wanted "
                f"it before {earlier.adapter}, which changes it too"
            )


def _begin(changes: list[Weighted], source: Source, info: TensorInfo, dtype: torch.dtype) -> list[tuple[Step, float]]:
    return [(change.begin(partial(source.values, info), dtype), weight) for change, weight, _ in changes]


def _changed(steps: list[tuple[Step, float]], base: torch.Tensor, rows: slice, info: TensorInfo) -> torch.Tensor:
    """Rows of a tensor, with what the adapters do to them."""
    tile = base
    for step, weight in steps:
        new = step(tile, base, rows)
        tile = new if weight == 1 else torch.lerp(tile, new, weight)
    if not torch.isfinite(tile).all():
        raise CheckpointError(f"{info.file}: tensor {info.name}: found NaN or Inf once merged, wanted finite values")
    return tile


def _merge(
    source: Source,
    info: TensorInfo,
    dtype: torch.dtype,
    changes: list[Weighted],
    begin: Callable[[], Tally],
    report: Report,
) -> Iterator[torch.Tensor]:
    steps, tally = _begin(changes, source, info, torch.float64), begin()
    for rows, tile in source.value_tiles(info):
        wanted = _changed(steps, tile.double(), rows, info)
        made = round_once(wanted, dtype)
        if not torch.isfinite(made).all():
            raise CheckpointError(f"{info.file}: tensor {info.name}: found values beyond {dtype} once merged")
        tally.add(wanted, tile, made)
        yield made
    if changes:
        report.keep(info.name, tally)


def _merge_codes(
    source: Source,
    info: TensorInfo,
    form: WeightFormat,
    scale_info: TensorInfo,
    changes: list[Weighted],
    begin: Callable[[], Tally],
    report: Report,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    scales = source.read_scale(scale_info)
    steps, tally = _begin(changes, source, info, torch.float32), begin()
    for rows, codes in source.tiles(info, form.block[0]):
        scale = scales[form.scale_rows(rows)]
        before = form.dequantize(codes, scale, torch.float32)
        wanted = _changed(steps, before, rows, info)
        codes, scale, changed = form.requantize(codes, scale, wanted)
        tally.add(wanted, before, form.dequantize(codes, scale, torch.float32), changed, form)
        assert isinstance(scale, torch.Tensor)  # nested ones are bitsandbytes'
        yield codes, scale
    report.keep(info.name, tally)


def _renew(
    source: BitsAndBytesSource, info: TensorInfo, changes: list[Weighted], begin: Callable[[], Tally], report: Report
) -> dict[str, torch.Tensor]:
    """A matrix at a time: of nested scales the mean is that of all."""
    form, (codes, scales) = source.format_of(info), source.matrix(info)
    assert form is not None, info.name
    steps, tally = _begin(changes, source, info, torch.float32), begin()
    before = form.dequantize(codes, scales, torch.float32)
    wanted = _changed(steps, before, slice(0, len(before)), info)
    try:
        codes, scales, changed = form.requantize(codes, scales, wanted)
    except ValueError as error:
        raise CheckpointError(f"{info.file}: tensor {info.name}: {error}") from None
    tally.add(wanted, before, form.dequantize(codes, scales, torch.float32), changed, form)
    report.keep(info.name, tally)
    return source.named(info, (codes, scales))


CONVERSION = Conversion(
    "merge-adapter",
    plan,
    ("max_shard_size", "adapter", "weight", "dtype"),
    required={"adapter": "a folder with adapter_config.json"},
    no_inverse="sums are rounded to the weights' dtype: what was added cannot be taken off to the bit",
    open=open_folder,
)
