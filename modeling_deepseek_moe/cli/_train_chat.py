"""One row of chat as tokens and labels: its messages checked, rendered by the tokenizer's template, what the assistant says marked."""

import functools
import inspect
import itertools
import json
import re
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedTokenizerBase

from modeling_deepseek_moe.cli._train_rows import Row, kind
from modeling_deepseek_moe.cli._train_spans import (
    REASONING,
    Message,
    RenderError,
    Span,
    changed,
    changed_call,
    find_spans,
    mark,
)
from modeling_deepseek_moe.objective import IGNORE

CHAT_COLUMNS = {"messages", "tools", "chat_template_kwargs"}
# Those that are looked for in the chat itself, and names that only tie calls to results.
MESSAGE_FIELDS = {"role", "content", "tool_calls", "tool_call_id", "id", *REASONING}
# What a template, a sandbox for strangers' code, raises: jinja2's own errors are added where it is imported.
TEMPLATE_ERRORS = (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RecursionError)
WAY_OUT = "mark what the assistant says with {% generation %} ... {% endgeneration %}, or train on whole chats with --assistant_only_loss false"
Note = Callable[[str], None]


def encode_chat(
    row: Row, tokenizer: PreTrainedTokenizerBase, assistant_only: bool, note: Note
) -> tuple[list[int], list[int]]:
    """Token ids of a chat, and labels: of the assistant's turns, or of all.

    Args:
        note: told what of the row the template does not use.

    Raises:
        ValueError: the field, what it holds and what is wanted; the place of the row is for the caller to add.
    """
    messages, settings = read_messages(row), read_settings(row)
    if tokenizer.chat_template is None:
        raise ValueError("messages: found no chat template in the tokenizer, wanted one")
    template = tokenizer.get_chat_template(settings.get("chat_template"), settings.get("tools"))
    fields = {name for message in messages for name in message} - MESSAGE_FIELDS
    for name in sorted((settings.keys() | fields) - {"chat_template"}):
        if not re.search(rf"\b{re.escape(name)}\b", template):
            note(f"{name}: the chat template does not use it")
    from jinja2 import TemplateError

    def render(messages: list[Message], prompt: bool) -> str:
        try:
            return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt, **settings)
        except (TemplateError, *TEMPLATE_ERRORS) as error:
            raise RenderError(f"the chat template cannot render them ({error})") from None

    messages = _with_rendered_calls(messages, render)
    try:
        text = render(messages, False)
    except RenderError as error:
        raise ValueError(f"messages: {error}") from None
    check_text(text, "messages")
    _note_what_is_left_out(text, messages, render, note)
    if not assistant_only:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        return ids, list(ids)
    if has_marks(template) and tokenizer.is_fast:
        encoded = tokenizer.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True, **settings
        )
        ids, said = encoded["input_ids"], encoded["assistant_masks"]
    else:
        try:
            spans = find_spans(text, messages, render, functools.cache(lambda text: _cuts(text, tokenizer)))
        except RenderError as error:
            raise ValueError(f"messages: the chat template has no generation marks, and {error}: {WAY_OUT}") from None
        ids, said = mask_spans(text, spans, tokenizer)
    return ids, [token if learned else IGNORE for token, learned in zip(ids, said, strict=True)]


def read_messages(row: Row) -> list[Message]:
    """The column ``messages``, null fields left out, contents in parts joined, null next to tool calls as empty text.

    Raises:
        ValueError: as `encode_chat`.
    """
    messages = _list_of_objects(row, "messages")
    if not messages:
        raise ValueError("messages: found an empty list, wanted messages")
    return [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _message(message: dict, field: str) -> Message:
    message = {name: value for name, value in message.items() if value is not None or name == "content"}
    role = message.get("role")
    if not isinstance(role, str):
        raise ValueError(f"{field}.role: found {_found(message, 'role')}, wanted user, assistant, system or tool")
    calls = message.pop("tool_calls", None) or None
    if calls is not None:
        if not isinstance(calls, list) or not all(_is_call(call) for call in calls):
            raise ValueError(f"{field}.tool_calls: found {kind(calls)}, wanted a list of calls with a function's name")
        message["tool_calls"] = calls
    content = message.get("content")
    if isinstance(content, list):
        for number, part in enumerate(content):
            if not (isinstance(part, dict) and isinstance(part.get("text"), str)):
                found = f"a part of type {part['type']}" if isinstance(part, dict) and "type" in part else kind(part)
                raise ValueError(f"{field}.content[{number}]: found {found}, wanted text")
        content = "".join(part["text"] for part in content)
    if content is None and calls:
        content = ""  # as the templates of DeepSeek write it; transformers 5.24 hides a null from them
    if not isinstance(content, str):
        raise ValueError(f"{field}.content: found {_found(message, 'content')}, wanted text")
    return message | {"content": content}


def _is_call(call: Any) -> bool:
    function = call.get("function", call) if isinstance(call, dict) else None
    return isinstance(function, dict) and isinstance(function.get("name"), str)


def _found(fields: dict, name: str) -> str:
    return kind(fields[name]) if name in fields else "none"


def _list_of_objects(row: Row, column: str) -> list[dict]:
    value = row[column]
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(f"{column}: found a text that is no JSON ({error}), wanted a list of objects") from None
    if not isinstance(value, list):
        raise ValueError(f"{column}: found {kind(value)}, wanted a list of objects")
    for index, part in enumerate(value):
        if not isinstance(part, dict):
            raise ValueError(f"{column}[{index}]: found {kind(part)}, wanted an object")
    return value


def read_settings(row: Row) -> dict:
    """The columns ``tools`` and ``chat_template_kwargs`` as arguments of ``apply_chat_template``.

    Raises:
        ValueError: as `encode_chat`.
    """
    settings = row.get("chat_template_kwargs")
    if isinstance(settings, str):
        try:
            settings = json.loads(settings)
        except ValueError as error:
            raise ValueError(
                f"chat_template_kwargs: found a text that is no JSON ({error}), wanted an object"
            ) from None
    if settings is None:
        settings = {}
    if not isinstance(settings, dict):
        raise ValueError(f"chat_template_kwargs: found {kind(settings)}, wanted an object")
    taken = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters.keys() - {
        "documents",
        "chat_template",
    }
    refused = sorted(settings.keys() & (taken | {"messages"}))
    if refused:
        raise ValueError(f"chat_template_kwargs: found {', '.join(refused)}, wanted the template's own arguments")
    settings = {name: value for name, value in settings.items() if value is not None}
    if row.get("tools") is not None and (tools := _list_of_objects(row, "tools")):
        settings["tools"] = tools
    return settings


def _with_rendered_calls(messages: list[Message], render: Callable[[list[Message], bool], str]) -> list[Message]:
    """Tool calls' arguments in the form, object or text, that the template puts into the chat."""
    calling = [index for index, message in enumerate(messages) if "tool_calls" in message]
    if not calling:
        return messages
    first = f"messages[{calling[0]}].tool_calls"
    fault = f"{first}: found a call that the chat template leaves out, wanted a template for tools"
    for convert in (lambda arguments: arguments, _as_text, _as_object):
        try:
            form = _converted(messages, convert)
            calls = iter(range(sum(len(messages[index]["tool_calls"]) for index in calling)))
            marked = [
                message | {"tool_calls": [changed_call(call, mark(next(calls))) for call in message["tool_calls"]]}
                if "tool_calls" in message
                else message
                for message in form
            ]
            text = render(marked, False)
            render(form, False)
        except RenderError as error:
            fault = f"{first}: {error}"
            continue
        wanted = 2 if _has_arguments(form) else 1
        total = sum(len(messages[index]["tool_calls"]) for index in calling)
        if all(text.count(mark(number)) >= wanted for number in range(total)):
            return form
    raise ValueError(fault)


def _converted(messages: list[Message], convert: Callable[[Any], Any]) -> list[Message]:
    def call_converted(call: dict) -> dict:
        function = call.get("function", call)
        if "arguments" in function:
            function = function | {"arguments": convert(function["arguments"])}
        return call | {"function": function} if "function" in call else function

    return [
        message | {"tool_calls": [call_converted(call) for call in message["tool_calls"]]}
        if "tool_calls" in message
        else message
        for message in messages
    ]


def _has_arguments(messages: list[Message]) -> bool:
    calls = (call for message in messages for call in message.get("tool_calls", ()))
    return all("arguments" in call.get("function", call) for call in calls)


def _as_text(arguments: Any) -> Any:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _as_object(arguments: Any) -> Any:
    if not isinstance(arguments, str):
        return arguments
    try:
        return json.loads(arguments)
    except ValueError as error:
        raise RenderError(f"found arguments that are no JSON ({error}), which the chat template wants") from None


def _note_what_is_left_out(text: str, messages: list[Message], render: Callable, note: Note) -> None:
    """Messages whose words, and turns whose reasoning, the template does not put into the chat."""
    try:
        marked = render([changed(message, index) for index, message in enumerate(messages)], False)
    except RenderError:  # of marks it cannot be told
        return
    for index, message in enumerate(messages):
        if mark(index) not in marked:
            note(f"a message of role {message['role']}: the chat template leaves it out")
        before, _, rest = message["content"].partition("</think>")
        reasoning = [before] if rest else []
        reasoning += [message[name] for name in REASONING if isinstance(message.get(name), str)]
        if message["role"] == "assistant" and any(part.strip() not in text for part in reasoning):
            note("reasoning of a turn: the chat template leaves it out")


def has_marks(template: str) -> bool:
    """Whether a template has ``{% generation %}`` in any spelling, comments and raw text not counted."""
    from jinja2 import Environment

    tokens = [(name, value) for _, name, value in Environment().lex(template) if name != "whitespace"]
    return any(
        first[0] == "block_begin" and second == ("name", "generation") for first, second in itertools.pairwise(tokens)
    )


def check_text(text: str, field: str) -> None:
    """Refuse what has no UTF-8.

    Raises:
        ValueError: a surrogate, half of a character that JSON has cut.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{field}: found half a character ({text[error.start]!r}), wanted text") from None


def mask_spans(text: str, spans: list[Span], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    """Token ids of the text, and which of them reach into a span.

    Raises:
        ValueError: a tokenizer without offsets whose tokens cross a span's edge.
    """
    if tokenizer.is_fast:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        offsets = encoded["offset_mapping"]
        said = [any(begin < stop and start < end for begin, end in spans) for start, stop in offsets]
        return encoded["input_ids"], said
    ids, said = [], []
    edges = [0, *(edge for span in spans for edge in span), len(text)]
    for number, (start, end) in enumerate(itertools.pairwise(edges)):
        piece = tokenizer(text[start:end], add_special_tokens=False).input_ids if start < end else []
        ids += piece
        said += [number % 2 == 1] * len(piece)
    if ids != tokenizer(text, add_special_tokens=False).input_ids:
        raise ValueError(f"messages: tokens of {type(tokenizer).__name__} cross the edge of a turn: {WAY_OUT}")
    return ids, said


def _cuts(text: str, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    if not tokenizer.is_fast:
        return set(range(len(text) + 1))
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return {edge for offset in offsets for edge in offset}
