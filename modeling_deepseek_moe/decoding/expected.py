"""What a step that drafts takes, reckoned beforehand from the bytes that it reads of a model as it lies in memory.

A step of k drafts runs the model on k + 1 tokens. They share every weight but the routed experts, of which n tokens choose

    E (1 - (1 - K/E)^n)

different ones of E if routing is uniform, K each; neighbours in a text choose more alike, so that fewer are read. The MTP
layers are read once a draft. Where each draft is right with probability a, given that the one before it was, a step makes

    1 + a + ... + a^k

tokens (arXiv:2211.17192, equation 1).
"""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from modeling_deepseek_moe.mtp import SharedModule

ACCEPTANCE = 0.85  # of the second token (V3 report, 5.4.3: between 85 % and 90 %)
LEAST = 1.05  # a step takes more than the time of its bytes: what pays by less than that does not pay


@dataclass(frozen=True)
class Expected:
    """Of a step that drafts, in the time of a plain one.

    Attributes:
        drafts: tokens that it drafts.
        cost: its time.
        first: that of the first one, whose MTP layers read the end of the prompt besides.
    """

    drafts: int
    cost: float
    first: float

    def speedup(self, acceptance: float) -> float:
        return tokens_per_step(acceptance, self.drafts) / self.cost

    def hopeless(self) -> str | None:
        """Why no acceptance pays; ``None`` if one may."""
        if self.speedup(1.0) >= LEAST:
            return None
        return (
            f"by the bytes that it reads, a step with {self.drafts} draft{'s' * (self.drafts > 1)} takes {self.cost:.2f} "
            f"plain ones and makes {self.drafts + 1} tokens at most"
        )


def tokens_per_step(acceptance: float, drafts: int) -> float:
    """Tokens that a step makes on average: those accepted, and the one that the model adds."""
    return sum(acceptance**count for count in range(drafts + 1))


def different(chosen: int, count: int, tokens: float) -> float:
    """Different experts of ``count`` that ``tokens`` tokens choose, ``chosen`` each, over those that one does."""
    return count * (1 - (1 - chosen / count) ** tokens) / chosen if chosen else 0.0


def expect(model: nn.Module, rows: int, drafts: int, window: int) -> Expected:
    """
    Args:
        model: a `DeepseekMoeForCausalLM` with MTP layers.
        rows: of the batch.
        window: tokens of the prompt that the MTP layers read.

    Raises:
        ValueError: this process has no bytes of the model.
    """
    base, config = model.base_model, model.config
    chosen, count = config.num_experts_per_tok, config.n_routed_experts
    depth = config.num_hidden_layers
    routed, rest = _split(list(base.layers)[:depth])
    rest += sum(map(own_bytes, model.lm_head.modules()))
    mtp_routed, mtp_rest = _split(base.mtp_layers)

    def share(tokens: int) -> float:
        """Of the routed experts, that ``tokens`` of each row read."""
        return different(chosen, count, rows * tokens) * chosen / count if count else 0.0

    plain = rest + routed * share(1)
    if not plain:  # as ZeRO-3 leaves it
        raise ValueError(
            "use_mtp='auto': found no weights in this process to reckon with, wanted a model that is whole here, or use_mtp=True"
        )
    verify = rest + routed * share(drafts + 1)
    draft = mtp_rest + mtp_routed * share(drafts + 1)
    first = mtp_rest + mtp_routed * share(window)
    return Expected(drafts, (verify + draft) / plain, (verify + max(draft, first)) / plain)


def _split(layers: Iterable[nn.Module]) -> tuple[int, int]:
    """Bytes of the routed experts, and of everything else but an embedding, of which a row is read."""
    routed = rest = 0
    for layer in layers:
        for name, part in layer.named_modules():
            found = own_bytes(part)
            if name.startswith("mlp.experts"):
                routed += found
            elif not name.startswith("embed_tokens"):
                rest += found
    return routed, rest


def own_bytes(module: nn.Module) -> int:
    """Of the weights of a module itself, wherever they lie, and whomever they belong to."""
    if isinstance(module, SharedModule):
        return sum(map(own_bytes, module.owner.modules()))
    tensors = (*module._parameters.values(), *module._buffers.values())
    # experts in a checkpoint's files are of a class that is defined further up
    return sum(tensor.nbytes for tensor in tensors if tensor is not None) + getattr(module, "mapped_bytes", 0)
