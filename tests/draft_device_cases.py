"""Drafts where the model is on a device and its prompt is not: run by test_drafts_and_settings.py, in a process of its own."""

import fake_device
import pytest
import torch
from releases import SHAPES

import modeling_deepseek_moe as dsm

LIBRARIES = fake_device.register()  # it lasts as long as they do
GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}


@pytest.mark.parametrize(
    "drafts",
    [
        {"use_mtp": 2},
        {"use_mtp": 2, "repetition_penalty": 1.01},
        {"prompt_lookup_num_tokens": 2},
        {"num_assistant_tokens": 2},
    ],
    ids=str,
)
def test_the_text_stays_with_the_prompt(drafts):
    model = dsm.DeepseekV3ForCausalLM(SHAPES["v3-mtp"]()).eval()
    if "num_assistant_tokens" in drafts:
        drafts = drafts | {"assistant_model": model}
    given = {"input_ids": torch.randint(3, 120, (3, 12)), "attention_mask": torch.ones(3, 12, dtype=torch.long)}
    given["attention_mask"][0, :3] = 0
    plain = {name: drafts[name] for name in ("repetition_penalty",) if name in drafts}
    wanted = model.generate(**given, **GREEDY, **plain)
    model.to(f"{fake_device.NAME}:0")
    found = model.generate(**given, **GREEDY, **drafts)
    assert found.device.type == "cpu" and torch.equal(found, wanted) and model.draft_stats.drafted
