"""What bitsandbytes keeps of a 4-bit weight besides codes and scales, as it writes it, and how a config announces it."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

from modeling_deepseek_moe.ops import four_bit

DTYPE = "bfloat16"  # that a weight is turned into where nothing else is asked for


def others(kind: str) -> dict[str, Callable[[tuple[int, ...]], torch.Tensor]]:
    """By suffix: the table of values fp32 ``[16]``, and kind, blocks, dtype and shape as the bytes of a JSON text."""
    return {".quant_map": partial(_table, kind), f".quant_state.bitsandbytes__{kind}": partial(_state, kind)}


def _table(kind: str, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor(four_bit.KINDS[kind].values, dtype=torch.float32, device="cpu")


def _state(kind: str, shape: tuple[int, ...]) -> torch.Tensor:
    state = {"quant_type": kind, "blocksize": four_bit.KINDS[kind].group, "dtype": DTYPE, "shape": list(shape)}
    return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8, device="cpu")


def announce(kind: str, fields: Mapping, block: Sequence[int], ignored: Sequence[str]) -> dict:
    """transformers' ``BitsAndBytesConfig`` of such weights; ``ignored`` are the modules without codes.

    Its list takes every name for a pattern.
    """
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": kind,
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_compute_dtype": DTYPE,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": [name.removeprefix("re:") for name in ignored],
    }
