"""What a conversation gives its chat template: the choice of thinking, tools, and arguments of the template's own."""

import json
from pathlib import Path
from typing import Annotated

import typer
from transformers import PreTrainedTokenizerBase

from modeling_deepseek_moe.chat_template import check_arguments, thinking_arguments
from modeling_deepseek_moe.cli._model import MODEL, read_template_arguments

ThinkingOption = Annotated[
    bool | None,
    typer.Option(
        "--thinking/--no-thinking",
        help="Whether the model thinks before it answers, where its chat template leaves the choice.",
        show_default="the template's",
        rich_help_panel=MODEL,
    ),
]
ToolsOption = Annotated[
    Path | None,
    typer.Option(
        "--tools",
        help="A JSON list of tools, as in OpenAI's API, for the prompt; calls are shown, and /tool gives them results.",
        show_default=False,
        rich_help_panel=MODEL,
    ),
]


def template_arguments(
    tokenizer: PreTrainedTokenizerBase, given: str | None, thinking: bool | None, tools: Path | None
) -> dict:
    """Of ``--template-args``, ``--thinking`` and ``--tools``.

    Raises:
        ValueError: an argument twice, one that the template does not read, or a file that lists no tools.
    """
    arguments = read_template_arguments(given) or {}
    named = (
        {}
        if thinking is None
        else {name: ("--thinking", value) for name, value in thinking_arguments(tokenizer, thinking).items()}
    )
    if tools is not None:
        named["tools"] = ("--tools", read_tools(tools))
    for name, (option, value) in named.items():
        if name in arguments:
            raise ValueError(f"--template-args: found {name!r} and {option}, wanted one of them")
        arguments[name] = value
    check_arguments(tokenizer, arguments)
    return arguments


def read_tools(file: Path) -> list[dict]:
    """
    Raises:
        ValueError: no JSON list of objects that name a function.
    """
    try:
        tools = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"--tools {file}: found a file that cannot be read ({error.strerror}), wanted a list of tools"
        ) from None
    except ValueError as error:
        raise ValueError(f"--tools {file}: found a file that is not JSON ({error}), wanted a list of tools") from None
    if not isinstance(tools, list):
        raise ValueError(f"--tools {file}: found a {type(tools).__name__}, wanted a list of tools")
    for index, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(
                f'--tools {file}: [{index}]: found no function with a name, wanted {{"type": "function", "function": {{"name": ...}}}}'
            )
    return tools
