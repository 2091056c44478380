"""Routed experts that train in FP8, as their kernels are compiled ahead of time."""

from gpu.aot import Spec

from modeling_deepseek_moe.ops._triton import FP8_CORES
from modeling_deepseek_moe.ops._triton_table import tiles
from modeling_deepseek_moe.ops.experts import triton_fp8_kernels as kernels

ROUTED = {"order_ptr": "*i32", "ends_ptr": "*i32", "E": "i32"}
CODES, TILE = "*u8", 128


def specs(card: int) -> list[Spec]:
    native = card >= FP8_CORES
    factor = "*fp8e4nv" if native else CODES
    factors = {
        "a_ptr": factor,
        "a_scale_ptr": "*fp32",
        "b_ptr": factor,
        "b_scale_ptr": "*fp32",
        "N": "i32",
        "K": "i32",
    }
    found = []
    for halves in (1, 2):
        tiling = tiles("grouped_fp8_turned", card)
        constants = {"TOP_K": 8, "HALVES": halves, "BY_TOKEN": halves == 1, "BY_SLOT": halves == 2, "EXPERTS": 256}
        nbytes, types = (tiling.rows + tiling.columns) * tiling.depth, factors | ROUTED | {"out_ptr": "*fp32"}
        constants |= tiling.constants()
        name = f"dgrad of {halves}"
        found.append(Spec(name, kernels.dgrad, types, constants, tiling.warps, tiling.stages, nbytes, ("N", "K")))
    tiling = tiles("grouped_fp8_outer", card)
    types = factors | {"ends_ptr": "*i32", "E": "i32", "out_ptr": "*fp32", "WIDTH": "i32"}
    constants, nbytes = {"EXPERTS": 256} | tiling.constants(), (tiling.columns + tiling.depth) * tiling.rows
    aligned = ("N", "K", "WIDTH")
    found.append(Spec("wgrad", kernels.wgrad, types, constants, tiling.warps, tiling.stages, nbytes, aligned))
    cast = {"BY_TOKEN": True, "WEIGHTED": False, "SWIGLU": False, "POWER": True}
    found += [
        _across("cast_across of dy", "*bf16", native, cast | {"WEIGHTED": True, "POWER": False}),
        _across("cast_across of codes", CODES, native, cast),
        _across("cast_across of SwiGLU", CODES, native, cast | {"BY_TOKEN": False, "SWIGLU": True}),
    ]
    types = ROUTED | {"inner_ptr": CODES, "scale_ptr": "*fp32", "weights_ptr": "*fp32", "d_h_ptr": "*fp32", "I": "i32"}
    types |= {"d_inner_ptr": "*bf16", "d_weights_ptr": "*fp32"}
    found.append(Spec("swiglu_backward", kernels.swiglu_backward, types, {"BN": 1024}, 4, 3, aligned=("I",)))
    types = {"w_ptr": "*fp32", "codes_ptr": CODES, "scale_ptr": "*fp32", "N": "i32", "K": "i32"}
    nbytes, constants = TILE * TILE * (4 + 1), {"NATIVE": native}
    found.append(Spec("cast_blocks", kernels.cast_blocks, types, constants, 8, 3, nbytes, ("N", "K"), is_loop=False))
    return found


def _across(name: str, source: str, native: bool, options: dict[str, bool]) -> Spec:
    types = ROUTED | {"x_ptr": source, "x_scale_ptr": "*fp32", "weights_ptr": "*fp32", "codes_ptr": CODES}
    types |= {"scale_ptr": "*fp32", "N": "i32", "WIDTH": "i32"}
    constants = {"TOP_K": 8, "NATIVE": native, "EXPERTS": 256, "BM": TILE, "BN": 32} | options
    read = 2 if source == "*bf16" else 2 if options["SWIGLU"] else 1
    nbytes = 32 * TILE * (read + 1)
    return Spec(name, kernels.cast_across, types, constants, 4, 3, nbytes, ("N", "WIDTH"), is_loop=False)
