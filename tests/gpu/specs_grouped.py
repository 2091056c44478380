"""Products of rows sorted by expert, and what training needs around them, as they are compiled ahead of time."""

from gpu.aot import Spec

from modeling_deepseek_moe.ops._triton_table import tiles
from modeling_deepseek_moe.ops.experts import triton_grouped as kernels

SORTED = {"order_ptr": "*i32", "ends_ptr": "*i32", "E": "i32"}


def specs(card: int) -> list[Spec]:
    found = [_product("product", card, False, False), _product("product turned", card, True, False)]
    if card >= 89:
        found.append(_product("product fp8", card, False, True))
        types = {
            "x_ptr": "*bf16",
            "ends_ptr": "*i32",
            "codes_ptr": "*fp8e4nv",
            "scale_ptr": "*fp32",
            "E": "i32",
            "K": "i32",
        }
        for swiglu in (False, True):
            constants, name = {"SWIGLU": swiglu, "BN": 1024}, "quantize swiglu" if swiglu else "quantize"
            found.append(Spec(name, kernels.quantize, types, constants, 4, 3, aligned=("K",)))
    types = {"a_ptr": "*bf16", "b_ptr": "*bf16", "out_ptr": "*bf16", "order_ptr": "*i32", "ends_ptr": "*i32"}
    tiling, given = tiles("grouped_outer", card), {"TOP_K": 8, "A_BY_TOKEN": True, "B_BY_TOKEN": False}
    types, constants, options = (
        types | {"N": "i32", "K": "i32"},
        given | tiling.constants(),
        (tiling.warps, tiling.stages),
    )
    found.append(Spec("outer", kernels.outer, types, constants, *options, aligned=("N", "K")))
    rows = {"inner_ptr": "*bf16", "weights_ptr": "*fp32", "I": "i32", **SORTED}
    types = rows | {"out_ptr": "*bf16"}
    found.append(Spec("swiglu", kernels.swiglu, types, {"BN": 1024}, 4, 3, aligned=("I",)))
    types = rows | {"d_h_ptr": "*bf16", "d_inner_ptr": "*bf16", "d_weights_ptr": "*fp32"}
    found.append(Spec("swiglu_backward", kernels.swiglu_backward, types, {"BN": 1024}, 4, 3, aligned=("I",)))
    return found


def _product(name: str, card: int, turned: bool, fp8: bool) -> Spec:
    tiling, code = tiles("grouped_fp8" if fp8 else "grouped", card), "*fp8e4nv" if fp8 else "*bf16"
    types = {
        "a_ptr": code,
        "a_scale_ptr": "*fp32",
        "b_ptr": code,
        "b_scale_ptr": "*fp32",
        "out_ptr": "*bf16",
        **SORTED,
    }
    types |= {"N": "i32", "K": "i32", "HALF": "i32"}
    types["weights_ptr"] = "*fp32"
    constants = {
        "TOP_K": 8,
        "WEIGHTED": True,
        "BY_TOKEN": True,
        "BY_SLOT": False,
        "TURNED": turned,
        "FP8": fp8,
        "EXPERTS": 256,
    }
    constants |= tiling.constants()
    return Spec(name, kernels.product, types, constants, tiling.warps, tiling.stages, aligned=("N", "K", "HALF"))
