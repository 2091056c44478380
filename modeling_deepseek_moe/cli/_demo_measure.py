"""What the demo measures about a model: perplexity, resident bytes, and decode speed next to other models."""

import math
import os
import statistics
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import DynamicCache, PreTrainedModel

from modeling_deepseek_moe import cgroups
from modeling_deepseek_moe.quantized.mapped import MappedExperts

PREFILL_TOKENS = 1024  # a prompt is read in pieces of this size


@torch.inference_mode()
def perplexity(model: PreTrainedModel, rows: dict[str, torch.Tensor], batch: int = 16) -> float:
    """exp of the mean surprise at the labels that are not -100, the sum taken in fp64.

    ``rows``: ``input_ids``, ``attention_mask`` and ``labels``, ``[N, S]`` each.
    """
    surprise, (ids, mask, labels) = 0.0, (rows[name] for name in ("input_ids", "attention_mask", "labels"))
    for part, seen, wanted in zip(ids.split(batch), mask.split(batch), labels.split(batch), strict=True):
        logits = model(input_ids=part, attention_mask=seen, use_cache=False).logits[:, :-1].float()
        surprise += F.cross_entropy(logits.flatten(0, 1), wanted[:, 1:].flatten(), reduction="sum").double().item()
    return math.exp(surprise / int((labels[:, 1:] != -100).sum()))


def fastest_threads(model: PreTrainedModel, rows: dict[str, torch.Tensor]) -> int:
    """As many threads as help to read ``rows`` right now: 1, 2, 4 … up to the cores, while more are not slower.

    A container may grant far less time than it shows cores, and threads that wait for each other then only cost.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    best, best_seconds, threads, cores = 1, math.inf, 1, cgroups.threads(cores)
    while threads <= cores:
        torch.set_num_threads(threads)
        perplexity(model, rows)  # starts the threads
        start = time.perf_counter()
        for _ in range(3):
            perplexity(model, rows)
        seconds = time.perf_counter() - start
        if seconds > 1.2 * best_seconds:  # neighbours make timings noisy: in doubt, more
            break
        best, best_seconds, threads = threads, seconds, threads * 2
    torch.set_num_threads(best)
    return best


@dataclass(frozen=True)
class ResidentBytes:
    """Bytes of a model's weights: ``mapped`` are pages of the checkpoint file, ``owned`` are tensors of its own."""

    owned: int
    mapped: int

    @property
    def total(self) -> int:
        return self.owned + self.mapped


def resident_bytes(model: PreTrainedModel) -> ResidentBytes:
    """Bytes of parameters, buffers that are saved, and experts that stay in their file."""
    owned = {tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}
    matrices = [
        matrix
        for module in model.modules()
        if isinstance(module, MappedExperts)
        for _, matrix in module.named_matrices()
    ]
    mapped = sum(matrix.codes.nbytes + matrix.scales.nbytes for matrix in matrices)
    return ResidentBytes(sum(owned.values()), mapped)


class _Decoder:
    """Greedy decoding of one model after a context that it has already read."""

    def __init__(self, model: PreTrainedModel, context_ids: torch.Tensor):
        self.model, self.cache = model, DynamicCache(config=model.config)
        for part in context_ids.split(PREFILL_TOKENS, dim=1):
            logits = model(input_ids=part, cache=self.cache, use_cache=True, logits_to_keep=1).logits
        self.token = logits.argmax(-1)
        self.seconds: list[float] = []

    def step(self) -> None:
        start = time.perf_counter()
        logits = self.model(input_ids=self.token, cache=self.cache, use_cache=True).logits
        self.token = logits.argmax(-1)
        self.seconds.append(time.perf_counter() - start)


@torch.inference_mode()
def decode_speeds(models: dict[str, PreTrainedModel], context_ids: torch.Tensor, tokens: int) -> dict[str, float]:
    """Tokens per second of greedy decoding after ``context_ids [1, S]``, the median of ``tokens`` single steps each.

    The models take turns token by token, so that whatever else the machine does meets all of them alike.
    """
    decoders = {name: _Decoder(model, context_ids) for name, model in models.items()}
    for step in range(tokens + 2):
        for decoder in decoders.values():
            decoder.step()
            if step < 2:
                decoder.seconds.clear()  # warm-up
    return {name: 1 / statistics.median(decoder.seconds) for name, decoder in decoders.items()}
