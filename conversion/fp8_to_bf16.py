"""``fp8-to-bf16``: FP8 codes times their scales, as bf16, fp16 or fp32."""

from collections.abc import Iterator
from functools import partial

import torch
from modeling_deepseek_moe.conversion._blocks import block_rows, wide_dtype, with_dtype
from modeling_deepseek_moe.conversion._conversion import Conversion, Options, Output
from modeling_deepseek_moe.conversion._source import Source, as_is

from modeling_deepseek_moe.checkpoint.headers import CheckpointError, TensorInfo
from modeling_deepseek_moe.checkpoint.writer import TensorPlan
from modeling_deepseek_moe.ops import block_fp8
from modeling_deepseek_moe.weights import SCALE_SUFFIX


def plan(source: Source, options: Options) -> Output:
    """FP8 weights in ``--dtype``, their scales gone; everything else as it was."""
    name = options.dtype or "bfloat16"
    dtype = wide_dtype(name)
    source.check_scales_have_weights()

    def produce(info: TensorInfo, scale_info: TensorInfo) -> Iterator[torch.Tensor]:
        scale = source.read_scale(scale_info)
        for rows, codes in source.tiles(info, source.block[0]):
            part = scale[block_rows(rows, source.block)]
            wide = block_fp8.dequantize(codes, part, dtype, source.block)
            # E4M3 times an fp32 scale fits bf16 and fp32, but for scales that no release has; fp16 ends at 65504
            if dtype == torch.float16 and not torch.isfinite(wide).all():
                raise CheckpointError(
                    f"{info.file}: tensor {info.name}: found NaN, or values beyond the range of {name}"
                )
            yield wide

    plans, found = [], 0
    for info in source.reader.values():
        if info.dtype == block_fp8.FP8_DTYPE:
            found += 1
            scale = source.scale_of(info)
            plans.append(TensorPlan(info.name, dtype, info.shape, partial(produce, info, scale)))
        elif not info.name.endswith(SCALE_SUFFIX):
            plans.append(as_is(source, info))
    if not found:
        raise CheckpointError(f"{source.folder}: found no {block_fp8.FP8_DTYPE} tensor, wanted an FP8 checkpoint")
    return Output(plans, with_dtype(source.config, name))


# the codes come back by themselves from fp32; from bf16, which rounds, with --scales-from the same release
CONVERSION = Conversion("fp8-to-bf16", plan, ("max_shard_size", "dtype"), inverse="bf16-to-fp8")
