"""LoRA on the formats of four bits, mapped, stacked and nested, and on FP8, next to plain transformers and peft on the dequantised weights."""

import copy

import pytest
import torch
from adapters import ATTENTION, EXPERTS, IDS, MLP, adapted, dequantised, load, logits, plain, stacked, train
from releases import COMMON, V3, same_bits, write_release
from safetensors import safe_open
from transformers import Trainer, TrainingArguments

import modeling_deepseek_moe as dsm
from modeling_deepseek_moe.quantized.bitsandbytes_experts import BitsAndBytesExperts
from modeling_deepseek_moe.quantized.bitsandbytes_mapped import MappedBitsAndBytesExperts
from modeling_deepseek_moe.quantized.experts import StackedQuantizedExperts
from modeling_deepseek_moe.quantized.mapped import MappedExperts

peft = pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")
from bnb_models import SIZES, wish  # noqa: E402

# rows of whole blocks of 64, as in the releases

pytestmark = pytest.mark.tools

SHAPE = COMMON | V3 | SIZES | {"num_hidden_layers": 2, "moe_intermediate_size": 64, "n_shared_experts": 1}
LOADED = {
    "INT4, mapped": ("int4", load, MappedExperts),
    "INT4, stacked": ("int4", stacked, StackedQuantizedExperts),
    "NF4, mapped": ("nf4", load, MappedBitsAndBytesExperts),
    "NF4": ("bf16", lambda folder: load(folder, quantization_config=wish("nf4")), BitsAndBytesExperts),
    "NF4, nested": ("bf16", lambda folder: load(folder, quantization_config=wish("nf4-double")), BitsAndBytesExperts),
}
FP8 = {
    "FP8, mapped": ("fp8", load, MappedExperts),
    "FP8, stacked": ("fp8", stacked, StackedQuantizedExperts),
}
KINDS = {
    "rslora, patterns": {
        "target_modules": ATTENTION,
        "target_parameters": EXPERTS,
        "use_rslora": True,
        "rank_pattern": {"experts.down_proj": 3, "o_proj": 4},
        "alpha_pattern": {"experts.gate_up_proj": 5},
    },
    "mlp": {"target_modules": MLP},
    "all-linear": {"target_modules": "all-linear"},
}
CASES = [(name, "rslora, patterns") for name in LOADED] + [
    (name, kind) for name in ("INT4, mapped", "NF4, nested") for kind in ("mlp", "all-linear")
]
ROUTED = {"target_modules": [], "target_parameters": EXPERTS}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Releases by format, in bf16, FP8 and four bits."""
    parent = tmp_path_factory.mktemp("bases")
    write_release(parent / "bf16", dsm.DeepseekV3Config(**SHAPE))
    write_release(parent / "fp8", dsm.DeepseekV3Config(**SHAPE), fp8=True)
    load(parent / "bf16").save_pretrained(parent / "int4", quantize="int4")
    load(parent / "bf16", quantization_config=wish("nf4")).save_pretrained(parent / "nf4")
    return parent


@pytest.fixture(scope="module")
def bases(folders):
    """The function that loads a base, and the folder of its dequantised weights in fp32, which plain transformers loads."""

    def of(name):
        release, door, kind = (LOADED | FP8)[name]
        out = folders / f"plain {name}"
        if not out.exists():
            by_itself = release in ("fp8", "int4")
            model = dequantised(folders / release) if by_itself else door(folders / release).dequantize()
            model.save_pretrained(out)

        def opened():
            model = door(folders / release)
            assert type(model.model.layers[1].mlp.experts) is kind
            return model

        return opened, out

    return of


def changed(model):
    """With adapters that do something, the same ones for every model that has them."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name:
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.05
    return model


def gradients(model):
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if "lora_" in name}


def keys(folder):
    return set(safe_open(folder / "adapter_model.safetensors", "pt").keys())


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_outputs_gradients_and_files_are_those_of_the_dequantised_model(name, kind, bases, tmp_path):
    opened, source = bases(name)
    kind = {"init_lora_weights": True} | KINDS[kind]
    ours, theirs = changed(adapted(opened(), **kind)), adapted(plain(source), **kind)
    assert {key for key, _ in ours.named_parameters() if "lora_" in key} == {
        key for key, _ in theirs.named_parameters() if "lora_" in key
    }
    peft.set_peft_model_state_dict(theirs, peft.get_peft_model_state_dict(ours))
    want = logits(theirs)
    found = logits(ours)
    assert (found - want).norm() <= 1e-3 * want.norm()
    assert not torch.allclose(want, logits(plain(source)), atol=1e-2)
    grads, wanted = gradients(ours), gradients(theirs)
    assert grads.keys() == wanted.keys() and sum(".experts." in name for name in grads) == 4
    for key, grad in grads.items():
        assert (grad is None) == (wanted[key] is None)
        assert grad is None or (grad - wanted[key]).norm() <= 1e-3 * wanted[key].norm(), key
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    assert keys(tmp_path / "ours") == keys(tmp_path / "theirs")
    for model, folder in ((opened(), "theirs"), (plain(source), "ours")):
        back = logits(peft.PeftModel.from_pretrained(model, tmp_path / folder).eval())
        assert (back - want).norm() <= 1e-3 * want.norm()
    assert torch.equal(logits(peft.PeftModel.from_pretrained(opened(), tmp_path / "ours").eval()), found)
    loaded = opened()
    loaded.load_adapter(tmp_path / "ours")
    assert torch.equal(logits(loaded), found)


@pytest.mark.parametrize("name", LOADED)
def test_several_adapters(name, bases):
    opened, source = bases(name)
    bare = logits(opened())
    model = changed(adapted(opened(), **ROUTED))
    first = logits(model)
    model.add_adapter("second", peft.LoraConfig(r=3, use_rslora=True, init_lora_weights=False, **ROUTED))
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    second = logits(model)
    assert not torch.allclose(second, first, atol=1e-2)
    with torch.no_grad():
        mixed = model(IDS.repeat(3, 1), adapter_names=["second", "__base__", "default"]).logits.float()
    for found, wanted in zip(mixed, (second, bare, first), strict=True):
        torch.testing.assert_close(found[None], wanted, rtol=1e-4, atol=1e-4)
    model.base_model.set_adapter(["default", "second"])
    theirs = peft.get_peft_model(plain(source), peft.LoraConfig(r=2, **ROUTED)).eval()
    theirs.add_adapter("second", peft.LoraConfig(r=3, use_rslora=True, **ROUTED))
    theirs.load_state_dict({key: value for key, value in model.state_dict().items() if "lora_" in key}, strict=False)
    theirs.base_model.set_adapter(["default", "second"])
    want = logits(theirs)
    assert (logits(model) - want).norm() <= 1e-3 * want.norm()
    with model.disable_adapter():
        assert torch.equal(logits(model), bare)
    model.delete_adapter("second")
    assert torch.equal(logits(model), first)
    assert torch.equal(logits(model.unload()), bare)


@pytest.mark.parametrize("name", ["INT4, stacked", "NF4"])
def test_merged_into_codes_and_taken_out_again(name, bases):
    opened, _ = bases(name)
    model = changed(adapted(opened(), **ROUTED))
    bare, want, codes = logits(opened()), logits(model), dict(model.state_dict())
    codes = {key: value.clone() for key, value in codes.items()}
    model.merge_adapter()
    merged = logits(model)
    assert (merged - want).norm() < 0.7 * (bare - want).norm()  # codes of 4 bits lose much of what is small
    model.unmerge_adapter()
    assert torch.equal(logits(model), want)
    assert all(same_bits(value, codes[key]) for key, value in model.state_dict().items())
    assert torch.equal(logits(model.merge_and_unload()), merged)


NO_WAY = {  # into bitsandbytes' codes; the first two say so nowhere, and C3A would take them for weights
    "IA3": lambda: peft.IA3Config(target_modules=["o_proj"], feedforward_modules=[]),
    "ADALORA": lambda: peft.AdaLoraConfig(init_r=2, total_step=10, target_modules=["o_proj"]),
    "C3A": lambda: peft.C3AConfig(block_size=32, target_modules=["o_proj"]),
}


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("method", NO_WAY)
def test_what_has_no_way_into_codes_of_bitsandbytes_is_refused_by_name(method, kind, folders):
    model = peft.get_peft_model(load(folders / "bf16", quantization_config=wish(kind)), NO_WAY[method]()).eval()
    layer = model.base_model.model.model.layers[0].self_attn.o_proj
    want = logits(model)
    message = rf"adapter default: found the codes of bitsandbytes' Linear.* merge by peft\.tuners\.{method.lower()}\..*dequantize"
    for merge in (layer.merge, model.merge_adapter, copy.deepcopy(model).merge_and_unload):
        with pytest.raises(ValueError, match=message):
            merge()
    assert torch.equal(logits(model), want)
    layer.merge(adapter_names=["of other layers"])
    assert not layer.merged


@pytest.mark.parametrize("kind", ["HRAConfig", "DeftConfig", "PeanutConfig"])
def test_methods_that_take_codes_of_bitsandbytes_for_weights_are_refused_by_name(kind, folders):
    model = load(folders / "bf16", quantization_config=wish("int8"))
    want = logits(model)
    with pytest.raises(ValueError, match=r"o_proj: found bitsandbytes' codes.*which takes codes for weights"):
        peft.get_peft_model(model, getattr(peft, kind)(target_modules=["o_proj"]))
    assert torch.equal(logits(model), want)


@pytest.mark.parametrize("name", ["FP8, stacked", *LOADED])
def test_training_goes_on_exactly(name, bases, tmp_path):
    opened, _ = bases(name)

    def trained(resume):
        torch.manual_seed(0)
        model = peft.get_peft_model(opened(), peft.LoraConfig(r=2, task_type="CAUSAL_LM", **ROUTED))
        losses = train(model, tmp_path, resume)
        return losses, {key: p.detach() for key, p in model.named_parameters() if p.requires_grad}

    losses, straight = trained(None)
    again, resumed = trained(str(tmp_path / "checkpoint-2"))
    assert again == losses and losses[-1] != losses[0]
    assert all(torch.equal(resumed[key], value) for key, value in straight.items())


def test_balancing_is_as_on_the_dequantised_model(bases, tmp_path):
    opened, source = bases("NF4, nested")
    rows = [{"input_ids": list(range(i, i + 12)), "labels": list(range(i, i + 12))} for i in range(4, 12)]

    def balanced(model):
        model = changed(adapted(model, **ROUTED))
        arguments = TrainingArguments(
            tmp_path, max_steps=3, per_device_train_batch_size=2, learning_rate=1e-3, logging_steps=1, save_strategy="no",
            report_to=[], use_cpu=True, disable_tqdm=True, optim="paged_adamw_8bit", gradient_checkpointing=True,
        )  # fmt: skip
        callbacks = [dsm.LoadBalanceCallback(0.01), dsm.BalanceLossCallback(0.01), dsm.MoeTelemetryCallback()]
        trainer = Trainer(model, arguments, train_dataset=rows, callbacks=callbacks)
        model.enable_input_require_grads()
        trainer.train()
        logs = [entry for entry in trainer.state.log_history if "balance_loss" in entry]
        gate = model.base_model.model.model.layers[1].mlp.gate
        return gate.e_score_correction_bias.tolist(), [(entry["max_vio"], entry["balance_loss"]) for entry in logs]

    (bias, logged), (wanted, their_logs) = balanced(opened()), balanced(load(source))
    assert bias == wanted != opened().model.layers[1].mlp.gate.e_score_correction_bias.tolist()
    assert len(logged) == 3
    for found, theirs in zip(logged, their_logs, strict=True):
        assert found == pytest.approx(theirs, rel=1e-3)
