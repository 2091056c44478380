"""Codes of every format in the interpreter: each one to the bit."""

import pytest
import torch
import triton
import triton.language as tl

from modeling_deepseek_moe.ops import _triton
from modeling_deepseek_moe.ops import _triton_codes as codes
from modeling_deepseek_moe.ops import _triton_groups as groups
from modeling_deepseek_moe.ops.four_bit.reference import INT4, KINDS, MXFP4, NF4


@triton.jit
def decode(words_ptr, table_ptr, out_ptr, KIND: tl.constexpr, PART: tl.constexpr, W: tl.constexpr):
    words = tl.load(words_ptr + tl.arange(0, W)[None, :]).to(tl.uint32, bitcast=True)
    if KIND == "e4m3":
        values = codes.e4m3(words, PART)
    elif KIND == "int4":
        values = codes.int4(words, PART)
    elif KIND == "e2m1":
        values = codes.e2m1(words, PART)
    else:
        values = codes.by_table(words, table_ptr, PART)
    tl.store(out_ptr + tl.arange(0, 2 * W)[None, :], values)


@triton.jit
def decode_groups(words_ptr, table_ptr, out_ptr, KIND: tl.constexpr, W: tl.constexpr, G: tl.constexpr):
    words = tl.load(words_ptr + tl.arange(0, G * W)[None, :]).to(tl.uint32, bitcast=True)
    values = groups.values(words, groups.table_of(table_ptr, KIND, W), KIND, G, 1, W)
    at = tl.arange(0, 8 * G * W)[:, None]
    order = groups.activations(at, KIND, G, W, 1)
    tl.store(out_ptr + order, tl.permute(values, (0, 2, 1)))


@pytest.mark.parametrize("name", ["int4", "mxfp4", "nf4", "fp4"])
def test_whole_groups(name):
    """All 256 bytes, each code in the column to which `activations` takes it."""
    words, kind = torch.arange(256, dtype=torch.uint8).view(torch.int32), KINDS[name]
    found = torch.empty(512, dtype=torch.bfloat16)
    decode_groups[(1,)](
        words, _triton.words_of(kind.values, words.device), found, name, kind.group // 8, 512 // kind.group
    )
    low, high = torch.arange(256) % 16, torch.arange(256) // 16
    nibbles = torch.stack((low, high) if kind.low_first else (high, low), dim=1).flatten()
    wanted = torch.tensor(kind.values).bfloat16()[nibbles].float() + (136 if name == "int4" else 0)
    assert torch.equal(found.float(), wanted)


def parts(kind: str, table: torch.Tensor, count: int) -> list[torch.Tensor]:
    """What 64 words of all 256 bytes decode to, in parts."""
    words = torch.arange(256, dtype=torch.uint8).view(torch.int32)
    out = torch.empty((count, 128), dtype=torch.bfloat16)
    for part in range(count):
        decode[(1,)](words, table, out[part], kind, part, 64)
    return list(out)


def test_e4m3():
    """All 254 codes that are numbers, subnormals too."""
    even, odd = parts("e4m3", None, 2)
    found = torch.stack((even, odd), dim=1).flatten().float()
    wanted = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    numbers = ~wanted.isnan()
    assert torch.equal(found[numbers], wanted[numbers]) and numbers.sum() == 254


@pytest.mark.parametrize(("kind", "name"), [(INT4, "int4"), (MXFP4, "e2m1")])
def test_four_bits(kind, name):
    found = torch.stack([part.view(64, 2) for part in parts(name, None, 4)], dim=1)  # [word, part, code and code + 4]
    low, high = torch.arange(256) % 16, torch.arange(256) // 16
    wanted = torch.tensor(kind.values)[torch.stack((low, high), dim=1).view(64, 2, 4)]
    assert torch.equal(found.transpose(1, 2).float(), wanted)


def test_by_table():
    high, low = torch.arange(256) // 16, torch.arange(256) % 16
    table = (
        torch.tensor(NF4.values).bfloat16()[torch.stack((high, low), dim=1)].contiguous().view(torch.int32).flatten()
    )
    found = torch.stack([part.view(64, 2) for part in parts("nf4", table, 4)], dim=1).float()
    assert torch.equal(
        found.view(256, 2), torch.tensor(NF4.values).bfloat16().float()[torch.stack((high, low), dim=1)]
    )
