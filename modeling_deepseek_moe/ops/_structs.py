"""The structs of ``csrc/abi.h``, field by field: what the CPU engine is handed by address.

Whoever makes one keeps the tensors alive that it points to. `_native` compares sizes and places of all fields with those
of the library as it is loaded.
"""

import ctypes
from ctypes import Structure, c_float, c_int, c_int64, c_void_p

import torch

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float8_e4m3fn: 3}
# Four-bit codes by the names of `ops.four_bit.KINDS`, and what their scales are.
FOUR_BIT = {"int4": (4, 1), "nf4": (5, 0), "fp4": (6, 0), "mxfp4": (7, 8), "nf4_nested": (5, 9), "fp4_nested": (6, 9)}
NESTED = "_nested"
MASKS = {**DTYPES, torch.bool: 10}


class Nested(Structure):
    """Scales that are codes themselves, see `ops.four_bit.NestedScales`."""

    _fields_ = [("codes", c_void_p), ("absmax", c_void_p), ("table", c_void_p), ("offset", c_float)]

    @classmethod
    def of(cls, scales) -> "Nested":
        """Of a `NestedScales` of contiguous tensors."""
        return cls(*(part.data_ptr() for part in scales[:3]), scales.offset.item())


class Adapter(Structure):
    """What LoRA adds to a linear layer, ``scale · B A``: A ``[r, cols]`` and B ``[rows, r]``, each in fp32 or bf16."""

    _fields_ = [
        *(("a", c_void_p), ("b", c_void_p), ("rank", c_int64)),
        *(("a_dtype", c_int), ("b_dtype", c_int), ("scale", c_float)),
    ]

    @classmethod
    def of(cls, a: torch.Tensor, b: torch.Tensor, scale: float) -> "Adapter":
        """Of contiguous tensors."""
        return cls(a.data_ptr(), b.data_ptr(), len(a), DTYPES[a.dtype], DTYPES[b.dtype], scale)


class Matrix(Structure):
    """A row-major weight ``[rows, cols]``; ``scale`` of FP8 in fp32, a block each; of four-bit codes a group each.

    ``adapter``: the address of an `Adapter` that adds to a linear layer, or none.
    """

    _fields_ = [
        *(("data", c_void_p), ("scale", c_void_p), ("rows", c_int64), ("cols", c_int64)),
        *(("dtype", c_int), ("scale_kind", c_int), ("adapter", c_void_p)),
    ]

    @classmethod
    def of(cls, weight: torch.Tensor, scale: torch.Tensor | None = None) -> "Matrix":
        """Of contiguous tensors, the scales in fp32."""
        return cls(weight.data_ptr(), None if scale is None else scale.data_ptr(), *weight.shape, DTYPES[weight.dtype])

    @classmethod
    def of_four_bit(cls, kind: str, codes: torch.Tensor, scales: "torch.Tensor | Nested") -> "Matrix":
        """Of contiguous codes ``[N, ·]`` of one of `FOUR_BIT`; nested scales are kept by the caller."""
        rows, cols = codes.shape[0], 2 * codes.shape[1] * codes.itemsize
        address = ctypes.addressof(scales) if isinstance(scales, Nested) else scales.data_ptr()
        return cls(codes.data_ptr(), address, rows, cols, *FOUR_BIT[kind])


class Norm(Structure):
    """RMSNorm: a weight of the activations' dtype."""

    _fields_ = [("weight", c_void_p), ("eps", c_float)]


class Expert(Structure):
    """Addresses of codes and scales of one expert. A table of them is a tensor ``[E, 3, 2]`` in int64."""

    _fields_ = [(f"{part}{suffix}", c_void_p) for part in ("gate", "up", "down") for suffix in ("", "_scale")]


class Experts(Structure):
    """``table [count]`` of `Expert`, each of ``width``, and dtype and kind of scales of their weights."""

    _fields_ = [
        *(("table", c_void_p), ("count", c_int64), ("width", c_int64)),
        *(("dtype", c_int), ("scale_kind", c_int)),
    ]

    @classmethod
    def of(cls, addresses: torch.Tensor, width: int, dtype: torch.dtype, kind: str | None = None) -> "Experts":
        """Of ``addresses [E, 3, 2]``; ``kind`` is one of `FOUR_BIT` if the codes are of four bits."""
        what = (DTYPES[dtype], 0) if kind is None else FOUR_BIT[kind]
        return cls(addresses.data_ptr(), len(addresses), width, *what)


class LowRank(Structure):
    """What an adapter adds to a matrix of each expert: bf16 A ``[E, r, inputs]`` and B turned ``[E, r, outputs]``."""

    _fields_ = [("a", c_void_p), ("b", c_void_p), ("rank", c_int64), ("scale", c_float)]

    @classmethod
    def of(cls, a: torch.Tensor, b: torch.Tensor, scale: float) -> "LowRank":
        """Of contiguous tensors."""
        return cls(a.data_ptr(), b.data_ptr(), a.shape[1], scale)


class Routing(Structure):
    """`routing.Routing` as C has it."""

    _fields_ = [
        *((name, c_int64) for name in ("n_group", "topk_group", "top_k")),
        *((name, c_int) for name in ("softmax", "group_score_top2", "norm_topk_prob")),
        ("scaling_factor", c_float),
    ]


class Moe(Structure):
    """Router, routed and shared experts; without rows of ``gate`` a dense layer, which is ``shared`` alone.

    ``parts``: gate, up and down of ``shared`` by themselves, where an adapter adds to one of them.
    """

    _fields_ = [
        *(("gate", Matrix), ("bias", c_void_p), ("routing", Routing)),
        *(("routed", Experts), ("shared", Experts)),
        *(("gate_up", LowRank), ("down", LowRank), ("parts", Matrix * 3)),
    ]


class MlaShape(Structure):
    """Sizes of latent attention, as the config names them."""

    _fields_ = [
        *((name, c_int64) for name in ("num_heads", "qk_nope_head_dim", "qk_rope_head_dim")),
        *((name, c_int64) for name in ("kv_lora_rank", "v_head_dim")),
        ("rope_interleave", c_int),
    ]


class MlaProjections(Structure):
    """``q_a_proj`` and ``q_b_proj`` (or none and ``q_proj``), ``kv_a_proj_with_mqa``, and their norms."""

    _fields_ = [
        *((name, Matrix) for name in ("q_a", "q_b", "kv_a")),
        *((name, Norm) for name in ("q_a_norm", "kv_a_norm")),
    ]


class Queries(Structure):
    """A few tokens' queries a sequence, strided over batch, tokens and heads."""

    _fields_ = [
        *((name, c_void_p) for name in ("nope", "pe")),
        *((name, c_int64) for name in ("nope_batch", "nope_token", "nope_head", "pe_batch", "pe_token", "pe_head")),
    ]


class LatentCache(Structure):
    """What a layer has cached, strided over the batch."""

    _fields_ = [
        *((name, c_void_p) for name in ("c_kv", "k_pe")),
        *((name, c_int64) for name in ("c_kv_batch", "k_pe_batch")),
    ]

    @classmethod
    def of(cls, c_kv: torch.Tensor, k_pe: torch.Tensor) -> "LatentCache":
        """Of ``[B, 1, capacity, r]`` and ``[B, 1, capacity, p]``, whose last two dimensions are contiguous."""
        return cls(c_kv.data_ptr(), k_pe.data_ptr(), c_kv.stride(0), k_pe.stride(0))


class Mask(Structure):
    """Values to add to the scores: ``[B or 1, tokens, keys]`` in fp32; none: causal."""

    _fields_ = [("values", c_void_p), ("batch", c_int64), ("token", c_int64)]

    @classmethod
    def of(cls, mask: torch.Tensor | None) -> "Mask":
        return cls() if mask is None else cls(mask.data_ptr(), mask.stride(0) if len(mask) > 1 else 0, mask.stride(1))


class Indexer(Structure):
    """Queries, keys and the heads' weights of an indexer, strided but for the weights."""

    _fields_ = [
        *((name, c_void_p) for name in ("queries", "keys", "weights")),
        *((name, c_int64) for name in ("batch", "tokens", "heads", "width", "length")),
        *((name, c_int64) for name in ("query_batch", "query_token", "query_head", "key_batch")),
    ]


class Visible(Structure):
    """Which keys a query may see: a mask ``[B, S, T]`` of booleans or of values to add, or none, and whether causal."""

    _fields_ = [
        ("values", c_void_p),
        *((name, c_int64) for name in ("batch", "token")),
        *(("dtype", c_int), ("causal", c_int), ("lowest", c_float)),
    ]


class DecoderLayer(Structure):
    """One decoder layer. Stages that never run may be empty."""

    _fields_ = [
        *(("input_norm", Norm), ("post_attention_norm", Norm), ("projections", MlaProjections)),
        *(("kv_b", Matrix), ("o", Matrix), ("moe", Moe)),
    ]


class Step(Structure):
    """What the layers share in one step: ``batch`` sequences of ``past`` cached tokens each, ``tokens`` new ones, and the norm at the end."""

    _fields_ = [
        *((name, c_int64) for name in ("batch", "tokens", "hidden", "past", "layers")),
        *(("norm", Norm), ("mla", MlaShape)),
        *((name, c_void_p) for name in ("cosine", "sine")),
        *(("mask", Mask), ("softmax_scale", c_float)),
    ]


class Ends(Structure):
    """What comes before the first layer, and after the norm: ``embedding [vocabulary, D]``, and the head."""

    _fields_ = [("embedding", c_void_p), ("vocabulary", c_int64), ("head", Matrix)]


SHARED = (
    *(Adapter, Matrix, Nested, Norm, Expert, Experts, LowRank, Routing, Moe),
    *(MlaShape, MlaProjections, Queries, LatentCache, Mask, Indexer, Visible, DecoderLayer, Step, Ends),
)


def layout() -> dict[str, tuple[int, int]]:
    """Offset and size of every struct and field, by the names of ``csrc/layout.c``."""
    places = {}
    for struct in SHARED:
        places[struct.__name__] = 0, ctypes.sizeof(struct)
        for name, *_ in struct._fields_:
            field = getattr(struct, name)
            places[f"{struct.__name__}.{name}"] = field.offset, field.size
    return places
