"""Prompt lookup and assistants for several rows, which transformers does for one: the model's own text, in fewer passes."""

import copy
from collections import Counter
from functools import partial
from types import SimpleNamespace

import draft_cases
import pytest
import torch
from families import write_family
from releases import SHAPES
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3ForCausalLM,
    DynamicCache,
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessorList,
    MistralConfig,
    QuantizedCache,
    StaticCache,
    StoppingCriteriaList,
)
from transformers import MistralForCausalLM as Mistral

import modeling_deepseek_moe as dsm
from modeling_deepseek_moe.compat import CACHE_NAME
from modeling_deepseek_moe.decoding.lookup import LookupDraft
from modeling_deepseek_moe.decoding.loop import decode
from modeling_deepseek_moe.decoding.mixin import _decode, _merged
from modeling_deepseek_moe.decoding.rows import Rows
from modeling_deepseek_moe.decoding.sources import Source, of_a_batch
from modeling_deepseek_moe.decoding.verify import NOTHING, accept_sampling, certain

LENGTH = 24


@pytest.fixture(scope="module")
def tokenizer():
    return draft_cases.tokenizer()


@pytest.fixture(scope="module")
def model():
    return draft_cases.model()


@pytest.fixture(scope="module")
def inputs():
    return draft_cases.asked_twice()


def same(model, inputs, **drafts):
    settings = {"max_new_tokens": LENGTH, "do_sample": False}
    wanted = model.generate(**inputs, **settings)
    assert torch.equal(model.generate(**inputs, **settings, **drafts), wanted)
    return model.draft_stats


@pytest.mark.parametrize("count", [1, 4, 10])
def test_lookup_of_several_rows(model, inputs, count):
    stats = same(model, inputs, prompt_lookup_num_tokens=count, max_matching_ngram_size=3)
    assert 0 < stats.accepted < stats.drafted and stats.tokens_per_pass > 1


def test_an_assistant_that_is_the_model_itself_is_right(model, inputs):
    stats = same(model, inputs, assistant_model=model, num_assistant_tokens=3, assistant_confidence_threshold=0.0)
    assert stats.acceptance > 0.9 and stats.tokens_per_pass > 2.5


def test_an_assistant_of_plain_transformers_that_guesses(model, inputs):
    torch.manual_seed(0)
    small = MistralConfig(
        vocab_size=model.config.vocab_size,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        sliding_window=None,
    )
    stats = same(model, inputs, assistant_model=Mistral(small).eval(), assistant_confidence_threshold=0.0)
    assert stats.drafted > 20 * stats.accepted
    unsure = same(model, inputs, assistant_model=Mistral(small).eval())
    assert unsure.drafted < stats.drafted  # it stops where it is unsure


def test_an_assistants_settings_are_looked_for_in_this_order(model, inputs, monkeypatch):
    """The call, a config that is passed, the assistant's, the model's own."""
    assistant = SimpleNamespace(config=model.config, generation_config=GenerationConfig())
    own = copy.deepcopy(model.generation_config)
    monkeypatch.setattr(model, "generation_config", own)
    kwargs, found = {**inputs, "assistant_model": assistant, "generation_config": GenerationConfig()}, []
    for config in (None, own, assistant.generation_config, kwargs["generation_config"]):
        if config is not None:
            config.num_assistant_tokens = 2 + len(found)
        found.append(of_a_batch(model, _merged(model, kwargs), kwargs).drafts)
    kwargs["num_assistant_tokens"] = 6
    assert [*found, of_a_batch(model, _merged(model, kwargs), kwargs).drafts] == [20, 3, 4, 5, 6]


def test_plain_transformers_as_an_assistant_reads_padded_rows_as_the_model_does(inputs):
    """The same random weights in both: every draft stands, through all the rows' paces."""
    torch.manual_seed(0)
    ours = dsm.DeepseekV3ForCausalLM(SHAPES["v3"]()).eval()
    plain = DeepseekV3ForCausalLM(SHAPES["v3"]()).eval()
    plain.load_state_dict(ours.state_dict())
    ids = torch.randint(3, 60, (3, 9))
    mask = torch.ones_like(ids)
    mask[0, :4] = mask[1, :2] = 0
    stats = same(
        ours,
        {"input_ids": ids * mask, "attention_mask": mask},
        assistant_model=plain,
        num_assistant_tokens=4,
        assistant_confidence_threshold=0.0,
    )
    assert stats.accepted == stats.drafted > 0


def test_other_settings(model, tokenizer, inputs):
    settings = {"max_new_tokens": LENGTH, "do_sample": False, "repetition_penalty": 1.2}
    for more in ({}, {"stop_strings": ["is ", "."], "tokenizer": tokenizer}, {"cache_implementation": "static"}):
        wanted = model.generate(**inputs, **settings, **more)
        assert torch.equal(model.generate(**inputs, **settings, **more, prompt_lookup_num_tokens=4), wanted)
    one = {name: value[:1] for name, value in inputs.items()}
    sampled = model.generate(
        **one, max_new_tokens=4, do_sample=True, num_return_sequences=3, prompt_lookup_num_tokens=4
    )
    assert sampled.shape[0] == 3


@pytest.mark.parametrize("drafts", [{"use_mtp": 3}, {"prompt_lookup_num_tokens": 3}], ids=str)
@pytest.mark.parametrize("is_static", [False, True])
def test_the_cache_of_rows_that_went_at_their_own_pace_can_be_continued(model, inputs, drafts, is_static):
    for count in (5, 24):
        settings = {"max_new_tokens": count, "do_sample": False, "eos_token_id": 16, "pad_token_id": 2}
        cache = StaticCache(config=model.config, max_cache_len=200) if is_static else DynamicCache(config=model.config)
        found = model.generate(**inputs, **settings, **drafts, **{CACHE_NAME: cache})
        assert int(cache.get_seq_length()) < found.shape[1]
        added = found.new_ones(found.shape[0], found.shape[1] - inputs["input_ids"].shape[1])
        mask = torch.cat((inputs["attention_mask"], added), dim=1)
        given = {
            "input_ids": found,
            "attention_mask": mask,
            "max_new_tokens": 8,
            "do_sample": False,
            "eos_token_id": None,
        }
        assert torch.equal(model.generate(**given, **{CACHE_NAME: cache}), model.generate(**given))


def test_sampled_tokens_have_the_models_distribution_after_a_certain_draft_or_none():
    torch.manual_seed(1)
    count, p = 60000, torch.tensor([0.5, 0.3, 0.15, 0.05])
    drafted = torch.full((count,), 1)
    drafted[::3] = NOTHING
    first, stand = accept_sampling(p.log().expand(count, -1), drafted, certain(drafted, 4))
    assert torch.equal(stand, (first == 1) & (drafted == 1)) and not stand[::3].any()
    found, expected = torch.bincount(first, minlength=4).double(), p.double() * count
    assert ((found - expected) ** 2 / expected).sum() < 16.3  # 0.1 % of a chi-square of 3 degrees


class Known:
    """Drafts that know what the model says, and are wrong at other places in each row."""

    def __init__(self, rows: Rows, text: torch.Tensor):
        self.rows, self.text, self.count, self.window = rows, text, 3, 0

    def see(self, *_):
        pass

    def propose(self, _):
        for ahead in range(self.count):
            places = [min(length + ahead, self.text.shape[1] - 1) for length in self.rows.lengths]
            said = [int(self.text[row, place]) for row, place in enumerate(places)]
            yield torch.tensor(
                [
                    token + ((row + place) % (3 + row) == 0)
                    for row, (token, place) in enumerate(zip(said, places, strict=True))
                ]
            )


@pytest.fixture(scope="module")
def indexed(tmp_path_factory):
    """DeepSeek-V3.2's shape, whose indexers keep eight tokens."""
    folder = tmp_path_factory.mktemp("v32")
    write_family(folder, "deepseek_v32")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
def test_rows_at_their_own_pace_keep_their_indexers_keys(indexed, cache):
    given = {"input_ids": torch.randint(3, 128, (3, 20)), "attention_mask": torch.ones(3, 20, dtype=torch.long)}
    given["attention_mask"][0, :6] = 0
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    wanted = indexed.generate(**given, **settings)
    source = Source("", 3, lambda rows, *_: Known(rows, wanted))
    found = indexed.generate(**given, **settings, **cache, custom_generate=partial(_decode, source=source))
    stats = indexed.draft_stats
    assert torch.equal(found, wanted) and 12 < stats.accepted < stats.drafted
    for drafts in ({"use_mtp": 2}, {"prompt_lookup_num_tokens": 3}):
        assert torch.equal(indexed.generate(**given, **settings, **cache, **drafts), wanted)


def probabilities(model, prompt: torch.Tensor, length: int, choices: int, temperature: float) -> dict[tuple, float]:
    """Of every text of ``length`` tokens after ``prompt [S]``, each one of its place's ``choices`` likeliest: plain passes."""
    found = {(): 1.0}
    for _ in range(length):
        texts = torch.stack([torch.cat((prompt, torch.tensor(text, dtype=torch.long))) for text in found])
        with torch.no_grad():
            values, tokens = (model(texts).logits[:, -1] / temperature).topk(choices)
        found = {
            (*text, token): p * q
            for (text, p), row, chances in zip(
                found.items(), tokens.tolist(), values.softmax(-1).tolist(), strict=True
            )
            for token, q in zip(row, chances, strict=True)
        }
    return found


@pytest.mark.parametrize("drafts", [{"use_mtp": 2}, {"prompt_lookup_num_tokens": 2}], ids=str)
def test_sampled_texts_of_padded_rows_have_the_models_distribution(model, drafts):
    """Three lengths of prompt, four tokens, one to three a step: chi-square of all the texts that can be."""
    prompt = draft_cases.asked_twice(1)["input_ids"][0]
    cuts, many = (0, 5, 11), 120
    mask = torch.ones(len(cuts) * many, len(prompt), dtype=torch.long)
    for place, cut in enumerate(cuts):
        mask[place::3, :cut] = 0
    settings = {"do_sample": True, "temperature": 8.0, "top_k": 2, "max_new_tokens": 4, "eos_token_id": None}
    found = model.generate(prompt * mask, attention_mask=mask, **settings, **drafts)[:, len(prompt) :].tolist()
    assert 0 < model.draft_stats.accepted < model.draft_stats.drafted
    statistic = freedom = 0
    for place, cut in enumerate(cuts):
        counted = Counter(map(tuple, found[place::3]))
        expected = probabilities(model, prompt[cut:], 4, 2, 8.0)
        assert counted.keys() <= expected.keys()
        likely = {text: many * p for text, p in expected.items() if many * p >= 5}
        cells = [(counted[text], wanted) for text, wanted in likely.items()]
        cells.append((many - sum(seen for seen, _ in cells), many - sum(likely.values())))
        statistic += sum((seen - wanted) ** 2 / wanted for seen, wanted in cells)
        freedom += len(cells) - 1
    assert freedom > 10 and statistic < freedom + 3.1 * (2 * freedom) ** 0.5 + 5  # 0.1 % lie above


def test_what_is_looked_up():
    text = torch.tensor([[0, 0, 5, 6, 7, 8, 5, 6], [3, 3, 3, 9, 3, 4, 2, 1], [1, 2, 3, 4, 5, 6, 7, 8]])
    rows = Rows(text, 20, 0, [], StoppingCriteriaList([EosTokenCriteria(60)]))
    padding = torch.ones_like(text).bool()
    padding[0, :2] = False
    drafts = torch.stack(list(LookupDraft(rows, 3, 2, padding).propose()), dim=1)
    assert drafts.tolist() == [[7, 8, 5], [-1, -1, -1], [-1, -1, -1]]  # the last two: nothing found
    rows.append(torch.tensor([60, 2, 8]), [True] * 3)
    drafts = torch.stack(list(LookupDraft(rows, 3, 2, padding).propose()), dim=1)
    assert drafts.tolist() == [[-1, -1], [1, 2], [8, -1]]  # the first has ended
    assert not list(LookupDraft(Rows(text[2:], 20, 0, [], []), 3, 2, None).propose())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"prompt_lookup_num_tokens": 3, "num_beams": 2},
            "prompt_lookup_num_tokens=3: num_beams=2 does not go with it",
        ),
        ({"prompt_lookup_num_tokens": 3, "output_scores": True}, "output_scores=True does not go with it"),
        ({"assistant_model": "other"}, "found a vocabulary of 50 tokens, wanted the model's own 657"),
        ({"assistant_model": "sliding"}, "layer 0: found a DynamicSlidingWindowLayer in its cache"),
    ],
)
def test_what_cannot_be_is_refused(model, settings, said):
    sizes = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    assistants = {"other": (50, None), "sliding": (model.config.vocab_size, 8)}
    if settings.get("assistant_model") in assistants:
        vocabulary, window = assistants[settings["assistant_model"]]
        config = MistralConfig(vocab_size=vocabulary, sliding_window=window, intermediate_size=8, **sizes)
        settings = settings | {"assistant_model": Mistral(config)}
    with pytest.raises(ValueError, match=said):
        model.generate(torch.tensor([[3, 4], [5, 6]]), max_new_tokens=2, **settings)


def test_a_pipeline_is_refused_for_what_it_lacks(model, inputs, monkeypatch):
    monkeypatch.setattr(model.model, "has_gaps", True)
    with pytest.raises(
        ValueError, match="tokens=3: found a model over several ranks, whose pipeline does not verify drafts"
    ):
        model.generate(**inputs, prompt_lookup_num_tokens=3, max_new_tokens=2)


def test_a_quantised_cache_is_refused(model):
    cache = QuantizedCache.__new__(QuantizedCache)  # without the package that one of its layers wants
    cache.layers = [SimpleNamespace(is_croppable=False)]
    lists = {"logits_processor": LogitsProcessorList(), "stopping_criteria": StoppingCriteriaList()}
    with pytest.raises(
        ValueError, match="found a QuantizedCache, wanted one in FP8 or another cache that gives back drafts"
    ):
        decode(
            *(model, torch.tensor([[3, 4]])),
            **{"choice": None, "make_draft": None, "generation_config": None, CACHE_NAME: cache},
            **lists,
        )
