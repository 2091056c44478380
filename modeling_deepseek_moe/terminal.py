"""Texts that others wrote, made harmless for a terminal: control characters are shown, not obeyed.

An escape sequence in a model's output or a tensor's name can rename a window, write to the clipboard or rewrite lines above;
bidirectional controls make a text read other than it is.
"""

import re

# C0, DEL, C1; the bidirectional controls; line and paragraph separators; halves of surrogate pairs, which no encoding takes
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def shown(text: str, keep: str = "\n\t") -> str:
    r"""``text`` with each control character as ``\u001b``, which JSON reads back; those of ``keep`` stay."""
    return _CONTROLS.sub(lambda match: match[0] if match[0] in keep else f"\\u{ord(match[0]):04x}", text)
