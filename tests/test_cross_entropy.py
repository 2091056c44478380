"""The loss of the next token compared with transformers' own, value and gradient."""

import pytest
import torch
from transformers.loss.loss_utils import ForCausalLMLoss

import modeling_deepseek_moe as dsm
from modeling_deepseek_moe import cross_entropy
from modeling_deepseek_moe.cross_entropy import next_token_loss

ROWS, TOKENS, VOCABULARY = 3, 20, 77


@pytest.fixture(autouse=True)
def chunks_of_seven_rows(monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK", {"cpu": 7 * VOCABULARY + 5})


def make(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(ROWS, TOKENS, VOCABULARY, generator=generator)).to(dtype)
    labels = torch.randint(VOCABULARY, (ROWS, TOKENS), generator=generator)
    labels[0, :6] = labels[2, 11] = -100
    return logits, labels


def run(loss_function, logits, labels, **arguments):
    logits = logits.clone().requires_grad_()
    loss = loss_function(logits=logits, labels=labels, vocab_size=VOCABULARY, **arguments)
    (2 * loss).backward()
    assert logits.grad.dtype == logits.dtype
    return loss.detach(), logits.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "arguments",
    [{}, {"num_items_in_batch": 40}, {"num_items_in_batch": torch.tensor(40)}],
    ids=["mean", "int", "tensor"],
)
def test_value_and_gradient_are_transformers_own(dtype, arguments):
    logits, labels = make(dtype)
    found, wanted = (run(function, logits, labels, **arguments) for function in (next_token_loss, ForCausalLMLoss))
    torch.testing.assert_close(found[0], wanted[0])
    torch.testing.assert_close(found[1], wanted[1], rtol=0.01 if dtype == torch.bfloat16 else 1e-3, atol=1e-7)


def test_error_in_fp32_is_rounding():
    logits, labels = make()
    loss, gradient = run(next_token_loss, logits, labels)
    exact_loss, exact = run(next_token_loss, logits.double(), labels)
    assert exact.dtype == torch.float64
    assert abs(loss - exact_loss) < 1e-6 * exact_loss
    assert (gradient - exact).norm() < 1e-6 * exact.norm()


def test_shifted_labels_and_another_ignore_index():
    logits, labels = make()
    shifted = labels.roll(-1, 1)
    shifted[:, -1] = -100
    found = next_token_loss(logits, None, VOCABULARY, shift_labels=shifted)
    torch.testing.assert_close(found, next_token_loss(logits, labels, VOCABULARY))
    renamed = labels.masked_fill(labels == -100, -1)
    torch.testing.assert_close(next_token_loss(logits, renamed, VOCABULARY, ignore_index=-1), found)


def test_logits_that_are_masked_out_lose_nothing():
    """Of a token that no row wants, and that rows without a label would be measured by."""
    logits, labels = make()
    logits[..., 0] = -torch.inf
    labels = labels.masked_fill(labels == 0, 1)
    loss, gradient = run(next_token_loss, logits, labels)
    wanted_loss, wanted = run(ForCausalLMLoss, logits, labels)
    torch.testing.assert_close(loss, wanted_loss)
    torch.testing.assert_close(gradient, wanted)


def test_no_label_is_a_sum_of_nothing():
    logits, labels = make()
    loss, gradient = run(next_token_loss, logits, torch.full_like(labels, -100), num_items_in_batch=1)
    assert loss == 0 and not gradient.any()


def test_a_label_beyond_the_vocabulary_is_refused():
    logits, labels = make()
    labels[1, 5] = VOCABULARY
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        next_token_loss(logits, labels, VOCABULARY)


def test_the_model_uses_it_unless_told_otherwise():
    config = dsm.DeepseekV3Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        num_nextn_predict_layers=0,
    )
    model = dsm.DeepseekV3ForCausalLM(config)
    labels = torch.randint(VOCABULARY, (2, 9))
    names = []
    for function in (None, ForCausalLMLoss):
        if function is not None:
            model.loss_function = function
        loss = model(input_ids=labels, labels=labels).loss
        nodes = [loss.grad_fn]
        for node in nodes:
            nodes += [parent for parent, _ in node.next_functions if parent is not None]
        names.append({node.name() for node in nodes})
    assert "CrossEntropySumBackward" in names[0] - names[1]
