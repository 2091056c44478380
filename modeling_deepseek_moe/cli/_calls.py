"""Calls of tools in what a model said, as messages have them: each family writes them in marks of its own.

Arguments are what the family's chat template takes: a text of JSON where it writes the text as it is, else an object.
"""

import json
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

BAR = "\uff5c"  # of DeepSeek's marks


class Syntax(NamedTuple):
    """``section`` holds all calls of an answer, each a ``call`` with a ``name`` and a ``body``; ``arguments`` reads the body."""

    section: re.Pattern
    call: re.Pattern
    arguments: Callable[[str], str | dict]


def _json_text(body: str) -> str:
    if not isinstance(json.loads(body), dict):
        raise ValueError("arguments that are no object")
    return body


def _dsml(body: str) -> dict:
    pattern = rf'<{BAR}DSML{BAR}parameter name="([^"]*)" string="(true|false)">(.*?)</{BAR}DSML{BAR}parameter>'
    found = re.findall(pattern, body, re.DOTALL)
    return {name: value if is_text == "true" else json.loads(value) for name, is_text, value in found}


def _glm(body: str) -> dict:
    found = re.findall(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", body, re.DOTALL)
    return {name.strip(): _value(text) for name, text in found}


def _value(text: str):
    """Written alike: a text, and anything else as JSON."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return text if isinstance(value, str) else value


def _syntax(section: str, call: str, arguments: Callable[[str], str | dict]) -> Syntax:
    return Syntax(re.compile(section, re.DOTALL), re.compile(call, re.DOTALL), arguments)


_DEEPSEEK = rf"<{BAR}tool▁calls▁begin{BAR}>.*?<{BAR}tool▁calls▁end{BAR}>"
SYNTAXES = (
    _syntax(
        rf"<{BAR}DSML{BAR}function_calls>.*?</{BAR}DSML{BAR}function_calls>",  # DeepSeek-V3.2
        rf'<{BAR}DSML{BAR}invoke name="(?P<name>[^"]*)">(?P<body>.*?)</{BAR}DSML{BAR}invoke>',
        _dsml,
    ),
    _syntax(
        _DEEPSEEK,  # V3 and R1
        rf"<{BAR}tool▁call▁begin{BAR}>function<{BAR}tool▁sep{BAR}>(?P<name>[^\n]*)\n```json\n(?P<body>.*?)\n```<{BAR}tool▁call▁end{BAR}>",
        _json_text,
    ),
    _syntax(
        _DEEPSEEK,  # V3.1
        rf"<{BAR}tool▁call▁begin{BAR}>(?P<name>[^\n<]*)<{BAR}tool▁sep{BAR}>(?P<body>.*?)<{BAR}tool▁call▁end{BAR}>",
        _json_text,
    ),
    _syntax(
        r"<\|tool_calls_section_begin\|>.*?<\|tool_calls_section_end\|>",  # Kimi-K2
        r"<\|tool_call_begin\|>(?P<id>[^<]*)<\|tool_call_argument_begin\|>(?P<body>.*?)<\|tool_call_end\|>",
        _json_text,
    ),
    _syntax(
        r"<tool_call>.*</tool_call>",  # GLM-4.5 and later
        r"<tool_call>(?P<name>[^<]*)(?P<body>.*?)</tool_call>",
        _glm,
    ),
)


def with_calls(message: dict) -> dict:
    """An answer whose calls are apart, in ``tool_calls``; as it was where none are found, or one cannot be read."""
    for syntax in SYNTAXES:
        section = syntax.section.search(message["content"])
        if section is None or message["content"][section.end() :].strip():  # or one is cut off
            continue
        try:
            calls = list(_calls(syntax, section[0]))
        except ValueError:  # what the model wrote is no JSON
            continue
        if calls:
            return message | {"content": message["content"][: section.start()].rstrip(), "tool_calls": calls}
    return message


def _calls(syntax: Syntax, section: str) -> Iterator[dict]:
    for number, found in enumerate(syntax.call.finditer(section)):
        parts = found.groupdict()
        mark = parts.get("id")  # Kimi's own: functions.name:number
        name = parts["name"].strip() if mark is None else mark.strip().removeprefix("functions.").rpartition(":")[0]
        function = {"name": name, "arguments": syntax.arguments(parts["body"].strip())}
        yield {"id": f"call_{number}" if mark is None else mark.strip(), "type": "function", "function": function}


def result_message(answer: dict, number: int, text: str) -> dict:
    """The result of an answer's call of that number, from 0, as a template reads it."""
    message = {"role": "tool", "content": text}
    calls = answer.get("tool_calls")
    if not calls:  # in marks that are not known: the template says what it makes of it
        return message
    return message | {"tool_call_id": calls[number]["id"], "name": calls[number]["function"]["name"]}
