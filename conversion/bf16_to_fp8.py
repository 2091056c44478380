"""``bf16-to-fp8``: weights as codes with a scale for every block, as a release stores them; FP8 or another format."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from modeling_deepseek_moe import formats
from modeling_deepseek_moe.anatomy import read_config
from modeling_deepseek_moe.checkpoint.headers import DTYPE_NAMES, CheckpointError, TensorInfo
from modeling_deepseek_moe.config import DeepseekMoeConfig
from modeling_deepseek_moe.conversion._blocks import WIDE, CodesAndScales, check_head, with_dtype
from modeling_deepseek_moe.conversion._conversion import Conversion, Options, Output
from modeling_deepseek_moe.conversion._source import Source, as_is, quantization_of
from modeling_deepseek_moe.formats import WeightFormat
from modeling_deepseek_moe.formats.announcements import head_has_codes
from modeling_deepseek_moe.formats.blocks import any_in_blocks
from modeling_deepseek_moe.weights import HEAD_KEY


def plan(source: Source, options: Options) -> Output:
    """Every weight that a release keeps in FP8 as codes and scales; those of the ``--scales-from`` release if given.

    Given scales must reproduce the weight bit for bit from its codes: those of another model are refused.
    """
    config = read_config(source.folder)
    specs = source.specs
    given = Source(options.scales_from) if options.scales_from else None
    with_head = _with_head(source, config, options, given)
    form = _form(options, given, source)
    plans, found = [], 0
    for info in source.reader.values():
        spec = specs.get(info.name)
        if (row := next(formats.of_codes(info.dtype), None)) is not None:
            raise CheckpointError(f"{info.file}: tensor {info.name}: found {row.title} already, wanted a wider dtype")
        if spec is None or not (spec.quantized or (with_head and HEAD_KEY.match(info.name))):
            plans.append(as_is(source, info))
            continue
        found += 1
        if info.shape != spec.shape or info.dtype not in WIDE.values():
            raise CheckpointError(
                f"{info.file}: tensor {info.name}: found {DTYPE_NAMES[info.dtype]} {list(info.shape)}, wanted "
                f"BF16, F16 or F32 {list(spec.shape)} to quantise"
            )
        make = partial(_made, source, info, form) if given is None else _reproduced(source, info, given)
        plans += CodesAndScales(make).plans(info.name, info.shape, form)
    if not found:
        raise CheckpointError(f"{source.folder}: found no weight that a release keeps in FP8")
    announced = form.quantization_config(with_head=with_head) if given is None else quantization_of(given.config)
    return Output(plans, with_dtype(source.config, "bfloat16", announced), () if given is None else (given,))


def _with_head(source: Source, config: DeepseekMoeConfig, options: Options, given: Source | None) -> bool:
    """Whether the head becomes codes too: it is asked for, or the ``--scales-from`` release has it so.

    Raises:
        ValueError: ``--head`` is not fp8, or there is no head of its own.
    """
    if options.head not in (None, "fp8"):
        raise ValueError(f"--head {options.head} is not known, wanted fp8")
    check_head(source, config, options)
    if given is None:
        return options.head is not None
    if options.head is not None:
        raise ValueError("--head goes without --scales-from, whose release says which weights are codes")
    return head_has_codes(quantization_of(given.config))


def _form(options: Options, given: Source | None, source: Source) -> WeightFormat:
    """The format that is asked for: ``--format``, or that of ``--scales-from``, or what the weights came from, or FP8.

    Raises:
        ValueError: there is none of that name.
        CheckpointError: ``--scales-from`` has another, or no scales.
    """
    try:
        wanted = None if options.format is None else formats.by_name(options.format)
    except ValueError as error:
        raise ValueError(f"--format {error}") from None
    if given is None:
        return wanted or formats.remembered(source.config.get(formats.RELEASED), formats.FP8)
    form = given.weight_format
    if form.encode_with is None or not quantization_of(given.config) or wanted not in (None, form):
        raise CheckpointError(
            f"{given.folder}: found {form.name}, wanted {wanted.name if wanted else 'a release with scales to take'}"
        )
    return form


def _made(source: Source, info: TensorInfo, form: WeightFormat) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for _, tile in source.tiles(info, form.block[0]):
        yield quantize(tile, form)


def _reproduced(source: Source, info: TensorInfo, given: Source) -> Callable:
    """Codes and scales by the scales of another folder, whose headers are checked now."""
    form = given.weight_format
    weight = given.holding(info.name)
    if weight is None:
        raise CheckpointError(f"{given.folder}: tensor {info.name}: found absent, wanted it with its scales")
    if weight.dtype != form.code_dtype or weight.shape != form.code_shape(info.shape):
        raise CheckpointError(
            f"{weight.file}: tensor {info.name}: found {DTYPE_NAMES[weight.dtype]} {list(weight.shape)}, "
            f"wanted {DTYPE_NAMES[form.code_dtype]} {list(form.code_shape(info.shape))} as in {info.file}"
        )
    scale = given.scale_of(weight)

    def make() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        values = given.read_scale(scale)
        for rows, tile in source.tiles(info, form.block[0]):
            part = values[form.scale_rows(rows)]
            yield quantize_with(tile, part, form, f"{info.file}: tensor {info.name}: from row {rows.start}"), part

    return make


def quantize(weight: torch.Tensor, form: WeightFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales; those that an fp32 ``weight`` was dequantised from, if it was.

    fp32 rounds 448·s, so amax / 448 may miss s by its last bit. A neighbour that gives every value of the block back
    is s.
    """
    codes, scales = form.quantize(weight)
    if weight.dtype != torch.float32 or scales.dtype != torch.float32:
        return codes, scales
    for limit in (torch.inf, 0.0):
        apart = any_in_blocks(form.dequantize(codes, scales, torch.float32) != weight, form.block)
        if not apart.any():
            break
        others = torch.nextafter(scales, torch.tensor(limit))
        differ = any_in_blocks(form.dequantize(codes, others, torch.float32) != weight, form.block)
        scales = torch.where(apart & ~differ, others, scales)
    return codes, scales


def quantize_with(weight: torch.Tensor, scale: torch.Tensor, form: WeightFormat, where: str) -> torch.Tensor:
    """The codes that, times these scales, are ``weight`` to the bit.

    Raises:
        CheckpointError: there are none: the weight was not made from these scales.
    """
    codes = form.encode_with(weight, scale, form.block)
    again = form.dequantize(codes, scale, weight.dtype)
    if not torch.equal(again.view(torch.uint8), weight.contiguous().view(torch.uint8)):
        at = (again != weight).nonzero()[:1].tolist()
        raise CheckpointError(
            f"{where}: found values (first at {at}) that no {form.title} code gives with these scales, "
            "wanted a weight dequantised from them"
        )
    return codes


CONVERSION = Conversion(
    "bf16-to-fp8",
    plan,
    ("max_shard_size", "scales_from", "format", "head"),
    no_inverse="E4M3 keeps 3 bits of a mantissa: what rounding took is gone, unless the weights came from FP8",
)
