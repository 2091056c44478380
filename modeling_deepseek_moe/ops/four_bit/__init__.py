"""Four-bit weights: W[n, k] = table[code] · scale[n, k // group], two codes a byte, one scale for each group of a row.

| kind | table | earlier column | group | scales |
|---|---|---|---|---|
| ``int4`` | code - 8 | low nibble | 32 | bf16 |
| ``mxfp4`` | E2M1 | low nibble | 32 | E8M0: 2^(e - 127) |
| ``nf4``, ``fp4`` | bitsandbytes' | high nibble | 64 | fp32, or nested: quantised once more |

Codes of a weight ``[N, K]`` are ``[N, K/2]`` bytes, row by row, whatever the dtype that a file calls them: eight of
``int4`` are an int32, whose first column is its lowest nibble. What each function computes is defined in `reference`.
"""

import torch

from modeling_deepseek_moe.ops.four_bit import reference
from modeling_deepseek_moe.ops.four_bit.reference import (
    FP4,
    INT4,
    KINDS,
    MXFP4,
    NESTED_GROUP,
    NF4,
    Kind,
    NestedScales,
)

__all__ = [
    "FP4",
    "INT4",
    "KINDS",
    "MXFP4",
    "NESTED_GROUP",
    "NF4",
    "Kind",
    "NestedScales",
    "decode",
    "encode",
    "encode_with",
    "expand",
    "nest",
    "nested_table",
    "renest",
    "scale_values",
]

Scales = torch.Tensor | NestedScales


def decode(
    codes: torch.Tensor, scales: Scales, dtype: torch.dtype, block: tuple[int, int], *, kind: str
) -> torch.Tensor:
    """The weight ``[N, K]`` in ``dtype``, rounded once from the fp32 product.

    Args:
        codes: ``[N, K/2]`` bytes, or as many in elements of another size.
        scales: ``[N, K/group]``.
        block: ``(1, group)``.

    Raises:
        ValueError: scales that are not one for each group of each row.
    """
    values = scale_values(scales)
    columns = 2 * codes.shape[-1] * codes.element_size()
    if codes.ndim != 2 or values.shape != (codes.shape[0], columns // block[1]) or columns % block[1]:
        found = f"codes {codes.dtype} {list(codes.shape)} with scales {list(values.shape)}"
        raise ValueError(f"{kind}: found {found}, wanted a matrix with a scale for {block[1]} columns of each row")
    return reference.decode(codes, values, dtype, KINDS[kind])


def encode(weight: torch.Tensor, block: tuple[int, int], *, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A floating-point weight ``[N, K]`` → codes and plain scales ``[N, K/group]``.

    int4 as compressed-tensors quantises by the largest value of a group (symmetric), mxfp4 as the OCP MX specification
    (1.0, 6.3), nf4 and fp4 to the bits of ``bitsandbytes.functional.quantize_4bit``.

    Raises:
        ValueError: it is no finite matrix, or its rows are not a whole number of groups.
    """
    if weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(f"found {weight.dtype} {list(weight.shape)}, wanted a floating-point matrix to quantise")
    if weight.shape[1] % block[1]:
        raise ValueError(f"found a weight {list(weight.shape)}, wanted rows of whole groups of {block[1]} for {kind}")
    if not torch.isfinite(weight).all():
        raise ValueError("found NaN or Inf, wanted finite values to quantise")
    return reference.ENCODERS[kind](weight.detach(), block[1])


def encode_with(weight: torch.Tensor, scales: Scales, block: tuple[int, int], *, kind: str) -> torch.Tensor:
    """The codes that are nearest to a finite weight ``[N, K]`` with these scales."""
    codes = reference.encode_with(weight.detach(), scale_values(scales), block[1], KINDS[kind])
    return codes.view(torch.int32) if kind == "int4" else codes


def scale_values(scales: Scales) -> torch.Tensor:
    """Scales of any kind as what they stand for, ``[N, K/group]`` fp32: bf16, E8M0 (or its bytes), nested or fp32."""
    return expand(scales) if isinstance(scales, NestedScales) else reference.plain(scales)


def expand(scales: NestedScales) -> torch.Tensor:
    """Nested scales as plain ones, ``[N, K/group]`` fp32: table[code] · absmax[i // 256] + offset, i counts codes."""
    return reference.expand(scales)


def nest(scales: torch.Tensor) -> NestedScales:
    """Plain fp32 scales ``[N, K/group]`` quantised once more, as ``quantize_4bit(compress_statistics=True)`` on a CPU."""
    return reference.nest(scales)


def renest(values: torch.Tensor, scales: NestedScales, changed: torch.Tensor) -> NestedScales:
    """``scales`` with the fp32 ``values [N, G]`` where ``changed [N, G]``; the offset stays, and runs of 256 whose new
    values fit into them keep their scale and the codes of all others.
    """
    return reference.renest(values, scales, changed)


def nested_table() -> torch.Tensor:
    """The 256 values of bitsandbytes' dynamic 8-bit type, fp32, that the codes of nested scales count in."""
    return reference.nested_table()
