"""MTP decoding compared with plain decoding, at acceptances that are set: time per token, and from which acceptance on it pays.

    python benchmarks/mtp.py                            4 minutes on two cores, 4 GB of memory; 8 GB to write the model
    python benchmarks/mtp.py --model-folder FOLDER      the model written there, 3.9 GB, or found

The model of `cpu_e2e` with one MTP layer: random weights in FP8, whose own drafts are never right. So the text is set
beforehand, random tokens, and a draft says its next token with the probability that is asked for, after the MTP layer and its
head were computed as ever. Every contestant says the same text, and a step computes what it would in earnest.

    steps   one pass of the model over 1, 2, 3 and 4 tokens, and one of the MTP layer with its head over 1 and 2
    text    whole texts through `generate`: plain, `use_mtp=True`, `use_mtp="auto"`; times are of all tokens but the first

The break-even of the steps is the acceptance at which a pass over 2 tokens and a draft take as long as 1 + acceptance
passes over 1.
"""

import argparse
import contextlib
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import common
import torch
from cpu_e2e import CONFIG
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, DynamicCache, LogitsProcessor, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

import modeling_deepseek_moe as dsm
from modeling_deepseek_moe import parameter_breakdown
from modeling_deepseek_moe.compat import CACHE_NAME
from modeling_deepseek_moe.planning_drafts import Drafting, weigh_drafts

ACCEPTANCES = (0.6, 0.8, 0.9)
PROMPT = 128
CONTEXT = 128  # of the passes
WARM_UP = 12  # tokens
FEWER_ROUNDS = 2  # of drafting always, which takes longest and whose ratio is far from 1
PLAIN, ALWAYS, AUTO = "plain", "use_mtp=True", 'use_mtp="auto"'


class Script(LogitsProcessor):
    """Makes the model say a text, and its drafts say it with a probability.

    Args:
        text: ``[S]``, prompt included.
        acceptance: of a draft; the drafts of one `Script` are the same each time.
    """

    def __init__(self, model, text: torch.Tensor, acceptance: float):
        self.text, self.position = text, 0
        self.is_right = torch.rand(len(text), generator=torch.Generator().manual_seed(1)) < acceptance
        hook = model.model.mtp_layers[0].shared_head.head.register_forward_hook(self._draft)
        self.remove = hook.remove

    def _draft(self, _, args, logits: torch.Tensor) -> torch.Tensor:
        """After the token that was said last."""
        token = self.text[self.position + 1]
        return _says(token if self.is_right[self.position + 1] else (token + 1) % logits.shape[-1], logits)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.position = input_ids.shape[1]
        return _says(self.text[self.position], scores)


def _says(token: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    return torch.full_like(scores, -torch.inf).index_fill(-1, token[None], 0.0)


class Watch(BaseStreamer):
    """When tokens came, and whether other programs took the processor meanwhile."""

    def __init__(self):
        self.times: list[float] = []
        self._start = time.perf_counter()
        self._switches = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw

    def put(self, value: torch.Tensor) -> None:
        self.times += [time.perf_counter()] * (value.numel() if self.times else 1)

    def end(self) -> None:
        pass

    @property
    def is_disturbed(self) -> bool:
        switches = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw - self._switches
        return switches > common.QUIET_SWITCHES * (time.perf_counter() - self._start)

    @property
    def seconds_per_token(self) -> float:
        first, *_, last = self.times[1:]
        return (last - first) / (len(self.times) - 2)


class Written(NamedTuple):
    """One text. ``tokens_a_pass`` is of the model's, ``nan`` of plain decoding."""

    seconds_a_token: float
    tokens_a_pass: float
    is_disturbed: bool


def quiet(pairs: list[tuple[Written, Written]]) -> list[tuple[Written, Written]]:
    """Those of which neither was disturbed; all where these are fewer than two."""
    clean = [pair for pair in pairs if not any(written.is_disturbed for written in pair)]
    return clean if len(clean) > 1 else pairs


def load(folder: Path) -> torch.nn.Module:
    """The model, written there unless it is."""
    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = dsm.DeepseekV3ForCausalLM(dsm.DeepseekV3Config(**CONFIG | {"num_nextn_predict_layers": 1}))
        finally:
            torch.set_default_dtype(before)
        model.save_pretrained(folder, quantize="fp8")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()


@torch.no_grad()
def passes(model, rounds: int) -> list[dict]:
    """Of the model over few tokens, and of the MTP layer and its head."""
    cache = DynamicCache(config=model.config)
    model(torch.randint(0, CONFIG["vocab_size"], (1, CONTEXT)), **{CACHE_NAME: cache}, logits_to_keep=1)

    def read(tokens: int) -> None:
        model(torch.randint(0, CONFIG["vocab_size"], (1, tokens)), **{CACHE_NAME: cache})
        cache.crop(-tokens)

    def draft(tokens: int) -> None:
        hidden = torch.randn(1, tokens, CONFIG["hidden_size"], dtype=torch.bfloat16)
        model.mtp_logits(0, torch.randint(0, CONFIG["vocab_size"], (1, tokens)), hidden)

    contestants = {f"model, {tokens}": partial(read, tokens) for tokens in (1, 2, 3, 4)}
    contestants |= {f"MTP layer, {tokens}": partial(draft, tokens) for tokens in (1, 2)}
    times = common.interleave(contestants, rounds, warm_up=3)
    first = times["model, 1"].median
    return [
        {"pass": name, **timing.fields(), "times a token": timing.median / first} for name, timing in times.items()
    ]


def write_text(model, text: torch.Tensor, acceptance: float, use_mtp: bool | str) -> Written:
    """The text, as a contestant says it."""
    script, watch = Script(model, text, acceptance), Watch()
    try:
        model.generate(
            text[None, :PROMPT],
            attention_mask=torch.ones(1, PROMPT, dtype=torch.long),
            max_new_tokens=len(text) - PROMPT,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            logits_processor=LogitsProcessorList([script]),
            streamer=watch,
            **({"use_mtp": use_mtp} if use_mtp else {}),
        )
    finally:
        script.remove()
    tokens = model.draft_stats.tokens_per_pass if use_mtp else float("nan")
    return Written(watch.seconds_per_token, tokens, watch.is_disturbed)


def texts(model, tokens: int, rounds: int) -> list[dict]:
    """Contestants take turns; the ratio to plain decoding is the median of the rounds' own, disturbed ones left out."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(0, CONFIG["vocab_size"], (PROMPT + tokens,), generator=generator)
    contestants: dict[tuple[str, float | None], Callable] = {(PLAIN, None): partial(write_text, model, text, 0, False)}
    for acceptance in ACCEPTANCES:
        contestants[ALWAYS, acceptance] = partial(write_text, model, text, acceptance, True)
        contestants[AUTO, acceptance] = partial(write_text, model, text, acceptance, "auto")
    made: dict[tuple[str, float | None], list[tuple[Written, Written]]] = {key: [] for key in contestants}
    for way in (False, True):  # the first finds everything cold
        write_text(model, text[: PROMPT + WARM_UP], 0.9, way)
    for number in range(rounds):
        plain = contestants[PLAIN, None]()
        for key, run in contestants.items():
            if key[0] != ALWAYS or number < FEWER_ROUNDS:
                made[key].append((plain, plain if key[0] == PLAIN else run()))
    rows = []
    for (name, acceptance), found in made.items():
        counted = quiet(found)
        rows.append(
            {
                "contestant": name,
                "acceptance": acceptance,
                "ms a token": 1e3 * statistics.median(own.seconds_a_token for _, own in counted),
                "tokens a pass": found[-1][1].tokens_a_pass,
                "times plain": statistics.median(p.seconds_a_token / own.seconds_a_token for p, own in counted),
                "rounds": len(found),
                "counted": len(counted),
                "disturbed": sum(any(written.is_disturbed for written in pair) for pair in found),
            }
        )
    return rows


def break_even(found: list[dict]) -> float:
    """Of the passes: the draft reads what was accepted, one or two tokens."""
    times = {row["pass"]: row["times a token"] for row in found}
    one, more = times["MTP layer, 1"], times["MTP layer, 2"] - times["MTP layer, 1"]
    # verify + one + a · more = 1 + a
    return (times["model, 2"] + one - 1) / (1 - more)


def expected(model) -> Drafting:
    """What `plan` says, of bytes alone."""
    breakdown = parameter_breakdown(model.config)
    cache = breakdown.cache_bytes(CONTEXT)
    return weigh_drafts(breakdown, breakdown.weight_format, cache, 0.0, lambda read: read.nbytes)


def show(rows: list[dict], title: str) -> None:
    table = Table(title=title)
    for column in rows[0]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value or "") for value in row.values()))
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=256, help="of a text")
    parser.add_argument("--only", choices=("steps", "text"))
    parser.add_argument("--model-folder", type=Path)
    parser.add_argument("--name", default="mtp", help="of the result file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with contextlib.ExitStack() as stack:
        folder = options.model_folder or Path(stack.enter_context(tempfile.TemporaryDirectory())) / "model"
        model = load(folder)
        result: dict = {"config": model.config.to_dict() | {"dtype": "bfloat16"}}
        bytes_alone = expected(model)
        print(f"break-even by bytes: {bytes_alone.break_even}, cost of a step {bytes_alone.cost:.2f}")
        result["by_bytes"] = {"cost": bytes_alone.cost, "break_even": bytes_alone.break_even}
        if options.only != "text":
            result["steps"] = passes(model, 2 * options.rounds)
            result["break_even"] = break_even(result["steps"])
            show(result["steps"], f"Passes at {CONTEXT} cached tokens; break-even {result['break_even']:.2f}")
        if options.only != "steps":
            result["text"] = texts(model, options.tokens, options.rounds)
            show(result["text"], f"{options.tokens} tokens after {PROMPT}")
        print("written to", common.save(options.name, result))


if __name__ == "__main__":
    main()
