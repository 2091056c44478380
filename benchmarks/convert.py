"""Conversion compared with what the disk allows and with a plain loop over blocks, on random weights in V3's shapes.

``python benchmarks/convert.py``: one layer of DeepSeek-V3 (256 experts, 11.5 GB in FP8), FP8 → bf16 → FP8, with one and
two workers, each in a process of its own, whose peak memory is read from the kernel. The limit of each direction is a
plain copy in the same run: the same bytes read, the same bytes written and flushed, nothing made of them. Caches are
dropped before each where that is allowed. Needs 60 GB of disk.

``--v3``: the time and memory of ``--dry-run``, ``inspect`` and ``plan`` on all of DeepSeek-V3's headers (sparse files).
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import common
import torch
from load import write_random_release, write_sparse_v3
from rich.console import Console
from rich.table import Table

import modeling_deepseek_moe as dsm
from modeling_deepseek_moe import CheckpointReader
from modeling_deepseek_moe.ops import block_fp8

CHUNK = 16 << 20
SHARD = "2GB"
CASES = (("fp8-to-bf16", "fp8", "bf16"), ("bf16-to-fp8", "bf16", "fp8"))


def drop_caches() -> bool:
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
    except OSError:
        return False
    return True


def measured(*arguments: str, allowed: tuple[int, ...] = (0,)) -> dict:
    """Seconds and peak resident bytes of ``deepseek-moe`` with these arguments."""
    began = time.perf_counter()
    command = [sys.executable, "-c", "from modeling_deepseek_moe.cli import app; app()", *map(str, arguments)]
    with tempfile.TemporaryFile() as output:
        child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        text = output.read().decode()
    if child.returncode not in allowed:
        raise SystemExit(f"{' '.join(map(str, arguments))}: exit code {child.returncode}\n{text}")
    return {"seconds": time.perf_counter() - began, "peak_bytes": usage.ru_maxrss * 1024, "output": text}


def plain_copy(source: Path, out: Path, growth: float, threads: int) -> float:
    """Seconds to read all shards and write ``growth`` times their bytes, flushed; a file a time on each thread."""
    out.mkdir()

    def copy(file: Path) -> None:
        buffer = memoryview(bytearray(CHUNK))
        owed = 0.0
        with file.open("rb", buffering=0) as reader, (out / file.name).open("wb", buffering=0) as writer:
            while count := reader.readinto(buffer):
                owed += count * growth
                while owed >= 1:
                    written = writer.write(buffer[: min(count, int(owed))])
                    owed -= written
            os.fsync(writer.fileno())

    began = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(copy, sorted(source.glob("*.safetensors"))))
    seconds = time.perf_counter() - began
    shutil.rmtree(out)
    return seconds


def block_loop(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """What anyone would write first."""
    out = torch.empty(weight.shape, dtype=torch.bfloat16)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            rows, columns = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
            out[rows, columns] = (weight[rows, columns].float() * scale[i, j]).bfloat16()
    return out


def block_loop_back(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    scales = torch.empty(block_fp8.scale_shape(weight.shape))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            rows, columns = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
            block = weight[rows, columns].float()
            scales[i, j] = block.abs().max() / 448
            codes[rows, columns] = (block / scales[i, j]).to(torch.float8_e4m3fn)
    return codes, scales


def loops(folder: Path, rounds: int = 7) -> dict:
    """FP8 bytes per second of the loops and of this package, one core each, interleaved; minima of the times."""
    reader = CheckpointReader.open(folder)
    name = "model.layers.0.mlp.experts.0.up_proj.weight"
    weight, scale = reader.tensor(name).clone(), reader.tensor(name + "_scale_inv").clone()
    wide = block_loop(weight, scale)
    torch.set_num_threads(1)
    works = {
        "loop fp8-to-bf16": lambda: block_loop(weight, scale),
        "ours fp8-to-bf16": lambda: block_fp8.dequantize(weight, scale, torch.bfloat16),
        "loop bf16-to-fp8": lambda: block_loop_back(wide),
        "ours bf16-to-fp8": lambda: block_fp8.quantize(wide),
    }
    times = {key: [] for key in works}
    for _ in range(rounds):
        for key, work in works.items():
            began = time.perf_counter()
            work()
            times[key].append(time.perf_counter() - began)
    return {key: weight.numel() / min(values) for key, values in times.items()}


def measure(folder: Path, layers: int) -> None:
    config = dsm.DeepseekV3Config(
        num_hidden_layers=layers, first_k_dense_replace=0, vocab_size=4096, num_nextn_predict_layers=0
    )
    write_random_release(folder / "fp8", config, max_shard_size=SHARD)
    result = {"loops": loops(folder / "fp8"), "caches_dropped": drop_caches(), "shard": SHARD, "rows": []}
    for name, source, made in CASES:
        shards = list((folder / source).glob("*.safetensors"))
        size = sum(file.stat().st_size for file in shards)
        growth = {"fp8-to-bf16": 2.0, "bf16-to-fp8": 0.5}[name]
        row = {"name": name, "read_bytes": size, "largest_shard": max(file.stat().st_size for file in shards)}
        for workers in (1, 2):
            drop_caches()
            row[f"copy_{workers}"] = plain_copy(folder / source, folder / "copy", growth, workers)
            drop_caches()
            out = folder / f"{made}-{workers}"
            run = measured("convert", name, folder / source, out, "--workers", workers, "--max-shard-size", SHARD)
            row[f"seconds_{workers}"], row[f"peak_{workers}"] = run["seconds"], run["peak_bytes"]
            written = [file.stat().st_size for file in out.glob("*.safetensors")]
            row["written_bytes"] = sum(written)
            if workers == 1:
                shutil.rmtree(out)
            elif source == "fp8":
                out.rename(folder / made)
        result["rows"].append(row)
    report(result)
    print("written to", common.save("convert", result | {"at": time.strftime("%F")}))


def report(result: dict) -> None:
    table = Table(title="Conversion")
    for column in ("", "workers", "s", "copy s", "share of the copy", "read GB/s", "× loop", "peak MB"):
        table.add_column(column, justify="right")
    for row in result["rows"]:
        fp8 = min(row["read_bytes"], row["written_bytes"])
        limit = min(row["copy_1"], row["copy_2"])
        for workers in (1, 2):
            seconds = row[f"seconds_{workers}"]
            ratio = fp8 / seconds / result["loops"][f"loop {row['name']}"]
            values = (
                f"{seconds:.1f}",
                f"{limit:.1f}",
                f"{limit / seconds:.0%}",
                f"{row['read_bytes'] / seconds / 1e9:.2f}",
            )
            table.add_row(row["name"], str(workers), *values, f"{ratio:.1f}", f"{row[f'peak_{workers}'] / 1e6:.0f}")
    Console().print(table)
    for name, _, _ in CASES:
        loop, ours = (result["loops"][f"{who} {name}"] for who in ("loop", "ours"))
        print(f"{name}, one core, in memory: {ours / 1e9:.2f} GB/s of FP8, {ours / loop:.1f} × the loop")


def measure_v3(folder: Path) -> None:
    release = folder / "release"
    write_sparse_v3(release, scattered=False)
    for file in release.glob("*.safetensors"):
        with file.open("r+b") as stream:  # scales come first in these files; none of them may be zero
            size = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(size))
            end = max((entry["data_offsets"][1] for entry in header.values() if entry["dtype"] == "F32"), default=0)
            stream.write(torch.ones(end // 4).numpy().tobytes())
    rows = {
        "inspect": measured("inspect", release),
        "plan": measured("plan", release),
        "fp8-to-bf16 --dry-run": dry_run("fp8-to-bf16", release, folder),
        "reshard --dry-run": dry_run("reshard", release, folder),
        "hf-to-native --dry-run": dry_run("hf-to-native", release, folder, "--world-size", 8),
        "mtp --dry-run": dry_run("mtp", release, folder, "--action", "drop"),
    }
    table = Table(title="DeepSeek-V3's layout, sparse")
    for column in ("", "s", "peak MB"):
        table.add_column(column, justify="right")
    for name, row in rows.items():
        table.add_row(name, f"{row['seconds']:.1f}", f"{row['peak_bytes'] / 1e6:.0f}")
    Console().print(table)
    print("written to", common.save("convert-v3", {"rows": rows, "at": time.strftime("%F")}))


def dry_run(name: str, release: Path, folder: Path, *options) -> dict:
    return measured("convert", name, release, folder / "out", "--dry-run", *options, allowed=(0, 1))  # 1: no room


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--v3", action="store_true", help="dry runs on DeepSeek-V3's layout instead")
    parser.add_argument("--layers", type=int, default=1, help="layers of DeepSeek-V3, 11.5 GB each")
    parser.add_argument("--folder", type=Path, help="where to write: the disk that is measured")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        (measure_v3(Path(folder)) if arguments.v3 else measure(Path(folder), arguments.layers))


if __name__ == "__main__":
    main()
