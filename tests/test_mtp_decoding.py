"""``generate(use_mtp=...)``: the model's own text, in fewer passes."""

import contextlib
import itertools
from functools import partial

import draft_cases
import pytest
import torch
from releases import SHAPES
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig, TextStreamer

import modeling_deepseek_moe as dsm
from modeling_deepseek_moe.compat import CACHE_NAME
from modeling_deepseek_moe.decoding.draft import MtpDraft
from modeling_deepseek_moe.decoding.loop import DraftStats
from modeling_deepseek_moe.decoding.mixin import _decode
from modeling_deepseek_moe.decoding.pending import Pending, first_columns
from modeling_deepseek_moe.decoding.sources import Source, of_mtp_layers
from modeling_deepseek_moe.decoding.verify import NOTHING, accept_greedily, accept_sampling
from modeling_deepseek_moe.tiny.corpus import FAMILIES
from modeling_deepseek_moe.tiny.score import held_out

LENGTH = 24


@pytest.fixture(scope="module")
def tokenizer():
    return draft_cases.tokenizer()


@pytest.fixture(scope="module")
def model(request):
    """The shipped checkpoint: dequantised, or (by parameter) its FP8 codes mapped as they are."""
    if getattr(request, "param", "fp32") == "fp32":
        return draft_cases.model()
    return AutoModelForCausalLM.from_pretrained(dsm.tiny_checkpoint(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def deep():
    """Random weights, three MTP layers: drafts are as good as guesses."""
    torch.manual_seed(0)
    config = SHAPES["v3-mtp"]()
    config.num_nextn_predict_layers = 3
    return dsm.DeepseekV3ForCausalLM(config).eval()


def prompts(tokenizer, count: int) -> list[str]:
    problems = [problem for family in FAMILIES for problem in held_out(family, count)]
    return [
        tokenizer.apply_chat_template(p.messages[:-1], tokenize=False, add_generation_prompt=True) for p in problems
    ]


def encoded(tokenizer, texts: list[str]):
    return tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)


def noise(batch: int, length: int, vocabulary: int, padded: bool = True) -> dict[str, torch.Tensor]:
    """Rows of random tokens, which no draft foresees, and where it is wrong at other times in each row."""
    generator = torch.Generator().manual_seed(batch * 100 + length)
    ids = torch.randint(3, vocabulary, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(batch if padded else 0):
        mask[row, : row % (length - 1)] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def same(model, inputs, *, use_mtp=(True,), **settings) -> tuple[torch.Tensor, DraftStats]:
    """The text, which each way of asking for drafts gives as plain decoding does, and what the last one came to."""
    settings = {"max_new_tokens": LENGTH, "do_sample": False} | settings
    wanted = model.generate(**inputs, **settings)
    for drafts in use_mtp:
        assert torch.equal(model.generate(**inputs, **settings, use_mtp=drafts), wanted)
    return wanted, model.draft_stats


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("model", "batch"),
    [("fp32", 16), ("fp8", 4), slow("fp32", 1), slow("fp32", 4), slow("fp8", 1), slow("fp8", 16)],
    indirect=["model"],
)
def test_two_tokens_a_pass_and_the_same_text(model, tokenizer, batch):
    texts, stats = prompts(tokenizer, 8), []
    for start in range(0, 16, batch):
        stats.append(same(model, encoded(tokenizer, texts[start : start + batch]))[1])
    tokens, passes = (sum(getattr(s, name) for s in stats) for name in ("tokens", "row_steps"))
    assert tokens / passes >= 1.8
    assert all(s.acceptance >= 0.8 and s.steps >= s.tokens / batch / 2 for s in stats)


@pytest.mark.long
@pytest.mark.parametrize("model", ["fp32", "fp8"], indirect=True)
def test_the_same_text_of_200_prompts(model, tokenizer):
    texts = prompts(tokenizer, 40)[:200]
    assert len(texts) == 200
    for batch in (1, 8):
        for start in range(0, 200, batch):
            same(model, encoded(tokenizer, texts[start : start + batch]), max_new_tokens=48)


@pytest.mark.parametrize(
    ("model", "batch", "drafts"),
    [
        *(("fp32", 3, True), ("fp32", 3, 2), ("fp8", 3, 5)),
        *(slow("fp32", 3, 5), slow("fp32", 9, True), slow("fp32", 9, 2), slow("fp32", 9, 5), slow("fp8", 9, 2)),
    ],
    indirect=["model"],
)
def test_rows_that_accept_unlike_numbers(model, batch, drafts):
    _, stats = same(model, noise(batch, 12, 657), use_mtp=[drafts], eos_token_id=None)
    assert stats.tokens == batch * (LENGTH - 1) and 0 < stats.accepted < stats.drafted


@pytest.mark.parametrize("drafts", [1, 2, 3, 5])
def test_any_depth(deep, drafts):
    """Layers beyond the first read drafted tokens, and those again that were accepted."""
    for batch, length in ((1, 1), (1, 9), (5, 9)):
        inputs = noise(batch, length, 60, padded=length > 1)
        same(deep, inputs, use_mtp=[drafts], eos_token_id=None, max_new_tokens=12)


def test_layers_see_what_training_has_them_see(deep):
    """Where drafts are always right, the draft of every depth is what that layer says over the whole text at once."""
    ids = noise(1, 30, 60, padded=False)["input_ids"]
    with torch.no_grad():
        hidden = deep.model(ids[:, :-3]).last_hidden_state
        wanted, state = [], hidden
        for depth in range(3):
            logits, state = deep.mtp_logits(depth, ids[:, 1 + depth : 28 + depth], state)
            wanted.append(logits[0])
        draft, seen = MtpDraft(deep, 3, None), []
        start = 0
        for width in (6, 1, 3, 2, 4, 1):
            given = iter(range(3))

            def follow(logits, ahead, end=start + width, given=given):
                depth = next(given)
                seen.append((depth, end - 1, logits[0]))
                return ids[:, end + 1 + depth]

            stop = start + width
            draft.see(hidden[:, start:stop], ids[:, start + 1 : stop + 1], torch.tensor([width]))
            list(draft.propose(follow))
            start = stop
    for depth, position, logits in seen:
        torch.testing.assert_close(logits, wanted[depth][position], rtol=1e-4, atol=1e-4)


def test_caches(model, tokenizer):
    inputs = encoded(tokenizer, prompts(tokenizer, 1)[:3])
    same(model, inputs, cache_implementation="static")
    # rows that are at their end leave their columns to those that are not: there is no room for both
    same(model, noise(4, 12, 657), cache_implementation="static", use_mtp=[4], eos_token_id=None)
    wanted = model.generate(**inputs, max_new_tokens=LENGTH, do_sample=False)
    cache = DynamicCache(config=model.config)
    one = encoded(tokenizer, prompts(tokenizer, 1)[:1])
    found = model.generate(
        **one, max_new_tokens=8, do_sample=False, use_mtp=True, return_dict_in_generate=True, **{CACHE_NAME: cache}
    )
    assert cache.get_seq_length() >= found.sequences.shape[1] - 1 and getattr(found, CACHE_NAME) is cache
    assert cache.layers[0].keys.shape[2] == cache.get_seq_length()
    # a second call goes on from what is cached
    mask = torch.ones_like(found.sequences)
    again = model.generate(
        found.sequences, attention_mask=mask, max_new_tokens=4, do_sample=False, use_mtp=True, **{CACHE_NAME: cache}
    )
    assert torch.equal(again, model.generate(found.sequences, attention_mask=mask, max_new_tokens=4, do_sample=False))
    assert wanted.shape[0] == 3


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.3},
        {"no_repeat_ngram_size": 2, "min_new_tokens": 20},
        {"stop_strings": ["is ", "."]},
        {"eos_token_id": [1, 275, 16]},
        {"stop_strings": ["5"], "eos_token_id": None},
        {"max_new_tokens": 1},
        {"max_new_tokens": 2},
    ],
    ids=str,
)
def test_settings_of_generate(model, tokenizer, settings):
    if "stop_strings" in settings:
        settings = settings | {"tokenizer": tokenizer}
    same(model, encoded(tokenizer, prompts(tokenizer, 1)[:4]), use_mtp=(True, 3), **settings)


def test_streams_experts(tokenizer):
    model = AutoModelForCausalLM.from_pretrained(dsm.tiny_checkpoint(), dtype=torch.float32)
    inputs = encoded(tokenizer, prompts(tokenizer, 1)[:1])
    wanted = model.generate(**inputs, max_new_tokens=LENGTH, do_sample=False)
    model.set_expert_memory("2MB")
    assert torch.equal(model.generate(**inputs, max_new_tokens=LENGTH, do_sample=False, use_mtp=True), wanted)
    assert model.expert_stats().bytes_read > 0


def test_streamers_get_each_token_once(model, tokenizer, capsys):
    inputs = encoded(tokenizer, prompts(tokenizer, 1)[:1])
    made = [
        (
            model.generate(**inputs, max_new_tokens=LENGTH, do_sample=False, streamer=TextStreamer(tokenizer), **more),
            capsys.readouterr().out,
        )[1]
        for more in ({}, {"use_mtp": True})
    ]
    assert made[0] == made[1] != ""


def test_greedy_takes_first_choices():
    scores = torch.tensor([[0.0, 1, 0], [2, 1, 0], [0, 0, 3]])
    tokens, stand = accept_greedily(scores, torch.tensor([1, 2, NOTHING]))
    assert tokens.tolist() == [1, 0, 2] and stand.tolist() == [True, False, False]


def test_sampled_tokens_have_the_models_distribution():
    """Two tokens in a row, whatever they were drafted from: chi-square of their 16 pairs."""
    torch.manual_seed(1)
    count, vocabulary = 60000, 4
    p, q = torch.randn(2, 1 + vocabulary, vocabulary).mul(1.5).softmax(-1)  # of the first token, and after each
    drafted = torch.multinomial(q[0], count, replacement=True)
    first, stand = accept_sampling(p[0].log().expand(count, -1), drafted, q[0].expand(count, -1))
    drafted = torch.multinomial(q[1 + drafted], 1)[:, 0].where(stand, NOTHING)  # after another token none was made
    second, _ = accept_sampling(p[1 + first].log(), drafted, q[1 + first] * stand[:, None])
    found = torch.bincount(first * vocabulary + second, minlength=vocabulary**2).double()
    expected = (p[0, :, None] * p[1:]).flatten().double() * count
    assert ((found - expected) ** 2 / expected).sum() < 37.7  # 0.1 % of a chi-square of 15 degrees
    # and most drafts stand that may: Σ min(p, q)
    assert abs(stand.double().mean() - torch.minimum(p[0], q[0]).sum()) < 0.01


def test_drafts_begin_with_the_end_of_the_prompt(model, tokenizer):
    """As many drafts stand as of the whole prompt, nearly: hidden states know what was before."""
    inputs = encoded(tokenizer, prompts(tokenizer, 1)[:3])
    assert inputs["input_ids"].shape[1] > 20
    wanted = model.generate(**inputs, max_new_tokens=LENGTH, do_sample=False)
    padding = inputs["attention_mask"].bool()
    kwargs = {"input_ids": inputs["input_ids"], "max_new_tokens": LENGTH, "do_sample": False}
    for window in (3, 16):
        source = Source("", 1, lambda rows, _, past, window=window: MtpDraft(model, 1, padding, window))
        found = model.generate(
            **kwargs,
            attention_mask=inputs["attention_mask"],
            custom_generate=partial(_decode, source=source),
        )
        assert torch.equal(found, wanted) and model.draft_stats.acceptance > 0.7


class Runs:
    """A `Choice` that drafts in runs of ``drafted`` steps with ``plain`` ones between them."""

    def __init__(self, drafted: int, plain: int):
        self.drafts, self.pays, self._pattern = 1, None, itertools.cycle([1] * drafted + [0] * plain)

    @contextlib.contextmanager
    def step(self, most, stats):
        yield min(next(self._pattern), most)


@pytest.mark.parametrize(("drafted", "plain", "window"), [(1, 1, 32), slow(2, 3, 32), (2, 9, 4)], ids=str)
def test_rows_at_unlike_places_with_plain_steps_between(model, tokenizer, monkeypatch, drafted, plain, window):
    """Of a batch as many drafts stand as where every step drafts: the layers read what each row accepted, and nothing else."""
    inputs = encoded(tokenizer, prompts(tokenizer, 2)[:6])
    settings = {"max_new_tokens": 32, "eos_token_id": None}
    wanted, always = same(model, inputs, **settings)
    monkeypatch.setattr("modeling_deepseek_moe.decoding.mixin.Choice", lambda *_: Runs(drafted, plain))
    monkeypatch.setattr("modeling_deepseek_moe.decoding.sources.WINDOW", window)
    source = of_mtp_layers(model, "auto", model.generation_config, dict(inputs))
    found = model.generate(**inputs, do_sample=False, custom_generate=partial(_decode, source=source), **settings)
    stats = model.draft_stats
    assert torch.equal(found, wanted) and 0 < stats.drafted < always.drafted
    assert stats.acceptance > always.acceptance - 0.08


def test_what_is_pending_of_rows_that_accepted_unlike_numbers():
    pending = Pending(most=3)
    pending.add(None, torch.tensor([[9], [9]]))
    assert not pending.add(first_columns(torch.tensor([2, 1]), 2), torch.tensor([[1, 2], [1, -1]]))
    pending.add(None, torch.tensor([[3], [2]]))
    assert pending.add(first_columns(torch.tensor([1, 0]), 1), torch.tensor([[4], [-1]]))  # the first has to go
    counts, tokens = pending.take()
    assert counts.tolist() == [4, 2]
    assert tokens[0].tolist() == [1, 2, 3, 4] and tokens[1, :2].tolist() == [1, 2]
    pending.add(None, torch.tensor([[5], [6]]))
    assert [tensor.tolist() for tensor in pending.take()] == [[1, 1], [[5], [6]]]


def test_hidden_states_of_a_prompt_are_not_kept(deep, monkeypatch):
    """Beyond the window; of it there is a copy."""
    held, mtp = [], deep.model.mtp

    def watched(depth, tokens, hidden_states, **kwargs):
        held.append(hidden_states.untyped_storage().nbytes())
        return mtp(depth, tokens, hidden_states, **kwargs)

    monkeypatch.setattr(deep.model, "mtp", watched)
    draft, hidden = MtpDraft(deep, 1, None, window=4), torch.randn(1, 500, deep.config.hidden_size)
    draft.see(hidden, torch.full((1, 500), 3), None)
    with torch.no_grad():
        list(draft.propose(lambda logits, _: logits.argmax(-1)))
    assert held == [hidden[:, :4].nbytes]


def test_automatic_text_is_the_same(model, tokenizer):
    _, stats = same(model, encoded(tokenizer, prompts(tokenizer, 1)[:3]), use_mtp=["auto"], max_new_tokens=40)
    assert stats.reason is None and stats.steps


def test_by_the_generation_config(model, tokenizer):
    inputs = encoded(tokenizer, prompts(tokenizer, 1)[:1])
    config = GenerationConfig(max_new_tokens=LENGTH, do_sample=False, use_mtp=True, eos_token_id=1, pad_token_id=2)
    wanted = model.generate(**inputs, max_new_tokens=LENGTH, do_sample=False)
    assert torch.equal(model.generate(**inputs, generation_config=config), wanted)
    assert torch.equal(model.generate(inputs["input_ids"], config), wanted)  # by place
    assert torch.equal(model.generate(**inputs, generation_config=config, use_mtp=False), wanted)
    samples = model.generate(**inputs, max_new_tokens=4, do_sample=True, num_return_sequences=3, use_mtp=True)
    assert samples.shape[0] == 3


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"use_mtp": 0.5}, "use_mtp=0.5 is not one of True, 'auto', a number"),
        ({"use_mtp": -1}, "use_mtp=-1 is not one of"),
        ({"use_mtp": True, "num_beams": 2}, "num_beams=2 does not go with it"),
        ({"use_mtp": True, "output_scores": True}, "output_scores=True does not go with it"),
        ({"use_mtp": True, "prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens=3 does not go with it"),
        ({"use_mtp": True, "synced_gpus": True}, "synced_gpus=True does not go with it"),
        ({"use_mtp": True, "use_cache": False}, "use_cache=False does not go with it"),
    ],
)
def test_what_cannot_be_is_refused(model, settings, said):
    with pytest.raises(ValueError, match=said):
        model.generate(torch.tensor([[3, 4]]), max_new_tokens=2, **settings)


def test_what_cannot_be_is_refused_before_bytes_are_counted(deep, monkeypatch):
    """ZeRO-3 leaves a process none."""
    monkeypatch.setattr("modeling_deepseek_moe.decoding.expected.own_bytes", lambda _: 0)
    ids = torch.tensor([[3, 4]])
    with pytest.raises(ValueError, match="num_beams=2 does not go with it"):
        deep.generate(ids, max_new_tokens=2, use_mtp="auto", num_beams=2)
    with pytest.raises(ValueError, match="use_mtp='auto': found no weights in this process"):
        deep.generate(ids, max_new_tokens=2, use_mtp="auto")


def test_a_model_without_layers_is_refused():
    model = dsm.DeepseekV3ForCausalLM(SHAPES["v3"]())
    with pytest.raises(
        ValueError, match=r"use_mtp=True: found a model without MTP layers .*convert mtp --action graft"
    ):
        model.generate(torch.tensor([[3, 4]]), max_new_tokens=2, use_mtp=True)
