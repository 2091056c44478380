"""vLLM 0.33.0: `model_executor/models/deepseek_v2.py` and `deepseek_mtp.py`."""

import re

import torch

from receivers.deepseek import Names, draft_model, main_model
from receivers.table import Folder, Parameter

VERSION = "0.33.0"
ARCHITECTURES = {"DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"}
METHODS = {"fp8", "compressed-tensors"}
NAMES = Names(
    first="fused_qkv_a_proj",
    first_at_once=False,
    experts="experts.routed_experts",
    block="model.layers.{layer}.mtp_block",
    draft="model.layers.{layer}",
    draft_has_embedding=True,
)
STACKED = {
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
    "q_a_proj": ("fused_qkv_a_proj", 0),
    "kv_a_proj_with_mqa": ("fused_qkv_a_proj", 1),
}
EXPERTS = {"gate_proj": ("w13", "w1"), "down_proj": ("w2", "w2"), "up_proj": ("w13", "w3")}
OF_DRAFT = ("embed_tokens", "enorm", "hnorm", "eh_proj", "shared_head")
EXPERT = re.compile(r"(.*\.mlp)\.experts\.(\d+)\.(\w+)\.(.*)")


def models(folder: Folder) -> list[dict[str, Parameter]]:
    """The model, and the one that drafts for it."""
    return [main_model(folder, NAMES), draft_model(folder, NAMES)]


def load(folder: Folder, parameters: list[dict[str, Parameter]]) -> list[str]:
    """Puts every tensor where it goes; returns the names of those that are read by neither model."""
    depth, unread = folder.config.num_hidden_layers, []
    for name, tensor in folder.tensors():
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        is_draft = layer is not None and int(layer[1]) >= depth
        theirs = in_draft(name, layer[0]) if is_draft else name
        if is_draft and theirs == "model.embed_tokens.weight" and int(layer[1]) > depth:
            unread.append(name)  # later MTP layers share the first one's
            continue
        put(parameters[is_draft], theirs, tensor, name)
        if name == "model.embed_tokens.weight" and name in parameters[1]:
            put(parameters[1], name, tensor, name)
    return unread


def in_draft(name: str, prefix: str) -> str:
    """The name of an MTP layer's tensor in the drafting model."""
    own = next((one for one in OF_DRAFT if one in name), None)
    if own == "embed_tokens":
        return name.replace(prefix, "model.")
    return name if own else name.replace(prefix, prefix + "mtp_block.")


def put(parameters: dict[str, Parameter], name: str, tensor: torch.Tensor, source: str) -> None:
    if found := EXPERT.fullmatch(name):
        mlp, expert, projection, rest = found.groups()
        stack, shard = EXPERTS[projection]
        parameters[f"{mlp}.{NAMES.experts}.{stack}_{rest}"].put((int(expert), shard), tensor, source)
        return
    for part, (merged, shard) in STACKED.items():
        to = name.replace(f".{part}.", f".{merged}.")
        if to != name and to in parameters:
            parameters[to].put(shard, tensor, source)
            return
    assert name in parameters, f"{source}: vLLM has no parameter {name}"
    parameters[name].put(None, tensor, source)
