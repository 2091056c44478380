"""peft on models whose weights stay FP8: as on the dequantised model, or refused by name and nothing changed."""

import pytest
import torch
from adapters import (
    ATTENTION,
    EXPERTS,
    IDS,
    MLP,
    adapted,
    dequantised,
    doors,
    expert_adapter,
    load,
    logits,
    stacked,
    train,
)
from releases import SHAPES, write_release
from test_int4_release import write_int4
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.utils.import_utils import is_peft_greater_or_equal

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.tools

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
ROUTED = {"target_modules": [], "target_parameters": EXPERTS}
REFUSED = {
    "weight": (
        {"target_modules": ["q_b_proj"], "target_parameters": ["self_attn.o_proj.weight"]},
        "o_proj: found FP8-resident",
    ),
    "copies of MLPs": (
        {"target_modules": ["o_proj"], "modules_to_save": ["mlp"]},
        "mlp.*found FP8-resident.*modules_to_save",
    ),
    "copies of layers": (
        {"target_modules": ["q_b_proj"], "modules_to_save": ["o_proj"]},
        "o_proj: found FP8-resident",
    ),
    "experts as a module": ({"target_modules": ["o_proj", "experts"]}, "mlp.experts: .*target_parameters="),
    "dora": ({**ROUTED, "use_dora": True}, "mlp.experts: found use_dora=True"),
    "dropout": ({**ROUTED, "lora_dropout": 0.1}, "mlp.experts: found lora_dropout=0.1"),
    "pissa": ({**ROUTED, "init_lora_weights": "pissa"}, "mlp.experts: found init_lora_weights=pissa"),
    "orthogonal": (
        {"target_modules": ["shared_experts.up_proj"], "init_lora_weights": "orthogonal"},
        "shared_experts.up_proj: found FP8-resident codes.*init_lora_weights='orthogonal', which starts from the weight or in its dtype",
    ),
    "loftq": (
        {
            "target_modules": "all-linear",
            "exclude_modules": ["experts"],
            "init_lora_weights": "loftq",
            "loftq_config": {"loftq_bits": 4},
        },
        "found FP8-resident codes.*init_lora_weights='loftq'",
    ),
    "kasa": (
        {"target_modules": ["o_proj"], "kasa_config": peft.KasaConfig(), "init_lora_weights": True},
        "o_proj: found FP8-resident codes.*kasa_config='KasaConfig.*LoRA without it does not",
    ),
    "bdlora": (
        {"target_modules": ["o_proj"], "use_bdlora": peft.BdLoraConfig(nblocks=2, target_modules_bd_a=["o_proj"])},
        "o_proj: found FP8-resident codes.*use_bdlora=.BdLoraConfig",
    ),
    "rank": ({**ROUTED, "r": 33}, "down_proj: found rank 33, wanted at most 32"),
}
needs_add_adapter = pytest.mark.skipif(
    not is_peft_greater_or_equal(MIN_PEFT_VERSION),
    reason=f"this transformers adds adapters by peft {MIN_PEFT_VERSION}",
)


@pytest.fixture(scope="module")
def fp8_release(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peft") / "fp8"
    write_release(folder, SHAPES["v3-mtp"](), fp8=True)
    return folder


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
    if dtype == torch.float32:
        model.save_pretrained(tmp_path)
        for loaded in doors(fp8_release, tmp_path).values():
            assert torch.equal(logits(loaded.eval()), want)
    assert torch.equal(logits(model.unload()), logits(load(fp8_release, dtype=dtype)))


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize(("kind", "message"), REFUSED.values(), ids=REFUSED)
def test_what_fp8_cannot_take_is_refused_by_name_and_leaves_the_model_as_it_was(kind, message, is_first, fp8_release):
    model = load(fp8_release)
    if not is_first:
        wrapped = adapted(model, target_modules=["o_proj"])
    before, modules = logits(model), [name for name, _ in model.named_modules()]
    config = peft.LoraConfig(**{"r": 2, "init_lora_weights": False} | kind)
    as_it_was = config.to_dict()
    with pytest.raises(ValueError, match=message):
        if is_first:
            peft.get_peft_model(model, config)
        else:
            wrapped.add_adapter("second", config)
    assert config.to_dict() | {"base_model_name_or_path": None} == as_it_was
    assert torch.equal(logits(model), before)
    assert [name for name, _ in model.named_modules()] == modules
    assert not hasattr(model, "peft_config") if is_first else list(model.peft_config) == ["default"]


def test_stored_adapters_take_the_place_of_starts_that_leave_the_weight(fp8_release, tmp_path):
    write_int4(tmp_path / "int4", SHAPES["kimi"](), linears=True)
    for folder, ways in ((fp8_release, ("PeftModel", "load_adapter")), (tmp_path / "int4", ("PeftModel",))):
        model = adapted(load(folder), target_modules=["o_proj"])
        for start in ("orthogonal", "lora_ga", "mica", "pissa"):
            model.peft_config["default"].init_lora_weights = start
            model.save_pretrained(tmp_path / start, save_embedding_layers=False)
            for way in ways:
                again = load(folder)
                try:
                    if way == "PeftModel":
                        again = peft.PeftModel.from_pretrained(again, tmp_path / start).eval()
                    else:
                        again.load_adapter(tmp_path / start)
                except ValueError as error:
                    assert start == "pissa" and "init_lora_weights='pissa', which starts from the weight" in str(error)
                else:
                    assert start != "pissa" and torch.equal(logits(again), logits(model))


@needs_add_adapter
@pytest.mark.parametrize(("kind", "message"), REFUSED.values(), ids=REFUSED)
def test_add_adapter_refuses_it_all_by_name(kind, message, fp8_release):
    model = load(fp8_release)
    before, trained = logits(model), [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(ValueError, match=message):
        model.add_adapter(peft.LoraConfig(**{"r": 2, "init_lora_weights": False} | kind))
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


@pytest.mark.parametrize("base", [load, stacked])
@pytest.mark.parametrize("projections", [MLP, MLP[2:]], ids=["with attention", "experts alone"])
def test_adapters_with_an_entry_per_expert_are_their_dense_difference(projections, base, fp8_release, tmp_path):
    dense = dequantised(fp8_release)
    expert_adapter(tmp_path, dense, projections, base_model_name_or_path=str(fp8_release), task_type="CAUSAL_LM")
    loaded = base(fp8_release)
    loaded.load_adapter(tmp_path)
    torch.testing.assert_close(logits(loaded), logits(dense), rtol=1e-3, atol=1e-3)
    wrapped = peft.PeftModel.from_pretrained(base(fp8_release), tmp_path).eval()
    assert torch.equal(logits(wrapped), logits(loaded))
    second = adapted(base(fp8_release), target_modules=["o_proj"])
    second.load_adapter(tmp_path, "second")
    second.set_adapter("second")
    assert torch.equal(logits(second), logits(loaded))


KINDS = {"attention": {"target_modules": ATTENTION}, "experts": ROUTED}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_trainer_resumes_on_fp8_as_if_never_interrupted(kind, fp8_release, tmp_path):
    def trained(resume):
        torch.manual_seed(0)
        model = peft.get_peft_model(load(fp8_release), peft.LoraConfig(r=2, task_type="CAUSAL_LM", **kind))
        return train(model, tmp_path, resume)

    straight = trained(None)
    assert straight[-1] != straight[0]
    assert trained(str(tmp_path / "checkpoint-2")) == straight
