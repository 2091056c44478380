"""Loading a released FP8 checkpoint on a CPU: seconds, and memory by kind. Plain transformers next to it.

    python benchmarks/load.py [--keep FOLDER]
    python benchmarks/load.py --v3

Without ``--v3`` it writes about 1.3 GB of random FP8 in the release format (hidden 2048, 16 heads with DeepSeek's real head dims, 56
experts of width 1408), then loads it and runs one forward pass, each in a fresh process: as released (this package),
and dequantised to bf16 (plain transformers, which on a CPU can do no other; its key dims are padded to multiples of
128 in a second folder, since it cannot read a ragged one).

``peak`` is the high-water mark of resident memory, mapped file pages included; ``private`` is anonymous memory after
the forward, which no page cache can give back. Both include Python, torch and transformers themselves.

With ``--v3`` it writes DeepSeek-V3's own layout as sparse files (689 GB on the label, megabytes on the disk), in two
orders: as released, where the scales of a shard lie together, and scattered, with each scale next to its weight. Both
are loaded three times, each in a fresh process. Nothing is dropped from the page cache: the headers are in it.
"""

import argparse
import json
import math
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import common
import torch
from rich.console import Console
from rich.table import Table

import modeling_deepseek_moe as dsm
from modeling_deepseek_moe import write_checkpoint
from modeling_deepseek_moe.checkpoint.headers import DTYPE_NAMES
from modeling_deepseek_moe.checkpoint.index import INDEX_NAME
from modeling_deepseek_moe.checkpoint.writer import TensorPlan, plan_shards
from modeling_deepseek_moe.formats import FP8
from modeling_deepseek_moe.ops import block_fp8
from modeling_deepseek_moe.weights import release_tensors

CONFIG = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 3,
    "num_attention_heads": 16,
    "n_routed_experts": 56,
    "num_experts_per_tok": 6,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "q_lora_rank": None,
    "n_group": 1,
    "topk_group": 1,
    "num_nextn_predict_layers": 0,
}
CHILD = """
import json, sys, time
import torch
which, folder, tokens = sys.argv[1:]
import transformers
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
if which == "ours":
    import modeling_deepseek_moe
    model_class = transformers.AutoModelForCausalLM
else:
    model_class = transformers.DeepseekV3ForCausalLM

def status(*names):
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return [int(lines[name].split()[0]) * 1024 for name in names]

base = status("VmRSS", "RssAnon")
start = time.perf_counter()
model = model_class.from_pretrained(folder)
load = time.perf_counter() - start
peak_load, = status("VmHWM")
result = dict(load_s=load, peak_load=peak_load, interpreter_rss=base[0], interpreter_private=base[1])
if int(tokens):
    start = time.perf_counter()
    with torch.no_grad():
        model(torch.randint(0, 32000, (1, int(tokens))))
    result[f"forward_{tokens}_tokens_s"] = time.perf_counter() - start
result["peak"], result["private"] = status("VmHWM", "RssAnon")
print(json.dumps(result))
"""


def write_random_release(folder: Path, config, embedding: float = 0.02, max_shard_size: str = "500MB") -> int:
    """A release of random FP8 codes, about as a trained one is scaled. Returns the bytes of its weights.

    Args:
        embedding: standard deviation; compared with 1 the layers add little to the residual stream, as in a trained model.
    """
    generator = torch.Generator().manual_seed(0)

    def codes(shape):
        words = torch.empty(math.prod(shape) // 8, dtype=torch.int64).random_(-(1 << 63), None, generator=generator)
        # without bit 5 no exponent is all ones: finite, and at most 30
        words &= int.from_bytes(b"\xdf" * 8, "little", signed=True)
        return words.view(block_fp8.FP8_DTYPE).view(shape)

    def floats(shape, name):
        scale = embedding if "embed_tokens" in name else 0.02
        return (
            torch.ones(shape, dtype=torch.bfloat16)
            if len(shape) == 1
            else torch.randn(shape, dtype=torch.bfloat16, generator=generator) * scale
        )

    plans = []
    for name, spec in release_tensors(config).items():
        if spec.quantized:
            scales = block_fp8.scale_shape(spec.shape)
            plans.append(TensorPlan(name, block_fp8.FP8_DTYPE, spec.shape, lambda shape=spec.shape: codes(shape)))
            plans.append(TensorPlan.of(name + "_scale_inv", torch.full(scales, 2e-3)))
        elif name.endswith("bias"):
            plans.append(TensorPlan.of(name, torch.zeros(spec.shape)))
        else:
            shape = spec.shape
            plans.append(TensorPlan(name, torch.bfloat16, shape, lambda shape=shape, name=name: floats(shape, name)))
    fields = json.loads(config.to_json_string()) | {
        "architectures": ["DeepseekV3ForCausalLM"],
        "torch_dtype": "bfloat16",
        "quantization_config": FP8.quantization_config(),
    }
    write_checkpoint(folder, plans, max_shard_size=max_shard_size, texts={"config.json": json.dumps(fields)})
    return sum(plan.nbytes for plan in plans)


def write_sparse_shard(
    file: Path, shard: list[TensorPlan], data_of: Callable[[TensorPlan], bytes | memoryview | None]
) -> None:
    """A file with a real header, in which tensors without data (``None``) are holes: they read as zeros and take no disk."""
    header, end = {}, 0
    for plan in shard:
        start, end = end, end + plan.nbytes
        header[plan.name] = {
            "dtype": DTYPE_NAMES[plan.dtype],
            "shape": list(plan.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)
        for plan in shard:
            data = data_of(plan)
            if data is not None:
                stream.seek(8 + len(text) + header[plan.name]["data_offsets"][0])
                stream.write(data)


def write_sparse_v3(folder: Path, *, scattered: bool) -> int:
    """Real headers, scales of 1 and no other data: sparse files of the right size. Returns the bytes of the weights."""
    config = dsm.DeepseekV3Config()
    plans = []
    for name, spec in release_tensors(config).items():
        dtype = torch.float32 if name.endswith("bias") else torch.bfloat16
        plans.append(TensorPlan(name, block_fp8.FP8_DTYPE if spec.quantized else dtype, spec.shape, lambda: None))
        if spec.quantized:
            scales = block_fp8.scale_shape(spec.shape)
            plans.append(TensorPlan(name + "_scale_inv", torch.float32, scales, lambda: None))
    fields = json.loads(config.to_json_string()) | {
        "architectures": ["DeepseekV3ForCausalLM"],
        "torch_dtype": "bfloat16",
        "quantization_config": FP8.quantization_config(),
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(fields))
    weight_map = {}
    for file, shard in plan_shards(plans, 4_300_000_000).items():
        if not scattered:  # as the safetensors library orders them
            shard = sorted(shard, key=lambda plan: (-plan.dtype.itemsize, plan.name))
        write_sparse_shard(
            folder / file,
            shard,
            lambda plan: struct.pack("<f", 1.0) * math.prod(plan.shape) if plan.name.endswith("_scale_inv") else None,
        )
        weight_map |= {plan.name: file for plan in shard}
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return sum(plan.nbytes for plan in plans)


def run(which: str, folder: Path, tokens: int = 16) -> dict:
    out = subprocess.run(
        [sys.executable, "-c", CHILD, which, str(folder), str(tokens)], capture_output=True, text=True, check=False
    )
    if out.returncode:
        return {"error": out.stderr.strip().splitlines()[-1]}
    return json.loads(out.stdout.splitlines()[-1])


def measure_v3() -> None:
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for order in ("as released", "scattered"):
            size = write_sparse_v3(Path(folder, order), scattered=order == "scattered")
            rows[order] = [run("ours", Path(folder, order), tokens=0) for _ in range(3)]
    table = Table(title=f"DeepSeek-V3's layout, {size / 1e9:.0f} GB, sparse")
    for column in ("", "load s", "private MB", "of them loaded", "loaded / file"):
        table.add_column(column, justify="right")
    for order, runs in rows.items():
        for row in runs:
            if "error" in row:
                raise SystemExit(f"{order}: {row['error']}")
            row["loaded_private"] = row["private"] - row["interpreter_private"]
            values = (row["load_s"], row["private"] / 1e6, row["loaded_private"] / 1e6, row["loaded_private"] / size)
            table.add_row(order, f"{values[0]:.2f}", f"{values[1]:.0f}", f"{values[2]:.0f}", f"{values[3]:.5f}")
    Console().print(table)
    print("written to", common.save("load-v3", {"file_bytes": size, "rows": rows, "at": time.strftime("%F")}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="write the checkpoints here and keep them")
    parser.add_argument("--v3", action="store_true", help="load DeepSeek-V3's layout from sparse files instead")
    options = parser.parse_args()
    if options.v3:
        measure_v3()
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        size = write_random_release(folder / "release", dsm.DeepseekV3Config(**CONFIG))
        padded = CONFIG | {"qk_rope_head_dim": 128, "intermediate_size": 11264}  # 512 + 128 rows: a multiple of 128
        write_random_release(folder / "padded", dsm.DeepseekV3Config(**padded))
        rows = {
            "ours": run("ours", folder / "release"),
            "ours, again": run("ours", folder / "release"),
            "transformers, same folder": run("transformers", folder / "release"),
            "transformers, padded": run("transformers", folder / "padded"),
        }
    table = Table(title=f"FP8 checkpoint of {size / 1e9:.2f} GB")
    for column in ("", "load s", "peak / file", "private / file", "forward s"):
        table.add_column(column, justify="right")
    for name, row in rows.items():
        if "error" in row:
            table.add_row(name, row["error"][:60])
            continue
        row |= {"peak_over_file": row["peak"] / size, "private_over_file": row["private"] / size}
        values = (row["load_s"], row["peak_over_file"], row["private_over_file"], row["forward_16_tokens_s"])
        table.add_row(name, *(f"{value:.2f}" for value in values))
    Console().print(table)
    print(
        "written to",
        common.save("load-fp8", {"config": CONFIG, "file_bytes": size, "rows": rows, "at": time.strftime("%F")}),
    )


if __name__ == "__main__":
    main()
