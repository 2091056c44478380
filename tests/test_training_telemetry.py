"""What is logged in training, to whom, and what bad input says; the router under autocast."""

import json
import math

import pytest
import torch
from releases import SHAPES
from training_harness import Padded, Record, arguments, load, train
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback
from transformers import trainer as trainer_module

import modeling_deepseek_moe as dsm

FIGURES = {"max_vio", "max_vio_worst_layer", "max_vio_epoch", "load_entropy", "dead_experts", "bias_min", "bias_max"}
FIGURES |= {"lm_loss", "mtp_loss", "balance_loss", "tokens_per_second"}


class Reporter(TrainerCallback):
    """Stands where `Trainer` puts TensorBoard's, W&B's and trackio's."""

    seen: list

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))


def test_reporters_get_the_figures(tmp_path, monkeypatch):
    class Mine(Reporter):
        seen = []

    monkeypatch.setattr(trainer_module, "DEFAULT_CALLBACKS", [*trainer_module.DEFAULT_CALLBACKS, Mine])
    found = train(tmp_path, dtype="float32", max_steps=4, logging_steps=2)
    logged = [logs for logs in Mine.seen if "loss" in logs]
    assert len(logged) == 2
    assert all(logs.keys() >= FIGURES for logs in logged)
    assert logged == found["logs"]
    assert "max_vio" not in Mine.seen[-1]  # the summary at the end


def test_figures_are_in_the_history(tmp_path):
    model, record = load(tmp_path, torch.float32), Record()
    settings = arguments(tmp_path, max_steps=4, logging_steps=2)
    trainer = Trainer(model, settings, train_dataset=Padded(), callbacks=[dsm.MoeTelemetryCallback(), record])
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in history] == [2, 4]
    assert all(entry.keys() >= FIGURES - {"mtp_loss", "balance_loss"} for entry in history)


def test_figures_are_of_the_loads(tmp_path):
    found = train(tmp_path, dtype="float32", logging_steps=1, max_steps=12, per_device_train_batch_size=8)
    epoch = {}
    for step, (line, logs) in enumerate(zip(found["loads"], found["logs"], strict=True)):
        load = {layer: torch.tensor(counts).double() for layer, counts in line["load"].items()}
        if step % 6 == 0:  # 48 rows, 8 per step
            epoch = {}
        epoch = {layer: epoch.get(layer, 0) + counts for layer, counts in load.items()}
        violations = [float(counts.max() / counts.mean() - 1) for counts in load.values()]
        assert logs["max_vio"] == pytest.approx(sum(violations) / len(violations), rel=1e-5)
        assert logs["max_vio_worst_layer"] == pytest.approx(max(violations), rel=1e-5)
        of_epoch = [float(counts.max() / counts.mean() - 1) for counts in epoch.values()]
        assert logs["max_vio_epoch"] == pytest.approx(sum(of_epoch) / len(of_epoch), rel=1e-5)
        shares = [counts / counts.sum() for counts in load.values()]
        entropies = [-(share[share > 0] * share[share > 0].log()).sum().item() / math.log(16) for share in shares]
        assert logs["load_entropy"] == pytest.approx(sum(entropies) / len(entropies), rel=1e-5)
        assert logs["dead_experts"] == sum(int((counts == 0).sum()) for counts in load.values())
        biases = [value for bias in found["biases"][step].values() for value in bias]
        assert (logs["bias_min"], logs["bias_max"]) == (min(biases), max(biases))


def test_telemetry_changes_nothing(tmp_path):
    def run(callbacks):
        torch.manual_seed(0)
        model = load(tmp_path, torch.float32)
        Trainer(model, arguments(tmp_path), train_dataset=Padded(), callbacks=callbacks).train()
        return model.state_dict()

    plain, watched = run([]), run([dsm.MoeTelemetryCallback()])
    for name, tensor in plain.items():
        torch.testing.assert_close(watched[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


def test_loads_file_starts_again_with_the_training(tmp_path):
    for steps in (5, 3):
        train(tmp_path, dtype="float32", max_steps=steps, mtp=False)
    lines = (tmp_path / "expert_load.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]


def test_nan_loss_is_said(tmp_path):
    model = load(tmp_path, torch.float32)
    model.lm_head.weight.data[5] = torch.nan
    settings = arguments(tmp_path, logging_steps=2)
    trainer = Trainer(model, settings, train_dataset=Padded(), callbacks=[dsm.MoeTelemetryCallback()])
    with pytest.raises(ValueError, match="lm_loss is nan in steps 1 to 2"):
        trainer.train()


@pytest.fixture
def said(monkeypatch):
    messages = []
    from modeling_deepseek_moe.training import telemetry

    monkeypatch.setattr(telemetry.logger, "warning", messages.append)
    return messages


def test_dead_experts_are_named(tmp_path, said):
    model = load(tmp_path, torch.float32, "kimi")
    model.model.layers[1].mlp.gate.e_score_correction_bias[[3, 7]] = -100.0
    settings = arguments(tmp_path, max_steps=3)
    Trainer(model, settings, train_dataset=Padded(), callbacks=[dsm.MoeTelemetryCallback()]).train()
    dead = next(message for message in said if message.startswith("layer 1:"))
    assert "got no token in the whole training" in dead
    assert {"3", "7"} <= set(dead.split(": [")[1].rstrip("]").split(", "))


def test_labels_all_masked_are_said(tmp_path, said):
    rows = [row | {"labels": torch.full_like(row["input_ids"], -100)} for row in Padded().rows]
    model = load(tmp_path, torch.float32)
    settings = arguments(tmp_path, max_steps=2, logging_steps=2)
    Trainer(model, settings, train_dataset=rows, callbacks=[dsm.MoeTelemetryCallback()]).train()
    assert any("no label in the last 2 step(s) up to 2" in message for message in said)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


@pytest.mark.parametrize("kind", ["v3", "moonlight", "v2-lite", "v2"])
def test_router_decides_in_fp32_under_autocast(kind):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(SHAPES[kind]()).train()
    seen = []

    def look(gate, args, out):
        seen.append((gate, args[0], out))

    gates = [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]
    handles = [gate.register_forward_hook(look) for gate in gates]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(torch.randint(3, 128, (8, 128)))
    for handle in handles:
        handle.remove()
    assert len(seen) == len(gates)
    for gate, hidden, (logits, weights, chosen) in seen:
        wanted = gate(hidden.float())
        assert logits.dtype == weights.dtype == torch.float32
        assert torch.equal(chosen, wanted[2])  # all 1,024 tokens
        assert torch.equal(logits, wanted[0])
