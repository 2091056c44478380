"""What the CPU engine runs of a model while it decodes, and why not the rest: for a user to read."""

from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch

from modeling_deepseek_moe.compat import ModelMixin
from modeling_deepseek_moe.engine import reasons
from modeling_deepseek_moe.engine.plan import Stages, segments
from modeling_deepseek_moe.ops import _native
from modeling_deepseek_moe.ops._dispatch import AUTO, CPU, BackendError, requested


class EngineRow(NamedTuple):
    """One part of the model; ``reason`` is why the engine cannot run it, ``None`` where it does."""

    name: str
    reason: str | None


@dataclass(frozen=True)
class EngineReport:
    """Attention, output projection and experts of every layer, the norm, and the head.

    Attributes:
        rows: in the order of the computation.
        calls: into the engine, of the layers of one token.
        unavailable: why the engine runs nothing in this process, ``None`` where it can.
    """

    rows: tuple[EngineRow, ...]
    calls: int
    unavailable: str | None = None

    @property
    def runs_all(self) -> bool:
        """Whether a token meets nothing but the engine between its embedding and its logits."""
        return self.unavailable is None and all(row.reason is None for row in self.rows)

    def lines(self) -> list[tuple[str, str | None]]:
        """Names and reasons, layers that differ in nothing else in one line: ``layers.3-60.mlp``."""
        found: dict[tuple[str, str | None], list[int]] = {}
        for name, reason in self.rows:
            layer, _, part = name.partition(".")
            found.setdefault((part or layer, reason), []).append(int(layer) if part else -1)
        return [(_spanned(part, indices), reason) for (part, reason), indices in found.items()]

    def __str__(self) -> str:
        if self.unavailable is not None:
            return f"The CPU engine {self.unavailable}"
        lines = self.lines()
        width = max(len(name) for name, _ in lines)
        text = [f"{name:{width}}  {'native' if reason is None else reason}" for name, reason in lines]
        return "\n".join(
            (*text, f"{self.calls} call{'s' if self.calls != 1 else ''} of the engine for the layers of a token")
        )


class EngineReportMixin(ModelMixin):
    """`engine_report`. Mixed into the models before `PreTrainedModel`."""

    @torch.no_grad()
    def engine_report(self) -> EngineReport:
        """What the CPU engine runs of this model as it is now, adapters and hooks included, and why not the rest."""
        base = self.base_model
        dtype = base.embed_tokens.weight.dtype
        rows, flags = [], []
        for index, layer in enumerate(list(base.layers)[: base.config.num_hidden_layers]):
            stages = Stages.of(layer, dtype, base.config.hidden_size)
            flags += stages.native()
            rows.append(EngineRow(f"{index}.self_attn", stages.attention))
            rows.append(EngineRow(f"{index}.self_attn.o_proj", stages.output))
            rows.append(EngineRow(f"{index}.mlp", stages.mlp))
        norm = reasons.norm(base.norm, dtype, base.config.hidden_size)
        flags.append(norm is None)
        rows.append(EngineRow("norm", norm))
        head = getattr(self, "lm_head", None)
        if head is not None:
            rows.append(EngineRow("lm_head", reasons.linear(head, dtype)))
        calls = sum(runs for _, _, runs in segments(flags)) if any(flags[:-1]) else 0  # none for the norm alone
        return EngineReport(tuple(rows), calls, _unavailable(base.embed_tokens.weight.device))


def _unavailable(device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"needs a model on the CPU, found {device}"
    if requested().backend not in (AUTO, CPU):
        return f"is not asked for: the backend is {requested().backend!r}"
    try:
        return _native.unavailable_reason()
    except BackendError as error:
        return str(error)


def _spanned(part: str, indices: list[int]) -> str:
    """``layers.0,3-60.mlp`` of indices that ascend; the norm and the head have none."""
    if indices == [-1]:
        return part
    runs = []
    for _, run in groupby(enumerate(indices), key=lambda pair: pair[1] - pair[0]):
        run = [index for _, index in run]
        runs.append(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}")
    return f"layers.{','.join(runs)}.{part}"
