"""Hidden states of a few tokens from the accelerator to the CPU and back: what crosses in place of weights.

On CUDA they leave on a stream of their own into pinned memory, so that work launched afterwards does not hold them up.
Legend: T tokens, K experts per token, D hidden size.
"""

from typing import NamedTuple

import torch


class Arrival(NamedTuple):
    """Hidden states, indices and weights on the CPU, once ``event`` is over (``None``: they are there)."""

    hidden_TD: torch.Tensor
    topk_indices: torch.Tensor
    topk_weights: torch.Tensor
    event: torch.cuda.Event | None

    def wait(self) -> "Arrival":
        if self.event is not None:
            self.event.synchronize()
        return self


class Crossing:
    """Both ways between ``device`` and the CPU, for all layers of a model: they run one after the other.

    Pinned memory is kept from call to call and grows with the tokens. Copies and pickles of it are ``None``.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.is_cuda = device.type == "cuda" and torch.cuda.is_available()
        self._stream = torch.cuda.Stream(device) if self.is_cuda else None
        self._pinned: dict[tuple[str, torch.dtype], torch.Tensor] = {}
        self._returned: torch.cuda.Event | None = None

    def leave(self, *tensors: torch.Tensor) -> Arrival:
        """Begin to copy hidden states, indices and weights to the CPU."""
        if self._stream is None:
            hidden_TD, indices, weights = (tensor.to("cpu") for tensor in tensors)
            return Arrival(hidden_TD, indices, weights, None)
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)  # nothing that is launched from here on is waited for
        arrived: list[torch.Tensor] = []
        with torch.cuda.stream(self._stream):
            for name, tensor in zip(Arrival._fields, tensors, strict=False):
                held = self._buffer(name, tensor)
                held.copy_(tensor, non_blocking=True)
                tensor.record_stream(self._stream)
                arrived.append(held)
            event = torch.cuda.Event()
            event.record(self._stream)
        return Arrival(arrived[0], arrived[1], arrived[2], event)

    def come_back(self, result_TD: torch.Tensor) -> torch.Tensor:
        """A result on the device, in its dtype; on CUDA the copy is only begun."""
        if self._stream is None:
            return result_TD.to(self.device)
        if self._returned is not None:
            self._returned.synchronize()  # the buffer is being read still
        held = self._buffer("result", result_TD)
        held.copy_(result_TD)
        result = held.to(self.device, non_blocking=True)
        self._returned = torch.cuda.Event()
        self._returned.record(torch.cuda.current_stream(self.device))
        return result

    def _buffer(self, name: str, like: torch.Tensor) -> torch.Tensor:
        held = self._pinned.get((name, like.dtype))
        if held is None or held.numel() < like.numel():
            held = torch.empty(like.numel(), dtype=like.dtype, device="cpu", pin_memory=True)
            self._pinned[name, like.dtype] = held
        return held[: like.numel()].view(like.shape)

    def __reduce__(self):
        return type(None), ()
