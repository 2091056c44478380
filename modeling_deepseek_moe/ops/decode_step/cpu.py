"""A run of a decoder's layers for one new token of each sequence, in one call of the CPU engine.

Called layer by layer, a step spends a fifth of its time in Python and torch: the weights that go through the processor's
caches push out what the interpreter needs, and it starts cold after every operation.
"""

import ctypes
from collections.abc import Sequence
from ctypes import c_double, c_int64
from typing import NamedTuple

import torch

from modeling_deepseek_moe.ops import _native

FEW_TOKENS = 8
DTYPES = (torch.bfloat16, torch.float32)
WEIGHTS = (torch.bfloat16, torch.float8_e4m3fn)  # the latter in blocks of 128 x 128
STAGES = 3  # of a layer: norm, projections and attention; output projection; norm and experts


class Weight(ctypes.Structure):
    """A matrix: address, address of its fp32 scales, rows, columns, and dtype as `_native.DTYPES` numbers them."""

    _fields_ = [(name, c_int64) for name in ("data", "scale", "rows", "cols", "dtype")]


class Layer(ctypes.Structure):
    """One decoder layer; ``Layer`` of ``csrc/step.c``, where the fields are explained. Stages that never run may be empty."""

    _fields_ = [
        *((name, Weight) for name in ("q_a", "q_b", "kv_a", "kv_b", "o")),
        *((name, c_int64) for name in ("input_norm", "post_norm", "q_norm", "kv_norm")),
        *((name, c_double) for name in ("input_eps", "post_eps", "q_eps", "kv_eps")),
        *((name, c_int64) for name in ("gate", "bias", "table")),
        ("dims", c_int64 * 13),
        ("factor", c_double),
        ("shared", c_int64 * 6),
    ]


class Dims(NamedTuple):
    """H, n, p, r and v of the attention, and how rotary pairs lie."""

    heads: int
    nope: int
    rope: int
    rank: int
    value: int
    interleave: bool


class Step:
    """What all runs of one step share.

    Args:
        layers: as many `Layer`; whatever they point to is the caller's to keep alive, and to be right about.
        caches: for each layer, buffers ``[B, 1, capacity, r]`` and ``[B, 1, capacity, p]`` of the dtype of the states, of
            which ``past`` rows are in use; the next row is written by stages that attend. ``None`` where none does.
        cos, sin: ``[B or 1, 1, p/2]``.
        mask: ``[B or 1, 1, 1, past + 1]``; boolean (True attends) or added to the scores.
    """

    def __init__(
        self,
        layers: ctypes.Array,
        caches: Sequence[tuple[torch.Tensor, torch.Tensor] | None],
        past: int,
        dims: Dims,
        batch: int,
        hidden: int,
        cos: torch.Tensor,
        sin: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float,
    ):
        rows = []
        for cache in caches:
            if cache is None:
                rows += (0, 0, 0, 0)
            else:
                c_kv, k_pe = cache
                rows += (c_kv.data_ptr(), k_pe.data_ptr(), c_kv.stride(0), k_pe.stride(0))
        cos, sin = (table.float().expand(batch, -1, -1).contiguous() for table in (cos, sin))
        if mask is not None:
            mask = _native.additive(mask[:, 0, -1, : past + 1])
        self._dims, self._batch = dims, batch
        shape = (batch, hidden, dims.heads, dims.nope, dims.rope, dims.rank, dims.value, past, dims.interleave)
        self._shape = (c_int64 * 9)(*shape)
        self._keep = layers, caches, cos, sin, mask
        self._rest = (
            *(ctypes.addressof(layers), (c_int64 * len(rows))(*rows), cos.data_ptr(), sin.data_ptr()),
            *(_native.pointer(mask), past + 1 if mask is not None and len(mask) > 1 else 0, scaling),
        )

    def run(self, states: torch.Tensor, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``states [B, 1, D]`` after the stages ``[first, last)``.

        Returns:
            The states; and what attention yields, ``[B, 1, H·v]``, where the run ends before its output projection.
        """
        states = states.clone(memory_format=torch.contiguous_format)
        attended = None
        if last % STAGES == 1:
            attended = states.new_empty((self._batch, 1, self._dims.heads * self._dims.value))
        _native.call(
            "dsm_step",
            *(_native.DTYPES[states.dtype], states.data_ptr(), self._shape, first, last, _native.pointer(attended)),
            *self._rest,
        )
        return states, attended
