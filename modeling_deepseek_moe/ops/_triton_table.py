"""Tile sizes of the Triton kernels by card: chosen from ahead-of-time compilation, never tried out at run time.

So a first token is not slow, and a captured CUDA graph holds what was measured. A kernel's row begins with the generation
that it is for: a card takes the latest row that is not later than itself. What a block may have of shared memory: 163 KB on
SM80, 227 KB on SM90 and 100, 99 KB on SM86, 89 and 120.
"""

from typing import NamedTuple


class Tiles(NamedTuple):
    """``rows`` of activations, ``columns`` of outputs and ``depth`` of the sum in one step of a program."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int  # steps whose weights are on their way

    def constants(self) -> dict[str, int]:
        """As kernels call them."""
        return {"BM": self.rows, "BN": self.columns, "BK": self.depth, "STAGES": self.stages}


_FEW = {
    80: Tiles(8, 64, 128, 4, 4),
    86: Tiles(8, 64, 128, 4, 3),
    90: Tiles(8, 64, 128, 4, 4),
    120: Tiles(8, 64, 128, 4, 3),
}
_FEW_DOWN = {card: row._replace(columns=128) for card, row in _FEW.items()}
_MANY = {
    80: Tiles(64, 64, 64, 8, 3),
    86: Tiles(64, 64, 64, 8, 2),
    90: Tiles(64, 64, 64, 8, 3),
    120: Tiles(64, 64, 64, 8, 2),
}
# four groups of codes at once, one for each warp
_GROUPS_OF_32 = {card: row._replace(depth=4 * 32) for card, row in _FEW.items()}
_GROUPS_OF_64 = {card: row._replace(depth=4 * 64, stages=3) for card, row in _FEW.items()}
# Routed experts: a slot a program; rows of an expert, few of them, and many.
TABLE: dict[str, dict[int, Tiles]] = {
    "experts_gate_up_slots": _FEW,
    "experts_down_slots": _FEW_DOWN,
    "experts_gate_up_joined": _FEW | {120: _FEW[120]._replace(stages=2)},  # with shared experts, in bf16
    "experts_gate_up_few": _FEW,
    "experts_down_few": _FEW_DOWN,
    "experts_gate_up_groups_of_32": _GROUPS_OF_32,
    "experts_gate_up_groups_of_64": _GROUPS_OF_64 | {120: _GROUPS_OF_64[120]._replace(columns=32)},  # 64 spill there
    "experts_down_groups_of_32": {card: row._replace(columns=128) for card, row in _GROUPS_OF_32.items()},
    "experts_down_groups_of_64": _GROUPS_OF_64,
    "experts_gate_up_many": _MANY,
    "experts_down_many": _MANY,
    "grouped": {80: Tiles(128, 128, 32, 8, 3), 90: Tiles(128, 128, 64, 8, 3), 120: Tiles(128, 128, 32, 8, 3)},
    "grouped_fp8": {80: Tiles(64, 128, 128, 8, 3), 90: Tiles(128, 128, 128, 8, 3), 120: Tiles(64, 128, 128, 8, 2)},
    "grouped_fp8_turned": {
        80: Tiles(64, 128, 128, 8, 3),
        90: Tiles(128, 128, 128, 8, 3),
        120: Tiles(64, 64, 128, 8, 2),  # 128 columns spill there
    },
    "grouped_fp8_outer": {
        80: Tiles(128, 64, 128, 8, 3),
        90: Tiles(128, 128, 128, 8, 3),
        120: Tiles(128, 64, 128, 8, 2),
    },
    "grouped_codes": _MANY,
    "grouped_codes_few": _FEW_DOWN,
    "grouped_codes_back": {80: Tiles(64, 64, 32, 4, 3), 90: Tiles(64, 128, 32, 4, 3), 120: Tiles(64, 64, 32, 4, 3)},
    "grouped_outer": {80: Tiles(32, 128, 128, 8, 3), 90: Tiles(64, 128, 128, 8, 3), 120: Tiles(32, 128, 128, 8, 3)},
}


def tiles(kernel: str, capability: int) -> Tiles:
    """Of a kernel of the table on a card, 80 for SM80."""
    rows = TABLE[kernel]
    return rows[max(generation for generation in rows if generation <= max(capability, min(rows)))]
