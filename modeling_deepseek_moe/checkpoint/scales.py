"""The scales of a quantised release: scattered over the files, read once to be checked, and kept in memory where they are small."""

import math
from collections.abc import Iterator

import torch

from modeling_deepseek_moe.checkpoint.headers import TensorInfo
from modeling_deepseek_moe.checkpoint.reader import CheckpointReader

EXPERTS = ".experts."
# The one rule of every door. A block that needs no scale has 1; 0 turns all its weights to nothing, and is what a file
# that was filled up with zeros looks like.
WANTED_SCALES = "finite scales above zero"


def first_unusable(values: torch.Tensor) -> tuple[float, list[int]] | None:
    """Value and indices of the first scale that is not finite or not above zero."""
    if are_usable(values):
        return None
    values = values.float()
    index = (~(torch.isfinite(values) & (values > 0))).nonzero()[0].tolist()
    return values[tuple(index)].item(), index


def are_usable(values: torch.Tensor) -> bool:
    """Whether all scales are finite and above zero."""
    if not values.numel():
        return True
    low, high = values.float().aminmax()  # a NaN makes both NaN, which compares false
    return bool(low > 0) and bool(high < math.inf)


class Scales:
    """Scales by name, as views. Those of a layer's routed experts lie in one tensor, one right after the other.

    That is the order in which ``infos`` has them: what the headers say of them, by canonical name. ``among_mapped``: as in
    `CheckpointReader.read_into`.
    """

    def __init__(
        self, reader: CheckpointReader, infos: dict[str, TensorInfo], dtype: torch.dtype, *, among_mapped: bool = False
    ):
        self._infos = infos
        self._starts: dict[str, int] = {}  # in its group, by the name in the file
        sizes: dict[str, int] = {}
        for info in infos.values():
            group = _group(info.name)
            start = self._starts[info.name] = sizes.get(group, 0)
            sizes[group] = start + info.nbytes // dtype.itemsize
        self._groups = {group: torch.empty(size, dtype=dtype, device="cpu") for group, size in sizes.items()}
        memory = {group: memoryview(values.view(torch.uint8).numpy()) for group, values in self._groups.items()}

        def place(info: TensorInfo) -> memoryview:
            start = dtype.itemsize * self._starts[info.name]
            return memory[_group(info.name)][start : start + info.nbytes]

        reader.read_into(infos.values(), place, among_mapped=among_mapped)

    def __contains__(self, name: str) -> bool:
        return name in self._infos

    def __getitem__(self, name: str) -> torch.Tensor:
        info = self._infos[name]
        start = self._starts[info.name]
        return self._groups[_group(info.name)][start : start + math.prod(info.shape)].view(info.shape)

    def of_experts(self, name: str) -> torch.Tensor:
        """All scales of the routed experts of a layer, one after the other; ``name`` is one of them."""
        return self._groups[_group(self._infos[name].name)]

    def unusable(self) -> Iterator[tuple[TensorInfo, float, list[int]]]:
        """Header entry, value and indices of the first unusable scale of each tensor that has one."""
        bad_groups = {group for group, values in self._groups.items() if not are_usable(values)}
        for name, info in self._infos.items() if bad_groups else ():
            if _group(info.name) in bad_groups:
                found = first_unusable(self[name])
                if found is not None:
                    yield info, *found


def _group(name: str) -> str:
    head, mark, _ = name.partition(EXPERTS)
    return head + mark if mark else name
