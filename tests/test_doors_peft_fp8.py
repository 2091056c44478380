"""peft on models whose weights stay FP8: as on the dequantised model, or refused by name and nothing changed.

One refusal is peft's own: of a first adapter that names nothing but experts, through `get_peft_model` or `PeftModel`. peft looks for
a parameter of that name, finds none, and raises before the model has seen the adapter's config.
"""

import pytest
import torch
from adapters import ATTENTION, EXPERTS, IDS, MLP, adapted, doors, expert_adapter, load, logits
from releases import SHAPES, write_release
from transformers import FineGrainedFP8Config, Trainer, TrainingArguments
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.utils.import_utils import is_peft_greater_or_equal

from modeling_deepseek_moe.fp8_experts import StackedFp8Experts

peft = pytest.importorskip("peft")
from peft.utils.error import NoMatchingPeftModuleError  # noqa: E402

QUERY = ["q_b_proj", "o_proj", "kv_b_proj"]
METHODS = {
    "lora": lambda: peft.LoraConfig(r=2, target_modules=QUERY),
    "dora": lambda: peft.LoraConfig(r=2, target_modules=QUERY, use_dora=True),
    "bias": lambda: peft.LoraConfig(r=2, target_modules=QUERY, bias="all"),
    "head": lambda: peft.LoraConfig(r=2, target_modules=QUERY, modules_to_save=["lm_head"]),
    "ia3": lambda: peft.IA3Config(target_modules=[*QUERY, "down_proj"], feedforward_modules=["down_proj"]),
    "loha": lambda: peft.LoHaConfig(r=2, target_modules=QUERY),
    "lokr": lambda: peft.LoKrConfig(r=2, target_modules=QUERY),
    "vera": lambda: peft.VeraConfig(r=2, target_modules=["o_proj"]),
    "adalora": lambda: peft.AdaLoraConfig(init_r=2, total_step=10, target_modules=QUERY),
}
REFUSED = {
    "mlp": {"target_modules": MLP},
    "all-linear": {"target_modules": "all-linear"},
    "experts": {"target_modules": ["o_proj"], "target_parameters": EXPERTS},
    "weight": {"target_modules": ["q_b_proj"], "target_parameters": ["self_attn.o_proj.weight"]},
    "copies of MLPs": {"target_modules": ["o_proj"], "modules_to_save": ["mlp"]},
    "copies of layers": {"target_modules": ["q_b_proj"], "modules_to_save": ["o_proj"]},
}
ONLY_EXPERTS = {
    "mlp alone": {"target_modules": ["gate_proj", "up_proj", "down_proj"]},
    "down_proj alone": {"target_modules": ["down_proj"]},
    "regex": {"target_modules": r".*shared_experts\.(gate|up|down)_proj"},
    "experts alone": {"target_modules": [], "target_parameters": EXPERTS},
}
MESSAGE = r"model\.layers\.\d.*found FP8-resident.*dequantize=True.*fp8-to-bf16"
needs_add_adapter = pytest.mark.skipif(
    not is_peft_greater_or_equal(MIN_PEFT_VERSION),
    reason=f"this transformers adds adapters by peft {MIN_PEFT_VERSION}",
)


@pytest.fixture(scope="module")
def fp8_release(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peft") / "fp8"
    write_release(folder, SHAPES["v3-mtp"](), fp8=True)
    return folder


def dequantised(folder):
    return load(folder, quantization_config=FineGrainedFP8Config(dequantize=True))


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_method_is_as_on_the_dequantised_model_and_trains(method, fp8_release, tmp_path):
    theirs = peft.get_peft_model(dequantised(fp8_release), method()).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.2
    theirs.save_pretrained(tmp_path)
    ours = peft.PeftModel.from_pretrained(load(fp8_release), tmp_path, is_trainable=True).eval()
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(logits(ours), logits(load(fp8_release)), atol=1e-2)
    for model in (ours, theirs):
        model(input_ids=IDS, labels=IDS).loss.backward()
    wanted = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad and p.grad is not None}
    grads = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    assert set(grads) == set(wanted)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, wanted[name], rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_on_fp8_attention(dtype, fp8_release, tmp_path):
    model = adapted(load(fp8_release, dtype=dtype), target_modules=ATTENTION, task_type="CAUSAL_LM")
    want = logits(model)
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=ATTENTION))
    assert all(p.dtype == torch.float32 for name, p in model.named_parameters() if "lora_" in name)
    first = model.base_model.model.model.layers[0].self_attn.o_proj.lora_A["second"].weight
    assert not torch.equal(first, first.to(torch.float8_e4m3fn).float())
    model.set_adapter("second")
    assert torch.equal(logits(model), logits(load(fp8_release, dtype=dtype)))  # its B is 0
    model.set_adapter("default")
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ValueError, match=r"(o_proj|q_b_proj): found FP8 codes.*dequantize=True.*merge-adapter"):
            merge()
        assert torch.equal(logits(model), want)
    if dtype == torch.float32:
        model.save_pretrained(tmp_path)
        for loaded in doors(fp8_release, tmp_path).values():
            assert torch.equal(logits(loaded.eval()), want)
    assert torch.equal(logits(model.unload()), logits(load(fp8_release, dtype=dtype)))


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("kind", REFUSED.values(), ids=REFUSED)
def test_what_fp8_cannot_take_is_refused_by_name_and_leaves_the_model_as_it_was(kind, is_first, fp8_release):
    model = load(fp8_release)
    if not is_first:
        wrapped = adapted(model, target_modules=["o_proj"])
    before, modules = logits(model), [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=MESSAGE):
        if is_first:
            adapted(model, **kind)
        else:
            wrapped.add_adapter("second", peft.LoraConfig(r=2, init_lora_weights=False, **kind))
    assert torch.equal(logits(model), before)
    assert [name for name, _ in model.named_modules()] == modules
    assert not hasattr(model, "peft_config") if is_first else list(model.peft_config) == ["default"]


@pytest.mark.parametrize("kind", ONLY_EXPERTS.values(), ids=ONLY_EXPERTS)
def test_a_first_adapter_of_nothing_but_experts_is_refused_by_peft_a_second_here(kind, fp8_release):
    model = load(fp8_release)
    before = logits(model)
    with pytest.raises(NoMatchingPeftModuleError, match="target_parameters"):
        adapted(model, **kind)
    assert torch.equal(logits(model), before) and not hasattr(model, "peft_config")
    wrapped = adapted(model, target_modules=["o_proj"])
    before = logits(wrapped)
    with pytest.raises(ValueError, match=MESSAGE):
        wrapped.add_adapter("second", peft.LoraConfig(r=2, **kind))
    assert torch.equal(logits(wrapped), before)


@pytest.mark.parametrize("kind", [REFUSED["mlp"], *ONLY_EXPERTS.values()], ids=["mlp", *ONLY_EXPERTS])
def test_experts_that_are_stacked_are_refused_too(kind, fp8_release, tmp_path):
    on_disk = {f"model.layers.{layer}": "disk" for layer in (1, 2, 3)}
    parts = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    model = load(fp8_release, device_map=on_disk | parts, offload_folder=tmp_path)
    assert type(model.model.layers[1].mlp.experts) is StackedFp8Experts
    before = logits(model)
    with pytest.raises(ValueError, match=MESSAGE):
        adapted(model, **kind)
    assert torch.equal(logits(model), before) and not hasattr(model, "peft_config")


@needs_add_adapter
@pytest.mark.parametrize("kind", (REFUSED | ONLY_EXPERTS).values(), ids=REFUSED | ONLY_EXPERTS)
def test_add_adapter_refuses_it_all_by_name(kind, fp8_release):
    model = load(fp8_release)
    before, trained = logits(model), [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(ValueError, match=MESSAGE):
        model.add_adapter(peft.LoraConfig(r=2, init_lora_weights=False, **kind))
    assert torch.equal(logits(model), before) and not hasattr(model, "peft_config")
    assert [parameter.requires_grad for parameter in model.parameters()] == trained
    model.add_adapter(peft.LoraConfig(r=2, init_lora_weights=False, target_modules=ATTENTION))
    assert not torch.allclose(logits(model), before, atol=1e-2)


def test_methods_that_compute_with_codes_are_refused(fp8_release):
    model = load(fp8_release)
    before = logits(model)
    for config in (peft.ShiraConfig(r=2, target_modules=["o_proj"]), peft.OFTConfig(target_modules=["o_proj"])):
        with pytest.raises(ValueError, match=r"o_proj: found FP8-resident codes.*peft_type=(SHIRA|OFT).*LORA"):
            peft.get_peft_model(model, config)
        assert torch.equal(logits(model), before)


@pytest.mark.parametrize("projections", [MLP, MLP[2:]], ids=["with attention", "experts alone"])
def test_adapters_with_an_entry_per_expert_are_refused_not_dropped(projections, fp8_release, tmp_path):
    expert_adapter(tmp_path, dequantised(fp8_release), projections)
    model = load(fp8_release)
    before = logits(model)
    with pytest.raises(ValueError, match=MESSAGE):
        model.load_adapter(tmp_path)
    assert torch.equal(logits(model), before) and not hasattr(model, "peft_config")
    with pytest.raises(ValueError, match="target_parameters" if projections == MLP[2:] else MESSAGE):
        peft.PeftModel.from_pretrained(model, tmp_path)
    assert torch.equal(logits(model), before)
    wrapped = adapted(model, target_modules=["o_proj"])
    before = logits(wrapped)
    with pytest.raises(ValueError, match=MESSAGE):
        wrapped.load_adapter(tmp_path, "second")
    assert torch.equal(logits(wrapped), before) and list(model.peft_config) == ["default"]


def test_trainer_resumes_on_fp8_as_if_never_interrupted(fp8_release, tmp_path):
    rows = [{"input_ids": list(range(i, i + 12)), "labels": list(range(i, i + 12))} for i in range(4, 12)]

    def train(resume):
        torch.manual_seed(0)
        model = peft.get_peft_model(
            load(fp8_release), peft.LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=ATTENTION)
        )
        arguments = TrainingArguments(
            tmp_path, max_steps=4, save_steps=2, logging_steps=1, per_device_train_batch_size=2, learning_rate=1e-2,
            report_to=[], use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=rows)
        trainer.train(resume_from_checkpoint=resume)
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    straight = train(None)
    assert straight[-1] != straight[0]
    assert train(str(tmp_path / "checkpoint-2")) == straight
