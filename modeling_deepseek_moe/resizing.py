"""`resize_token_embeddings` for models with MTP layers, which have copies of the embedding and of the head."""

import torch
from torch import nn

from modeling_deepseek_moe.mtp import SharedModule


class ResizingMixin:
    """The MTP layers' vocabulary follows the model's. Mixed into the models before `PreTrainedModel`."""

    def _resize_token_embeddings(self, new_num_tokens, pad_to_multiple_of=None, mean_resizing=True):
        # the one place that sees both ends of a resize: the modules replaced, and those that replace them
        before = (self.get_input_embeddings(), self.get_output_embeddings())
        embedding = super()._resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        after = (embedding, self.get_output_embeddings())
        size = embedding.weight.shape[0]
        for layer in self.base_model.mtp_layers:
            for holder, name, old, new in (
                (layer, "embed_tokens", before[0], after[0]),
                (layer.shared_head, "head", before[1], after[1]),
            ):
                self._resize_copy(holder, name, old, new, size, mean_resizing)
        return embedding

    @torch.no_grad()
    def _resize_copy(
        self, holder: nn.Module, name: str, old: nn.Module | None, new: nn.Module | None, size: int, mean
    ):
        """One MTP layer's embedding or head; a true copy of the model's stays one, new rows included."""
        module = getattr(holder, name)
        if isinstance(module, SharedModule):
            setattr(holder, name, SharedModule(new))
            return
        if module.weight.shape[0] == size:
            return
        if isinstance(module, nn.Embedding):
            resized = self._get_resized_embeddings(module, size, mean_resizing=mean)
        else:
            resized = self._get_resized_lm_head(module, size, mean_resizing=mean)
        if old is not None and torch.equal(old.weight, module.weight):
            resized.weight.copy_(new.weight)
        resized.weight.requires_grad_(module.weight.requires_grad)
        if hasattr(module, "_hf_hook"):
            from accelerate.hooks import add_hook_to_module

            add_hook_to_module(resized, module._hf_hook)
        setattr(holder, name, resized)
