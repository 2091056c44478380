"""Training of the indexers against the report's equation, spelled out with autograd; what it does to the rest, and where it is refused."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from families import FIELDS, write_family
from releases import same_bits
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from training_harness import Padded, Record, arguments
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback
from transformers.utils import logging
from typer.testing import CliRunner

import modeling_deepseek_moe as dsm
from modeling_deepseek_moe import indexer_loss
from modeling_deepseek_moe.anatomy import CONFIGS
from modeling_deepseek_moe.cli import app
from modeling_deepseek_moe.moe.training_state import TrainingState
from modeling_deepseek_moe.rope import apply_rotary
from modeling_deepseek_moe.sparse_attention import DeepseekSparseAttention

TOPK, LENGTH = FIELDS["deepseek_v32"]["index_topk"], 24
STAGES = ["dense", "sparse"]


def config_of(kind="deepseek_v32", **changes):
    return CONFIGS[kind].from_dict(FIELDS[kind] | changes)


def make(stage, kind="deepseek_v32", dtype=torch.float64, **changes):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(kind, **changes), dtype=dtype).train()
    model.set_experts_implementation("eager")  # the grouped kernels take no fp64
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".indexer." in name:
                parameter.normal_(std=0.5)
    model.model.training_state = TrainingState(indexer_stage=stage)
    return model


def batch(rows=2, length=LENGTH, padding=(0, 5)):
    ids = torch.randint(3, 128, (rows, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(ids)
    for row, missing in enumerate(padding[:rows]):
        mask[row, length - missing :] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, :15] = -100  # a prompt
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def gradients(model, indexers=True):
    named = ((n, p.grad) for n, p in model.named_parameters() if p.grad is not None)
    return {name: grad.clone() for name, grad in named if (".indexer." in name) == indexers}


def inputs_of_attention(model, given):
    """``{layer: (module, hidden states, rotary tables)}`` of the decoder layers in one pass."""
    seen, handles = {}, []
    for layer in list(model.model.layers)[: model.config.num_hidden_layers]:

        def note(module, args, kwargs):
            seen[module.layer_idx] = module, kwargs["hidden_states"].detach(), kwargs["position_embeddings"]

        handles.append(layer.self_attn.register_forward_pre_hook(note, with_kwargs=True))
    model(**given)
    for handle in handles:
        handle.remove()
    return seen


def defined_loss(module, hidden, tables, mask, stage):
    """Σ_t KL(p ‖ softmax(I)) ``[B]`` of one layer over each row's real tokens: every score whole, the equation term by term."""
    indexer, config, length = module.indexer, module.config, hidden.shape[1]
    seen = torch.ones(length, length, dtype=torch.bool).tril() & (mask[:, None] == 1)  # [B, q, kv]
    with torch.no_grad():
        latent = module.q_a_layernorm(module.q_a_proj(hidden))
        q_nope, q_pe = module._queries(hidden, tables)
        key, _ = module._expand(*module._latents(hidden, tables))
        scores = torch.cat((q_nope, q_pe), -1) @ key.transpose(2, 3) * module.scaling

    def rotated(x):  # [B, ., S, d], the first dims turn
        turned = apply_rotary(x[..., : config.qk_rope_head_dim], *tables, config.indexer_rope_interleave)
        return torch.cat((turned, x[..., config.qk_rope_head_dim :]), -1)

    q = rotated(indexer.wq_b(latent).unflatten(-1, (config.index_n_heads, -1)).transpose(1, 2))
    k = rotated(indexer.k_norm(indexer.wk(hidden)).unsqueeze(1))
    w = indexer.weights_proj(hidden) / math.sqrt(config.index_n_heads * config.index_head_dim)
    index = (w.transpose(1, 2).unsqueeze(-1) * (q @ k.transpose(2, 3)).relu()).sum(1)
    if stage == "sparse":
        best = index.detach().masked_fill(~seen, -math.inf).topk(min(TOPK, length)).indices
        seen = seen & torch.zeros_like(seen).scatter_(2, best, True)
    p = scores.masked_fill(~seen[:, None], -math.inf).softmax(-1).sum(1)
    p = p / p.sum(-1, keepdim=True)
    log_share = index.masked_fill(~seen, -math.inf).log_softmax(-1)
    terms = torch.where(seen & (p > 0), p * (p.clamp_min(1e-300).log() - log_share), 0.0)
    return terms.sum(-1).masked_fill(mask == 0, 0.0).sum(-1)


@pytest.mark.parametrize("kind", ["deepseek_v32", "glm_moe_dsa"])
@pytest.mark.parametrize("stage", STAGES)
def test_the_gradient_is_that_of_the_definition(monkeypatch, stage, kind):
    monkeypatch.setattr(indexer_loss, "WORKSPACE", 2 * 8 * LENGTH * 5 if stage == "dense" else 2 * TOPK * 40 * 5)
    model, given = make(stage, kind), batch()
    labels = (given["labels"][:, 1:] != -100).sum(-1).double()
    shares = labels / labels.sum() / given["attention_mask"].sum(-1)  # a row's mean over tokens, weighed by its labels
    seen = inputs_of_attention(model, given)
    model.zero_grad()
    loss = model(**given).loss
    loss.backward()
    found = gradients(model)
    model.zero_grad()
    layers = [parts for parts in seen.values() if parts[0].indexer]
    wanted = sum((defined_loss(*parts, given["attention_mask"], stage) * shares).sum() for parts in layers)
    wanted.backward()
    expected = gradients(model)
    assert found.keys() == expected.keys() and len(found) == 5 * (3 if kind == "deepseek_v32" else 2)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-12)
    state = model.model.training_state
    sums = state.take_sums()
    assert sums["indexer_loss_labels"] == 2 * labels.sum()  # of both passes
    torch.testing.assert_close(sums["indexer_loss"] / 2, (wanted * labels.sum()).detach())
    if stage == "dense":
        torch.testing.assert_close(loss, wanted)
    else:
        model.model.training_state = TrainingState()
        torch.testing.assert_close(loss, model(**given).loss + wanted)


def test_the_rest_learns_as_if_indexers_did_not():
    """In the sparse stage to the bit; in the warm-up not at all, and attention is to every key."""
    model, given = make("sparse"), batch()
    model(**given).loss.backward()
    found = gradients(model, indexers=False)
    model.zero_grad()
    model.model.training_state = None
    sparse = model(**given)
    sparse.loss.backward()
    assert not gradients(model)
    wanted = gradients(model, indexers=False)
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in found)
    model.zero_grad()
    outputs, state = [], TrainingState(indexer_stage="dense", mtp_weight=0.3, balance_alpha=0.1)
    model.model.mtp_layers[0].register_forward_hook(lambda module, inputs, output: outputs.append(output))
    model.model.training_state = state
    warm = model(**given)
    warm.loss.backward()
    assert not any(made.requires_grad for made in (warm.logits, *outputs)) and len(outputs) == 1
    assert not gradients(model, indexers=False) and any(".layers.3." in name for name in gradients(model))
    assert state.sums["mtp_loss"] > 0 and state.sums["balance_loss"] > 0  # logged
    torch.testing.assert_close(warm.loss, state.sums["indexer_loss"] / state.sums["indexer_loss_labels"])
    model.config.index_topk, model.model.training_state = LENGTH, None
    assert torch.equal(warm.logits, model(**given).logits)
    assert not torch.allclose(warm.logits, sparse.logits)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("how", [{"use_reentrant": False}, {"use_reentrant": True}, "micro-batches", "few keys"])
def test_the_same_gradient_however_it_is_computed(stage, how):
    model = make(stage)
    given = batch(padding=(0, 0))
    model(**given).loss.backward()
    wanted = gradients(model)
    model.zero_grad()
    if how == "micro-batches":
        items = (given["labels"][:, 1:] != -100).sum()
        for row in range(2):
            part = {name: tensor[row : row + 1] for name, tensor in given.items()}
            (2 * model(**part, num_items_in_batch=items).loss).backward()
        wanted = {name: 2 * gradient for name, gradient in wanted.items()}  # of the loss that is scaled
    elif how == "few keys":  # while all keys are seen the stages are one
        model.config.index_topk = LENGTH
        model(**given).loss.backward()
        model.model.training_state = TrainingState(indexer_stage="dense")
        wanted = gradients(model)
        model.zero_grad()
        model(**given).loss.backward()
    else:
        model.gradient_checkpointing_enable(how)
        model.enable_input_require_grads()
        model(**given).loss.backward()
    found = gradients(model)
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-9, atol=1e-12, msg=name)


class Largest(TorchDispatchMode):
    """The most numbers in a tensor that an operation makes."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        made = result if isinstance(result, tuple | list) else (result,)
        self.count = max(
            [
                self.count,
                *(part.untyped_storage().nbytes() // part.itemsize for part in made if isinstance(part, torch.Tensor)),
            ]
        )
        return result


@pytest.mark.parametrize("stage", STAGES)
def test_no_scores_are_whole(monkeypatch, stage):
    monkeypatch.setattr(indexer_loss, "WORKSPACE", 4096)
    model, length = make(stage), 512
    config = model.config
    attention = model.model.layers[0].self_attn
    hidden = torch.randn(1, length, config.hidden_size, dtype=torch.float64)
    tables = model.model.rotary_emb(hidden, torch.arange(length)[None])
    with torch.no_grad():
        queries, latents = attention._queries(hidden, tables), attention._latents(hidden, tables)
        latent = attention._query_latent(hidden)
    indices = torch.arange(TOPK).expand(1, length, -1).to(torch.int32) if stage == "sparse" else None
    with Largest() as largest:
        indexer_loss.IndexerLosses(stage).add(
            attention, torch.ones(1, length), (hidden, latent, tables), queries, latents, None, indices
        )
    widest = config.num_attention_heads * (config.qk_nope_head_dim + config.v_head_dim)  # expanded keys and values
    scored = config.index_n_heads * config.index_head_dim  # the indexer's queries
    latents = config.num_attention_heads * (config.kv_lora_rank + config.qk_rope_head_dim)  # queries, absorbed
    assert largest.count <= length * max(widest, scored, latents) < length**2


def trainer_of(model, folder, callback, steps=12, **options):
    callbacks = [callback, dsm.MoeTelemetryCallback(), Record()] if callback else [Record()]
    settings = {"learning_rate": 1e-2, "max_steps": steps, "per_device_train_batch_size": 4, "logging_steps": 1}
    return Trainer(model, arguments(folder, **(settings | options)), train_dataset=Padded(16), callbacks=callbacks)


def small(**changes):
    model = make(None, dtype=torch.float32, **changes)
    model.model.training_state = None
    return model


@pytest.mark.parametrize("stage", STAGES)
def test_the_divergence_falls_and_resuming_is_exact(tmp_path, stage):
    model = small()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    whole = trainer_of(model, tmp_path / "whole", dsm.IndexerLossCallback(stage), save_strategy="steps", save_steps=6)
    whole.train()
    log = [entry["indexer_loss"] for entry in whole.state.log_history if "indexer_loss" in entry]
    assert len(log) == 12 and sum(log[-4:]) < 0.8 * sum(log[:4])
    assert all(parameter.requires_grad for parameter in model.parameters()) and model.model.training_state is None
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert {name for name in moved if ".indexer." in name} == {
        name
        for name in before
        if ".indexer." in name and ".layers.3." not in name  # that of the MTP layer has no loss
    }
    assert (stage == "dense") == all(".indexer." in name for name in moved)
    again = small()
    resumed = trainer_of(
        again, tmp_path / "whole", dsm.IndexerLossCallback(stage), save_strategy="steps", save_steps=6
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    for (name, found), wanted in zip(again.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(found, wanted), name


def test_without_the_callback_they_stay_and_it_is_said(tmp_path, monkeypatch):
    model, said = small(), []
    logger = logging.get_logger("modeling_deepseek_moe.layer_context")
    monkeypatch.setattr(type(logger), "warning_once", lambda self, text, *args: said.append(text))
    before = {name: parameter.clone() for name, parameter in model.named_parameters() if ".indexer." in name}
    trainer_of(model, tmp_path, None, steps=2).train()
    assert all(torch.equal(model.get_parameter(name), value) for name, value in before.items())
    assert said and all("self_attn.indexer.*: indexers have no gradient" in text for text in said)
    ignored = model._ddp_params_and_buffers_to_ignore
    assert set(before) <= set(ignored)
    model.model.training_state = TrainingState(indexer_stage="sparse")
    learned = {name for name in before if ".layers.3." not in name}
    assert not learned & set(model._ddp_params_and_buffers_to_ignore)
    model.model.training_state = TrainingState(indexer_stage="dense")
    everything = {name for name, _ in model.named_parameters()}
    assert everything - learned == everything & set(model._ddp_params_and_buffers_to_ignore)


def test_a_training_that_is_not_ended_freezes_nothing(tmp_path):
    model = small()
    trainer = trainer_of(model, tmp_path, None, steps=2)
    trainer.add_callback(dsm.IndexerLossCallback("dense"))  # after Trainer was made, on one process
    assert model.model.training_state is None

    class Break(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            raise KeyboardInterrupt

    trainer.add_callback(Break())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert model.model.training_state.sums["indexer_loss"] > 0
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_an_adapter_of_indexers_alone_learns_by_their_loss_or_is_refused(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["wq_b", "wk"])
    message = r"indexer\.\S+lora_A\S+: found nothing but indexers to train.*IndexerLossCallback"
    for options in ({}, {"gradient_checkpointing": True}):
        with pytest.raises(ValueError, match=message):
            trainer_of(peft.get_peft_model(small(), config), tmp_path, None, steps=1, **options).train()
    model = peft.get_peft_model(small(), config)
    trainer_of(model, tmp_path, dsm.IndexerLossCallback(), steps=2).train()
    learned = {name for name, parameter in model.named_parameters() if "lora_B" in name and parameter.any()}
    assert {f"layers.{i}.self_attn.indexer.{name}" for i in range(3) for name in ("wq_b", "wk")} == {
        name.partition(".model.model.")[2].partition(".lora_B")[0] for name in learned
    }


def test_what_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"stage='warm' must be 'dense' or 'sparse'"):
        dsm.IndexerLossCallback("warm")
    plain = AutoModelForCausalLM.from_config(
        CONFIGS["deepseek_v3"].from_dict(FIELDS["glm4_moe_lite"] | {"model_type": "deepseek_v3"})
    )
    with pytest.raises(ValueError, match="found deepseek_v3 without indexers, wanted some to train"):
        trainer_of(plain, tmp_path, dsm.IndexerLossCallback())
    model = small()
    with pytest.raises(ValueError, match="found it added after Trainer was made"):
        dsm.IndexerLossCallback().on_train_begin(SimpleNamespace(world_size=2), None, None, model=model)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="found attn_implementation='flash_attention_2', whose mask does not say"):
        indexer_loss._DenseBlocks(model.model.layers[0].self_attn, (), (), torch.ones(2, LENGTH))
    for parameter in (p for n, p in model.named_parameters() if ".indexer." in n):
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="found indexers without a parameter that is trained"):
        trainer_of(model, tmp_path, dsm.IndexerLossCallback())
    assert isinstance(model.model.layers[0].self_attn, DeepseekSparseAttention)


@pytest.mark.parametrize("stage", STAGES)
def test_under_autocast_they_learn_the_same_up_to_bf16(stage):
    model, given = make(stage, dtype=torch.float32), batch()
    losses, found = [], []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = model(**given).loss
        loss.backward()
        losses.append(model.model.training_state.take_sums()["indexer_loss"].item())
        found.append(torch.cat([gradient.flatten() for gradient in gradients(model).values()]))
    assert losses[1] == pytest.approx(losses[0], rel=0.1)
    assert torch.cosine_similarity(*found, dim=0) > 0.9 and found[1].dtype == torch.float32


@pytest.mark.parametrize("stage", STAGES)
def test_packed_sequences_are_apart(stage):
    model = make(stage)
    ids = batch(rows=1, padding=(0,))["input_ids"]
    parts = ids.split((10, LENGTH - 10), dim=1)
    labels = torch.cat([part.index_fill(1, torch.tensor(0), -100) for part in parts], dim=1)
    positions = torch.cat([torch.arange(part.shape[1])[None] for part in parts], dim=1)
    loss = model(input_ids=ids, position_ids=positions, labels=labels).loss
    alone = [model(input_ids=part, labels=part).loss * (part.shape[1] - 1) for part in parts]
    torch.testing.assert_close(loss, sum(alone) / (LENGTH - 2), rtol=1e-6, atol=1e-6)  # cross-entropy is fp32


@pytest.mark.parametrize("stage", STAGES)
def test_the_command_line(tmp_path, stage):
    write_family(tmp_path / "release", "deepseek_v32")
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"input_ids": row["input_ids"].tolist()}) + "\n" for row in Padded(8).rows)
    )
    flags = {"model": tmp_path / "release", "tokenizer": dsm.tiny_checkpoint(), "train_file": tmp_path / "rows.jsonl"}
    flags |= {
        "output_dir": tmp_path / "out",
        "indexer_stage": stage,
        "packing": True,
        "max_length": 64,
        "max_steps": 2,
    }
    flags |= {"learning_rate": 1e-2, "save_strategy": "no", "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    arguments = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    result = CliRunner().invoke(app, ["train", *arguments])
    assert result.exit_code == 0, result.output
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("release", "out"))
    moved = {name for name in before if not same_bits(before[name], after[name].to(before[name].dtype))}
    assert before.keys() == after.keys() and any(name.endswith("indexer.k_norm.bias") for name in moved)
    assert (stage == "dense") == all(".indexer." in name for name in moved)
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert history[0]["indexer_loss"] > 0
    for option, value in (("--indexer_stage", "both"), ("--lora", "true")):
        refused = CliRunner().invoke(app, ["train", *arguments, option, value])
        assert refused.exit_code != 0 and "indexer_stage" in " ".join(refused.output.split())
