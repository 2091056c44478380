"""Texts that others wrote, as HTML: escaped, their control characters shown, of bounded length, each read in its own direction."""

from html import escape

from modeling_deepseek_moe.terminal import shown

LABEL, WORDS = 120, 4000  # characters of a name, and of a sentence or a setting


def bounded(text: object, limit: int = LABEL) -> str:
    """Not escaped yet: for a script, which sets texts as texts."""
    words = str(text)
    words = words if len(words) <= limit else f"{words[: limit - 1]}…"
    return shown(words, keep="")


def plain(text: object, limit: int = LABEL) -> str:
    """For attributes, titles and SVG, which hold no elements."""
    return escape(bounded(text, limit))


def label(text: object, limit: int = LABEL) -> str:
    """A name among other words: isolated, so that one written from right to left turns nothing around it."""
    return f"<bdi>{plain(text, limit)}</bdi>"


def words(text: object) -> str:
    return label(text, WORDS)
