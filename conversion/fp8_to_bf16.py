"""``fp8-to-bf16``: the weights that FP8 codes, or those of any other format, stand for, as bf16, fp16 or fp32."""

from collections.abc import Iterator
from functools import partial

import torch

from modeling_deepseek_moe import formats
from modeling_deepseek_moe.checkpoint.headers import CheckpointError, TensorInfo
from modeling_deepseek_moe.checkpoint.writer import TensorPlan
from modeling_deepseek_moe.conversion._blocks import wide_dtype, with_dtype
from modeling_deepseek_moe.conversion._conversion import Conversion, Options, Output
from modeling_deepseek_moe.conversion._source import Source, as_is
from modeling_deepseek_moe.formats import WeightFormat


def plan(source: Source, options: Options) -> Output:
    """Quantised weights in ``--dtype``, their scales gone; everything else as it was."""
    first = source.weight_format
    name = options.dtype or "bfloat16"
    dtype = wide_dtype(name)
    source.check_scales_have_weights()

    def produce(info: TensorInfo, form: WeightFormat, scale_info: TensorInfo) -> Iterator[torch.Tensor]:
        scale = source.read_scale(scale_info)
        for rows, codes in source.tiles(info, form.block[0]):
            wide = form.dequantize(codes, scale[form.scale_rows(rows)], dtype)
            # codes times an fp32 scale fit bf16 and fp32, but for scales that no release has; fp16 ends at 65504
            if dtype == torch.float16 and not torch.isfinite(wide).all():
                raise CheckpointError(
                    f"{info.file}: tensor {info.name}: found NaN, or values beyond the range of {name}"
                )
            yield wide

    plans, found = [], 0
    for info in source.reader.values():
        form = source.format_of(info)
        if form is not None:
            found += 1
            make = partial(produce, info, form, source.scale_of(info))
            plans.append(TensorPlan(formats.weight_name(info.name), dtype, form.value_shape(info.shape), make))
        elif formats.split_scale(info.name)[1] is None:
            plans.append(as_is(source, info))
    if not found:
        raise CheckpointError(
            f"{source.folder}: found no {first.code_dtype} tensor, wanted an {first.title} checkpoint"
        )
    return Output(plans, with_dtype(source.config, name) | formats.memory(first))


# the codes come back by themselves from fp32; from bf16, which rounds, with --scales-from the same release
CONVERSION = Conversion("fp8-to-bf16", plan, ("max_shard_size", "dtype"), inverse="bf16-to-fp8")
