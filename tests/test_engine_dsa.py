"""Sparse attention's operators on the CPU engine: an indexer's choice and attention over it, by their definitions in fp64."""

import pytest
import torch
from engine_cases import distance, every_isa, exact, guarded, needs_engine, random_fp8
from torch import nn

from modeling_deepseek_moe import use_backend
from modeling_deepseek_moe.ops import four_bit, indexer
from modeling_deepseek_moe.ops import sparse_attention as attention
from modeling_deepseek_moe.ops._dispatch import BackendError
from modeling_deepseek_moe.ops.four_bit import cpu as four_bit_cpu

pytestmark = needs_engine

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
MASKS = ["causal", "keys", "dense", "added"]
# B, S, h, d, T, top-k
CHOICES = {
    "V3.2, one query": (1, 1, 64, 128, 5000, 2048),
    "GLM, few": (2, 3, 32, 128, 700, 256),
    "prompt": (1, 70, 16, 32, 70, 16),
    "prompt after another": (2, 9, 5, 24, 300, 7),
    "odd": (1, 5, 3, 33, 71, 70),
    "more top-k than keys": (2, 4, 4, 16, 30, 2048),
    "many heads": (1, 3, 300, 8, 90, 11),
    "one of everything": (1, 1, 1, 1, 1, 1),
}


def whole_numbers(*shape, generator) -> torch.Tensor:
    """Whose products and sums are exact in any order, and often equal."""
    return torch.randint(-2, 3, shape, generator=generator).float()


def choice(shape, dtype, mask, seed=0, numbers=None) -> dict:
    batch, tokens, heads, width, length, topk = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size, generator):
        return torch.randn(size, generator=generator)

    make = numbers or normal
    allowed = torch.rand(batch, 1, tokens, length, generator=generator) < 0.6
    if mask == "keys":
        allowed = torch.arange(length).expand(batch, 1, 1, -1) >= torch.tensor([0, length // 2])[:batch].view(
            -1, 1, 1, 1
        )
    added = make(batch, 1, tokens, length, generator=generator).masked_fill(~allowed, torch.finfo(torch.float32).min)
    return {
        # heads before tokens, and room after the last key, as projections and static caches have them
        "queries": make(batch, heads, tokens, width, generator=generator).to(dtype).transpose(1, 2),
        "weights": make(batch, tokens, heads, generator=generator),
        "keys": make(batch, length + 3, width, generator=generator).to(dtype)[:, :length],
        "mask": {"causal": None, "added": added}.get(mask, allowed),
        "topk": topk,
    }


def defined(given) -> torch.Tensor:
    """Scores ``[B, S, T]`` in fp64, -inf where a key may not be seen."""
    queries, weights, keys = (given[name].double() for name in ("queries", "weights", "keys"))
    tokens, length, mask = queries.shape[1], keys.shape[1], given["mask"]
    scores = (torch.einsum("bshd,btd->bsht", queries, keys).relu() * weights[..., None]).sum(2)
    if mask is None or mask.shape[2] < tokens:
        scores = scores.masked_fill(~torch.ones(tokens, length, dtype=torch.bool).tril(length - tokens), -torch.inf)
    if mask is not None and mask.dtype == torch.bool:
        return scores.masked_fill(~mask[:, 0], -torch.inf)
    return scores if mask is None else (scores + mask[:, 0].double()).masked_fill(mask[:, 0] < -1e38, -torch.inf)


def best_of(scores, topk) -> torch.Tensor:
    """The keys of the greatest scores in their order, of equal ones the first, then -1."""
    length = scores.shape[-1]
    order = scores.sort(dim=-1, descending=True, stable=True)
    keys = order.indices.masked_fill(order.values == -torch.inf, length)[..., : min(topk, length)].sort(-1).values
    return keys.masked_fill(keys == length, -1)


@every_isa
@DTYPES
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", CHOICES.values(), ids=CHOICES)
def test_choice_to_the_last_tie(isa, shape, dtype, mask):
    """Of scores that are exact on every instruction set."""
    given = choice(shape, dtype, mask, numbers=whole_numbers)
    with use_backend(isa):
        found = indexer.cpu.select(*given.values())
    assert found.dtype == torch.int32 and torch.equal(found.long(), best_of(defined(given), given["topk"]))


@every_isa
@DTYPES
@pytest.mark.parametrize("mask", MASKS)
def test_choice_but_for_rounding(isa, dtype, mask):
    """No key that was chosen has a lower score than one that was not, but by what sums in fp32 are off."""
    for name in ("V3.2, one query", "GLM, few", "prompt"):
        given = choice(CHOICES[name], dtype, mask)
        with use_backend(isa):
            found = indexer.cpu.select(*given.values()).long()
        scores = defined(given)
        assert torch.equal((found >= 0).sum(-1), (scores > -torch.inf).sum(-1).clamp(max=given["topk"]))
        assert (found.diff(dim=-1) > 0)[found[..., 1:] >= 0].all()
        is_chosen = torch.zeros(*scores.shape[:2], scores.shape[2] + 1, dtype=torch.bool)
        is_chosen = is_chosen.scatter(-1, found % (scores.shape[2] + 1), True)[..., :-1]
        least = scores.masked_fill(~is_chosen, torch.inf).amin(-1)
        assert (
            least >= scores.masked_fill(is_chosen, -torch.inf).amax(-1) - 1e-5 * scores[scores > -torch.inf].std()
        ).all()


@every_isa
def test_scores_that_rise_fall_and_repeat(isa):
    """More candidates than are kept at a time, and none after the first."""
    for keys in (torch.arange(9000.0), -torch.arange(9000.0), torch.ones(9000), torch.arange(9000.0) % 7):
        given = torch.ones(1, 2, 1, 1), torch.ones(1, 2, 1), keys.view(1, -1, 1) + 9000
        with use_backend(isa):
            found = indexer.cpu.select(*given, None, 300)
        scores = (
            (keys + 9000).expand(1, 2, -1).masked_fill(~torch.ones(2, 9000, dtype=torch.bool).tril(8998), -torch.inf)
        )
        assert torch.equal(found.long(), best_of(scores, 300))


@every_isa
@pytest.mark.parametrize("mask", ["causal", "dense"])
@pytest.mark.parametrize("shape", [CHOICES["V3.2, one query"], (2, 90, 8, 64, 4000, 50)], ids=["one", "many"])
def test_choice_does_not_depend_on_threads(isa, shape, mask):
    given, before, found = choice(shape, torch.bfloat16, mask), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 16):
            torch.set_num_threads(threads)
            with use_backend(isa):
                found.append(indexer.cpu.select(*given.values()))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(other, found[0]) for other in found[1:])


@every_isa
def test_choice_keeps_within_its_memory(isa):
    for shape, mask in ((CHOICES["odd"], "dense"), (CHOICES["prompt"], "added"), (CHOICES["GLM, few"], "keys")):
        given = choice(shape, torch.bfloat16, mask)
        with use_backend(isa):
            wanted = indexer.cpu.select(*given.values())
            for at_end in (True, False):
                kept = {name: guarded(value.contiguous(), at_end) for name, value in given.items() if name != "topk"}
                assert torch.equal(indexer.cpu.select(*kept.values(), given["topk"]), wanted)


def test_numbers_that_are_none_are_not_chosen():
    given = choice((1, 1, 2, 8, 40, 5), torch.float32, "causal")
    given["keys"][0, 3] = torch.nan
    for backend in ("cpu", "reference"):
        with use_backend(backend):
            assert 3 not in indexer.select(given["queries"], given["weights"], given["keys"], 5)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("weights", lambda t: t[:, :-1], "weights is"),
        ("keys", lambda t: t[..., :-1], "keys is"),
        ("keys", lambda t: t[:, :0], "wanted 1 at least"),
        ("keys", lambda t: t[:, :2], "wanted as many as queries"),
        ("keys", lambda t: t.bfloat16(), "wanted one dtype"),
        ("mask", lambda _: torch.ones(1, 1, 1, 5, dtype=torch.bool), "mask is"),
        ("mask", lambda _: torch.ones(1, 1, 2, 300, dtype=torch.bool), "mask is"),
        ("topk", lambda _: 0, "wanted 1 at least"),
    ],
)
def test_a_choice_of_shapes_that_do_not_fit_is_refused(name, change, words):
    given = choice(CHOICES["prompt after another"], torch.float32, "causal")
    with pytest.raises(ValueError, match=words):
        indexer.cpu.select(*(given | {name: change(given[name])}).values())


# B, H, n, p, r, v, T, S, k
SHAPES = {
    "V3.2's widths": (1, 9, 128, 64, 512, 128, 400, 1, 300),
    "GLM's widths": (2, 6, 192, 64, 512, 256, 150, 3, 100),
    "V3.2's heads": (1, 128, 24, 8, 72, 16, 300, 2, 140),
    "prompt": (1, 4, 32, 16, 128, 32, 90, 70, 40),
    "ragged": (2, 3, 40, 8, 72, 24, 129, 5, 129),
    "odd": (3, 5, 17, 6, 33, 7, 71, 37, 9),
    "one key": (1, 2, 16, 8, 64, 16, 5, 2, 1),
}


def attended(shape, dtype=torch.bfloat16, fp8=True, seed=0) -> dict:
    batch, heads, nope, rope, rank, value, length, tokens, count = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=generator).to(dtype)

    rows = heads * (nope + value)
    weight, scale_inv = random_fp8((rows, rank), seed)
    if fp8:
        scale_inv = scale_inv / rank**0.5
    else:
        weight, scale_inv = (torch.randn(rows, rank, generator=generator) * rank**-0.5).bfloat16(), None
    query = normal(batch, tokens, heads, nope + rope).transpose(1, 2)
    order = torch.rand(batch, tokens, length, generator=generator).argsort(-1)[..., :count].sort(-1).values.int()
    seen = torch.randint(count + 1, (batch, tokens, 1), generator=generator)  # some see few keys, and some none
    seen[:, -1] = count
    return {
        "q_nope": query[..., :nope],
        "q_pe": query[..., nope:].clone(),
        "c_kv": normal(batch, 1, length + 3, rank)[:, :, :length],
        "k_pe": normal(batch, 1, length, rope),
        "indices": order.masked_fill(torch.arange(count) >= seen, -1),
        "weight": weight,
        "scale_inv": scale_inv,
        "scaling": (nope + rope) ** -0.5,
    }


def attention_of(given, dtype) -> torch.Tensor:
    """The definition on the same values, in ``dtype``."""
    nope = given["q_nope"].shape[3]
    up = exact(given["weight"], given["scale_inv"]).to(dtype)
    up = up.view(given["q_nope"].shape[1], -1, up.shape[1])
    tensors = [given[name].to(dtype) for name in ("q_nope", "q_pe", "c_kv", "k_pe")]
    return attention.reference.sparse_attention(
        *tensors, given["indices"], up[:, :nope], up[:, nope:], given["scaling"]
    )


@every_isa
@DTYPES
@pytest.mark.parametrize("fp8", [True, False], ids=["fp8", "bf16"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_as_near_to_fp64_as_torch(isa, shape, dtype, fp8):
    given = attended(shape, dtype, fp8)
    wanted = attention_of(given, torch.float64)
    with use_backend(isa):
        found = attention.cpu.attend(*given.values())
    torchs = distance(attention_of(given, dtype), wanted)
    assert found.shape == wanted.shape and found.dtype == dtype
    assert distance(found, wanted) <= (1.01 * torchs if dtype == torch.bfloat16 else max(2e-6, 2 * torchs))
    assert not found[(given["indices"] < 0).all(-1)].any()


@every_isa
@pytest.mark.parametrize("kind", ["int4", "nf4"])
def test_four_bits(isa, kind):
    given = attended((2, 4, 32, 16, 128, 32, 90, 3, 40), torch.float32, fp8=False)
    block = 1, four_bit.KINDS[kind].group
    codes, scales = four_bit.encode(given["weight"].float(), block, kind=kind)
    given["weight"] = four_bit.decode(codes, scales, torch.float32, block, kind=kind)
    tensors = [given[name] for name in ("q_nope", "q_pe", "c_kv", "k_pe", "indices")]
    with use_backend(isa):
        found = attention.cpu.attend_four_bit(*tensors, codes, four_bit_cpu.parts_of(scales), kind, given["scaling"])
    assert distance(found, attention_of(given, torch.float64)) < 2e-6


@every_isa
@pytest.mark.parametrize(
    "shape", [SHAPES["prompt"], SHAPES["odd"], SHAPES["V3.2's heads"]], ids=["prompt", "odd", "heads"]
)
def test_bits_do_not_depend_on_threads_or_batch(isa, shape):
    given, before, found = attended(shape), torch.get_num_threads(), []
    try:
        with use_backend(isa):
            for threads in (1, 2, 3, 16):
                torch.set_num_threads(threads)
                found.append(attention.cpu.attend(*given.values()))
            alone = {name: given[name][-1:] for name in ("q_nope", "q_pe", "c_kv", "k_pe", "indices")}
            last = attention.cpu.attend(*(given | alone).values())
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(other, found[0]) for other in found[1:])
    assert distance(last, found[0][-1:]) < 1e-2


@every_isa
def test_attention_keeps_within_its_memory(isa):
    for shape in (SHAPES["odd"], SHAPES["ragged"]):
        given = attended(shape)
        with use_backend(isa):
            wanted = attention.cpu.attend(*given.values())
            for at_end in (True, False):
                kept = [
                    guarded(value.contiguous(), at_end) if isinstance(value, torch.Tensor) else value
                    for value in given.values()
                ]
                assert torch.equal(attention.cpu.attend(*kept), wanted)


@pytest.mark.parametrize(
    ("name", "change", "error", "words"),
    [
        ("q_pe", lambda t: t[..., :-1], ValueError, "q_pe is"),
        ("k_pe", lambda t: t[:, :, :-1], ValueError, "k_pe is"),
        ("c_kv", lambda t: t[..., :-1], ValueError, "weight is"),
        ("indices", lambda t: t[:, :-1], ValueError, "indices is"),
        ("indices", lambda t: t[..., :0], ValueError, "indices is"),
        ("indices", lambda t: t.long(), ValueError, "wanted int32"),
        ("indices", lambda t: t.masked_fill(t == t[0, -1, -1], 90), IndexError, "out of range"),
        ("indices", lambda t: t.clone().index_fill_(2, torch.tensor([1]), -1), IndexError, "out of range"),
        ("weight", lambda t: t[:-1], ValueError, "scales|weight is"),
        ("scale_inv", lambda t: t[:, :0], ValueError, "found scales"),
        ("scale_inv", lambda _: None, ValueError, "scales: False"),
        ("q_nope", lambda t: t.half(), ValueError, "wanted one dtype of"),
    ],
)
def test_attention_of_what_does_not_fit_is_refused(name, change, error, words):
    given = attended(SHAPES["prompt"])
    with pytest.raises(error, match=words):
        attention.cpu.attend(*(given | {name: change(given[name])}).values())


def test_the_backend_is_chosen_by_what_it_can(monkeypatch):
    """And agrees with the reference, through the layer."""
    given = attended(SHAPES["prompt"], fp8=False)
    layer = nn.Linear(128, 4 * 64, bias=False, dtype=torch.bfloat16)
    layer.weight.data = given["weight"]
    tensors = [given[name] for name in ("q_nope", "q_pe", "c_kv", "k_pe", "indices")]
    with torch.no_grad():
        found = attention.sparse_attention(*tensors, layer, given["scaling"])
        assert torch.equal(found, attention.cpu.attend(*given.values()))
        with use_backend("reference"):
            assert distance(attention.sparse_attention(*tensors, layer, given["scaling"]), found) < 1e-2
    grown = attention.sparse_attention(*tensors, layer, given["scaling"])
    assert grown.requires_grad and distance(grown.detach(), found) < 1e-2
    with monkeypatch.context() as patched, use_backend("cpu"):
        patched.setattr("modeling_deepseek_moe.ops._native._load", lambda: (None, "was taken away"))
        with pytest.raises(BackendError, match="was taken away"):
            indexer.select(*list(choice(CHOICES["odd"], torch.float32, "causal").values())[:3], 4)


REASONS = {
    "one dtype": lambda t: {"q_nope": t["q_nope"].float()},
    "four-bit weights": lambda t: {"weight": t["weight"].view(torch.uint8)},
    "CPU tensors": lambda t: {"q_nope": t["q_nope"].to("meta")},
    "gradients": lambda t: {"q_pe": t["q_pe"].clone().requires_grad_()},
}


@pytest.mark.parametrize("words", REASONS)
def test_reasons_against_attention(words):
    given = attended(SHAPES["prompt"])
    tensors = ("q_nope", "q_pe", "c_kv", "k_pe", "weight")
    assert attention.cpu.unsupported_reason(*(given[name] for name in tensors)) is None
    given |= REASONS[words](given)
    assert words in attention.cpu.unsupported_reason(*(given[name] for name in tensors))


def test_reasons_against_a_choice():
    queries, weights, keys, _, _ = choice(CHOICES["odd"], torch.float32, "causal").values()
    reason = indexer.cpu.unsupported_reason
    assert reason(queries, weights, keys, None) is None
    assert "one dtype" in reason(queries, weights, keys.bfloat16(), None)
    assert "CPU tensors" in reason(queries.to("meta"), weights, keys, None)
    assert "floating point" in reason(queries, weights.int(), keys, None)
    assert "one mask" in reason(queries, weights, keys, torch.ones(1, 2, 5, 71, dtype=torch.bool))
