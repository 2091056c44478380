"""The kernels of routing, norms, latents, SwiGLU and four-bit layers, as layers of V3 and V2-Lite start them."""

from gpu.aot import Spec

from modeling_deepseek_moe.ops.four_bit import triton as four_bit
from modeling_deepseek_moe.ops.four_bit import triton_kernels as four_bit_kernels
from modeling_deepseek_moe.ops.mla_project import triton_kernels as mla_project
from modeling_deepseek_moe.ops.rms_norm import triton_kernels as rms_norm
from modeling_deepseek_moe.ops.routing import triton_kernels as routing
from modeling_deepseek_moe.ops.swiglu import triton_kernels as swiglu

PROCESSORS = {80: 108, 89: 128, 90: 132, 120: 170}
V3 = {"G": 8, "EG": 32, "GP": 8, "EGP": 32, "TOPG": 4, "K": 8, "KP": 8, "SOFTMAX": False, "TOP2": True, "NORM": True}
V2_LITE = {
    "G": 1,
    "EG": 64,
    "GP": 1,
    "EGP": 64,
    "TOPG": 1,
    "K": 6,
    "KP": 8,
    "SOFTMAX": True,
    "TOP2": False,
    "NORM": False,
}
KINDS = {
    "int4": (32, "plain", "*bf16"),
    "mxfp4": (32, "e8m0", "*u8"),
    "nf4": (64, "plain", "*fp32"),
    "nested nf4": (64, "nested", "*u8"),
}


def four_bits(card: int, kind: str, rows: int, activations: str = "bf16") -> Spec:
    """As layers in bf16 run, by groups, and in fp16 and fp32."""
    by_groups = activations == "bf16"
    tile = four_bit.tile_of_groups if by_groups else four_bit.tile
    block_m, block_n, warps, stages = tile(rows, 24576, PROCESSORS[card])
    group, scales, stored = KINDS[kind]
    has_table, floats = by_groups or kind != "int4", f"*{activations}"
    types = {"x_ptr": floats, "w_ptr": "*i32", "s_ptr": stored, "y_ptr": floats, "M": "i32", "N": "i32", "K": "i32"}
    depth = warps * group if by_groups else 128
    constants = {"BM": block_m, "BN": block_n, "BK": depth, "GROUP": group}
    own = {"KIND": kind.removeprefix("nested "), "WHOLE": True}
    constants |= own if by_groups else {"TABLE": kind != "int4", "LOW_FIRST": group == 32}
    constants |= {"SCALES": scales, "BIAS": False, "bias_ptr": None, "STAGES": stages}
    for name, used, type_ in (
        ("table_ptr", has_table, "*i32" if by_groups else "*fp32"),
        *((n, scales == "nested", "*fp32") for n in ("absmax_ptr", "map_ptr", "offset_ptr")),
    ):
        if used:
            types[name] = type_
        else:
            constants[name] = None
    kernel = four_bit_kernels.few_bf16_rows if by_groups else four_bit_kernels.few_rows
    title = f"few_rows {kind} {rows}" + ("" if by_groups else f" {activations}")
    return Spec(title, kernel, types, constants, warps, 3, block_n * depth // 2, ("K", "N"))


def route(name: str, how: dict, biased: bool) -> Spec:
    types = {"logits_ptr": "*fp32", "weights_ptr": "*fp32", "indices_ptr": "*i64", "E": "i32", "factor": "fp32"}
    constants = how | {"BIAS": biased}
    if biased:
        types["bias_ptr"] = "*fp32"
    else:
        constants["bias_ptr"] = None
    return Spec(f"route {name}", routing.route, types, constants, 1, 3, aligned=("E",))


def norm(features: int, add: bool) -> Spec:
    names = ("x_ptr", "weight_ptr", "out_ptr") + (("residual_ptr", "sum_ptr") if add else ())
    types = dict.fromkeys(names, "*bf16") | {"D": "i32", "eps": "fp32", "sx": "i32", "sr": "i32"}
    constants = {"DP": features, "ADD": add} | ({} if add else {"residual_ptr": None, "sum_ptr": None})
    warps = 8 if features > 2048 else 4
    return Spec(
        f"{'add_' if add else ''}rms_norm {features}",
        rms_norm.rms_norm,
        types,
        constants,
        warps,
        3,
        aligned=("D", "sx", "sr"),
    )


def latents(queries: bool, in_codes: bool = False) -> Spec:
    names = ("kv_ptr", "norm_ptr", "c_ptr", "k_ptr", "q_out_ptr") + (("q_ptr", "q_norm_ptr") if queries else ())
    strides = ("st_b", "st_t", "sc_b", "sc_t", "sk_b", "sk_t")
    scales = ("ss_b", "ss_t")
    types = dict.fromkeys(names, "*bf16") | dict.fromkeys(("length", *strides, *scales), "i32") | {"slot_ptr": "*i64"}
    types |= {"cos_ptr": "*fp32", "sin_ptr": "*fp32", "eps": "fp32", "q_eps": "fp32"}
    constants = {
        "R": 512,
        "P": 64,
        "A": 1536 if queries else 0,
        "RP": 512,
        "PP": 32,
        "AP": 2048 if queries else 16,
        "INTERLEAVE": True,
        "CODES": in_codes,
    }
    if in_codes:
        types |= {"c_ptr": "*u8", "s_ptr": "*fp32"}
    else:
        constants["s_ptr"] = None
    if not queries:
        constants |= {"q_ptr": None, "q_norm_ptr": None}
    name = f"latents{' and queries' if queries else ''}{' FP8' if in_codes else ''}"
    return Spec(name, mla_project.latents, types, constants, 4, 3, aligned=strides)


def logits(weight: str) -> Spec:
    types = {"x_ptr": "*bf16", "w_ptr": f"*{weight}", "out_ptr": "*fp32", "E": "i32", "D": "i32"}
    size = 2 if weight == "bf16" else 4
    return Spec(
        f"logits {weight}", routing.logits, types, {"BE": 2, "BD": 1024, "STAGES": 3}, 4, 3, 2 * 1024 * size, ("D",)
    )


def specs(card: int) -> list[Spec]:
    found = [route("V3", V3, True), route("V2-Lite", V2_LITE, False), logits("bf16"), logits("fp32")]
    found += [norm(features, add) for features in (2048, 8192) for add in (False, True)]
    found += [latents(queries, in_codes) for in_codes in (False, True) for queries in (False, True)]
    found += [
        *(four_bits(card, kind, 1) for kind in KINDS),
        four_bits(card, "int4", 32),
        four_bits(card, "nf4", 1, "fp16"),
    ]
    types = {"gate_ptr": "*bf16", "up_ptr": "*bf16", "out_ptr": "*bf16", "size": "i32"}
    return [*found, Spec("swiglu", swiglu.activate, types, {"BLOCK": 1024}, 4, 3, aligned=("size",))]
