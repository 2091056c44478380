"""What ``deepseek-moe train`` does: options to a model, rows, callbacks and the plain `Trainer`."""

from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    FineGrainedFP8Config,
    HfArgumentParser,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from modeling_deepseek_moe.cli._console import stdout
from modeling_deepseek_moe.cli._model import load_tokenizer
from modeling_deepseek_moe.cli._train_data import Collator, Rows, load_documents, pack
from modeling_deepseek_moe.config import own_format
from modeling_deepseek_moe.formats import WeightFormat
from modeling_deepseek_moe.training import (
    BalanceLossCallback,
    Fp8TrainingConfig,
    LoadBalanceCallback,
    MoeTelemetryCallback,
    MtpLossCallback,
    bf16_moments,
    prepare_fp8_training,
)

DTYPES = ("float32", "bfloat16")


@dataclass
class RunOptions:
    """Everything that is not one of transformers' `TrainingArguments`."""

    model: str | None = None
    config: str | None = None
    tokenizer: str | None = None
    trust_remote_code: bool = False
    dtype: str = "float32"
    bf16_moments: bool = False
    train_file: str | None = None
    eval_file: str | None = None
    max_length: int = 1024
    packing: bool = False
    assistant_only_loss: bool = True
    load_balance_gamma: float = 0.001
    load_balance_until: float = 1.0
    balance_alpha: float = 0.0001
    mtp_weight: float = 0.3
    mtp_later_weight: float = 0.1
    mtp_switch_at: float = 10 / 14.8
    fp8: bool = False
    fp8_wgrad: bool = True

    def __post_init__(self):
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


def read_options(recipe: Path | None, arguments: list[str]) -> tuple[RunOptions, TrainingArguments]:
    """The options of a YAML file, and flags, which win.

    Raises:
        ValueError: an option that does not exist, or a file that holds none.
    """
    parser = HfArgumentParser((RunOptions, TrainingArguments), exit_on_error=False)
    known = {action.dest for action in parser._actions}
    if recipe is not None:
        fields = yaml.safe_load(recipe.read_text(encoding="utf-8"))
        if not isinstance(fields, dict):
            raise ValueError(f"{recipe}: found {type(fields).__name__}, wanted options by name")
        unknown = sorted(fields.keys() - known)
        if unknown:
            raise ValueError(f"{recipe}: found {', '.join(unknown)}, wanted options of train or of TrainingArguments")
        # YAML reads 1e-4 as a text, which argparse converts like a flag's
        parser.set_defaults(**fields)
    options, training, rest = parser.parse_args_into_dataclasses(arguments, return_remaining_strings=True)
    if rest:
        raise ValueError(f"found {' '.join(rest)}, wanted options of train or of TrainingArguments")
    return options, training


def load(options: RunOptions) -> tuple[PreTrainedModel, WeightFormat | None]:
    """The model to train in ``dtype``, and the format of the release that it was."""
    dtype = getattr(torch, options.dtype)
    if options.model is None:
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(options.config), dtype=dtype), None
    config = AutoConfig.from_pretrained(options.model)
    form = own_format(config)
    settings = {"quantization_config": FineGrainedFP8Config(dequantize=True)} if form else {}
    return AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype, **settings), form


def make_callbacks(options: RunOptions, model: PreTrainedModel) -> list[TrainerCallback]:
    """Those parts of the recipe that are on and that the model has."""
    config = model.config
    callbacks: list[TrainerCallback] = []
    if config.n_routed_experts:
        if options.load_balance_gamma and config.topk_method == "noaux_tc":
            callbacks.append(LoadBalanceCallback(options.load_balance_gamma, options.load_balance_until))
        if options.balance_alpha:
            callbacks.append(BalanceLossCallback(options.balance_alpha))
    if options.mtp_weight and config.num_nextn_predict_layers:
        callbacks.append(MtpLossCallback(options.mtp_weight, options.mtp_later_weight, options.mtp_switch_at))
    return [*callbacks, MoeTelemetryCallback()]


def run(recipe: Path | None, arguments: list[str]) -> None:
    """The whole command."""
    options, training = read_options(recipe, arguments)
    set_seed(training.seed)
    tokenizer = load_tokenizer(Path(options.tokenizer or options.model), options.trust_remote_code)
    files = {"train": options.train_file, "eval": options.eval_file}
    rows = {}
    for part, file in files.items():
        if file is not None:
            documents = load_documents(file, tokenizer, options.max_length, options.assistant_only_loss)
            rows[part] = Rows(pack(documents, options.max_length) if options.packing else [[d] for d in documents])
    model, form = load(options)
    if options.fp8:
        prepare_fp8_training(model, Fp8TrainingConfig(options.fp8_wgrad))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    trainer = Trainer(
        model,
        training,
        train_dataset=rows["train"],
        eval_dataset=rows.get("eval"),
        data_collator=Collator(pad, options.packing),
        callbacks=make_callbacks(options, model),
        optimizer_cls_and_kwargs=bf16_moments(training) if options.bf16_moments else None,
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    if "eval" in rows:
        stdout().print(f"eval loss {trainer.evaluate()['eval_loss']:.4f}")  # every rank has its part
    trainer.save_state()
    if trainer.is_world_process_zero():
        settings = {"quantize": form.name} if form else {}
        model.save_pretrained(training.output_dir, like=options.model and _local(options.model), **settings)
        tokenizer.save_pretrained(training.output_dir)
        kind = f"{form.title} release" if form else options.dtype
        stdout().print(f"wrote {training.output_dir} ({kind}); deepseek-moe report {training.output_dir} draws it")


def _local(name: str) -> str | None:
    """The folder, or, for a name on the Hub, nothing: its files are not looked for again."""
    return name if Path(name).is_dir() else None
