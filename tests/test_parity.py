"""Against plain transformers on the same weights: logits, gradients, greedy tokens; expanded and absorbed alike.

The built-in classes stay reachable by name. They never see this package's tensors: they load the folder that the
safetensors library wrote (bf16), or weights that `dequantize_independently` made from its FP8 codes.
"""

from functools import cache

import pytest
import torch
import transformers
from releases import SHAPES, dequantize_independently, write_release
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as plain_v2

import modeling_deepseek_moe as dsm
from modeling_deepseek_moe.compat import CACHE_NAME

FAMILIES = {"v3": "DeepseekV3", "moonlight": "DeepseekV3", "v2-lite": "DeepseekV2", "v2": "DeepseekV2"}
PATHS = ("expanded", "absorbed")
KINDS = tuple(FAMILIES)
SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Loaded once for all tests, which leave them as they are."""

    @cache
    def of(kind, dtype, *, seed=0, fp8=False):
        return load_pair(tmp_path_factory.mktemp(kind), kind, dtype, seed=seed, fp8=fp8)

    return of


def load_pair(folder, kind, dtype, *, seed=0, fp8=False):
    """This package's model and plain transformers' on the same random weights."""
    tensors = write_release(folder / "release", SHAPES[kind](), fp8=fp8, seed=seed, dtype=torch.float32)
    # the grouped kernels take no fp64
    settings = {"dtype": dtype, "experts_implementation": "eager" if dtype == torch.float64 else None}
    ours = AutoModelForCausalLM.from_pretrained(folder / "release", **settings)
    assert type(ours).__module__.startswith("modeling_deepseek_moe")
    if fp8:
        plain_tensors = {
            name: dequantize_independently(tensor, tensors[name + "_scale_inv"])
            if tensor.dtype == torch.float8_e4m3fn
            else tensor
            for name, tensor in tensors.items()
            if not name.endswith("_scale_inv")
        }
        (folder / "plain").mkdir()
        config = SHAPES[kind]()
        config.save_pretrained(folder / "plain")
        save_file(plain_tensors, folder / "plain" / "model.safetensors", metadata={"format": "pt"})
    plain_class = getattr(transformers, f"{FAMILIES[kind]}ForCausalLM")
    plain, info = plain_class.from_pretrained(
        folder / ("plain" if fp8 else "release"), output_loading_info=True, attn_implementation="sdpa", **settings
    )
    assert type(plain).__module__.startswith("transformers.")
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return ours, plain


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


def batch(length=33, rows=2, seed=0):
    return torch.randint(3, 128, (rows, length), generator=torch.Generator().manual_seed(seed))


def left_padded(ids, pads=(0, 7)):
    mask = torch.ones_like(ids)
    for row, count in enumerate(pads):
        mask[row, :count] = 0
    return ids.masked_fill(mask == 0, 0), mask


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("fp8", [False, True], ids=["float", "fp8"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_fp32(pairs, kind, fp8, seed):
    ours, plain = pairs(kind, torch.float32, seed=seed, fp8=fp8)
    ids, mask = left_padded(batch(seed=seed))
    with torch.no_grad():
        wanted = plain(ids, attention_mask=mask).logits[mask.bool()]
        for path in PATHS:
            found = ours(ids, attention_mask=mask, mla_path=path).logits[mask.bool()]
            assert relative(found, wanted) < 1e-4, path


def rotate_in_fp64(xq, xk, freqs_cis):
    """Plain V2's `apply_rotary_emb`, without its casts of the rotated halves to fp32 and back."""

    def rotate(x):
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * freqs_cis.unsqueeze(1)).flatten(3)

    return rotate(xq), rotate(xk)


def complex_tables(self, x, position_ids):
    angles = position_ids[..., None].float() * self.inv_freq
    return torch.complex(angles.cos(), angles.sin()) * self.attention_scaling


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_fp64(pairs, monkeypatch, kind, seed):
    if FAMILIES[kind] == "DeepseekV2":
        # plain V2 rotates in fp32 even in an fp64 model, by tables from torch.polar, whose last bit is not
        # torch.cos's; as it is, it can agree to 1e-6 with anything
        monkeypatch.setattr(plain_v2, "apply_rotary_emb", rotate_in_fp64)
        monkeypatch.setattr(plain_v2.DeepseekV2RotaryEmbedding, "forward", complex_tables)
    ours, plain = pairs(kind, torch.float64, seed=seed)
    ids, mask = left_padded(batch(seed=seed))
    with torch.no_grad():
        wanted = plain(ids, attention_mask=mask).logits[mask.bool()]
        for path in PATHS:
            found = ours(ids, attention_mask=mask, mla_path=path).logits[mask.bool()]
            assert relative(found, wanted) < 1e-10, path


@pytest.mark.parametrize("mla_path", PATHS)
@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients(pairs, kind, experts, mla_path):
    ours, plain = pairs(kind, torch.float32)
    before = ours.config._experts_implementation
    ours.set_experts_implementation(experts)
    ids, mask = left_padded(batch())
    # a padded position sees nothing, and what it predicts for the first token is no one's contract
    labels = ids.masked_fill(mask.cumsum(-1) <= 1, -100)
    found = ours(ids, attention_mask=mask, labels=labels, mla_path=mla_path)
    wanted = plain(ids, attention_mask=mask, labels=labels)
    assert relative(found.loss, wanted.loss) < 1e-6
    found.loss.backward()
    wanted.loss.backward()
    plain_grads = {name: parameter.grad for name, parameter in plain.named_parameters()}
    assert plain_grads.keys() == dict(ours.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        assert relative(parameter.grad, plain_grads[name]) < 1e-4, name
    ours.set_experts_implementation(before)
    ours.zero_grad(), plain.zero_grad()


IDS, MASK = left_padded(batch(12))
SETTINGS = {"attention_mask": MASK, "max_new_tokens": 32, "do_sample": False, "eos_token_id": None}


@pytest.fixture(scope="module", params=[(kind, fp8) for kind in KINDS for fp8 in (False, True)], ids=str)
def greedy(request, pairs):
    """This package's model, and what plain transformers says on the same weights."""
    kind, fp8 = request.param
    ours, plain = pairs(kind, torch.float32, fp8=fp8)
    return ours, plain.generate(IDS, **SETTINGS)


@pytest.mark.parametrize("mla_path", [*PATHS, None])
def test_greedy_tokens(greedy, mla_path):
    ours, wanted = greedy
    found = ours.generate(IDS, mla_path=mla_path, **SETTINGS)
    assert found.shape[1] == 44
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_beam_search(pairs, kind):
    ours, plain = pairs(kind, torch.float32)
    ids, mask = left_padded(batch(12))
    settings = {"attention_mask": mask, "max_new_tokens": 16, "num_beams": 4, "do_sample": False}
    assert torch.equal(ours.generate(ids, **settings), plain.generate(ids, **settings))


@pytest.mark.parametrize("chunks", [(20, 12, 1), (5, 28), (32, 1)], ids=str)
@pytest.mark.parametrize("mla_path", [*PATHS, None])
def test_chunked_prefill_equals_one_pass(pairs, mla_path, chunks):
    ours, plain = pairs("v3", torch.float64)
    ids, mask = left_padded(batch(33))
    cache, parts, start = transformers.DynamicCache(config=ours.config), [], 0
    with torch.no_grad():
        for chunk in chunks:
            rows = slice(start, start + chunk)
            positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, rows]
            parts.append(
                ours(
                    ids[:, rows],
                    attention_mask=mask[:, : rows.stop],
                    position_ids=positions,
                    **{CACHE_NAME: cache},
                    mla_path=mla_path,
                ).logits
            )
            start += chunk
    # plain transformers was given no positions; shift them by the padding, as generate does
    with torch.no_grad():
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        wanted = plain(ids, attention_mask=mask, position_ids=positions).logits
    found = torch.cat(parts, dim=1)
    # fp32 rotary tables of other lengths differ in the last bit of a few entries
    assert relative(found[mask[:, :start].bool()], wanted[:, :start][mask[:, :start].bool()]) < 1e-6


def test_builtin_classes_stay_as_they_are():
    for name in ("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"):
        assert getattr(transformers, name).__module__.startswith("transformers.")
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    assert AUTO_QUANTIZER_MAPPING["fp8"].__module__.startswith("transformers.")
    assert AutoModelForCausalLM.from_config(SHAPES["kimi"]()).__class__ is dsm.KimiK2ForCausalLM
