"""``attn_implementation="flash_attention_2"``, 3 and 4 as transformers calls them, with functions that compute by torch in their place.

The functions have the libraries' own signatures, and say what they were called with: no library was run.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, modeling_flash_attention_utils

import modeling_deepseek_moe as dsm

VERSIONS = ("flash_attention_2", "flash_attention_3", "flash_attention_4")


class Recorded:
    """``flash_attn_func`` and ``flash_attn_varlen_func``, as FlashAttention 2.8 and its successors have them in common."""

    def __init__(self, with_sums: bool):
        self.calls, self.with_sums = [], with_sums

    def flash_attn_func(self, q, k, v, softmax_scale=None, causal=False):
        assert q.ndim == k.ndim == v.ndim == 4 and q.shape[2] == k.shape[2] == v.shape[2]
        assert all(tensor.stride(-1) == 1 for tensor in (q, k, v))
        self.calls.append({"q": q, "k": k, "v": v, "scale": softmax_scale, "causal": causal})
        out = F.scaled_dot_product_attention(
            *(tensor.transpose(1, 2) for tensor in (q, k, v)), is_causal=causal, scale=softmax_scale
        )
        return (out.transpose(1, 2), None) if self.with_sums else out.transpose(1, 2)

    def flash_attn_varlen_func(
        self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False
    ):
        assert torch.equal(cu_seqlens_q, cu_seqlens_k) and cu_seqlens_q.dtype == torch.int32
        ends = cu_seqlens_q.tolist()
        assert max_seqlen_q == max_seqlen_k == max(b - a for a, b in itertools.pairwise(ends))
        parts = [
            self.flash_attn_func(*(tensor[None, a:b] for tensor in (q, k, v)), softmax_scale, causal)
            for a, b in itertools.pairwise(ends)
        ]
        return torch.cat([part[0] if self.with_sums else part for part in parts], dim=1)[0]


@pytest.fixture
def recorded(monkeypatch, request):
    found = Recorded(with_sums=request.param != VERSIONS[0])
    utils = modeling_flash_attention_utils
    functions = found.flash_attn_func, found.flash_attn_varlen_func, None, utils._pad_input, utils._unpad_input
    monkeypatch.setattr(utils, "_lazy_imports", lambda *_, **__: functions)
    names = ("_flash_fn", "_flash_varlen_fn", "_flash_with_kvcache_fn", "_pad_fn", "_unpad_fn")
    for name in ("_loaded_implementation", *names):
        monkeypatch.setattr(utils, name, None)
    found.name = request.param
    return found


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(dsm.tiny_checkpoint(), dtype=torch.float32).eval()


PLAIN = {"input_ids": torch.arange(2 * 21).view(2, 21) + 5}
LEFT = {"attention_mask": torch.tensor([[0] * 6 + [1] * 15, [1] * 21])}
PACKED = {"input_ids": PLAIN["input_ids"][:1], "position_ids": torch.tensor([[*range(8), *range(13)]])}
BATCHES = {"plain": PLAIN, "padded": PLAIN | LEFT, "packed": PACKED}


@pytest.mark.parametrize("recorded", VERSIONS, indirect=True)
@pytest.mark.parametrize("batch", BATCHES)
def test_logits_are_those_of_sdpa(model, recorded, batch, monkeypatch):
    inputs = BATCHES[batch]
    wanted = model(**inputs).logits
    with monkeypatch.context() as patch:
        patch.setattr(model.config, "_attn_implementation", recorded.name)
        found = model(**inputs).logits
    seen = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    torch.testing.assert_close(found[seen], wanted[seen], rtol=1e-4, atol=1e-4)
    config = model.config
    assert len(recorded.calls) >= config.num_hidden_layers
    for call in recorded.calls:
        assert call["causal"] and call["scale"] == pytest.approx(config.softmax_scale)
        assert call["q"].shape[-1] == call["k"].shape[-1] == config.qk_head_dim > config.v_head_dim
        # transformers' own: FlashAttention 2 takes no narrower values, the later ones would
        assert call["v"].shape[-1] == config.qk_head_dim and not call["v"][..., config.v_head_dim :].any()


@pytest.mark.parametrize("recorded", VERSIONS[1:2], indirect=True)
def test_generation_is_that_of_sdpa(model, recorded, monkeypatch):
    """The prompt by the library, the rest over latents."""
    inputs = PLAIN | LEFT
    wanted = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    with monkeypatch.context() as patch:
        patch.setattr(model.config, "_attn_implementation", recorded.name)
        found = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert torch.equal(found, wanted) and recorded.calls


@pytest.mark.parametrize("batch", ("plain", "padded"))
def test_torch_gets_values_and_masks_as_they_are(model, batch, monkeypatch):
    """On a card: values narrower than keys, no mask of a plain prompt, and one for all heads of a padded one."""
    calls = []

    def attend(query, key, value, **arguments):
        calls.append((query, key, value, arguments))
        return sdpa(query, key, value, **arguments)

    attention, config = model.model.layers[0].self_attn, model.config
    assert not attention._wants_equal_dims(torch.device("cuda")) and attention._wants_equal_dims(torch.device("cpu"))
    sdpa = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    monkeypatch.setattr(type(attention), "_wants_equal_dims", lambda self, device: False)
    inputs = BATCHES[batch]
    model(**inputs)
    assert len(calls) == config.num_hidden_layers
    for query, key, value, arguments in calls:
        assert query.shape[-1] == key.shape[-1] == config.qk_head_dim
        assert value.shape == (*key.shape[:-1], config.v_head_dim)
        mask, length = arguments["attn_mask"], query.shape[2]
        assert arguments["is_causal"] == (mask is None) == (batch == "plain") and not arguments.get("enable_gqa")
        assert mask is None or (mask.shape == (2, 1, length, length) and mask.dtype == torch.bool)
