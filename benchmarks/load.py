"""Loading a released FP8 checkpoint on a CPU: seconds, and memory by kind. Plain transformers beside it.

    python benchmarks/load.py [--keep FOLDER]

Writes about 1.3 GB of random FP8 in the release format (hidden 2048, 16 heads with DeepSeek's real head dims, 56
experts of width 1408), then loads it and runs one forward pass, each in a fresh process: as released (this package),
and dequantised to bf16 (plain transformers, which on a CPU can do no other; its key dims are padded to multiples of
128 in a second folder, since it cannot read a ragged one).

``peak`` is the high-water mark of resident memory, mapped file pages included; ``private`` is anonymous memory after
the forward, which no page cache can give back. Both include Python, torch and transformers themselves.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common
import torch
from rich.console import Console
from rich.table import Table

import modeling_deepseek_moe as dsm
from modeling_deepseek_moe.checkpoint import TensorPlan, write_checkpoint
from modeling_deepseek_moe.ops import block_fp8
from modeling_deepseek_moe.saving import fp8_quantization_config
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
which, folder = sys.argv[1:]
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
start = time.perf_counter()
with torch.no_grad():
    model(torch.randint(0, 32000, (1, 16)))
forward = time.perf_counter() - start
peak, rss, private = status("VmHWM", "VmRSS", "RssAnon")
print(json.dumps(dict(load_s=load, forward_16_tokens_s=forward, peak_load=peak_load, peak=peak, private=private,
                      interpreter_rss=base[0], interpreter_private=base[1])))
"""


def write_random_release(folder: Path, config) -> int:
    """A release of random FP8 codes, about as a trained one is scaled. Returns the bytes of its weights."""
    generator = torch.Generator().manual_seed(0)

    def codes(shape):
        magnitude = torch.randint(0, 0x60, shape, dtype=torch.uint8, generator=generator)
        return (magnitude | (torch.randint(0, 2, shape, dtype=torch.uint8, generator=generator) << 7)).view(
            block_fp8.FP8_DTYPE
        )

    def floats(shape, name):
        return (
            torch.ones(shape, dtype=torch.bfloat16)
            if len(shape) == 1
            else torch.randn(shape, dtype=torch.bfloat16) / 50
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
        "quantization_config": fp8_quantization_config(),
    }
    write_checkpoint(folder, plans, max_shard_size="500MB", texts={"config.json": json.dumps(fields)})
    return sum(plan.nbytes for plan in plans)


def run(which: str, folder: Path) -> dict:
    out = subprocess.run(
        [sys.executable, "-c", CHILD, which, str(folder)], capture_output=True, text=True, check=False
    )
    if out.returncode:
        return {"error": out.stderr.strip().splitlines()[-1]}
    return json.loads(out.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="write the checkpoints here and keep them")
    options = parser.parse_args()
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
