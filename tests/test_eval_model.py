"""The model class under lm-eval: equal to plain transformers under HFLM, and to itself whatever the batch."""

import dataclasses
import json
import random

import pytest
import torch
import transformers
from eval_harness import small_model, tokenizer
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from scipy import stats

import modeling_deepseek_moe  # noqa: F401
from modeling_deepseek_moe.checkpoint.journal import Journal
from modeling_deepseek_moe.eval.model import DeepseekLM, Settings
from modeling_deepseek_moe.eval.sampling import RowSampler

GREEDY = {"until": [], "do_sample": False, "temperature": 0.0, "top_p": 1.0, "max_gen_toks": 24}
TEXTS = [f"Question: {name} has {i} pens and buys {2 * i} more." + " How many?" * (i % 5) for i, name in
         enumerate(["Ada", "Ben", "Cora", "Dan", "Eva", "Finn", "Gina", "Hugo", "Ida"])]  # fmt: skip


def generations(texts, settings=GREEDY):
    return [Instance("generate_until", {}, (text, dict(settings)), i) for i, text in enumerate(texts)]


def likelihoods(texts):
    return [
        Instance("loglikelihood", {}, (text, f" {end}"), i)
        for i, text in enumerate(texts)
        for end in ("A", "12", "pens")
    ]


@pytest.fixture(scope="module")
def ours():
    return small_model()


def lm(model, **options):
    return DeepseekLM(model, tokenizer=tokenizer(), **{"batch_size": 4, **options})


@pytest.fixture(scope="module")
def plain(ours, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    ours.save_pretrained(folder)
    model = transformers.DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return HFLM(model, tokenizer=tokenizer(), batch_size=1, add_bos_token=False)


def test_equals_plain_transformers_under_lm_evals_own_class(ours, plain):
    texts = [f"<bos>{text}" for text in TEXTS]
    wanted = plain.loglikelihood(likelihoods(texts), disable_tqdm=True)
    got = lm(ours).loglikelihood(likelihoods(texts), disable_tqdm=True)
    assert max(abs(a - b) for (a, _), (b, _) in zip(got, wanted, strict=True)) < 1e-3
    assert [greedy for _, greedy in got] == [greedy for _, greedy in wanted]
    wanted = plain.generate_until(generations(texts), disable_tqdm=True)
    got = lm(ours).generate_until(generations(texts), disable_tqdm=True)
    assert got == wanted
    assert len(set(got)) > 1 and all(got)


@pytest.mark.parametrize("settings", [GREEDY, {**GREEDY, "do_sample": True, "temperature": 0.8, "top_p": 0.9}])
@pytest.mark.parametrize(
    "options", [{"batch_size": 1}, {"batch_size": "auto"}, {"cache": "static"}, {"shuffle": True}]
)
def test_batch_order_padding_and_cache_change_nothing(ours, settings, options):
    wanted = lm(ours).generate_until(generations(TEXTS, settings), disable_tqdm=True)
    shuffle = options.pop("shuffle", False) if (options := dict(options)) else False
    order = list(range(len(TEXTS)))
    if shuffle:
        random.Random(3).shuffle(order)
    got = lm(ours, **options).generate_until(generations([TEXTS[i] for i in order], settings), disable_tqdm=True)
    assert got == [wanted[i] for i in order]
    assert len(set(wanted)) == len(wanted)


def test_batch_changes_no_likelihood(ours):
    one = lm(ours, batch_size=1).loglikelihood(likelihoods(TEXTS), disable_tqdm=True)
    many = lm(ours, batch_size=5).loglikelihood(likelihoods(TEXTS), disable_tqdm=True)
    assert [a for a, _ in many] == pytest.approx([a for a, _ in one], abs=1e-4)


def test_k_samples_of_a_question_differ_and_repeat_with_the_seed(ours):
    settings = {**GREEDY, "do_sample": True, "temperature": 1.0}
    requests = generations([TEXTS[0]] * 6, settings)
    first = lm(ours, seed=1).generate_until(requests, disable_tqdm=True)
    assert len(set(first)) == 6
    assert lm(ours, seed=1).generate_until(requests, disable_tqdm=True) == first
    assert lm(ours, seed=2).generate_until(requests, disable_tqdm=True) != first


def test_row_sampler_draws_from_the_distribution():
    logits = torch.tensor([2.0, 1.0, 0.5, -1.0, -3.0])
    draws = 4000
    sampler = RowSampler([str(i) for i in range(draws)], 0, temperature=0.7, top_p=0.9)
    counts = sampler(None, logits.expand(draws, -1)).argmax(-1).bincount(minlength=5)
    warp = transformers.LogitsProcessorList(
        [transformers.TemperatureLogitsWarper(0.7), transformers.TopPLogitsWarper(0.9)]
    )
    wanted = warp(None, logits[None])[0].double().softmax(-1)
    kept = wanted > 0
    assert counts[~kept].sum() == 0
    assert stats.chisquare(counts[kept].numpy(), (wanted[kept] / wanted[kept].sum() * draws).numpy()).pvalue > 1e-4


def test_each_row_ends_at_its_own_stop_string(ours):
    free = lm(ours).generate_until(generations(TEXTS), disable_tqdm=True)
    stop = free[0][4:7]
    assert stop
    model = lm(ours)
    stopped = model.generate_until(generations(TEXTS, {**GREEDY, "until": [stop]}), disable_tqdm=True)
    assert stopped == [text.partition(stop)[0] for text in free]
    made = model.output(TEXTS[0], {**GREEDY, "until": [stop]}, 0)
    assert made["tokens"] < 24 and not made["truncated"]  # it did not go on to the limit


def test_truncation_is_told_from_an_end(ours):
    model = lm(ours)
    model.generate_until(generations(TEXTS), disable_tqdm=True)
    assert model.output(TEXTS[0], GREEDY, 0)["truncated"] and model.output(TEXTS[0], GREEDY, 0)["tokens"] == 24
    ending = small_model()
    made = ending.generate(torch.tensor([model.tok_encode(TEXTS[0])]), max_new_tokens=6, do_sample=False)[0].tolist()
    ending.generation_config.eos_token_id = [made[-1]]  # what it says sixth at the latest ends its text
    model = lm(ending)
    model.generate_until(generations(TEXTS), disable_tqdm=True)
    output = model.output(TEXTS[0], GREEDY, 0)
    assert not output["truncated"] and output["tokens"] <= 6


def test_one_bos_and_only_one(ours):
    model = lm(ours)
    assert model.tok_encode("pens")[0] == 0 and model.tok_encode("pens").count(0) == 1
    assert model.tok_encode("<bos>pens") == model.tok_encode("pens")
    assert lm(ours, add_bos_token=False).tok_encode("pens") == model.tok_encode("pens")[1:]
    prompt = lm(ours, prefill="<think>\n").apply_chat_template([{"role": "user", "content": "x"}])
    assert prompt.startswith("<bos>") and prompt.endswith("<think>\n") and prompt.count("<think>") == 1
    model = lm(ours, prefill="<think>\n")
    model.tokenizer.chat_template += "<think>"  # without the line's end
    assert model.apply_chat_template([{"role": "user", "content": "x"}]).count("<think>") == 1


@pytest.mark.parametrize("said", [True, False])
def test_the_folder_says_whether_a_text_begins_with_bos(ours, tmp_path, said):
    model = lm(ours)
    silent = model.tok_encode("pens")
    (tmp_path / "tokenizer_config.json").write_text(f'{{"add_bos_token": {str(said).lower()}}}')
    model.tokenizer.name_or_path = str(tmp_path)
    assert model.tok_encode("pens") == (silent if said else silent[1:])
    wished = lm(ours, add_bos_token=not said)
    wished.tokenizer.name_or_path = str(tmp_path)
    assert wished.tok_encode("pens") == (silent[1:] if said else silent)


def test_a_prompt_is_never_cut(ours):
    with pytest.raises(ValueError, match=r"prompt of \d+ tokens and max_gen_toks 1020, wanted at most 1024 together"):
        lm(ours).generate_until(generations(TEXTS, {**GREEDY, "max_gen_toks": 1020}), disable_tqdm=True)
    with pytest.raises(ValueError, match=r"context and continuation of \d+ tokens, wanted at most 1024"):
        lm(ours).loglikelihood(likelihoods(["pens " * 1100]), disable_tqdm=True)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"top_k": 5}, "'top_k', which this model class does not know"),
        ({"temperature": -1.0}, "temperature -1.0"),
        ({"top_p": 0.0}, "top_p 0.0"),
        ({"max_gen_toks": 0}, "max_gen_toks 0"),
    ],
)
def test_settings_are_known_or_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Settings.read({**GREEDY, **change})


def test_unknown_cache_and_missing_template(ours):
    with pytest.raises(ValueError, match="found 'paged', wanted 'dynamic' or 'static'"):
        lm(ours, cache="paged")
    model = lm(ours)
    model.tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template, wanted one: is it a base model"):
        model.apply_chat_template([{"role": "user", "content": "x"}])


def test_nothing_is_inherited_from_the_models_generation_config(ours):
    model = small_model()
    wanted = lm(model).generate_until(generations(TEXTS), disable_tqdm=True)
    model.generation_config.update(do_sample=True, temperature=5.0, top_p=0.95, top_k=50, repetition_penalty=3.0)
    assert lm(model).generate_until(generations(TEXTS), disable_tqdm=True) == wanted


def test_journal_gives_what_it_has_and_takes_no_other_run(tmp_path, ours):
    file, run = tmp_path / "journal.jsonl", {"model": {"x": 1}, "seed": 1}
    journal = Journal(file, run)
    wanted = lm(ours, journal=journal).generate_until(generations(TEXTS), disable_tqdm=True)
    likely = lm(ours, journal=journal).loglikelihood(likelihoods(TEXTS), disable_tqdm=True)
    journal.close()
    whole = file.read_bytes()
    lines = whole.splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:4]) + lines[4][:30])  # killed while it wrote
    journal = Journal(file, run)
    assert len(journal.answers) == 3
    model = lm(ours, journal=journal)
    assert model.generate_until(generations(TEXTS), disable_tqdm=True) == wanted
    assert model.loglikelihood(likelihoods(TEXTS), disable_tqdm=True) == likely
    journal.close()
    assert sorted(file.read_bytes().splitlines()) == sorted(whole.splitlines())

    broken = small_model()
    broken.forward = None  # all answers are there: the model is not asked
    journal = Journal(file, run)
    assert lm(broken, journal=journal).generate_until(generations(TEXTS), disable_tqdm=True) == wanted
    journal.close()
    with pytest.raises(ValueError, match=r"answers of another run, with seed 1, wanted 2: give another --out"):
        Journal(file, {**run, "seed": 2})
    held = Journal(file, run)
    with pytest.raises(BlockingIOError, match=r"another process writes to it"):
        Journal(file, run)
    held.close()
    file.write_bytes(lines[0] + b"garbage\n" + lines[1])
    with pytest.raises(ValueError, match=r"journal.jsonl:2: damaged"):
        Journal(file, run)


def test_journal_keeps_any_text(tmp_path):
    texts = ["plain", "中文 é 😀", "half \ud800 a pair", "line\u2028break\x85 and\r\n"]
    journal = Journal(tmp_path / "j", {})
    journal.add({str(i): {"text": text} for i, text in enumerate(texts)})
    journal.close()
    journal = Journal(tmp_path / "j", {})
    assert [journal.answers[str(i)]["text"] for i in range(len(texts))] == texts
    journal.close()


def test_settings_are_part_of_a_key(ours):
    model = lm(ours)
    model.generate_until(generations(TEXTS[:1]), disable_tqdm=True)
    model.generate_until(generations(TEXTS[:1], {**GREEDY, "max_gen_toks": 5}), disable_tqdm=True)
    assert len(model.generated) == 2
    assert dataclasses.asdict(Settings.read(json.loads(json.dumps(GREEDY))))["max_tokens"] == 24
