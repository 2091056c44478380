"""Will a model run on this machine, and how fast at best: from its config and the machine alone.

Decoding reads every active weight and the whole cache once per token, and does little else, so memory bandwidth
divided by the bytes read is a bound on tokens per second that no software passes (at batch 1, without speculation).
"""

from collections.abc import Iterator
from dataclasses import dataclass

from modeling_deepseek_moe.anatomy import ParameterBreakdown
from modeling_deepseek_moe.formats import FP8, WeightFormat
from modeling_deepseek_moe.machine import Machine
from modeling_deepseek_moe.ops import _native
from modeling_deepseek_moe.planning_drafts import ACCEPTANCE, Drafting, Read, weigh_drafts
from modeling_deepseek_moe.planning_sparse import LongContext, long_contexts

# What a process needs besides weights and cache: the interpreter with torch and transformers (0.5 GB resident), and
# the largest passing buffers (scores and expanded keys of a prefill chunk). An estimate on the safe side.
WORKSPACE_BYTES = 1_500_000_000
DISK_EXAMPLE = 2_000_000_000  # bytes per second, for a sense of scale: a common NVMe disk
# Of the bound, what decoding on a CPU reaches (benchmarks/results/cpu.json: 0.81 to 1.0 from 128 to 8,192 tokens) ...
MEMORY_EFFICIENCY = 0.85
# ... and what it reaches where experts come from a disk (benchmarks/results/stream-v3.json).
DISK_EFFICIENCY = 0.75
BUDGET_SHARES = (0.125, 0.25, 0.5, 0.75, 1.0)  # of the routed experts

IN_MEMORY, FROM_DISK, TOO_LARGE = "fits", "from disk", "does not fit"
_PLACES = {"cpu": "CPU", "cuda": "GPU"}


@dataclass(frozen=True)
class Option:
    """One way to hold the weights, on one device.

    ``needed_bytes`` is weights, cache at the context, and workspace; ``disk_bytes_per_token`` is what a token reads
    from disk on average when only part of the experts stays in memory, assuming uniform routing.
    ``tokens_per_second_limit`` is the bound that memory sets when everything is in it, ``tokens_per_second`` what is
    expected of one conversation; ``None`` where nothing was measured, and on GPUs.
    """

    device: str  # "cpu" or "cuda"
    weights: str  # a format's name, or "bf16"
    how: str
    weight_bytes: int
    needed_bytes: int
    available_bytes: int
    read_bytes_per_token: int
    disk_bytes_per_token: int
    tokens_per_second_limit: float | None
    verdict: str
    tokens_per_second: float | None = None


@dataclass(frozen=True)
class Budget:
    """What to expect of a quantised model on the CPU with so much memory for its routed experts.

    ``hit_share`` assumes uniform routing; routers prefer some experts, so real ones are higher.
    """

    expert_bytes: int
    memory_bytes: int  # in all: with everything that is no routed expert
    hit_share: float
    disk_bytes_per_token: int
    tokens_per_second: float | None


@dataclass(frozen=True)
class Plan:
    """Every option, the best first to last by what a user would try; ``advice`` says what to do."""

    context: int
    cache_bytes_per_token: int
    cache_bytes: int
    release_bytes: int
    machine: Machine
    options: tuple[Option, ...]
    advice: tuple[str, ...]
    disk_bytes_per_second: float = DISK_EXAMPLE
    budgets: tuple[Budget, ...] = ()  # of a model that does not fit
    drafting: Drafting | None = None  # with MTP layers, held as the first option that runs
    long_contexts: tuple[LongContext, ...] = ()  # with sparse attention, held so too

    @property
    def verdict(self) -> str:
        """The best verdict of all options."""
        verdicts = {option.verdict for option in self.options}
        return next(verdict for verdict in (IN_MEMORY, FROM_DISK, TOO_LARGE) if verdict in verdicts)


def make_plan(
    breakdown: ParameterBreakdown,
    machine: Machine,
    context: int,
    disk: float | None = None,
    acceptance: float = ACCEPTANCE,
) -> Plan:
    """Weigh every way to run a model of this breakdown on this machine with ``context`` tokens in the cache.

    Args:
        disk: bytes per second that a disk gives; `DISK_EXAMPLE` if no one knows.
        acceptance: the share of MTP drafts that are taken to be right.

    Raises:
        ValueError: ``context`` or ``disk`` is not positive, or ``acceptance`` no probability.
    """
    if context < 1:
        raise ValueError(f"context={context} must be at least 1")
    if disk is not None and disk <= 0:
        raise ValueError(f"disk speed {disk} must be above 0")
    disk = disk or DISK_EXAMPLE
    forms = (breakdown.weight_format, None) if breakdown.weight_format else (None, FP8)
    devices = (["cuda"] if machine.gpus else []) + ["cpu"]
    options = tuple(_option(breakdown, machine, context, device, form, disk) for device in devices for form in forms)
    return Plan(
        context=context,
        cache_bytes_per_token=breakdown.cache_bytes(),
        cache_bytes=breakdown.cache_bytes(context),
        release_bytes=breakdown.stored_bytes(breakdown.weight_format, breakdown.itemsize),
        machine=machine,
        options=options,
        advice=tuple(_advice(breakdown, options, machine)),
        disk_bytes_per_second=disk,
        budgets=tuple(_budgets(breakdown, machine, context, options, disk)),
        drafting=_drafting(breakdown, machine, context, options, disk, acceptance),
        long_contexts=_long_contexts(breakdown, machine, context, options, disk),
    )


def _long_contexts(
    breakdown: ParameterBreakdown, machine: Machine, context: int, options: tuple[Option, ...], disk: float
) -> tuple[LongContext, ...]:
    """Of the first option that runs, else of the first on the CPU, by the bandwidth of its memory."""
    on_cpu = [option for option in options if option.device == "cpu"]
    option = next((option for option in options if option.verdict != TOO_LARGE), on_cpu[0])
    weights = option.read_bytes_per_token - breakdown.cache_read_bytes(context)
    bandwidth = machine.gpu_bandwidth

    def seconds(read: int) -> float | None:
        if option.device == "cpu":
            return _seconds(read, machine, option.disk_bytes_per_token, disk)
        return None if bandwidth is None else read / bandwidth.bytes_per_second

    return long_contexts(breakdown, weights, seconds, breakdown.context)


def _drafting(
    breakdown: ParameterBreakdown,
    machine: Machine,
    context: int,
    options: tuple[Option, ...],
    disk: float,
    acceptance: float,
) -> Drafting | None:
    """Of the first option that runs."""
    option = next((option for option in options if option.verdict != TOO_LARGE), None)
    if option is None:
        return None
    forms = {form.name: form for form in (breakdown.weight_format, FP8) if form}
    form = forms.get(option.weights)
    routed = breakdown.active["routed experts"].nbytes(form)
    missing = option.disk_bytes_per_token / routed if routed else 0.0

    def seconds(read: Read) -> float:
        """In memory one for each byte: only a ratio is asked for."""
        taken = _seconds(read.nbytes, machine, read.missed, disk) if missing else None
        return read.nbytes if taken is None else taken

    return weigh_drafts(breakdown, form, breakdown.cache_read_bytes(context), missing, seconds, acceptance)


def _budgets(
    breakdown: ParameterBreakdown, machine: Machine, context: int, options: tuple[Option, ...], disk: float
) -> Iterator[Budget]:
    """What more memory would bring, beginning with what there is."""
    from_disk = [option for option in options if option.verdict == FROM_DISK]
    if not from_disk:
        return
    option, form = from_disk[0], breakdown.weight_format or FP8
    routed, active = (sizes["routed experts"].nbytes(form) for sizes in (breakdown.stored, breakdown.active))
    rest = option.needed_bytes - routed - breakdown.stored["mtp"].nbytes(form)
    room = option.available_bytes - rest
    for held in (room, *(int(share * routed) for share in BUDGET_SHARES if share * routed > room)):
        share = min(1.0, held / routed)
        missed = int(active * (1 - share))
        seconds = _seconds(option.read_bytes_per_token, machine, missed, disk)
        yield Budget(held, rest + held, share, missed, None if seconds is None else 1 / seconds)


def _seconds(read: int, machine: Machine, missed: int, disk: float) -> float | None:
    """Of one token: disk and memory are read at the same time, and the slower of them counts."""
    if machine.bandwidth is None:
        return None
    memory = read / machine.bandwidth.bytes_per_second / MEMORY_EFFICIENCY
    return max(memory, missed / disk / DISK_EFFICIENCY)


def _option(
    breakdown: ParameterBreakdown,
    machine: Machine,
    context: int,
    device: str,
    form: WeightFormat | None,
    disk_speed: float,
) -> Option:
    weights = form.name if form else "bf16"
    cache = breakdown.cache_bytes(context)
    stored, read = breakdown.stored_bytes(form), breakdown.active_bytes(form) + breakdown.cache_read_bytes(context)
    needed = stored + cache + WORKSPACE_BYTES
    available = machine.ram_available if device == "cpu" else sum(gpu.free_bytes for gpu in machine.gpus)
    verdict, disk = (IN_MEMORY if needed <= available else TOO_LARGE), 0
    if verdict == TOO_LARGE and device == "cpu" and form:
        # Mapped experts are read from their files as they are used; only the rest must stay in memory.
        routed = breakdown.stored["routed experts"].nbytes(form)
        mtp = breakdown.stored["mtp"].nbytes(form)
        room = available - (needed - routed - mtp)
        if room > 0:
            verdict = FROM_DISK
            missing = max(0.0, 1 - room / routed)
            disk = int(breakdown.active["routed experts"].nbytes(form) * missing)
    bandwidth = machine.bandwidth if device == "cpu" else machine.gpu_bandwidth
    limit = bandwidth.bytes_per_second / read if bandwidth else None
    how = _how(breakdown.weight_format is not None, device, form is not None)
    seconds = _seconds(read, machine, disk, disk_speed) if device == "cpu" and verdict != TOO_LARGE else None
    expected = None if seconds is None else 1 / seconds
    return Option(device, weights, how, stored, needed, available, read, disk, limit, verdict, expected)


def _how(released_quantized: bool, device: str, quantized: bool) -> str:
    if quantized:
        return ("mapped" if device == "cpu" else "as released") if released_quantized else "converted"
    return "dequantised" if released_quantized else "as released"


def _advice(breakdown: ParameterBreakdown, options: tuple[Option, ...], machine: Machine) -> Iterator[str]:
    fitting = [option for option in options if option.verdict == IN_MEMORY]
    from_disk = [option for option in options if option.verdict == FROM_DISK]
    if fitting:
        best = fitting[0]
        yield f"Run it on the {_PLACES[best.device]} with {best.weights} weights ({best.how})."
    elif from_disk:
        yield (
            f"It loads and runs, and most experts stay on disk: about {from_disk[0].disk_bytes_per_token / 1e9:.1f} GB "
            "are read per token. generate --stats tells what it came to."
        )
    if not fitting:
        least = min(options, key=lambda option: option.needed_bytes - option.available_bytes)
        yield (
            f"To hold all of it as {least.weights} on the {_PLACES[least.device]}, {least.needed_bytes / 1e9:,.1f} GB "
            f"are needed and {least.available_bytes / 1e9:,.1f} GB available."
        )
        if least.device == "cpu" and least.needed_bytes <= machine.ram_bytes:
            yield "This machine has that much memory: end other programs and it fits."
    if breakdown.weight_format is None and FP8.name in {option.weights for option in (fitting or from_disk)[:1]}:
        yield "FP8 needs a conversion first: model.save_pretrained(folder, quantize='fp8'), where bf16 fits."
    if breakdown.fp8_latents and fitting[:1] + from_disk[:1] and (fitting or from_disk)[0].device == "cpu":
        yield "A CPU decodes the whole FP8 cache for each token, which is not in its tokens/s: it saves memory there, not time."
    reason = _native.missing()
    if reason is not None and any(
        option.device == "cpu" and option.weights != "bf16" and option.verdict != TOO_LARGE for option in options
    ):
        yield (
            f"The CPU engine {reason}. Until then FP8 is computed by the reference path, which dequantises as it goes "
            "and is tens of times slower"
            + ("; --dequantize runs it in bf16." if _fits_in_bf16(breakdown, options) else ".")
        )


def _fits_in_bf16(breakdown: ParameterBreakdown, options: tuple[Option, ...]) -> bool:
    return breakdown.weight_format is not None and any(
        option.weights == "bf16" and option.verdict == IN_MEMORY for option in options
    )
