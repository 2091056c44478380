"""`load_state_dict` on files that were saved: `Trainer` resumes, and loads the best model, with it.

Experts lie one by one in the files and stacked in the model; and where a rank holds a part of a parameter (FSDP2, expert parallelism), that
part is taken from the whole tensor of the file.
"""

import torch
from torch import nn

from modeling_deepseek_moe.compat import ModelMixin
from modeling_deepseek_moe.distributed.boxes import Box, local_boxes
from modeling_deepseek_moe.moe.experts import DeepseekExperts
from modeling_deepseek_moe.weights import stack_boxes


class ResumingMixin(ModelMixin):
    """`load_state_dict` of whole tensors into a sharded model. Mixed into the models before `PreTrainedModel`."""

    def post_init(self) -> None:
        super().post_init()
        self.register_load_state_dict_pre_hook(accept_whole_tensors)


def accept_release_keys(module: DeepseekExperts, state_dict: dict, prefix: str, *_) -> None:
    """A `load_state_dict` pre-hook: experts stored one by one, as saved, are copied into the stacks.

    Shards may each hold some of the experts.
    """
    if not prefix.endswith(".mlp.experts."):
        return  # within an adapter's wrapper, whose files hold the adapter alone
    for stack, parameter in module.named_parameters(recurse=False):
        sources = [(name, Box(*box)) for name, *box in stack_boxes(prefix + stack, tuple(parameter.shape))]
        present = [source for source in sources if source[0] in state_dict]
        for name, box in present:
            _fill(parameter.detach(), box, state_dict.pop(name))
        if present and len(present) == len(sources):
            state_dict[prefix + stack] = parameter.detach()


def accept_whole_tensors(module: nn.Module, state_dict: dict, prefix: str, *_) -> None:
    """A `load_state_dict` pre-hook: of a whole tensor each rank takes the part of the parameter that it holds."""
    for name, parameter in module.named_parameters():
        whole = state_dict.get(prefix + name)
        boxes = local_boxes(parameter)
        if boxes is None or whole is None or local_boxes(whole) is not None or whole.shape != parameter.shape:
            continue
        _fill(parameter.detach(), Box((0,) * whole.ndim, tuple(whole.shape)), whole)
        state_dict[prefix + name] = parameter.detach()


def _fill(parameter: torch.Tensor, box: Box, values: torch.Tensor) -> None:
    """Copy a box of a parameter, as far as this rank holds it."""
    values = values.reshape(box.sizes)
    boxes = local_boxes(parameter)
    if boxes is None:
        whole = Box((0,) * parameter.ndim, tuple(parameter.shape))
        parameter[box.within(whole)] = values.to(parameter)
        return
    for held in boxes:
        common = held.meet(box)
        if common is not None:
            local = getattr(parameter, "to_local")()  # noqa: B009 - of a DTensor, which not every build of torch has
            local[common.within(held)] = values[common.within(box)].to(local)
