"""Products of rows sorted by expert with codes, forward and backward, as they are compiled ahead of time: V3's 256 experts."""

from gpu.aot import Spec
from gpu.specs_experts import FORMATS, GROUPS

from modeling_deepseek_moe.ops._triton_table import tiles
from modeling_deepseek_moe.ops.experts import triton_codes_kernels as kernels

CODES = ("fp8", "int4", "mxfp4", "nf4")
SIZES = ("N", "K", "W_STRIDE", "S_STRIDE", "OUT_STRIDE", "A_STRIDE")


def specs(card: int) -> list[Spec]:
    return [
        _of(kernel, name, way, card)
        for name in CODES
        for kernel, way in (("forward", ""), ("forward", "_few"), ("backward", ""), ("backward", "_more"))
    ]


def _of(kernel: str, name: str, way: str, card: int) -> Spec:
    more = way == "_more"  # of gate and up
    tiling = tiles("grouped_codes_back" if kernel == "backward" else f"grouped_codes{way}", card)
    function, (codes, scales, bits) = getattr(kernels, kernel), FORMATS[name]
    types = {"a_ptr": "*bf16", "w_ptr": codes, "s_ptr": scales, "more_w_ptr": codes, "more_s_ptr": scales}
    types |= {"table_ptr": "*i32", "order_ptr": "*i32", "ends_ptr": "*i32", "E": "i32", **dict.fromkeys(SIZES, "i32")}
    types["out_ptr"] = "*fp32" if more else "*bf16"
    types = {argument: kind for argument, kind in types.items() if argument in function.arg_names}
    constants = {"TOP_K": 8, "BY_TOKEN": not more, "BY_SLOT": more, "KIND": name, "GROUP": GROUPS.get(name, 128)}
    constants |= {"EXPERTS": 256, **tiling.constants()} | ({"MORE": more} if kernel == "backward" else {})
    weights = tiling.columns * tiling.depth * bits // 8
    aligned = tuple(size for size in SIZES if size in function.arg_names)
    title = f"{kernel}{way.replace('_', ' ')} {name}"
    return Spec(title, function, types, constants, tiling.warps, tiling.stages, weights, aligned)
