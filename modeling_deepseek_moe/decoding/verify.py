"""Whether a drafted token stands: whether the model would have said it itself.

Greedily: if it is the model's first choice. Sampling (Leviathan et al., arXiv:2211.17192): a token drawn from
q is accepted with probability min(1, p / q); one that is not is drawn again from what p has over q. Each
token then has the model's distribution p, whatever q is.
"""

import torch
import torch.nn.functional as F

NOTHING = -1  # in the place of a drafted token: this row has no draft


def accept_greedily(scores: torch.Tensor, drafted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Args:
        scores: ``[B, vocab_size]``, the model's for the place of the drafted tokens.
        drafted: ``[B]``, `NOTHING` where a row has no draft.

    Returns:
        The model's token of each row, ``[B]``, and whether it is the drafted one, ``[B]``.
    """
    tokens = scores.argmax(dim=-1)
    return tokens, tokens == drafted


def accept_sampling(
    scores: torch.Tensor, drafted: torch.Tensor, draft_probabilities: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `accept_greedily`, of tokens drawn from ``draft_probabilities [B, vocab_size]``, zeros where a row has no draft."""
    probabilities = scores.softmax(dim=-1)
    index = drafted.clamp(min=0)[:, None]
    p, q = (of.gather(1, index)[:, 0] for of in (probabilities, draft_probabilities))
    stands = (torch.rand_like(p) * q < p) & (drafted != NOTHING)
    rest = (probabilities - draft_probabilities).clamp(min=0)
    # p = q to the last bit and yet refused: rounding of `rand`; any token of p will do
    rest = torch.where(rest.sum(dim=-1, keepdim=True) > 0, rest, probabilities)
    return torch.where(stands, drafted, torch.multinomial(rest, 1)[:, 0]), stands


def certain(tokens: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """``[B, vocab_size]``: the distribution of drafts ``[B]`` that were looked up, not drawn; zeros where there is none."""
    return F.one_hot(tokens.clamp(min=0), vocab_size).float() * (tokens != NOTHING)[:, None]
