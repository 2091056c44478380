"""The weight formats: how a weight ``[N, K]`` is stored as codes with a scale for each block of them.

A format is a row of `FORMATS`. Layers, experts, streaming, saving, conversion and planning read the row and know no
format by name; what the CPU engine has kernels for it runs, and the rest is computed as `ops.quantized_linear` defines it.

| row | codes | block | scales | rule |
|---|---|---|---|---|
| ``fp8`` | E4M3 | 128 × 128 | fp32 | amax / 448 |
| ``fp8_ue8m0`` | E4M3 | 128 × 128 | fp32, powers of two | 2^⌈log2(amax / 448)⌉ |
| ``int4`` | -8 to 7, eight to an int32 | 1 × 32 | bf16 | amax / 7.5 |
| ``mxfp4`` | E2M1, two to a byte | 1 × 32 | E8M0 | 2^(⌊log2 amax⌋ - 2) |
| ``nf4``, ``fp4`` | bitsandbytes', two to a byte | 1 × 64 | fp32 | amax |

A weight is two tensors in memory, codes and scales. On the disk it is these, under names of the format's own, and what
else the format wants to be there: tensors that follow from the weight's shape.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from modeling_deepseek_moe.formats import quant_state
from modeling_deepseek_moe.formats.announcements import (
    BLOCK,
    COMPRESSED_TENSORS,
    NO_CODES,
    compressed_tensors,
    schemes,
)
from modeling_deepseek_moe.formats.row import WeightFormat
from modeling_deepseek_moe.ops import block_fp8, four_bit
from modeling_deepseek_moe.ops.four_bit import product

MAX_BLOCK = 1 << 20

FP8 = WeightFormat(
    name="fp8",
    method="fp8",
    fields={"activation_scheme": "dynamic", "fmt": "e4m3"},
    implied={"expert_dtype": "fp8"},
    code_dtype=torch.float8_e4m3fn,
    bits=8,
    block=block_fp8.BLOCK,
    scale_dtype=torch.float32,
    scale_suffix="_scale_inv",
    encode=block_fp8.quantize,
    decode=block_fp8.dequantize,
    kernel="block_fp8",
    linear=block_fp8.linear,
    find_scales=block_fp8.scales,
    encode_with=block_fp8.quantize_with,
    nan_code=0x7F,
)


def _of_kind(kind: str) -> dict[str, Any]:
    """What a row of four bits computes with; ``kind`` is one of `four_bit.KINDS`, and names the engine's kernels."""
    own = {name: partial(getattr(four_bit, name), kind=kind) for name in ("encode", "encode_with")}
    own |= {name: partial(getattr(product, name), kind=kind) for name in ("decode", "linear")}
    return {**own, "kernel": kind}


# Kimi-K2-Thinking's experts, K2.5's: compressed-tensors' pack-quantized
INT4 = WeightFormat(
    name="int4",
    method=COMPRESSED_TENSORS,
    fields={"format": "pack-quantized", "num_bits": 4, "type": "int", "strategy": "group", "symmetric": True},
    implied={"activations": NO_CODES, "actorder": None},
    code_dtype=torch.int32,
    bits=4,
    block=(1, four_bit.INT4.group),
    scale_dtype=torch.bfloat16,
    scale_suffix="_scale",
    **_of_kind("int4"),
    code_suffix="_packed",
    others={"_shape": partial(torch.tensor, dtype=torch.int32, device="cpu")},
    whole_groups=True,
    announce=compressed_tensors,
)
NF4 = replace(
    INT4,
    name="nf4",
    method="bitsandbytes",
    fields={"bnb_4bit_quant_type": "nf4"},
    implied={"load_in_8bit": False, "bnb_4bit_use_double_quant": False, "bnb_4bit_quant_storage": "uint8"},
    code_dtype=torch.uint8,
    block=(1, four_bit.NF4.group),
    scale_dtype=torch.float32,
    scale_suffix=".absmax",
    **_of_kind("nf4"),
    code_suffix="",
    others=quant_state.others("nf4"),
    in_a_column=True,
    announce=partial(quant_state.announce, "nf4"),
    foreign=True,
)
FORMATS = (
    FP8,
    replace(
        FP8,
        name="fp8_ue8m0",
        fields={**FP8.fields, "scale_fmt": "ue8m0"},
        encode=partial(block_fp8.quantize, power_of_two=True),
        find_scales=partial(block_fp8.scales, power_of_two=True),
    ),
    INT4,
    # what FP8 is called where others of a release's weights are INT4
    replace(
        FP8,
        name="fp8_block",
        method=COMPRESSED_TENSORS,
        fields={"format": "float-quantized", "num_bits": 8, "type": "float", "strategy": "block", "symmetric": True},
        implied=INT4.implied,
        scale_suffix="_scale",
        announce=compressed_tensors,
    ),
    # its names and its announcement are this package's, for releases to come
    replace(
        INT4,
        name="mxfp4",
        method="mx",
        fields={"fmt": "e2m1", "scale_fmt": "ue8m0"},
        implied={},
        code_dtype=torch.uint8,
        block=(1, four_bit.MXFP4.group),
        scale_dtype=torch.float8_e8m0fnu,
        **_of_kind("mxfp4"),
        code_suffix="",
        others={},
        announce=None,
    ),
    NF4,
    replace(
        NF4,
        name="fp4",
        fields={"bnb_4bit_quant_type": "fp4"},
        **_of_kind("fp4"),
        others=quant_state.others("fp4"),
        announce=partial(quant_state.announce, "fp4"),
    ),
)


def by_name(name: str) -> WeightFormat:
    """The row of that name.

    Raises:
        ValueError: there is none.
    """
    for row in FORMATS:
        if row.name == name:
            return row
    raise ValueError(f"{name!r} is not supported, wanted {' or '.join(repr(row.name) for row in FORMATS)}")


def methods() -> tuple[str, ...]:
    """Every ``quant_method`` of the table that this package loads."""
    return tuple(dict.fromkeys(row.method for row in FORMATS if not row.foreign))


# A config's memory of the row that its weights were dequantised from, where that is not the first of its method.
RELEASED = "released_weight_format"


def memory(row: WeightFormat) -> dict[str, str]:
    """What a config that loses its ``quantization_config`` keeps of it, so that weights go back into the row they came from."""
    first = next(other for other in FORMATS if other.method == row.method)
    return {} if row.name == first.name else {RELEASED: row.name}


def remembered(name: object, wanted: WeightFormat) -> WeightFormat:
    """The row called ``name``, a config's memory, if it has ``wanted``'s method; else ``wanted``."""
    return next((row for row in FORMATS if row.name == name and row.method == wanted.method), wanted)


def of_config(fields: Mapping | None) -> WeightFormat | None:
    """The format that a release's ``quantization_config`` announces, of several the first; ``None`` if there is none.

    Raises:
        ValueError: as `all_of_config`.
    """
    return next(iter(all_of_config(fields)), None)


def all_of_config(fields: Mapping | None) -> tuple[WeightFormat, ...]:
    """The formats that a release's ``quantization_config`` announces, each in its blocks, as `announcements.schemes` has them.

    Raises:
        ValueError: no row has it; names the field, what was found and what is supported.
    """
    if not fields:
        return ()
    rows = [row for row in FORMATS if row.method == fields.get("quant_method") and not row.foreign]
    if not rows:
        known = " or ".join(repr(method) for method in sorted(methods()))
        raise ValueError(
            f"quantization_config: quant_method={str(fields.get('quant_method'))[:80]!r} is not supported, only {known}"
        )
    return tuple(_of_scheme(scheme, rows) for scheme in schemes(fields))


def foreign_of_config(fields: Mapping | None) -> WeightFormat | None:
    """The row that transformers' own quantiser loads, such as bitsandbytes' NF4; ``None`` where this package's does.

    Raises:
        ValueError: a kind of that quantiser's that is no row: 8 bits, scales that are quantised once more.
    """
    rows = [row for row in FORMATS if row.foreign and fields and row.method == fields.get("quant_method")]
    return _of_scheme(fields or {}, rows) if rows else None


def _of_scheme(fields: Mapping, rows: Sequence[WeightFormat]) -> WeightFormat:
    for name in dict.fromkeys(name for row in rows for name in (*row.fields, *row.implied)):
        supported = [row._value(name) for row in rows]
        found = supported[0] if fields.get(name) is None else fields[name]
        rows = [row for row, value in zip(rows, supported, strict=True) if value == found]
        if not rows:
            known = " or ".join(repr(value) for value in dict.fromkeys(supported) if value is not None) or "none"
            raise ValueError(f"quantization_config: {name}={found!r:.80} is not supported, only {known}")
    block = fields.get(BLOCK) or rows[0].block
    parts = 8 if rows[0].whole_groups else 1  # codes of a group fill whole bytes, or int32s
    if (
        not isinstance(block, list | tuple)
        or len(block) != 2
        or not all(type(size) is int and 0 < size <= MAX_BLOCK for size in block)
        or block[1] % parts
    ):
        raise ValueError(
            f"quantization_config: weight_block_size={str(block)[:80]!r} is not supported, wanted two sizes from 1 to {MAX_BLOCK}"
            + (f", the second a multiple of {parts}" if parts > 1 else "")
        )
    return rows[0].in_blocks_of((block[0], block[1]))


def of_codes(dtype: torch.dtype) -> Iterator[WeightFormat]:
    """The rows whose codes have this dtype."""
    return (row for row in FORMATS if row.code_dtype == dtype)


def split_scale(name: str) -> tuple[str, str | None]:
    """``…weight_scale_inv`` → ``…weight`` and the suffix, of scales and of a weight's other tensors.

    A name that is none of theirs as it is, with ``None``.
    """
    if name.endswith(".weight"):
        return name, None
    found = [suffix for row in FORMATS for suffix in (row.scale_suffix, *row.others) if name.endswith(suffix)]
    suffix = max(found, key=len, default=None)  # `_group_scale` of one row ends in another's `_scale`
    return (name, None) if suffix is None else (name.removesuffix(suffix), suffix)


def named_for_codes(name: str) -> WeightFormat | None:
    """The row whose codes alone have such a name on the disk: ``…weight_packed``."""
    if name.endswith(".weight"):
        return None
    return next((row for row in FORMATS if row.code_suffix and name.endswith(f".weight{row.code_suffix}")), None)


def weight_name(name: str) -> str:
    """``…weight_packed``, the codes on the disk, → ``…weight``; any other name as it is."""
    row = named_for_codes(name)
    return name if row is None else name.removesuffix(row.code_suffix)
