"""Triton's interpreter made right for bf16 and FP8, which it keeps as integers: for tests of kernels alone.

Seen in 3.6.0 to 3.9.0, without a word: bf16 products, sums, comparisons and dots compute with the bits, casts to bf16
truncate, casts to FP8 round and saturate wrongly. What stays wrong, reductions in bf16, raises here.
"""

from typing import NamedTuple

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter as own

FLOATS = {
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
    tl.bfloat16: torch.bfloat16,
    tl.float16: torch.float16,
    tl.float32: torch.float32,
    tl.float64: torch.float64,
}
EIGHT = (tl.float8e4nv, tl.float8e5)
BITS = {
    1: (torch.uint8, np.uint8),
    2: (torch.int16, np.uint16),
    4: (torch.int32, np.uint32),
    8: (torch.int64, np.uint64),
}
BITWISE = {np.bitwise_and, np.bitwise_or, np.bitwise_xor, np.left_shift, np.right_shift}
COMPARISONS = {np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal}

_convert, _Builder = own._convert_float, own.InterpreterBuilder
_binary, _unary, _fma = _Builder.binary_op, _Builder.unary_op, _Builder.create_fma


def to_torch(data: np.ndarray, dtype: tl.dtype) -> torch.Tensor:
    """What the bits stand for, with at least one dimension."""
    data = np.array(data, copy=True, order="C", ndmin=1)
    return torch.from_numpy(data.view(np.dtype(f"i{data.dtype.itemsize}"))).view(FLOATS[dtype])


def to_bits(values: torch.Tensor, shape: tuple[int, ...]) -> np.ndarray:
    """The inverse."""
    as_torch, as_numpy = BITS[values.dtype.itemsize]
    return values.contiguous().view(as_torch).numpy().view(as_numpy).reshape(shape)


def convert(data, source, target, rounding_mode):
    """To the nearest, ties to even; to FP8 as the cards do it: too large becomes the largest, NaN stays."""
    if source not in FLOATS or target not in FLOATS or rounding_mode == own._ir.ROUNDING_MODE.RTZ:
        return _convert(data, source, target, rounding_mode)
    values = to_torch(data, source)
    if target in EIGHT:
        largest = torch.finfo(FLOATS[target]).max
        values = values.float()
        values = torch.where(values.isnan(), values, values.clamp(-largest, largest))
    return to_bits(values.to(FLOATS[target]), np.shape(data))


def is_bf16(handle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def wide(handle) -> np.ndarray:
    return to_torch(handle.data, tl.bfloat16).float().numpy().reshape(np.shape(handle.data))


def narrow(values) -> "own.TensorHandle":
    rounded = torch.from_numpy(np.array(values, dtype=np.float32, ndmin=1)).to(torch.bfloat16)
    return own.TensorHandle(to_bits(rounded, np.shape(values)), tl.bfloat16)


def binary_op(self, lhs, rhs, op):
    if op in COMPARISONS and not is_bf16(lhs):
        # else the truth values of floats are floats, which `&` refuses
        return own.TensorHandle(op(lhs.data, rhs.data), tl.int1)
    if op in BITWISE or not is_bf16(lhs):
        return _binary(self, lhs, rhs, op)
    with np.errstate(all="ignore"):
        values = op(wide(lhs), wide(rhs))
    return own.TensorHandle(values, tl.int1) if op in COMPARISONS else narrow(values)


def unary_op(self, arg, op):
    return narrow(op(wide(arg))) if is_bf16(arg) else _unary(self, arg, op)


def create_fma(self, x, y, z):
    return narrow(wide(x) * wide(y) + wide(z)) if is_bf16(z) else _fma(self, x, y, z)


def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    """Sums in fp32, of operands as they are: what is lost within a tensor core is not imitated."""
    factors = []
    for handle in (a, b):
        dtype = handle.dtype.scalar
        narrow_float = dtype in (tl.bfloat16, *EIGHT)
        data = to_torch(handle.data, dtype).float().numpy() if narrow_float else handle.data
        factors.append(data.astype(d.data.dtype))
    return own.TensorHandle(np.matmul(*factors) + d.data, d.dtype.scalar)


class Result(NamedTuple):
    """What an instruction left in its one register."""

    words: np.ndarray

    def get_result(self, index: int) -> "own.TensorHandle":
        return own.TensorHandle(self.words, tl.uint32)


def create_inline_asm(self, asm, constraints, values, result_types, is_pure, pack):
    """The two instructions that kernels name: ``(a & b) | c``, and a permutation of the eight bytes of ``b:a``."""
    a, b, c = (value.data.astype(np.uint32) for value in values)
    if asm == "lop3.b32 $0, $1, $2, $3, 0xEA;":
        return Result((a & b) | c)
    if asm != "prmt.b32 $0, $1, $2, $3;":
        raise NotImplementedError(f"the interpreter knows no {asm}")
    eight, found = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32), np.uint32(0)
    for place in range(4):
        index = c >> np.uint32(4 * place) & np.uint32(15)
        byte = (eight >> (index & np.uint32(7)).astype(np.uint64) * np.uint64(8)).astype(np.uint32) & np.uint32(255)
        sign = np.where(byte >> np.uint32(7), np.uint32(255), np.uint32(0))
        found = found | np.where(index >> np.uint32(3), sign, byte).astype(np.uint32) << np.uint32(8 * place)
    return Result(found.astype(np.uint32))


def refuse_bf16(operation) -> None:
    """Make a reduction in bf16 raise."""
    apply = operation.apply_impl

    def apply_impl(self, handles):
        if any(is_bf16(handle) for handle in handles):
            raise NotImplementedError("a reduction in bf16: the interpreter gets it wrong; reduce in fp32")
        return apply(self, handles)

    operation.apply_impl = apply_impl


def repair() -> None:
    """For this whole process."""
    own._convert_float = convert
    _Builder.binary_op, _Builder.unary_op = binary_op, unary_op
    _Builder.create_fma, _Builder.create_dot = create_fma, create_dot
    _Builder.create_inline_asm = create_inline_asm
    _Builder.get_bf16 = lambda self, value: narrow(np.array([value], dtype=np.float32))
    refuse_bf16(own.ReduceOps)
    refuse_bf16(own.ScanOps)
