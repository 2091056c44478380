"""A model of DeepSeek-V2-Lite's shapes loaded in 4 bits by bitsandbytes on a CPU: peak memory, seconds, bytes per parameter.

    python benchmarks/load_four_bit.py [--folder FOLDER] [--layers N] [--written N] [--source fp8|bf16] [--plain-scales]

It writes a random checkpoint of V2-Lite's shapes (27 layers, 64 experts of width 1408, 15.7 billion weights: 16 GB in FP8 as
released, 31 GB in bf16), one shard after the other and no model in memory, loads it in a fresh process with
``BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")``, decodes one token, and deletes it. FP8 first, then bf16,
so that the disk holds one of them at a time: with less room than that it says so and writes nothing. With ``--written N`` the
matrices of all layers but the first N are holes in sparse files, which take no disk and read as zeros. The loader reads, decodes
and quantises as many bytes, and memory is the same; seconds, of which the disk has no part there, are those of the processor.

Memory is what the process held at its worst, Python, torch and transformers included:

``peak_private``   anonymous and shared memory (RssAnon + RssShmem of /proc/self/status, every 50 ms): what no page cache can
                   give back, so the memory that a machine has to have.
``peak_resident``  VmHWM: all resident pages. It counts pages of mapped files too, which the kernel drops when it needs
                   the room.

The process ends itself where private memory passes ``--limit`` GB, rather than take the machine with it.
"""

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import common
import numpy
import torch
from load import write_sparse_shard
from rich.console import Console
from rich.table import Table

import modeling_deepseek_moe as dsm
from modeling_deepseek_moe import write_checkpoint
from modeling_deepseek_moe.checkpoint.index import INDEX_NAME
from modeling_deepseek_moe.checkpoint.writer import TensorPlan, parse_size, plan_shards
from modeling_deepseek_moe.formats import FP8, split_scale
from modeling_deepseek_moe.weights import TensorSpec, release_tensors

CONFIG = {
    "vocab_size": 102400,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_attention_heads": 16,
    "n_routed_experts": 64,
    "num_experts_per_tok": 6,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "q_lora_rank": None,
}
LAYERS = 27
GB = 1_000_000_000
SHARD = "5GB"
SPARE = 1 * GB  # of the disk, for the index and for others
# Bits of a word of random codes that stay random, and those that are set: finite, about as large as trained weights.
FP8_MASK, FP8_SET = 0xDF, 0x00  # without bit 5 no exponent is all ones, and the largest is 30
BF16_MASK, BF16_SET = 0x81FF, 0x3A00  # exponents of 2^-11 to 2^-8
SCALE = 2e-3
CHILD = """
import json, os, sys, threading, time
folder, double, limit = sys.argv[1], sys.argv[2] == "double", float(sys.argv[3])

def status(*names):
    with open("/proc/self/status") as stream:
        lines = dict(line.split(":", 1) for line in stream)
    return sum(int(lines[name].split()[0]) * 1024 for name in names)

peak, stopping = [0], threading.Event()

def watch():
    while not stopping.wait(0.05):
        peak[0] = max(peak[0], status("RssAnon", "RssShmem"))
        if peak[0] > limit * 1e9:
            print(f"stopped: found {peak[0] / 1e9:.2f} GB of private memory, wanted at most {limit} GB", file=sys.stderr)
            sys.stderr.flush()
            os._exit(3)

threading.Thread(target=watch, daemon=True).start()
import torch, transformers
import modeling_deepseek_moe
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
result = {"interpreter_private": status("RssAnon", "RssShmem")}
config = transformers.BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double, bnb_4bit_compute_dtype=torch.bfloat16
)
start = time.perf_counter()
model = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.bfloat16)
result["load_s"] = time.perf_counter() - start
result["private_after_load"], result["peak_private_load"] = status("RssAnon", "RssShmem"), peak[0]
start = time.perf_counter()
tokens = model.generate(torch.tensor([[1, 2, 3, 4]]), max_new_tokens=1, do_sample=False)
result["token_s"], result["token"] = time.perf_counter() - start, tokens[0, -1].item()
stopping.set()
result["peak_private"], result["peak_resident"] = peak[0], status("VmHWM")
result["private"] = status("RssAnon", "RssShmem")
result["footprint"], result["parameters"] = model.get_memory_footprint(), model.num_parameters()
coded = [m for m in model.modules() if type(m).__name__ == "BitsAndBytesExperts"]
result["expert_layers"] = len(coded)
result["expert_bytes_per_parameter"] = sum(
    t.nbytes for m in coded for t in m.parameters()) / max(sum(m.num_values for m in coded), 1)
print(json.dumps(result))
"""


def config_of(layers: int) -> dsm.DeepseekMoeConfig:
    return dsm.DeepseekV2Config(**CONFIG, num_hidden_layers=layers)


def plans_of(config: dsm.DeepseekMoeConfig, source: str) -> Iterator[TensorPlan]:
    """Every tensor of a release; its bytes are drawn when its turn to be written comes."""
    generator = numpy.random.Generator(numpy.random.SFC64(0))

    def codes(shape, dtype, mask: int, fixed: int) -> torch.Tensor:
        words = numpy.frombuffer(generator.bytes(math.prod(shape) * dtype.itemsize), f"<u{dtype.itemsize}")
        words = (words & words.dtype.type(mask)) | words.dtype.type(fixed)
        return torch.from_numpy(words).view(dtype).view(shape)

    def plan(name: str, spec: TensorSpec) -> Iterator[TensorPlan]:
        if source == "fp8" and spec.quantized:
            dtype = FP8.code_dtype
            yield TensorPlan(name, dtype, spec.shape, lambda: codes(spec.shape, dtype, FP8_MASK, FP8_SET))
            yield TensorPlan.of(name + FP8.scale_suffix, torch.full(FP8.scale_shape(spec.shape), SCALE))
        elif len(spec.shape) == 1:
            yield TensorPlan.of(name, torch.ones(spec.shape, dtype=torch.bfloat16))
        else:
            dtype = torch.bfloat16
            yield TensorPlan(name, dtype, spec.shape, lambda: codes(spec.shape, dtype, BF16_MASK, BF16_SET))

    for name, spec in release_tensors(config).items():
        yield from plan(name, spec)


def is_written(plan: TensorPlan, written: int | None) -> bool:
    """Whether a tensor has data: matrices of layers from ``written`` on are holes, but for scales, which may not be 0."""
    name, _, rest = plan.name.removeprefix("model.layers.").partition(".")
    is_matrix = len(plan.shape) > 1 and split_scale(plan.name)[1] is None
    return written is None or not (rest and name.isdecimal()) or not is_matrix or int(name) < written


def write_release(folder: Path, config: dsm.DeepseekMoeConfig, source: str, written: int | None) -> int:
    """Write the checkpoint, matrices of ``written`` layers, by default all; returns the bytes of its weights.

    Raises:
        SystemExit: the disk has no room for it.
    """
    plans = list(plans_of(config, source))
    size, free = sum(plan.nbytes for plan in plans), shutil.disk_usage(folder.parent).free
    wanted = sum(plan.nbytes for plan in plans if is_written(plan, written)) + SPARE
    if free < wanted:
        raise SystemExit(
            f"{folder.parent}: found {free / GB:.1f} GB free, wanted {wanted / GB:.1f} for the checkpoint in {source}: "
            "name another place with --folder, write fewer layers with --written, or have fewer with --layers"
        )
    fields = json.loads(config.to_json_string()) | {
        "architectures": ["DeepseekV2ForCausalLM"],
        "torch_dtype": "bfloat16",
    }
    if source == "fp8":
        fields["quantization_config"] = FP8.quantization_config()
    texts = {"config.json": json.dumps(fields)}
    if written is None:
        write_checkpoint(folder, plans, max_shard_size=SHARD, texts=texts)
        return size
    folder.mkdir()
    weight_map = {}
    for file, shard in plan_shards(plans, parse_size(SHARD)).items():
        write_sparse_shard(
            folder / file,
            shard,
            lambda plan: plan.produce().view(torch.uint8).numpy().data if is_written(plan, written) else None,
        )
        weight_map |= {plan.name: file for plan in shard}
    texts[INDEX_NAME] = json.dumps({"metadata": {}, "weight_map": weight_map})
    for name, text in texts.items():
        (folder / name).write_text(text)
    return size


def load(folder: Path, double: bool, limit: float) -> dict:
    command = [sys.executable, "-c", CHILD, str(folder), "double" if double else "plain", str(limit)]
    out = subprocess.run(command, capture_output=True, text=True, check=False)
    if out.returncode:
        raise SystemExit(f"{folder}: {out.stderr.strip()[-2000:]}")
    return json.loads(out.stdout.splitlines()[-1])


def measure(source: str, options: argparse.Namespace) -> list[dict]:
    """A row for each kind of scales, from one checkpoint, which is deleted."""
    rows = []
    with tempfile.TemporaryDirectory(dir=options.folder, prefix=f"load-four-bit-{source}-") as temporary:
        folder = Path(temporary, "release")
        size = write_release(folder, config_of(options.layers), source, options.written)
        for double in (True, False) if options.plain_scales else (True,):
            row = {"source": source, "double_quant": double, "layers": options.layers, "file_bytes": size}
            row["layers_written"] = options.layers if options.written is None else min(options.written, options.layers)
            row |= load(folder, double, options.limit)
            row["bytes_per_parameter"] = row["footprint"] / row["parameters"]
            print(json.dumps(row), flush=True)
            rows.append(row)
    return rows


def report(rows: list[dict]) -> None:
    table = Table(title="NF4 by bitsandbytes, V2-Lite's shapes, on a CPU")
    columns = (
        "from",
        "scales",
        "files GB",
        "load s",
        "peak private GB",
        "peak resident GB",
        "after GB",
        "B per parameter",
    )
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row["source"],
            "double" if row["double_quant"] else "plain",
            f"{row['file_bytes'] / GB:.1f}",
            f"{row['load_s']:.0f}",
            f"{row['peak_private'] / GB:.2f}",
            f"{row['peak_resident'] / GB:.2f}",
            f"{row['private'] / GB:.2f}",
            f"{row['bytes_per_parameter']:.3f}",
        )
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="on a disk with room; a folder in it is made and deleted")
    parser.add_argument("--layers", type=int, default=LAYERS, help="of the model, 27 by default; the first is dense")
    parser.add_argument(
        "--written", type=int, help="layers whose matrices are on the disk, all by default; others are holes"
    )
    parser.add_argument(
        "--source", choices=("fp8", "bf16"), help="of the checkpoint; both, one after the other, if not given"
    )
    parser.add_argument(
        "--plain-scales", action="store_true", help="load with scales in fp32 too, not quantised once more"
    )
    parser.add_argument(
        "--limit", type=float, default=17.0, help="GB of private memory at which the process ends itself"
    )
    parser.add_argument("--name", default="load-four-bit", help="of the results file")
    options = parser.parse_args()
    rows = []
    for source in (options.source,) if options.source else ("fp8", "bf16"):
        rows += measure(source, options)
    report(rows)
    result = {"config": CONFIG, "layers": options.layers, "rows": rows, "at": time.strftime("%F")}
    print("written to", common.save(options.name, result))


if __name__ == "__main__":
    main()
