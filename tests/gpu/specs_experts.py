"""The routed experts' kernels as they are compiled ahead of time: V3's 256 experts, eight for a token."""

from gpu.aot import Spec

from modeling_deepseek_moe.ops._triton_table import tiles
from modeling_deepseek_moe.ops.experts import triton_kernels as kernels

FORMATS = {
    "fp8": ("*i32", "*fp32", 8),
    "int4": ("*i32", "*bf16", 4),
    "mxfp4": ("*i32", "*u8", 4),
    "nf4": ("*i32", "*fp32", 4),
}
FORMATS["bf16"] = ("*bf16", "*fp32", 16)
GROUPS = {"int4": 32, "mxfp4": 32, "nf4": 64}


def specs(card: int) -> list[Spec]:
    found = [
        _of(kernel, name, way, card)
        for way in ("slots", "few", "many")
        for name in FORMATS
        for kernel in ("gate_up", "down")
    ]
    plan = {"indices_ptr": "*i64", "order_ptr": "*i32", "ends_ptr": "*i32", "S": "i32"}
    found.append(Spec("plan", kernels.plan, plan, {"BLOCK": 1024}, 4, 3))
    types = {"y_ptr": "*fp32", "indices_ptr": "*i64", "out_ptr": "*bf16", "E": "i32", "D": "i32"}
    found.append(Spec("combine", kernels.combine, types, {"TOP_K": 8, "BN": 256}, 4, 3, aligned=("D",)))
    return found


def _of(kernel: str, name: str, way: str, card: int) -> Spec:
    tiling, (codes, scales, bits) = tiles(f"experts_{kernel}_{way}", card), FORMATS[name]
    types = {"indices_ptr": "*i64", "order_ptr": "*i32", "ends_ptr": "*i32", "w_ptr": codes, "s_ptr": scales}
    types |= {"table_ptr": "*i32", "h_ptr": "*bf16", "E": "i32", "I": "i32", "D": "i32"}
    types |= {"x_ptr": "*bf16"} if kernel == "gate_up" else {"weights_ptr": "*fp32", "y_ptr": "*fp32"}
    constants = {
        "KIND": name,
        "GROUP": GROUPS.get(name, 128),
        "SORTED": way != "slots",
        "EXPERTS": 256 if way != "slots" else 1,
        **tiling.constants(),
    }
    if kernel == "gate_up":
        constants["TOP_K"] = 8
    weights = (2 if kernel == "gate_up" else 1) * tiling.columns * tiling.depth * bits // 8
    title = f"{kernel} {name} {way}"
    return Spec(title, getattr(kernels, kernel), types, constants, tiling.warps, tiling.stages, weights, ("I", "D"))
