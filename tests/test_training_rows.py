"""Rows to train on: which columns count, what is said of those that do not, and how a row that cannot be used is named."""

import json
import logging

import pytest

from modeling_deepseek_moe.cli._train_data import fit, load_documents
from modeling_deepseek_moe.tiny.recipe import make_tokenizer

ASKED = {"role": "user", "content": "Ada has 3 pens."}
SAID = {"role": "assistant", "content": "3"}
CALL = {"function": {"name": "add", "arguments": {"a": 1}}}


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(count=300)


@pytest.fixture
def said(caplog):
    """What was warned of."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def write(folder, *rows, name="rows.jsonl"):
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    (folder / name).write_bytes(b"\n".join(lines) + b"\n")
    return str(folder / name)


def learned(document):
    return [label for label in document["labels"] if label != -100]


@pytest.mark.parametrize(
    "row, ids, labels",
    [
        ({"input_ids": [5, 6, 7]}, [5, 6, 7], [5, 6, 7]),
        ({"input_ids": [5, 6, 7], "labels": [-100, -100, 7]}, [5, 6, 7], [-100, -100, 7]),
        ({"input_ids": [5, 6, 7], "completion_mask": [0, 0, 1]}, [5, 6, 7], [-100, -100, 7]),
        ({"input_ids": [5, 6, 7], "assistant_masks": [False, True, False]}, [5, 6, 7], [-100, 6, -100]),
        ({"input_ids": [2, 5, 6, 2, 2], "attention_mask": [0, 1, 1, 0, 0]}, [5, 6], [5, 6]),
        (
            {"input_ids": [2, 5, 6, 7], "attention_mask": [0, 1, 1, 1], "completion_mask": [0, 0, 0, 1]},
            [5, 6, 7],
            [-100, -100, 7],
        ),
        (
            {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "completion_mask": [1, 1, 0]},
            [5, 6, 7],
            [-100, 6, -100],
        ),
        ({"input_ids": [5, 6, 7], "labels": None, "attention_mask": None}, [5, 6, 7], [5, 6, 7]),
    ],
)
def test_masks_of_token_rows(tokenizer, tmp_path, row, ids, labels):
    assert load_documents(write(tmp_path, row), tokenizer, 64, True) == [{"input_ids": ids, "labels": labels}]


def test_rows_of_all_kinds_in_one_file(tokenizer, tmp_path):
    rows = [{"messages": [ASKED, SAID], "text": None}, {"text": "Ada", "messages": None}, {"input_ids": [5, 6]}]
    chat, text, tokens = load_documents(write(tmp_path, *rows), tokenizer, 64, True)
    assert tokenizer.decode(learned(chat)) == " 3<eos>"
    assert tokenizer.decode(text["input_ids"]) == "Ada<eos>"
    assert tokens["input_ids"] == [5, 6]


BAD = {
    "messages-null": ({"messages": None}, "messages: found null, wanted a list of messages"),
    "messages-empty": ({"messages": []}, "messages: found an empty list"),
    "messages-number": ({"messages": 3}, "messages: found a number, wanted a list of objects"),
    "messages-text": ({"messages": "hello"}, "messages: found a text that is no JSON"),
    "messages-of-texts": ({"messages": ["hello"]}, r"messages\[0\]: found a text, wanted an object"),
    "role-missing": ({"messages": [{"content": "a"}]}, r"messages\[0\].role: found none, wanted user"),
    "content-null": (
        {"messages": [ASKED, {**SAID, "content": None}]},
        r"messages\[1\].content: found null, wanted text",
    ),
    "content-missing": ({"messages": [{"role": "user"}, SAID]}, r"messages\[0\].content: found none, wanted text"),
    "content-number": ({"messages": [{**ASKED, "content": 3}]}, r"messages\[0\].content: found a number"),
    "content-image": (
        {"messages": [{**ASKED, "content": [{"type": "image"}]}, SAID]},
        r"messages\[0\].content\[0\]: found a part of type image, wanted text",
    ),
    "half-a-character": ({"messages": [ASKED, {**SAID, "content": "\ud83d"}]}, "messages: found half a character"),
    "call-without-name": (
        {"messages": [ASKED, {**SAID, "tool_calls": [{"function": {}}]}]},
        r"messages\[1\].tool_calls: found a list, wanted a list of calls with a function's name",
    ),
    "call-left-out": (
        {"messages": [ASKED, {**SAID, "tool_calls": [CALL]}]},
        r"messages\[1\].tool_calls: found a call that the chat template leaves out",
    ),
    "tools-number": ({"messages": [ASKED, SAID], "tools": 3}, "tools: found a number, wanted a list of objects"),
    "kwargs-list": (
        {"messages": [ASKED, SAID], "chat_template_kwargs": []},
        "chat_template_kwargs: found a list, wanted an object",
    ),
    "kwargs-taken": (
        {"messages": [ASKED, SAID], "chat_template_kwargs": {"tokenize": False}},
        "chat_template_kwargs: found tokenize, wanted the template's own arguments",
    ),
    "text-null": ({"text": None}, "text: found null, wanted text"),
    "text-number": ({"text": 3}, "text: found a number, wanted text"),
    "text-surrogate": ({"text": "a\udc00"}, "text: found half a character"),
    "ids-text": ({"input_ids": "5 6"}, "input_ids: found a text, wanted a list of whole numbers"),
    "ids-half": ({"input_ids": [5, 6.5]}, r"input_ids\[1\]: found a number, wanted a whole number"),
    "ids-true": ({"input_ids": [5, True]}, r"input_ids\[1\]: found true, wanted a whole number"),
    "ids-beyond": ({"input_ids": [5, 10**6]}, r"input_ids\[1\]: found 1000000, wanted 0 to \d+, the vocabulary"),
    "ids-negative": ({"input_ids": [5, -1]}, r"input_ids\[1\]: found -1, wanted 0 to"),
    "labels-short": ({"input_ids": [5, 6], "labels": [5]}, "labels: found 1 values, wanted 2, one for each"),
    "labels-beyond": ({"input_ids": [5, 6], "labels": [5, 10**6]}, r"labels\[1\]: found 1000000, wanted 0 to"),
    "mask-two": ({"input_ids": [5, 6], "completion_mask": [0, 2]}, "completion_mask: found 2, wanted 0 or 1"),
    "mask-hole": (
        {"input_ids": [5, 6, 7], "attention_mask": [1, 0, 1]},
        r"attention_mask\[1\]: found 0 between ones, wanted padding at the ends",
    ),
    "other-columns": ({"conversations": []}, r"found columns \['conversations'\], wanted one of messages, text"),
    "no-columns": ({}, r"found columns \[\], wanted one of messages, text"),
    "no-object": (b"[1, 2]", "found a list, wanted an object with named columns"),
    "cut": (b'{"text": "Ad', r"found no JSON \(Unterminated string .*\), wanted a JSON object"),
    "deep": (b"[" * 100_000, r"found no JSON \(maximum recursion"),
    "not-utf8": (b'{"text": "\xe9"}', "found byte 0xe9 after 10 others, wanted UTF-8"),
}


@pytest.mark.parametrize("row, message", BAD.values(), ids=BAD)
def test_a_bad_row_is_named(tokenizer, tmp_path, row, message):
    file = write(tmp_path, {"text": "Ada has 3 pens."}, b"", row)
    with pytest.raises(ValueError, match=rf"rows.jsonl: line 3: {message}"):
        load_documents(file, tokenizer, 64, True)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.csv", b"", r"a.csv: found .csv, wanted one of .jsonl"),
        ("a.jsonl", b"", r"a.jsonl: found 0 rows and no token to learn: it is empty"),
        ("a.jsonl", b"\r\n\n", "found 0 rows"),
        ("a.jsonl", '{"text": "a"}'.encode("utf-16"), "a.jsonl: found UTF-16, wanted UTF-8"),
        ("a.json", b'[{"text": "a"}, ', r"a.json: found no JSON"),
        ("a.json", b'[{"text": "Ada has 3"}, 4]', r"a.json: row 2: found a number, wanted an object"),
        ("a.parquet", b"PAR1", "a.parquet: found no Parquet file, or a damaged one"),
        ("a.jsonl", b'{"input_ids": [5, 6], "labels": [-100, -100]}', "found 1 row and no token to learn: .* nothing"),
    ],
)
def test_a_bad_file_is_named(tokenizer, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_documents(str(tmp_path / name), tokenizer, 64, True)


def test_a_missing_file_is_named(tokenizer, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"a\.jsonl: found no such file"):
        load_documents(str(tmp_path / "a.jsonl"), tokenizer, 64, True)
    with pytest.raises(FileNotFoundError, match="found a folder"):
        (tmp_path / "b.jsonl").mkdir()
        load_documents(str(tmp_path / "b.jsonl"), tokenizer, 64, True)


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.jsonl", b'\xef\xbb\xbf{"text": "Ada"}\r\n\r\n{"text": "pens"}'),
        ("a.json", b'[\n {"text": "Ada"},\n {"text": "pens"}\n]\n'),
        ("a.jsonl", b'[{"text": "Ada"}, {"text": "pens"}]'),
        ("a.json", b'{"text": "Ada"}\n{"text": "pens"}\n'),
        ("a.JSONL", b'{"text": "Ada"}\n{"text": "pens"}'),
        ("a.txt", b"\xef\xbb\xbfAda\r\n\npens"),
    ],
)
def test_spellings_of_a_file(tokenizer, tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    documents = load_documents(str(tmp_path / name), tokenizer, 64, True)
    assert [tokenizer.decode(document["input_ids"]) for document in documents] == ["Ada<eos>", "pens<eos>"]


def test_parquet_rows_have_no_fields_of_other_rows(tokenizer, tmp_path):
    """A table's struct has the fields of all rows: the template is to see those of this one."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    calls = [
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}
        for arguments in ({"a": 1}, {"b": "x"})
    ]
    parquet.write_table(
        pyarrow.Table.from_pylist([{"messages": [ASKED, call]} for call in calls]), tmp_path / "a.parquet"
    )
    tokenizer = make_tokenizer(count=300)
    tokenizer.chat_template = (
        "{% for m in messages %}{% generation %}{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }} "
        "{{ c.function.arguments | tojson }}{% endfor %}{% endgeneration %}{% endfor %}"
    )
    documents = load_documents(str(tmp_path / "a.parquet"), tokenizer, 64, True)
    texts = [tokenizer.decode(document["input_ids"]) for document in documents]
    assert [text.partition("f ")[2] for text in texts] == ['{"a": 1}', '{"b": "x"}']


@pytest.mark.parametrize(
    "row, message",
    [
        (
            {"text": "Ada has", "source": "x"},
            "column 'source' is not used in rows with 'text' (2 times, first in line 1)",
        ),
        ({"text": "Ada", "messages": [ASKED, SAID]}, "column 'text' is not used in rows with 'messages'"),
        ({"input_ids": [5, 6], "position_ids": [0, 1]}, "column 'position_ids' is not used"),
        ({"messages": [ASKED, SAID], "tools": [{"type": "function"}]}, "tools: the chat template does not use it"),
        (
            {"messages": [ASKED, SAID], "chat_template_kwargs": {"thinking": True}},
            "thinking: the chat template does not use it",
        ),
        (
            {"messages": [ASKED, {**SAID, "weight": 0}]},
            "weight: the chat template does not use it (2 times, first in line 1)",
        ),
        ({"input_ids": [5, 6, 7], "labels": [6, 7, -100]}, "labels are other tokens than input_ids in their places"),
    ],
)
def test_what_is_not_used_is_said(tokenizer, tmp_path, said, row, message):
    load_documents(write(tmp_path, row, row), tokenizer, 64, True)
    assert message in said.text


def test_what_a_template_leaves_out_is_said(tmp_path, said):
    tokenizer = make_tokenizer(count=300)
    tokenizer.chat_template = (
        "{% for m in messages if m.role != 'system' %}{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content.split('</think>')[-1] }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    messages = [{"role": "system", "content": "Be brief."}, ASKED, {**SAID, "content": "<think>hm</think>3"}]
    load_documents(write(tmp_path, {"messages": messages}), tokenizer, 64, True)
    assert "a message of role system: the chat template leaves it out (line 1)" in said.text
    assert "reasoning of a turn: the chat template leaves it out (line 1)" in said.text


def test_long_texts_are_split_and_every_token_is_learned_once(tokenizer, tmp_path, said):
    text = "Ada has 3 pens. " * 20
    (whole,) = load_documents(write(tmp_path, {"text": text}), tokenizer, 10_000, True)
    pieces = load_documents(write(tmp_path, {"text": text}), tokenizer, 16, True)
    assert all(2 <= len(piece["input_ids"]) <= 16 for piece in pieces)
    assert [token for piece in pieces for token in piece["input_ids"][1:]] == whole["input_ids"][1:]
    assert [label for piece in pieces for label in piece["labels"][1:]] == whole["labels"][1:]
    assert (
        f"row longer than max_length=16 split, and nothing lost (line 1; {len(whole['input_ids'])} tokens)"
        in said.text
    )


def test_cuts_of_chats_are_counted(tokenizer, tmp_path, said):
    long = {"messages": [ASKED, {**SAID, "content": "3 pens " * 20}]}
    late = {"messages": [{**ASKED, "content": "Ada has 3 pens. " * 20}, SAID]}
    size = len(load_documents(write(tmp_path, long), tokenizer, 10_000, True)[0]["input_ids"])
    documents = load_documents(write(tmp_path, long, late, {"text": ""}), tokenizer, 32, True)
    assert len(documents) == 1 and len(documents[0]["input_ids"]) == 32
    assert f"row cut at max_length=32; tokens that were cut (line 1; {size - 32} tokens)" in said.text
    assert "row left out: all that is learned of it lies past max_length=32 (line 2;" in said.text
    assert "row of less than two tokens left out (line 3)" in said.text


@pytest.mark.parametrize("size", [2, 3, 4, 5, 9, 10])
def test_pieces_of_every_size(size):
    ids = list(range(10))
    pieces = fit(ids, ids, size, True, lambda *_: None)
    assert [token for piece in pieces for token in piece["input_ids"][1:]] == ids[1:]
    assert max(len(piece["input_ids"]) for piece in pieces) <= size


def test_the_vocabulary_is_the_model_s(tokenizer, tmp_path):
    """Tokenizers are often smaller than the embedding, and may be larger than one that was not resized."""
    file = write(tmp_path, {"input_ids": [5, len(tokenizer) + 3]})
    assert load_documents(file, tokenizer, 64, True, vocab_size=len(tokenizer) + 4)
    with pytest.raises(ValueError, match=r"line 1: input_ids\[0\]: found 5, wanted 0 to 4"):
        load_documents(file, tokenizer, 64, True, vocab_size=5)
