"""bitsandbytes' 4-bit layers in a bf16 folder: numbers, text, files and training, next to plain transformers' own 4-bit model.

On CPUs with AVX512-BF16 bitsandbytes packs a weight in place when its layer is first called, and the packed layer can neither
pass on gradients nor be read; there each test here meets packed layers too.
"""

import pytest
import torch
import transformers
from families import write_family
from releases import COMMON, V3, write_release
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, FineGrainedFP8Config, Trainer, TrainingArguments

import modeling_deepseek_moe as dsm
from modeling_deepseek_moe.bnb.packing import is_packed
from modeling_deepseek_moe.ops._operands import weight_of

peft = pytest.importorskip("peft")
bnb = pytest.importorskip("bitsandbytes")

pytestmark = pytest.mark.tools

IDS = torch.arange(10, 42)[None]
ATTENTION = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
KINDS = [("nf4", False), ("nf4", True), ("fp4", False), ("fp4", True)]
GREEDY = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The package's trained checkpoint in bf16: five layers and an MTP layer, no dim that bitsandbytes cannot pack."""
    path = tmp_path_factory.mktemp("bf16")
    dequantize = FineGrainedFP8Config(dequantize=True)
    AutoModelForCausalLM.from_pretrained(
        dsm.tiny_checkpoint(), quantization_config=dequantize, dtype=torch.bfloat16
    ).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """As many rows as bitsandbytes can pack in the MTP layer's own head too."""
    path = tmp_path_factory.mktemp("mtp")
    sizes = dict.fromkeys(
        ("hidden_size", "q_lora_rank", "kv_lora_rank", "intermediate_size", "moe_intermediate_size"), 128
    )
    config = COMMON | V3 | sizes | {"qk_rope_head_dim": 32, "num_nextn_predict_layers": 1}
    write_release(path, dsm.DeepseekV3Config(**config))
    return path


def four_bit(kind="nf4", double=False, compute=torch.float32, **others):
    return BitsAndBytesConfig(
        load_in_4bit=True,
        **others,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=compute,
    )


def ours(folder, **settings):
    return AutoModelForCausalLM.from_pretrained(folder, **settings).eval()


def plain(folder, **settings):
    config = transformers.DeepseekV3Config.from_pretrained(folder)
    return transformers.DeepseekV3ForCausalLM.from_pretrained(folder, config=config, **settings).eval()


@torch.no_grad()
def logits(model, ids=IDS, **inputs):
    return model(ids, **inputs).logits.float()


def apart(found, wanted):
    return ((found - wanted).norm() / wanted.norm()).item()


def typically_apart(found, wanted):
    """Of the median token: in bf16 rounding decides for some which expert they meet."""
    return ((found - wanted).norm(dim=-1) / wanted.norm(dim=-1)).median().item()


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind, double", KINDS)
def test_as_near_to_the_exact_model_as_plain(folder, kind, double, compute):
    """Not bit for bit plain's: absorbed attention and experts add up in another order, and 4-bit layers round to bf16."""
    exact = logits(plain(folder, dtype=torch.float32))
    for dtype in (torch.float32, torch.bfloat16):
        # plain leaves routed experts alone
        config = four_bit(kind, double, compute, llm_int8_skip_modules=["lm_head", "experts"])
        settings = {"quantization_config": config, "dtype": dtype}
        our_model, their_model = ours(folder, **settings), plain(folder, **settings)
        found, wanted = logits(our_model), logits(their_model)
        assert apart(found, exact) < 1.25 * apart(wanted, exact)
        assert typically_apart(found, wanted) < 0.5 * typically_apart(wanted, exact)
        assert apart(found, wanted) < 0.75 * apart(wanted, exact)
        text = our_model.generate(IDS, **GREEDY)
        # the choice at each new token, where one of the models may be torn: bitsandbytes' packed layers round most
        near = torch.stack(
            [logits(m, text)[0, IDS.shape[1] - 1 : -1].topk(2).values for m in (our_model, their_model)]
        )
        differs = (text != their_model.generate(IDS, **GREEDY))[:, IDS.shape[1] :]
        first = differs.int().argmax().item() if differs.any() else None  # from there on they answer other texts
        assert first is None or (near[:, first, 0] - near[:, first, 1]).min() < 0.1 * near.abs().max()


@pytest.mark.parametrize("kind, double", KINDS)
def test_the_engine_computes_with_the_exact_weights(folder, kind, double):
    """Next to the model of the weights that bitsandbytes dequantises, in fp32, for a prompt and for single tokens."""
    from bitsandbytes.functional import dequantize_4bit

    config = four_bit(kind, double, llm_int8_skip_modules=["lm_head", "experts"])
    model, exact = ours(folder, quantization_config=config, dtype=torch.float32), ours(folder)
    exact = exact.float()
    with torch.no_grad():
        for name, layer in model.named_modules():
            if type(layer).__name__ == "Linear4bit":
                exact.get_submodule(name).weight.copy_(dequantize_4bit(layer.weight.data, layer.weight.quant_state))
    wanted = logits(exact)
    assert apart(logits(model), wanted) < 1e-5
    with torch.no_grad():
        cache = model(IDS[:, :24], use_cache=True).past_key_values
        steps = [model(IDS[:, i : i + 1], cache=cache, use_cache=True).logits[:, 0] for i in range(24, IDS.shape[1])]
    assert apart(torch.stack(steps, 1), wanted[:, 24:]) < 1e-5


@pytest.mark.parametrize("kind, double", KINDS)
def test_absorbed_is_expanded_and_cached_is_uncached(folder, kind, double):
    model = ours(folder, quantization_config=four_bit(kind, double), dtype=torch.float32)
    for ids in (IDS, torch.stack([IDS[0], IDS[0].flip(0)])):
        assert apart(logits(model, ids, mla_path="absorbed"), logits(model, ids, mla_path="expanded")) < 1e-2
    assert torch.equal(model.generate(IDS, **GREEDY), model.generate(IDS, use_cache=False, **GREEDY))


@pytest.mark.parametrize("double", [False, True])
def test_the_weight_that_decoding_reads_is_the_one_that_the_layer_multiplies_with(folder, double):
    model = ours(folder, quantization_config=four_bit(double=double), dtype=torch.float32)
    layer = model.model.layers[0].self_attn.kv_b_proj
    assert type(layer).__name__ == "Linear4bit" and layer.weight.dtype == torch.uint8
    original = ours(folder, dtype=torch.float32).model.layers[0].self_attn.kv_b_proj.weight.detach()
    for _ in range(2):
        weight = weight_of(layer, torch.zeros(1))
        assert weight.shape == original.shape and apart(weight, original) < 0.15
        with torch.no_grad():
            assert apart(layer(torch.eye(layer.in_features)).T, weight) < 1e-2
        logits(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_left_padded_batches(folder, dtype):
    model = ours(folder, quantization_config=four_bit(), dtype=dtype)
    short = IDS[:, :20]
    pad = torch.full((1, 12), model.config.pad_token_id)
    batch = torch.cat((IDS.flip(1), torch.cat((pad, short), dim=1)))
    mask = (batch != model.config.pad_token_id).long()
    mask[0] = 1
    for path in ("absorbed", "expanded"):
        found = logits(model, batch, attention_mask=mask, mla_path=path)[1, 12:]
        assert apart(found, logits(model, short)[0]) < 0.1
    if dtype == torch.float32:
        found = model.generate(batch, attention_mask=mask, **GREEDY)
        assert torch.equal(found[1, 32:], model.generate(short, **GREEDY)[0, 20:])


@pytest.mark.parametrize("kind, double", KINDS)
def test_saved_after_use_and_loaded_with_its_mtp_layer(release, tmp_path, kind, double):
    model = ours(release, quantization_config=four_bit(kind, double))
    unused = logits(model)
    model.save_pretrained(tmp_path)
    saved = logits(model)
    # scales that are quantised themselves were rounded to bf16 by the use
    assert torch.equal(saved, unused) or (double and apart(saved, unused) < 0.5)
    again = ours(tmp_path)
    assert torch.equal(logits(again), saved)
    with torch.no_grad():
        hidden = model.model(IDS).last_hidden_state
        wanted, found = model.mtp_logits(0, IDS, hidden), again.mtp_logits(0, IDS, hidden)
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])
    assert sum(type(m).__name__ == "Linear4bit" for m in again.model.layers[-1].modules()) == 10


def test_dequantised_after_use(folder):
    model = ours(folder, quantization_config=four_bit(), dtype=torch.float32)
    wanted = logits(model)
    model = model.dequantize()
    assert type(model.model.layers[0].self_attn.o_proj) is torch.nn.Linear
    assert apart(logits(model), wanted) < 0.05


class Texts(torch.utils.data.Dataset):
    def __len__(self):
        return 20

    def __getitem__(self, index):
        ids = (torch.arange(24) * (index + 3) + index) % 600 + 10
        return {"input_ids": ids, "labels": ids}


def qlora(model, **settings):
    torch.manual_seed(0)
    model = peft.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    config = peft.LoraConfig(r=4, target_modules=ATTENTION, task_type="CAUSAL_LM", **settings)
    return peft.get_peft_model(model, config)


def ten_losses(model, out, **settings):
    arguments = TrainingArguments(
        output_dir=str(out),
        per_device_train_batch_size=2,
        max_steps=10,
        learning_rate=5e-3,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        seed=0,
        **settings,
    )
    trainer = Trainer(model, arguments, train_dataset=Texts(), eval_dataset=torch.utils.data.Subset(Texts(), [0]))
    trainer.train()
    return torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


@pytest.mark.slow
def test_qlora_trains_as_plain_is_evaluated_in_between_and_loads(folder, tmp_path):
    settings = {"quantization_config": four_bit(compute=torch.bfloat16), "dtype": torch.bfloat16}
    wanted = ten_losses(qlora(plain(folder, **settings)), tmp_path)
    found = ten_losses(qlora(ours(folder, **settings)), tmp_path)
    assert len(found) == 10 and wanted[-3:].mean() < wanted[:3].mean() - 1
    torch.testing.assert_close(found, wanted, rtol=0.02, atol=0)
    # plain's own, packed by the evaluation, go on without the gradients of all layers but the last
    model = qlora(ours(folder, **settings))
    evaluated = ten_losses(model, tmp_path, eval_strategy="steps", eval_steps=2)
    torch.testing.assert_close(evaluated, found, rtol=0.01, atol=0)

    model.eval()
    trained = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    base = peft.prepare_model_for_kbit_training(ours(folder, **settings))
    assert torch.equal(logits(peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()), trained)


@pytest.mark.parametrize("use_dora", [False, True])
def test_an_adapter_reads_the_weights_that_a_use_has_packed(folder, use_dora):
    """Merging takes a 4-bit weight, adds, and rounds to 4 bits again: the same before and after the model was used."""
    settings = {"quantization_config": four_bit(), "dtype": torch.float32}
    config = peft.LoraConfig(r=4, target_modules=ATTENTION, use_dora=use_dora, init_lora_weights=False)
    found = []
    for used in (False, True):
        model = ours(folder, **settings)
        if used:
            logits(model)
            if use_dora and is_packed(model.model.layers[0].self_attn.o_proj):
                with pytest.raises(ValueError, match=r"_proj: found 4-bit codes.*model\.train\(\)"):
                    peft.get_peft_model(model, config)
            if use_dora:
                model.train()
        torch.manual_seed(0)
        model = peft.get_peft_model(model, config).eval()
        if used:
            logits(model)
        found.append((None if not used else logits(model), logits(model.merge_and_unload())))
    assert apart(found[1][1], found[0][1]) < 1e-5
    assert apart(found[1][1], found[1][0]) < 0.5


def test_a_later_adapter_reads_them_too(folder):
    """peft puts it in without a word, in eval mode too."""
    model = ours(folder, quantization_config=four_bit(), dtype=torch.float32)
    kind = {"r": 4, "init_lora_weights": False}
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_b_proj"], **kind)).eval()
    layers = [layer.self_attn.o_proj for layer in model.get_base_model().model.layers]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = True  # as on a CPU that has it, whichever this one is
    model.add_adapter("later", peft.LoraConfig(target_modules=["o_proj"], **kind))
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)


@pytest.mark.parametrize(
    ("kind", "name"), [("deepseek_v32", "DeepseekV32ForCausalLM"), ("glm_moe_dsa", "GlmMoeDsaForCausalLM")]
)
def test_the_head_weights_of_indexers_are_left_alone(tmp_path, kind, name):
    """As plain transformers does, which has a list for them: a few rows, that weigh what the heads say."""
    write_family(tmp_path / "release", kind)
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "release", quantization_config=quantization).eval()
    model.save_pretrained(tmp_path / "saved")
    for found in (model, AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()):
        indexer = found.model.layers[0].self_attn.indexer
        assert isinstance(indexer.wq_b, bnb.nn.Linear4bit)
        assert type(indexer.weights_proj) is nn.Linear and indexer.weights_proj.weight.is_floating_point()
    kept = getattr(transformers, name)._keep_in_fp32_modules
    assert kept is None or any("weights_proj" in part for part in kept)
    assert torch.equal(found(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize(
    "quantization",
    [four_bit(), four_bit("fp4", double=True), BitsAndBytesConfig(load_in_8bit=True)],
    ids=["nf4", "fp4-double", "int8"],
)
def test_more_tokens(release, tmp_path, quantization):
    """The MTP layer's head is codes, where the model's own is left alone: it gets rows in codes too."""
    model = ours(release, quantization_config=quantization, dtype=torch.float32)
    hidden, size = torch.randn(*IDS.shape, 128), model.config.vocab_size

    def mtp_logits(model):
        with torch.no_grad():
            return model.mtp_logits(0, IDS, hidden)[0].float()

    text, drafts = logits(model), mtp_logits(model)
    model.resize_token_embeddings(size + 32)
    assert torch.equal(logits(model)[..., :size], text)
    more = mtp_logits(model)
    assert more.shape[-1] == size + 32 and apart(more[..., :size], drafts) < 0.02
    model.save_pretrained(tmp_path)
    again = ours(tmp_path)
    assert type(again.model.mtp_layers[0].shared_head.head).__module__.startswith("bitsandbytes")
    assert apart(mtp_logits(again), more) < 1e-2 and apart(logits(again), logits(model)) < 1e-2
    model.resize_token_embeddings(size)
    assert apart(mtp_logits(model), drafts) < 0.02
