"""Scores of a model on held-out generated problems: ``python -m modeling_deepseek_moe.tiny.score FOLDER``.

Greedy answers by the chat template, exactly matched; and how often the MTP layer foretells the model's own next token.
"""

import argparse
import itertools
import json
import math
import re

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from modeling_deepseek_moe.tiny.corpus import FAMILIES, Problem, problems

ANSWER = re.compile(r"The answer is (?:\\boxed\{(\d+)\}|\(([A-J])\))")


def held_out(family: str, count: int, seed: int = 1234) -> list[Problem]:
    return list(itertools.islice(problems(seed, held_out=True, family=family), count))


@torch.no_grad()
def accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asked: list[Problem], batch: int = 50
) -> float:
    """The part of the problems whose answer is right."""
    right = 0
    for start in range(0, len(asked), batch):
        part = asked[start : start + batch]
        prompts = [tokenizer.apply_chat_template(p.messages[:1], tokenize=False) for p in part]
        inputs = tokenizer(
            prompts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt"
        ).to(model.device)
        out = model.generate(
            inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=80, do_sample=False
        )
        texts = tokenizer.batch_decode(out[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        for problem, text in zip(part, texts, strict=True):
            found = ANSWER.search(text)
            right += found is not None and (found[1] or found[2]) == problem.answer
    return right / len(asked)


@torch.no_grad()
def mtp_agreement(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, read: list[Problem]) -> float:
    """Of the tokens of held-out text, the part whose most likely next token the MTP layer named one token before."""
    same = total = 0
    for problem in read:
        text = tokenizer.apply_chat_template(problem.messages, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids.to(model.device)
        hidden = model.model(ids).last_hidden_state
        foretold, _ = model.mtp_logits(0, ids[:, 1:], hidden[:, :-1])
        own = model.lm_head(hidden[:, 1:])
        agree = foretold.argmax(-1) == own.argmax(-1)
        same, total = same + int(agree.sum()), total + agree.numel()
    return same / total


def interval(part: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion."""
    z = 1.96
    centre = (part + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(part * (1 - part) / count + z * z / (4 * count * count))
    return centre - half, centre + half


def score(folder: str, count: int) -> dict:
    """``{"accuracy": {family: [part, low, high]}, "mtp_agreement": part}`` of a checkpoint, as it is stored."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    scores = {}
    for family in FAMILIES:
        part = accuracy(model, tokenizer, held_out(family, count))
        scores[family] = [round(value, 4) for value in (part, *interval(part, count))]
    read = [problem for family in FAMILIES for problem in held_out(family, max(1, count // 10))]
    return {"count": count, "accuracy": scores, "mtp_agreement": round(mtp_agreement(model, tokenizer, read), 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--count", type=int, default=200, help="problems of each family")
    given = parser.parse_args()
    print(json.dumps(score(given.folder, given.count), indent=2))


if __name__ == "__main__":
    main()
