"""A thousand steps in FP8 beside bf16 and fp32: the same weights, data and order (`pytest -m long`, a quarter of an hour)."""

from pathlib import Path

import pytest
import torch
from training_harness import Record, arguments
from transformers import AutoModelForCausalLM, Trainer

import modeling_deepseek_moe as dsm

ROW, ROWS = 65, 16
TEXT = Path(__file__).resolve().parents[2] / "shared" / "data" / "tinyshakespeare.txt"
FP8, BF16_WGRAD = dsm.Fp8TrainingConfig(), dsm.Fp8TrainingConfig(fp8_wgrad=False)


def make_model():
    config = dsm.DeepseekV3Config(
        vocab_size=256,
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
        initializer_range=0.05,
        max_position_embeddings=ROW,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def losses(folder, fp8, bf16, steps=1000):
    """The loss of every step."""
    model = make_model()
    if fp8 is not None:
        dsm.prepare_fp8_training(model, fp8)
    text = torch.tensor(list(TEXT.read_bytes()[: ROWS * ROW * steps]))
    rows = [{"input_ids": row, "labels": row} for row in text.view(-1, ROW)]
    record = Record()
    settings = arguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=ROWS,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=50,
        bf16=bf16,
        weight_decay=0.1,
        adam_beta2=0.95,
    )
    callbacks = [dsm.LoadBalanceCallback(), dsm.MoeTelemetryCallback(), record]
    Trainer(model, settings, train_dataset=rows, callbacks=callbacks).train()
    return [logs["loss"] for logs in record.logs]


def gap(found, wanted, last=200):
    """Relative difference of the mean losses of the last steps."""
    return sum(found[-last:]) / sum(wanted[-last:]) - 1


@pytest.mark.long
@pytest.mark.skipif(not TEXT.exists(), reason=f"needs {TEXT.name}")
def test_loss_gap_over_a_thousand_steps(tmp_path):
    bf16, fp32 = losses(tmp_path, None, True), losses(tmp_path, None, False)
    assert abs(gap(bf16, fp32)) < 0.0025  # so what chance does is small beside what is held below
    for config in (BF16_WGRAD, FP8):
        found = losses(tmp_path, config, True)
        # found 0.3 to 1.1 %: the 0.25 % of the report's far larger models is not reached at this size
        assert gap(found, bf16) < 0.015
        assert gap(found, fp32) < 0.015
