"""Chat, text and token files as rows to train on: tokenized, masked, packed."""

from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from modeling_deepseek_moe.objective import IGNORE
from modeling_deepseek_moe.tokens import encode_text

LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}


def load_documents(file: str, tokenizer: PreTrainedTokenizerBase, max_length: int, assistant_only: bool) -> list[dict]:
    """``[{"input_ids": [...], "labels": [...]}, ...]``, one a document; those of less than two tokens are left out.

    Args:
        assistant_only: of a chat, only what the assistant says is learned.

    Raises:
        ValueError: a file or column of another kind, a chat template that does not mark what the assistant says, or
            nothing to learn from.
    """
    from datasets import load_dataset

    kind = LOADERS.get(Path(file).suffix)
    if kind is None:
        raise ValueError(f"{file}: found {Path(file).suffix or 'no suffix'}, wanted one of {', '.join(LOADERS)}")
    if not Path(file).is_file():
        raise FileNotFoundError(f"{file}: found no such file")
    table = load_dataset(kind, data_files=str(file), split="train")
    encoders = {"messages": _chat, "text": _text, "input_ids": _tokens}
    column = next((name for name in encoders if name in table.column_names), None)
    if column is None:
        raise ValueError(f"{file}: found columns {table.column_names}, wanted one of {', '.join(encoders)}")
    documents = []
    for row in table:
        ids, labels = encoders[column](row, tokenizer, assistant_only)
        if len(ids) > 1:
            documents.append({"input_ids": ids[:max_length], "labels": labels[:max_length]})
    if not any(label != IGNORE for document in documents for label in document["labels"][1:]):
        said = (
            "what the assistant says lies past max_length, or there is none" if column == "messages" else "too short"
        )
        raise ValueError(f"{file}: found {len(documents)} documents and no token to learn: {said}")
    return documents


def _chat(row: dict, tokenizer: PreTrainedTokenizerBase, assistant_only: bool) -> tuple[list[int], list[int]]:
    if tokenizer.chat_template is None:
        raise ValueError("found a column 'messages' and no chat template in the tokenizer, wanted one")
    if not assistant_only:
        encoded = tokenizer.apply_chat_template(row["messages"], return_dict=True)
        return encoded["input_ids"], list(encoded["input_ids"])
    if "{% generation %}" not in tokenizer.chat_template.replace("{%-", "{%").replace("-%}", "%}"):
        raise ValueError(
            "the chat template has no {% generation %} marks around what the assistant says: add them, or train on the "
            "whole conversation with --assistant_only_loss false"
        )
    encoded = tokenizer.apply_chat_template(row["messages"], return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = encoded["input_ids"], encoded["assistant_masks"]
    return ids, [token if said else IGNORE for token, said in zip(ids, mask, strict=True)]


def _text(row: dict, tokenizer: PreTrainedTokenizerBase, _) -> tuple[list[int], list[int]]:
    ids = encode_text(tokenizer, row["text"])
    if tokenizer.eos_token_id is not None and ids and ids[-1] != tokenizer.eos_token_id:
        ids = [*ids, tokenizer.eos_token_id]
    return ids, list(ids)


def _tokens(row: dict, *_) -> tuple[list[int], list[int]]:
    return row["input_ids"], row.get("labels") or list(row["input_ids"])


def pack(documents: list[dict], max_length: int) -> list[list[dict]]:
    """Rows of as many whole documents, in order, as fit into ``max_length`` tokens."""
    rows, row, length = [], [], 0
    for document in documents:
        size = len(document["input_ids"])
        if row and length + size > max_length:
            rows.append(row)
            row, length = [], 0
        row.append(document)
        length += size
    return [*rows, row] if row else rows


class Rows(Dataset):
    """Rows of one or several documents, whose positions begin again with each document."""

    def __init__(self, rows: list[list[dict]]):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        row = self.rows[index]
        return {
            "input_ids": [token for document in row for token in document["input_ids"]],
            # the first token of a document is nothing that the one before it could predict
            "labels": [label for document in row for label in (IGNORE, *document["labels"][1:])],
            "position_ids": [position for document in row for position in range(len(document["input_ids"]))],
        }


class Collator:
    """Pads rows to the longest, on the right.

    Args:
        packed: give ``position_ids``, which keep the documents of a row apart.
    """

    def __init__(self, pad: int, packed: bool):
        self.fill = {"input_ids": pad, "labels": IGNORE, "attention_mask": 0}
        if packed:
            self.fill["position_ids"] = None

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        length = max(len(row["input_ids"]) for row in rows)
        batch = {name: [] for name in self.fill}
        for row in rows:
            size = len(row["input_ids"])
            row = row | {"attention_mask": [1] * size}
            for name, fill in self.fill.items():
                padding = range(length - size) if fill is None else [fill] * (length - size)
                batch[name].append(torch.tensor([*row[name], *padding]))
        return {name: torch.stack(tensors) for name, tensors in batch.items()}
