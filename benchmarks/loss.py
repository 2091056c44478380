"""The loss of the next token and its gradient: this package's, a few rows of logits at a time, compared with transformers' own.

    python benchmarks/loss.py [--tokens 1024] [--vocab 129280] [--rounds 5]

Times are taken in turns in one process. Memory is what the peak of a fresh process grows by from the moment that it has the
logits, as a multiple of theirs; the gradient, which is as large as they are, is part of it. ``of read`` is the share of the
bandwidth read in this run that three passes over the logits would take (read twice, the gradient written once).
"""

import argparse
import subprocess
import sys
from pathlib import Path

import common
import torch
from rich.console import Console
from rich.table import Table
from transformers.loss.loss_utils import ForCausalLMLoss

from modeling_deepseek_moe.cross_entropy import next_token_loss

LOSSES = {"transformers": ForCausalLMLoss, "this package": next_token_loss}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Case:
    def __init__(self, tokens: int, vocab_size: int, dtype: str):
        generator = torch.Generator().manual_seed(0)
        logits = torch.empty(1, tokens, vocab_size, dtype=DTYPES[dtype]).normal_(generator=generator)
        self.logits = logits.requires_grad_()
        self.labels = torch.randint(vocab_size, (1, tokens), generator=generator)

    def run(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss and its gradient."""
        self.logits.grad = None
        loss = LOSSES[name](logits=self.logits, labels=self.labels, vocab_size=self.logits.shape[-1])
        loss.backward()
        return loss.detach(), self.logits.grad


def peak() -> int:
    """The high-water mark of this process alone, in bytes (Linux): that of `resource` would begin with its parent's."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) * 1024


def memory(name: str, tokens: int, vocab_size: int, dtype: str) -> float:
    """As a multiple of the logits, measured in a process of its own."""
    command = [sys.executable, __file__, "--child", name, "--tokens", str(tokens), "--vocab", str(vocab_size)]
    found = subprocess.run([*command, "--dtype", dtype], capture_output=True, text=True, check=True)
    return float(found.stdout.split()[-1])


def measure(tokens: int, vocab_size: int, dtype: str, rounds: int) -> list[dict]:
    case = Case(tokens, vocab_size, dtype)
    losses, gradients = zip(*(case.run(name) for name in LOSSES), strict=True)
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*gradients, rtol=0.01, atol=1e-6)
    del gradients
    timings = common.interleave({name: (lambda name=name: case.run(name)) for name in LOSSES}, rounds)
    limit = 3 * case.logits.nbytes / common.read_bandwidth()
    return [
        {
            "dtype": dtype,
            "contestant": name,
            **timing.fields(),
            "ratio": timing.median / timings["transformers"].median,
            "of_read": limit / timing.median,
            "memory_over_logits": memory(name, tokens, vocab_size, dtype),
        }
        for name, timing in timings.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=129280, help="logits a token (default: DeepSeek-V3's)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help=argparse.SUPPRESS)
    parser.add_argument("--child", choices=LOSSES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        case = Case(given.tokens, given.vocab, given.dtype)
        before = peak()
        case.run(given.child)
        print((peak() - before) / case.logits.nbytes)
        return
    rows = [row for dtype in DTYPES for row in measure(given.tokens, given.vocab, dtype, given.rounds)]
    table = Table(title=f"loss and gradient, {given.tokens} tokens, {given.vocab} logits each")
    for name in ("", "contestant", "ms", "least", "spread", "ratio", "of read", "memory"):
        table.add_column(name, justify="left" if name in ("", "contestant") else "right")
    for row in rows:
        table.add_row(
            row["dtype"],
            row["contestant"],
            f"{row['ms']:.0f}",
            f"{row['min_ms']:.0f}",
            f"{row['spread']:.0%}",
            f"{row['ratio']:.2f}",
            f"{row['of_read']:.0%}",
            f"{row['memory_over_logits']:.1f} ×",
        )
    Console(width=100).print(table)
    print(f"written to {common.save('loss', {'tokens': given.tokens, 'vocab_size': given.vocab, 'rows': rows})}")


if __name__ == "__main__":
    main()
