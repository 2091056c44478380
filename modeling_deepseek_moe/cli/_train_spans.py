"""Where the assistant speaks in a rendered chat, for templates without ``{% generation %}`` marks: by rendering and comparing.

A turn begins where the prompt for it ends (the messages before it, with ``add_generation_prompt``), and ends where the chat up to it ends.
Where these are no beginnings of the whole chat (templates that drop the reasoning of earlier turns, open the last turn otherwise,
close a chat by a token of its own), the turn is told by what changes with its words. What is found is tested: nothing outside may depend
on what the assistant says, nothing inside on what others say.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

Message = dict[str, Any]
Span = tuple[int, int]
Render = Callable[[list[Message], bool], str]  # messages, add_generation_prompt
Cuts = Callable[[str], set[int]]
REASONING = ("reasoning_content", "reasoning", "thinking")
MARK = "\ue0a5{}\ue0a6"  # of the private use area, which texts do not use


class RenderError(ValueError):
    """A chat template that cannot render these messages."""


def mark(number: int) -> str:
    return MARK.format(number)


def changed(message: Message, number: int = 0, reasoning: bool = False) -> Message:
    """The message with all that it says replaced by a mark.

    Args:
        reasoning: give it reasoning, if it has none.
    """
    text = mark(number)
    other = message | {"content": text} | {name: text for name in REASONING if message.get(name)}
    if reasoning and not any(message.get(name) for name in REASONING):
        other[REASONING[0]] = text
    if "tool_calls" in message:
        other["tool_calls"] = [changed_call(call, text) for call in message["tool_calls"]]
    return other


def changed_call(call: dict, text: str) -> dict:
    function = call.get("function", call)
    arguments = function.get("arguments")
    function = function | {"name": text, "arguments": {text: text} if isinstance(arguments, dict) else text}
    return call | {"function": function} if "function" in call else function


def find_spans(text: str, messages: list[Message], render: Render, cuts: Cuts) -> list[Span]:
    """``[(start, end), ...]`` in ``text``, the rendered chat: one for each turn of the assistant that is in it.

    Args:
        cuts: where tokens begin and end in a text.

    Raises:
        RenderError: turns that cannot be told from what is around them.
    """
    spans = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            span = _span(text, messages, index, render, cuts)
            if span is not None:
                spans.append(span)
    _check(text, spans, messages, render)
    return [span for span in spans if span[0] < span[1]]


def _span(text: str, messages: list[Message], index: int, render: Render, cuts: Cuts) -> Span | None:
    prompt = _attempt(render, messages[:index], True) if index else None
    turn = text if index + 1 == len(messages) else _attempt(render, messages[: index + 1], False)
    if prompt is not None and turn is not None and turn.startswith(prompt) and text.startswith(turn):
        return len(prompt), len(turn)
    others = list(_variants(text, messages, index, render))
    if not others:  # the template leaves the turn out
        return None
    if prompt is not None and text.startswith(prompt):
        start = len(prompt)
    else:
        start = _start(text, others, render, cuts)
    end = len(text) - _shared(text[::-1], others[0][::-1])
    changed_turn = _attempt(render, [*messages[:index], changed(messages[index])], False)
    if turn is None or changed_turn is None:
        return start, max(start, end)
    begin = len(turn) - _shared(turn[::-1], changed_turn[::-1])
    return start, max(start, end + _shared_tokens(text, end, turn, begin, cuts))


def _start(text: str, others: list[str], render: Render, cuts: Cuts) -> int:
    """Where a turn begins whose prompt the chat does not begin with: at its first word, or where the chat would go on otherwise."""
    differs = [(_shared(text, other), other) for other in others]
    words = [place for place, other in differs if other[place:].startswith(MARK[0])]
    start = min([*words, *(_shared_tokens(text, 0, other, 0, cuts) for place, other in differs if place not in words)])
    question = [{"role": "user", "content": mark(0)}]
    asked, prompted = _attempt(render, question, False), _attempt(render, question, True)
    if asked is None or prompted is None or not prompted.startswith(asked):
        return start
    before, prompt = text[:start].rstrip(), prompted[len(asked) :]
    if prompt and before.endswith(prompt):
        return len(before)  # a blank after the prompt is the turn's own, as in V2's template
    # where the chats part may lie within the prompt, if what else stands there begins by the same characters
    places = range(max(0, start - len(prompt)), start + 1)
    across = [at for at in places if at + _shared(text[at : at + len(prompt)], prompt) > start]
    opened = [at + _shared_tokens(text, at, prompted, len(asked), cuts) for at in across]
    return min([max([start, *opened]), *(place for place in words if place >= start)])


def _shared_tokens(text: str, place: int, other: str, begin: int, cuts: Cuts) -> int:
    """Characters alike from ``text[place:]`` and ``other[begin:]`` on, in whole tokens, or to the end of ``other``.

    Two tokens may begin by the same "<".
    """
    shared = _shared(text[place:], other[begin:])
    if shared == len(other) - begin:
        return shared
    both = {cut - place for cut in cuts(text)} & {cut - begin for cut in cuts(other)}
    return max((cut for cut in both if 0 <= cut <= shared), default=0)


def _variants(text: str, messages: list[Message], index: int, render: Render) -> Iterator[str]:
    """The chat with the turn's words replaced: with its calls, without them, and with reasoning."""
    message = messages[index]
    replaced = [changed(message)]
    if "tool_calls" in message:
        replaced.append({name: value for name, value in replaced[0].items() if name != "tool_calls"})
    replaced.append(changed(message, reasoning=True))
    for other in replaced:
        rendered = _attempt(render, [*messages[:index], other, *messages[index + 1 :]], False)
        if rendered is not None and rendered != text:
            yield rendered


def _check(text: str, spans: list[Span], messages: list[Message], render: Render) -> None:
    edges = [0, *(edge for span in spans for edge in span), len(text)]
    if edges != sorted(edges):
        raise RenderError("its turns come in another order than the messages")
    pieces = [text[start:end] for start, end in itertools.pairwise(edges)]
    is_own = [message["role"] == "assistant" for message in messages]
    for own, kept, fault in (
        (True, pieces[::2], "what stands around the assistant's turns changes with their words"),
        (False, pieces[1::2], "what the assistant says changes with the words of others"),
    ):
        replaced = [changed(message) if is_own[i] is own else message for i, message in enumerate(messages)]
        other = _attempt(render, replaced, False)
        if other is not None and not _in_order(kept, other, at_ends=own):
            raise RenderError(fault)


def _in_order(pieces: list[str], text: str, at_ends: bool) -> bool:
    if at_ends and not (text.startswith(pieces[0]) and text.endswith(pieces[-1])):
        return False
    position = 0
    for piece in pieces:
        found = text.find(piece, position)
        if found < 0:
            return False
        position = found + len(piece)
    return True


def _attempt(render: Render, messages: list[Message], prompt: bool) -> str | None:
    """What the template makes of messages made up here, which it may well refuse."""
    try:
        return render(messages, prompt)
    except RenderError:
        return None


def _shared(first: str, second: str) -> int:
    """Characters that two texts begin with alike."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(first), len(second)))
