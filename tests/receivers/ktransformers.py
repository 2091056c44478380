"""KTransformers 0.7.2: `kt_kernel/utils/loader.py`, which reads the routed experts; all else is read by the SGLang it runs in."""

import re

from receivers import sglang
from receivers.table import Folder, Parameter

VERSION = "0.7.2"
ARCHITECTURES = sglang.ARCHITECTURES
METHODS = {"fp8", "compressed-tensors"}
# `--kt-method`, by what a folder holds; and the class of the loader that reads it.
LOADERS = {None: ("BF16", "BF16SafeTensorLoader"), "fp8": ("FP8", "FP8SafeTensorLoader")}
LOADERS |= {"compressed-tensors": ("RAWINT4", "CompressedSafeTensorLoader")}
PROJECTIONS = ("gate", "up", "down")
EXPERT = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.(gate|up|down)_proj\.(.*)")


def models(folder: Folder) -> list[dict[str, Parameter]]:
    """The experts by layer and projection, then SGLang's two models without them."""
    config, experts = folder.config, {}
    shapes = {"gate": (config.moe_intermediate_size, config.hidden_size)}
    shapes |= {"up": shapes["gate"], "down": shapes["gate"][::-1]}
    for layer in range(config.num_hidden_layers + config.num_nextn_predict_layers):
        if config.is_moe_layer(layer) and _is_read(folder, layer):
            for name, shape in shapes.items():
                one = folder.linear(f"model.layers.{layer}.mlp.experts.0.{name}_proj", *shape)
                slots = {
                    (expert, suffix): slot for expert in range(config.n_routed_experts) for suffix, slot in one.items()
                }
                experts[f"{layer}.{name}"] = Parameter(f"{layer}.{name}", slots)
    mine = {f"model.layers.{key.split('.')[0]}.mlp.experts." for key in experts}
    if _is_read(folder, config.num_hidden_layers):
        mine.add("model.decoder.mlp.experts.")  # SGLang's name of an MTP layer's
    rest = [
        {name: one for name, one in model.items() if not name.startswith(tuple(mine))}
        for model in sglang.models(folder)
    ]
    return [experts, *rest]


def _is_read(folder: Folder, layer: int) -> bool:
    """Whether a layer's experts are in the codes that the folder is read as; SGLang reads the others."""
    return not folder.quantization or folder.has_codes(f"model.layers.{layer}.mlp.experts.0.gate_proj")


class _Rest(Folder):
    """A folder without the experts that are read here."""

    def tensors(self):
        for name, tensor in super().tensors():
            found = EXPERT.fullmatch(name)
            if found is None or not _is_read(self, int(found[1])):
                yield name, tensor


def load(folder: Folder, parameters: list[dict[str, Parameter]]) -> list[str]:
    """Puts every tensor where it goes; returns the names of those that are read by none."""
    experts, *rest = parameters
    for name, tensor in folder.tensors():
        if (found := EXPERT.fullmatch(name)) and _is_read(folder, int(found[1])):
            experts[f"{found[1]}.{found[3]}"].put((int(found[2]), found[4]), tensor, name)
    return sglang.load(_Rest(folder.path), rest)
