"""Ways a safetensors file is damaged: each takes its bytes and returns the damaged ones and what a message must say."""

import json


def header_of(data: bytes) -> tuple[dict, bytes]:
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def with_header(header, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def edited_entry(data, edit):
    """A header whose last tensor's entry was edited, and that tensor's name."""
    header, payload = header_of(data)
    name = max((name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"])
    edit(header[name])
    return with_header(header, payload), name


def truncated(data):
    return data[:-10], ("truncated", len(data) - 10, len(data))


def trailing(data):
    return data + b"xyz", ("trailing bytes", len(data) + 3, len(data))


def empty(data):
    return b"", ("truncated", 0)


def header_cut_short(data):
    return data[:100], ("truncated", 100)


def header_length_huge(data):
    return (2**60).to_bytes(8, "little") + data[8:], (len(data), 8 + 2**60)


def header_not_json(data):
    _, payload = header_of(data)
    return with_header(b'{"a": ', payload), ("a JSON object",)


def header_not_text(data):
    _, payload = header_of(data)
    return with_header(b"\xff\xfe\xfd\xfc", payload), ("a JSON object",)


def header_a_list(data):
    _, payload = header_of(data)
    return with_header(b"[]", payload), ("a JSON object",)


def header_nested_deeply(data):
    _, payload = header_of(data)
    return with_header(b'{"a":' * 100_000, payload), ("a JSON object",)


def header_without_dtype(data):
    damaged, name = edited_entry(data, lambda entry: entry.pop("dtype"))
    return damaged, (name, "dtype, shape, data_offsets")


def unknown_dtype(data):
    damaged, name = edited_entry(data, lambda entry: entry.update(dtype=["F128"]))
    return damaged, (name, "F128", "BF16")


def negative_offsets(data):
    damaged, name = edited_entry(data, lambda entry: entry.update(data_offsets=[-8, entry["data_offsets"][1]]))
    return damaged, (name, "-8", "non-negative")


def offsets_overlap(data):
    def edit(entry):
        entry["data_offsets"] = [offset - 2 for offset in entry["data_offsets"]]

    damaged, name = edited_entry(data, edit)
    return damaged, (name, "data at byte")


def wrong_byte_count(data):
    damaged, name = edited_entry(data, lambda entry: entry["shape"].insert(0, 3))
    return damaged, (name, "bytes", "[3, ")


DAMAGES = (
    truncated,
    trailing,
    empty,
    header_cut_short,
    header_length_huge,
    header_not_json,
    header_not_text,
    header_a_list,
    header_nested_deeply,
    header_without_dtype,
    unknown_dtype,
    negative_offsets,
    offsets_overlap,
    wrong_byte_count,
)
