"""Which drafted tokens stand: those that the model would have said itself.

Greedily: as long as they are the model's first choices. Sampling (Leviathan et al., arXiv:2211.17192): a token drawn from
q is accepted with probability min(1, p / q); the first that is not is drawn again from what p has over q. Each
token then has the model's distribution p, whatever q is.
"""

import torch
import torch.nn.functional as F


def accept_greedily(scores: torch.Tensor, drafted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Args:
        scores: ``[B, k + 1, vocab_size]``, the model's for the k drafted tokens and for one after them.
        drafted: ``[B, k]``.

    Returns:
        How many drafted tokens of each row stand, ``[B]``, and the token after them, ``[B]``.
    """
    wanted = scores.argmax(dim=-1)
    accepted = (drafted == wanted[:, :-1]).long().cumprod(dim=1).sum(dim=1)
    return accepted, wanted.gather(1, accepted[:, None])[:, 0]


def accept_sampling(
    scores: torch.Tensor, drafted: torch.Tensor, draft_probabilities: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `accept_greedily`, of tokens drawn from ``draft_probabilities [B, k, vocab_size]``."""
    probabilities = scores.softmax(dim=-1)
    count = drafted.shape[1]
    p = probabilities[:, :count].gather(2, drafted[:, :, None])[:, :, 0]
    q = draft_probabilities.gather(2, drafted[:, :, None])[:, :, 0]
    stands = torch.rand_like(p) * q < p
    accepted = stands.long().cumprod(dim=1).sum(dim=1)
    rows = torch.arange(len(drafted), device=drafted.device)
    # after the last drafted token nothing was drafted: p itself
    padded = torch.cat((draft_probabilities, torch.zeros_like(probabilities[:, :1])), dim=1)
    rest = (probabilities[rows, accepted] - padded[rows, accepted]).clamp(min=0)
    # p = q to the last bit and yet refused: rounding of `rand`; any token of p will do
    rest = torch.where(rest.sum(dim=-1, keepdim=True) > 0, rest, probabilities[rows, accepted])
    return accepted, torch.multinomial(rest, 1)[:, 0]


def certain(tokens: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """``[B, k, vocab_size]``: the distribution of drafts ``[B, k]`` that were looked up, not drawn."""
    return F.one_hot(tokens, vocab_size).float()
