"""Layers whose weights are codes, divided among ranks: linear layers between blocks, routed experts one by one.

A block has one scale, so an expert's width divides between ranks only where it is a whole number of blocks for each; its
experts always divide. So each rank holds (or maps, in its files) some of the experts whole, on the CPU as on a card, and
what it adds for its tokens is summed over the ranks.
"""

from torch import nn
from transformers.distributed.expert_parallel import EpDispatchExpertsParallel
from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES

from modeling_deepseek_moe.distributed.checks import wildcard
from modeling_deepseek_moe.moe.experts import DeepseekExperts
from modeling_deepseek_moe.quantized.experts import QuantizedExperts
from modeling_deepseek_moe.quantized.linear import QuantizedLinear
from modeling_deepseek_moe.quantized.mapped import MappedExperts

WHOLE_EXPERTS = "deepseek_moe_whole_experts"


class WholeExperts(EpDispatchExpertsParallel):
    """Whole experts per rank of a tensor-parallel group, whose ranks share one batch."""

    def install_forward(self, module, ep_mesh, *, tp_mesh=None, ep_implementation="auto"):
        return super().install_forward(
            module, ep_mesh, tp_mesh=tp_mesh or ep_mesh, ep_implementation=ep_implementation
        )


ALL_PARALLEL_STYLES.register(WHOLE_EXPERTS, WholeExperts())


def are_coded(model: nn.Module) -> bool:
    """Whether routed experts of a model are codes."""
    return any(isinstance(module, QuantizedExperts) for module in model.modules())


def divide_linears(model: nn.Module) -> None:
    """Let transformers' styles call quantised layers with their own rank's codes and scales, as plain tensors."""
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module._hf_quantized_needs_local_tp = True


def expert_plan(model: nn.Module, style: str) -> dict[str, str]:
    """Rules that divide the experts of a model one by one, whatever tensors they are made of."""
    plan = {}
    for name, module in model.named_modules():
        if not isinstance(module, QuantizedExperts | DeepseekExperts):
            continue
        key = wildcard(name)
        for parameter, stack in module.named_parameters(recurse=False):
            if stack.ndim > 1 and stack.shape[0] == model.config.n_routed_experts:
                plan[f"{key}.{parameter}"] = "grouped_gemm"
        plan[key] = style
    return plan


def keep_own_experts(model: nn.Module, rank: int, ranks: int) -> None:
    """Mapped experts are no parameters that transformers could divide: this rank's are kept."""
    for module in model.modules():
        if isinstance(module, MappedExperts):
            count = module.num_experts // ranks
            module.keep(rank * count, count)
