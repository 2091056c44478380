"""Every tensor of a release, from the config alone; and the one place where model and release names differ.

The model stacks a layer's routed experts; a release stores them one by one. Everything else has the same name, but for what a
family spells otherwise (`ReleaseNames`).
"""

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from modeling_deepseek_moe.checkpoint.headers import TensorInfo
from modeling_deepseek_moe.config import DeepseekMoeConfig, quantization_fields
from modeling_deepseek_moe.formats.announcements import head_has_codes

# model tensor -> the release's projections of one expert, in the order in which they fill its rows
STACKS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
EXPERT_KEY = re.compile(r"^(.*\.mlp\.experts)\.([0-9]{1,9})\.(gate_proj|up_proj|down_proj)\.weight([_.][\w.]+)?$")
STACK_KEY = re.compile(r"^(.*\.mlp\.experts)\.(gate_up_proj|down_proj)(_\w+)?$")
NUMBER = re.compile(r"(?<=\.)[0-9]+")
LAYER_KEY = re.compile(r"^model\.layers\.([0-9]{1,9})\.")
# The head and its copies of MTP layers: codes where a config says so of the head.
HEAD_KEY = re.compile(r"^(lm_head|model\.layers\.[0-9]{1,9}\.shared_head\.head)\.weight$")
MTP_KEY = re.compile(r"^model\.layers\.([0-9]{1,9})\.(embed_tokens|enorm|hnorm|eh_proj|shared_head)\.")


class TensorSpec(NamedTuple):
    """What a release stores under one name. ``quantized``: in a quantised release it is codes, with scales next to it."""

    shape: tuple[int, ...]
    part: str
    quantized: bool = False


def release_tensors(config: DeepseekMoeConfig) -> dict[str, TensorSpec]:
    """All tensors of a release with this config by name, scales left out (a format names its own)."""
    hidden, vocab = config.hidden_size, config.vocab_size
    with_head = head_has_codes(quantization_fields(config))
    tensors = {"model.embed_tokens.weight": TensorSpec((vocab, hidden), "embedding")}
    depth = config.num_hidden_layers
    for layer in range(depth + config.num_nextn_predict_layers):
        specs = dict(_decoder_layer(config, layer))
        if layer >= depth:
            specs |= {
                "embed_tokens.weight": TensorSpec((vocab, hidden), "mtp"),
                "enorm.weight": TensorSpec((hidden,), "mtp"),
                "hnorm.weight": TensorSpec((hidden,), "mtp"),
                "eh_proj.weight": TensorSpec((hidden, 2 * hidden), "mtp"),
                "shared_head.norm.weight": TensorSpec((hidden,), "mtp"),
                "shared_head.head.weight": TensorSpec((vocab, hidden), "mtp", with_head),
            }
            mtp = {spec: spec._replace(part="mtp") for spec in set(specs.values())}
            specs = {name: mtp[spec] for name, spec in specs.items()}
        tensors |= {f"model.layers.{layer}.{name}": spec for name, spec in specs.items()}
    tensors["model.norm.weight"] = TensorSpec((hidden,), "norms")
    if not config.tie_word_embeddings:
        tensors["lm_head.weight"] = TensorSpec((vocab, hidden), "head", with_head)
    return tensors


def _decoder_layer(config: DeepseekMoeConfig, layer: int) -> Iterator[tuple[str, TensorSpec]]:
    hidden = config.hidden_size
    yield "input_layernorm.weight", TensorSpec((hidden,), "norms")
    yield from ((f"self_attn.{name}", spec) for name, spec in _attention(config))
    if config.has_indexer(layer):
        yield from ((f"self_attn.indexer.{name}", spec) for name, spec in _indexer(config))
    yield "post_attention_layernorm.weight", TensorSpec((hidden,), "norms")
    if not config.is_moe_layer(layer):
        yield from _swiglu("mlp.", hidden, config.intermediate_size, "dense")
        return
    yield "mlp.gate.weight", TensorSpec((config.n_routed_experts, hidden), "router")
    if config.topk_method == "noaux_tc":
        yield "mlp.gate.e_score_correction_bias", TensorSpec((config.n_routed_experts,), "router")
    width = config.moe_intermediate_size
    experts = list(_swiglu("", hidden, width, "routed experts"))  # 45,312 in DeepSeek-V3: one spec for all of a kind
    for expert in range(config.n_routed_experts):
        yield from ((f"mlp.experts.{expert}.{name}", spec) for name, spec in experts)
    if config.n_shared_experts:
        yield from _swiglu("mlp.shared_experts.", hidden, width * config.n_shared_experts, "shared experts")
    if config.has_post_mlp_norm:
        yield "mlp.post_mlp_layernorm.weight", TensorSpec((hidden,), "norms")


def _attention(config: DeepseekMoeConfig) -> Iterator[tuple[str, TensorSpec]]:
    hidden, heads, rank = config.hidden_size, config.num_attention_heads, config.kv_lora_rank

    def linear(name: str, rows: int, cols: int, bias: bool = False):
        yield f"{name}.weight", TensorSpec((rows, cols), "attention", quantized=True)
        if bias:
            yield f"{name}.bias", TensorSpec((rows,), "attention")

    query = heads * config.qk_head_dim
    if config.q_lora_rank is None:
        yield from linear("q_proj", query, hidden)
    else:
        yield from linear("q_a_proj", config.q_lora_rank, hidden, config.attention_bias)
        yield "q_a_layernorm.weight", TensorSpec((config.q_lora_rank,), "norms")
        yield from linear("q_b_proj", query, config.q_lora_rank)
    yield from linear("kv_a_proj_with_mqa", rank + config.qk_rope_head_dim, hidden, config.attention_bias)
    yield "kv_a_layernorm.weight", TensorSpec((rank,), "norms")
    yield from linear("kv_b_proj", heads * (config.qk_nope_head_dim + config.v_head_dim), rank)
    yield from linear("o_proj", hidden, heads * config.v_head_dim, config.attention_bias)


def _indexer(config: DeepseekMoeConfig) -> Iterator[tuple[str, TensorSpec]]:
    heads, dim = config.index_n_heads, config.index_head_dim
    yield "wq_b.weight", TensorSpec((heads * dim, config.q_lora_rank), "attention", quantized=True)
    yield "wk.weight", TensorSpec((dim, config.hidden_size), "attention", quantized=True)
    yield "k_norm.weight", TensorSpec((dim,), "norms")
    yield "k_norm.bias", TensorSpec((dim,), "norms")
    yield "weights_proj.weight", TensorSpec((heads, config.hidden_size), "attention")


def _swiglu(prefix: str, hidden: int, width: int, part: str) -> Iterator[tuple[str, TensorSpec]]:
    yield f"{prefix}gate_proj.weight", TensorSpec((width, hidden), part, quantized=True)
    yield f"{prefix}up_proj.weight", TensorSpec((width, hidden), part, quantized=True)
    yield f"{prefix}down_proj.weight", TensorSpec((hidden, width), part, quantized=True)


def linear_modules(config: DeepseekMoeConfig, is_wanted: Callable[[str, TensorSpec], bool]) -> list[str]:
    """The linear layers of a release that are wanted, as ``re:`` patterns over numbers where all of a kind are, or by name.

    Args:
        is_wanted: of a weight's name and spec.
    """
    kinds: dict[str, dict[str, bool]] = {}
    for name, spec in release_tensors(config).items():
        module = config.names.released(name).removesuffix(".weight")
        if name.endswith(".weight") and len(spec.shape) == 2 and not module.endswith("embed_tokens"):
            kinds.setdefault(NUMBER.sub(r"\\d+", re.escape(module)), {})[module] = is_wanted(name, spec)
    found: list[str] = []
    for pattern, modules in kinds.items():
        wanted = [module for module, is_one in modules.items() if is_one]
        found += [f"re:{pattern}$"] if len(wanted) == len(modules) > 1 else wanted
    return found


def stack_sources(stack_name: str, num_experts: int) -> list[list[str]]:
    """Release names that fill a stacked tensor: one list an expert, in row order.

    ``...mlp.experts.gate_up_proj`` → ``[[...experts.0.gate_proj.weight, ...experts.0.up_proj.weight], ...]``.
    """
    prefix, stack, scale = STACK_KEY.match(stack_name).groups()
    return [
        [f"{prefix}.{expert}.{projection}.weight{scale or ''}" for projection in STACKS[stack]]
        for expert in range(num_experts)
    ]


def unstack_info(info: TensorInfo, num_experts: int) -> Iterator[TensorInfo]:
    """A header's entry for a stack of ``num_experts``, as the entries of its parts; any other entry as it is.

    transformers saves stacks when told ``save_original_format=False``. Experts, and an expert's projections, lie one
    after the other in a stack, so each part is one run of bytes.
    """
    match = STACK_KEY.match(info.name)
    projections = len(STACKS[match[2]]) if match else 1
    if match is None or len(info.shape) != 3 or info.shape[0] != num_experts or info.shape[1] % projections:
        yield info
        return
    names = [name for expert in stack_sources(info.name, num_experts) for name in expert]
    shape, size = (info.shape[1] // projections, info.shape[2]), info.nbytes // len(names)
    for index, name in enumerate(names):
        start = info.start + index * size
        yield info._replace(name=name, shape=shape, start=start, end=start + size)


def unstack(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """A model tensor under its release name or names, as views."""
    if not STACK_KEY.match(name):
        yield name, tensor
        return
    for names, expert in zip(stack_sources(name, tensor.shape[0]), tensor.unbind(0), strict=True):
        yield from zip(names, expert.chunk(len(names)), strict=True)


def stack_boxes(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """The release names of what a model tensor of this shape holds, each with the offsets and sizes of its part of it."""
    stack = STACK_KEY.match(name)
    if stack is None:
        yield name, (0,) * len(shape), tuple(shape)
        return
    experts, rows, *rest = shape
    rows //= len(STACKS[stack[2]])
    for expert, names in enumerate(stack_sources(name, experts)):
        for part, released in enumerate(names):
            yield released, (expert, part * rows, *(0 for _ in rest)), (1, rows, *rest)


def natural_order(name: str) -> list:
    """A key to sort names by, with numbers in them by size."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]


class LazyStack:
    """A stacked tensor that is put together only when it is read (the slice protocol of safetensors).

    ``sources[e]`` are the parts of expert ``e``, each a tensor or a callable that makes one; reading any range of
    experts touches those experts only, and one part is in flight at a time.
    """

    def __init__(self, sources: list[list], shape: tuple[int, ...], dtype: torch.dtype):
        self.sources, self.shape, self.dtype = sources, shape, dtype

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point

    def __getitem__(self, index) -> torch.Tensor:
        index = index if isinstance(index, tuple) else (index,)
        experts = slice(None) if index[0] is Ellipsis else index[0]
        chosen = self.sources[experts]
        single = not isinstance(experts, slice)
        out = torch.empty((1 if single else len(chosen), *self.shape[1:]), dtype=self.dtype)
        for row, parts in enumerate([chosen] if single else chosen):
            start = 0
            for part in parts:
                part = part() if callable(part) else part
                out[row, start : start + len(part)] = part
                start += len(part)
        rest = tuple(i for i in index[1:] if i is not Ellipsis)
        return out[0][rest] if single else out[(slice(None), *rest)]


class LazyTensor:
    """A tensor made by ``make`` when it is read (the slice protocol of safetensors)."""

    def __init__(self, make, shape: tuple[int, ...], dtype: torch.dtype):
        self.make, self.shape, self.dtype = make, shape, dtype

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point

    def __getitem__(self, index) -> torch.Tensor:
        return self.make()[index]
