"""The contestants of `stream.py`, each in a process of its own: experts streamed, mapped, offloaded by accelerate."""

import argparse
import ctypes
import itertools
import json
import mmap
import os
import random
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from inspect import signature
from pathlib import Path

import torch
import transformers

# not from this package, which would register its models for the contestant that is to be plain
CACHE_NAME = next(
    name
    for name in ("cache", "past_key_values")
    if name in signature(transformers.DeepseekV3ForCausalLM.forward).parameters
)

PAGE = mmap.PAGESIZE
DISK_EVERY = 2  # tokens
DISK_BLOCKS, DISK_THREADS = 6, (1, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("contestant", choices=CONTESTANTS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("settings", type=json.loads)
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    torch.manual_seed(0)
    result = CONTESTANTS[options.contestant](options.folder, **options.settings)
    print(json.dumps(result))


class Disk:
    """Direct reads of blocks as large as an expert, at random places of the checkpoint: what the disk can give.

    Code of its own: nothing of the package that is measured.
    """

    def __init__(self, folder: Path, block: int):
        self.block = block // PAGE * PAGE
        files = [os.open(file, os.O_RDONLY | os.O_DIRECT) for file in shards(folder)]
        sizes = [os.fstat(file).st_size for file in files]
        self._places = [
            (file, start)
            for file, size in zip(files, sizes, strict=True)
            for start in range(0, size - self.block, self.block)
        ]
        # private memory in huge pages: into small ones, or shared memory, the disk reads at half the rate
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._memory = mmap.mmap(-1, DISK_BLOCKS * self.block, flags=flags)
        self._memory.madvise(mmap.MADV_HUGEPAGE)
        self._memory.write(bytes(len(self._memory)))
        self._random = random.Random(1)
        self._seconds, self._bytes = dict.fromkeys(DISK_THREADS, 0.0), dict.fromkeys(DISK_THREADS, 0)

    def measure(self) -> None:
        """A sample by one thread, and one by two."""
        for threads in DISK_THREADS:
            jobs = list(enumerate(self._random.sample(self._places, DISK_BLOCKS)))
            with ThreadPoolExecutor(threads) as pool:
                start = time.perf_counter()
                list(pool.map(self._read, [jobs[index::threads] for index in range(threads)]))
                self._seconds[threads] += time.perf_counter() - start
            self._bytes[threads] += DISK_BLOCKS * self.block

    def _read(self, jobs: list) -> None:
        for index, (file, place) in jobs:
            with memoryview(self._memory)[index * self.block : (index + 1) * self.block] as part:
                if os.preadv(file, [part], place) != self.block:
                    raise OSError("short read")

    @property
    def rates(self) -> dict[int, float]:
        """Bytes per second over all samples, by number of threads."""
        return {threads: self._bytes[threads] / self._seconds[threads] for threads in DISK_THREADS}


def shards(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors")) + sorted(folder.rglob("*.dat"))


def drop_from_page_cache(folder: Path) -> None:
    """What the page cache holds of the files, as far as no process has it mapped."""
    for file in shards(folder):
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def in_page_cache(folder: Path) -> int:
    """Bytes of the files that the page cache holds."""
    libc, held = ctypes.CDLL(None, use_errno=True), 0
    for file in shards(folder):
        with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY) as memory:
            view = (ctypes.c_char * len(memory)).from_buffer(memory)
            pages = (ctypes.c_ubyte * -(-len(memory) // PAGE))()
            if libc.mincore(ctypes.c_void_p(ctypes.addressof(view)), ctypes.c_size_t(len(memory)), pages):
                raise OSError(ctypes.get_errno(), "mincore")
            held += bytes(pages).count(1) * PAGE
            del view
    return held


def private_bytes() -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) * 1024


def load(folder: Path):
    import modeling_deepseek_moe  # noqa: F401 - registers

    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


class Decoding:
    """Given tokens, one after the other, whatever the model would say: every contestant routes the same."""

    def __init__(self, model, ids: list[int], prompt: int):
        self.model, self.ids, self.prompt = model, torch.tensor([ids]), prompt
        self.logits: list[torch.Tensor] = []
        self.seconds: list[float] = []  # of the prompt, then of every token

    @torch.no_grad()
    def steps(self):
        cache = transformers.DynamicCache(config=self.model.config)
        ends = [0, *range(self.prompt, self.ids.shape[1] + 1)]
        for start, end in itertools.pairwise(ends):
            before = time.perf_counter()
            logits = self.model(self.ids[:, start:end], **{CACHE_NAME: cache}, use_cache=True).logits[:, -1]
            self.seconds.append(time.perf_counter() - before)
            self.logits.append(logits)
            yield

    def run(self) -> "Decoding":
        for _ in self.steps():
            pass
        return self


def mapped(folder: Path, runs: list, logits: str) -> dict:
    """In memory: the page cache holds all files. Its logits are what the others' are compared with."""
    model = load(folder)
    model.set_expert_memory(None)
    found = [Decoding(model, *run).run() for run in runs]
    torch.save([run.logits for run in found], logits)
    again = Decoding(model, *runs[-1]).run()
    return {"decode_s": statistics.median(again.seconds[1:]), "in_page_cache": in_page_cache(folder)}


def streamed(folder: Path, runs: list, logits: str, budget: int, ahead: bool) -> dict:
    """Of the four ``runs`` the first fills the memory, the next two are one prompt, twice, and the last is timed.

    Between its tokens the disk is measured.
    """
    from modeling_deepseek_moe.streaming import layer

    if not ahead:
        layer.FEW_TOKENS = 0
    drop_from_page_cache(folder)
    model = load(folder)
    model.set_expert_memory(budget)
    wanted, rows, same = torch.load(logits), [], True
    experts = model.model.layers[-1].mlp.experts
    disk = Disk(folder, experts.num_mapped // experts.num_experts)
    for index, (ids, prompt) in enumerate(runs):
        run, timed = Decoding(model, ids, prompt), index == len(runs) - 1
        model.expert_stats(reset=True)
        for step, _ in enumerate(run.steps()):
            if timed and step == 0:
                model.expert_stats(reset=True)
            if timed and step % DISK_EVERY == 0:
                disk.measure()
        stats = model.expert_stats()
        same &= all(map(same_bits, run.logits, wanted[index]))
        seconds = sum(run.seconds[1:] if timed else run.seconds)
        properties = ("hit_rate", "read_bandwidth", "prefetch_accuracy")
        rows.append(
            {"seconds": seconds, "tokens_per_s": stats.tokens / seconds, "computing_s": seconds - stats.stall_seconds}
            | vars(stats)
            | {name: getattr(stats, name) for name in properties}
        )
    decode, rate = rows[-1], max(disk.rates.values())
    decode["read_over_missed"] = decode["bytes_read"] / max(decode["bytes_missed"], 1)
    decode["share_of_limit"] = decode["bytes_missed"] / rate / decode["seconds"]
    private, cached = private_bytes(), in_page_cache(folder)
    return {
        "budget": budget,
        "ahead": ahead,
        "bit_equal": same,
        "first": rows[1],
        "second": rows[2],
        "decode": decode,
        "disk_bytes_per_s": rate,
        "disk_by_threads": disk.rates,
        "private_bytes": private,
        "in_page_cache": cached,
        "memory_over_files": (private + cached) / sum(file.stat().st_size for file in shards(folder)),
    }


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def accelerate(folder: Path, ids: list[int], tokens: int, offload: str) -> dict:
    """Plain transformers, decoder layers on the disk, everything else in memory; as the checkpoint is, or its bf16 copy."""
    config = transformers.AutoConfig.from_pretrained(folder)
    places = {f"model.layers.{index}": "disk" for index in range(config.num_hidden_layers)}
    places |= dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    start = time.perf_counter()
    model = transformers.DeepseekV3ForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, device_map=places, offload_folder=offload
    ).eval()
    loaded = time.perf_counter() - start
    files, seconds, left = [folder, Path(offload)], [], []
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        for index in range(tokens + 1):
            for file in files:
                drop_from_page_cache(file)
            left.append(sum(map(in_page_cache, files)))
            start = time.perf_counter()
            model(torch.tensor([ids[index : index + 1]]), **{CACHE_NAME: cache}, use_cache=True)
            seconds.append(time.perf_counter() - start)
    offloaded = sum(file.stat().st_size for file in Path(offload).rglob("*") if file.is_file())
    median = statistics.median(seconds[1:])
    return {
        "load_s": loaded,
        "seconds": seconds,
        "median_token_s": median,
        "offloaded_bytes": offloaded,
        "left_in_page_cache": left,
    }


CONTESTANTS = {"mapped": mapped, "streamed": streamed, "accelerate": accelerate}

if __name__ == "__main__":
    main()
