"""What tests of drafts share: the shipped checkpoint, prompts whose answers can be looked up, and ways of drafting."""

from functools import cache

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, FineGrainedFP8Config

import modeling_deepseek_moe as dsm
from modeling_deepseek_moe.decoding.loop import DraftStats
from modeling_deepseek_moe.tiny.corpus import FAMILIES
from modeling_deepseek_moe.tiny.score import held_out

KINDS = ("mtp", "lookup", "assistant")


@cache
def tokenizer():
    return AutoTokenizer.from_pretrained(dsm.tiny_checkpoint(), padding_side="left")


@cache
def model():
    """The shipped checkpoint in fp32; one for all tests of a process."""
    settings = {"dtype": torch.float32, "quantization_config": FineGrainedFP8Config(dequantize=True)}
    return AutoModelForCausalLM.from_pretrained(dsm.tiny_checkpoint(), **settings).eval()


def encoded(texts: list[str]):
    return tokenizer()(texts, return_tensors="pt", padding=True, add_special_tokens=False)


def asked_twice(rows: int = 6):
    """Padded rows, each with a question twice: the second answer is there to be looked up."""
    problems = [problem for family in FAMILIES for problem in held_out(family, 2)][:rows]
    settings = {"tokenize": False, "add_generation_prompt": True}
    return encoded([tokenizer().apply_chat_template([*p.messages, *p.messages[:-1]], **settings) for p in problems])


def drafting(kind: str) -> dict:
    """Arguments of `generate` that draft three tokens a step, one of `KINDS`; all but the first are for several rows."""
    assistant = {"assistant_model": model(), "num_assistant_tokens": 3, "assistant_confidence_threshold": 0.0}
    return {"mtp": {"use_mtp": 3}, "lookup": {"prompt_lookup_num_tokens": 3}, "assistant": assistant}[kind]


def drafted(*args, **kwargs) -> tuple[torch.Tensor, DraftStats | None]:
    """A text of `model`, and what its drafts came to; ``None`` where `generate` made none of its own."""
    model().draft_stats = None
    return model().generate(*args, **kwargs), model().draft_stats
