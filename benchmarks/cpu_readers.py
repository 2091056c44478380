"""What memory gives at best, and rows of figures that compare with it."""

from collections.abc import Callable, Iterator

import common
import torch
from common import Timing

from modeling_deepseek_moe.ops import _native, block_fp8
from modeling_deepseek_moe.ops.linear import linear
from modeling_deepseek_moe.streaming.memory import Memory

LEAST = 256 << 20  # bytes
BYTE = 0x3C  # read as FP8, bf16 and fp32 alike, a small number
COLUMNS = 4096


class Readers:
    """Several ways to read a buffer beyond the caches, as contestants of every round.

    Args:
        in_huge_pages: as files are mapped; else in those that torch's own memory has, which give up to a third less.
    """

    def __init__(self, in_huge_pages: bool = False):
        self.nbytes = common.beyond_caches(LEAST)
        shape, dtype = (self.nbytes,), torch.uint8
        data = Memory(self.nbytes).tensor(0, shape, dtype) if in_huge_pages else torch.empty(shape, dtype=dtype)
        data.fill_(BYTE)  # untouched pages are all one page, which stays in the cache
        words, floats = data.view(torch.int64), data.view(torch.float32).view(-1, COLUMNS)
        vector, x = torch.ones(COLUMNS), torch.ones(1, COLUMNS, dtype=torch.bfloat16)
        self.contestants: dict[str, Callable[[], object]] = {
            "read: torch sum": words.sum,
            "read: torch fp32 rows": lambda: torch.mv(floats, vector),
        }
        if _native.unavailable_reason() is None:
            rows, codes = data.view(torch.bfloat16).view(-1, COLUMNS), data.view(torch.float8_e4m3fn).view(-1, COLUMNS)
            scales = torch.ones(block_fp8.scale_shape(codes.shape))
            self.contestants["read: engine bf16 rows"] = lambda: linear(x, rows)
            self.contestants["read: engine FP8 rows"] = lambda: block_fp8.linear(x, codes, scales)

    def bandwidth(self, times: dict[str, Timing]) -> float:
        """Bytes/s of the best reader in these rounds, by its median."""
        return self.nbytes / min(times[name].median for name in self.contestants)

    def rows(self, case: dict, times: dict[str, Timing]) -> Iterator[dict]:
        for name in self.contestants:
            yield row({**case, "case": "read"}, name, times[name], self.nbytes, self.bandwidth(times))


def row(case: dict, name: str, timing: Timing, nbytes: float = 0, bandwidth: float = 0, flops: float = 0) -> dict:
    """One line of a table: time, and bytes/s or FLOP/s where ``nbytes`` or ``flops`` are given."""
    fields = {**case, "contestant": name, **timing.fields()}
    if nbytes:
        fields |= {"bytes": int(nbytes), "gb_s": nbytes / timing.median / 1e9}
    if nbytes and bandwidth:
        fields["share_of_read"] = nbytes / timing.median / bandwidth
    if flops:
        fields["gflop_s"] = flops / timing.median / 1e9
    return fields


def race(
    contestants: dict[str, Callable[[], object]], rounds: int, readers: Readers | None
) -> tuple[dict[str, Timing], float]:
    """Times of contestants and readers taking turns, and the read bandwidth meanwhile (0 without readers)."""
    times = common.interleave((readers.contestants if readers else {}) | contestants, rounds, warm_up=2)
    return times, readers.bandwidth(times) if readers else 0.0


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of the exact result."""
    return ((found.double() - exact).norm() / exact.norm()).item()
