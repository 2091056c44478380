"""Multi-token prediction: one extra decoder layer per depth that predicts a token further on (V3 report, 2.2).

h' = M [RMSNorm(Emb(t_{i+1})); RMSNorm(h_i)] → decoder layer → norm → head → t_{i+2}. The released weights put
the embedding's half first. Stored as layers ``num_hidden_layers + depth``, with copies of embedding and head.
"""

import torch
import torch.nn.functional as F
from torch import nn

from modeling_deepseek_moe.block import DeepseekDecoderLayer
from modeling_deepseek_moe.layers import DeepseekRMSNorm
from modeling_deepseek_moe.ops.linear import project


def shifted(tensor: torch.Tensor, offset: int, fill: int) -> torch.Tensor:
    """``[B, S]`` moved left by ``offset``: what lies that far ahead of each position, ``fill`` beyond the end."""
    return F.pad(tensor, (0, offset), value=fill)[:, offset:]


class SharedModule(nn.Module):
    """A module of another part of the model, called from here; its weight is in the state dict as the copy of a release.

    Not the same parameter in two modules: FSDP2 gathers a parameter where the module that owns it is called.
    """

    def __init__(self, owner: nn.Module):
        super().__init__()
        self._owner = (owner,)  # in a tuple it is no submodule

    @property
    def owner(self) -> nn.Module:
        return self._owner[0]

    @property
    def weight(self) -> nn.Parameter:
        return self._owner[0].weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._owner[0](x)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        for name, parameter in self._owner[0].named_parameters(recurse=False):  # a quantised one has scales too
            destination[prefix + name] = parameter if keep_vars else parameter.detach()

    def _load_from_state_dict(self, *args):
        pass  # the owner's key is loaded


def share_mtp_weights(model: nn.Module) -> bool:
    """Make the MTP layers use the model's own embedding and head (V3 report, 2.2); saved as copies.

    Args:
        model: a `DeepseekMoeForCausalLM`.

    Returns:
        Whether the copies that the layers had differed from the model's.
    """
    differed = False
    for layer in model.model.mtp_layers:
        for holder, name, owner in (
            (layer, "embed_tokens", model.model.embed_tokens),
            (layer.shared_head, "head", model.lm_head),
        ):
            module = getattr(holder, name)
            if module.weight is not owner.weight:
                differed = differed or not torch.equal(module.weight, owner.weight)
                setattr(holder, name, SharedModule(owner))
    return differed


class MtpHead(nn.Module):
    """``norm`` and ``head`` of one depth: ``[..., hidden_size] → [..., vocab_size]``."""

    def __init__(self, config):
        super().__init__()
        self.norm = DeepseekRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)


class DeepseekMtpLayer(DeepseekDecoderLayer):
    """One MTP depth, under the release's names (``enorm``, ``hnorm``, ``eh_proj``, ``embed_tokens``, ``shared_head``)."""

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.enorm = DeepseekRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.hnorm = DeepseekRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.shared_head = MtpHead(config)

    def forward(self, input_ids: torch.Tensor, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        """
        Args:
            input_ids: ``[B, S]``, the tokens one position after those of ``hidden_states``.
            hidden_states: ``[B, S, hidden_size]``, the model's last hidden state (after its final norm), or the
                previous depth's result.

        Returns:
            ``[B, S, hidden_size]``, normed: `shared_head.head` turns it into logits, the next depth takes it as is.
        """
        embedded = self.enorm(self.embed_tokens(input_ids))
        merged = project(self.eh_proj, torch.cat((embedded, self.hnorm(hidden_states)), dim=-1))
        return self.shared_head.norm(super().forward(merged, **kwargs))
