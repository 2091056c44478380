"""What a call of ``generate`` says besides: with drafts it means what it means without them, or is refused by name."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from draft_cases import KINDS, asked_twice, drafted, drafting
from draft_cases import model as tiny
from draft_cases import tokenizer as tiny_tokenizer
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from modeling_deepseek_moe.compat import CACHE_NAME
from modeling_deepseek_moe.decoding.loop import Decoding

DEVICE_CASES = Path(__file__).with_name("draft_device_cases.py")
GREEDY = {"max_new_tokens": 10, "do_sample": False}
MTP, LOOKUP = {"use_mtp": 3}, {"prompt_lookup_num_tokens": 3}


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def inputs():
    return asked_twice()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("past", [4, 40])
def test_new_tokens_alone_after_a_cache(model, inputs, kind, past):
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    for rows in (slice(1), slice(3)) if kind == "mtp" else (slice(3),):
        cache = DynamicCache(config=model.config)
        model.generate(
            ids[rows, :past],
            attention_mask=mask[rows, :past],
            max_new_tokens=1,
            do_sample=False,
            **{CACHE_NAME: cache},
        )
        assert int(cache.get_seq_length()) == past
        caches = [copy.deepcopy(cache) for _ in range(3)]
        given = {"attention_mask": mask[rows], **GREEDY}
        wanted = model.generate(ids[rows, past:], **given, **{CACHE_NAME: caches[0]})
        found, stats = drafted(ids[rows, past:], **given, **drafting(kind), **{CACHE_NAME: caches[1]})
        assert torch.equal(found, wanted) and stats.drafted
        whole, stats = drafted(ids[rows], **given, **drafting(kind), **{CACHE_NAME: caches[2]})
        assert torch.equal(whole[:, past:], wanted) and stats.drafted
        assert past < int(caches[1].get_seq_length()) < past + wanted.shape[1]


@pytest.mark.parametrize("drafts", [MTP, LOOKUP], ids=str)
def test_a_text_that_does_not_fit_what_is_cached_is_refused(model, drafts):
    cache = DynamicCache(config=model.config)
    model.generate(torch.full((2, 8), 5), max_new_tokens=1, do_sample=False, **{CACHE_NAME: cache})
    with pytest.raises(
        ValueError, match="found 4 input_ids a row with an attention_mask of 4 and 8 tokens in the cache"
    ):
        model.generate(torch.full((2, 4), 5), **GREEDY, **drafts, **{CACHE_NAME: cache})


class Watch(LogitsProcessor):
    """Keeps every text that it is shown."""

    def __init__(self):
        self.texts = []

    def __call__(self, input_ids, scores):
        self.texts.append(input_ids.tolist())
        return scores


@pytest.mark.parametrize("kind", KINDS)
def test_a_processor_of_the_callers_is_shown_what_it_is_without_drafts(model, inputs, kind):
    """Text by text, to the last call: of rows that end at unlike places, and of one row alone."""
    settings = GREEDY | {"max_new_tokens": 24, "eos_token_id": 16, "pad_token_id": 2, "repetition_penalty": 1.05}
    for rows in (slice(1), slice(4)) if kind == "mtp" else (slice(4),):
        given = {name: tensor[rows] for name, tensor in inputs.items()}
        plain, watch = Watch(), Watch()
        wanted = model.generate(**given, **settings, logits_processor=LogitsProcessorList([plain]))
        found, stats = drafted(**given, **settings, **drafting(kind), logits_processor=LogitsProcessorList([watch]))
        assert torch.equal(found, wanted) and watch.texts == plain.texts
        assert stats.accepted and stats.steps < len(plain.texts)


class Stop(StoppingCriteria):
    """Keeps every text that it is shown; a row ends by its place in the batch."""

    def __init__(self, ends: list[int]):
        self.ends, self.texts = torch.tensor(ends), []

    def __call__(self, input_ids, scores, **kwargs):
        self.texts.append(input_ids.tolist())
        return input_ids.shape[1] >= self.ends


@pytest.mark.parametrize("kind", KINDS)
def test_a_criterion_of_the_callers_is_shown_what_it_is_without_drafts(model, inputs, kind):
    """Text by text, to the last call, of rows that end at unlike places and accept unlike numbers of tokens."""
    given = {name: tensor[:4] for name, tensor in inputs.items()} | GREEDY | {"eos_token_id": 16, "pad_token_id": 2}
    ends = [inputs["input_ids"].shape[1] + length for length in (9, 5, 7, 8)]
    plain, watch = Stop(ends), Stop(ends)
    wanted = model.generate(**given, stopping_criteria=StoppingCriteriaList([plain]))
    found, stats = drafted(**given, **drafting(kind), stopping_criteria=StoppingCriteriaList([watch]))
    assert torch.equal(found, wanted) and watch.texts == plain.texts
    assert stats.accepted and stats.steps < len(plain.texts)


@pytest.mark.parametrize("kind", KINDS)
def test_constrained_text(model, kind):
    """By a trie that has nothing to say beyond its leaves, nor of texts of another length."""
    ids = torch.randint(3, 600, (3, 40), generator=torch.Generator().manual_seed(0))

    settings = GREEDY | {"eos_token_id": 1, "pad_token_id": 2}
    for count in (1, 3) if kind == "mtp" else (3,):

        def allowed(row, text, last=count - 1):
            said = text[40:].tolist()
            if 1 in said:
                return [2] if row < last else []  # a row that has ended is shown while others go on
            return [3, 4, 9] if len(said) < 2 + row else [1] if len(said) == 2 + row else []

        wanted = model.generate(ids[:count], **settings, prefix_allowed_tokens_fn=allowed)
        drafts = drafting(kind)
        found, stats = drafted(ids[:count], **settings, **drafts, prefix_allowed_tokens_fn=allowed)
        assert torch.equal(found, wanted) and stats.steps and wanted.shape[1] == 42 + count


@pytest.fixture
def own(model, monkeypatch):
    """Settings of the model's own generation config."""

    def settings(**values):
        config = copy.deepcopy(model.generation_config)
        config.update(**values)
        monkeypatch.setattr(model, "generation_config", config)

    return settings


def test_the_models_own_config_counts(model, inputs, own, monkeypatch):
    """And of arguments that were not passed there is no warning."""
    tokenizer, warned = tiny_tokenizer(), []
    monkeypatch.setattr("transformers.generation.utils.logger.warning_once", warned.append)
    passed = GenerationConfig(max_new_tokens=10)
    wanted = model.generate(**inputs, generation_config=passed)
    own(use_mtp=2)
    found, stats = drafted(**inputs, generation_config=passed)
    assert torch.equal(found, wanted) and stats.drafted
    for config in (None, passed):
        found, stats = drafted(**inputs, generation_config=config, max_new_tokens=10, use_mtp=False)
        assert torch.equal(found, wanted) and stats is None
    own(use_mtp=None, prompt_lookup_num_tokens=3)
    for more in ({}, {"generation_config": passed}):
        found, stats = drafted(**inputs, max_new_tokens=10, **more)
        assert torch.equal(found, wanted) and stats.drafted
    with pytest.raises(ValueError, match="prompt_lookup_num_tokens=3 does not go with it"):
        model.generate(**inputs, generation_config=passed, use_mtp=2)
    own(prompt_lookup_num_tokens=None, stop_strings=["is ", "."])
    wanted = model.generate(**inputs, generation_config=passed, tokenizer=tokenizer)
    found, stats = drafted(**inputs, generation_config=passed, tokenizer=tokenizer, use_mtp=2)
    assert torch.equal(found, wanted) and stats.drafted
    own(stop_strings=None, guidance_scale=2.0)
    with pytest.raises(ValueError, match=r"use_mtp=2: guidance_scale=2.0 does not go with it"):
        model.generate(**inputs, generation_config=passed, use_mtp=2)
    assert {text.partition("arguments=")[2].partition(" ")[0] for text in warned} == {"({'max_new_tokens'})"}


@pytest.mark.parametrize(
    "settings",
    [
        {"penalty_alpha": 0.6, "top_k": 4},
        {"dola_layers": "low"},
        {"force_words_ids": [[3]]},
        {"assistant_early_exit": 1},
        {"assistant_ensemble_weight": 0.5},
        {"speculation_type": "dflash"},
        {"cache_implementation": "paged"},
    ],
    ids=str,
)
def test_other_ways_of_decoding_are_refused(model, settings):
    name, value = next(iter(settings.items()))
    with pytest.raises(ValueError) as error:
        model.generate(torch.tensor([[3, 4]]), max_new_tokens=2, use_mtp=True, **settings)
    assert f"use_mtp=True: {name}={value!r} does not go with it" in str(error.value)


def test_a_penalty_that_transformers_does_not_look_at(model, inputs):
    settings = GREEDY | {"penalty_alpha": 0.6, "top_k": 1}
    found, stats = drafted(**inputs, **settings, **MTP)
    assert torch.equal(found, model.generate(**inputs, **settings)) and stats.accepted


def test_positions_are_the_masks(model, inputs):
    mask = inputs["attention_mask"][:3]
    given = {"input_ids": inputs["input_ids"][:3], "attention_mask": mask}
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)  # of padding anything
    wanted = model.generate(**given, **GREEDY)
    assert torch.equal(model.generate(**given, position_ids=positions, **GREEDY, **MTP), wanted)
    packed = torch.arange(mask.shape[1]).expand_as(mask) % 20
    for other in (positions + 5, packed, positions[:, :-1]):
        with pytest.raises(ValueError, match="position_ids: found others than attention_mask gives each row"):
            model.generate(**given, position_ids=other, **GREEDY, **MTP)


def test_a_prompt_is_read_in_chunks_and_by_the_path_that_is_asked_for(model, inputs):
    widths, paths = [], set()

    def watch(_, args, kwargs):
        widths.append(args[0].shape[1])
        paths.add(kwargs["mla_path"])

    hook = model.model.layers[0].register_forward_pre_hook(watch, with_kwargs=True)
    length = inputs["input_ids"].shape[1]
    try:
        found, stats = drafted(**inputs, prefill_chunk_size=length // 2, mla_path="expanded", **GREEDY, **MTP)
    finally:
        hook.remove()
    assert torch.equal(found, model.generate(**inputs, **GREEDY)) and stats.accepted
    assert max(widths) == length // 2 and paths == {"expanded"}


@pytest.mark.parametrize(("drafts", "window"), [({"use_mtp": "auto"}, 32), (LOOKUP, 1), (MTP, None)], ids=str)
def test_of_a_prompt_in_chunks_hidden_states_are_kept_for_drafts_that_read_them(
    model, inputs, drafts, window, monkeypatch
):
    say, kept = Decoding._say, []

    def watched(decoding, hidden):
        kept.append(hidden.untyped_storage().nbytes() // hidden.nbytes)
        return say(decoding, hidden)

    monkeypatch.setattr(Decoding, "_say", watched)
    monkeypatch.setattr("modeling_deepseek_moe.decoding.expected.Expected.hopeless", lambda _: None)
    length = inputs["input_ids"].shape[1]
    model.generate(**inputs, prefill_chunk_size=8, max_new_tokens=1, do_sample=False, **drafts)
    assert kept == [length] if window is None else kept[0] <= window + 8 < length


def test_no_tokens_are_refused(model):
    with pytest.raises(ValueError, match="input_ids: found no tokens, wanted at least one a row"):
        model.generate(torch.zeros(1, 0, dtype=torch.long), **GREEDY, **MTP)
    found, stats = drafted(bos_token_id=5, **GREEDY, **MTP)
    assert torch.equal(found, model.generate(bos_token_id=5, **GREEDY)) and stats.steps


@pytest.mark.parametrize("drafts", [MTP, LOOKUP], ids=str)
def test_zero_3_is_refused_where_there_are_ranks(model, inputs, drafts, monkeypatch):
    monkeypatch.setattr("modeling_deepseek_moe.decoding.sources.is_deepspeed_zero3_enabled", lambda: True)
    model.generate(**inputs, max_new_tokens=1, **drafts)  # one process has all
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match=r"over several ranks, each with a batch of its own \(ZeRO-3\)"):
        model.generate(**inputs, max_new_tokens=1, **drafts)


def test_rows_of_an_offloaded_cache_are_refused(model, inputs):
    cache = DynamicCache(config=model.config)
    cache.offloading = True
    with pytest.raises(ValueError, match="found a DynamicCache that is offloaded, and 6 rows"):
        model.generate(**inputs, **GREEDY, **MTP, **{CACHE_NAME: cache})


@pytest.mark.kernels
def test_a_prompt_that_is_not_on_the_models_device():
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", str(DEVICE_CASES)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    found = subprocess.run(
        command, check=False, capture_output=True, text=True, cwd=DEVICE_CASES.parent, env=environment
    )
    assert found.returncode == 0, found.stdout[-4000:] + found.stderr[-2000:]
    assert "failed" not in found.stdout and "skipped" not in found.stdout
