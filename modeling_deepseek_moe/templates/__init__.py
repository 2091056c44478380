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


def complete_template(
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path | None = None,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
) -> bool:
    """Give a tokenizer without a chat template that of its release, and say whether there was one to give.

    There is none for a tokenizer that has one, for a release that comes with its own, and for a folder without a config.

    Args:
        folder: with the model's config, or a repository's name on the Hub, which is looked up in its cache; where the tokenizer
            came from unless given.
        revision, cache_dir: of that repository, as the tokenizer was loaded with; the tokenizer itself does not say.

    Raises:
        ValueError: a config that is neither in a folder nor in the cache, or a tokenizer that came from nowhere.
        CheckpointError: a config that is no JSON object.
    """
    if tokenizer.chat_template is not None:
        return False
    source = str(tokenizer.name_or_path if folder is None else folder)
    wanted = "wanted the model's config, which says whose tokenizer it is: complete_template(tokenizer, folder)"
    if not source:
        raise ValueError(f"complete_template: found a tokenizer that came from no folder, {wanted}")
    try:
        file = cached_file(source, "config.json", local_files_only=True, revision=revision, cache_dir=cache_dir)
    except OSError:
        raise ValueError(
            f"complete_template: found no folder {source!r}, and in the Hub's cache no config of {source!r} at revision "
            f"{revision or 'main'!r}, {wanted}, with the folder of the snapshot, or revision= and cache_dir= as the tokenizer had"
        ) from None
    if file is not None:
        tokenizer.chat_template = released_template(read_json(Path(file), "a model's config").get("model_type"))
    return tokenizer.chat_template is not None
