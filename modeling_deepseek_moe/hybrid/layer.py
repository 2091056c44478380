"""A mixture-of-experts layer on an accelerator whose routed experts lie on the CPU.

Legend: T tokens, D hidden size.
"""

import torch
from torch import nn

from modeling_deepseek_moe.hybrid.places import ExpertPlaces
from modeling_deepseek_moe.moe.layer import DeepseekMoE
from modeling_deepseek_moe.moe.training_state import TrainingPass


class HybridMoE(DeepseekMoE):
    """What `DeepseekMoE` computes, in an order that lets both sides work: shared experts are launched in between.

    It has the modules of the layer that it is made `of`, under their names. Moving the model moves all but the experts.
    """

    places: ExpertPlaces | None

    @classmethod
    def of(cls, layer: DeepseekMoE, places: ExpertPlaces) -> "HybridMoE":
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made.layer_idx, made.training = layer.layer_idx, layer.training
        made.gate, made.experts, made.shared_experts = layer.gate, layer.experts, layer.shared_experts
        made.places = places
        return made

    def forward(self, hidden_states: torch.Tensor, training_pass: TrainingPass | None = None) -> torch.Tensor:
        if self.places is None:  # a copy, which has no memory of its own on the device
            self.places = ExpertPlaces(hidden_states.device)
        if training_pass is not None or (torch.is_grad_enabled() and hidden_states.requires_grad):
            return self._differentiable(hidden_states, training_pass)
        _, topk_weights, topk_indices = self.gate(hidden_states)
        hidden_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        pending = self.places.begin(hidden_TD, topk_indices, topk_weights)
        shared = None if self.shared_experts is None else self.shared_experts(hidden_states)
        routed = self.places.finish(self.layer_idx, self.experts, pending).view(hidden_states.shape)
        return routed if shared is None else routed + shared

    def _differentiable(self, hidden_states: torch.Tensor, training_pass: TrainingPass | None) -> torch.Tensor:
        """By copies that gradients go back through."""
        logits, topk_weights, topk_indices = self.gate(hidden_states)
        if training_pass is not None:
            router = self.gate.base_layer if hasattr(self.gate, "base_layer") else self.gate  # in an adapter
            topk_weights = training_pass.observe(self.layer_idx, router, logits, topk_indices, topk_weights)
        hidden_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        given = (tensor.to("cpu") for tensor in (hidden_TD, topk_indices, topk_weights))
        routed = self.experts(*given).to(hidden_states.device).view(hidden_states.shape)
        return routed if self.shared_experts is None else routed + self.shared_experts(hidden_states)

    def _apply(self, fn, recurse=True):
        def cast(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(fn(tensor.new_empty(0)).dtype)  # a cast is for the experts too, a move is not

        for child in self.children():
            child._apply(cast if child is self.experts else fn, recurse)
        return self
