"""Memory of a rank while several write a release-format folder together: ``save_pretrained`` of a model that FSDP2 sharded.

``python benchmarks/save_ranks.py --gigabytes 10 --ranks 4`` (as much disk, and memory of that and 0.7 GB a rank). Each rank makes its part alone;
what is told is its part, and by how much its memory grew above what it was before the save.
"""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

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


def make_config(gigabytes: float):
    """As many layers as make up the size in bf16."""
    from modeling_deepseek_moe import DeepseekV3Config, parameter_breakdown

    sizes = [parameter_breakdown(DeepseekV3Config(**DIMS, num_hidden_layers=n)).total * 2 for n in (1, 2)]
    layers = max(1, round((gigabytes * 1e9 - sizes[0]) / (sizes[1] - sizes[0])) + 1)
    return DeepseekV3Config(**DIMS, num_hidden_layers=layers)


def resident(field: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most, RssAnon without mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def run_rank(folder: str, gigabytes: float) -> None:
    """One rank: make a part, save, and print what it took."""
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from transformers import AutoModelForCausalLM

    distributed.init_process_group("gloo")
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
    distributed.barrier()
    part = sum(parameter.to_local().nbytes for parameter in model.parameters())
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins again
    began = time.monotonic()
    model.save_pretrained(folder)
    figures = {
        "rank": distributed.get_rank(),
        "part": part,
        "before": before,
        "peak": resident("VmHWM"),
        "seconds": round(time.monotonic() - began, 1),
    }
    print(json.dumps(figures), flush=True)
    distributed.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=10.0)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--folder", type=Path, help="where to write; a temporary one by default")
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        run_rank(str(arguments.folder), arguments.gigabytes)
        return
    folder = arguments.folder or Path(tempfile.mkdtemp())
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, __file__, "--gigabytes", str(arguments.gigabytes), "--folder", str(folder / "saved")]
    shared = {"WORLD_SIZE": arguments.ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    try:
        processes = [
            subprocess.Popen(
                command,
                env=os.environ | {n: str(v) for n, v in (shared | {"RANK": rank, "LOCAL_RANK": rank}).items()},
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(arguments.ranks)
        ]
        for process in processes:
            figures = json.loads(process.communicate()[0])
            grown = (figures["peak"] - figures["before"]) / 1e9
            print(
                f"rank {figures['rank']}: part {figures['part'] / 1e9:.2f} GB, before {figures['before'] / 1e9:.2f} GB, "
                f"peak {figures['peak'] / 1e9:.2f} GB: {grown:+.3f} GB in {figures['seconds']} s"
            )
        written = sum(path.stat().st_size for path in (folder / "saved").glob("*.safetensors"))
        print(f"wrote {written / 1e9:.2f} GB in {len(list((folder / 'saved').glob('*.safetensors')))} files")
    finally:
        if arguments.folder is None:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
