"""How a callback of `Trainer` finds the model inside its wrappers, and the loads of an optimizer step on all ranks."""

from collections.abc import Iterator

import torch
from torch import nn

from modeling_deepseek_moe.modeling import DeepseekMoeForCausalLM, DeepseekMoeModel
from modeling_deepseek_moe.moe.layer import DeepseekMoE
from modeling_deepseek_moe.moe.router import DeepseekTopkRouter
from modeling_deepseek_moe.moe.training_state import TrainingState


def find_model(model: nn.Module, kind: type[nn.Module] = DeepseekMoeModel) -> nn.Module:
    """The model of this package inside adapters and wrappers.

    Raises:
        ValueError: there is none.
    """
    found = next((module for module in model.modules() if isinstance(module, kind)), None)
    if found is None:
        raise ValueError(
            f"found a {type(model).__name__} without a {kind.__name__} in it, wanted a DeepSeek MoE model"
        )
    return found


def find_language_model(model: nn.Module) -> DeepseekMoeForCausalLM:
    """As `find_model`, with its head."""
    return find_model(model, DeepseekMoeForCausalLM)


def attach_state(model: nn.Module) -> TrainingState:
    """The model's `TrainingState`, made if there is none."""
    base = find_model(model)
    if base.training_state is None:
        base.training_state = TrainingState()
    return base.training_state


def detach_state(model: nn.Module) -> None:
    find_model(model).training_state = None


def routers(model: nn.Module) -> Iterator[tuple[int, DeepseekTopkRouter]]:
    """Layer index and router of every MoE layer; two of one index where an adapter keeps a copy to train."""
    for module in find_model(model).modules():
        if isinstance(module, DeepseekMoE):
            yield from (
                (module.layer_idx, part) for part in module.gate.modules() if isinstance(part, DeepseekTopkRouter)
            )


def step_loads(model: nn.Module, step: int) -> dict[int, torch.Tensor]:
    """Tokens that each expert got in an optimizer step, ``{layer: [E] int64}``, summed over micro-batches and ranks.

    Ranks that saw the same tokens (tensor parallelism) count them as often as they are: the same for every expert.

    Args:
        step: callers that name the same step get the same loads.
    """
    state = attach_state(model)
    if state.step != step:
        state.step, state.step_loads = step, _summed(state.take_loads())
    return state.step_loads


def _summed(loads: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
    if not (loads and torch.distributed.is_available() and torch.distributed.is_initialized()):
        return loads
    layers = sorted(loads)
    stacked = torch.stack([loads[layer] for layer in layers])
    torch.distributed.all_reduce(stacked)
    return dict(zip(layers, stacked.unbind(0), strict=True))
