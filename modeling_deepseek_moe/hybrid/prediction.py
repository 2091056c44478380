"""How fast a model will be whose experts do not fit the accelerator: from its config and bandwidths alone.

A token's experts are read where they lie, on both sides at once, and the slower side counts; everything else is read on the
accelerator, before or after. Hidden states cross twice a layer.
"""

from dataclasses import dataclass

from modeling_deepseek_moe.anatomy import ParameterBreakdown
from modeling_deepseek_moe.config import DeepseekMoeConfig
from modeling_deepseek_moe.formats import FP8
from modeling_deepseek_moe.hybrid.placement import DEVICE_WORKSPACE
from modeling_deepseek_moe.planning import MEMORY_EFFICIENCY

GPU_EXAMPLE, LINK_EXAMPLE = 900e9, 25e9  # bytes per second: a consumer card, and 16 lanes of PCIe 4
CROSSING_SECONDS = 30e-6  # of a layer: both ways, with the waits for them. An assumption
SHARES = (0.0, 0.1, 0.25, 0.5)  # of the experts, in the accelerator's memory


@dataclass(frozen=True)
class Given:
    """Of the machine: the accelerator's memory in bytes, and bytes per second that each memory and the link give."""

    gpu_bytes: int
    cpu_bandwidth: float
    gpu_bandwidth: float = GPU_EXAMPLE
    link_bandwidth: float = LINK_EXAMPLE


@dataclass(frozen=True)
class Split:
    """One way to split the experts. Seconds are those of one token; ``held_share`` assumes uniform routing."""

    held_share: float
    gpu_bytes: int  # with cache and workspace
    cpu_bytes: int
    gpu_seconds: float
    cpu_seconds: float
    link_seconds: float
    tokens_per_second: float


def predict(breakdown: ParameterBreakdown, config: DeepseekMoeConfig, context: int, given: Given) -> tuple[Split, ...]:
    """Splits that the accelerator has room for, the last with as many experts there as fit; none where the rest does not fit.

    Raises:
        ValueError: a size or a bandwidth is not positive.
    """
    for name, value in vars(given).items():
        if value <= 0:
            raise ValueError(f"{name}: found {value}, wanted more than 0")
    form = breakdown.weight_format or FP8
    experts, active = (sizes["routed experts"].nbytes(form) for sizes in (breakdown.stored, breakdown.active))
    cache = breakdown.cache_bytes(context)
    rest = breakdown.stored_bytes(form) - experts - breakdown.stored["mtp"].nbytes(form) + cache + DEVICE_WORKSPACE
    read = breakdown.active_bytes(form) - active + breakdown.cache_read_bytes(context)
    room = given.gpu_bytes - rest
    if room < 0 or not experts:
        return ()
    layers = sum(config.is_moe_layer(layer) for layer in range(config.num_hidden_layers))
    most = min(1.0, room / experts)

    def split(share: float) -> Split:
        on_gpu = active * share / given.gpu_bandwidth / MEMORY_EFFICIENCY
        on_cpu = active * (1 - share) / given.cpu_bandwidth / MEMORY_EFFICIENCY
        crossed = layers * (2 * 2 * config.hidden_size / given.link_bandwidth + CROSSING_SECONDS) if share < 1 else 0.0
        before = read / given.gpu_bandwidth / MEMORY_EFFICIENCY
        held = int(experts * share)
        times = before + on_gpu, on_cpu, crossed
        seconds = before + max(on_gpu, on_cpu) + crossed
        return Split(share, rest + held, experts - held, *times, 1 / seconds)

    return tuple(split(share) for share in (*(share for share in SHARES if share < most), most))
