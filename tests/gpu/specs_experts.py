"""The routed experts' kernels as they are compiled ahead of time: V3's 256 experts, eight for a token."""

from gpu.aot import Spec

from modeling_deepseek_moe.ops._triton_table import tiles
from modeling_deepseek_moe.ops.experts import triton_group_kernels as group_kernels
from modeling_deepseek_moe.ops.experts import triton_kernels as kernels

FORMATS = {
    "fp8": ("*i32", "*fp32", 8),
    "int4": ("*i32", "*bf16", 4),
    "mxfp4": ("*i32", "*u8", 4),
    "nf4": ("*i32", "*fp32", 4),
}
FORMATS["bf16"] = ("*bf16", "*fp32", 16)
GROUPS = {"int4": 32, "mxfp4": 32, "nf4": 64}


SHARED = ("gate_ptr", "up_ptr", "gate_s_ptr", "up_s_ptr", "down_ptr", "down_s_ptr", "shared_ptr")


def specs(card: int) -> list[Spec]:
    found = [
        _of(kernel, name, way, card)
        for way in ("slots", "shared", "few", "many")
        for name in FORMATS
        for kernel in ("gate_up", "down")
        if name in ("fp8", "bf16") or way == "many"
    ]
    found += [
        _by_groups(kernel, name, way, card)
        for way in ("slots", "few")
        for name in GROUPS
        for kernel in ("gate_up", "down")
    ]
    plan = {"indices_ptr": "*i64", "order_ptr": "*i32", "ends_ptr": "*i32", "S": "i32"}
    found.append(Spec("plan", kernels.plan, plan, {"BLOCK": 1024}, 4, 3))
    types = {"y_ptr": "*fp32", "indices_ptr": "*i64", "out_ptr": "*bf16", "E": "i32", "D": "i32"}
    found.append(Spec("combine", kernels.combine, types, {"TOP_K": 8, "BN": 256}, 4, 3, aligned=("D",)))
    return found


def _types(kernel: str, codes: str, scales: str) -> dict[str, str]:
    types = {"indices_ptr": "*i64", "order_ptr": "*i32", "ends_ptr": "*i32", "w_ptr": codes, "s_ptr": scales}
    types |= {"table_ptr": "*i32", "h_ptr": "*bf16", "E": "i32", "I": "i32", "D": "i32"}
    return types | ({"x_ptr": "*bf16"} if kernel == "gate_up" else {"weights_ptr": "*fp32", "y_ptr": "*fp32"})


def _bytes(kernel: str, columns: int, depth: int, bits: int) -> int:
    return (2 if kernel == "gate_up" else 1) * columns * depth * bits // 8


def _of(kernel: str, name: str, way: str, card: int) -> Spec:
    row = "joined" if (kernel, name, way) == ("gate_up", "bf16", "shared") else way.replace("shared", "slots")
    tiling = tiles(f"experts_{kernel}_{row}", card)
    codes, scales, bits = FORMATS[name]
    is_sorted, function = way not in ("slots", "shared"), getattr(kernels, kernel)
    types = _types(kernel, codes, scales) | {"S": "i32", "WIDTH": "i32"}
    constants = {"KIND": name, "GROUP": GROUPS.get(name, 128), "SORTED": is_sorted, "EXPERTS": 256 if is_sorted else 1}
    constants |= {"SHARED": way == "shared", **tiling.constants()}
    for argument in set(SHARED) & set(function.arg_names):
        given = way == "shared" and (name == "fp8" or "_s_" not in argument)
        kind = "*bf16" if argument == "shared_ptr" else (scales if "_s_" in argument else codes)
        types, constants = (types | {argument: kind}, constants) if given else (types, constants | {argument: None})
    if kernel == "gate_up":
        constants["TOP_K"] = 8
    weights, aligned = _bytes(kernel, tiling.columns, tiling.depth, bits), ("I", "D", "WIDTH")
    return Spec(f"{kernel} {name} {way}", function, types, constants, tiling.warps, tiling.stages, weights, aligned)


def _by_groups(kernel: str, name: str, way: str, card: int) -> Spec:
    (codes, scales, bits), group = FORMATS[name], GROUPS[name]
    tiling = tiles(f"experts_{kernel}_groups_of_{group}", card)
    constants = {"KIND": name, "GROUP": group, "SORTED": way != "slots", "EXPERTS": 256 if way != "slots" else 1}
    constants |= {"WHOLE": True, **tiling.constants()} | ({"TOP_K": 8} if kernel == "gate_up" else {})
    weights, title = _bytes(kernel, tiling.columns, tiling.depth, bits), f"{kernel} {name} {way}"
    types, function = _types(kernel, codes, scales), getattr(group_kernels, kernel)
    return Spec(title, function, types, constants, tiling.warps, tiling.stages, weights, ("I", "D"))
