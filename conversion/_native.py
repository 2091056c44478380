"""DeepSeek's own inference format: its names, and which tensors its tensor- and expert-parallel ranks share how.

``model{rank}-mp{size}.safetensors``: routed experts go whole to one rank each, other matrices are cut along one
dimension or repeated on every rank. One table holds the names and the dimensions; both directions read it. DeepSeek's
inference model has no MTP module and refuses a rank file with tensors that it does not know, so the module is kept
next to the ranks, whole and under the release's names, in ``mtp.safetensors``.
"""

import re

from modeling_deepseek_moe.checkpoint.headers import CheckpointError

# release name of the module → native name, dimension that ranks share (None: every rank has all of it)
MODULES = {
    "embed_tokens": ("embed", 0),
    "input_layernorm": ("attn_norm", None),
    "post_attention_layernorm": ("ffn_norm", None),
    "q_proj": ("wq", 0),
    "q_a_proj": ("wq_a", None),
    "q_a_layernorm": ("q_norm", None),
    "q_b_proj": ("wq_b", 0),
    "kv_a_proj_with_mqa": ("wkv_a", None),
    "kv_a_layernorm": ("kv_norm", None),
    "kv_b_proj": ("wkv_b", 0),
    "o_proj": ("wo", 1),
    "gate": ("gate", None),
    "gate_proj": ("w1", 0),
    "down_proj": ("w2", 1),
    "up_proj": ("w3", 0),
    "norm": ("norm", None),
    "lm_head": ("head", 0),
}
BLOCKS = {"self_attn": "attn", "mlp": "ffn"}
LEAVES = {"weight": "weight", "weight_scale_inv": "scale", "e_score_correction_bias": "bias"}
RELEASE_MODULES = {native: name for name, (native, _) in MODULES.items()}
RELEASE_BLOCKS = {native: name for name, native in BLOCKS.items()}
RELEASE_LEAVES = {native: name for name, native in LEAVES.items()}
EXPERT = re.compile(r"\.experts\.(\d+)\.")
MTP_FILE = "mtp.safetensors"
RANK_FILE = re.compile(r"model(\d+)-mp(\d+)\.safetensors")


def native_name(name: str) -> str:
    """``model.layers.3.self_attn.q_b_proj.weight_scale_inv`` → ``layers.3.attn.wq_b.scale``."""
    *path, module, leaf = name.removeprefix("model.").split(".")
    if module not in MODULES or leaf not in LEAVES:
        raise CheckpointError(f"tensor {name}: found a name that the native format has no place for")
    return ".".join((*(BLOCKS.get(part, part) for part in path), MODULES[module][0], LEAVES[leaf]))


def release_name(name: str) -> str:
    *path, module, leaf = name.split(".")
    if module not in RELEASE_MODULES or leaf not in RELEASE_LEAVES:
        raise CheckpointError(f"tensor {name}: found a name that is not of the native format")
    parts = (*(RELEASE_BLOCKS.get(part, part) for part in path), RELEASE_MODULES[module], RELEASE_LEAVES[leaf])
    found = ".".join(parts)
    return found if found.startswith("lm_head.") else f"model.{found}"


def cut_dim(name: str) -> int | None:
    """The dimension along which ranks share a tensor of this release name."""
    return None if EXPERT.search(name) else MODULES[name.split(".")[-2]][1]
