"""The remote-code shim: with it a saved folder finds this package under ``trust_remote_code=True``.

transformers copies a repository's code files flat and imports them; the one file written here only imports the
installed package, so loading with and without remote code gives the same classes.
"""

from transformers import PreTrainedModel

SHIM_NAME = "hub_deepseek_moe"
_HEADS = ("Model", "ForCausalLM", "ForSequenceClassification", "ForTokenClassification")


def auto_map(model_class: type[PreTrainedModel]) -> dict[str, str]:
    """``auto_map`` of a config saved from ``model_class``."""
    config = model_class.config_class.__name__
    family = config.removesuffix("Config")
    entries = {"AutoConfig": f"{SHIM_NAME}.{config}", "AutoModel": f"{SHIM_NAME}.{family}Model"}
    return entries | {f"AutoModel{head}": f"{SHIM_NAME}.{family}{head}" for head in _HEADS[1:]}


def shim_files() -> dict[str, str]:
    """The shim's text by file name."""
    return {
        f"{SHIM_NAME}.py": "from modeling_deepseek_moe import *  # noqa: F403 (pip install modeling_deepseek_moe)\n"
    }
