"""A thousand steps in FP8 beside bf16 and fp32: the same weights, data and order (`pytest -m long`, three hours).

Two designs of one model of width 128. On subwords, at DeepSeek-V2-Lite's learning rate, FP8 stays on average over
initialisations within the 0.25 % of bf16, and of fp32, that the V3 report found on models of 16 and 230 billion parameters. On
bytes, at 1e-3 and where the loss is half as large, it does not: the bound there says only that it learns.
"""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from training_harness import Record, arguments
from transformers import AutoModelForCausalLM, Trainer

import modeling_deepseek_moe as dsm

ROW, ROWS, SEEDS = 65, 16, 8
TEXT = Path(__file__).resolve().parents[2] / "shared" / "data" / "tinyshakespeare.txt"
FP8, BF16_WGRAD = dsm.Fp8TrainingConfig(), dsm.Fp8TrainingConfig(fp8_wgrad=False)
needs_text = pytest.mark.skipif(not TEXT.exists(), reason=f"needs {TEXT.name}")


def make_model(seed, vocab_size, initializer_range):
    config = dsm.DeepseekV3Config(
        vocab_size=vocab_size,
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
        initializer_range=initializer_range,
        max_position_embeddings=ROW,
        pad_token_id=None,
    )
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config)


def subwords(vocab_size=1024):
    """The text in tokens of a BPE that is trained on it."""
    text = TEXT.read_text()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([text], trainer)
    return tokenizer.encode(text).ids


def losses(folder, model, tokens, learning_rate, fp8, bf16, steps=1000):
    """The loss of every step, by the package's own code under `Trainer`."""
    if fp8 is not None:
        dsm.prepare_fp8_training(model, fp8)
    rows = torch.tensor(tokens[: len(tokens) // ROW * ROW]).view(-1, ROW)
    # passes over the text one after the other in one dataset: all runs see the same rows in the same order, which later
    # epochs of `Trainer` would draw anew
    generator = torch.Generator().manual_seed(0)
    passes = [torch.randperm(len(rows), generator=generator) for _ in range(-(-steps * ROWS // len(rows)))]
    rows = rows[torch.cat(passes)[: steps * ROWS]]
    record = Record()
    settings = arguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=ROWS,
        learning_rate=learning_rate,
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


def gap(found, wanted, last=200):
    """Relative difference of the mean losses of the last steps."""
    return sum(found[-last:]) / sum(wanted[-last:]) - 1


RUNS = {"fp32": (None, False), "bf16": (None, True), "FP8": (FP8, True), "FP8, Wgrad in bf16": (BF16_WGRAD, True)}


def hold(tmp_path, make, tokens, learning_rate, seeds, bounds):
    """On average over initialisations both recipes stay within ``bounds`` of bf16 and of fp32, and bf16 within 0.25 % of fp32.

    One initialisation tells little: what runs part by, whatever they are rounded to, grows with the learning rate, from a tenth
    of a percent at 4.2e-4 to half a percent at 2e-3.
    """
    gaps = {}
    for seed in range(seeds):
        found = {}
        for name, (fp8, bf16) in RUNS.items():
            found[name] = losses(tmp_path, make(seed), tokens, learning_rate, fp8, bf16)
            for other in ("fp32", "bf16"):
                if other in found and other != name:
                    gaps.setdefault((name, other), []).append(gap(found[name], found[other]))
            print(f"initialisation {seed}, {name}: {sum(found[name][-200:]) / 200:.5f}", flush=True)
    for (name, other), values in gaps.items():
        mean = sum(values) / seeds
        print(f"{name} beside {other}: {mean:+.2%} ({', '.join(f'{value:+.2%}' for value in values)})", flush=True)
        assert abs(mean) < (bounds[other] if name.startswith("FP8") else 0.0025)


@pytest.mark.long
@needs_text
def test_loss_gap_on_subwords(tmp_path):
    hold(
        tmp_path,
        lambda seed: make_model(seed, 1024, 0.02),
        subwords(),
        4.2e-4,
        SEEDS,
        {"bf16": 0.0025, "fp32": 0.0025},
    )


@pytest.mark.long
@needs_text
def test_loss_gap_on_bytes(tmp_path):
    tokens = list(TEXT.read_bytes()[: ROWS * ROW * 1000])
    hold(tmp_path, lambda seed: make_model(seed, 256, 0.05), tokens, 1e-3, 1, {"bf16": 0.015, "fp32": 0.015})
