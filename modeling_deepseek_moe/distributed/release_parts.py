"""A model that FSDP2 sharded, in the release format: which tensor of a release is which box of which sharded one."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import distributed
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import _StridedShard
from transformers import PreTrainedModel

from modeling_deepseek_moe import formats
from modeling_deepseek_moe.distributed.exchange import Box, Holdings
from modeling_deepseek_moe.distributed.saving import Part, write_from_ranks
from modeling_deepseek_moe.formats import WeightFormat
from modeling_deepseek_moe.origin import released_bias
from modeling_deepseek_moe.weights import natural_order, release_tensors, stack_boxes

BIAS = ".e_score_correction_bias"
CARRIED = "carried:"  # before the names of what the release has and the model does not: they stay as they are
TRANSFORMERS_OWN = ("distributed_checkpoint", "variant")


def own_class(model: PreTrainedModel) -> type[PreTrainedModel]:
    """The model's class; of one that FSDP2 sharded, and so gave a class of its own, the one that it had."""
    return next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))


def is_written_by_ranks(
    model: PreTrainedModel, state_dict: Mapping | None, like: str | os.PathLike | None, asked: Mapping
) -> bool:
    """Whether ``save_pretrained`` is to write what each rank holds from that rank.

    Not for adapters, for what the caller gathered or asked transformers for, for codes, and for shards that are no boxes (tensor
    parallelism within FSDP2).
    """
    if state_dict is not None or like is not None or any(asked.get(name) for name in TRANSFORMERS_OWN):
        return False
    if asked.get("save_original_format") is False or asked.get("push_to_hub") or not distributed.is_available():
        return False
    if getattr(model, "_hf_peft_config_loaded", False) or not distributed.is_initialized():
        return False
    sharded = [tensor for tensor in model.parameters() if isinstance(tensor, DTensor)]
    return bool(sharded) and not any(any(formats.of_codes(tensor.dtype)) or _is_strided(tensor) for tensor in sharded)


def _is_strided(tensor: DTensor) -> bool:
    """Whether a rank's part is several boxes: two dimensions of the mesh divide one of the tensor, the inner one first."""
    places = zip(tensor.placements, tensor.device_mesh.shape, strict=True)
    return any(isinstance(place, _StridedShard) and ranks > 1 for place, ranks in places)


def save_from_ranks(
    model: PreTrainedModel,
    folder: str | os.PathLike,
    form: WeightFormat | None,
    max_shard_size: int | str,
    texts: Mapping[str, str],
) -> None:
    """Write a release-format folder from all ranks, on all of which this is called (see `saving.write_from_ranks`)."""
    prefix, names = "model." if model.base_model is model else "", model.config.names
    tensors = dict(_tensors(model))
    finer = [name for name in tensors if prefix + name in model.base_model.origin.finer]
    whole = {prefix + name: _whole(tensors[name]) for name in finer}
    kept = model.base_model.origin.as_released(whole)
    tensors |= {name: kept[prefix + name] for name in finer if prefix + name in kept}
    specs = release_tensors(model.config) if form else {}
    quantized = {name for name, spec in specs.items() if spec.quantized and form.fits(spec.shape)}
    parts = []
    for name, tensor in tensors.items():
        for released, offsets, sizes in stack_boxes(name, tuple(tensor.shape)):
            box = Box(offsets, sizes)
            shape = sizes[1:] if released != name else sizes
            if form is not None and prefix + released in quantized:
                parts += _quantized(released, shape, name, box, form)
            else:
                parts.append(Part(released, tensor.dtype, shape, name, box))
    others = {}
    for name in quantized if form else ():
        others |= {name.removeprefix(prefix) + end: make(specs[name].shape) for end, make in form.others.items()}
    others |= {CARRIED + name: tensor for name, tensor in model.base_model.origin.carried().items()}
    for name, tensor in others.items():
        box = Box((0,) * tensor.ndim, tuple(tensor.shape))
        parts.append(Part(name, tensor.dtype, tuple(tensor.shape), name, box))
    parts.sort(key=lambda part: natural_order(part.name))
    parts = [
        replace(part, name=part.name[len(CARRIED) :] if part.name.startswith(CARRIED) else names.released(part.name))
        for part in parts
    ]
    write_from_ranks(folder, Holdings(tensors | others), parts, max_shard_size=max_shard_size, texts=texts)


def _tensors(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """What is written, under the model's names: of tied weights one, and biases in the release's dtype."""
    ignored, tied = set(model._keys_to_ignore_on_save or ()), model.all_tied_weights_keys
    for name, tensor in model.state_dict().items():
        if name in ignored or (name in tied and model.config.tie_word_embeddings):
            continue
        if name.endswith(BIAS):
            tensor = released_bias(model.get_submodule(name.rpartition(".")[0]), tensor)
        yield name, tensor


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """Of the few that a release keeps in a finer dtype, norms mostly: all ranks together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _quantized(name: str, shape: tuple[int, ...], tensor: str, box: Box, form: WeightFormat) -> list[Part]:
    (codes, (code_dtype, code_shape)), (scales, (scale_dtype, scale_shape)) = form.on_disk(name, shape).items()
    return [
        Part(codes, code_dtype, code_shape, tensor, box, lambda whole: form.quantize(whole)[0].reshape(code_shape)),
        Part(scales, scale_dtype, scale_shape, tensor, box, lambda whole: form.scales(whole).reshape(scale_shape)),
    ]
