"""Modules as they were when a table was made of them, and whether they still are: asked before every step, so in few and plain loops."""

from operator import is_

import torch
from torch import nn

from modeling_deepseek_moe.attention import DeepseekAttention
from modeling_deepseek_moe.layers import DeepseekRMSNorm
from modeling_deepseek_moe.moe.router import DeepseekTopkRouter
from modeling_deepseek_moe.ops import _lora
from modeling_deepseek_moe.ops._hooks import any_hooked, is_hooked
from modeling_deepseek_moe.quantized.mapped import MappedExperts
from modeling_deepseek_moe.rope import DeepseekRotaryEmbedding

NUMBERS = {  # attributes whose values are in a table
    DeepseekAttention: ("scaling", "layer_idx"),
    DeepseekRMSNorm: ("variance_epsilon",),
    DeepseekTopkRouter: (
        *("top_k", "n_group", "topk_group", "scoring_func", "topk_method", "norm_topk_prob", "routed_scaling_factor"),
    ),
    DeepseekRotaryEmbedding: ("rope_type", "attention_scaling"),
    nn.Embedding: ("max_norm",),
}


class Watch:
    """What hangs on modules, their children, tensors and numbers."""

    def __init__(self):
        self._unhooked: list[dict] = []  # attributes of modules that nothing is attached to
        self._hooked: list[nn.Module] = []
        self._slots: list[tuple[dict, list]] = []  # of children, parameters and buffers, and what was in them
        self._modules: list[nn.Module] = []
        self._kinds: list[type] = []
        self._memory: list[tuple[torch.Tensor, int, torch.Size, torch.dtype, bool]] = []
        self._numbers: list[tuple[dict, str, object]] = []
        self._mapped: list[tuple[MappedExperts, object]] = []
        self._adapted: list[tuple[nn.Module, tuple]] = []  # experts, and what their adapters were
        # linear layers and routers with an adapter, and what peft changes of them
        self._lora: list[tuple[nn.Module, tuple]] = []

    def add(self, whole: nn.Module) -> None:
        """A module, and all in it."""
        for module in whole.modules():
            if is_hooked(module):
                self._hooked.append(module)
            else:
                self._unhooked.append(module.__dict__)
            for slots in (module._modules, module._parameters, module._buffers):
                if slots:
                    self._slots.append((slots, [*slots.values()]))
            tensors = (*module._parameters.values(), *module._buffers.values())
            self._add_memory(*tensors)
            self._modules.append(module)
            self._kinds.append(type(module))
            attributes = module.__dict__
            self._numbers += [(attributes, name, attributes[name]) for name in NUMBERS.get(type(module), ())]
            owner, name = module._parameters.get("weight"), "quant_state"
            while (state := getattr(owner, name, None)) is not None:  # bitsandbytes' scales, which may be nested
                self._numbers += [(vars(owner), name, state)]
                self._numbers += [(vars(state), one, getattr(state, one)) for one in ("absmax", "code", "offset")]
                self._add_memory(state.absmax, state.code)
                owner, name = state, "state2"
            if isinstance(module, MappedExperts):
                self._mapped.append((module, module.stream))
            if _lora.is_lora(module):
                self._lora.append((module, _lora.state(module)))

    def _add_memory(self, *tensors: torch.Tensor | None) -> None:
        """Where tensors lie and how; no rows that are not contiguous are read."""
        self._memory += [
            (one, one.data_ptr(), one.shape, one.dtype, one.is_contiguous()) for one in tensors if one is not None
        ]

    def add_adapted(self, experts: nn.Module, operands: tuple) -> None:
        """What ``experts.for_engine()`` gave."""
        self._adapted.append((experts, operands))

    def is_current(self) -> bool:
        """Whether no module, its class, hook, weight, scales or number was replaced since it was added.

        Raises:
            CheckpointError: a file that experts are mapped from was truncated or rewritten.
        """
        if any_hooked(self._unhooked) or not all(map(is_hooked, self._hooked)):
            return False
        if not all(map(is_, map(type, self._modules), self._kinds)):
            return False
        for slots, values in self._slots:
            if len(slots) != len(values) or not all(map(is_, slots.values(), values)):
                return False
        for tensor, pointer, shape, dtype, is_contiguous in self._memory:
            if tensor.data_ptr() != pointer or tensor.shape != shape or tensor.dtype != dtype:
                return False
            if tensor.is_contiguous() is not is_contiguous:
                return False
        for attributes, name, value in self._numbers:
            if attributes.get(name) is not value:
                return False
        if not all(_is_same(module.for_engine(), operands) for module, operands in self._adapted):
            return False
        if any(_lora.state(module) != state for module, state in self._lora):
            return False
        for module, stream in self._mapped:
            if not isinstance(module, MappedExperts) or module.stream is not stream:  # moved to a device, and back
                return False
            module.check_files()
        return True


def _is_same(found: tuple | None, wanted: tuple) -> bool:
    """Whether an adapter's operands are still those that are in the table."""
    if found is None or found[0] is not wanted[0]:
        return False
    for pair, other in zip(found[1:], wanted[1:], strict=True):
        if (pair is None) is not (other is None):
            return False
        if pair is not None and (pair[0] is not other[0] or pair[1] is not other[1] or pair[2] != other[2]):
            return False
    return True
