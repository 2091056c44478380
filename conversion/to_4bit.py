"""``to-4bit``: a release in bf16 or FP8 with its linear layers in INT4 groups of 32, or in NF4 as bitsandbytes writes it.

Each weight is read, quantised and written by itself; FP8 is quantised from the fp32 values of codes × scales.
"""

from collections.abc import Iterator
from functools import partial

import torch

from modeling_deepseek_moe import formats
from modeling_deepseek_moe.anatomy import read_config
from modeling_deepseek_moe.checkpoint.headers import DTYPE_NAMES, CheckpointError, TensorInfo
from modeling_deepseek_moe.checkpoint.writer import TensorPlan
from modeling_deepseek_moe.conversion._blocks import WIDE, CodesAndScales, check_head, with_dtype
from modeling_deepseek_moe.conversion._conversion import Conversion, Options, Output
from modeling_deepseek_moe.conversion._errors import WeightErrors
from modeling_deepseek_moe.conversion._source import Source, as_is
from modeling_deepseek_moe.formats import WeightFormat
from modeling_deepseek_moe.formats.announcements import with_group
from modeling_deepseek_moe.weights import HEAD_KEY, TensorSpec, linear_modules

PARTS = {
    "attention": "attention",
    "dense": "dense",
    "shared": "shared experts",
    "routed": "routed experts",
    "mtp": "mtp",
}
HEADS = ("fp8", "4bit")


def plan(source: Source, options: Options) -> Output:
    """Every weight that a release keeps in FP8 as four-bit codes, but for parts to keep and rows of no whole groups.

    Raises:
        ValueError: an unknown ``--format`` or part, or parts that leave nothing to quantise.
        CheckpointError: weights that have four bits already, or are not of the config's shape.
    """
    config, forms, errors = read_config(source.folder), _Forms(options), WeightErrors()
    check_head(source, config, options)
    specs = source.specs
    source.check_scales_have_weights()
    plans, found = [], 0
    for info in source.reader.values():
        if formats.split_scale(info.name)[1] is not None:
            continue  # goes with its weight
        name = formats.weight_name(info.name)
        spec = specs.get(name)
        if spec is None or not (spec.quantized or forms.of(name, spec)):
            plans.append(as_is(source, info))
            continue
        own, form = source.format_of(info), forms.of(name, spec)
        _check(info, spec, own)
        found += form is forms.four
        if form is None and own is None:
            plans.append(as_is(source, info))
        elif form is None:
            plans.append(TensorPlan(name, torch.bfloat16, spec.shape, partial(_wide, source, info)))
        elif own is not None and (own.code_dtype, own.block) == (form.code_dtype, form.block):
            plans += as_is(source, info), as_is(source, source.scale_of(info), name + form.scale_suffix)
        else:
            make = partial(_quantized, source, info, form, errors, spec.part)
            plans += CodesAndScales(make).plans(name, spec.shape, form)
    if not found:
        groups = f"rows of whole groups of {forms.four.block[1]}"
        raise CheckpointError(f"{source.folder}: found no weight to quantise in {groups}, wanted some")
    return Output(plans, with_dtype(source.config, "bfloat16", forms.announced(config)), report=errors.lines)


class _Forms:
    """Which format each weight gets: ``four``, FP8 where parts are to be kept so, or ``None``, bf16."""

    def __init__(self, options: Options):
        known = [row.name for row in formats.FORMATS if row.bits == 4]
        if options.format not in known:
            raise ValueError(f"--format {options.format} is not known, wanted one of {', '.join(known)}")
        self.four, self.eight = formats.by_name(options.format), formats.by_name("fp8_block")
        self._wide, self._fp8 = _parts(options.keep, "--keep"), _parts(options.keep_fp8, "--keep-fp8")
        if self._fp8 and self.four.method != self.eight.method:
            raise ValueError(
                f"--keep-fp8 {options.keep_fp8} goes with --format int4: a config of {self.four.name} announces no second "
                "format; --keep leaves parts in bf16"
            )
        self._head = dict(zip(HEADS, (self.eight, self.four), strict=True)).get(options.head)
        if options.head not in (None, *HEADS):
            raise ValueError(f"--head {options.head} is not known, wanted one of {', '.join(HEADS)}")
        if self._head is not None and self._head.method != self.four.method:
            raise ValueError(
                f"--head {options.head} goes with --format int4: a config of {self.four.name} announces no second format; "
                "--head 4bit has the head in the format of the rest"
            )
        if both := self._wide & self._fp8:
            raise ValueError(f"--keep and --keep-fp8 both name {min(both)}, wanted it in one of them")

    def of(self, name: str, spec: TensorSpec) -> WeightFormat | None:
        if HEAD_KEY.match(name):
            return self._head if self._head is not None and self._head.fits(spec.shape) else None
        if not spec.quantized or spec.part in self._wide:
            return None
        if spec.part in self._fp8:
            return self.eight
        return self.four if self.four.fits(spec.shape) else None

    def announced(self, config) -> dict:
        """The ``quantization_config`` of such a release."""
        wide = linear_modules(config, lambda name, spec: self.of(name, spec) is None)
        fields = self.four.quantization_config(wide, with_head=self._head is not None)
        fp8 = linear_modules(config, lambda name, spec: self.of(name, spec) is self.eight)
        return with_group(fields, self.eight.quantization_config(), fp8) if fp8 else fields


def _parts(text: str | None, option: str) -> set[str]:
    """``attention,shared`` → the parts as `TensorSpec` has them."""
    names = [name.strip() for name in (text or "").split(",") if name.strip()]
    for name in names:
        if name not in PARTS:
            raise ValueError(f"{option} {name} is not known, wanted some of {','.join(PARTS)}")
    return {PARTS[name] for name in names}


def _check(info: TensorInfo, spec: TensorSpec, own: WeightFormat | None) -> None:
    has_values = info.dtype in WIDE.values() or (own is not None and own.bits > 4)
    if not has_values or (own.value_shape(info.shape) if own else info.shape) != spec.shape:
        raise CheckpointError(
            f"{info.file}: tensor {info.name}: found {DTYPE_NAMES[info.dtype]} {list(info.shape)}, wanted "
            f"{list(spec.shape)} in FP8, BF16, F16 or F32 to quantise"
        )


def _quantized(
    source: Source, info: TensorInfo, form: WeightFormat, errors: WeightErrors, part: str
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for _, values in source.value_tiles(info, form.block[0]):
        codes, scales = form.quantize(values)
        errors.add(part, values, form.dequantize(codes, scales, torch.float32))
        yield codes, scales


def _wide(source: Source, info: TensorInfo) -> Iterator[torch.Tensor]:
    return (values.to(torch.bfloat16) for _, values in source.value_tiles(info))


CONVERSION = Conversion(
    "to-4bit",
    plan,
    ("max_shard_size", "format", "keep", "keep_fp8", "head"),
    required={"format": "such as --format int4"},
    no_inverse="four bits keep one of sixteen values: fp8-to-bf16 gives what the codes stand for",
)
