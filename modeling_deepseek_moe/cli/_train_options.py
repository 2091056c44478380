"""The options of ``deepseek-moe train``: a YAML file and flags, and which checkpoint it goes on from."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser, TrainingArguments

from modeling_deepseek_moe.cli._train_lora import LoraOptions
from modeling_deepseek_moe.distributed.checkpoints import checkpoints, fault_of
from modeling_deepseek_moe.indexer_loss import DENSE, SPARSE

DTYPES = ("float32", "bfloat16")
# Other defaults than Trainer's, which logs every 500 steps: a short training is to have something to report.
MODEL_DEFAULTS = {"dtype": "float32", "load_balance_gamma": 0.001, "balance_alpha": 0.0001, "mtp_weight": 0.3}
ADAPTER_DEFAULTS = {"dtype": "bfloat16", "load_balance_gamma": 0.0, "balance_alpha": 0.0, "mtp_weight": 0.0}
DEFAULTS = {"logging_steps": 10, "logging_first_step": True}


@dataclass
class RunOptions(LoraOptions):
    """Everything that is not one of transformers' `TrainingArguments`.

    ``dtype``, ``load_balance_gamma``, ``balance_alpha`` and ``mtp_weight`` are what a whole model is trained with unless they
    are given. With an adapter the base is bf16 and the recipe is off: routers and their biases are no part of it.
    """

    model: str | None = None
    config: str | None = None
    tokenizer: str | None = None
    trust_remote_code: bool = False
    dtype: str | None = None
    bf16_moments: bool = False
    train_file: str | None = None
    eval_file: str | None = None
    max_length: int = 1024
    packing: bool = False
    assistant_only_loss: bool = True
    load_balance_gamma: float | None = None
    load_balance_until: float = 1.0
    balance_alpha: float | None = None
    mtp_weight: float | None = None
    mtp_later_weight: float = 0.1
    mtp_switch_at: float = 10 / 14.8
    indexer_stage: str | None = None
    fp8: bool = False
    fp8_wgrad: bool = True
    fsdp_size: int = 1
    dp_replicate_size: int = 1
    ep_size: int = 1

    def __post_init__(self):
        super().__post_init__()
        if self.trains_adapter:
            self._check_adapter()
        for name, value in (ADAPTER_DEFAULTS if self.trains_adapter else MODEL_DEFAULTS).items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if (self.model is None) == (self.config is None):
            found = "neither" if self.model is None else "both"
            raise ValueError(
                f"found {found} of model and config, wanted one: a folder to start from, or a config.json"
            )
        if self.config is not None and self.tokenizer is None:
            raise ValueError("found a config without a tokenizer, wanted the folder of one")
        if self.train_file is None:
            raise ValueError("found no train_file, wanted JSON lines, Parquet or text")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} is not supported, wanted one of {', '.join(DTYPES)}")
        if self.indexer_stage not in (None, DENSE, SPARSE):
            raise ValueError(f"indexer_stage={self.indexer_stage!r} is not supported, wanted {DENSE!r} or {SPARSE!r}")
        if self.max_length < 2:
            raise ValueError(f"max_length={self.max_length} is too short, wanted at least 2: a token and the next")

        for name in ("fsdp_size", "dp_replicate_size", "ep_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: wanted at least 1")
        if self.config is not None and self.fsdp_size * self.ep_size > 1:
            raise ValueError("found config and fsdp_size, wanted a model: transformers shards one as it loads it")

    def _check_adapter(self):
        kind = "qlora" if self.qlora else "lora"
        if self.config is not None:
            raise ValueError(
                f"found {kind} and config, wanted a model: an adapter is trained on weights that are there"
            )
        if self.fp8:
            raise ValueError(
                f"found {kind} and fp8, wanted one: fp8 trains the weights that an adapter leaves as they are"
            )
        if self.indexer_stage:
            raise ValueError(f"found {kind} and indexer_stage, wanted one: an adapter leaves the indexers as they are")
        if self.load_balance_gamma:
            raise ValueError(
                f"found load_balance_gamma={self.load_balance_gamma} and {kind}, wanted one: the biases of routers are no part "
                "of an adapter, and would be lost"
            )


def read_options(recipe: Path | None, arguments: list[str]) -> tuple[RunOptions, TrainingArguments]:
    """The options of a YAML file, and flags, which win.

    Raises:
        ValueError: an option that does not exist, a value that it cannot have, or a file that holds none.
    """
    parser = HfArgumentParser((RunOptions, TrainingArguments), exit_on_error=False)
    parser.set_defaults(**DEFAULTS)
    if recipe is not None:
        parser.set_defaults(**_read_recipe(recipe, {action.dest for action in parser._actions}))
    source = f"{recipe} and flags" if recipe and arguments else recipe or "flags"
    try:
        options, training, rest = parser.parse_args_into_dataclasses(arguments, return_remaining_strings=True)
    except (argparse.ArgumentError, argparse.ArgumentTypeError) as error:
        raise ValueError(f"{source}: {error}") from None
    if rest:
        raise ValueError(f"found {' '.join(rest)}, wanted options of train or of TrainingArguments")
    return options, training


def _read_recipe(recipe: Path, known: set[str]) -> dict[str, Any]:
    if not recipe.is_file():
        found = "a folder" if recipe.is_dir() else "no such file"
        raise ValueError(f"{recipe}: found {found}, wanted a YAML file of options")
    try:
        fields = yaml.safe_load(recipe.read_bytes())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{recipe}: found no YAML ({error}), wanted options by name") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{recipe}: found {type(fields).__name__}, wanted options by name")
    unknown = sorted(str(name) for name in fields.keys() - known)
    if unknown:
        raise ValueError(f"{recipe}: found {', '.join(unknown)}, wanted options of train or of TrainingArguments")
    # as texts, which argparse converts and checks like a flag's: YAML reads 1e-4 as a text, and 4.5 for a count
    scalars = (bool, int, float)
    return {
        name: str(value) if isinstance(value, scalars) else value
        for name, value in fields.items()
        if value is not None
    }


def checkpoint_to_resume(training: TrainingArguments, adapter: bool = False) -> str | None:
    """The folder that ``resume_from_checkpoint`` means, ``true`` being the newest of ``output_dir``; ``None`` for none.

    Args:
        adapter: it is to hold an adapter, not a model.

    Raises:
        ValueError: there is none, or it is not whole; the newest that is whole is named.
    """
    wanted = str(training.resume_from_checkpoint or "false")
    if wanted.lower() in ("false", "no", "none"):
        return None
    if wanted.lower() not in ("true", "yes"):
        checkpoint, others = Path(wanted), []
    else:
        others = checkpoints(Path(training.output_dir))
        if not others:
            raise ValueError(
                f"{training.output_dir}: found no checkpoint-N, wanted one to resume from; without resume_from_checkpoint "
                "training begins at step 0"
            )
        checkpoint = others.pop()
    fault = fault_of(checkpoint, adapter)
    if fault is None:
        return str(checkpoint)
    whole = next((str(other) for other in reversed(others) if fault_of(other, adapter) is None), None)
    way_out = f"; --resume_from_checkpoint {whole} is whole" if whole else ""
    raise ValueError(f"{checkpoint}: found {fault}, wanted a whole checkpoint to resume from{way_out}")
