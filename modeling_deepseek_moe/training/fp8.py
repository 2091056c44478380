"""FP8 mixed-precision training (DeepSeek-V3 report, 3.3): a model's layers, swapped before `Trainer` is made.

Parameters stay the floating-point ones of the modules, so optimizers, checkpoints and sharding see nothing new.
"""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from modeling_deepseek_moe.attention import DeepseekAttention
from modeling_deepseek_moe.layers import DeepseekMLP
from modeling_deepseek_moe.moe.experts import DeepseekExperts
from modeling_deepseek_moe.ops._hooks import is_hooked
from modeling_deepseek_moe.ops.experts import LowRank, Slots, runs_on_card, triton_fp8
from modeling_deepseek_moe.training.attach import find_model
from modeling_deepseek_moe.training.fp8_functions import Fp8LinearFunction, Fp8SwiGluFunction, Fp8Weight


@dataclass(frozen=True)
class Fp8TrainingConfig:
    """Args:
    fp8_wgrad: Wgrad in FP8, as the report; ``False`` leaves it in bf16, and activations are then kept in bf16 for it.
    """

    fp8_wgrad: bool = True


class OptimizerSteps:
    """How often any optimizer of the process has stepped, while this object lives, and what it quantised since.

    Some optimizers write weights past autograd's version counter, and FSDP2 hides its own writes from it.
    """

    def __init__(self):
        self.count = 0
        self._lost: list[
            torch.Tensor
        ] = []  # of weights on accelerators, one flag for each module: whether a value was lost
        reference = weakref.ref(self)

        def step(*_):
            steps = reference()
            if steps is not None:
                steps.count += 1
                steps.check()

        self._handle = register_optimizer_step_post_hook(step)
        weakref.finalize(self, self._handle.remove)

    def watch(self, weights: Iterable[Fp8Weight | triton_fp8.Stack]) -> None:
        """Note whether one of these is not finite; those of the CPU were looked at as they were quantised."""
        scales = [weight.scale.flatten() for weight in weights if weight.scale.device.type != "cpu"]
        if scales:
            self._lost.append(torch.cat(scales).isnan().any())

    def check(self) -> None:
        """
        Raises:
            ValueError: a weight of the step that is over had NaN or Inf. The one look at a device in a step.
        """
        lost, self._lost = self._lost, []
        if lost and bool(torch.stack([flag.to(lost[0].device) for flag in lost]).any()):
            raise ValueError("FP8 training: found NaN or Inf (in fp32) in a weight, wanted finite values")

    def __deepcopy__(self, memo):
        return OptimizerSteps()

    def __reduce__(self):
        return OptimizerSteps, ()


class _Fp8Trained:
    """What the swapped modules share: their settings, and codes that hold until the weights change."""

    fp8: Fp8TrainingConfig
    steps: OptimizerSteps
    _codes: tuple | None = None

    def _quantized(self, make: Callable, *weights: torch.Tensor):
        key = (make, self.steps.count, *((weight.data_ptr(), weight._version) for weight in weights))
        if self._codes is None or self._codes[0] != key:
            self._codes = (key, make(*weights))
            self.steps.watch(_leaves(self._codes[1]))
        return self._codes[1]


def _leaves(quantized) -> list[Fp8Weight | triton_fp8.Stack]:
    """The weights in what a module quantised: one, or tuples of them."""
    if isinstance(quantized, Fp8Weight | triton_fp8.Stack):
        return [quantized]
    return [weight for part in quantized for weight in _leaves(part)]


class Fp8TrainedLinear(_Fp8Trained, nn.Linear):
    """``nn.Linear`` whose three products are in FP8."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = _autocast(x)
        y = Fp8LinearFunction.apply(x, self.weight, self.quantized(), self.fp8.fp8_wgrad)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def quantized(self) -> Fp8Weight:
        return self._quantized(Fp8Weight.of, self.weight)


class Fp8TrainedMLP(DeepseekMLP):
    """SwiGLU in FP8 whose input is kept in FP8 and whose output is made again in the backward pass."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up, down = parts = self.gate_proj, self.up_proj, self.down_proj
        if any(type(p) is not Fp8TrainedLinear or p.bias is not None or is_hooked(p) for p in parts):
            return super().forward(x)  # adapters
        x = _autocast(x)
        rows = x.reshape(-1, x.shape[-1])
        gate_up = torch.cat((gate.weight, up.weight)).unsqueeze(0)
        quantized = [tuple(part.quantized() for part in parts)]
        fp8_wgrad = gate.fp8.fp8_wgrad
        y = Fp8SwiGluFunction.apply(rows, gate_up, down.weight.unsqueeze(0), quantized, [len(rows)], fp8_wgrad)
        return y.view(x.shape)


class Fp8TrainedExperts(_Fp8Trained, DeepseekExperts):
    """Routed experts in FP8; gate, up and down of each expert have blocks of their own, as in a release."""

    def forward(self, hidden_TD, topk_indices, topk_weights, low_rank: LowRank | None = None):
        if low_rank is not None:
            return super().forward(hidden_TD, topk_indices, topk_weights, low_rank)  # adapters
        hidden_TD = _autocast(hidden_TD)
        weights = self.gate_up_proj, self.down_proj
        if runs_on_card(triton_fp8.refuses(hidden_TD, *weights)):
            stacks = self._quantized(_stacked, *weights)
            routed = hidden_TD, topk_indices, topk_weights
            return triton_fp8.GroupedFp8SwiGlu.apply(*routed, *weights, stacks, self.fp8.fp8_wgrad)
        slots = Slots.of(topk_indices, self.num_experts)
        counts = slots.counts
        order = slots.order[: sum(counts)]  # without the slots that another expert-parallel rank serves
        tokens_R = order // topk_indices.shape[1]
        y_RD = Fp8SwiGluFunction.apply(
            hidden_TD[tokens_R], *weights, self._quantized(_each_expert, *weights), counts, self.fp8.fp8_wgrad
        )
        weighted = y_RD * topk_weights.flatten()[order, None]
        return torch.zeros_like(hidden_TD).index_add(0, tokens_R, weighted.to(hidden_TD.dtype))


def _each_expert(gate_up_E: torch.Tensor, down_E: torch.Tensor) -> list[tuple[Fp8Weight, ...]]:
    """Gate, up and down of each."""
    experts = zip(gate_up_E.detach(), down_E.detach(), strict=True)
    return [(*(Fp8Weight.of(half) for half in gate_up.chunk(2)), Fp8Weight.of(down)) for gate_up, down in experts]


def _stacked(gate_up_E: torch.Tensor, down_E: torch.Tensor) -> tuple[triton_fp8.Stack, triton_fp8.Stack]:
    return triton_fp8.Stack.of(gate_up_E, 2), triton_fp8.Stack.of(down_E)


def prepare_fp8_training(model: nn.Module, config: Fp8TrainingConfig | None = None) -> nn.Module:
    """Swap every linear layer and all routed experts of the decoder and MTP layers for those that train in FP8.

    Embedding, head, router, norms, attention core and ``eh_proj`` stay as they are. Call it before `Trainer` is made, with
    parameters in fp32 or bf16 and ``TrainingArguments(bf16=True)``; saving, resuming and evaluating are unchanged.

    Returns:
        ``model``, whose modules were swapped in place.

    Raises:
        ValueError: weights that are FP8 already, or an activation function other than SiLU.
    """
    config = config or Fp8TrainingConfig()
    base = find_model(model)
    if base.config.hidden_act not in ("silu", "swish"):
        raise ValueError(f"FP8 training: found hidden_act={base.config.hidden_act!r}, wanted 'silu'")
    codes = [name for name, parameter in base.layers.named_parameters() if parameter.dtype.itemsize == 1]
    if codes:
        raise ValueError(
            f"FP8 training: found FP8 codes in {codes[0]}, wanted fp32 or bf16 weights: load the checkpoint with "
            "FineGrainedFP8Config(dequantize=True)"
        )
    steps = OptimizerSteps()
    for module in list(base.layers.modules()):
        swaps = {}
        if isinstance(module, (DeepseekAttention, DeepseekMLP)):
            # an adapter keeps the layer that it wraps as ``base_layer``, next to small ones of its own
            swaps = {getattr(child, "base_layer", child): Fp8TrainedLinear for child in module.children()}
            if type(module) is DeepseekMLP:
                swaps[module] = Fp8TrainedMLP
        elif type(module) is DeepseekExperts:
            swaps[module] = Fp8TrainedExperts
        for part, trained in swaps.items():
            if type(part) in trained.__mro__:
                # Not a new module: parameters, hooks and whatever refers to this one stay as they are.
                part.__class__ = trained
                part.fp8, part.steps = config, steps
    return model


def _autocast(x: torch.Tensor) -> torch.Tensor:
    device_type = x.device.type
    return x.to(torch.get_autocast_dtype(device_type)) if torch.is_autocast_enabled(device_type) else x
