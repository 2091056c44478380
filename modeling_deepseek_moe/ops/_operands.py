"""Layers as operands: what an operation may know of a module without calling it.

An operation that multiplies with a layer's weight is handed the layer, since only that knows what is attached to its call:
an adapter, a quantiser, a hook. Where nothing is, its weight may be read in place of the call.
"""

from typing import NamedTuple

import torch
from torch import nn

from modeling_deepseek_moe.bnb.packing import is_packed
from modeling_deepseek_moe.ops._hooks import differs_by_row, every_module_is_hooked, is_hooked
from modeling_deepseek_moe.ops._library import PLAIN, PLAIN_OR_FAKE
from modeling_deepseek_moe.ops._lora import add_to, base_of, pair_of
from modeling_deepseek_moe.ops._lora import unsupported_reason as unsupported_lora
from modeling_deepseek_moe.ops._structs import NESTED, Matrix
from modeling_deepseek_moe.ops.four_bit import cpu as four_bit
from modeling_deepseek_moe.ops.four_bit.reference import KINDS, NESTED_GROUP, NestedScales

KERNEL = "block_fp8"  # a format's, see `formats.WeightFormat`
BLOCK = (128, 128)  # of FP8 weights: the engine's, and the release's
KEPT = "_kept_weight"  # where a layer carries what it was dequantised to


def is_linear(layer: nn.Module) -> bool:
    """Whether calling the layer multiplies with its weight, adds its bias, and does nothing else."""
    return is_plain(layer) or (is_quantized(layer) and not is_hooked(layer) and not every_module_is_hooked())


def is_plain(layer: nn.Module) -> bool:
    """Whether it is ``torch.nn.Linear`` itself, with a weight of torch's own and nothing attached to its call."""
    # a quantiser, or sharding, may leave the class and replace the weight by a tensor subclass of its own
    if type(layer) is not nn.Linear or type(layer._parameters.get("weight")) not in PLAIN_OR_FAKE:
        return False
    return not is_hooked(layer) and not every_module_is_hooked()


def is_quantized(layer: nn.Module) -> bool:
    """Whether it is this package's `QuantizedLinear`, which is defined further up."""
    return isinstance(layer, nn.Linear) and "weight_format" in layer.__dict__ and hasattr(layer, "dequantized")


class Operand(NamedTuple):
    """A layer's weight ``[N, K]`` as it lies in memory.

    ``kind``: of codes of four bits, one of `_structs.FOUR_BIT`; ``None`` for any other weight. ``scales``: ``None`` where
    there are none.
    """

    kind: str | None
    codes: torch.Tensor
    scales: torch.Tensor | NestedScales | None

    def matrix(self) -> tuple[Matrix, object]:
        """It for C, and what has to live as long."""
        if self.kind is not None:
            return four_bit.matrix("linear", self.kind.removesuffix(NESTED), self.codes, self.scales)
        assert not isinstance(self.scales, NestedScales)  # which codes of four bits alone have
        return Matrix.of(self.codes, self.scales), self


def operand_of(layer: nn.Module) -> Operand:
    """Of a layer that `unsupported_linear` has no reason against."""
    if is_four_bit(layer):
        return _bitsandbytes_operand(layer.weight)
    if is_quantized(layer):
        kernel = layer.weight_format.kernel
        return Operand(kernel if kernel in KINDS else None, layer.weight, layer.scale)
    return Operand(None, layer.weight, None)


def matrix_of(layer: nn.Module) -> tuple[Matrix, object]:
    """A linear layer's weight for C, with what LoRA around it adds, and what has to live as long."""
    found, kept = operand_of(base_of(layer)).matrix()
    return found, (kept, add_to(found, layer))


def is_of_four_bits(layer: nn.Module) -> bool:
    """Whether a layer's weight, this package's or bitsandbytes', is codes of four bits."""
    return is_four_bit(layer) or (is_quantized(layer) and layer.weight_format.kernel in KINDS)


def unsupported_format(weight_format) -> str | None:
    """Why the CPU engine has no kernels for a `formats.WeightFormat`; ``None`` if it has."""
    if weight_format.kernel in KINDS:
        group = KINDS[weight_format.kernel].group
        if tuple(weight_format.block) != (1, group):
            return f"has groups of {group} columns only for {weight_format.name}, found {tuple(weight_format.block)}"
        return None
    if weight_format.kernel != KERNEL or weight_format.linear is None:
        return f"has kernels for FP8 and bf16 weights, found {weight_format.name}"
    if weight_format.block != BLOCK:
        return f"has blocks of {BLOCK[0]} × {BLOCK[1]} only, found {weight_format.block}"
    return None


def is_four_bit(layer: nn.Module) -> bool:
    """Whether it is bitsandbytes' ``Linear4bit`` itself, with codes in their own order: its call may change that on a CPU."""
    state = getattr(layer._parameters.get("weight"), "quant_state", None)
    kind = type(layer)
    is_bnb = kind.__name__ == "Linear4bit" and kind.__module__.startswith("bitsandbytes.")
    return is_bnb and state is not None and not is_packed(layer) and not is_hooked(layer) and layer.bias is None


def _dequantized(weight: nn.Parameter) -> torch.Tensor:
    """What the codes of a 4-bit weight stand for. Read through its call it would take fifty times as long."""
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, weight.quant_state)


def _bitsandbytes_operand(weight: nn.Parameter) -> Operand:
    """The codes of a ``Linear4bit`` as rows, and its scales, which may be nested."""
    state, rows = weight.quant_state, weight.quant_state.shape[0]
    codes = weight.data.reshape(-1).view(torch.uint8).view(rows, -1)
    scales = state.absmax.view(rows, -1)
    if not state.nested:
        return Operand(state.quant_type, codes, scales)
    inner = state.state2
    return Operand(state.quant_type + NESTED, codes, NestedScales(scales, inner.absmax, inner.code, state.offset))


def _unsupported_state(state) -> str | None:
    """Why the engine cannot read what bitsandbytes quantised; ``None`` if it can."""
    group, shape = KINDS["nf4"].group, tuple(state.shape)
    if state.blocksize != group or (state.nested and state.state2.blocksize != NESTED_GROUP):
        return f"has blocks of {group} values only, and nested ones of {NESTED_GROUP}, found {state.blocksize}"
    if state.quant_type not in KINDS or len(shape) != 2 or shape[1] % group:
        return f"takes rows of whole blocks of {group}, found {state.quant_type} {list(shape)}"
    return None


def unsupported_linear(layer: nn.Module) -> str | None:
    """Why a fused operation cannot read this layer's weight where it lies; ``None`` if it can."""
    if every_module_is_hooked():
        return "cannot call hooks that are on every module"
    if is_four_bit(layer):
        return _unsupported_state(layer.weight.quant_state)
    if not is_linear(layer):
        return f"needs plain linear layers, found {_called(layer)}"
    if layer.bias is not None:
        return "needs linear layers without bias"
    return unsupported_format(layer.weight_format) if is_quantized(layer) else None


def scale_of(layer: nn.Module) -> torch.Tensor | None:
    """The scales of a quantised weight, ``None`` for any other."""
    return layer.scale if is_quantized(layer) else None


class RowsOfRank(NamedTuple):
    """This rank's rows of a weight that transformers' tensor parallelism divided by rows, and their scales."""

    weight: torch.Tensor
    scale: torch.Tensor | None


def rows_of_rank(layer: nn.Module) -> RowsOfRank | None:
    """What the call of such a layer multiplies with; ``None`` for any other, and where more is attached to its call."""
    if "_is_hooked" not in layer.__dict__:
        return None
    weight = layer._parameters.get("weight")
    placements: tuple = getattr(weight, "placements", ())  # of a DTensor, which not every build of torch has
    if len(placements) != 1 or not placements[0].is_shard(0):
        return None
    own = layer.__dict__
    more = own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or "_hf_hook" in own
    if more or layer.bias is not None or not (type(layer) is nn.Linear or is_quantized(layer)):
        return None
    return RowsOfRank(weight.to_local(), layer.scale.to_local() if is_quantized(layer) else None)


def summed_backward(x: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    """``x``, of which each rank of a layer's `rows_of_rank` uses all for some of the results: its gradient is their sum."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        return x
    from torch.distributed.tensor import DTensor, Partial, Replicate

    shared = DTensor.from_local(x, layer.weight.device_mesh, [Replicate()], run_check=False)
    return shared.to_local(grad_placements=[Partial()])


def weight_of(layer: nn.Module, like: torch.Tensor) -> torch.Tensor:
    """The weight ``[N, K]`` that calling the layer multiplies with, in the dtype and on the device of ``like``."""
    if is_linear(layer):
        return layer.dequantized(like.dtype) if is_quantized(layer) else layer.weight.to(like.dtype)
    if is_four_bit(layer):
        return _dequantized(layer.weight).to(like.dtype)
    rows = rows_of_rank(layer)
    if rows is not None:
        return rows.weight.to(like.dtype) if rows.scale is None else layer.weight_format.dequantize(*rows, like.dtype)
    if differs_by_row(layer):
        raise ValueError(
            "adapter_names: found several adapters in one batch on a layer whose weight is read, as sparse attention reads kv_b_proj's, "
            "wanted one: a batch for each, after model.set_adapter(name)"
        )
    base = base_of(layer)
    if base is not layer and unsupported_lora(layer) is None and (is_linear(base) or is_four_bit(base)):
        weight, pair = weight_of(base, like), pair_of(layer)
        if pair is None:
            return weight
        wide = torch.promote_types(pair.a.dtype, weight.dtype)
        a, b = pair.a.to(wide), pair.b.to(wide)
        return torch.addmm(weight.to(wide), b, a, alpha=pair.scale).to(like.dtype)
    # another adapter, another quantiser or an offloading hook wraps the weight: it is read through the call
    return layer(torch.eye(layer.in_features, dtype=like.dtype, device=like.device)).T


class _Kept:
    """A quantised weight as it was dequantised, until it is another. Copies and pickles of it are ``None``."""

    def __init__(self, layer: nn.Module, dtype: torch.dtype):
        self.of = _identity(layer, dtype)
        # read by a later call with gradients too, which tensors made in inference mode are not for
        with torch.inference_mode(False), torch.no_grad():
            self.weight = layer.dequantized(dtype)

    def __reduce__(self):
        return type(None), ()


def _identity(layer: nn.Module, dtype: torch.dtype) -> tuple:
    tensors = layer.weight, layer.scale
    own = ((id(t), t.untyped_storage()._cdata, None if t.is_inference() else t._version) for t in tensors)
    return dtype, *own


def kept_weight_of(layer: nn.Module, like: torch.Tensor) -> torch.Tensor:
    """As `weight_of`; on an accelerator a quantised weight is dequantised once, and kept in the dtype of ``like``.

    For a weight that every token would dequantise as a whole. While a graph is compiled it is what was kept before.
    """
    if like.device.type == "cpu" or not (is_quantized(layer) and is_linear(layer)):
        return weight_of(layer, like)
    kept = layer.__dict__.get(KEPT)
    if torch.compiler.is_compiling():
        return weight_of(layer, like) if kept is None or kept.of[0] != like.dtype else kept.weight
    if kept is None or kept.of != _identity(layer, like.dtype):
        kept = layer.__dict__[KEPT] = _Kept(layer, like.dtype)
    return kept.weight


def _called(module: nn.Module) -> str:
    weight = module._parameters.get("weight")
    kind = _named(type(module)) + (" with a hook" if is_hooked(module) else "")
    # torchao leaves the class as it is
    return kind if type(module) is not nn.Linear or type(weight) in PLAIN else f"{kind} with a {_named(type(weight))}"


def _named(kind: type) -> str:
    own = kind.__module__.partition(".")[0] in ("torch", __name__.partition(".")[0])
    return kind.__name__ if own else f"{kind.__module__}.{kind.__name__}"
