"""The demo's tokenizer, its small model in DeepSeek-V3's architecture, and its training with the plain `Trainer`."""

import math
import time

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from modeling_deepseek_moe.config import DeepseekV3Config
from modeling_deepseek_moe.modeling import DeepseekV3ForCausalLM

VOCAB_SIZE = 1024
BLOCK_TOKENS = 128  # tokens of a training row, and the length that YaRN extends
CONTEXT_FACTOR = 40  # as in DeepSeek-V3's release: 128 tokens trained, 5120 usable
BATCH_ROWS = 8
LEARNING_RATE = 2e-3
WARMUP_STEPS = 20
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'assistant' %}Answer: {{ message.content }}{{ eos_token }}"
    "{% else %}Question: {{ message.content }}\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}Answer:{% endif %}"
)


def train_tokenizer(documents: list[str], vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of these documents: bos in front, digits one by one, the same for the same text."""
    bos, eos, pad = special = ["<bos>", "<eos>", "<pad>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        chat_template=CHAT_TEMPLATE,
        model_max_length=BLOCK_TOKENS * CONTEXT_FACTOR,
    )


def make_rows(tokenizer: PreTrainedTokenizerFast, documents: list[str], length: int = BLOCK_TOKENS) -> torch.Tensor:
    """The documents, each ended by eos, as rows ``[N, length]`` that all begin with bos. The last part row is dropped."""
    tokens = []
    for encoded in tokenizer(documents, add_special_tokens=False)["input_ids"]:
        tokens += [*encoded, tokenizer.eos_token_id]
    count = len(tokens) // (length - 1)
    body = torch.tensor(tokens[: count * (length - 1)], dtype=torch.long).view(count, length - 1)
    return torch.cat((torch.full((count, 1), tokenizer.bos_token_id), body), dim=1)


def make_config(tokenizer: PreTrainedTokenizerFast) -> DeepseekV3Config:
    """DeepSeek-V3 in small. Dims fit FP8 blocks of 128, as transformers' own FP8 loader needs; this package's does not.

    There is no MTP layer: the Trainer's loss would leave it at its random start, and a draft head that knows
    nothing is better absent.
    """
    return DeepseekV3Config(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        moe_intermediate_size=128,
        num_hidden_layers=4,
        num_nextn_predict_layers=0,
        num_attention_heads=8,
        n_shared_experts=1,
        n_routed_experts=16,
        num_experts_per_tok=4,
        first_k_dense_replace=1,
        n_group=4,
        topk_group=2,
        q_lora_rank=128,
        kv_lora_rank=96,
        qk_nope_head_dim=32,
        qk_rope_head_dim=32,
        v_head_dim=64,
        initializer_range=0.06,  # about 1/sqrt(hidden_size): a model this small learns faster so
        max_position_embeddings=BLOCK_TOKENS * CONTEXT_FACTOR,
        rope_theta=10000.0,
        rope_scaling={
            "type": "yarn",
            "factor": CONTEXT_FACTOR,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": BLOCK_TOKENS,
        },
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


class Budget(TrainerCallback):
    """Stops training after ``steps`` steps or ``seconds``, whichever is first, and shows how far it is.

    The learning rate follows it too (`learning_rate_factor`), so that it has come down when time runs out.
    """

    def __init__(self, steps: int, seconds: float, console: Console):
        self.steps, self.seconds, self.start, self.out_of_time = steps, seconds, None, False
        columns = ("[progress.description]{task.description}", "{task.fields[loss]}", "{task.fields[rate]}")
        first, *rest = map(TextColumn, columns)
        self.progress = Progress(first, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), *rest, console=console)
        self.task = self.progress.add_task("Training", total=steps, loss="", rate="")

    def fraction_done(self, step: int) -> float:
        elapsed = time.monotonic() - self.start if self.start is not None else 0.0
        return min(1.0, max(step / self.steps, elapsed / self.seconds))

    def learning_rate_factor(self, step: int) -> float:
        """Linear warm-up, then a cosine down to a twentieth."""
        warmup = min(1.0, (step + 1) / min(WARMUP_STEPS, self.steps))
        return warmup * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * self.fraction_done(step))))

    def on_train_begin(self, args, state, control, **kwargs):
        self.start = time.monotonic()
        self.progress.start()

    def on_step_end(self, args, state, control, **kwargs):
        tokens = state.global_step * args.train_batch_size * BLOCK_TOKENS
        rate = f"{tokens / (time.monotonic() - self.start):,.0f} tokens/s"
        self.progress.update(self.task, completed=state.global_step, rate=rate)
        if self.fraction_done(state.global_step) >= 1:
            self.out_of_time = state.global_step < self.steps
            control.should_training_stop = True

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.progress.update(self.task, loss=f"loss {logs['loss']:.3f}")

    def on_train_end(self, args, state, control, **kwargs):
        self.progress.stop()


def make_trainer(
    model: DeepseekV3ForCausalLM,
    rows: dict[str, torch.Tensor],
    folder: str,
    *,
    budget: Budget,
    seed: int,
) -> Trainer:
    """A plain `Trainer` in fp32 on the CPU, over ``rows["train"]`` and ``rows["held out"]``."""
    train_set, held_out = ([{"input_ids": row, "labels": row} for row in rows[part]] for part in ("train", "held out"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, budget.learning_rate_factor)
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=budget.steps,
        per_device_train_batch_size=BATCH_ROWS,
        per_device_eval_batch_size=BATCH_ROWS,
        prediction_loss_only=True,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=seed,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=train_set,
        eval_dataset=held_out,
        optimizers=(optimizer, scheduler),
        callbacks=[budget],
    )
    trainer.remove_callback(PrinterCallback)  # the progress bar says it
    return trainer
