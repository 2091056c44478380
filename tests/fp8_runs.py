"""A thousand steps in several precisions, the same weights, data and order: each run in a process of its own, on one thread."""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from training_harness import Record, arguments
from transformers import AutoModelForCausalLM, Trainer

import modeling_deepseek_moe as dsm

ROW, ROWS = 65, 16
# how FP8 is done, if it is, and whether under bf16 autocast
RECIPES = {
    "fp32": (None, False),
    "bf16": (None, True),
    "FP8": (dsm.Fp8TrainingConfig(), True),
    "FP8, Wgrad in bf16": (dsm.Fp8TrainingConfig(fp8_wgrad=False), True),
}


class Design(NamedTuple):
    """A model of width 128 and how it is trained."""

    vocab_size: int
    initializer_range: float
    learning_rate: float
    steps: int = 1000


def make_model(design: Design, seed: int):
    config = dsm.DeepseekV3Config(
        vocab_size=design.vocab_size,
        hidden_size=128,
        intermediate_size=256,
        moe_intermediate_size=128,
        num_hidden_layers=3,
        num_nextn_predict_layers=0,
        num_attention_heads=4,
        n_routed_experts=8,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
        q_lora_rank=None,
        kv_lora_rank=128,
        qk_nope_head_dim=32,
        qk_rope_head_dim=32,
        v_head_dim=32,
        initializer_range=design.initializer_range,
        max_position_embeddings=ROW,
        pad_token_id=None,
    )
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config)


def subwords(text: str, vocab_size: int) -> list[int]:
    """The text in tokens of a BPE that is trained on it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([text], trainer)
    return tokenizer.encode(text).ids


def train(folder: Path, design: Design, tokens: list[int], seed: int, recipe: str) -> list[float]:
    """The loss of every step, by the package's own code under `Trainer`."""
    fp8, bf16 = RECIPES[recipe]
    model = make_model(design, seed)
    if fp8 is not None:
        dsm.prepare_fp8_training(model, fp8)
    rows = torch.tensor(tokens[: len(tokens) // ROW * ROW]).view(-1, ROW)
    # passes over the text one after the other in one dataset: all runs see the same rows in the same order, which later
    # epochs of `Trainer` would draw again
    generator = torch.Generator().manual_seed(0)
    passes = [torch.randperm(len(rows), generator=generator) for _ in range(-(-design.steps * ROWS // len(rows)))]
    rows = rows[torch.cat(passes)[: design.steps * ROWS]]
    record = Record()
    settings = arguments(
        folder,
        max_steps=design.steps,
        per_device_train_batch_size=ROWS,
        learning_rate=design.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=50,
        bf16=bf16,
        weight_decay=0.1,
        adam_beta2=0.95,
    )
    callbacks = [dsm.LoadBalanceCallback(), dsm.MoeTelemetryCallback(), record]
    Trainer(
        model, settings, train_dataset=[{"input_ids": row, "labels": row} for row in rows], callbacks=callbacks
    ).train()
    return [logs["loss"] for logs in record.logs]


def train_all(folder: Path, design: Design, tokens: list[int], seeds: int) -> dict[tuple[int, str], list[float]]:
    """Of every initialisation and recipe, as many at a time as there are processors; their results are printed as they come."""
    processes = ProcessPoolExecutor(
        min(8, len(os.sched_getaffinity(0))),
        multiprocessing.get_context("spawn"),
        initializer=torch.set_num_threads,
        initargs=(1,),
    )
    found = {}
    with processes as pool:
        runs = {
            pool.submit(train, folder / f"{seed} {recipe}", design, tokens, seed, recipe): (seed, recipe)
            for seed in range(seeds)
            for recipe in RECIPES
        }
        for run in as_completed(runs):
            seed, recipe = runs[run]
            found[seed, recipe] = run.result()
            print(f"initialisation {seed}, {recipe}: {mean_of_last(found[seed, recipe]):.5f}", flush=True)
    return found


def mean_of_last(losses: list[float], last: int = 200) -> float:
    return sum(losses[-last:]) / len(losses[-last:])
