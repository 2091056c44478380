"""Balancing without an auxiliary loss: who is counted, once and on all ranks; the bias; resuming; bad input."""

import json

import pytest
import torch
from releases import SHAPES
from training_harness import Padded, Record, arguments, load, train, train_by_hand, train_on_ranks
from transformers import AutoModelForCausalLM, Trainer

import modeling_deepseek_moe as dsm
from modeling_deepseek_moe.moe.balance import expert_load, load_entropy, max_violation, updated_bias
from modeling_deepseek_moe.moe.training_state import TrainingState


def loads(found):
    return [line["load"] for line in found["loads"]]


def test_load_by_hand():
    chosen = torch.tensor([[0, 2], [2, 3], [2, 0], [1, 2]])
    assert expert_load(chosen, 5).tolist() == [2, 1, 4, 1, 0]
    mask = torch.tensor([True, False, True, False])
    assert expert_load(chosen, 5, mask).tolist() == [2, 0, 2, 0, 0]
    assert expert_load(chosen, 5, mask & False).tolist() == [0] * 5


def test_max_violation_and_entropy_by_hand():
    load = torch.tensor([[4, 4, 4, 4], [16, 0, 0, 0], [0, 0, 0, 0], [8, 8, 0, 0]])
    assert max_violation(load).tolist() == [0, 3, 0, 1]
    torch.testing.assert_close(load_entropy(load), torch.tensor([1.0, 0.0, 0.0, 0.5]))


def test_bias_moves_by_gamma_against_the_load():
    bias = torch.tensor([5.0, 5.0, 5.0, 5.0])
    moved = updated_bias(bias, torch.tensor([7, 4, 1, 4]), 0.25)  # mean 4
    assert moved.tolist() == [4.75, 5.0, 5.25, 5.0]
    assert moved.dtype == torch.float32


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    return folder, train(folder, gradient_accumulation_steps=4)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_layers_count_once(one, tmp_path, reentrant):
    settings = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    again = train(tmp_path, release=one[0], gradient_accumulation_steps=4, **settings)
    assert loads(again) == loads(one[1])
    assert again["biases"] == one[1]["biases"]


MTP_FP32 = {"dtype": "float32", "mtp": True}


@pytest.fixture(scope="module")
def two(one, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    settings = {"release": str(one[0])}
    ddp = settings | {"gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 3}
    fsdp2 = settings | {"by_hand": True, "shard": True}
    fp8 = {f"fp8-{wgrad}": fsdp2 | MTP_FP32 | {"fp8_wgrad": wgrad} for wgrad in (False, True)}
    return folder / "ddp", train_on_ranks(folder, 2, ddp=ddp, fsdp2=fsdp2, **fp8)


@pytest.mark.slow
def test_ranks_agree_with_one_process(one, two):
    for rank in two[1]["ddp"]:
        assert loads(rank) == loads(one[1])
        assert rank["biases"] == one[1]["biases"]
        for name in ("lm_loss", "mtp_loss", "balance_loss", "grad_norm"):
            wanted = [entry[name] for entry in one[1]["logs"]]
            assert [entry[name] for entry in rank["logs"]] == pytest.approx(wanted, rel=1e-6), name


@pytest.mark.slow
def test_sharded_ranks_agree_with_one_process(one, two, tmp_path):
    wanted = train_by_hand(tmp_path, release=one[0])
    for rank in two[1]["fsdp2"]:
        assert rank["kinds"] == ["DTensor"]
        assert rank["loads"] == [{str(layer): load for layer, load in step.items()} for step in wanted["loads"]]
        assert rank["biases"] == wanted["biases"]


@pytest.mark.slow
@pytest.mark.parametrize("fp8_wgrad", [pytest.param(False, id="bf16-wgrad"), pytest.param(True, id="fp8-wgrad")])
def test_sharded_fp8_and_mtp_agree_with_one_process(one, two, tmp_path, fp8_wgrad):
    wanted = train_by_hand(tmp_path, release=one[0], fp8_wgrad=fp8_wgrad, **MTP_FP32)["losses"]
    for rank in two[1][f"fp8-{fp8_wgrad}"]:
        assert rank["kinds"] == ["DTensor"]
        assert rank["losses"][0] == pytest.approx(wanted[0], rel=1e-6)
        # Gradients are summed in another order, so that a weight may round to the next FP8 value and a token change its
        # experts: weights moved by 1e-7 move a loss by up to 0.6 %. Each step takes 1.5 to 3 % off it.
        assert rank["losses"][1:] == pytest.approx(wanted[1:], rel=0.01)


def test_every_token_is_counted_but_padding(one):
    config = SHAPES["v3-mtp"]()
    rows = [int(row["attention_mask"].sum()) for row in Padded().rows]
    total = sum(rows) * config.num_experts_per_tok  # six steps of eight rows: all 48 once
    per_layer = {layer: sum(sum(load[layer]) for load in loads(one[1])) for layer in loads(one[1])[0]}
    # the MTP layer sees the tokens that have another after them
    mtp = total - len(rows) * config.num_experts_per_tok
    assert per_layer == {"1": total, "2": total, "3": mtp}


def test_bias_follows_the_counts(one):
    found, gamma = one[1], 0.01
    before = {layer: torch.zeros(16) for layer in ("1", "2", "3")}
    release = load(one[0])
    for name, buffer in release.named_buffers():
        if name.endswith("e_score_correction_bias"):
            before[name.split(".")[2]] = buffer
    for step, biases in enumerate(found["biases"]):
        for name, bias in biases.items():
            layer = name.split(".")[2]
            load_E = torch.tensor(loads(found)[step][layer])
            sign = torch.tensor(
                [1.0 if x * 16 < load_E.sum() else -1.0 if x * 16 > load_E.sum() else 0.0 for x in load_E]
            )
            before[layer] = before[layer] + gamma * sign
            assert bias == before[layer].tolist()


def test_gamma_ends_and_evaluation_does_not_count(tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 1, "gradient_accumulation_steps": 1}
    model = load(tmp_path)
    record, telemetry = Record(), dsm.MoeTelemetryCallback()
    callbacks = [dsm.LoadBalanceCallback(0.01, until=0.5), telemetry, record]
    Trainer(
        model, arguments(tmp_path, **settings), train_dataset=Padded(), eval_dataset=Padded(4), callbacks=callbacks
    ).train()
    assert record.biases[1] != record.biases[2]
    assert record.biases[2] == record.biases[3] == record.biases[5]
    top_k = model.config.num_experts_per_tok
    counted = [
        sum(json.loads(line)["load"]["1"]) for line in (tmp_path / "expert_load.jsonl").read_text().splitlines()
    ]
    assert len(counted) == 6
    assert all(14 * 2 * top_k <= count <= 20 * 2 * top_k for count in counted)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2], ids=["same-world", "other-world"])
def test_resume_continues_exactly(one, two, tmp_path, ranks):
    """Also on one process from what two wrote: nothing in the state belongs to a rank."""
    settings = {"release": one[0], "gradient_accumulation_steps": 4}
    folder = tmp_path if ranks == 1 else two[0]
    if ranks == 1:
        train(folder, save_strategy="steps", save_steps=3, **settings)
    again = train(folder, resume=str(folder / "checkpoint-3"), **settings)
    assert again["biases"] == one[1]["biases"][3:]
    assert [line["step"] for line in again["loads"]] == [1, 2, 3, 4, 5, 6]
    assert loads(again)[3:] == loads(one[1])[3:]
    if ranks == 1:
        for found, wanted in zip(again["logs"], one[1]["logs"][3:], strict=True):
            del found["tokens_per_second"]
            assert found == {name: value for name, value in wanted.items() if name != "tokens_per_second"}


def test_bias_is_saved_as_trained(one, tmp_path):
    model = one[1]["model"]
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    buffers = dict(again.named_buffers())
    for name, bias in one[1]["biases"][-1].items():
        assert buffers[name].dtype == torch.float32
        assert buffers[name].tolist() == bias


def test_adapters_keep_the_bias_in_the_trainer_state(tmp_path):
    peft = pytest.importorskip("peft")

    def run(folder, resume=None):
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, target_modules=["o_proj"], task_type="CAUSAL_LM")
        wrapped = peft.get_peft_model(load(tmp_path, torch.float32, "v3"), config)
        record = Record()
        settings = arguments(folder, save_strategy="steps", save_steps=3)
        callbacks = [dsm.LoadBalanceCallback(0.01), record]
        Trainer(wrapped, settings, train_dataset=Padded(), callbacks=callbacks).train(resume_from_checkpoint=resume)
        return record.biases

    whole = run(tmp_path / "out")
    assert whole[0] != whole[5]
    assert run(tmp_path / "out", str(tmp_path / "out" / "checkpoint-3")) == whole[3:]


def skewed(gamma, tmp_path, steps=150):
    """Train a model whose bias sends every token to the same experts; the MaxVio of each step."""
    config = SHAPES["moonlight"]()
    fields = {"n_routed_experts": 32, "num_hidden_layers": 2, "num_experts_per_tok": 4, "initializer_range": 0.02}
    for name, value in fields.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    bias = model.model.layers[1].mlp.gate.e_score_correction_bias
    bias[:4] = 0.1
    record = Record()
    callbacks = [dsm.LoadBalanceCallback(gamma), dsm.MoeTelemetryCallback(), record]
    settings = arguments(tmp_path, max_steps=steps, per_device_train_batch_size=16, learning_rate=1e-3)
    Trainer(model, settings, train_dataset=Padded(64, 64), callbacks=callbacks).train()
    return [entry["max_vio"] for entry in record.logs]


@pytest.mark.slow
def test_skewed_router_is_balanced(tmp_path):
    violations = skewed(0.001, tmp_path)
    assert violations[0] > 3
    assert sum(violations[-10:]) / 10 < 0.3
    assert min(skewed(0.0, tmp_path, 30)) > 3


def test_models_without_a_bias_are_refused(tmp_path):
    model = AutoModelForCausalLM.from_config(SHAPES["v2-lite"]())
    trainer = Trainer(model, arguments(tmp_path), train_dataset=Padded(), callbacks=[dsm.LoadBalanceCallback()])
    with pytest.raises(ValueError, match=r"layers \[1, 2\] without one.*BalanceLossCallback"):
        trainer.train()


@pytest.mark.parametrize("settings, message", [({"gamma": -1}, "gamma=-1"), ({"until": 1.5}, "until=1.5")])
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        dsm.LoadBalanceCallback(**settings)


def test_a_batch_of_padding_moves_nothing(tmp_path):
    rows = [dict.fromkeys(("input_ids", "attention_mask"), torch.zeros(8, dtype=torch.long)) for _ in range(4)]
    rows = [row | {"labels": torch.full((8,), -100)} for row in rows]
    model = load(tmp_path, torch.float32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    callbacks = [dsm.LoadBalanceCallback(0.5), dsm.BalanceLossCallback(0.1), dsm.MoeTelemetryCallback()]
    settings = arguments(tmp_path, max_steps=2, weight_decay=0.0)
    Trainer(model, settings, train_dataset=rows, callbacks=callbacks).train()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_nothing_is_left_behind(tmp_path):
    found = train(tmp_path, dtype="float32", max_steps=2)
    assert found["model"].model.training_state is None


def test_counting_by_hand_needs_no_trainer():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(SHAPES["v3"]()).train()
    state = model.model.training_state = TrainingState()
    ids = torch.randint(3, 128, (2, 10))
    model(ids)
    model.eval()(ids)
    assert {layer: int(load.sum()) for layer, load in state.loads.items()} == {1: 80, 2: 80}
