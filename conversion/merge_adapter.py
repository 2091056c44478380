"""``merge-adapter``: LoRA adapters, as peft saves them, into the weights that they were trained on: W + s·B·A.

Computed in fp64 and rounded once. In a quantised checkpoint, in fp32, only the blocks that change get new codes and a new
scale; all others, and tensors that no adapter changes, keep their bytes.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from modeling_deepseek_moe.checkpoint.headers import DTYPE_NAMES, CheckpointError, TensorInfo
from modeling_deepseek_moe.checkpoint.writer import TensorPlan
from modeling_deepseek_moe.conversion._adapter import Adapter
from modeling_deepseek_moe.conversion._blocks import WIDE, CodesAndScales
from modeling_deepseek_moe.conversion._changes import Change, LowRank, Step, Tokens, Whole, round_once
from modeling_deepseek_moe.conversion._conversion import Conversion, Options, Output
from modeling_deepseek_moe.conversion._report import Report, Tally
from modeling_deepseek_moe.conversion._source import Source, as_is, quantization_of
from modeling_deepseek_moe.formats import FORMATS, split_scale, weight_name


class Weighted(NamedTuple):
    """A change of an adapter, and how much of it is wanted."""

    change: Change
    weight: float
    adapter: Path


def plan(source: Source, options: Options) -> Output:
    """The checkpoint with the adapters in it, one after the other, dtypes and config as they were.

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
    _refuse_foreign(source)
    source.check_scales_have_weights()
    changes: dict[str, list[Weighted]] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for name, own in adapter.changes(source).items():
            changes.setdefault(name, []).extend(Weighted(change, weight, adapter.folder) for change in own)
    for name, own in changes.items():
        _refuse_lost(name, own)
    specs = source.specs
    plans, report = [], Report()
    for info in source.reader.values():
        weight, suffix = split_scale(weight_name(info.name))
        own = changes.get(weight)
        if own is None or suffix in source.weight_format.others:
            report.untouched += own is None
            plans.append(as_is(source, info))
        elif suffix is None:
            part = specs[weight].part if weight in specs else "other"
            plans += _plans(source, info, weight, own, partial(Tally, part), report)
    return Output(
        plans,
        source.config,
        also_read=tuple(adapter.source for adapter in adapters),
        report=report.lines,
        decided_by=[adapter.config for adapter in adapters],
    )


def _refuse_foreign(source: Source) -> None:
    """
    Raises:
        CheckpointError: codes of a format that another library loads and writes.
    """
    announced = quantization_of(source.config)
    method = announced.get("quant_method") if isinstance(announced, dict) else None
    if method in {row.method for row in FORMATS if row.foreign}:
        raise CheckpointError(
            f"{source.folder / 'config.json'}: quantization_config: found quant_method={method!r}, wanted floating-point weights or "
            "a release's own codes: merge into the release that it was made of, and quantise what comes out "
            "with `deepseek-moe convert to-4bit`"
        )


def _plans(
    source: Source, info: TensorInfo, name: str, changes: list[Weighted], tally: Callable[[], Tally], report: Report
) -> list[TensorPlan]:
    """Of a weight that changes; of codes with their scales."""
    if source.is_codes(info):
        make = partial(_merge_codes, source, info, source.scale_of(info), changes, tally, report)
        shape = source.weight_format.value_shape(info.shape)
        return CodesAndScales(make).plans(name, shape, source.weight_format)[:2]
    if info.dtype in WIDE.values():
        return [TensorPlan(name, info.dtype, info.shape, partial(_merge, source, info, changes, tally, report))]
    raise CheckpointError(f"{info.file}: tensor {info.name}: found {DTYPE_NAMES[info.dtype]}, wanted floats")


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
    return [(change.begin(partial(_values, source, info), dtype), weight) for change, weight, _ in changes]


def _values(source: Source, info: TensorInfo) -> torch.Tensor:
    """All of a tensor in fp32."""
    if not source.is_codes(info):
        return source.read(info).float()
    scales = source.read_scale(source.scale_of(info))
    return source.weight_format.dequantize(source.read(info), scales, torch.float32)


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
    source: Source, info: TensorInfo, changes: list[Weighted], begin: Callable[[], Tally], report: Report
) -> Iterator[torch.Tensor]:
    steps, tally = _begin(changes, source, info, torch.float64), begin()
    for rows, tile in source.tiles(info):
        wanted = _changed(steps, tile.double(), rows, info)
        made = round_once(wanted, tile.dtype)
        if not torch.isfinite(made).all():
            raise CheckpointError(f"{info.file}: tensor {info.name}: found values beyond {tile.dtype} once merged")
        tally.add(wanted, tile, made)
        yield made
    report.keep(info.name, tally)


def _merge_codes(
    source: Source,
    info: TensorInfo,
    scale_info: TensorInfo,
    changes: list[Weighted],
    begin: Callable[[], Tally],
    report: Report,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    form, scales = source.weight_format, source.read_scale(scale_info)
    steps, tally = _begin(changes, source, info, torch.float32), begin()
    for rows, codes in source.tiles(info, form.block[0]):
        scale = scales[form.scale_rows(rows)]
        before = form.dequantize(codes, scale, torch.float32)
        wanted = _changed(steps, before, rows, info)
        codes, scale, changed = form.requantize(codes, scale, wanted)
        tally.add(wanted, before, form.dequantize(codes, scale, torch.float32), changed, form.block)
        yield codes, scale
    report.keep(info.name, tally)


CONVERSION = Conversion(
    "merge-adapter",
    plan,
    ("max_shard_size", "adapter", "weight"),
    required={"adapter": "a folder with adapter_config.json"},
    no_inverse="sums are rounded to the weights' dtype: what was added cannot be taken off to the bit",
)
