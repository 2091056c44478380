"""What the model's loop over its layers asks: which calls to make, a layer each, or one for all and the norm after them."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.utils import is_torchdynamo_compiling

from modeling_deepseek_moe.attention import ABSORBED
from modeling_deepseek_moe.engine import card
from modeling_deepseek_moe.engine.fused import run_by_halves
from modeling_deepseek_moe.engine.plan import SLOT, Plan, Stages
from modeling_deepseek_moe.ops import _native
from modeling_deepseek_moe.ops._dispatch import CPU, REFERENCE, TRITON, may_use, use_backend
from modeling_deepseek_moe.ops._hooks import every_module_is_hooked
from modeling_deepseek_moe.ops.decode_step.cpu import FEW_TOKENS


def runs(
    model: nn.Module, layers: list[nn.Module], hidden_states: torch.Tensor, cache: Cache | None, context: dict
) -> Sequence[Callable]:
    """The calls that take ``hidden_states [B, q, D]`` through ``layers`` and ``model.norm``, with a layer's arguments and result.

    A prompt goes through the modules. While a model decodes without gradients on a CPU, the CPU engine runs what it can of
    them: all in one call, where it finds nothing foreign.

    Args:
        context: what the layers share in this pass: mask, rotary tables, attention path.
    """
    calls = _calls(model, layers, hidden_states, cache, context)
    return [calls.run] if isinstance(calls, Plan) else [*calls, partial(_norm, model.norm)]


def _norm(norm: nn.Module, hidden_states: torch.Tensor, **context) -> torch.Tensor:
    return norm(hidden_states)


def _calls(
    model: nn.Module, layers: list[nn.Module], hidden_states: torch.Tensor, cache: Cache | None, context: dict
) -> Plan | Sequence[Callable]:
    """A call for each layer, or the plan of all of them and the norm."""
    if context.get("training_pass") is not None:
        # without gradients, as while indexers alone learn, no checkpoint runs a layer again
        return [partial(recomputable, layer) for layer in layers] if torch.is_grad_enabled() else layers
    if torch.compiler.is_exporting() or every_module_is_hooked():  # an exported program runs where this package is not
        return layers
    mask, compiling = context["attention_mask"], is_torchdynamo_compiling()
    one_for_all_heads = mask is None or (isinstance(mask, torch.Tensor) and mask.ndim == 4 and mask.shape[1] == 1)
    tokens = hidden_states.shape[0] * hidden_states.shape[1]
    if hidden_states.is_cuda and one_for_all_heads and context["mla_path"] == ABSORBED:
        plain = not (torch.is_autocast_enabled("cuda") or context["output_attentions"])
        if plain and may_use(TRITON, card.unsupported_reason(layers, hidden_states, cache)):
            return [partial(card.run, layers)]
    if tokens > FEW_TOKENS or hidden_states.device.type != "cpu" or not one_for_all_heads:
        if not compiling:
            model.__dict__[SLOT] = None  # a prompt: what comes after it is looked over again
        return layers
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or context["output_attentions"]:
        return layers
    if compiling:
        if not may_use(CPU, _native.unavailable_reason()):
            return layers
        hidden = model.config.hidden_size
        return [run_by_halves(layer, Stages.of(layer, hidden_states.dtype, hidden)) for layer in layers]
    plan = model.__dict__.get(SLOT)
    if plan is None or not plan.is_of(layers, model.norm) or not plan.is_current(hidden_states.dtype):
        plan = model.__dict__[SLOT] = Plan(layers, model.norm, model.config, hidden_states.dtype)
    if not plan.runs_anything:
        return layers
    has_rows = mask is None or mask.shape[2] == hidden_states.shape[1]  # else one for all tokens
    attends = context["mla_path"] == ABSORBED and context["past_length"] and has_rows
    if attends and plan.can_write(cache, hidden_states.shape[0]):
        return plan
    return [run_by_halves(layer, stages) for layer, stages in zip(layers, plan.stages, strict=True)]


def recomputable(layer: nn.Module, *arguments, **context) -> torch.Tensor:
    """A layer in training, by operations that are the same ones when a checkpoint runs it again.

    Reentrant checkpointing runs a layer once without gradients and once with them. The engine has none: it would round
    otherwise in the first run, and the router could choose other experts than in the second. FP8 it computes in both. On a card
    other kernels serve each of the two; without such a checkpoint gradients are wanted each time, and the kernels are the same.
    """
    on_a_card, reentrant = arguments[0].is_cuda, _is_reentrant(layer)
    if on_a_card and torch.is_grad_enabled() and not reentrant:
        return layer(*arguments, **context)
    if any(parameter.dtype.itemsize == 1 for parameter in layer.parameters()):
        return layer(*arguments, **context)
    with (
        _recomputed_by_reference(layer) if on_a_card and reentrant else contextlib.nullcontext(),
        use_backend(REFERENCE),
    ):
        return layer(*arguments, **context)


def _is_reentrant(layer: nn.Module) -> bool:
    """Whether transformers runs a layer within a reentrant checkpoint."""
    wanted = getattr(layer, "gradient_checkpointing", False) and layer.training
    return wanted and bool(getattr(layer._gradient_checkpointing_func, "keywords", {}).get("use_reentrant"))


@contextlib.contextmanager
def _recomputed_by_reference(layer: nn.Module) -> Iterator[None]:
    """While it lasts, what a checkpoint of the layer runs again in the backward pass, in another thread, is plain torch too."""
    checkpoint = layer._gradient_checkpointing_func

    def by_reference(run: Callable, *inputs):
        with use_backend(REFERENCE):
            return run(*inputs)

    layer._gradient_checkpointing_func = lambda run, *inputs: checkpoint(partial(by_reference, run), *inputs)
    try:
        yield
    finally:
        layer._gradient_checkpointing_func = checkpoint
