"""Masks with holes, next to plain transformers on the same weights: answers of unlike lengths before the next turn, padding
on the right. Positions count what is not masked, as `generate` counts them."""

import pytest
import torch
import transformers
from families import write_family
from releases import SHAPES, write_release
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from modeling_deepseek_moe.compat import CACHE_NAME

pytestmark = pytest.mark.tools

IDS = torch.randint(3, 128, (2, 20), generator=torch.Generator().manual_seed(3))
HOLES = {  # of the second row
    "in the prompt": [range(5, 9)],
    "while decoding": [range(12, 15)],
    "both": [range(1, 3), range(13, 15)],
    "left and in the prompt": [range(0, 3), range(6, 8)],
    "right of the prompt": [range(8, 11)],
}
PROMPT = 11


@pytest.fixture(scope="module", params=["v3", "v2"])
def models(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    write_release(folder, SHAPES[request.param]())
    plain = getattr(transformers, f"Deepseek{request.param.upper()}ForCausalLM")
    config = plain.config_class.from_pretrained(folder)
    ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return ours.eval(), plain.from_pretrained(folder, config=config, dtype=torch.float32).eval()


def masked(holes):
    mask = torch.ones_like(IDS)
    for hole in holes:
        mask[1, list(hole)] = 0
    return mask, (mask.cumsum(-1) - 1).clamp(min=0)


@torch.no_grad()
def decode(model, mask, positions, cache, length=IDS.shape[1]):
    """Logits of a prompt's last token and of every later one."""
    parts = [slice(0, PROMPT), *(slice(i, i + 1) for i in range(PROMPT, length))]
    found = []
    for part in parts:
        settings = {"attention_mask": mask[:, : part.stop], "position_ids": positions[:, part], CACHE_NAME: cache}
        found.append(model(IDS[:, part], **settings).logits[:, -1])
    return torch.stack(found, dim=1)


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("holes", HOLES)
def test_what_is_not_masked_is_attended_to(models, holes, implementation, static):
    mask, positions = masked(HOLES[holes])
    found = []
    for model in models:
        model.set_attn_implementation(implementation)
        cache = StaticCache(model.config, max_cache_len=24) if static else DynamicCache(config=model.config)
        found.append(decode(model, mask, positions, cache))
        model.set_attn_implementation("sdpa")
    real = mask[:, PROMPT - 1 :].bool()
    torch.testing.assert_close(found[0][real], found[1][real], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("models", ["v3"], indirect=True)
@pytest.mark.slow
def test_in_a_graph_as_without(models):
    torch._dynamo.reset()
    model, length = models[0], PROMPT + 2
    mask, positions = masked(HOLES["in the prompt"])
    wanted = decode(model, mask, positions, DynamicCache(config=model.config), length)
    compiled = torch.compile(model.forward, backend="eager", dynamic=True)
    found = decode(compiled, mask, positions, StaticCache(model.config, max_cache_len=24), length)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


def test_generate_after_padding_on_the_right(models):
    mask = torch.ones_like(IDS)
    mask[1, -4:] = 0
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    ours, plain = (model.generate(IDS, attention_mask=mask, **settings) for model in models)
    assert torch.equal(ours, plain)


@torch.no_grad()
@pytest.mark.parametrize("hidden", [-1e9, -1e4, float("-inf")])
def test_floats_hide_keys_of_sparse_attention_however_they_say_so(tmp_path, hidden):
    write_family(tmp_path, "deepseek_v32")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = torch.randint(3, 128, (2, 30), generator=torch.Generator().manual_seed(0))
    causal = torch.ones(30, 30).triu(1).bool().expand(2, 1, -1, -1)
    mask = torch.zeros(2, 1, 30, 30).masked_fill(causal, hidden)
    assert (model(ids, attention_mask=mask).logits - model(ids).logits).abs().max() < 1e-4
    for other in (mask - 0.5, (~causal).long()):
        with pytest.raises(ValueError, match=r"attention_mask: found .* besides 0 .*has no bias for pairs of tokens"):
            model(ids, attention_mask=other)
