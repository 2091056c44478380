"""The fp32 scales of an FP8 release: small, scattered over the files, read once and kept in memory."""

import math
from collections.abc import Iterator, Sequence

import torch

from modeling_deepseek_moe.checkpoint import CheckpointReader
from modeling_deepseek_moe.headers import TensorInfo

EXPERTS = ".experts."


class Scales:
    """Scales by name, as views. Those of a layer's routed experts lie in one tensor, one right after the other.

    That is the order in which ``infos`` gives them: names (canonical), and what the headers say of them.
    """

    def __init__(self, reader: CheckpointReader, infos: Sequence[tuple[str, TensorInfo]]):
        self._places: dict[str, tuple[str, int, TensorInfo]] = {}
        sizes: dict[str, int] = {}
        for name, info in infos:
            group = _group(name)
            start = sizes.get(group, 0)
            sizes[group] = start + math.prod(info.shape)
            self._places[name] = group, start, info
        self._groups = {group: torch.empty(size, dtype=torch.float32, device="cpu") for group, size in sizes.items()}
        memory = {group: memoryview(values.view(torch.uint8).numpy()) for group, values in self._groups.items()}
        reader.read_into(
            (info, memory[group][4 * start : 4 * start + info.nbytes]) for group, start, info in self._places.values()
        )

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def __getitem__(self, name: str) -> torch.Tensor:
        group, start, info = self._places[name]
        return self._groups[group][start : start + math.prod(info.shape)].view(info.shape)

    def of_experts(self, experts: str) -> torch.Tensor:
        """All scales of the layer whose experts are called ``experts.0`` and so on, one after the other."""
        return self._groups[_group(f"{experts}.")]

    def unusable(self) -> Iterator[tuple[str, TensorInfo, float, list[int]]]:
        """Name, header entry, value and indices of the first NaN, Inf or negative value of each tensor that has one."""
        bad_groups = {group for group, values in self._groups.items() if not _are_usable(values)}
        for name, (group, _, info) in self._places.items():
            if group in bad_groups:
                values = self[name]
                bad = (~torch.isfinite(values) | (values < 0)).nonzero()
                if len(bad):
                    yield name, info, values[tuple(bad[0])].item(), bad[0].tolist()


def _group(name: str) -> str:
    head, mark, _ = name.partition(EXPERTS)
    return head + mark if mark else name


def _are_usable(values: torch.Tensor) -> bool:
    if not values.numel():
        return True
    low, high = values.aminmax()  # a NaN makes both NaN, which compares false
    return bool(low >= 0) and bool(high < math.inf)
