"""Whether a model can be divided as a `DistributedConfig` asks: said before a weight is read, with the sizes that can."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from torch import nn
from transformers.distributed import DistributedConfig
from transformers.utils import logging

from modeling_deepseek_moe.distributed.tables import KV_LATENT, LATENT
from modeling_deepseek_moe.quantized.bitsandbytes_experts import BitsAndBytesMatrices
from modeling_deepseek_moe.quantized.experts import QuantizedExperts
from modeling_deepseek_moe.quantized.linear import QuantizedLinear

logger = logging.get_logger(__name__)

COLUMNS = ("colwise", "colwise_gather_output", "colwise_rep")
ROWS = ("rowwise", "rowwise_rep", "rowwise_split_input", LATENT, KV_LATENT)
MOST_RANKS = 1024
EXPERTS = "mlp.experts"
WITHOUT_BLOCKS = ", or experts alone (enable_expert_parallel=True), or weights without blocks (FP8: FineGrainedFP8Config(dequantize=True))"
# Modules that need not be divided, and are together or not at all, by what their names in a plan end with.
OPTIONAL = (
    ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    tuple(f"mlp.shared_experts.{name}" for name in ("gate_proj", "up_proj", "down_proj")),
    ("self_attn.q_a_proj",),
    ("self_attn.kv_a_proj_with_mqa",),
)


class Whole(NamedTuple):
    """Something that a number of ranks divides only if each gets whole units of ``unit`` values."""

    name: str
    values: int
    unit: int = 1

    def divides(self, ranks: int) -> bool:
        return ranks == 1 or self.values % (self.unit * ranks) == 0

    def __str__(self) -> str:
        in_blocks = "" if self.unit == 1 else f" in blocks of {self.unit}"
        return f"{self.name}={self.values}{in_blocks}"


def check(field: str, ranks: int, wholes: Iterable[Whole]) -> None:
    """Blocks are of codes, which other ways of loading do without.

    Raises:
        ValueError: ``ranks`` do not divide one of them; the nearest numbers that divide all are named.
    """
    wholes = list(wholes)
    wrong = [str(whole) for whole in wholes if not whole.divides(ranks)]
    if not wrong:
        return
    fits = [n for n in range(1, MOST_RANKS + 1) if all(whole.divides(n) for whole in wholes)]
    nearest = [max(n for n in fits if n < ranks), *[n for n in fits if n > ranks][:1]]
    raise ValueError(
        f"{field}: found {ranks}, which does not divide {', '.join(dict.fromkeys(wrong))}; "
        f"wanted {' or '.join(map(str, nearest))}, the nearest that {'do' if nearest[1:] else 'does'}"
        + (WITHOUT_BLOCKS if any(whole.unit > 1 and not whole.divides(ranks) for whole in wholes) else "")
    )


def check_model(model: nn.Module, plan: dict[str, str], asked: DistributedConfig) -> None:
    """Look over an empty model, whose layers are of the kinds that will be loaded.

    Args:
        plan: of tensor parallelism, names with ``*`` → styles; what cannot be divided and need not be is taken out.

    Raises:
        ValueError: the ranks do not divide heads, experts or blocks; a layer that bitsandbytes quantised is in the plan.
    """
    config, tp_size, ep_size = model.config, asked.tp_size, asked.ep_size
    experts = [module for module in model.modules() if isinstance(module, QuantizedExperts)]
    divides_experts = ep_size > 1 or (tp_size > 1 and any(name.endswith(EXPERTS) for name in plan))
    _refuse_guests(model, plan if tp_size > 1 else {}, divides_experts, asked.fsdp_size > 1)
    if ep_size > 1:
        check("ep_size", ep_size, [Whole("n_routed_experts", config.n_routed_experts or 1)])
    if tp_size == 1:
        return
    wholes = []
    if ep_size == 1 and config.n_routed_experts and any(name.endswith(EXPERTS) for name in plan):
        whole = ("n_routed_experts", config.n_routed_experts)
        wholes.append(Whole(*whole if experts else ("moe_intermediate_size", config.moe_intermediate_size)))
    if any(name.endswith("self_attn.o_proj") and style in ROWS for name, style in plan.items()):
        wholes.append(Whole("num_attention_heads", config.num_attention_heads))
    blocks = list(_blocks(model, plan))
    ragged = [
        group
        for group in OPTIONAL
        if not all(whole.divides(tp_size) for name, whole in blocks if name.endswith(group))
    ]
    left = tuple(name for group in ragged for name in group)
    check("tp_size", tp_size, [*wholes, *(whole for name, whole in blocks if not name.endswith(left))])
    if left:
        _leave_whole(plan, left, tp_size)


def _blocks(model: nn.Module, plan: dict[str, str]) -> Iterator[tuple[str, Whole]]:
    """Of each kind of layer that the plan divides and whose weights are codes, the side that is divided."""
    seen = set()
    for name, module in model.named_modules():
        key = wildcard(name)
        if key in seen or key not in plan or not isinstance(module, QuantizedLinear):
            continue
        seen.add(key)
        rows, columns = module.weight_format.block
        if plan[key] in COLUMNS:
            yield key, Whole(f"{key}: out_features", module.out_features, rows)
        elif plan[key] in ROWS:
            yield key, Whole(f"{key}: in_features", module.in_features, columns)


def _leave_whole(plan: dict[str, str], group: tuple[str, ...], ranks: int) -> None:
    left = [name for name in plan if name.endswith(group)]
    for name in left:
        style = plan.pop(name)
        if style == KV_LATENT:
            plan[name] = "mla_kv_a_proj"  # whole, its gradients summed
    if left:
        logger.warning(
            f"tp_size={ranks} does not divide the codes of {', '.join(left)} between blocks: every rank holds these whole."
        )


def _refuse_guests(model: nn.Module, plan: dict[str, str], divides_experts: bool, is_sharded: bool) -> None:
    for name, module in model.named_modules():
        kind = type(module)
        is_layer = kind.__module__.partition(".")[0] == "bitsandbytes"
        is_guest = is_layer or isinstance(module, BitsAndBytesMatrices)
        if is_guest and is_sharded:
            raise ValueError(
                f"fsdp_size: {name}: found {kind.__name__}, whose weights bitsandbytes quantises and no rank holds a part of; wanted "
                "floating-point, FP8 or INT4 ones, or ranks that have them whole: DDP, without a distributed_config"
            )
        if (is_layer and wildcard(name) in plan) or (divides_experts and isinstance(module, BitsAndBytesMatrices)):
            raise ValueError(
                f"tp_size, ep_size: {name}: found {kind.__name__}, whose weights bitsandbytes quantises and no rank holds a part "
                "of; wanted floating-point, FP8 or INT4 ones: `deepseek-moe convert to-4bit` writes a folder that divides"
            )


def wildcard(name: str) -> str:
    """A module's name as plans have it: numbers as ``*``."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
