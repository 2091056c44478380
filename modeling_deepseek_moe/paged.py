"""Continuous batching: many requests in one forward pass, their latents in the pages of transformers' cache.

transformers sizes a page by ``num_key_value_heads`` and ``head_dim`` and keeps keys and values of one width. A latent
[c_kv; k_pe] is therefore laid into it as one head of half its width: the first half as the key, the second as the value.
`PagedModel` is what the manager sees of a model: the sizes of that layout, and a call that takes its arguments.
`PagedLatents` is what the model sees of the manager's cache.
"""

import copy
import itertools
from functools import cached_property
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from transformers.configuration_utils import PreTrainedConfig
from transformers.generation import ContinuousBatchingConfig, ContinuousMixin
from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.generation.continuous_batching.cache import PagedAttentionCache

from modeling_deepseek_moe.compat import CACHE_NAME
from modeling_deepseek_moe.machine import probe_machine
from modeling_deepseek_moe.ops.absorbed_attention import Pages

# Settings of graphs with fixed shapes; a forward pass over pages depends on how long each request is.
FIXED_SHAPES = (
    "use_cuda_graph",
    "varlen_compile_config",
    "decode_compile_config",
    "default_compile_level",
    "q_padding_interval_size",
    "kv_padding_interval_size",
    "max_blocks_per_request",
)
CPU_SHARE = 0.6  # of memory, as transformers has it


def head_dim(config: PreTrainedConfig) -> int:
    """Half the width of a latent, rounded up: what transformers calls the size of a head."""
    return -(-(config.kv_lora_rank + config.qk_rope_head_dim) // 2)


class PagedLatents:
    """The latents of every request of one forward pass, whose tokens lie one after another in one row."""

    def __init__(self, pages: PagedAttentionCache, arguments: dict[str, Any], widths: tuple[int, int]):
        """
        Args:
            arguments: what the manager says about the requests: their cumulative lengths, and where to read and write.
            widths: ``kv_lora_rank`` r and ``qk_rope_head_dim`` p.
        """
        self.pages = pages
        self.arguments = arguments
        self.widths = widths

    @cached_property
    def requests(self) -> list[tuple[slice, slice]]:
        """Each request's new tokens in the row, and its latents in what `update` returns; waits for the device."""
        (keys,) = self.arguments["cu_seq_lens_k"].values()  # one kind of attention
        lengths = self.arguments["cu_seq_lens_q"], keys
        return list(zip(*(_slices(cumulative.tolist()) for cumulative in lengths), strict=True))

    @property
    def is_decoding(self) -> bool:
        """Whether each request has one new token, and any has a past."""
        (index,) = self.arguments["read_index"]
        return self.arguments["max_length_q"] == 1 and len(index) > 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens before the row's first: none, the requests' own pasts are their own."""
        return 0

    def update(self, c_kv: torch.Tensor, k_pe: torch.Tensor, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Write new latents ``[1, 1, T, r]`` and ``[1, 1, T, p]``; returns all of every request, ``[1, 1, kv, ·]``."""
        halves = self._update(c_kv, k_pe, layer_idx, self.arguments["read_index"])
        return torch.cat(halves, dim=-1)[..., : sum(self.widths)].split(self.widths, dim=-1)

    def write(self, c_kv: torch.Tensor, k_pe: torch.Tensor, layer_idx: int) -> None:
        """As `update`, and nothing is read: `located` tells where."""
        self._update(c_kv, k_pe, layer_idx, [index[:0] for index in self.arguments["read_index"]])

    def located(self, layer_idx: int) -> Pages:
        """Where the latents of every request of a step that `is_decoding` lie."""
        halves = self.pages.layer_to_allocator[layer_idx].get_cache_for_block_table(layer_idx)
        (index,) = self.arguments["read_index"]
        (starts,), (longest,) = (self.arguments[name].values() for name in ("cu_seq_lens_k", "max_length_k"))
        first, second = (half.flatten(0, -2) for half in halves)
        return Pages(first, second, index, starts, longest)

    def _update(self, c_kv, k_pe, layer_idx: int, read_index: list[torch.Tensor]):
        """The manager's: it reads nothing by an empty index."""
        latents = torch.cat((c_kv, k_pe), dim=-1).to(self.pages.dtype)
        if sum(self.widths) % 2:
            latents = F.pad(latents, (0, 1))
        halves = latents.chunk(2, dim=-1)
        # the cache writes into the arguments that it is given
        return self.pages.update(*halves, layer_idx, self.arguments | {"read_index": read_index})


class PagedModel:
    """A model as the manager of continuous batching sees it; all else is the model's."""

    def __init__(self, model):
        object.__setattr__(self, "_model", model)

    def __getattr__(self, name: str):
        return getattr(self._model, name)

    def __setattr__(self, name: str, value) -> None:
        setattr(self._model, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._model, name)

    @property
    def config(self) -> PreTrainedConfig:
        """The model's, but with the layout of the pages.

        It names FlashAttention because latents are attended to as that does, by cumulative lengths: the manager then
        neither makes masks of all tokens by all cached ones, nor switches the implementation that the model has.
        """
        found = self._model.config
        paged = copy.copy(found)
        layout = {
            "num_key_value_heads": 1,
            "head_dim": head_dim(found),
            "_attn_implementation_internal": "flash_attention_2",
            "layer_types": None,
            "sliding_window": None,
        }
        paged.__dict__.update(layout)
        return paged

    def eval(self) -> "PagedModel":
        self._model.eval()
        return self

    def __call__(self, input_ids, position_ids, cache: PagedAttentionCache, logits_to_keep: torch.Tensor, **arguments):
        """Logits of the tokens ``logits_to_keep`` of ``input_ids [1, T]``, in which all requests lie."""
        config = self._model.config
        latents = PagedLatents(cache, arguments, (config.kv_lora_rank, config.qk_rope_head_dim))
        named = {"position_ids": position_ids, "logits_to_keep": logits_to_keep, CACHE_NAME: latents}
        return self._model(input_ids, use_cache=False, **named)


class ContinuousLatentMixin(ContinuousMixin):
    """`generate_batch`, `init_continuous_batching` and its context manager over latents; before ``GenerationMixin``."""

    def init_continuous_batching(
        self, generation_config=None, continuous_batching_config=None, workload_hints=None
    ) -> ContinuousBatchingManager:
        """As `ContinuousMixin.init_continuous_batching`.

        Raises:
            ValueError: a setting of graphs with fixed shapes was given, or the model has indexers.
        """
        if self.config.has_indexers:
            raise ValueError(
                f"continuous batching: found model_type={self.config.model_type!r}, whose indexers cache keys of their own, which "
                "the pages have no place for, wanted a model without: use generate with a batch"
            )
        asked = continuous_batching_config
        if asked is None:
            asked = getattr(generation_config or self.generation_config, "continuous_batching_config", None)
        settings = copy.copy(asked) if asked is not None else ContinuousBatchingConfig()
        for name in FIXED_SHAPES:
            found = getattr(settings, name)
            if any(found) if isinstance(found, tuple) else found:
                raise ValueError(
                    f"continuous_batching_config: {name}={found!r} is not supported, leave it out: each request "
                    "attends to its own latents, by its own length, so there is no graph of fixed shapes"
                )
        settings.use_cuda_graph, settings.max_blocks_per_request = False, 0
        if self.device.type == "cpu" and settings.num_blocks is None and settings.max_memory_percent is None:
            _plan_memory(settings, workload_hints, self.config, self.dtype)
        return ContinuousMixin.init_continuous_batching(PagedModel(self), generation_config, settings, workload_hints)


def _plan_memory(settings: ContinuousBatchingConfig, hints, config: PreTrainedConfig, dtype: torch.dtype) -> None:
    """Pages for all requests that are known, if half of the free memory holds them; else a share of what is free.

    transformers alone plans a share of all memory, in which the weights and the mapped checkpoint lie too.
    """
    available = probe_machine(measure=False).ram_available  # of the container, where there is one
    settings.max_memory_percent = CPU_SHARE * available / psutil.virtual_memory().total
    if hints is None or not (hints.num_requests and hints.max_generated_length):
        return
    length = hints.max_prompt_length + hints.max_generated_length
    at_once = min(hints.num_requests, settings.max_requests_per_batch or hints.num_requests)
    # a quarter more, since the scheduler admits no one to the last pages
    blocks = at_once * -(-length // settings.page_size) * 5 // 4 + 1
    token_bytes = 2 * head_dim(config) * dtype.itemsize * config.num_hidden_layers
    if blocks * settings.page_size * token_bytes <= available // 2:
        settings.num_blocks = blocks


def _slices(cumulative: list[int]) -> list[slice]:
    return [slice(start, stop) for start, stop in itertools.pairwise(cumulative)]
