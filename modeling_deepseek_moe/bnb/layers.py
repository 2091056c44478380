"""bitsandbytes' linear layers in a saved model: their tensors against what the modules want, before transformers reads them."""

import json
import math

import torch
from torch import nn
from transformers import PreTrainedModel

from modeling_deepseek_moe.bnb.formats import BLOCK
from modeling_deepseek_moe.bnb.loading import read_apart
from modeling_deepseek_moe.bnb.packing import is_foreign
from modeling_deepseek_moe.checkpoint.headers import CheckpointError, TensorInfo
from modeling_deepseek_moe.checkpoint.reader import CheckpointReader
from modeling_deepseek_moe.field_checks import brief
from modeling_deepseek_moe.ops.four_bit import KINDS, NESTED_GROUP
from modeling_deepseek_moe.release import Release

Wanted = dict[str, tuple[int, torch.dtype]]  # number of values and dtype, by what follows a module's name


def check_layers(model: PreTrainedModel, prefix: str, release: Release) -> None:
    """
    Raises:
        CheckpointError: a tensor of a ``Linear4bit`` or ``Linear8bitLt`` is missing, or is not what the layer wants.
    """
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or not is_foreign(module):
            continue
        shape, full = (module.out_features, module.in_features), prefix + name
        if f"{full}.weight" not in release.infos or release.infos[f"{full}.weight"].dtype.is_floating_point:
            continue  # missing, or made codes of as it is loaded: transformers tells
        kind = getattr(module.weight, "quant_type", None)
        nested = bool(getattr(module.weight, "compress_statistics", False))
        for part, wanted in _wanted(shape, kind, nested).items():
            _check(release, f"{full}.{part}", *wanted)
        if kind is not None:
            info = _info(release, f"{full}.weight.quant_state.bitsandbytes__{kind}")
            check_state(release.reader, info, kind, shape, nested)
            check_table(release.reader, _info(release, f"{full}.weight.quant_map"), kind)


def _wanted(shape: tuple[int, int], kind: str | None, nested: bool) -> Wanted:
    values = math.prod(shape)
    if kind is None:
        return {"weight": (values, torch.int8), "SCB": (shape[0], torch.float32)}
    scales = math.ceil(values / BLOCK)
    wanted: Wanted = {
        "weight": (math.ceil(values / 2), torch.uint8),
        "weight.absmax": (scales, torch.uint8 if nested else torch.float32),
        "weight.quant_map": (16, torch.float32),
    }
    if nested:
        wanted["weight.nested_absmax"] = math.ceil(scales / NESTED_GROUP), torch.float32
        wanted["weight.nested_quant_map"] = 256, torch.float32
    return wanted


def _info(release: Release, name: str) -> TensorInfo:
    if name not in release.infos:
        raise CheckpointError(
            f"{release.where(name)}: tensor {name}: found no such tensor, wanted it next to the layer's others"
        )
    return release.infos[name]


def _check(release: Release, name: str, count: int, dtype: torch.dtype) -> None:
    info = _info(release, name)
    if info.dtype != dtype or math.prod(info.shape) != count:
        raise CheckpointError(
            f"{info.file}: tensor {info.name}: found {list(info.shape)} in {info.dtype}, wanted {count} values in {dtype}"
        )
    if dtype.is_floating_point and not torch.isfinite(release.reader.view(info)).all():
        raise CheckpointError(f"{info.file}: tensor {info.name}: found a NaN or Inf, wanted finite scales")


def check_state(reader: CheckpointReader, info: TensorInfo, kind: str, shape: tuple[int, int], nested: bool) -> dict:
    """What bitsandbytes wrote down of a 4-bit matrix.

    Raises:
        CheckpointError: it is not JSON, or of another matrix.
    """
    wanted: dict[str, object] = {"shape": list(shape), "blocksize": BLOCK, "quant_type": kind}
    if nested:
        wanted |= {"nested_blocksize": NESTED_GROUP}
    try:
        state = json.loads(bytes(read_apart(reader, info, among_mapped=True).tolist()))
        found = {name: state.get(name) for name in wanted}
        float(state.get("nested_offset", 0))
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{info.file}: tensor {info.name}: found no state of a 4-bit weight ({error})"
        ) from error
    if found != wanted:
        raise CheckpointError(f"{info.file}: tensor {info.name}: found {brief(found)}, wanted {wanted}")
    return state


def check_table(reader: CheckpointReader, info: TensorInfo, kind: str) -> None:
    """That codes stand for the values of their kind, as everything that computes with them takes them to, bitsandbytes too.

    Raises:
        CheckpointError: they stand for others.
    """
    values = torch.tensor(KINDS[kind].values)
    found = read_apart(reader, info, among_mapped=True)
    if (
        found.shape != values.shape
        or found.dtype != values.dtype
        or not torch.allclose(found, values, rtol=0, atol=1e-6)
    ):
        raise CheckpointError(
            f"{info.file}: tensor {info.name}: found {brief(found.tolist())}, wanted the {len(values)} values of {kind}: codes of "
            "other values cannot be computed with"
        )
