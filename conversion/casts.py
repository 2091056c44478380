"""Between FP8 in blocks and wider dtypes, and shards of another size."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from modeling_deepseek_moe.conversion._source import Source, as_is

from modeling_deepseek_moe.anatomy import read_config
from modeling_deepseek_moe.checkpoint.headers import DTYPE_NAMES, CheckpointError, TensorInfo
from modeling_deepseek_moe.checkpoint.writer import TensorPlan
from modeling_deepseek_moe.ops import block_fp8
from modeling_deepseek_moe.saving import fp8_quantization_config
from modeling_deepseek_moe.weights import SCALE_SUFFIX, release_tensors

WIDE = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def with_dtype(config: dict, dtype: str, *, fp8: bool = False) -> dict:
    """The config with ``torch_dtype`` and ``quantization_config`` of what is written, all else as it was."""
    config = {key: value for key, value in config.items() if key not in ("quantization_config", "dtype")}
    config["torch_dtype"] = dtype
    return config | ({"quantization_config": fp8_quantization_config()} if fp8 else {})


class CodesAndScales:
    """An FP8 weight and its scales, made in one go though they are written one after the other.

    ``make`` yields both for a range of rows at a time. The scales wait while codes are written; they are made again
    if their turn comes in another run.
    """

    def __init__(self, make: Callable[[], Iterator[tuple[torch.Tensor, torch.Tensor]]]):
        self._make, self._waiting = make, []

    def _codes(self) -> Iterator[torch.Tensor]:
        made = []
        for codes, scales in self._make():
            made.append(scales)
            yield codes
        self._waiting.append(torch.cat(made))

    def _scales(self) -> torch.Tensor:
        return self._waiting.pop() if self._waiting else torch.cat([scales for _, scales in self._make()])

    def plans(self, info: TensorInfo, block: tuple[int, int] = block_fp8.BLOCK) -> list[TensorPlan]:
        shape = block_fp8.scale_shape(info.shape, block)
        return [
            TensorPlan(info.name, block_fp8.FP8_DTYPE, info.shape, self._codes),
            TensorPlan(info.name + SCALE_SUFFIX, torch.float32, shape, self._scales),
        ]


def block_rows(rows: slice, block: tuple[int, int]) -> slice:
    """The rows of scales that belong to a range of rows of a weight."""
    return slice(rows.start // block[0], -(-rows.stop // block[0]))


def reshard(source: Source) -> tuple[list[TensorPlan], dict]:
    """Every tensor, byte for byte."""
    return [as_is(source, info) for info in source.reader.values()], source.config


def dequantized(source: Source, dtype: str = "bfloat16") -> tuple[list[TensorPlan], dict]:
    """FP8 weights in ``dtype``, their scales gone; everything else as it was."""
    source.check_scales_have_weights()

    def produce(info: TensorInfo, scale_info: TensorInfo) -> Iterator[torch.Tensor]:
        scale = source.read_scale(scale_info)
        for rows, codes in source.tiles(info, source.block[0]):
            part = scale[block_rows(rows, source.block)]
            wide = block_fp8.dequantize(codes, part, WIDE[dtype], source.block)
            # E4M3 times an fp32 scale fits bf16 and fp32, but for scales that no release has; fp16 ends at 65504
            if dtype == "float16" and not torch.isfinite(wide).all():
                raise CheckpointError(
                    f"{info.file}: tensor {info.name}: found NaN, or values beyond the range of {dtype}"
                )
            yield wide

    plans, found = [], 0
    for info in source.reader.values():
        if info.dtype == block_fp8.FP8_DTYPE:
            found += 1
            scale = source.scale_of(info)
            plans.append(TensorPlan(info.name, WIDE[dtype], info.shape, partial(produce, info, scale)))
        elif not info.name.endswith(SCALE_SUFFIX):
            plans.append(as_is(source, info))
    if not found:
        raise CheckpointError(f"{source.folder}: found no {block_fp8.FP8_DTYPE} tensor, wanted an FP8 checkpoint")
    return plans, with_dtype(source.config, dtype)


def quantized(source: Source, scales_from: Source | None = None) -> tuple[list[TensorPlan], dict]:
    """Every weight that a release keeps in FP8 as codes and scales; with ``scales_from``, with that release's scales.

    Given scales must reproduce the weight bit for bit from its codes: those of another model are refused.
    """
    specs = release_tensors(read_config(source.folder))
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
    return plans, with_dtype(source.config, "bfloat16", fp8=True)


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


def any_in_blocks(mask: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """``[N, K]`` → ``[⌈N/bN⌉, ⌈K/bK⌉]``: whether any element of a block is set."""
    n, k = mask.shape
    padded = torch.nn.functional.pad(mask, (0, -k % block[1], 0, -n % block[0]))
    return padded.unflatten(1, (-1, block[1])).any(2).unflatten(0, (-1, block[0])).any(1)


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


def cast(source: Source, dtype: str) -> tuple[list[TensorPlan], dict]:
    """Floating-point tensors in ``dtype``; the router's correction bias stays fp32. Overflow is an error."""

    def produce(info: TensorInfo) -> Iterator[torch.Tensor]:
        for _, tensor in source.tiles(info):
            narrow = tensor.to(WIDE[dtype])
            if not torch.equal(torch.isfinite(narrow), torch.isfinite(tensor)):
                raise CheckpointError(f"{info.file}: tensor {info.name}: found values beyond the range of {dtype}")
            yield narrow

    plans = []
    for info in source.reader.values():
        if info.dtype == block_fp8.FP8_DTYPE or info.name.endswith(SCALE_SUFFIX):
            raise CheckpointError(
                f"{info.file}: tensor {info.name}: found part of an FP8 checkpoint, wanted fp8-to-bf16 for it"
            )
        if info.dtype in WIDE.values() and not info.name.endswith(".e_score_correction_bias"):
            plans.append(TensorPlan(info.name, WIDE[dtype], info.shape, partial(produce, info)))
        else:
            plans.append(as_is(source, info))
    return plans, with_dtype(source.config, dtype)
