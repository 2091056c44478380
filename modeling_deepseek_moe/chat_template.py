"""The arguments that a chat template takes of its own, such as V3.1's ``thinking``, how its prompts end, and answers as it takes them."""

import inspect

from transformers import PreTrainedTokenizerBase

THINK, THINK_END = "<think>", "</think>"
THINKING = ("thinking", "enable_thinking")  # what templates call the choice: DeepSeek's and Kimi's, others'
_PASSED_ON = ("tools", "documents")  # of `apply_chat_template`'s own, what goes to the template as it is


def taken_arguments(tokenizer: PreTrainedTokenizerBase, offered: dict) -> dict:
    """Those of ``offered`` that the tokenizer's chat template reads."""
    read = _names(tokenizer)
    return {name: value for name, value in offered.items() if name in read}


def check_arguments(tokenizer: PreTrainedTokenizerBase, given: dict) -> None:
    """
    Raises:
        ValueError: an argument that the chat template does not read, or that decides how it is rendered.
    """
    own = inspect.signature(tokenizer.apply_chat_template).parameters.keys() - {*_PASSED_ON, "kwargs", "self"}
    read = _names(tokenizer)
    for name in given:
        if name in own or name == "messages":
            raise ValueError(f"template arguments: found {name!r}, which is set here; wanted the template's own")
        if name not in read:
            raise ValueError(
                f"template arguments: found {name!r}, which the chat template of {tokenizer.name_or_path or 'the tokenizer'} "
                "does not read; wanted a variable of it"
            )


def thinking_arguments(tokenizer: PreTrainedTokenizerBase, on: bool) -> dict:
    """The choice between thinking and none, under the name that the chat template has for it.

    Raises:
        ValueError: the template leaves no choice.
    """
    taken = taken_arguments(tokenizer, dict.fromkeys(THINKING, on))
    if not taken:
        raise ValueError(
            f"thinking {'on' if on else 'off'}: found a chat template of {tokenizer.name_or_path or 'the tokenizer'} that "
            f"reads neither {' nor '.join(THINKING)}, wanted one with that choice"
        )
    return taken


def answer_message(tokenizer: PreTrainedTokenizerBase, prompt: str, text: str) -> dict[str, str]:
    """An answer as a message, for the next turn: what was thought apart where the chat template reads it apart, as it may drop it.

    Args:
        prompt: its end at least, where a thought may have begun.
    """
    thinks = THINK_END in text or end_mark(prompt) == THINK
    if not thinks or "reasoning_content" not in tokenizer.get_chat_template():
        return {"role": "assistant", "content": text}
    thought, _, said = text.partition(THINK_END)  # one that was cut off is all thought
    return {"role": "assistant", "content": said, "reasoning_content": thought.strip().removeprefix(THINK)}


def prompt_end(tokenizer: PreTrainedTokenizerBase, arguments: dict) -> str:
    """The thinking mark that a prompt ends with, ``<think>`` or ``</think>``; ``""`` without one.

    Raises:
        ValueError: the template cannot be rendered with the arguments.
    """
    import jinja2

    turn = [{"role": "user", "content": "Hello"}]
    try:
        prompt = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True, **arguments)
    except (jinja2.TemplateError, TypeError) as error:  # what a template computes with an argument of another kind
        raise ValueError(f"{tokenizer.name_or_path}: the chat template with {arguments}: {error}") from None
    return end_mark(prompt)


def end_mark(prompt: str) -> str:
    """The same, of a prompt."""
    return next((mark for mark in (THINK_END, THINK) if prompt.rstrip().endswith(mark)), "")


def _names(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """What the template names outside its text; attributes are not names. Read by token: transformers adds statements of its own."""
    import jinja2

    template = tokenizer.get_chat_template()
    tokens = [(kind, text) for _, kind, text in jinja2.Environment().lex(template) if kind != "whitespace"]
    before = [("", ""), *tokens]
    return {text for (_, last), (kind, text) in zip(before, tokens, strict=False) if kind == "name" and last != "."}
