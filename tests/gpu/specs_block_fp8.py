"""The kernels of block-scaled FP8, as layers of V3 and V2-Lite start them."""

from gpu.aot import Spec

from modeling_deepseek_moe.ops.block_fp8 import triton
from modeling_deepseek_moe.ops.block_fp8 import triton_kernels as kernels

PROCESSORS = {80: 108, 89: 128, 90: 132, 120: 170}
# rows of x, and rows of the weight: kv_a_proj, q_a_proj and kv_a_proj together, o_proj, q_b_proj; and a prompt
FEW = ((1, 576), (1, 2112), (1, 7168), (1, 24576), (16, 7168), (64, 7168), (200, 7168))


def few_rows(card: int, rows: int, columns: int, second: bool = False) -> Spec:
    block_m, block_n, warps, stages = triton.tile(card, rows, columns, PROCESSORS[card])
    types = {"x_ptr": "*bf16", "w_ptr": "*i32", "s_ptr": "*fp32", "y_ptr": "*bf16"}
    types |= dict.fromkeys(("M", "N", "N2", "K"), "i32")
    constants = {
        "BM": block_m,
        "BN": block_n,
        "BK": 128,
        "BIAS": False,
        "SECOND": second,
        "STAGES": stages,
        "bias_ptr": None,
    }
    if second:
        types |= {"w2_ptr": "*i32", "s2_ptr": "*fp32", "y2_ptr": "*bf16"}
    else:
        constants |= dict.fromkeys(("w2_ptr", "s2_ptr", "y2_ptr"))
    name = f"few_rows {rows} x {columns}{' of two' if second else ''}"
    return Spec(name, kernels.few_rows, types, constants, warps, 3, block_n * 128, ("K", "N", "N2"))


def gate_up(card: int, rows: int, columns: int) -> Spec:
    block_m, block_n, warps, stages = triton.tile_of_two(rows, columns, PROCESSORS[card])
    types = {
        "x_ptr": "*bf16",
        "g_ptr": "*i32",
        "gs_ptr": "*fp32",
        "u_ptr": "*i32",
        "us_ptr": "*fp32",
        "h_ptr": "*bf16",
    }
    types |= dict.fromkeys(("M", "N", "K"), "i32")
    constants = {"BM": block_m, "BN": block_n, "BK": 128, "STAGES": stages}
    name = f"gate_up {rows} x {columns}"
    return Spec(name, kernels.gate_up, types, constants, warps, 3, 2 * block_n * 128, ("K", "N"))


def gemm(card: int, rows_of_b: int) -> Spec:
    block_m, block_n, warps, stages = triton.tile_of_codes(card)
    types = {"a_ptr": "*u8", "as_ptr": "*fp32", "b_ptr": "*u8", "bs_ptr": "*fp32", "c_ptr": "*bf16"}
    types |= dict.fromkeys(("M", "N", "K", "sas_m", "sas_t", "sbs_n", "sbs_t"), "i32")
    constants = {"BM": block_m, "BN": block_n, "GROUP": 8, "B_ROWS": rows_of_b, "NATIVE": card >= 89, "STAGES": stages}
    return Spec(f"gemm, scales of {rows_of_b} x 128", kernels.gemm, types, constants, warps, 3, 0, ("K", "N"))


def cast_tiles(card: int, swiglu: bool) -> Spec:
    types = {"x_ptr": "*bf16", "codes_ptr": "*u8", "scale_ptr": "*fp32"}
    types |= dict.fromkeys(("R", "K", "sx_r", "sx_k", "ss_r", "ss_t"), "i32")
    constants = {"BM": 16, "POWER": True, "SWIGLU": swiglu, "NATIVE": card >= 89}
    name, nbytes = f"cast_tiles{' of SwiGLU' if swiglu else ''}", 16 * 128 * (4 + 1 if swiglu else 2 + 1)
    return Spec(name, kernels.cast_tiles, types, constants, 4, 3, nbytes, ("K", "sx_r"), is_loop=False)


def specs(card: int) -> list[Spec]:
    found = [few_rows(card, *shape) for shape in FEW] + [few_rows(card, 1, 2112, second=True)]
    found += [gate_up(card, *shape) for shape in ((1, 2048), (1, 18432), (16, 2048))]
    found += [gemm(card, rows) for rows in (128, 1)] + [cast_tiles(card, swiglu) for swiglu in (False, True)]
    types = {"codes_ptr": "*u8", "scale_ptr": "*fp32", "out_ptr": "*bf16"}
    types |= dict.fromkeys(("N", "K", "sc_n", "ss_n"), "i32")
    constants, nbytes = {"ROWS": 128, "BM": 32, "BK": 128}, 32 * 128 * (1 + 2)
    decode = Spec("decode_blocks", kernels.decode_blocks, types, constants, 4, 3, nbytes, ("K", "sc_n"), is_loop=False)
    return [*found, decode]
