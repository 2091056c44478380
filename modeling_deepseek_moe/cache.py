"""Cache layers with spare capacity: appending a token is amortised O(1), where `DynamicLayer` copies the whole cache for it.

And layers that keep latents in FP8, growing and static: `QuantizedCache(backend="fp8", ...)` gets them, and `Fp8StaticCache` has them.
"""

import torch
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicIndexedLayer,
    DynamicLayer,
    Fp8QuantizedLayer,
    QuantizedCache,
    StaticCache,
    StaticLayer,
)
from transformers.utils import is_torchdynamo_compiling

from modeling_deepseek_moe.ops import block_fp8
from modeling_deepseek_moe.ops._latent_rows import codes_and_scales, encoded_rows, row_bytes

GROWTH = 1.125
SLACK = 256  # tokens


class LatentLayer(DynamicLayer):
    """`DynamicLayer` with capacity past its last token. ``keys`` and ``values`` are views of what is in use, made when asked for.

    Whoever puts other tensors there (cropping, reordering for beam search) makes the next update copy them to new
    buffers: nothing that somebody else may hold is written to.
    """

    def __init__(self, **kwargs):
        self._buffers: tuple[torch.Tensor, torch.Tensor] | None = None
        self._used: int | None = None  # rows of the buffers; None: what is held was put here by others
        self._held: list[torch.Tensor | None] = [None, None]
        super().__init__(**kwargs)

    @property
    def keys(self) -> torch.Tensor | None:
        """What is cached of latents, ``[B, 1, S, kv_lora_rank]``."""
        return self._view(0)

    @keys.setter
    def keys(self, keys: torch.Tensor | None) -> None:
        self._put(0, keys)

    @property
    def values(self) -> torch.Tensor | None:
        """What is cached of rotated keys, ``[B, 1, S, qk_rope_head_dim]``."""
        return self._view(1)

    @values.setter
    def values(self, values: torch.Tensor | None) -> None:
        self._put(1, values)

    def _view(self, which: int) -> torch.Tensor | None:
        """Of the rows in use, or what others have put in its place."""
        if self._held[which] is None and self._used is not None:
            self._held[which] = self._buffers[which][:, :, : self._used]
        return self._held[which]

    def _put(self, which: int, tensor: torch.Tensor | None) -> None:
        if self._used is not None and tensor is not None and tensor is self._held[which]:
            return
        self._held = [self._view(0), self._view(1)]
        self._held[which], self._used = tensor, None

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        needs_copies = torch.is_grad_enabled() and (
            key_states.requires_grad or value_states.requires_grad or self.keys.requires_grad
        )
        if needs_copies or key_states.dtype != self.keys.dtype or value_states.dtype != self.values.dtype:
            return super().update(key_states, value_states, *args, **kwargs)
        start = self.get_seq_length()
        buffers = self.reserve(key_states, value_states)
        for buffer, new in zip(buffers, (key_states, value_states), strict=True):
            buffer[:, :, start : start + new.shape[2]] = new
        self.advance(start + key_states.shape[2])
        return self.keys, self.values

    def reserve(self, key_states: torch.Tensor, value_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Buffers ``[B, H, capacity, ·]`` with what is cached, and room for such states after it."""
        used = self.get_seq_length()
        length = used + key_states.shape[2]
        # the buffers hold what is cached, and no one may hold more of them than that
        may_write = self._used is not None and (
            torch.is_inference_mode_enabled() or not self._buffers[0].is_inference()
        )
        if may_write and self._buffers[0].shape[2] >= length:
            return self._buffers
        capacity = int(length * GROWTH) + SLACK
        self._buffers = (
            _grown(self.keys, key_states, used, capacity),
            _grown(self.values, value_states, used, capacity),
        )
        return self._buffers

    def advance(self, length: int) -> None:
        """The first ``length`` rows of the buffers are in use now."""
        self._used, self._held = length, [None, None]

    def holds(self, batch: int, sizes: tuple[int, int], dtype: torch.dtype) -> bool:
        """Whether something is cached, of ``batch`` sequences in ``dtype``: rows of ``sizes``, of a latent and a rotated key."""
        held = (self.keys, self.values) if self._used is None else self._buffers
        return self.is_initialized and all(
            like.dtype == dtype and like.shape[0] == batch and like.shape[1] == 1 and like.shape[3] == size
            for like, size in zip(held, sizes, strict=True)
        )

    def get_seq_length(self) -> int:
        return super().get_seq_length() if self._used is None else self._used

    def reset(self) -> None:
        self._held = [self.keys, self.values]
        self._buffers = self._used = None
        super().reset()


class IndexedLatentLayer(LatentLayer, DynamicIndexedLayer):
    """`LatentLayer` with the keys of an indexer ``[B, S, d]`` besides, which grow in the same way."""

    indexer_keys: torch.Tensor

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self._key_buffer: torch.Tensor | None = None
        self._key_view: torch.Tensor | None = None

    def update_indexer(self, indexer_key_states: torch.Tensor) -> torch.Tensor:
        if not self.is_indexer_initialized:
            self.lazy_initialization_indexer(indexer_key_states)
        new = indexer_key_states.to(self.indexer_keys.dtype)
        used = self.indexer_keys.shape[1] if self.indexer_keys.numel() else 0
        is_own = self._key_view is not None and self.indexer_keys is self._key_view
        may_write = is_own and (torch.is_inference_mode_enabled() or not self._key_buffer.is_inference())
        if not may_write or self._key_buffer.shape[1] < used + new.shape[1]:
            capacity = int((used + new.shape[1]) * GROWTH) + SLACK
            cached = self.indexer_keys.unsqueeze(1) if used else None
            self._key_buffer = _grown(cached, new.unsqueeze(1), used, capacity).squeeze(1)
        self._key_buffer[:, used : used + new.shape[1]] = new
        self._key_view = self.indexer_keys = self._key_buffer[:, : used + new.shape[1]]
        return self.indexer_keys

    def advance(self, length: int) -> None:
        super().advance(length)
        if self.is_indexer_initialized and self.indexer_keys.shape[1] > length:
            own = self.indexer_keys is self._key_view
            self.indexer_keys = self.indexer_keys[:, :length]
            self._key_view = self.indexer_keys if own else None

    def reset(self) -> None:
        self._key_buffer = self._key_view = None
        super().reset()


class Fp8LatentLayer(LatentLayer):
    """`LatentLayer` that keeps what it is given as keys in FP8, with fp32 scales of tiles of 128; values (k_pe) stay as they are.

    ``keys`` are bytes ``[B, 1, kv, ·]`` as `ops._latent_rows` lays them out. `update` returns the latents decoded, in the dtype
    that it is given.
    """

    def update(self, key_states, value_states, *args, **kwargs):
        rows, values = super().update(encode_latents(key_states), value_states, *args, **kwargs)
        return _decoded_like(key_states, rows), values


class Fp8StaticLayer(StaticLayer):
    """transformers' `StaticLayer`, which keeps what `Fp8LatentLayer` does."""

    def update(self, key_states, value_states, *args, **kwargs):
        rows, values = super().update(encode_latents(key_states), value_states, *args, **kwargs)
        return _decoded_like(key_states, rows), values


class Fp8StaticCache(StaticCache):
    """transformers' `StaticCache` for latents, which it keeps in FP8: 656 bytes per token and layer of DeepSeek-V3, 1,152 in bf16.

    Args:
        config: of the model.
        max_cache_len: tokens that there is room for.

    Raises:
        ValueError: a model with indexers, whose keys it has no place for.
    """

    def __init__(self, config, max_cache_len: int, **kwargs):
        if config.has_indexers:
            raise ValueError(
                f"Fp8StaticCache: found model_type={config.model_type!r}, whose indexers cache keys too, wanted a model without: use "
                "StaticCache"
            )
        super().__init__(config=config, max_cache_len=max_cache_len, **kwargs)
        self.layers[:] = [Fp8StaticLayer(max_cache_len=max_cache_len) for _ in self.layers]


def _decoded_like(states: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    latents = decode_latents(rows, states.shape[-1], states.dtype)
    if torch.is_grad_enabled() and states.requires_grad:
        return _WithoutGradient.apply(latents, states)
    return latents


class _WithoutGradient(torch.autograd.Function):
    """Latents that were made of ``states`` by rounding: a gradient that would be lost raises."""

    @staticmethod
    def forward(ctx, latents, states):
        return latents.view_as(latents)

    @staticmethod
    def backward(ctx, *gradients):
        raise RuntimeError(
            "a cache in FP8: latents are rounded and have no gradient, train without a cache (use_cache=False)"
        )


def encode_latents(c_kv: torch.Tensor) -> torch.Tensor:
    """Latents ``[B, 1, q, r]`` as rows of bytes ``[B, 1, q, ·]``."""
    codes, scales = block_fp8.quantize_tiles(c_kv.detach().flatten(0, 2))
    return encoded_rows(codes, scales).view(*c_kv.shape[:3], -1)


def decode_latents(rows: torch.Tensor, rank: int, dtype: torch.dtype) -> torch.Tensor:
    """The inverse, up to rounding: ``[B, 1, kv, r]``."""
    codes, scales = codes_and_scales(rows.flatten(0, 2), rank)
    return block_fp8.dequantize_tiles(codes.view(torch.float8_e4m3fn), scales, dtype).view(*rows.shape[:3], rank)


def update_indexer(cache: Cache, keys: torch.Tensor, layer_idx: int) -> torch.Tensor:
    """Cache an indexer's new ``keys [B, q, d]`` of a layer; returns all. Before the layer's latents, with which they are offloaded.

    Raises:
        ValueError: the cache has no room for such keys.
    """
    make = getattr(cache, "layer_class_to_replicate", None)
    while make is not None and len(cache.layers) <= layer_idx:
        cache.layers.append(make())
    if getattr(cache, "offloading", False):
        # what the last layer's update fetches may still be on its way, and only this layer's own would wait for it
        torch.accelerator.current_stream(keys.device).wait_stream(cache.prefetch_stream)
    return cache.update_indexer(keys, layer_idx)


def _grown(cached: torch.Tensor | None, new: torch.Tensor, used: int, capacity: int) -> torch.Tensor:
    """A buffer ``[B, H, capacity, ·]`` for states like ``new`` that begins with the ``used`` that are cached."""
    buffer = new.new_empty((*new.shape[:2], capacity, new.shape[3]))
    if used:
        buffer[:, :, :used] = cached
    return buffer


def prepare_cache(cache: Cache | None, config, query_length: int) -> int | None:
    """Look over what a model was passed, and give it layers of this module where it has transformers' own, in place.

    Args:
        query_length: of the new tokens.

    Returns:
        The tokens that it holds; ``None`` if that is a tensor whose value a graph being compiled cannot know, or one
        token could learn only by waiting for a device.

    Raises:
        ValueError: it was laid out for expanded keys and values before a model saw it: its first layer holds, or has
            room for, something else than latents; or it has no room for the new tokens.
    """
    if cache is None:
        return 0
    layers, compiling = getattr(cache, "layers", None), is_torchdynamo_compiling()
    keys = getattr(layers[0], "keys", None) if layers else None
    if keys is not None and keys.ndim == 4:
        found = keys.shape[1], keys.shape[3], layers[0].values.shape[3]
        in_codes, rank = isinstance(layers[0], Fp8LatentLayer | Fp8StaticLayer), config.kv_lora_rank
        wanted = 1, row_bytes(rank) if in_codes else rank, config.qk_rope_head_dim
        if found != wanted:
            raise ValueError(
                f"cache: layer 0: found {found[0]} heads with keys of {found[1]} and values of {found[2]} numbers, wanted "
                f"{wanted[0]} head of {wanted[1]} and {wanted[2]}: only latents are cached. Pass a cache that no other "
                "code has laid out or filled; it takes its shapes from the first call of the model"
            )
    if not compiling:
        give_layers(cache, config)
    if config.has_indexers:
        _check_indexed(cache)
    length = cache.get_seq_length()
    if isinstance(length, torch.Tensor):
        waits = query_length == 1 and length.device.type != "cpu"
        if compiling or waits:
            return None
        length = int(length)
    if not compiling and layers and hasattr(layers[0], "max_cache_len"):
        _check_room(layers[0], length + query_length)
    return length


def _check_room(layer: StaticLayer, length: int) -> None:
    """
    Raises:
        ValueError: a layer of fixed size that forgets nothing is too small for that many tokens.
    """
    if not layer.is_sliding and length > layer.max_cache_len:
        raise ValueError(
            f"cache: found room for {layer.max_cache_len} tokens, wanted {length}: give it a larger max_cache_len"
        )


def give_layers(cache: Cache, config) -> None:
    """Layers of this module for a plain `DynamicCache`, and for a `QuantizedCache` in FP8 whose layers are empty."""
    if type(cache) is DynamicCache:
        _give_capacity(cache, config.has_indexers)
    elif type(cache) is QuantizedCache:
        cache.layers[:] = [
            Fp8LatentLayer() if type(layer) is Fp8QuantizedLayer and not layer.is_initialized else layer
            for layer in cache.layers
        ]


def _give_capacity(cache: DynamicCache, indexed: bool) -> None:
    """Put layers of this module in the place of transformers' own; where they are offloaded, transformers' of the right kind."""
    plain = DynamicIndexedLayer if indexed else DynamicLayer
    kind = IndexedLatentLayer if indexed else LatentLayer
    kind = plain if cache.offloading else kind
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = kind
    if cache.offloading and not indexed:
        return
    cache.layers[:] = [
        _of(kind, layer) if type(layer) in (DynamicLayer, plain) and type(layer) is not kind else layer
        for layer in cache.layers
    ]


def _of(kind: type[DynamicLayer], layer: DynamicLayer) -> DynamicLayer:
    """What ``layer`` holds, in a layer of another kind."""
    made = kind()
    for name, value in vars(layer).items():
        setattr(made, name, value)
    return made


def _check_indexed(cache: Cache) -> None:
    """
    Raises:
        ValueError: a layer cannot hold an indexer's keys, or was filled without them.
    """
    layers = getattr(cache, "layers", None)
    if layers is None:
        raise ValueError(
            f"cache: found {type(cache).__name__}, wanted one of transformers' caches: attention with an indexer caches its keys"
        )
    for number, layer in enumerate(layers):
        if not hasattr(layer, "update_indexer"):
            raise ValueError(
                f"cache: layer {number}: found {type(layer).__name__}, which holds no keys of an indexer, wanted "
                "DynamicCache(config=model.config), StaticCache(config=model.config, ...), or none"
            )
    first = layers[0] if layers else None
    lacks_keys = first is not None and first.is_initialized and not first.is_indexer_initialized
    if lacks_keys and (found := int(first.get_seq_length())):
        raise ValueError(
            f"cache: layer 0: found {found} tokens without the indexer's keys, wanted those of a model "
            "with an indexer: pass a cache that no other model has filled"
        )
