"""The kernels of absorbed attention, as a layer of V3 or V2-Lite starts them."""

import torch
from gpu.aot import Spec

from modeling_deepseek_moe.ops import _latent_rows
from modeling_deepseek_moe.ops.absorbed_attention import triton
from modeling_deepseek_moe.ops.absorbed_attention import triton_kernels as kernels
from modeling_deepseek_moe.ops.absorbed_attention import triton_pages_kernels as pages_kernels

HEADS = {"V2-Lite": 16, "V3": 128}
DIMS = {"N": 128, "V": 128, "R": 512}
STRIDES = ("sp_b", "sp_h", "sc_b", "sc_t", "sk_b", "sk_t")
PAGE_STRIDES = ("sp_b", "sp_h", "sf_t", "ss_t")
SCALES = ("ss_b", "ss_t")
NUMBERS = ("bf16", "fp32")
TORCH = {"bf16": torch.bfloat16, "fp32": torch.float32}


def split(card: int, model: str, number: str, mask: str, in_codes: bool = False) -> Spec:
    """The bytes are those of the keys that a program reads at a time."""
    block_heads, block_keys, warps, stages = triton.tiles(card, HEADS[model], TORCH[number], in_codes)
    floats = dict.fromkeys(("q_ptr", "pe_ptr", "c_ptr", "k_ptr"), f"*{number}")
    integers = dict.fromkeys(("H", "length", "sm_b", *STRIDES), "i32")
    types = {**floats, **integers, "bounds_ptr": "*i32", "o_ptr": "*fp32", "lse_ptr": "*fp32", "scale_log2": "fp32"}
    constants = {"P": 64, "RP": 512, "PP": 64, "BH": block_heads, "BN": block_keys, "STAGES": stages, "R": 512}
    constants |= {"BOUNDS": True, "MASK": mask, "CODES": in_codes, "NATIVE": in_codes and card >= 89}
    types |= dict.fromkeys(SCALES, "i32")
    if in_codes:
        types |= {"c_ptr": "*u8", "s_ptr": "*fp32"}
    else:
        constants["s_ptr"] = None
    if mask == "none":
        constants["mask_ptr"] = None
    else:
        types["mask_ptr"] = "*u8" if mask == "bool" else "*fp32"
    name = f"split {model} {'FP8' if in_codes else number} mask {mask}"
    row = _latent_rows.row_bytes(512) + 128 if in_codes else 576 * TORCH[number].itemsize
    # of the latents, which the programs of a layer's blocks of heads share
    nbytes = block_keys * row * min(block_heads, HEADS[model]) // HEADS[model]
    return Spec(name, kernels.split, types, constants, warps, 3, nbytes, ("H", *STRIDES))


def split_pages(card: int, model: str, number: str) -> Spec:
    """As `split`, of bf16 or fp32 latents in pages, whose rows are halved."""
    block_heads, block_keys, warps, stages = triton.tiles(card, HEADS[model], TORCH[number])
    types = dict.fromkeys(("q_ptr", "pe_ptr", "first_ptr", "second_ptr"), f"*{number}")
    types |= {"index_ptr": "*i64", "starts_ptr": "*i32", "o_ptr": "*fp32", "lse_ptr": "*fp32", "scale_log2": "fp32"}
    types |= dict.fromkeys(("H", *PAGE_STRIDES), "i32")
    constants = {"R": 512, "P": 64, "HALF": 288, "RP": 512, "PP": 64, "BH": block_heads, "BN": block_keys}
    row = 576 * TORCH[number].itemsize + torch.int64.itemsize
    nbytes = block_keys * row * min(block_heads, HEADS[model]) // HEADS[model]
    aligned = ("H", *PAGE_STRIDES)
    name = f"split_pages {model} {number}"
    return Spec(name, pages_kernels.split_pages, types, constants | {"STAGES": stages}, warps, 3, nbytes, aligned)


def absorb(number: str, fp8: bool, rotate: bool) -> Spec:
    floats = dict.fromkeys(("qn_ptr", "qp_ptr", "latent_ptr", "pe_ptr"), f"*{number}")
    integers = dict.fromkeys(("B", "H", "sn_b", "sn_h", "sp_b", "sp_h", "st_b"), "i32")
    types = {**floats, **integers, "w_ptr": "*u8" if fp8 else f"*{number}"}
    constants = DIMS | {
        "P": 64,
        "NP": 128,
        "PP": 32,
        "BM": 16,
        "BR": 64,
        "FP8": fp8,
        "ROTATE": rotate,
        "INTERLEAVE": True,
    }
    for names, used in ((("s_ptr",), fp8), (("cos_ptr", "sin_ptr"), rotate)):
        if used:
            types |= dict.fromkeys(names, "*fp32")
        else:
            constants |= dict.fromkeys(names)
    name = f"absorb {number}{' FP8' if fp8 else ''}{' rotates' if rotate else ''}"
    return Spec(name, kernels.absorb, types, constants, 4, 3, aligned=("H", "sn_b", "sn_h", "sp_b", "sp_h"))


def merge(number: str, fp8: bool) -> Spec:
    types = {"o_ptr": "*fp32", "lse_ptr": "*fp32", "w_ptr": "*u8" if fp8 else f"*{number}", "out_ptr": f"*{number}"}
    types |= dict.fromkeys(("B", "H", "S"), "i32")
    constants = DIMS | {"BM": 16, "BV": 32, "BK": 128, "FP8": fp8}
    if fp8:
        types["s_ptr"] = "*fp32"
    else:
        constants["s_ptr"] = None
    return Spec(f"merge {number}{' FP8' if fp8 else ''}", kernels.merge, types, constants, 4, 3, aligned=("H",))


def specs(card: int) -> list[Spec]:
    found = [split(card, model, "bf16", "none") for model in HEADS]
    found += [split(card, model, "bf16", "bool") for model in HEADS]
    found += [split(card, model, "bf16", "bool", in_codes=True) for model in HEADS]
    found += [split(card, "V2-Lite", "bf16", "add"), split(card, "V2-Lite", "fp32", "bool")]
    found += [split_pages(card, model, "bf16") for model in HEADS] + [split_pages(card, "V2-Lite", "fp32")]
    found += [absorb("bf16", fp8, rotate) for fp8 in (False, True) for rotate in (False, True)]
    found += [merge("bf16", fp8) for fp8 in (False, True)]
    types = {"mask_ptr": "*u8", "bounds_ptr": "*i32", "length": "i32", "sm_b": "i32"}
    return [*found, Spec("find_bounds", kernels.find_bounds, types, {"BN": 8192}, 8, 3)]
