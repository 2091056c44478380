"""The CPU engine compared with torch, transformers and llama.cpp: ceilings, operations, expert layers, attention, whole models.

    python benchmarks/cpu.py                     everything: about 20 minutes on two cores, 12 GB of memory
    python benchmarks/cpu.py --quick             one thread count and few rounds: about 5 minutes
    python benchmarks/cpu.py --only ops          one part; the others stay as they are in the result file
    python benchmarks/cpu.py --only e2e --llama-bench llama.cpp/build/bin/llama-bench --gguf model-bf16.gguf
    DEEPSEEK_MOE_BACKEND=cpu:avx2 python benchmarks/cpu.py --only e2e_four_bit   on a lower instruction set

Within a part all contestants take turns, and readers that do nothing but read memory take turns with them: a share of
the bandwidth compares with what those reached in the same seconds, the best of them, and may so pass 100 % by noise.
Weights rotate over twice the last-level cache, which on virtual machines is their host's, and readers read as much. A figure is the median of the undisturbed samples
(`common.Timing`); the minimum, the spread and the number of disturbed samples are next to it in the JSON.

Parts:
    ops      FP8 linear [4096, 7168] at 1, 4 and 512 rows, each instruction set, and the bf16 head [102400, 2048]
    experts  64 routed experts of 2048 x 1408, top-6 and top-8, 1 and 512 tokens; the cost of a call at tiny dims
    four_bit linear layers and experts of int4, nf4 and mxfp4 codes next to FP8's
    mla      latent attention of one new token, 16 and 128 heads, contexts 1k and 8k
    e2e      a model of 2.25B parameters in DeepSeek-V2-Lite's dims: decoding at 128 and 8192 tokens, prompts of 512 and
             4096 tokens, and 512 more after 4096
    e2e_four_bit  the same model in INT4 and NF4, and FP8 with a head of FP8, by `deepseek-moe convert`: 5 GB more

The last lines hold the figures against what the engine is to reach. OMP_WAIT_POLICY is left as it is set and written
down: threads that sleep at once (PASSIVE) cost a few percent on a quiet machine; where another program uses a core,
threads that spin (the default) make calls several times slower.
"""

import argparse
import json
import os
import time
from pathlib import Path

import common
import cpu_report
import torch
import transformers

PARTS = ("ops", "experts", "four_bit", "mla", "e2e", "e2e_four_bit")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--threads", type=int, default=cores, help=f"most threads (default: {cores}, all)")
    parser.add_argument(
        "--rounds", type=int, default=7, help="rounds of whole models; operations take 4 times as many"
    )
    parser.add_argument("--quick", action="store_true", help="3 rounds, and operations on --threads threads only")
    parser.add_argument("--only", choices=PARTS, action="append", help="this part (may be given again)")
    parser.add_argument("--out", type=Path, default=common.RESULTS / "cpu.json", help="the result file")
    parser.add_argument(
        "--model-folder",
        type=Path,
        help="where the model of e2e is written, 2.7 GB, or found, others next to it (default: temporary)",
    )
    parser.add_argument("--llama-bench", type=Path, help="llama.cpp's llama-bench, for both e2e parts")
    parser.add_argument(
        "--gguf", type=Path, action="append", default=[], help="a model for it, of the same dims (may be repeated)"
    )
    parser.add_argument(
        "--llama-contexts",
        type=int,
        nargs="+",
        default=[128, 8192],
        help="of e2e_four_bit: tokens before those that llama.cpp decodes, minutes for many (default: 128 8192)",
    )
    options = parser.parse_args()
    if bool(options.llama_bench) != bool(options.gguf):
        parser.error("--llama-bench and --gguf go together")
    if options.quick:
        options.rounds = min(options.rounds, 3)
    return options


def main() -> None:
    options = parse()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    result = json.loads(options.out.read_text()) if options.only and options.out.exists() else {}
    for part in options.only or PARTS:
        torch.set_num_threads(options.threads)
        start = time.perf_counter()
        with torch.inference_mode():
            found = __import__(f"cpu_{part}").measure(options)
        result[part] = {"machine": common.machine(), "at": time.strftime("%F %R"), **found}
        cpu_report.show(part, result[part])
        print(f"{part}: {time.perf_counter() - start:.0f} s\n", flush=True)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=2) + "\n")
    cpu_report.judge(result)
    print("written to", options.out)


if __name__ == "__main__":
    main()
