"""Chat templates of releases that ship none: their prompts are encoded by Python code next to the weights, which is not run.

Written as templates, they go where every template goes: ``apply_chat_template``, training, evaluation, other tools.
"""

from pathlib import Path

from transformers import PreTrainedTokenizerBase
from transformers.utils import cached_file

from modeling_deepseek_moe.checkpoint.jsonfile import read_json

_FILES = {"deepseek_v32": "deepseek_v32.jinja"}  # by model type


def released_template(model_type: str | None) -> str | None:
    """The template that stands for a release's own encoding; ``None`` where releases of this type have theirs."""
    name = _FILES.get(model_type or "")
    return None if name is None else (Path(__file__).parent / name).read_text(encoding="utf-8")


def complete_template(tokenizer: PreTrainedTokenizerBase, folder: str | Path | None = None) -> bool:
    """Give a tokenizer without a chat template that of its release, and say whether there was one to give.

    There is none for a tokenizer that has one, for a release that comes with its own, and for a folder without a config.

    Args:
        folder: with the model's config, or a repository's name on the Hub, which is looked up in its cache; where the tokenizer
            came from unless given.

    Raises:
        ValueError: a config that is no JSON object, or that is neither in a folder nor in the cache.
    """
    if tokenizer.chat_template is not None:
        return False
    source = tokenizer.name_or_path if folder is None else folder
    try:
        file = cached_file(source, "config.json", local_files_only=True)
    except OSError:
        raise ValueError(
            f"complete_template: found no folder {str(source)!r} and no config of that name in the Hub's cache, wanted the model's "
            "config, which says whose tokenizer it is: complete_template(tokenizer, folder)"
        ) from None
    if file is not None:
        tokenizer.chat_template = released_template(read_json(Path(file), "a model's config").get("model_type"))
    return tokenizer.chat_template is not None
