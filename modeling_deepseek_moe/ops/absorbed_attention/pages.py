"""Where the latents of several requests lie, one token after another in no order."""

from typing import NamedTuple

import torch


class Pages(NamedTuple):
    """A row of latents [c_kv; k_pe] is kept in two halves, which end in padding if r + p is odd.

    Attributes:
        first, second: ``[S, ⌈(r+p)/2⌉]``, any stride over S: the halves of every row that there is.
        rows: ``[K]`` int64, the rows of all requests' tokens, one request after the other.
        starts: ``[B+1]`` int32, where each request begins in ``rows``, and the end.
        longest: no request has more tokens.
    """

    first: torch.Tensor
    second: torch.Tensor
    rows: torch.Tensor
    starts: torch.Tensor
    longest: int
