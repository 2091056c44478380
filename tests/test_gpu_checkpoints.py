"""What computes a layer on a card in training, and again for its gradients where it is checkpointed. No card: a tensor says that it is there."""

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from modeling_deepseek_moe.engine.runs import recomputable
from modeling_deepseek_moe.ops._dispatch import AUTO, REFERENCE, requested_backend


class OnCard(torch.Tensor):
    is_cuda = True


class Layer(GradientCheckpointingLayer):
    """Notes what it is computed by."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.codes = torch.nn.Parameter(torch.zeros(3).to(dtype), requires_grad=False)
        self.weight, self.backends = torch.nn.Parameter(torch.ones(3)), []

    def forward(self, x, **context):
        self.backends.append(requested_backend())
        return torch.tanh(x * self.weight)


RUNS = {"plain": None, "checkpointed": False, "reentrant": True}


@pytest.mark.parametrize("reentrant", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=["bf16", "fp8"])
@pytest.mark.parametrize("on_card", [True, False], ids=["card", "cpu"])
def test_a_layer_is_computed_again_by_the_same(on_card, dtype, reentrant):
    layer = Layer(dtype).train()
    if reentrant is not None:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=reentrant)
    own = layer.__dict__.get("_gradient_checkpointing_func")
    x = torch.randn(2, 3, requires_grad=True)
    recomputable(layer, x.as_subclass(OnCard) if on_card else x, training_pass=None).sum().backward()
    by_reference = dtype == torch.bfloat16 and (reentrant is True or not on_card)
    assert layer.backends[0] == (REFERENCE if by_reference else AUTO)
    assert len(layer.backends) == (1 if reentrant is None else 2)
    if on_card:  # on a CPU only plain torch has gradients, whichever is asked for
        assert len(set(layer.backends)) == 1
    assert layer.__dict__.get("_gradient_checkpointing_func") is own
    assert x.grad.abs().sum() > 0 and layer.weight.grad.abs().sum() > 0


def test_without_gradients_a_layer_in_training_is_plain_torch():
    layer = Layer(torch.bfloat16).train()
    with torch.no_grad():
        recomputable(layer, torch.randn(2, 3).as_subclass(OnCard))
    assert layer.backends == [REFERENCE]
