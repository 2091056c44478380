"""``bf16-to-fp8``: weights in FP8 codes with a scale for every block, as a release stores them."""

from collections.abc import Iterator

import torch
from modeling_deepseek_moe.conversion._blocks import WIDE, CodesAndScales, any_in_blocks, block_rows, with_dtype
from modeling_deepseek_moe.conversion._conversion import Conversion, Options, Output
from modeling_deepseek_moe.conversion._source import Source, as_is

from modeling_deepseek_moe.anatomy import read_config
from modeling_deepseek_moe.checkpoint.headers import DTYPE_NAMES, CheckpointError, TensorInfo
from modeling_deepseek_moe.checkpoint.writer import TensorPlan
from modeling_deepseek_moe.ops import block_fp8
from modeling_deepseek_moe.weights import release_tensors


def plan(source: Source, options: Options) -> Output:
    """Every weight that a release keeps in FP8 as codes and scales; those of the ``--scales-from`` release if given.

    Given scales must reproduce the weight bit for bit from its codes: those of another model are refused.
    """
    specs = release_tensors(read_config(source.folder))
    scales_from = Source(options.scales_from) if options.scales_from else None
    if scales_from is not None and scales_from.block != block_fp8.BLOCK:
        raise CheckpointError(f"{scales_from.folder}: found blocks of {scales_from.block}, wanted {block_fp8.BLOCK}")
    plans, found = [], 0
    for info in source.reader.values():
        spec = specs.get(info.name)
        if info.dtype == block_fp8.FP8_DTYPE:
            raise CheckpointError(f"{info.file}: tensor {info.name}: found FP8 already, wanted a wider dtype")
        if spec is None or not spec.quantized:
            plans.append(as_is(source, info))
            continue
        found += 1
        if info.shape != spec.shape or info.dtype not in WIDE.values():
            raise CheckpointError(
                f"{info.file}: tensor {info.name}: found {DTYPE_NAMES[info.dtype]} {list(info.shape)}, wanted "
                f"BF16, F16 or F32 {list(spec.shape)} to quantise"
            )
        plans += _codes_and_scales(source, info, scales_from)
    if not found:
        raise CheckpointError(f"{source.folder}: found no weight that a release keeps in FP8")
    also_read = () if scales_from is None else (scales_from,)
    return Output(plans, with_dtype(source.config, "bfloat16", fp8=True), also_read)


def _codes_and_scales(source: Source, info: TensorInfo, given: Source | None) -> list[TensorPlan]:
    if given is None:
        step = block_fp8.BLOCK[0]
        return CodesAndScales(lambda: (quantize(tile) for _, tile in source.tiles(info, step))).plans(info)
    if info.name not in given.reader:
        raise CheckpointError(f"{given.folder}: tensor {info.name}: found absent, wanted it with its scales")
    weight = given.reader[info.name]
    if weight.dtype != block_fp8.FP8_DTYPE or weight.shape != info.shape:
        raise CheckpointError(
            f"{weight.file}: tensor {info.name}: found {DTYPE_NAMES[weight.dtype]} {list(weight.shape)}, "
            f"wanted F8_E4M3 {list(info.shape)} as in {info.file}"
        )
    scale = given.scale_of(weight)

    def make() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        values = given.read_scale(scale)
        for rows, tile in source.tiles(info, block_fp8.BLOCK[0]):
            part = values[block_rows(rows, block_fp8.BLOCK)]
            yield quantize_with(tile, part, f"{info.file}: tensor {info.name}: from row {rows.start}"), part

    return CodesAndScales(make).plans(info)


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales; those that an fp32 ``weight`` was dequantised from, if it was.

    fp32 rounds 448·s, so amax / 448 may miss s by its last bit. A neighbour that gives every value of the block back
    is s.
    """
    codes, scales = block_fp8.quantize(weight)
    if weight.dtype != torch.float32:
        return codes, scales
    for limit in (torch.inf, 0.0):
        apart = any_in_blocks(block_fp8.dequantize(codes, scales, torch.float32) != weight, block_fp8.BLOCK)
        if not apart.any():
            break
        others = torch.nextafter(scales, torch.tensor(limit))
        differ = any_in_blocks(block_fp8.dequantize(codes, others, torch.float32) != weight, block_fp8.BLOCK)
        scales = torch.where(apart & ~differ, others, scales)
    return codes, scales


def quantize_with(weight: torch.Tensor, scale: torch.Tensor, where: str) -> torch.Tensor:
    """The codes that, times these scales, are ``weight`` to the bit.

    Raises:
        CheckpointError: there are none: the weight was not made from these scales.
    """
    codes = torch.empty(weight.shape, dtype=block_fp8.FP8_DTYPE)
    step = block_fp8.BLOCK[0]
    columns = scale.repeat_interleave(block_fp8.BLOCK[1], dim=1)[:, : weight.shape[1]]
    for row in range(scale.shape[0]):
        rows = slice(row * step, (row + 1) * step)
        codes[rows] = (weight[rows].float() / columns[row]).clamp_(-448, 448).to(block_fp8.FP8_DTYPE)
    again = block_fp8.dequantize(codes, scale, weight.dtype)
    if not torch.equal(again.view(torch.uint8), weight.contiguous().view(torch.uint8)):
        at = (again != weight).nonzero()[:1].tolist()
        raise CheckpointError(
            f"{where}: found values (first at {at}) that no FP8 code gives with these scales, "
            "wanted a weight dequantised from them"
        )
    return codes


CONVERSION = Conversion(
    "bf16-to-fp8",
    plan,
    ("max_shard_size", "scales_from"),
    no_inverse="E4M3 keeps 3 bits of a mantissa: what rounding took is gone, unless the weights came from FP8",
)
