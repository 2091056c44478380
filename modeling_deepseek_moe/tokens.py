"""How a text begins: with the BOS that the family was trained with, where the tokenizer's config asks for it."""

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from modeling_deepseek_moe.checkpoint.jsonfile import read_json


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str, add_bos: bool | None = None) -> list[int]:
    """Token ids of a text that is no chat; a BOS that it has already is not doubled.

    transformers drops ``add_bos_token: true`` of the released tokenizer_config.json: it is read from the file.

    Args:
        add_bos: ``None`` takes ``add_bos_token`` of the tokenizer's config, and what the tokenizer does by itself where it
            has none.
    """
    if add_bos is None:
        add_bos = released_choice(tokenizer)
    if add_bos is None:
        return tokenizer(text).input_ids
    ids = tokenizer(text, add_special_tokens=False).input_ids
    bos = tokenizer.bos_token_id
    return [bos, *ids] if add_bos and bos is not None and ids[:1] != [bos] else ids


def released_choice(tokenizer: PreTrainedTokenizerBase) -> bool | None:
    """``add_bos_token`` of the folder's tokenizer_config.json; ``None`` where that is silent, or there is no folder."""
    file = Path(tokenizer.name_or_path) / "tokenizer_config.json"
    return read_json(file, "a tokenizer's config").get("add_bos_token") if file.is_file() else None
