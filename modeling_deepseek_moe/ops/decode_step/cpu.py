"""A run of a decoder's layers, and of the norm after them, for one new token of each sequence, or a few, in one call of the CPU engine.

Called layer by layer, a step spends a fifth of its time in Python and torch: the weights that go through the processor's
caches push out what the interpreter needs, and it starts cold after every operation.
"""

import ctypes
from collections.abc import Sequence
from ctypes import byref

import torch

from modeling_deepseek_moe.ops import _native
from modeling_deepseek_moe.ops._structs import Ends, LatentCache, Mask, MlaShape, Norm, Step

FEW_TOKENS = 8
DTYPES = (torch.bfloat16, torch.float32)
WEIGHTS = (torch.bfloat16, torch.float8_e4m3fn)  # the latter in blocks of 128 x 128
STAGES = 3  # of a layer: norm, projections and attention; output projection; norm and experts


class Run:
    """What all runs of one step share.

    Args:
        layers: an array of `DecoderLayer`; whatever they point to is the caller's to keep alive, and to be right about.
        norm: after the last layer, a stage of its own.
        caches: for each layer, buffers ``[B, 1, capacity, r]`` and ``[B, 1, capacity, p]`` of the dtype of the states, of
            which ``past`` rows are in use; the next rows are written by stages that attend. ``None`` where none does.
        shape: of the states, ``[B, q, D]``; ``B·q`` is at most `FEW_TOKENS`.
        cos, sin: ``[B or 1, q, p/2]``.
        mask: ``[B or 1, 1, q, past + q]``; boolean (True attends) or added to the scores; ``None``: causal.

    Raises:
        ValueError: the tables are not of q positions.
    """

    def __init__(
        self,
        layers: ctypes.Array,
        norm: Norm,
        caches: Sequence[tuple[torch.Tensor, torch.Tensor] | None],
        past: int,
        mla: MlaShape,
        shape: Sequence[int],
        cos: torch.Tensor,
        sin: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float,
    ):
        rows = [LatentCache() if cache is None else LatentCache.of(*cache) for cache in caches]
        batch, tokens, hidden = shape
        if cos.shape[1] != tokens:
            raise ValueError(f"position_ids: found {cos.shape[1]} of each sequence, wanted {tokens}")
        if len(cos) != batch:
            cos, sin = (table.expand(batch, -1, -1) for table in (cos, sin))
        cos, sin = _native.fp32(cos), _native.fp32(sin)
        if mask is not None:
            mask = _native.additive(mask[:, 0, -tokens:, : past + tokens])
        tables = cos.data_ptr(), sin.data_ptr(), Mask.of(mask)
        step = Step(batch, tokens, hidden, past, len(layers), norm, mla, *tables, scaling)
        self._norm = STAGES * len(layers)  # the stage of the norm
        self._attended = batch, tokens, mla.num_heads * mla.v_head_dim
        self._keep = caches, cos, sin, mask
        self._structs = byref(layers), byref((LatentCache * len(rows))(*rows)), byref(step)

    def run(self, states: torch.Tensor, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``states [B, q, D]`` after the stages ``[first, last)``.

        Returns:
            The states; and what attention yields, ``[B, q, H·v]``, where the run ends before its output projection.
        """
        states = states.clone(memory_format=torch.contiguous_format)
        attended = None
        if last % STAGES == 1 and last < self._norm:
            attended = states.new_empty(self._attended)
        _native.call(
            "dsm_step",
            *(_native.DTYPES[states.dtype], states.data_ptr(), first, last, _native.pointer(attended), *self._structs),
        )
        return states, attended

    def logits(self, ids: torch.Tensor, ends: Ends, out: torch.Tensor) -> None:
        """Contiguous ``ids [B, q]`` through the embedding, all stages, and the head: ``out [B, q, ·]`` of the states' dtype.

        Raises:
            IndexError: an id that is not in the vocabulary.
        """
        pointers = ids.data_ptr(), byref(ends), *self._structs, out.data_ptr()
        _native.call("dsm_logits", _native.DTYPES[out.dtype], *pointers)
