"""Models that were saved with bitsandbytes' layers: their files as the tensors of a model that `recognize_experts` went over.

Each projection of each expert is on the disk what bitsandbytes' module of its own would save: codes, scales, and in 4 bits a
small state that names their kind and shape.
"""

import math
from collections.abc import Callable
from itertools import accumulate

import torch
from transformers import PreTrainedModel

from modeling_deepseek_moe.bnb.layers import check_layers, check_state, check_table
from modeling_deepseek_moe.bnb.loading import prefix_of, read_apart, stacked_experts
from modeling_deepseek_moe.checkpoint.headers import CheckpointError, TensorInfo
from modeling_deepseek_moe.origin import Origin
from modeling_deepseek_moe.quantized.bitsandbytes_experts import MAP, BitsAndBytesExperts, parameter_of
from modeling_deepseek_moe.quantized.bitsandbytes_mapped import MappedBitsAndBytesExperts, MappedNestedExperts
from modeling_deepseek_moe.release import Release
from modeling_deepseek_moe.weights import LazyTensor


def saved_state_dict(
    model: PreTrainedModel, release: Release, is_on_cpu: Callable[[str], bool]
) -> dict[str, torch.Tensor | LazyTensor] | None:
    """A release that was saved quantised, under the names of a model that `recognize_experts` went over.

    On the CPU experts whose rows are whole blocks become `MappedBitsAndBytesExperts` and have no part in it. The model remembers
    the files as its `Origin`. ``None`` where no experts are codes: transformers reads the files by itself.
    """
    coded, prefix = stacked_experts(model), prefix_of(model)
    check_layers(model, prefix, release)
    if not coded:
        return None
    state: dict[str, torch.Tensor | LazyTensor] = {}
    parameters = dict(model.named_parameters())
    for name, info in release.infos.items():
        head, mark, _ = name.partition(".experts.")
        if not mark or f"{head}.experts".removeprefix(prefix) not in coded:
            own, tensor = name.removeprefix(prefix), release.reader.view(info)
            wanted = parameters.get(own)
            if tensor.is_floating_point() and wanted is not None and wanted.is_floating_point():
                tensor = tensor.to(wanted.dtype)  # transformers leaves it as it was saved, next to codes
            state[own] = tensor
    for name, module in coded.items():
        saved = _SavedExperts(name, prefix, module, release)
        if module.is_aligned and is_on_cpu(name):
            model.set_submodule(name, saved.mapped(model.config))
        else:
            state |= saved.tensors()
    model.base_model.origin = Origin.of_files(release.reader.mapped)
    return state


class _SavedExperts:
    """Of one layer: what bitsandbytes' modules saved for each projection of each expert, checked."""

    def __init__(self, name: str, prefix: str, module: BitsAndBytesExperts, release: Release):
        self._name, self._source, self._module, self._release = name, f"{prefix}{name}", module, release
        self._offsets: dict[str, torch.Tensor] = {}
        for projection in module.shapes:
            states = [self._check(index, projection) for index in range(module.num_experts)]
            if module.nested:
                self._offsets[projection] = torch.tensor([state["nested_offset"] for state in states])

    def _info(self, index: int, projection: str, part: str) -> TensorInfo:
        name = f"{self._source}.{index}.{projection}.{part}"
        if name not in self._release.infos:
            raise CheckpointError(
                f"{self._release.where(name)}: tensor {name}: found no such tensor, wanted it next to the layer's others"
            )
        return self._release.infos[name]

    def _parts(self, projection: str) -> dict[str, str]:
        """Where a module's tensors are in the files: by what `BitsAndBytesExperts.layout` calls them."""
        scales = "weight.absmax" if self._module.is_four_bit else "SCB"
        nested = {"nested_absmax": "weight.nested_absmax"} if self._module.nested else {}
        return {"codes": "weight", "absmax": scales} | nested

    def _check(self, index: int, projection: str) -> dict:
        """What bitsandbytes wrote down of a 4-bit matrix, empty of an 8-bit one.

        Raises:
            CheckpointError: a tensor is missing, or is not what the config wants.
        """
        module, layout = self._module, self._module.layout(projection)
        for suffix, part in self._parts(projection).items():
            info, (shape, dtype) = self._info(index, projection, part), layout[suffix]
            if info.dtype != dtype or math.prod(info.shape) != math.prod(shape):
                wanted = f"{math.prod(shape)} values in {dtype} for {list(module.shapes[projection])}"
                raise CheckpointError(
                    f"{info.file}: tensor {info.name}: found {list(info.shape)} in {info.dtype}, wanted {wanted}"
                )
        if not module.is_four_bit:
            return {}
        info = self._info(index, projection, f"weight.quant_state.bitsandbytes__{module.weight_format.name}")
        name = module.weight_format.name
        check_table(self._release.reader, self._info(index, projection, "weight.quant_map"), name)
        return check_state(self._release.reader, info, name, module.shapes[projection], module.nested)

    def mapped(self, config) -> MappedBitsAndBytesExperts:
        module = self._module
        places = [(index, projection) for index in range(module.num_experts) for projection in module.shapes]
        scales = [self._info(*place, "weight.absmax") for place in places]
        codes, files = [self._info(*place, "weight") for place in places], self._release.reader.mapped
        if module.nested:
            inner = [self._stack(name, "weight.nested_absmax", (-1,), torch.float32) for name in module.shapes]
            own = inner, torch.stack(list(self._offsets.values()), dim=1), self._map()
            experts = MappedNestedExperts(config, module.weight_format, codes, scales, files, *own)
        else:
            values = self._read(scales, torch.float32)
            experts = MappedBitsAndBytesExperts(config, module.weight_format, codes, values, files)
        experts.compute_dtype, experts.source_dtype = module.compute_dtype, module.source_dtype
        experts.addresses()  # kept from here on: how they are found is nothing that torch.compile can trace
        return experts

    def tensors(self) -> dict[str, torch.Tensor | LazyTensor]:
        found: dict[str, torch.Tensor | LazyTensor] = {}
        for projection in self._module.shapes:
            layout = self._module.layout(projection)
            for suffix, part in self._parts(projection).items():
                shape, dtype = layout[suffix]
                found[f"{self._name}.{parameter_of(projection, suffix)}"] = LazyTensor(
                    lambda projection=projection, part=part, shape=shape, dtype=dtype: self._stack(
                        projection, part, shape, dtype
                    ),
                    (self._module.num_experts, *shape),
                    dtype,
                )
            if self._module.nested:
                found[f"{self._name}.{parameter_of(projection, 'nested_offset')}"] = self._offsets[projection]
        if self._module.nested:
            found[f"{self._name}.{MAP}"] = self._map()
        return found

    def _stack(self, projection: str, part: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        infos = [self._info(index, projection, part) for index in range(self._module.num_experts)]
        return self._read(infos, dtype).view(self._module.num_experts, *shape)

    def _read(self, infos: list[TensorInfo], dtype: torch.dtype) -> torch.Tensor:
        """Tensors one after the other, in memory of their own.

        Raises:
            CheckpointError: scales that are no numbers.
        """
        ends = list(accumulate(info.nbytes for info in infos))
        memory = torch.empty(ends[-1], dtype=torch.uint8, device="cpu")
        places = {
            info.name: memoryview(memory[end - info.nbytes : end].numpy())
            for info, end in zip(infos, ends, strict=True)
        }
        self._release.reader.read_into(infos, lambda info: places[info.name])
        values = memory.view(dtype)
        if dtype.is_floating_point and not torch.isfinite(values).all():
            parts = zip(infos, values.split([info.nbytes // dtype.itemsize for info in infos]), strict=True)
            info = next(info for info, part in parts if not torch.isfinite(part).all())
            raise CheckpointError(f"{info.file}: tensor {info.name}: found a NaN or Inf, wanted finite scales")
        return values

    def _map(self) -> torch.Tensor:
        """The table of nested scales, which is one for all of bitsandbytes' modules.

        Raises:
            CheckpointError: it is not the same for all matrices.
        """
        first = None
        for index in range(self._module.num_experts):
            for projection in self._module.shapes:
                info = self._info(index, projection, "weight.nested_quant_map")
                values = read_apart(self._release.reader, info, among_mapped=True)
                first = values if first is None else first
                if info.shape != (256,) or info.dtype != torch.float32 or not torch.equal(values, first):
                    raise CheckpointError(
                        f"{info.file}: tensor {info.name}: found another table than of expert 0, wanted one of 256 in fp32"
                    )
        return first
