"""`resize_token_embeddings` for models with MTP layers, which have copies of the embedding and of the head."""

import torch
from accelerate.hooks import add_hook_to_module
from torch import nn

from modeling_deepseek_moe.bnb.packing import unpack
from modeling_deepseek_moe.compat import ModelMixin
from modeling_deepseek_moe.mtp import SharedModule

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# What weights of bitsandbytes are made with, 4-bit and int8 ones.
SETTINGS = ("blocksize", "compress_statistics", "quant_type", "quant_storage", "module", "has_fp16_weights")


class ResizingMixin(ModelMixin):
    """The MTP layers' vocabulary follows the model's. Mixed into the models before `PreTrainedModel`."""

    @torch.no_grad()
    def _resize_token_embeddings(self, new_num_tokens, pad_to_multiple_of=None, mean_resizing=True):
        head = self.get_output_embeddings()
        if head is not None and head.weight.dtype not in FLOATS:
            raise ValueError(
                f"resize_token_embeddings: lm_head: found codes in {head.weight.dtype}, wanted floating-point weights to add rows "
                "to: load the folder with quantization_config=FineGrainedFP8Config(dequantize=True), or with lm_head among "
                "bitsandbytes' llm_int8_skip_modules"
            )
        # the one place that sees both ends of a resize: what is resized, and what came of it
        owners = (self.get_input_embeddings(), self.get_output_embeddings())
        copies = [
            (holder, name, _is_copy(getattr(holder, name), owner))
            for layer in self.base_model.mtp_layers
            for holder, name, owner in zip((layer, layer.shared_head), ("embed_tokens", "head"), owners, strict=True)
        ]
        embedding = super()._resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        owners = {"embed_tokens": embedding, "head": self.get_output_embeddings()}
        for holder, name, is_copy in copies:
            self._resize_copy(holder, name, owners[name], is_copy, mean_resizing)
        return embedding

    def _resize_copy(self, holder: nn.Module, name: str, owner: nn.Module | None, is_copy: bool, mean_resizing: bool):
        """One MTP layer's embedding or head; a true copy of the model's stays one, new rows included."""
        module, size = getattr(holder, name), self.get_input_embeddings().weight.shape[0]
        if isinstance(module, SharedModule):
            setattr(holder, name, SharedModule(owner))
            return
        if (module.num_embeddings if isinstance(module, nn.Embedding) else module.out_features) == size:
            return
        if module.weight.dtype not in FLOATS:
            resized = self._get_resized_lm_head(_decoded(module), size, mean_resizing=mean_resizing)
            module.weight, module.out_features = _coded(resized.weight, module.weight), size
            return
        requires_grad, hook = module.weight.requires_grad, getattr(module, "_hf_hook", None)
        resize = self._get_resized_embeddings if isinstance(module, nn.Embedding) else self._get_resized_lm_head
        resized = resize(module, size, mean_resizing=mean_resizing)
        if is_copy:
            resized.weight.copy_(owner.weight)
        resized.weight.requires_grad_(requires_grad)
        if hook is not None:
            add_hook_to_module(resized, hook)
        setattr(holder, name, resized)


def _is_copy(module: nn.Module, owner: nn.Module | None) -> bool:
    if owner is None or module.weight.is_meta or owner.weight.is_meta:
        return False
    return torch.equal(module.weight, owner.weight.to(module.weight.device))


def _decoded(layer: nn.Linear) -> nn.Linear:
    """A layer of bitsandbytes in floating point: an MTP layer's head is one of its, where it leaves the model's alone."""
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    unpack(layer)
    with torch.device("meta"):
        decoded = nn.Linear(layer.in_features, layer.out_features, bias=False)
    decoded.weight = nn.Parameter(dequantize_bnb_weight(layer.weight, getattr(layer, "state", None)))
    return decoded


def _coded(values: torch.Tensor, weight: nn.Parameter) -> nn.Parameter:
    """Values as bitsandbytes quantises them on their way to a device, by the settings of the ``weight`` that they were."""
    settings = {name: getattr(weight, name) for name in SETTINGS if hasattr(weight, name)}
    return type(weight)(values.detach().cpu(), requires_grad=False, **settings).to(weight.device)
