"""Absorbed attention of one new token, and of a few, on the CPU engine: the definition in fp64, masks, strides, threads, reasons."""

import pytest
import torch
from engine_cases import distance, every_isa, exact, needs_engine, random_fp8

from modeling_deepseek_moe import use_backend
from modeling_deepseek_moe.ops.absorbed_attention import cpu, reference

pytestmark = needs_engine

# B, H, n, p, r, v, kv
SHAPES = {
    "V2-Lite": (1, 16, 128, 64, 512, 128, 300),
    "V3": (1, 128, 128, 64, 512, 128, 150),
    "batch": (3, 16, 128, 64, 512, 128, 65),
    "first token": (2, 16, 128, 64, 512, 128, 1),
    "ragged": (2, 3, 40, 8, 72, 24, 129),
    "odd": (1, 5, 17, 6, 33, 7, 71),
    "long": (1, 4, 32, 16, 96, 32, 5000),
}


def case(shape, dtype=torch.bfloat16, fp8=True, mask=None, seed=0, tokens=1) -> dict:
    batch, heads, nope, rope, rank, value, length = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=generator).to(dtype)

    rows = heads * (nope + value)
    if fp8:
        weight, scale_inv = random_fp8((rows, rank), seed)
        scale_inv = scale_inv / rank**0.5
    else:
        weight, scale_inv = (torch.randn(rows, rank, generator=generator) * rank**-0.5).bfloat16(), None
    query = normal(batch, tokens, heads, nope + rope).transpose(1, 2)
    if mask is not None:
        allowed = torch.rand(batch, 1, tokens, length, generator=generator) > 0.3
        allowed[..., -1] = True
        if mask == "left padding":
            allowed[:] = torch.arange(length) >= min(length - 1, 100)
        mask = (
            allowed
            if mask == "boolean"
            else normal(batch, 1, tokens, length).masked_fill(
                ~allowed, torch.finfo(dtype).min if mask == "added" else -torch.inf
            )
        )
    return {
        "q_nope": query[..., :nope],
        "q_pe": query[..., nope:].clone(),
        "c_kv": normal(batch, 1, length + 3, rank)[:, :, :length],  # as a static cache hands it out
        "k_pe": normal(batch, 1, length, rope),
        "mask": mask,
        "weight": weight,
        "scale_inv": scale_inv,
        "scaling": (nope + rope) ** -0.5,
    }


def defined(given: dict, dtype) -> torch.Tensor:
    """The definition on the same values, in ``dtype``."""
    nope = given["q_nope"].shape[3]
    up = exact(given["weight"], given["scale_inv"]).to(dtype)
    up = up.view(given["q_nope"].shape[1], -1, up.shape[1])
    mask = given["mask"]
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(dtype)
    tensors = [given[name].to(dtype) for name in ("q_nope", "q_pe", "c_kv", "k_pe")]
    return reference.absorbed_attention(*tensors, mask, up[:, :nope], up[:, nope:], given["scaling"])[0]


# The definition takes longer than the engine, and is one for all instruction sets.
ONE_TOKEN = {
    f"{name}-{'bf16' if dtype == torch.bfloat16 else 'fp32'}-cache-{'fp8' if fp8 else 'bf16'}": (shape, dtype, fp8)
    for name, shape in SHAPES.items()
    for dtype in (torch.bfloat16, torch.float32)
    for fp8 in (True, False)
}
FEW_TOKENS = {
    f"{name}-{tokens}-{mask}": (SHAPES[name], tokens, mask)
    for name in ("V3", "ragged", "odd", "long")
    for tokens in (2, 5, 8)
    for mask in (None, "boolean")
}


@pytest.fixture(scope="module", params=ONE_TOKEN.values(), ids=ONE_TOKEN)
def one_token(request):
    shape, dtype, fp8 = request.param
    given = case(shape, dtype, fp8)
    wanted = defined(given, torch.float64)
    return given, wanted, distance(defined(given, dtype), wanted)


@pytest.fixture(scope="module", params=FEW_TOKENS.values(), ids=FEW_TOKENS)
def few_tokens(request):
    shape, tokens, mask = request.param
    given = case(shape, torch.float32, mask=mask, tokens=tokens)
    return given, defined(given, torch.float64)


@every_isa
def test_as_near_to_fp64_as_torch(isa, one_token):
    given, wanted, torchs = one_token
    dtype = given["c_kv"].dtype
    with use_backend(isa):
        found = cpu.decode(**given)
    assert found.shape == wanted.shape and found.dtype == dtype
    assert distance(found, wanted) <= (1.01 * torchs if dtype == torch.bfloat16 else max(2e-6, 2 * torchs))


@every_isa
@pytest.mark.parametrize("mask", ["boolean", "added", "infinite", "left padding"])
def test_masks(isa, mask):
    given = case((3, 16, 32, 16, 128, 32, 300), torch.float32, mask=mask)
    with use_backend(isa):
        found = cpu.decode(**given)
    assert distance(found, defined(given, torch.float64)) < 2e-6


@every_isa
def test_a_few_tokens_at_once(isa, few_tokens):
    given, wanted = few_tokens
    with use_backend(isa):
        found = cpu.decode(**given)
    assert found.shape[1] == given["q_nope"].shape[2] > 1 and distance(found, wanted) < 2e-6


@every_isa
def test_a_token_does_not_see_those_after_it(isa):
    given = case(SHAPES["batch"], tokens=4)
    with use_backend(isa):
        before = cpu.decode(**given)
        given["c_kv"][:, :, -2:] = 1e3
        found = cpu.decode(**given)
    assert torch.equal(found[:, :2], before[:, :2]) and not torch.equal(found[:, 2], before[:, 2])


@every_isa
def test_what_is_masked_does_not_count(isa):
    given = case((1, 4, 32, 16, 128, 32, 200), mask="boolean")
    hidden = ~given["mask"][0, 0, 0]
    with use_backend(isa):
        before = cpu.decode(**given)
        given["c_kv"] = torch.where(hidden[:, None], 1e3, given["c_kv"].float()).bfloat16()
        given["k_pe"] = torch.where(hidden[:, None], 1e3, given["k_pe"].float()).bfloat16()
        assert torch.equal(cpu.decode(**given), before)


@every_isa
def test_one_mask_for_all_sequences(isa):
    given = case((3, 4, 32, 16, 128, 32, 90), torch.float32)
    mask = torch.rand(1, 1, 1, 90) > 0.5
    with use_backend(isa):
        shared = cpu.decode(**given | {"mask": mask})
        assert torch.equal(shared, cpu.decode(**given | {"mask": mask.expand(3, -1, -1, -1)}))


@every_isa
@pytest.mark.parametrize("shape", [SHAPES["batch"], SHAPES["long"], SHAPES["V3"]], ids=["batch", "long", "V3"])
def test_bits_do_not_depend_on_threads_or_batch(isa, shape):
    given, before = case(shape), torch.get_num_threads()
    found = []
    try:
        with use_backend(isa):
            for threads in (1, 2, 3, 16):
                torch.set_num_threads(threads)
                found.append(cpu.decode(**given))
            alone = {name: given[name][-1:] for name in ("q_nope", "q_pe", "c_kv", "k_pe")}
            last = cpu.decode(**given | alone)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(other, found[0]) for other in found[1:])
    assert torch.equal(last, found[0][-1:])


@every_isa
def test_nan_codes_reach_the_output(isa):
    given = case((1, 4, 128, 16, 128, 128, 20))
    given["weight"].view(torch.uint8)[256 + 3, 5] = 0x7F  # of head 1: W_UK
    given["weight"].view(torch.uint8)[512 + 128 + 9, 5] = 0xFF  # of head 2: the tenth row of W_UV
    with use_backend(isa):
        nan = cpu.decode(**given).isnan()[0, 0]
    assert nan[1].all() and nan[2].nonzero().flatten().tolist() == [9]
    assert not nan[0].any() and not nan[3].any()


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("q_pe", lambda t: t[..., :-1], "q_pe is"),
        ("k_pe", lambda t: t[:, :, :-1], "k_pe is"),
        ("c_kv", lambda t: t[..., :-1], "weight is"),
        ("weight", lambda t: t[:-1], "weight is"),
        ("scale_inv", lambda t: t[:-1], "found scales"),
        ("scale_inv", lambda t: None, "scales: False"),
        ("mask", lambda t: torch.ones(1, 1, 1, 5, dtype=torch.bool), "covers 5 tokens"),
        ("q_nope", lambda t: t.half(), "one dtype|queries"),
    ],
)
def test_what_does_not_fit_is_refused(name, change, words):
    given = case((1, 4, 128, 16, 128, 128, 20))
    with pytest.raises(ValueError, match=words):
        cpu.decode(**given | {name: change(given[name])})
