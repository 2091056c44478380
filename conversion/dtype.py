"""``dtype``: a checkpoint without codes in another floating-point dtype."""

from collections.abc import Iterator
from functools import partial

import torch

from modeling_deepseek_moe import formats
from modeling_deepseek_moe.checkpoint.headers import CheckpointError, TensorInfo
from modeling_deepseek_moe.checkpoint.writer import TensorPlan
from modeling_deepseek_moe.conversion._blocks import WIDE, wide_dtype, with_dtype
from modeling_deepseek_moe.conversion._conversion import Conversion, Options, Output
from modeling_deepseek_moe.conversion._source import Source, as_is


def plan(source: Source, options: Options) -> Output:
    """Floating-point tensors in ``--dtype``; the router's correction bias stays fp32. Overflow is an error."""
    dtype = wide_dtype(options.dtype)

    def produce(info: TensorInfo) -> Iterator[torch.Tensor]:
        for _, tensor in source.tiles(info):
            narrow = tensor.to(dtype)
            if not torch.equal(torch.isfinite(narrow), torch.isfinite(tensor)):
                raise CheckpointError(
                    f"{info.file}: tensor {info.name}: found values beyond the range of {options.dtype}"
                )
            yield narrow

    plans = []
    for info in source.reader.values():
        row = next(formats.of_codes(info.dtype), None)
        if row is not None or formats.split_scale(info.name)[1]:
            raise CheckpointError(
                f"{info.file}: tensor {info.name}: found part of an {(row or source.weight_format).title} checkpoint, wanted fp8-to-bf16 for it"
            )
        if info.dtype in WIDE.values() and not info.name.endswith(".e_score_correction_bias"):
            plans.append(TensorPlan(info.name, dtype, info.shape, partial(produce, info)))
        else:
            plans.append(as_is(source, info))
    return Output(plans, with_dtype(source.config, options.dtype))


CONVERSION = Conversion(
    "dtype",
    plan,
    ("max_shard_size", "dtype"),
    required={"dtype": "such as --dtype float32"},
    no_inverse="a narrower dtype rounds; tensors of several dtypes become one",
)
