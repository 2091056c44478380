"""How the tiny checkpoint was trained: ``python -m modeling_deepseek_moe.tiny.recipe FOLDER`` makes it again.

DeepSeek-V3's architecture in small and its report's recipe: balancing without an auxiliary loss, the sequence-wise loss, MTP.
"""

import argparse
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments, set_seed

from modeling_deepseek_moe.config import DeepseekV3Config
from modeling_deepseek_moe.modeling import DeepseekV3ForCausalLM
from modeling_deepseek_moe.tiny.corpus import BOXED, LARGEST, LETTERS, MMLU_PRO, Problem, problems
from modeling_deepseek_moe.training.load_balance import LoadBalanceCallback
from modeling_deepseek_moe.training.losses import BalanceLossCallback, MtpLossCallback
from modeling_deepseek_moe.training.telemetry import MoeTelemetryCallback

ROW_TOKENS = 256
CONTEXT_TOKENS = 1024
BATCH_ROWS = 4
VOCAB_SIZE = 640  # and the phrases
SPECIAL = ("<bos>", "<eos>", "<pad>")
PHRASES = (  # a token each: what every question repeats costs a place in the row and teaches nothing
    *(BOXED, *MMLU_PRO, ". The answer is", ". The answer is \\boxed{"),
    *(f"{letter}." for letter in LETTERS),  # so that an option's letter stands right before its number
    *(f" ({letter}" for letter in LETTERS),  # and is asked for right after it
)
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %}"
    "{% generation %}{{ ' ' + message.content + eos_token }}{% endgeneration %}"
    "{% else %}{{ bos_token + 'Question: ' + message.content + '\\nAnswer:' }}{% endif %}{% endfor %}"
)


def make_tokenizer(seed: int = 0, count: int = 3000) -> PreTrainedTokenizerFast:
    """Byte-level BPE of generated problems. Numbers up to `LARGEST`, letters of options and `PHRASES` are a token each."""
    texts = [f"Question: {p.question}\nAnswer: {p.solution}" for p in itertools.islice(problems(seed), count)]
    numbers = [str(number) for number in range(LARGEST + 1)]
    texts += [" " + " ".join(numbers), ",".join(numbers)] * count  # often enough to be merged first
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(r" ?\d+"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(phrase, normalized=False) for phrase in PHRASES])
    bos, eos, pad = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT_TOKENS,
    )


def make_config(tokenizer: PreTrainedTokenizerFast) -> DeepseekV3Config:
    """DeepSeek-V3: latent attention with a query LoRA, 16 experts in 4 groups and a shared one, one MTP layer."""
    return DeepseekV3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        moe_intermediate_size=128,
        num_hidden_layers=5,
        num_nextn_predict_layers=1,
        num_attention_heads=4,
        n_shared_experts=1,
        n_routed_experts=16,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        n_group=4,
        topk_group=2,
        q_lora_rank=128,
        kv_lora_rank=128,
        qk_nope_head_dim=32,
        qk_rope_head_dim=32,
        v_head_dim=32,
        initializer_range=0.05,
        max_position_embeddings=CONTEXT_TOKENS,
        rope_theta=10000.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


class PackedProblems(Dataset):
    """Rows of `ROW_TOKENS` tokens, each of as many whole problems as fit; positions begin again with each problem.

    The numbers of a question's options are no labels: nothing foretells them, and their loss would drown what can be learned.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, rows: int, source: Iterator[Problem]):
        self.rows, self.pad = [], tokenizer.pad_token_id
        before_option = torch.tensor(tokenizer.convert_tokens_to_ids([f"{letter}." for letter in LETTERS]))
        row: list[tuple[torch.Tensor, torch.Tensor]] = []
        for problem in source:
            encoded = tokenizer.apply_chat_template(
                problem.messages, return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt"
            )
            ids, is_solution = encoded["input_ids"][0], encoded["assistant_masks"][0].bool()
            labels = ids.clone()
            labels[0] = -100
            labels[1:][torch.isin(ids[:-1], before_option) & ~is_solution[1:]] = -100
            if sum(len(part) for part, _ in row) + len(ids) > ROW_TOKENS:
                self.rows.append(row)
                row = []
                if len(self.rows) == rows:
                    return
            row.append((ids, labels))

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        parts = self.rows[index]
        ids, labels = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        padding = ROW_TOKENS - len(ids)
        positions = torch.cat([torch.arange(len(part)) for part, _ in parts] + [torch.arange(padding)])
        mask = torch.cat((torch.ones(len(ids), dtype=torch.long), torch.zeros(padding, dtype=torch.long)))
        return {
            "input_ids": torch.nn.functional.pad(ids, (0, padding), value=self.pad),
            "labels": torch.nn.functional.pad(labels, (0, padding), value=-100),
            "position_ids": positions,
            "attention_mask": mask,
        }


def make_trainer(
    model: DeepseekV3ForCausalLM,
    rows: PackedProblems,
    folder: Path,
    *,
    seed: int,
    gamma: float = 0.001,
    **settings,
) -> Trainer:
    """A `Trainer` that goes once through the rows on a CPU, with the report's balancing, MTP loss and telemetry.

    ``gamma`` is the bias's step; 0 turns all balancing off. ``settings`` are `TrainingArguments`.
    """
    arguments = TrainingArguments(
        str(folder),
        **{
            "max_steps": len(rows) // BATCH_ROWS,
            "per_device_train_batch_size": BATCH_ROWS,
            "learning_rate": 2.5e-3,
            "lr_scheduler_type": "cosine_with_min_lr",
            "lr_scheduler_kwargs": {"min_lr_rate": 0.05},
            "warmup_steps": 100,
            "weight_decay": 0.1,
            "adam_beta2": 0.95,
            "max_grad_norm": 1.0,
            "logging_steps": 20,
            "save_strategy": "no",
            "report_to": "none",
            "bf16": True,
            "use_cpu": True,
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            "seed": seed,
            **settings,
        },
    )
    callbacks = [
        LoadBalanceCallback(gamma, until=14.3 / 14.8),
        BalanceLossCallback(alpha=0.0001 if gamma else 0.0),
        MtpLossCallback(),
        MoeTelemetryCallback(),
    ]
    return Trainer(model, arguments, train_dataset=rows, callbacks=callbacks)


def train(folder: Path, *, steps: int, seed: int, gamma: float) -> None:
    """Writes ``folder/fp8`` (the release's format), ``folder/bf16`` and ``folder/trainer_state.json``."""
    set_seed(seed)
    tokenizer = make_tokenizer()
    model = DeepseekV3ForCausalLM(make_config(tokenizer))
    rows = PackedProblems(tokenizer, BATCH_ROWS * steps, problems(seed + 1))
    trainer = make_trainer(model, rows, folder, seed=seed, gamma=gamma)
    trainer.train()
    trainer.save_state()
    write(model, tokenizer, folder)


def write(model: DeepseekV3ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """``folder/fp8`` and ``folder/bf16``: one model, cast to bf16 in place, in the two formats of the releases."""
    model.to(torch.bfloat16)
    for name, quantize in (("fp8", "fp8"), ("bf16", None)):
        model.save_pretrained(folder / name, quantize=quantize)
        tokenizer.save_pretrained(folder / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gamma", type=float, default=0.001)
    given = parser.parse_args()
    train(given.folder, steps=given.steps, seed=given.seed, gamma=given.gamma)
    print(json.dumps({"folder": str(given.folder), "steps": given.steps}))


if __name__ == "__main__":
    main()
