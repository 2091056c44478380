"""The balance loss and the multi-token prediction loss against their equations, spelled out; what carries them."""

import pytest
import torch
import torch.nn.functional as F
from releases import SHAPES
from safetensors import safe_open
from training_harness import Padded, Record, arguments, load, train
from transformers import AutoModelForCausalLM, Trainer

import modeling_deepseek_moe as dsm
from modeling_deepseek_moe.moe.balance import balance_loss
from modeling_deepseek_moe.moe.training_state import TrainingState, sequence_ids
from modeling_deepseek_moe.mtp import share_mtp_weights
from modeling_deepseek_moe.weights import release_tensors

CONFIGS = {
    "sigmoid": SHAPES["v3-mtp"],
    "softmax": SHAPES["v2-lite"],
    "softmax-groups": SHAPES["v2"],
}


def equation(scores_TE, chosen_TK):
    """Eq. 17-20 of one sequence, term by term; DeepSeek-V2's loss where scores sum to one."""
    tokens, experts = scores_TE.shape
    total = 0.0
    for i in range(experts):
        f = experts / (chosen_TK.shape[1] * tokens) * sum(i in row for row in chosen_TK.tolist())
        p = sum(scores_TE[t, i] / scores_TE[t].sum() for t in range(tokens)) / tokens
        total = total + f * p
    return total


def test_balance_loss_is_the_equation_for_each_sequence():
    scores = torch.rand(11, 8, dtype=torch.float64, requires_grad=True)
    chosen = scores.detach().topk(3).indices
    sequence = torch.tensor([0, 0, 0, 2, 1, 1, 1, 1, 2, 1, 2])  # the two 2s count for nothing
    found = balance_loss(scores, chosen, sequence, 2)
    wanted = torch.stack([equation(scores[sequence == s], chosen[sequence == s]) for s in range(2)])
    torch.testing.assert_close(found, wanted)
    gradients = [torch.autograd.grad(loss.sum(), scores, retain_graph=True)[0] for loss in (found, wanted)]
    torch.testing.assert_close(*gradients)
    even = balance_loss(torch.ones(4, 4), torch.tensor([[0], [1], [2], [3]]), torch.zeros(4, dtype=torch.long), 1)
    assert even.tolist() == [1.0]


def test_sequence_ids():
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]])
    assert sequence_ids((2, 4), mask.device, mask)[0].tolist() == [[0, 0, 0, 2], [2, 1, 1, 1]]
    packed = torch.tensor([[0, 1, 2, 0, 1, 0]])
    ids, count = sequence_ids((1, 6), packed.device, None, packed)
    assert (ids.tolist(), count) == ([[0, 0, 0, 1, 1, 2]], 3)


def make(kind, **state):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind]()).double().train()
    model.set_experts_implementation("eager")  # the grouped kernels take no fp64
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(std=0.3)
    model.model.training_state = TrainingState(**state)
    return model


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(model, expected):
    """Up to the fp32 in which transformers computes the cross-entropy."""
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert (gradient - expected[name]).abs().max() <= 1e-5 * expected[name].abs().max(), name


def explicit_loss(model, ids, alpha, mask=None, whole=False):
    """LM loss plus balance loss from the routers' inputs, in one graph, without any of the machinery."""
    seen = []
    gates = [
        layer.mlp.gate for layer in model.model.layers[: model.config.num_hidden_layers] if hasattr(layer.mlp, "gate")
    ]
    handles = [gate.register_forward_hook(lambda gate, args, out: seen.append((gate, out))) for gate in gates]
    state, model.model.training_state = model.model.training_state, None
    labels = ids if mask is None else ids.masked_fill(mask == 0, -100)
    loss = model(ids, attention_mask=mask, labels=labels).loss
    model.model.training_state = state
    for handle in handles:
        handle.remove()
    weights = (labels[:, 1:] != -100).sum(1) / (labels[:, 1:] != -100).sum()
    for gate, (logits, _, topk) in seen:
        scores = logits.sigmoid() if gate.scoring_func == "sigmoid" else logits.softmax(-1)
        chosen = scores.topk(gate.top_k).indices if gate.topk_method == "noaux_tc" else topk
        scores, chosen = scores.view(*ids.shape, -1), chosen.view(*ids.shape, -1)
        keep = torch.ones_like(ids) if mask is None else mask
        if whole:
            loss = loss + alpha * equation(scores[keep == 1], chosen[keep == 1])
            continue
        for row in range(len(ids)):
            loss = loss + alpha * weights[row] * equation(scores[row][keep[row] == 1], chosen[row][keep[row] == 1])
    return loss


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["plain", "reentrant", "non-reentrant"])
@pytest.mark.parametrize("kind", list(CONFIGS))
def test_gradients_are_those_of_the_sum(kind, checkpointing):
    model = make(kind, balance_alpha=0.5)
    ids = torch.randint(3, 128, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    wanted = explicit_loss(model, ids, 0.5, mask)
    (3 * wanted).backward()
    expected = gradients(model)
    model.zero_grad()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    found = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))
    torch.testing.assert_close(found.loss, wanted)
    (3 * found.loss).backward()  # as accumulation, world size or a gradient scaler would scale it
    assert_same_gradients(model, expected)
    assert 0 < found.aux_loss < found.loss


def test_whole_batch_form():
    model = make("softmax", balance_alpha=0.5, balance_by_sequence=False)
    ids = torch.randint(3, 128, (2, 9))
    wanted = explicit_loss(model, ids, 0.5, whole=True)
    torch.testing.assert_close(model(ids, labels=ids).loss, wanted)


@pytest.mark.parametrize("mtp_weight", [0.0, 0.7])
def test_packed_sequences_are_those_apart(mtp_weight):
    """Losses of rows by themselves and of one packed row, whose first labels are masked as collators do."""
    model = make("sigmoid", balance_alpha=0.5, mtp_weight=mtp_weight)
    share_mtp_weights(model)
    rows = [torch.randint(3, 128, (1, length)) for length in (7, 10)]
    apart = [model(row, labels=row, num_items_in_batch=15) for row in rows]
    counted = model.model.training_state.take_loads()
    labels = torch.cat([F.pad(row[:, 1:], (1, 0), value=-100) for row in rows], dim=1)
    positions = torch.cat([torch.arange(row.shape[1]) for row in rows])[None]
    packed = model(torch.cat(rows, dim=1), labels=labels, position_ids=positions, num_items_in_batch=15)
    torch.testing.assert_close(packed.loss, apart[0].loss + apart[1].loss)
    torch.testing.assert_close(packed.aux_loss, apart[0].aux_loss + apart[1].aux_loss)
    for layer, load_E in model.model.training_state.take_loads().items():
        assert torch.equal(load_E, counted[layer])


def mtp_by_hand(model, ids, lengths):
    """λ/D · Σ CE, one row of its own length at a time, one position at a time."""
    layer, total, count = model.model.mtp_layers[0], 0.0, 0
    for row, length in zip(ids, lengths, strict=True):
        row = row[None, :length]
        hidden = model.model(row).last_hidden_state[:, :-2]
        logits = layer.shared_head.head(model.model.mtp(0, row[:, 1:-1], hidden))
        total = total + F.cross_entropy(logits[0].float(), row[0, 2:], reduction="sum")
        count += length - 1
    return total / count


@pytest.mark.parametrize("side", ["right", "left"])
def test_mtp_loss_is_that_of_the_equation(side):
    model = make("sigmoid", mtp_weight=0.3)
    share_mtp_weights(model)
    ids, lengths = torch.randint(3, 128, (3, 9)), (9, 5, 7)
    mask = (torch.arange(9) < torch.tensor(lengths)[:, None]).long()
    state, model.model.training_state = model.model.training_state, None
    plain = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
    wanted = plain + 0.3 * mtp_by_hand(model, ids, lengths)
    wanted.backward()
    expected = gradients(model)
    model.zero_grad()
    model.model.training_state = state
    positions = None
    if side == "left":
        shift = [9 - length for length in lengths]
        ids = torch.stack([row.roll(by) for row, by in zip(ids, shift, strict=True)])
        mask = torch.stack([row.roll(by) for row, by in zip(mask, shift, strict=True)])
        positions = (mask.cumsum(1) - 1).clamp_min(0)
    labels = ids.masked_fill(mask == 0, -100)
    if side == "left":  # transformers has the last padding predict the first token
        labels = labels.masked_fill(positions == 0, -100)
    found = model(ids, attention_mask=mask, labels=labels, position_ids=positions).loss
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)
    found.backward()
    assert_same_gradients(model, expected)


def test_two_depths_share_the_weight():
    config = CONFIGS["sigmoid"]()
    config.num_nextn_predict_layers = 2
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).train()
    share_mtp_weights(model)
    ids = torch.randint(3, 128, (1, 12))
    plain = model(ids, labels=ids).loss
    hidden = model.model(ids).last_hidden_state
    first, states = model.mtp_logits(0, ids[:, 1:], hidden[:, :-1])
    second, _ = model.mtp_logits(1, ids[:, 2:], states[:, :-1])
    losses = [F.cross_entropy(first[0, :-1], ids[0, 2:], reduction="sum") / 11]
    losses += [F.cross_entropy(second[0, :-1], ids[0, 3:], reduction="sum") / 11]
    model.model.training_state = TrainingState(mtp_weight=0.4)
    torch.testing.assert_close(model(ids, labels=ids).loss, plain + 0.4 / 2 * sum(losses))


def test_evaluation_is_the_plain_loss():
    model = make("sigmoid", balance_alpha=0.5, mtp_weight=0.3).eval()
    ids = torch.randint(3, 128, (2, 9))
    found = model(ids, labels=ids)
    model.model.training_state = None
    assert torch.equal(found.loss, model(ids, labels=ids).loss)
    assert found.aux_loss is None


def test_micro_batches_add_up():
    """With the number of labels of the whole batch the parts weigh as in one batch, however rows are divided."""
    model = make("sigmoid", balance_alpha=0.5, mtp_weight=0.3)
    ids = torch.randint(3, 128, (4, 9))
    model(ids, labels=ids).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    for part in (ids[:1], ids[1:]):
        model(part, labels=part, num_items_in_batch=torch.tensor(4 * 8)).loss.backward()
    assert_same_gradients(model, expected)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    return folder, train(folder, dtype="float32", max_steps=60, per_device_train_batch_size=8, learning_rate=5e-3)


def test_mtp_learns_under_trainer(trained):
    history = [entry["mtp_loss"] for entry in trained[1]["logs"]]
    assert sum(history[-5:]) < 0.5 * sum(history[:5])


def test_losses_are_logged_apart(trained):
    for entry in trained[1]["logs"]:
        assert entry["lm_loss"] < entry["loss"]
        assert 0 < entry["balance_loss"] < 0.02


def test_weight_of_mtp_follows_its_schedule(trained):
    """The loss that `Trainer` logs is the sum of the parts; MTP has a label less in each row."""
    labels = [int(row["attention_mask"].sum()) - 1 for row in Padded().rows]
    share = 1 - len(labels) / sum(labels)  # of MTP's labels, roughly: batches differ by their rows
    for step, entry in enumerate(trained[1]["logs"]):
        weight = (entry["loss"] - entry["lm_loss"] - entry["balance_loss"]) / entry["mtp_loss"] / share
        assert weight == pytest.approx(0.3 if step < 60 * 10 / 14.8 else 0.1, rel=0.02)


def test_saved_keys_are_the_release_s(trained, tmp_path):
    model = trained[1]["model"]
    assert model.model.mtp_layers[0].embed_tokens.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(release_tensors(model.config))
        for copy, source in (("embed_tokens", "model.embed_tokens"), ("shared_head.head", "lm_head")):
            assert torch.equal(file.get_tensor(f"model.layers.3.{copy}.weight"), file.get_tensor(f"{source}.weight"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = Padded()[0]["input_ids"][None]
    with torch.no_grad():
        hidden = model.eval().model(ids).last_hidden_state
        torch.testing.assert_close(again.mtp_logits(0, ids, hidden), model.mtp_logits(0, ids, hidden))


def test_mtp_copies_that_differ_are_told(tmp_path, caplog):
    model = load(tmp_path, torch.float32)
    assert share_mtp_weights(model)
    assert not share_mtp_weights(model)


@pytest.mark.parametrize(
    "callback, kind, message",
    [
        (dsm.MtpLossCallback, "v3", "found a model without MTP layers"),
        (dsm.BalanceLossCallback, "v3", "found no alpha and no aux_loss_alpha in the config"),
    ],
)
def test_what_cannot_be_trained_is_refused(tmp_path, callback, kind, message):
    model = AutoModelForCausalLM.from_config(SHAPES[kind]())
    with pytest.raises(ValueError, match=message):
        Trainer(model, arguments(tmp_path), train_dataset=Padded(), callbacks=[callback()]).train()


def test_alpha_of_the_config(tmp_path):
    config = SHAPES["v2-lite"]()
    config.aux_loss_alpha, config.seq_aux = 0.25, False
    model = AutoModelForCausalLM.from_config(config)
    seen = []

    class Look(Record):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            seen.append((model.model.training_state.balance_alpha, model.model.training_state.balance_by_sequence))

    callbacks = [dsm.BalanceLossCallback(), Look()]
    Trainer(model, arguments(tmp_path, max_steps=1), train_dataset=Padded(), callbacks=callbacks).train()
    assert seen == [(0.25, False)]


def test_mtp_wants_tokens():
    model = make("sigmoid", mtp_weight=0.3)
    ids = torch.randint(3, 128, (1, 5))
    with pytest.raises(ValueError, match="found inputs_embeds only, wanted input_ids"):
        model(inputs_embeds=model.model.embed_tokens(ids), labels=ids)
