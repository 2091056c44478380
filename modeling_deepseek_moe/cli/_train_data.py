"""Chat, text and token files as rows to train on: tokenized, masked, split or cut to length, packed."""

from collections import Counter
from collections.abc import Callable

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from modeling_deepseek_moe.cli._console import plural
from modeling_deepseek_moe.cli._train_chat import CHAT_COLUMNS, check_text, encode_chat
from modeling_deepseek_moe.cli._train_rows import Row, kind, read_rows
from modeling_deepseek_moe.objective import IGNORE
from modeling_deepseek_moe.tokens import encode_text

logger = logging.get_logger(__name__)
MASKS = ("attention_mask", "completion_mask", "assistant_masks")
# Of the kinds of row the first whose column a row has; what else it has is named as unused.
COLUMNS = {"messages": CHAT_COLUMNS, "text": {"text"}, "input_ids": {"input_ids", "labels", *MASKS}}
WANTED = {"messages": "a list of messages", "text": "text", "input_ids": "a list of whole numbers"}


class Remarks:
    """What is to be said of a file, once each: how often, the first place, and of how many tokens."""

    def __init__(self, file: str):
        self.file, self.first = file, {}
        self.counts: Counter[str] = Counter()
        self.tokens: Counter[str] = Counter()

    def add(self, text: str, place: str, tokens: int = 0) -> None:
        self.counts[text] += 1
        self.tokens[text] += tokens
        self.first.setdefault(text, place)

    def say(self) -> None:
        for text, count in self.counts.items():
            first = f"{plural(count, 'time')}, first in {self.first[text]}" if count > 1 else self.first[text]
            size = f"; {plural(self.tokens[text], 'token')}" if self.tokens[text] else ""
            logger.warning(f"{self.file}: {text} ({first}{size})")


def load_documents(
    file: str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    assistant_only: bool,
    vocab_size: int | None = None,
) -> list[dict]:
    """``[{"input_ids": [...], "labels": [...]}, ...]``, one for each document in which there is something to learn.

    Text longer than ``max_length``, and token rows without labels or masks, become several documents, each from the token that the
    one before it ends with; chats and masked rows are cut. What is cut, left out or not used is counted in a warning.

    Args:
        assistant_only: of a chat, only what the assistant says is learned.
        vocab_size: of the model; the tokenizer's if it is not given.

    Raises:
        FileNotFoundError: no such file.
        ValueError: with file, row, field, what was found and what is wanted; or nothing to learn from.
    """
    remarks, documents, read = Remarks(str(file)), [], 0
    vocab_size = len(tokenizer) if vocab_size is None else vocab_size
    for place, row in read_rows(file):
        read += 1

        def note(text: str, tokens: int = 0, place: str = place) -> None:
            remarks.add(text, place, tokens)

        try:
            ids, labels, whole = _encode(row, tokenizer, assistant_only, note)
            _check_ids(ids, labels, vocab_size)
        except ValueError as error:
            raise ValueError(f"{file}: {place}: {error}") from None
        documents += fit(ids, labels, max_length, whole, note)
    if not documents:
        raise ValueError(
            f"{file}: found {plural(read, 'row')} and no token to learn: {'; '.join(remarks.counts) or 'it is empty'}"
        )
    remarks.say()
    return documents


def _encode(row: Row, tokenizer: PreTrainedTokenizerBase, assistant_only: bool, note: Callable) -> tuple:
    """Token ids, labels, and whether every token is learned."""
    column = next((name for name in COLUMNS if row.get(name) is not None), None)
    if column is None:
        empty = next((name for name in COLUMNS if name in row), None)
        if empty is not None:
            raise ValueError(f"{empty}: found null, wanted {WANTED[empty]}")
        raise ValueError(f"found columns {list(row)}, wanted one of {', '.join(COLUMNS)}")
    for name, value in row.items():
        if name not in COLUMNS[column] and value is not None:
            note(f"column {name!r} is not used in rows with {column!r}")
    if column == "messages":
        return *encode_chat(row, tokenizer, assistant_only, note), False
    if column == "text":
        ids = _text(row["text"], tokenizer)
        return ids, list(ids), True
    return _tokens(row, note)


def _text(text: object, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if not isinstance(text, str):
        raise ValueError(f"text: found {kind(text)}, wanted text")
    check_text(text, "text")
    ids = encode_text(tokenizer, text) if text else []
    if tokenizer.eos_token_id is not None and ids and ids[-1] != tokenizer.eos_token_id:
        ids = [*ids, tokenizer.eos_token_id]
    return ids


def _tokens(row: Row, note: Callable) -> tuple[list[int], list[int], bool]:
    ids = _integers(row, "input_ids")
    columns = {name: _integers(row, name, len(ids)) for name in ("labels", *MASKS) if row.get(name) is not None}
    labels = columns.pop("labels", ids)
    if any(label not in (IGNORE, token) for label, token in zip(labels, ids, strict=True)):
        note("labels are other tokens than input_ids in their places: the model shifts them itself")
    for name, mask in columns.items():
        wrong = next((value for value in mask if value not in (0, 1)), None)
        if wrong is not None:
            raise ValueError(f"{name}: found {wrong}, wanted 0 or 1")
        if name != "attention_mask":
            labels = [label if learned else IGNORE for label, learned in zip(labels, mask, strict=True)]
    seen = columns.get("attention_mask")
    if seen is not None:
        start = seen.index(1) if 1 in seen else len(ids)
        end = len(ids) - seen[::-1].index(1) if 1 in seen else len(ids)
        if 0 in seen[start:end]:
            place = start + seen[start:end].index(0)
            raise ValueError(f"attention_mask[{place}]: found 0 between ones, wanted padding at the ends alone")
        ids, labels = ids[start:end], labels[start:end]
    return ids, list(labels), IGNORE not in labels


def _integers(row: Row, column: str, length: int | None = None) -> list[int]:
    values = row[column]
    if not isinstance(values, list):
        raise ValueError(f"{column}: found {kind(values)}, wanted a list of whole numbers")
    for place, value in enumerate(values):
        if not isinstance(value, int) or (isinstance(value, bool) and column not in MASKS):
            raise ValueError(f"{column}[{place}]: found {kind(value)}, wanted a whole number")
    if length is not None and len(values) != length:
        raise ValueError(f"{column}: found {len(values)} values, wanted {length}, one for each of input_ids")
    return [int(value) for value in values]


def _check_ids(ids: list[int], labels: list[int], vocab_size: int) -> None:
    for field, tokens in (("input_ids", ids), ("labels", labels)):
        for place, token in enumerate(tokens):
            if not 0 <= token < vocab_size and not (field == "labels" and token == IGNORE):
                raise ValueError(f"{field}[{place}]: found {token}, wanted 0 to {vocab_size - 1}, the vocabulary")


def fit(ids: list[int], labels: list[int], max_length: int, whole: bool, note: Callable) -> list[dict]:
    """The documents of a row, of at most ``max_length`` tokens; none where no token is learned.

    Args:
        whole: all is learned, so that a long row may become several documents.
    """
    if len(ids) < 2:
        note("row of less than two tokens left out")
        return []
    if whole and len(ids) > max_length:
        step = max_length - 1  # the last token of a piece is the first of the next, from which its second is predicted
        starts = range(0, len(ids) - 1, step)
        note(f"row longer than max_length={max_length} split, and nothing lost", len(ids))
        return [{"input_ids": ids[i : i + max_length], "labels": labels[i : i + max_length]} for i in starts]
    learned = sum(label != IGNORE for label in labels[1:])
    kept = sum(label != IGNORE for label in labels[1:max_length])
    if not kept:
        where = (
            f"all that is learned of it lies past max_length={max_length}" if learned else "nothing in it is learned"
        )
        note(f"row left out: {where}", len(ids))
        return []
    if len(ids) > max_length:
        note(f"row cut at max_length={max_length}; tokens that were cut", len(ids) - max_length)
    return [{"input_ids": ids[:max_length], "labels": labels[:max_length]}]


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
    """Rows of one or several documents, whose positions begin again with each document.

    ``row_weights``, a row's labels over the mean of all rows, make the ``eval_loss`` of `Trainer`, a mean over rows, one over labels.
    """

    def __init__(self, rows: list[list[dict]]):
        self.rows = rows
        labels = [sum(label != IGNORE for document in row for label in document["labels"][1:]) for row in rows]
        mean = sum(labels) / max(len(labels), 1)
        self.weights = [count / mean if mean else 1.0 for count in labels]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        row = self.rows[index]
        return {
            "input_ids": [token for document in row for token in document["input_ids"]],
            # the first token of a document is nothing that the one before it could predict
            "labels": [label for document in row for label in (IGNORE, *document["labels"][1:])],
            "position_ids": [position for document in row for position in range(len(document["input_ids"]))],
            "row_weights": self.weights[index],
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

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        length = max(len(row["input_ids"]) for row in rows)
        batch: dict[str, list[torch.Tensor]] = {name: [] for name in self.fill}
        for row in rows:
            size = len(row["input_ids"])
            row = row | {"attention_mask": [1] * size}
            for name, fill in self.fill.items():
                padding = range(length - size) if fill is None else [fill] * (length - size)
                batch[name].append(torch.tensor([*row[name], *padding]))
        tensors = {name: torch.stack(parts) for name, parts in batch.items()}
        if all("row_weights" in row for row in rows):
            tensors["row_weights"] = torch.tensor([row["row_weights"] for row in rows])
        return tensors
