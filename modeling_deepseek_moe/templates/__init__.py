"""Chat templates of releases that ship none: their prompts are encoded by Python code next to the weights, which is not run.

Written as templates, they go where every template goes: ``apply_chat_template``, training, evaluation, other tools.
"""

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from modeling_deepseek_moe.checkpoint.jsonfile import read_json

_FILES = {"deepseek_v32": "deepseek_v32.jinja"}  # by model type


def released_template(model_type: str | None) -> str | None:
    """The template that stands for a release's own encoding; ``None`` where releases of this type have theirs."""
    name = _FILES.get(model_type or "")
    return None if name is None else (Path(__file__).parent / name).read_text(encoding="utf-8")


def complete_template(tokenizer: PreTrainedTokenizerBase, folder: str | Path | None = None) -> bool:
    """Give a tokenizer without a chat template that of its release, and say whether there was one to give.

    Args:
        folder: with the model's config; where the tokenizer came from unless given.

    Raises:
        ValueError: a config that is no JSON object.
    """
    file = Path(folder if folder is not None else tokenizer.name_or_path) / "config.json"
    if tokenizer.chat_template is not None or not file.is_file():
        return False
    tokenizer.chat_template = released_template(read_json(file, "a model's config").get("model_type"))
    return tokenizer.chat_template is not None
