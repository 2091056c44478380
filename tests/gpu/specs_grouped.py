"""Products of rows sorted by expert, and what training needs around them, as they are compiled ahead of time."""

from gpu.aot import Spec

from modeling_deepseek_moe.ops._triton import FP8_CORES, padded
from modeling_deepseek_moe.ops._triton_table import Tiles, tiles
from modeling_deepseek_moe.ops.experts import triton_grouped as kernels

SORTED = {"order_ptr": "*i32", "ends_ptr": "*i32", "E": "i32"}


RANK = 16  # of an adapter


def specs(card: int) -> list[Spec]:
    found = [_product("product", card, False, False), _product("product turned", card, True, False)]
    low, whole = {"columns": padded(RANK)}, {"depth": padded(RANK)}
    found += [
        _product("product to a low rank", card, False, False, low),
        _product("product to a low rank turned", card, True, False, low),
        _product("product of a low rank onto", card, False, False, whole, add=True),
        _product("product of a low rank onto turned", card, True, False, whole, add=True),
        _outer("outer", card, "*bf16", {}, True, False),
        _outer("outer of a low rank", card, "*fp32", low, False, True),
        _outer("outer with a low rank", card, "*fp32", whole, True, False),
    ]
    found.append(_product("product fp8", card, False, True))
    if card >= 89:
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
            nbytes = 1024 * (4 + 1 if swiglu else 2 + 1)
            found.append(Spec(name, kernels.quantize, types, constants, 4, 3, nbytes, ("K",), is_loop=False))
    rows = {"inner_ptr": "*bf16", "weights_ptr": "*fp32", "I": "i32", **SORTED}
    types = rows | {"out_ptr": "*bf16"}
    found.append(Spec("swiglu", kernels.swiglu, types, {"BN": 1024}, 4, 3, aligned=("I",)))
    types = rows | {"d_h_ptr": "*bf16", "d_inner_ptr": "*bf16", "d_weights_ptr": "*fp32"}
    found.append(Spec("swiglu_backward", kernels.swiglu_backward, types, {"BN": 1024}, 4, 3, aligned=("I",)))
    return found


def _outer(name: str, card: int, out: str, sides: dict[str, int], a_by_token: bool, b_by_token: bool) -> Spec:
    types = {"a_ptr": "*bf16", "b_ptr": "*bf16", "out_ptr": out, "order_ptr": "*i32", "ends_ptr": "*i32"}
    types |= {"N": "i32", "K": "i32"}
    tiling: Tiles = tiles("grouped_outer", card)._replace(**sides)
    constants = {"TOP_K": 8, "A_BY_TOKEN": a_by_token, "B_BY_TOKEN": b_by_token} | tiling.constants()
    nbytes = (tiling.columns + tiling.depth) * tiling.rows * 2  # of both factors
    return Spec(name, kernels.outer, types, constants, tiling.warps, tiling.stages, nbytes, ("N", "K"))


def _product(
    name: str, card: int, turned: bool, fp8: bool, sides: dict[str, int] | None = None, add: bool = False
) -> Spec:
    tiling, code = tiles("grouped_fp8" if fp8 else "grouped", card), "*bf16"
    if fp8:
        code = "*fp8e4nv" if card >= FP8_CORES else "*u8"
    tiling = tiling._replace(**sides or {})
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
        "WEIGHTED": not add,
        "BY_TOKEN": not add,
        "BY_SLOT": False,
        "ADD": add,
        "TURNED": turned,
        "FP8": fp8,
        "EXPERTS": 256,
    }
    constants |= tiling.constants()
    nbytes = (tiling.rows + tiling.columns) * tiling.depth * (1 if fp8 else 2)  # of both factors
    return Spec(name, kernels.product, types, constants, tiling.warps, tiling.stages, nbytes, ("N", "K", "HALF"))
