"""The projections that make latents, divided by what they read: each rank multiplies its columns, and the products are summed.

All heads share a latent, so it is whole on every rank; the weights that make it need not be. Their rows would divide them too,
but where weights are codes in blocks of 128 rows: ``kv_a_proj_with_mqa`` of V3 has 4.5 of these, and 56 of columns.
"""

import torch
from torch import distributed, nn
from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES
from transformers.distributed.tensor_parallel import MlaKvAProjParallel, RowwiseParallel
from transformers.distributed.utils import is_dtensor

from modeling_deepseek_moe.distributed.tables import KV_LATENT, LATENT


class LatentParallel(RowwiseParallel):
    """``rowwise_split_input``, which without gradients takes its columns of ``x`` by themselves: for each token of each layer."""

    def __init__(self):
        from torch.distributed.tensor import Replicate  # which not every build of torch has

        super().__init__(input_layouts=Replicate())

    def transform_inputs_pre_forward(self, module, args, kwargs, mesh):
        if torch.is_grad_enabled() or is_dtensor(args[0]):
            return super().transform_inputs_pre_forward(module, args, kwargs, mesh)
        tensor = mesh if mesh.ndim == 1 else mesh["tp"]
        width = -(
            -args[0].shape[-1] // tensor.size()
        )  # as torch divides what does not divide: the last ranks have less
        first = tensor.get_local_rank() * width
        return (args[0][..., first : first + width].contiguous(), *args[1:]), kwargs


class KvLatentParallel(LatentParallel):
    """As that, and as ``mla_kv_a_proj`` of the sum: of k_pe each rank has the gradients of its own heads alone."""

    def __init__(self):
        super().__init__()
        self.shared = MlaKvAProjParallel()

    def transform_output_post_forward(self, module, output, mesh):
        latent = super().transform_output_post_forward(module, output, mesh)
        return self.shared.transform_output_post_forward(module, latent, mesh)


if distributed.is_available():
    ALL_PARALLEL_STYLES.register(LATENT, LatentParallel())
    ALL_PARALLEL_STYLES.register(KV_LATENT, KvLatentParallel())


def tell_dims(model: nn.Module) -> None:
    """Give each layer that makes a latent the config, from which ``mla_kv_a_proj`` takes where k_pe begins."""
    for name, module in model.named_modules():
        if name.endswith("self_attn.kv_a_proj_with_mqa"):
            module.config = model.config
