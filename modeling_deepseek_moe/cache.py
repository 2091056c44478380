"""A cache layer with spare capacity: appending a token is amortised O(1), where `DynamicLayer` copies the whole cache for it."""

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.utils import is_torchdynamo_compiling

GROWTH = 1.125
SLACK = 256  # tokens


class LatentLayer(DynamicLayer):
    """`DynamicLayer` with capacity past its last token. ``keys`` and ``values`` are views of what is in use.

    Whoever puts other tensors there (cropping, reordering for beam search) makes the next update copy them to new
    buffers: nothing that somebody else may hold is written to.
    """

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self._buffers: tuple[torch.Tensor, torch.Tensor] | None = None
        self._views: tuple[torch.Tensor, torch.Tensor] | None = None

    @classmethod
    def of(cls, layer: DynamicLayer) -> "LatentLayer":
        """What ``layer`` holds, in a layer that grows in place."""
        made = cls()
        made.__dict__.update(layer.__dict__)
        return made

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
        is_theirs = self._views is not None and self.keys is self._views[0] and self.values is self._views[1]
        may_write = is_theirs and (torch.is_inference_mode_enabled() or not self._buffers[0].is_inference())
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
        keys, values = self._buffers
        self._views = keys[:, :, :length], values[:, :, :length]
        self.keys, self.values = self._views

    def reset(self) -> None:
        self._buffers = self._views = None
        super().reset()


def _grown(cached: torch.Tensor | None, new: torch.Tensor, used: int, capacity: int) -> torch.Tensor:
    """A buffer ``[B, H, capacity, ·]`` for states like ``new`` that begins with the ``used`` that are cached."""
    buffer = new.new_empty((*new.shape[:2], capacity, new.shape[3]))
    if used:
        buffer[:, :, :used] = cached
    return buffer


def prepare_cache(cache: Cache | None, config, query_length: int) -> int | None:
    """Look over what a model was passed, and give a plain `DynamicCache` layers with spare capacity, in place.

    Args:
        query_length: of the new tokens.

    Returns:
        The tokens that it holds; ``None`` if that is a tensor whose value a graph being compiled cannot know, or one
        token could learn only by waiting for a device.

    Raises:
        ValueError: it was laid out for expanded keys and values before a model saw it: its first layer holds, or has
            room for, something else than latents.
    """
    if cache is None:
        return 0
    layers, compiling = getattr(cache, "layers", None), is_torchdynamo_compiling()
    keys = getattr(layers[0], "keys", None) if layers else None
    if keys is not None and keys.ndim == 4:
        found = keys.shape[1], keys.shape[3], layers[0].values.shape[3]
        wanted = 1, config.kv_lora_rank, config.qk_rope_head_dim
        if found != wanted:
            raise ValueError(
                f"cache: layer 0: found {found[0]} heads with keys of {found[1]} and values of {found[2]} numbers, wanted "
                f"{wanted[0]} head of {wanted[1]} and {wanted[2]}: only latents are cached. Pass a cache that no other "
                "code has laid out or filled; it takes its shapes from the first call of the model"
            )
    if not compiling and type(cache) is DynamicCache and not cache.offloading:
        if cache.layer_class_to_replicate is DynamicLayer:
            cache.layer_class_to_replicate = LatentLayer
        cache.layers[:] = [LatentLayer.of(layer) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    length = cache.get_seq_length()
    if isinstance(length, torch.Tensor):
        waits = query_length == 1 and length.device.type != "cpu"
        return None if compiling or waits else int(length)
    return length
