"""What ``deepseek-moe train`` does: options to a model, rows, callbacks and the plain `Trainer`."""

from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    FineGrainedFP8Config,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import IntervalStrategy

from modeling_deepseek_moe.anatomy import read_config
from modeling_deepseek_moe.cli._console import count, stderr, stdout
from modeling_deepseek_moe.cli._model import load_tokenizer
from modeling_deepseek_moe.cli._train_data import Collator, Rows, load_documents, pack
from modeling_deepseek_moe.cli._train_lora import add_adapter, check_rank, four_bit
from modeling_deepseek_moe.cli._train_options import RunOptions, checkpoint_to_resume, read_options
from modeling_deepseek_moe.cli._train_ranks import check_agreement, distributed_settings, is_in_parts
from modeling_deepseek_moe.config import own_format
from modeling_deepseek_moe.formats import WeightFormat
from modeling_deepseek_moe.indexer_loss import DENSE
from modeling_deepseek_moe.training import (
    BalanceLossCallback,
    Fp8TrainingConfig,
    IndexerLossCallback,
    LoadBalanceCallback,
    MoeTelemetryCallback,
    MtpLossCallback,
    ShardedTrainingCallback,
    bf16_moments,
    prepare_fp8_training,
)
from modeling_deepseek_moe.training.sharded import is_sharded_by_transformers


class LogLastStep(TrainerCallback):
    """Logs the last step too, whatever ``logging_steps`` is, so that a report ends where the training did."""

    def on_step_end(self, args, state, control, **kwargs):
        if args.logging_strategy == IntervalStrategy.STEPS and state.global_step >= state.max_steps:
            control.should_log = True


def load(options: RunOptions) -> tuple[PreTrainedModel, WeightFormat | None]:
    """The model to train in ``dtype``, and the format of the release that it was.

    Beneath an adapter the weights stay what they are, or become 4-bit codes; MTP layers that are not trained are not loaded.
    """
    dtype = getattr(torch, options.dtype)
    in_parts = distributed_settings(options)
    if options.trains_adapter:
        settings = in_parts | ({"quantization_config": four_bit(dtype)} if options.qlora else {})
        if not options.mtp_weight:
            settings["num_nextn_predict_layers"] = 0
        return AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype, **settings), None
    if options.model is None:
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(options.config), dtype=dtype), None
    config = AutoConfig.from_pretrained(options.model)
    form = own_format(config)
    settings = in_parts | ({"quantization_config": FineGrainedFP8Config(dequantize=True)} if form else {})
    return AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype, **settings), form


def make_callbacks(options: RunOptions, model: PreTrainedModel) -> list[TrainerCallback]:
    """Those parts of the recipe that are on and that the model has."""
    config = model.config
    if options.indexer_stage == DENSE:  # nothing else learns: loads and losses of the model move nothing
        return [IndexerLossCallback(DENSE), MoeTelemetryCallback(), LogLastStep()]
    callbacks: list[TrainerCallback] = [IndexerLossCallback()] if options.indexer_stage else []
    if config.n_routed_experts:
        if options.load_balance_gamma and config.topk_method == "noaux_tc":
            callbacks.append(LoadBalanceCallback(options.load_balance_gamma, options.load_balance_until))
        if options.balance_alpha:
            callbacks.append(BalanceLossCallback(options.balance_alpha))
    if options.mtp_weight and config.num_nextn_predict_layers:
        callbacks.append(MtpLossCallback(options.mtp_weight, options.mtp_later_weight, options.mtp_switch_at))
    return [*callbacks, MoeTelemetryCallback(), LogLastStep()]


def run(recipe: Path | None, arguments: list[str]) -> None:
    """The whole command."""
    options, training = read_options(recipe, arguments)
    if options.trains_adapter:
        check_rank(options, AutoConfig.from_pretrained(options.model))
    set_seed(training.seed)
    check_agreement(options, training, AutoConfig.from_pretrained(options.model or options.config))
    tokenizer = load_tokenizer(Path(options.tokenizer or options.model), options.trust_remote_code)
    resume = checkpoint_to_resume(training, options.trains_adapter)
    rows = _rows(options, tokenizer)
    model, form = load(options)
    if options.fp8:
        prepare_fp8_training(model, Fp8TrainingConfig(options.fp8_wgrad))
    if options.trains_adapter:
        model = add_adapter(model, options)
        if training.gradient_checkpointing:
            model.enable_input_require_grads()  # reentrant checkpoints have no gradient where the embedding is frozen
        trained = model.get_nb_trainable_parameters()[0]
        stderr().print(f"[dim]an adapter of {count(trained)} parameters; routers and their biases stay as they are[/]")
    if "paged" in training.optim.value and training.device.type == "cpu":
        stderr().print(f"[dim]optim={training.optim.value}: its states are not paged on a CPU[/]")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    callbacks = make_callbacks(options, model)
    if is_sharded_by_transformers(model):
        training.save_only_model = True  # which else would be refused: the callback writes the rest
        callbacks.append(ShardedTrainingCallback(resume))
    trainer = Trainer(
        model,
        training,
        train_dataset=rows["train"],
        eval_dataset=rows.get("eval"),
        data_collator=Collator(pad, options.packing),
        callbacks=callbacks,
        optimizer_cls_and_kwargs=bf16_moments(training) if options.bf16_moments else None,
    )
    trainer.train(resume_from_checkpoint=resume)
    if "eval" in rows:
        stdout().print(f"eval loss {trainer.evaluate()['eval_loss']:.4f}")  # every rank has its part
    trainer.save_state()
    in_parts = is_in_parts(list(trainer.model.parameters()))
    if in_parts and not options.trains_adapter:
        kind = _write_in_parts(training, trainer.model, form)
    if trainer.is_world_process_zero():
        if not in_parts or options.trains_adapter:
            kind = _write(options, training, model, form)
        tokenizer.save_pretrained(training.output_dir)
        stdout().print(
            f"wrote {training.output_dir} ({kind}); deepseek-moe report {training.output_dir} draws it", markup=False
        )


def _rows(options: RunOptions, tokenizer: PreTrainedTokenizerBase) -> dict[str, Rows]:
    """Of the files to train on and to evaluate on, those that were given."""
    vocab_size = AutoConfig.from_pretrained(options.model or options.config).get_text_config().vocab_size
    rows = {}
    for part, file in (("train", options.train_file), ("eval", options.eval_file)):
        if file is not None:
            documents = load_documents(file, tokenizer, options.max_length, options.assistant_only_loss, vocab_size)
            rows[part] = Rows(pack(documents, options.max_length) if options.packing else [[d] for d in documents])
    return rows


def _write(options: RunOptions, training: TrainingArguments, model: PreTrainedModel, form: WeightFormat | None) -> str:
    """The model, or its adapter alone, into ``output_dir``; what that is, in a word or two."""
    if options.trains_adapter:
        model.save_pretrained(training.output_dir)
        return "an adapter"
    settings = {"quantize": form.name} if form else {}
    model.save_pretrained(training.output_dir, like=options.model and _local(options.model), **settings)
    return f"{form.title} release" if form else str(read_config(training.output_dir).dtype).removeprefix("torch.")


def _write_in_parts(training: TrainingArguments, model: PreTrainedModel, form: WeightFormat | None) -> str:
    """As `_write`, on all ranks, each of which holds a part of the model; every tensor is quantised again."""
    model.save_pretrained(training.output_dir, **({"quantize": form.name} if form else {}))
    return f"{form.title} release" if form else str(model.dtype).removeprefix("torch.")


def _local(name: str) -> str | None:
    """The folder, or, for a name on the Hub, nothing: its files are not looked for again."""
    return name if Path(name).is_dir() else None
