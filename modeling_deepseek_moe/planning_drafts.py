"""Whether MTP decoding pays: the bytes of a step that drafts and verifies, compared with those of a plain token.

Reckoned as in `decoding.expected`, of a release that need not be there. It pays where the tokens that a step makes are more
than what it costs, in tokens' time.
"""

from collections.abc import Callable
from dataclasses import dataclass

from modeling_deepseek_moe.anatomy import ParameterBreakdown
from modeling_deepseek_moe.decoding.expected import ACCEPTANCE, different, tokens_per_step
from modeling_deepseek_moe.formats import WeightFormat

_HALVINGS = 40


@dataclass(frozen=True)
class Drafting:
    """What a step of MTP decoding costs and gives, next to a plain token.

    ``cost`` is a step's time over a plain token's, ``speedup`` is ``tokens_per_step / cost``, and ``break_even`` the
    acceptance from which on it is above 1; ``None`` where no acceptance is enough.
    """

    drafts: int
    acceptance: float
    plain_bytes: int
    verify_bytes: int  # of the model, for all tokens of a step
    draft_bytes: int  # of the MTP layers
    tokens_per_step: float
    cost: float
    speedup: float
    break_even: float | None

    @property
    def pays(self) -> bool:
        return self.speedup > 1


@dataclass(frozen=True)
class Read:
    """Bytes of a step from memory, ``missed`` of which come from a disk."""

    nbytes: int
    missed: int = 0


def experts_read(breakdown: ParameterBreakdown, tokens: float) -> float:
    """Different experts of a layer that ``tokens`` tokens choose, over those that one does."""
    chosen, count = breakdown.experts
    return different(chosen, count, tokens)


def weigh_drafts(
    breakdown: ParameterBreakdown,
    weight_format: WeightFormat | None,
    cache_bytes: int,
    missing: float,
    seconds: Callable[[Read], float],
    acceptance: float = ACCEPTANCE,
) -> Drafting | None:
    """The figures of one draft by each MTP layer; ``None`` for a model without any.

    Args:
        cache_bytes: that a step reads.
        missing: the share of the routed experts that lies on a disk.
        seconds: that a step takes for what it reads.

    Raises:
        ValueError: ``acceptance`` is no probability.
    """
    if not 0 <= acceptance <= 1:
        raise ValueError(f"acceptance={acceptance} must be between 0 and 1")
    drafts = breakdown.mtp_layers
    if not drafts:
        return None
    plain, verify = (_model_step(breakdown, weight_format, cache_bytes, missing, n) for n in (1, drafts + 1))
    draft = _draft_step(breakdown, weight_format, missing)
    cost = seconds(Read(verify.nbytes + draft.nbytes, verify.missed + draft.missed)) / seconds(plain)
    made = tokens_per_step(acceptance, drafts)
    return Drafting(
        *(drafts, acceptance, plain.nbytes, verify.nbytes, draft.nbytes, made, cost, made / cost),
        _break_even(cost, drafts),
    )


def _model_step(
    breakdown: ParameterBreakdown, weight_format: WeightFormat | None, cache_bytes: int, missing: float, tokens: int
) -> Read:
    routed = breakdown.active["routed experts"].nbytes(weight_format)
    read = int(routed * experts_read(breakdown, tokens))
    return Read(breakdown.active_bytes(weight_format) - routed + read + cache_bytes, int(read * missing))


def _draft_step(breakdown: ParameterBreakdown, weight_format: WeightFormat | None, missing: float) -> Read:
    """Every MTP layer once, with the experts of all tokens that a step can make: each leaves its latents there."""
    chosen, count = breakdown.experts
    routed = breakdown.mtp_routed.nbytes(weight_format)
    rest = breakdown.stored["mtp"].nbytes(weight_format) - routed - breakdown.mtp_embedding.nbytes(weight_format)
    read = int(routed * chosen / count * experts_read(breakdown, breakdown.mtp_layers + 1)) if count else 0
    return Read(rest + read, int(read * missing))


def _break_even(cost: float, drafts: int) -> float | None:
    if tokens_per_step(1.0, drafts) <= cost:
        return None
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if tokens_per_step(middle, drafts) > cost else (middle, high)
    return high
