"""A decoder as the CPU engine's decoding step takes it: found once a prompt, looked over before every step.

The step reads weights by address. It is taken only while every module is one of this package's own, without hooks,
adapters or biases, and each weight is the very tensor that was found; any other model goes through its layers.
"""

import torch
from torch import nn
from transformers.cache_utils import Cache

from modeling_deepseek_moe.attention import DeepseekAttention
from modeling_deepseek_moe.block import DeepseekDecoderLayer
from modeling_deepseek_moe.cache import LatentLayer
from modeling_deepseek_moe.layers import DeepseekLinear, DeepseekMLP, DeepseekRMSNorm, is_hooked
from modeling_deepseek_moe.moe.experts import HOMES, MappedExperts
from modeling_deepseek_moe.moe.layer import DeepseekMoE
from modeling_deepseek_moe.moe.router import DeepseekTopkRouter
from modeling_deepseek_moe.ops import _native, block_fp8, decode_step
from modeling_deepseek_moe.ops.decode_step.cpu import DTYPES, FEW_TOKENS, WEIGHTS, Layer, Weight

OWN = (DeepseekDecoderLayer, DeepseekAttention, DeepseekRMSNorm, DeepseekMLP, DeepseekMoE, DeepseekTopkRouter)


class NotPlain(Exception):
    """Why a decoder cannot be run in one call."""


class DecodeStep:
    """The layers of a decoder by address. Copies and pickles of it are ``None``.

    Raises:
        NotPlain: the layers cannot be run in one call.
    """

    def __init__(self, layers: nn.ModuleList, config, dtype: torch.dtype):
        if dtype not in DTYPES:
            raise NotPlain(f"states in {dtype}")
        self.dtype = dtype
        self._config = config
        self._modules: list[nn.Module] = []
        self._children: list[tuple[dict, str, nn.Module]] = []
        self._tensors: list[tuple[dict, str, torch.Tensor, int]] = []
        self._mapped: list[MappedExperts] = []
        self._kept: list[torch.Tensor] = []  # tables that the layers point to
        self._layers = (Layer * len(layers))(*(self._layer(layer) for layer in layers))
        for layer in layers:
            self._watch(layer)
        if not self.is_current():
            raise NotPlain("hooks")

    def __reduce__(self):
        return type(None), ()

    def is_current(self) -> bool:
        """Whether no module, hook or weight was changed since it was found.

        Raises:
            CheckpointError: a file that experts are mapped from was truncated or rewritten.
        """
        if any(is_hooked(module) or "forward" in module.__dict__ for module in self._modules):
            return False
        if any(children[name] is not child for children, name, child in self._children):
            return False
        for tensors, name, tensor, pointer in self._tensors:
            if tensors[name] is not tensor or tensor.data_ptr() != pointer:
                return False
        for experts in self._mapped:
            if experts.stream is not None:
                return False
            experts.check_files()
        return True

    def run(
        self, states: torch.Tensor, cache: Cache, past: int, positions: tuple[torch.Tensor, torch.Tensor], mask
    ) -> torch.Tensor:
        """``states [B, 1, D]`` behind the last layer; the cache, of `LatentLayer`, gets their row."""
        config, batch = self._config, states.shape[0]
        new = [states.new_empty((batch, 1, 1, size)) for size in (config.kv_lora_rank, config.qk_rope_head_dim)]
        used = cache.layers[: len(self._layers)]
        dims = (config.num_attention_heads, config.qk_nope_head_dim, config.qk_rope_head_dim)
        states = decode_step.cpu.step(
            states,
            self._layers,
            [layer.reserve(*new) for layer in used],
            past,
            (*dims, config.kv_lora_rank, config.v_head_dim),
            *positions,
            mask,
            config.softmax_scale,
            bool(config.rope_interleave),
        )
        for layer in used:
            layer.advance(past + 1)
        return states

    def _watch(self, layer: nn.Module) -> None:
        for module in layer.modules():
            self._modules.append(module)
            self._children += [(module._modules, name, child) for name, child in module._modules.items()]
            for tensors in (module._parameters, module._buffers):
                found = [(tensors, name, tensor) for name, tensor in tensors.items() if tensor is not None]
                self._tensors += [(*slot, slot[2].data_ptr()) for slot in found]

    def _layer(self, layer: nn.Module) -> Layer:
        self._own(layer, layer.self_attn, layer.mlp)
        attention, found = layer.self_attn, Layer()
        found.input_norm, found.input_eps = self._norm(layer.input_layernorm)
        found.post_norm, found.post_eps = self._norm(layer.post_attention_layernorm)
        if self._config.q_lora_rank is None:
            found.q_b = self._weight(attention.q_proj)
        else:
            found.q_a, found.q_b = self._weight(attention.q_a_proj), self._weight(attention.q_b_proj)
            found.q_norm, found.q_eps = self._norm(attention.q_a_layernorm)
        found.kv_a, found.kv_b = self._weight(attention.kv_a_proj_with_mqa), self._weight(attention.kv_b_proj)
        found.kv_norm, found.kv_eps = self._norm(attention.kv_a_layernorm)
        found.o = self._weight(attention.o_proj)
        if (found.q_a if found.q_a.rows else found.q_b).dtype != found.kv_a.dtype:
            raise NotPlain("projections of several dtypes")
        if isinstance(layer.mlp, DeepseekMoE):
            self._experts(layer.mlp, found)
        else:
            self._dense(layer.mlp, found)
        return found

    def _own(self, *modules: nn.Module) -> None:
        for module in modules:
            if type(module) not in OWN:
                raise NotPlain(type(module).__name__)

    def _plain(self, tensor: torch.Tensor, dtypes) -> int:
        """The address of a tensor that lies in one piece in memory."""
        plain = type(tensor) in (torch.Tensor, nn.Parameter) and tensor.device.type == "cpu"
        if not plain or tensor.dtype not in dtypes or not tensor.is_contiguous():
            raise NotPlain(f"a tensor {_native.describe(tensor)} on {tensor.device}")
        return tensor.data_ptr()

    def _norm(self, norm: nn.Module) -> tuple[int, float]:
        self._own(norm)
        return self._plain(norm.weight, (self.dtype,)), norm.variance_epsilon

    def _weight(self, linear: nn.Module) -> Weight:
        if not isinstance(linear, DeepseekLinear) or not linear.is_bare:
            raise NotPlain(f"{type(linear).__name__} with an adapter, a bias or a hook")
        data, scale = self._plain(linear.weight, WEIGHTS), linear.scale_inv
        if (scale is None) != (linear.weight.dtype == torch.bfloat16) or linear.block != block_fp8.BLOCK:
            raise NotPlain(f"FP8 in blocks of {linear.block}")
        address = 0 if scale is None else self._plain(scale, (torch.float32,))
        return Weight(data, address, *linear.weight.shape, _native.DTYPES[linear.weight.dtype])

    def _dense(self, mlp: DeepseekMLP, found: Layer) -> None:
        self._own(mlp)
        probe = torch.empty((1, self._config.hidden_size), dtype=self.dtype)
        refusal = mlp.refusal(probe)
        if refusal is not None:
            raise NotPlain(refusal)
        weights = [self._weight(part) for part in mlp.parts]
        for place, weight in enumerate(weights):
            found.shared[2 * place], found.shared[2 * place + 1] = weight.data, weight.scale
        found.dims[11], found.dims[12] = weights[0].rows, weights[0].dtype

    def _experts(self, moe: DeepseekMoE, found: Layer) -> None:
        gate, experts = moe.gate, moe.experts
        self._own(gate)
        if type(experts) not in HOMES:
            raise NotPlain(type(experts).__name__)
        table = experts.engine_table(torch.empty((1, self._config.hidden_size), dtype=self.dtype))
        if table is None:
            raise NotPlain("experts that are streamed, or not for the engine")
        if isinstance(experts, MappedExperts):
            self._mapped.append(experts)
        self._kept.append(table.addresses)
        found.gate, found.factor = self._plain(gate.weight, (torch.bfloat16,)), gate.factor
        if gate.e_score_correction_bias is not None:
            found.bias = self._plain(gate.e_score_correction_bias, (torch.float32,))
        found.table = self._plain(table.addresses, (torch.int64,))
        dims = (0, self._config.hidden_size, table.width, gate.num_experts, *gate.routing)
        found.dims[: len(dims)] = dims
        found.dims[10] = _native.DTYPES[table.dtype]
        if moe.shared_experts is not None:
            self._dense(moe.shared_experts, found)


def few(states: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Whether a step is for ``states [B, q, D]`` under this mask."""
    batch, length, _ = states.shape
    fits = mask is None or (isinstance(mask, torch.Tensor) and mask.ndim == 4 and mask.shape[1] == 1)
    return length == 1 and batch <= FEW_TOKENS and states.device.type == "cpu" and fits


def grows_in_place(cache: Cache, dtype: torch.dtype, batch: int, count: int) -> bool:
    """Whether the first ``count`` layers of a cache can take a step's rows."""
    return len(cache.layers) >= count and all(
        type(layer) is LatentLayer
        and layer.is_initialized
        and layer.keys.dtype == dtype
        and layer.keys.shape[0] == batch
        for layer in cache.layers[:count]
    )
