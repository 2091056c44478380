"""What a user sees of streaming: a budget, figures, and a choice made while loading."""

from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from modeling_deepseek_moe.checkpoint.writer import parse_size
from modeling_deepseek_moe.compat import ModelMixin
from modeling_deepseek_moe.machine import probe_machine
from modeling_deepseek_moe.moe.layer import DeepseekMoE
from modeling_deepseek_moe.planning import WORKSPACE_BYTES
from modeling_deepseek_moe.quantized.mapped import MappedExperts
from modeling_deepseek_moe.streaming.ahead import NextLayerPredictor
from modeling_deepseek_moe.streaming.cache import ExpertCache
from modeling_deepseek_moe.streaming.layer import LayerStream
from modeling_deepseek_moe.streaming.resident import ResidentWeights
from modeling_deepseek_moe.streaming.slots import ExpertStats

logger = logging.get_logger(__name__)


class StreamingMixin(ModelMixin):
    """Experts larger than memory. Mixed into the models before `PreTrainedModel`."""

    def set_expert_memory(self, budget: float | str | None) -> None:
        """Hold routed experts in so much memory of their own, and read the others from the files as they are needed.

        For experts that are mapped from their files: on the CPU. Results are the same to the last bit. What was
        held before is dropped, and figures begin at zero. A copy of the model is mapped until it is given a budget.
        Experts that an adapter is on afterwards are read from the mapped files, outside of the budget.

        Args:
            budget: bytes, or text such as ``"8GB"``; ``None``: no memory of their own, the mapped files are read.
                More than the experts take is not used; more than is available is told in a warning.

        Raises:
            ValueError: the model has no mapped experts, or an adapter on them, or the budget is smaller than two of them.
        """
        layers = _mapped_layers(self)
        if budget is None:
            _detach(layers)
            return
        if not layers:
            if any(isinstance(module, MappedExperts) for module in self.modules()):
                raise ValueError(
                    "found mapped experts with an adapter around them, wanted none: call it before the adapter is made"
                )
            raise ValueError("found no experts mapped from files, wanted an FP8 checkpoint loaded on the CPU")
        _attach(self, layers, parse_size(budget if isinstance(budget, str) else int(budget)))
        cache, available = layers[0].mlp.experts.stream.cache, probe_machine(measure=False).ram_available
        if cache.memory.nbytes > available:
            logger.warning(
                f"Experts may come to take {cache.memory.nbytes / 1e9:.1f} GB of memory, and {available / 1e9:.1f} GB are "
                "available: the system may end this process."
            )

    def expert_stats(self, reset: bool = False) -> ExpertStats | None:
        """Figures since `set_expert_memory` or the last ``reset``; ``None`` while experts are mapped."""
        stream = next((layer.mlp.experts.stream for layer in _mapped_layers(self)), None)
        return None if stream is None else stream.cache.stats(reset)


def enable_streaming_if_needed(model: PreTrainedModel) -> None:
    """Turn streaming on where the mapped experts do not fit the memory that is available besides all else."""
    layers = _mapped_layers(model)
    if not layers:
        return
    depth = model.config.num_hidden_layers
    used = [layer for layer in layers if layer.self_attn.layer_idx < depth]
    experts = sum(layer.mlp.experts.mapped_bytes for layer in used)
    rest = _resident(model, layers[0].mlp.experts.files).nbytes + WORKSPACE_BYTES
    available = probe_machine(measure=False).ram_available
    if experts + rest <= available:
        return
    found = (
        f"The routed experts take {experts / 1e9:.1f} GB and all else {rest / 1e9:.1f} GB; {available / 1e9:.1f} GB "
        "of memory are available"
    )
    try:
        _attach(model, layers, available - rest)
    except ValueError:
        logger.warning(f"{found}, too little to hold experts in: they are read from the mapped files, page by page.")
        return
    logger.warning(
        f"{found}: experts are read as they are needed and {(available - rest) / 1e9:.1f} GB of them kept "
        "(set_expert_memory changes that)."
    )


def _mapped_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder layers, MTP layers included, whose experts are mapped."""
    layers = (layer for layer in getattr(model.base_model, "layers", ()) if not isinstance(layer, nn.Identity))
    return [
        layer
        for layer in layers
        if isinstance(layer.mlp, DeepseekMoE) and isinstance(layer.mlp.experts, MappedExperts)
    ]


def _detach(layers: list[nn.Module]) -> None:
    for layer in layers:
        stream, layer.mlp.experts.stream = layer.mlp.experts.stream, None
        if stream is not None:
            stream.cache.close()


def _attach(model: PreTrainedModel, layers: list[nn.Module], budget: int) -> None:
    experts = [layer.mlp.experts for layer in layers]
    files = experts[0].files
    cache = ExpertCache([one.reads for one in experts], [one.num_experts for one in experts], files, budget)
    _detach(layers)
    resident = _resident(model, files)
    here = None
    for number, layer in enumerate(layers):
        following = None
        if number + 1 < len(layers) and layers[number + 1].self_attn.layer_idx < model.config.num_hidden_layers:
            after = layers[number + 1]
            norms = (after.post_attention_layernorm, layer.post_attention_layernorm)
            following = NextLayerPredictor(number + 1, after.mlp.gate, *norms)
        layer.mlp.experts.stream = LayerStream(cache, number, resident, following, here)
        here = following


def _resident(model: PreTrainedModel, files) -> ResidentWeights:
    """All that a token reads besides the routed experts: MTP layers are left out."""
    mtp = {module for layer in getattr(model.base_model, "mtp_layers", ()) for module in layer.modules()}
    return ResidentWeights([module for module in model.modules() if module not in mtp], files)
