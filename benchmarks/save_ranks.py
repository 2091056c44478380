"""Memory of a rank while several write a release-format folder together: ``save_pretrained`` of a model that FSDP2 sharded.

    python benchmarks/save_ranks.py --gigabytes 10 --ranks 4 [--quantize fp8] [--consolidate]

(as much disk, and memory of that and 0.7 GB a rank; with ``--consolidate`` twice as much disk.) Each rank makes its part alone and saves it.
What is told is that part, and the most memory of the rank's process that no file gives back, every 10 ms, Python and torch
with it. ``--consolidate``: then the ranks write a sharded checkpoint as accelerate does, which `deepseek-moe convert consolidate`
makes a release of in one process, and that one's memory is told.
"""

import argparse
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common
import torch
from train_memory import Peak, tidy

DIMS = {
    "vocab_size": 32768,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "moe_intermediate_size": 1408,
    "num_attention_heads": 16,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 64,
    "num_experts_per_tok": 6,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 0,
    "num_nextn_predict_layers": 0,
}
LIMIT = 1e9  # bytes that a rank may take besides its part
SHARDS = "pytorch_model_fsdp_0"  # accelerate's name


def make_config(gigabytes: float):
    """As many layers as make up the size in bf16, or a little more."""
    from modeling_deepseek_moe import DeepseekV3Config, parameter_breakdown

    sizes = [parameter_breakdown(DeepseekV3Config(**DIMS, num_hidden_layers=n)).parameters * 2 for n in (1, 2)]
    layers = max(1, math.ceil((gigabytes * 1e9 - sizes[0]) / (sizes[1] - sizes[0])) + 1)
    return DeepseekV3Config(**DIMS, num_hidden_layers=layers)


def make_part(gigabytes: float):
    """This rank's part of a model that FSDP2 divides layer by layer, and the bytes of it."""
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from transformers import AutoModelForCausalLM

    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(make_config(gigabytes), dtype=torch.bfloat16)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.to_local().fill_(0.01)
        for buffer in model.buffers():
            buffer.zero_()
    return model, sum(parameter.to_local().nbytes for parameter in model.parameters())


def run_rank(folder: Path, gigabytes: float, quantize: str | None, sharded: bool) -> None:
    """One rank: make a part, save it, and print what that took."""
    from torch import distributed
    from torch.distributed.checkpoint import FileSystemWriter, save

    distributed.init_process_group("gloo")
    model, part = make_part(gigabytes)
    tidy()
    distributed.barrier()
    began, peak = time.monotonic(), Peak(False)
    before = peak.now()
    peak.start()
    if sharded:
        save({"model": model.state_dict()}, storage_writer=FileSystemWriter(folder / SHARDS))
    else:
        model.save_pretrained(folder, **({"quantize": quantize} if quantize else {}))
    peak.ended.set()
    peak.join()
    figures = {"rank": distributed.get_rank(), "part": part, "before": before, "peak": peak.most}
    print(json.dumps(figures | {"seconds": round(time.monotonic() - began, 1)}), flush=True)
    distributed.barrier()
    distributed.destroy_process_group()


def on_ranks(folder: Path, given: argparse.Namespace, sharded: bool) -> list[dict]:
    """What each rank printed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, __file__, "--gigabytes", str(given.gigabytes), "--folder", str(folder)]
    command += (["--quantize", given.quantize] if given.quantize else []) + (["--consolidate"] if sharded else [])
    shared = {"WORLD_SIZE": given.ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    processes = [
        subprocess.Popen(
            command,
            env=os.environ | {n: str(v) for n, v in (shared | {"RANK": rank, "LOCAL_RANK": rank}).items()},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(given.ranks)
    ]
    return [json.loads(process.communicate()[0].splitlines()[-1]) for process in processes]


def consolidate(folder: Path, gigabytes: float) -> dict:
    """What one process takes that makes a release of the shards."""
    make_config(gigabytes).save_pretrained(folder)
    code = (
        "import json, sys; from train_memory import Peak; from modeling_deepseek_moe.cli import app; peak = Peak(False); peak.start()\n"
        "app(sys.argv[1:], standalone_mode=False); print(json.dumps({'peak': peak.most}))"
    )
    began = time.monotonic()
    command = [
        sys.executable,
        "-c",
        code,
        "convert",
        "consolidate",
        str(folder),
        str(folder / "out"),
        "--config",
        str(folder),
    ]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    written = sum(path.stat().st_size for path in (folder / "out").glob("*.safetensors"))
    found = json.loads(done.stdout.splitlines()[-1])
    return found | {"written": written, "seconds": round(time.monotonic() - began, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=10.0)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--quantize", help="into a format of codes: fp8 or int4")
    parser.add_argument("--consolidate", action="store_true", help="also make a release of a sharded checkpoint")
    parser.add_argument("--folder", type=Path, help="where to write; a temporary one by default")
    given = parser.parse_args()
    if "RANK" in os.environ:
        run_rank(given.folder, given.gigabytes, given.quantize, given.consolidate)
        return
    folder = given.folder or Path(tempfile.mkdtemp())
    try:
        rows = on_ranks(folder / "saved", given, False)
        written = sum(path.stat().st_size for path in (folder / "saved").glob("*.safetensors"))
        shutil.rmtree(folder / "saved")
        for row in rows:
            more = row["peak"] - row["part"]
            print(
                f"rank {row['rank']}: part {row['part'] / 1e9:.2f} GB, before {row['before'] / 1e9:.2f} GB, peak {row['peak'] / 1e9:.2f} GB: "
                f"{more / 1e9:.3f} GB besides its part, in {row['seconds']} s{'' if more <= LIMIT else ': TOO MUCH'}"
            )
        print(f"wrote {written / 1e9:.2f} GB")
        found = {
            "gigabytes": given.gigabytes,
            "ranks": given.ranks,
            "quantize": given.quantize,
            "written": written,
            "rows": rows,
        }
        if given.consolidate:
            on_ranks(folder / "checkpoint", given, True)
            found["consolidate"] = one = consolidate(folder / "checkpoint", given.gigabytes)
            print(f"consolidate: {one['written'] / 1e9:.2f} GB, peak {one['peak'] / 1e9:.3f} GB in {one['seconds']} s")
        name = "save_ranks" + (f"-{given.quantize}" if given.quantize else "")
        print(f"written to {common.save(name, found)}")
    finally:
        if given.folder is None:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
