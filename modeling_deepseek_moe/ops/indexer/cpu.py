"""The keys that an indexer chooses, on the CPU engine: scores and a running top-k in one call."""

from ctypes import byref

import torch

from modeling_deepseek_moe.ops import _native
from modeling_deepseek_moe.ops._library import define
from modeling_deepseek_moe.ops._structs import MASKS, Indexer, Visible

KEYS = (torch.bfloat16, torch.float32)


def unsupported_reason(
    queries: torch.Tensor, weights: torch.Tensor, keys: torch.Tensor, mask: torch.Tensor | None
) -> str | None:
    """Why the engine cannot choose; ``None`` if it can. For the shapes see `select`. No choice has gradients."""
    if queries.device.type != "cpu" or keys.device.type != "cpu":
        return f"needs CPU tensors, found {queries.device} and {keys.device}"
    if keys.dtype not in KEYS or queries.dtype != keys.dtype:
        return f"takes queries and keys in one dtype, bf16 or fp32, found {queries.dtype} and {keys.dtype}"
    if not weights.is_floating_point():
        return f"takes weights of heads in floating point, found {weights.dtype}"
    if mask is not None and (mask.dim() != 4 or mask.shape[1] != 1 or mask.dtype not in MASKS or mask.itemsize > 4):
        return f"takes one mask for all heads, boolean or to add, found {_native.describe(mask)}"
    return _native.unavailable_reason()


def _select(
    queries: torch.Tensor, weights: torch.Tensor, keys: torch.Tensor, mask: torch.Tensor | None, topk: int
) -> torch.Tensor:
    """
    Args:
        queries: ``[B, S, h, d]``, any strides over the first three.
        weights: ``[B, S, h]``.
        keys: ``[B, T, d]`` in the dtype of the queries, any stride over B.
        mask: ``[B or 1, 1, S or 1, T]``, boolean (True is seen) or added to the scores (less than half of its
            dtype's least value hides); with one row for several queries, and without a mask, query s sees no key after T - S + s.

    Returns:
        ``[B, S, min(topk, T)]`` in int32: keys in their order, then -1 where fewer may be seen.

    Raises:
        ValueError: shapes that do not belong together.
    """
    _check(queries, weights, keys, mask, topk)
    batch, tokens, heads, width = queries.shape
    length = keys.shape[1]
    queries = queries if queries.stride(3) == 1 else queries.contiguous()
    keys = keys if keys.stride()[1:] == (width, 1) else keys.contiguous()
    weights = _native.fp32(weights)
    out = torch.empty((batch, tokens, min(topk, length)), dtype=torch.int32)
    given = Indexer(
        *(queries.data_ptr(), keys.data_ptr(), weights.data_ptr(), batch, tokens, heads, width, length),
        *(*queries.stride()[:3], keys.stride(0)),
    )
    visible, kept = _visible(mask, tokens)
    _native.call("dsm_index", _native.DTYPES[keys.dtype], byref(given), byref(visible), out.shape[2], out.data_ptr())
    del kept
    return out


def _visible(mask: torch.Tensor | None, tokens: int) -> tuple[Visible, torch.Tensor | None]:
    """A mask for C, and the tensor that has to live as long."""
    if mask is None:
        return Visible(causal=1), None
    mask = mask if mask.stride(3) == 1 else mask.contiguous()
    batch, token = (mask.stride(dim) if mask.shape[dim] > 1 else 0 for dim in (0, 2))
    lowest = 0.0 if mask.dtype == torch.bool else torch.finfo(mask.dtype).min / 2
    causal = int(mask.shape[2] == 1 < tokens)
    return Visible(mask.data_ptr(), batch, token, MASKS[mask.dtype], causal, lowest), mask


def _check(queries, weights, keys, mask, topk: int) -> None:
    """Before C reads them: raise where a tensor is smaller than the others say."""
    batch, tokens, heads, width = queries.shape
    length = keys.shape[1]
    wanted: dict[str, tuple[torch.Tensor, tuple[int, ...]]] = {
        "weights": (weights, (batch, tokens, heads)),
        "keys": (keys, (batch, length, width)),
    }
    if mask is not None:
        rows = tuple(size if size == mask.shape[dim] else 1 for dim, size in ((0, batch), (2, tokens)))
        wanted["mask"] = mask, (rows[0], 1, rows[1], length)
    for name, (tensor, shape) in wanted.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"indexer: {name} is {tuple(tensor.shape)}, wanted {shape}")
    if topk < 1 or length < 1 or heads < 1 or width < 1:
        raise ValueError(f"indexer: top-k {topk} of {length} keys, {heads} heads of {width}: wanted 1 at least")
    if length < tokens and (mask is None or mask.shape[2] != tokens):
        raise ValueError(f"indexer: {length} keys, wanted as many as queries at least, {tokens}")
    if keys.dtype not in KEYS or queries.dtype != keys.dtype:
        raise ValueError(f"indexer: queries {queries.dtype} and keys {keys.dtype}, wanted one dtype of {KEYS}")


select = define(
    "indexer_select(Tensor queries, Tensor weights, Tensor keys, Tensor? mask, int topk) -> Tensor",
    _select,
    lambda queries, weights, keys, mask, topk: queries.new_empty(
        (queries.shape[0], queries.shape[1], min(topk, keys.shape[1])), dtype=torch.int32
    ),
)
