"""SGLang 0.5.23: `srt/models/deepseek_common/deepseek_weight_loader.py` and `deepseek_nextn.py`, shared experts not fused."""

import re

import torch

from receivers.deepseek import Names, draft_model, main_model
from receivers.table import Folder, Parameter

VERSION = "0.5.23"
ARCHITECTURES = {"DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"}
METHODS = {"fp8", "compressed-tensors"}
NAMES = Names(
    first="fused_qkv_a_proj_with_mqa",
    first_at_once=True,
    experts="experts",
    block="model.decoder",
    draft="model",
    draft_has_embedding=False,
)
MOST_DRAFTS = 1  # MTP layers
STACKED = {"gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1)}
EXPERTS = {"gate_proj": ("w13", "w1"), "down_proj": ("w2", "w2"), "up_proj": ("w13", "w3")}
OF_DRAFT = ("shared_head.norm", "eh_proj", "enorm", "hnorm")
OF_MODEL = ("shared_head.head", "embed_tokens")  # of an MTP layer: taken from the model
FIRST = ("q_a_proj", "kv_a_proj_with_mqa")
EXPERT = re.compile(r"(.*\.mlp)\.experts\.(\d+)\.(\w+)\.(.*)")


def models(folder: Folder) -> list[dict[str, Parameter]]:
    """The model, and the one that drafts for it."""
    return [main_model(folder, NAMES), draft_model(folder, NAMES)]


def load(folder: Folder, parameters: list[dict[str, Parameter]]) -> list[str]:
    """Puts every tensor where it goes; returns the names of those that are read by neither model."""
    depth, unread = folder.config.num_hidden_layers, []
    waiting: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in folder.tensors():
        layer = re.match(r"model\.layers\.(\d+)", name)
        is_draft, theirs = layer is not None and int(layer[1]) >= depth, name
        if is_draft:
            if any(one in name for one in OF_MODEL):
                unread.append(name)
                continue
            is_own = any(one in name for one in OF_DRAFT)
            theirs = name.replace(layer[0], "model" if is_own else "model.decoder")
        first = next((one for one in FIRST if f".{one}." in theirs), None)
        if first and folder.config.q_lora_rank is not None:
            merged = theirs.replace(first, NAMES.first)
            halves = waiting.setdefault(merged, {})
            halves[first] = tensor
            if len(halves) == len(FIRST):
                parameters[is_draft][merged].put(None, torch.cat([halves[one] for one in FIRST]), name)
            continue
        put(parameters[is_draft], theirs, tensor, name)
    return unread


def put(parameters: dict[str, Parameter], name: str, tensor: torch.Tensor, source: str) -> None:
    if found := EXPERT.fullmatch(name):
        mlp, expert, projection, rest = found.groups()
        stack, shard = EXPERTS[projection]
        parameters[f"{mlp}.{NAMES.experts}.{stack}_{rest}"].put((int(expert), shard), tensor, source)
        return
    for part, (merged, shard) in STACKED.items():
        if f".{part}." in name:
            parameters[name.replace(f".{part}.", f".{merged}.")].put(shard, tensor, source)
            return
    assert name in parameters, f"{source}: SGLang has no parameter {name}"
    parameters[name].put(None, tensor, source)
