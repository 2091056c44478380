"""Parameters as an engine builds them, and what arrives in them."""

import json
import re
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from math import ceil
from pathlib import Path

import torch
from safetensors import safe_open

from modeling_deepseek_moe import read_config
from modeling_deepseek_moe.config import DeepseekMoeConfig

FLOAT = frozenset({torch.bfloat16, torch.float16, torch.float32})
GATE, UP, DOWN = "w1", "w3", "w2"  # as engines call an expert's three matrices


@dataclass
class Parameter:
    """One parameter: the shape and dtypes that each of its slots takes, and what was put into it.

    A slot is ``None`` for a parameter that is filled at once, a shard, or an expert with its matrix. ``twice``: an engine fills it
    from two tensors, which have to be the same.
    """

    name: str
    slots: dict[Hashable, tuple[tuple[int, ...], frozenset[torch.dtype]]]
    twice: bool = False
    filled: dict[Hashable, torch.Tensor] = field(default_factory=dict)

    def put(self, slot: Hashable, tensor: torch.Tensor, source: str = "") -> None:
        assert slot in self.slots, f"{self.name}: has no place {slot!r} for {source}"
        before = self.filled.get(slot)
        is_same = self.twice and before is not None and torch.equal(before, tensor)
        assert before is None or is_same, f"{self.name}: {slot!r} was filled before {source}, with something else"
        shape, dtypes = self.slots[slot]
        found = tuple(tensor.shape), tensor.dtype
        assert found[0] == shape and found[1] in dtypes, (
            f"{self.name}[{slot!r}]: found {found}, wanted {shape}, {dtypes}"
        )
        self.filled[slot] = tensor

    def weight_loader(self, parameter, tensor, *args, shard_id=None, expert_id=None, return_success=False, **_):
        """As engines call it: ``(param, tensor[, shard])``, or with the expert and its matrix."""
        del parameter, return_success
        shard = args[0] if args and shard_id is None and not isinstance(args[0], str) else shard_id
        self.put(shard if expert_id is None else (expert_id, shard), tensor)
        return True


@dataclass(frozen=True)
class Folder:
    """A checkpoint: its config, its tensors' names, and what its config says of codes."""

    path: Path

    @cached_property
    def config(self) -> DeepseekMoeConfig:
        return read_config(self.path)

    @cached_property
    def fields(self) -> dict:
        return json.loads((self.path / "config.json").read_text())

    @cached_property
    def quantization(self) -> dict:
        return self.fields.get("quantization_config") or {}

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for file in sorted(self.path.glob("*.safetensors")):
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (a handle of safetensors is no dict)
                    yield name, opened.get_tensor(name)

    def has_codes(self, module: str) -> bool:
        """Whether an engine expects codes of a linear layer, by what the config leaves out."""
        said = self.quantization
        left = said.get("modules_to_not_convert") or said.get("ignore") or ()
        return bool(said) and not any(
            re.match(one[3:], module) if one.startswith("re:") else one == module or module.endswith("." + one)
            for one in left
        )

    def linear(
        self, module: str, rows: int, columns: int
    ) -> dict[str, tuple[tuple[int, ...], frozenset[torch.dtype]]]:
        """Suffix, shape and dtypes of what a linear layer of an engine is filled with."""
        if not self.has_codes(module):
            return {"weight": ((rows, columns), FLOAT)}
        if self.quantization["quant_method"] == "fp8":
            blocks = ceil(rows / 128), ceil(columns / 128)
            codes = (rows, columns), frozenset({torch.float8_e4m3fn})
            return {"weight": codes, "weight_scale_inv": (blocks, frozenset({torch.float32}))}
        return {
            "weight_packed": ((rows, columns // 8), frozenset({torch.int32})),
            "weight_scale": ((rows, columns // 32), frozenset({torch.bfloat16})),
            "weight_shape": ((2,), frozenset({torch.int32, torch.int64})),
        }


def missing(parameters: dict[str, Parameter]) -> list[str]:
    """Places that nothing was put into."""
    return [f"{one.name}[{slot!r}]" for one in parameters.values() for slot in one.slots if slot not in one.filled]
