"""Sparse attention under torch.compile: one graph with a static cache, with and without room beyond ``index_topk``, as eager code."""

import pytest
import torch
from families import CLASSES, FIELDS, INDEXER
from transformers import AutoModelForCausalLM, StaticCache

from modeling_deepseek_moe.compat import CACHE_NAME

pytestmark = pytest.mark.slow

TOPK = INDEXER["index_topk"]
# layers without experts, of which graphs take longest to make
DENSE = {
    "deepseek_v32": {"first_k_dense_replace": 2},
    "glm_moe_dsa": {"mlp_layer_types": ["dense"] * 2, "indexer_types": ["full", "shared"]},
}
LAYERS = {"num_hidden_layers": 2, "num_nextn_predict_layers": 0, "initializer_range": 0.2}
CASES = [
    pytest.param("deepseek_v32", TOPK - 1, id="deepseek_v32-dense", marks=pytest.mark.long),
    pytest.param("deepseek_v32", TOPK + 4, id="deepseek_v32-sparse"),
    pytest.param("glm_moe_dsa", TOPK + 4, id="glm_moe_dsa-sparse"),
]
PADDED = 2  # tokens on the left of the second row


@pytest.fixture(autouse=True)
def _forget_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(("kind", "room"), CASES)
@torch.no_grad()
def test_a_static_cache_in_one_graph(kind, room):
    """A prompt, and steps from below ``index_topk`` keys to all that there is room for; one row is padded.

    Of a padded token nothing is compared: it sees no key, and what comes of that depends on how many there might be.
    """
    torch.manual_seed(0)
    config = CLASSES[kind].from_dict(FIELDS[kind] | DENSE[kind] | LAYERS)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    ids, first = torch.randint(3, 128, (2, room)), TOPK - 3
    padding = torch.ones(2, room, dtype=torch.long)
    padding[1, :PADDED] = 0
    positions = (padding.cumsum(-1) - 1).clamp(min=0)

    def logits(call):
        cache = StaticCache(config=config, max_cache_len=room)
        found = []
        for start, stop in ((0, first), *((place, place + 1) for place in range(first, room))):
            given = {"attention_mask": padding, "position_ids": positions[:, start:stop], CACHE_NAME: cache}
            found.append(call(ids[:, start:stop], **given).logits)
        return torch.cat(found, dim=1)[padding == 1]

    wanted = logits(model)
    found = logits(torch.compile(model, fullgraph=True, backend="aot_eager"))
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()
