"""What the model's loop over its layers asks: which calls to make, a layer each, or one for a run of layers."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.utils import is_torchdynamo_compiling

from modeling_deepseek_moe.engine.fused import run_layer
from modeling_deepseek_moe.engine.plan import Plan, Stages
from modeling_deepseek_moe.ops import _native
from modeling_deepseek_moe.ops._dispatch import CPU, REFERENCE, may_use, use_backend
from modeling_deepseek_moe.ops.decode_step.cpu import FEW_TOKENS

ABSORBED = "absorbed"
SLOT = "_engine_plan"  # where a model carries the plan that was made of it


def runs(
    model: nn.Module, layers: list[nn.Module], hidden_states: torch.Tensor, cache: Cache | None, context: dict
) -> Sequence[Callable]:
    """The calls that take ``hidden_states [B, q, D]`` through ``layers``, each with the arguments and result of a layer.

    A prompt goes through the layers. While a model decodes without gradients on a CPU, the CPU engine runs what it can of
    them: all in one call, where it finds nothing foreign.

    Args:
        context: what the layers share in this pass: mask, rotary tables, attention path.
    """
    if context.get("training_pass") is not None:
        return [partial(recomputable, layer) for layer in layers]
    compiling = is_torchdynamo_compiling()
    if not _is_few(hidden_states, context["attention_mask"]):
        if not compiling:
            model.__dict__[SLOT] = None  # a prompt: what comes after it is looked over anew
        return layers
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or context["output_attentions"]:
        return layers
    if not may_use(CPU, _native.unavailable_reason()):
        return layers
    if compiling:
        return _fused(layers, [Stages.of(layer, hidden_states.dtype) for layer in layers])
    plan = _plan(model, layers, hidden_states.dtype)
    if not plan.runs_anything:
        return layers
    one_token = hidden_states.shape[1] == 1 and context["mla_path"] == ABSORBED
    if one_token and cache is not None and context["past_length"] and plan.can_write(cache, len(hidden_states)):
        return [plan.run]
    return _fused(layers, plan.stages)


def recomputable(layer: nn.Module, *arguments, **context) -> torch.Tensor:
    """A layer in training, by operations that are the same whether gradients are wanted or not.

    Reentrant checkpointing runs a layer once without gradients and once with them. The engine has none: it would round
    otherwise in the first run, and the router could choose other experts than in the second. FP8 it computes in both.
    """
    if any(parameter.dtype.itemsize == 1 for parameter in layer.parameters()):
        return layer(*arguments, **context)
    with use_backend(REFERENCE):
        return layer(*arguments, **context)


def _plan(model: nn.Module, layers: list[nn.Module], dtype: torch.dtype) -> Plan:
    plan = model.__dict__.get(SLOT)
    if plan is None or plan.dtype != dtype or plan.layers != layers or not plan.is_current():
        plan = model.__dict__[SLOT] = Plan(layers, model.config, dtype)
    return plan


def _fused(layers: list[nn.Module], stages: Sequence[Stages]) -> list[Callable]:
    calls = []
    for layer, stage in zip(layers, stages, strict=True):
        if stage.projections is None or stage.mlp is None:
            mixes = stage.mlp is None and hasattr(layer.mlp, "experts")
            calls.append(partial(run_layer, layer, stage.projections is None, mixes))
        else:
            calls.append(layer)
    return calls


def _is_few(hidden_states: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Whether it is a step of decoding: few tokens on a CPU under a mask that is one for all heads."""
    batch, length, _ = hidden_states.shape
    fits = mask is None or (isinstance(mask, torch.Tensor) and mask.ndim == 4 and mask.shape[1] == 1)
    return batch * length <= FEW_TOKENS and hidden_states.device.type == "cpu" and fits
