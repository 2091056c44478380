"""The text that a call begins with: which of it is to be read, which of its columns count, and where its tokens stand."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Prompt:
    """
    Args:
        tokens: ``[B, S]``, as they were given.
        cached: of these, how many columns the cache holds.
        mask: ``[B, past + new]``, of what the cache holds and of what is read, false where a column is padding; ``None``:
            none is.
    """

    tokens: torch.Tensor
    cached: int
    mask: torch.Tensor | None

    @property
    def unread(self) -> torch.Tensor:
        """``[B, new]``."""
        return self.tokens[:, self.cached :]

    @property
    def padding(self) -> torch.Tensor | None:
        """``[B, S]``: the mask of ``tokens``."""
        return None if self.mask is None else self.mask[:, -self.tokens.shape[1] :]

    def check_positions(self, given: torch.Tensor | None, wanted: torch.Tensor) -> None:
        """
        Args:
            given: ``position_ids`` of the caller, or those that `generate` made of the mask.
            wanted: ``[B, new]``, those that the rows go on from.

        Raises:
            ValueError: they differ in a token that counts, as in packed rows, or where a text begins elsewhere than at 0.
        """
        if given is None:
            return
        new = wanted.shape[1]
        counts = torch.ones_like(wanted, dtype=torch.bool) if self.mask is None else self.mask[:, -new:]
        found = given[..., -new:].to(wanted.device).expand_as(wanted) if given.shape[-1] >= new else None
        if found is None or bool(((found != wanted) & counts).any()):
            raise ValueError(
                "position_ids: found others than attention_mask gives each row (0 for its first token, and on by one), wanted those, or "
                "none: drafts that are kept go on from them"
            )


def prompt_of(input_ids: torch.Tensor, past: int, mask: torch.Tensor | None, mask_length: int, device) -> Prompt:
    """As `generate` reads it: the whole text, or, after a cache, new tokens with a mask of all.

    Args:
        past: columns that the cache holds.
        mask_length: of the mask that `generate` was given, or made, and dropped if nothing is padding.
        device: of the model.

    Raises:
        ValueError: there is nothing to read, or the mask has another length than what it is of.
    """
    length = input_ids.shape[1]
    if not length:
        raise ValueError("input_ids: found no tokens, wanted at least one a row, such as the bos_token_id")
    cached = past if mask_length == length else 0
    if cached >= length or mask_length != past + length - cached:
        raise ValueError(
            f"found {length} input_ids a row with an attention_mask of {mask_length} and {past} tokens in the cache, wanted the whole text "
            "with a mask of its length, or new tokens alone with a mask of those in the cache too"
        )
    padding = None if mask is None or bool(mask.all()) else mask.bool().to(device)
    return Prompt(input_ids.to(device), cached, padding)
