"""What `plan --train` predicts, by counting: parameters, states, what autograd keeps, and the peak of what torch allocates."""

import json

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from typer.testing import CliRunner

import modeling_deepseek_moe as dsm
from modeling_deepseek_moe.cli import app
from modeling_deepseek_moe.cli._train_lora import LoraOptions, add_adapter
from modeling_deepseek_moe.training_memory import FULL, LORA, QLORA, TrainingSetup, predict_training_memory

pytest.importorskip("peft")
ROWS, LENGTH = 2, 192
SIZES = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 384,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "num_nextn_predict_layers": 0,
    "max_position_embeddings": 1024,
}
SHAPES = {
    "query latent": SIZES,
    "no query latent": SIZES | {"q_lora_rank": None, "n_shared_experts": 2},
    "dense": SIZES | {"first_k_dense_replace": 3},
}
DTYPES = {torch.float32: 4, torch.bfloat16: 2}


def make(shape, method=FULL, dtype=torch.float32):
    torch.manual_seed(0)
    config = dsm.DeepseekV3Config(**SHAPES[shape])
    model = dsm.DeepseekV3ForCausalLM(config).to(dtype).train()
    setup = TrainingSetup(method, 4, ROWS, LENGTH, DTYPES[dtype])
    if method == LORA:
        model = add_adapter(model, LoraOptions(lora=True, lora_rank=4))
    return config, model, setup


def step(model):
    ids = torch.randint(3, 500, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    return model(input_ids=ids, labels=ids).loss


def kept(model) -> int:
    """Bytes of all tensors that autograd keeps of a forward pass, parameters left out."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage  # alive, so that no other takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step(model)
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", [FULL, LORA])
def test_parameters_gradients_and_weights(shape, method):
    config, model, setup = make(shape, method)
    found = predict_training_memory(config, setup)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert found.trained_parameters == sum(p.numel() for p in trained)
    step(model).backward()
    assert found.gradients == sum(p.grad.nbytes for p in trained)
    assert found.weights + found.adapter == sum(
        tensor.nbytes
        for tensor in (*model.parameters(), *(b for name, b in model.named_buffers() if name.endswith("_bias")))
    )


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_bnb_8bit", "paged_adamw_32bit", "lion_8bit", "sgd"])
def test_states_of_optimizers(optim, tmp_path):
    from transformers import Trainer, TrainingArguments

    if optim != "adamw_torch_fused" and optim != "sgd":
        pytest.importorskip("bitsandbytes")
    config, model, setup = make("query latent")
    arguments = TrainingArguments(str(tmp_path), optim=optim, use_cpu=True, report_to=[])
    optimizer = Trainer(model, arguments).create_optimizer()
    step(model).backward()
    optimizer.step()
    names = ("exp_avg", "exp_avg_sq", "state1", "state2", "absmax1", "absmax2")
    leaves = [state[name] for state in optimizer.state.values() for name in names if name in state]
    setup = TrainingSetup(**(vars(setup) | {"optim": optim}))
    assert predict_training_memory(config, setup).optimizer == pytest.approx(sum(t.nbytes for t in leaves), rel=0.01)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", [FULL, LORA])
def test_what_autograd_keeps(method, shape, dtype):
    config, model, setup = make(shape, method, dtype)
    found = predict_training_memory(config, setup)
    head = ROWS * LENGTH * 4 * (1 if method == LORA else 1 + 4 // DTYPES[dtype]) * config.hidden_size
    assert found.activations + found.logits // 2 + head == pytest.approx(kept(model), rel=0.05)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", [FULL, LORA])
def test_the_peak_of_what_torch_allocates(method, checkpointing):
    config, model, setup = make("query latent", method)
    setup = TrainingSetup(**(vars(setup) | {"gradient_checkpointing": checkpointing}))
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)

    def train():
        step(model).backward()
        optimizer.step()
        optimizer.zero_grad()

    train()  # from the second step on there are states
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        train()
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    there = sum(p.nbytes for p in model.parameters()) + 2 * sum(p.nbytes for p in trained)
    predicted = predict_training_memory(config, setup)
    assert predicted.peak - predicted.retained == pytest.approx(there + most, rel=0.1)


def test_four_bits_are_counted_as_bitsandbytes_holds_them(tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM

    from modeling_deepseek_moe.cli._train_lora import four_bit

    config, model, _ = make("query latent", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, quantization_config=four_bit(torch.bfloat16)
    )
    found = predict_training_memory(config, TrainingSetup(QLORA, itemsize=2))
    codes = sum(p.nbytes for p in loaded.parameters())
    assert codes < found.weights + 1 and found.weights == pytest.approx(codes, rel=0.05)


def test_accumulation_and_mtp_take_more():
    config = dsm.DeepseekV3Config(**SIZES | {"num_nextn_predict_layers": 1})
    one = predict_training_memory(config, TrainingSetup(batch_size=8))
    assert predict_training_memory(config, TrainingSetup(batch_size=8, accumulates=True)).peak > one.peak
    more = predict_training_memory(config, TrainingSetup(batch_size=8, mtp=True))
    assert more.weights == one.weights and more.trained_parameters > one.trained_parameters
    assert more.activations > one.activations
    assert predict_training_memory(config, TrainingSetup(LORA)).weights < one.weights  # loaded without MTP


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "half"}, "method='half' is not one of full, lora, qlora"),
        ({"optim": "adafactor"}, "optim='adafactor' is not one of those that are counted"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"rank": -1}, "rank=-1 must be at least 1"),
    ],
)
def test_a_training_that_cannot_be(options, words):
    with pytest.raises(ValueError, match=words):
        TrainingSetup(**options)


def plan(*options):
    return CliRunner().invoke(app, ["plan", dsm.tiny_checkpoint(), *map(str, options)])


def test_the_command():
    result = plan("--train", "qlora", "--batch-size", 1, "--optim", "paged_adamw_8bit", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["memory"]["peak"] > found["memory"]["weights"] > 0 and found["verdict"] == "fits"
    assert found["setup"]["itemsize"] == 2 and found["needed"] > found["memory"]["peak"]
    shown = plan("--train", "full", "--batch-size", 1000000)
    assert "does not fit" in shown.stdout and "--gradient-checkpointing" in shown.stdout
    long = plan("--train", "lora", "--seq-length", 1025, "--json")
    assert json.loads(long.stdout) and "1,025 tokens are more than the model's 1,024" in " ".join(long.stderr.split())
    assert not plan("--train", "lora", "--seq-length", 1024, "--json").stderr
    for options, words in (
        (["--batch-size", 3], "found --batch-size without --train"),
        (["--train", "half"], "method='half' is not one of"),
        (["--train", "lora", "--train-dtype", "int8"], "--train-dtype: found 'int8'"),
    ):
        result = plan(*options)
        assert result.exit_code == 2 and words in " ".join(result.output.split())
