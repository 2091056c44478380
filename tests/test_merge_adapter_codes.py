"""``convert merge-adapter`` into quantised checkpoints, and what it refuses: blocks that do not change keep their bytes."""

import json
import re
import shutil

import pytest
import torch
from adapters import EXPERTS, MLP, adapted, expert_adapter, load, logits, plain
from releases import SHAPES, dequantize_independently, quantize_independently, same_bits, write_release
from safetensors.torch import load_file, save_file
from test_conversion_parts import lora, pair, refused
from test_conversion_roundtrip import CONFIG, ok, read
from test_int4_release import unpack, write_int4
from transformers import FineGrainedFP8Config

from modeling_deepseek_moe.conversion import _job

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.tools

WIDE = {"quantization_config": FineGrainedFP8Config(dequantize=True)}
O_PROJ = "model.layers.1.self_attn.o_proj.weight"


@pytest.fixture(scope="module", params=["fp8", "fp8_ue8m0"])
def release(request, tmp_path_factory):
    """Its codes and scales are the quantiser's own."""
    parent = tmp_path_factory.mktemp(request.param)
    write_release(parent / "fp32", CONFIG, dtype=torch.float32)
    ok("bf16-to-fp8", parent / "fp32", parent / "fp8", "--format", request.param)
    return parent / "fp8"


def deltas(adapter, scaling=4.0, config=CONFIG):
    """``ΔW`` by name, of the attention and of stacked experts, in fp64."""
    found = {}
    for key, a in adapter.items():
        if ".lora_A." not in key:
            continue
        module, b = (
            key.removeprefix("base_model.model.").partition(".lora_A.")[0],
            adapter[key.replace("_A.", "_B.")].double(),
        )
        a = a.double()
        if ".experts" not in module:
            found[f"{module}.weight"] = scaling * b @ a
            continue
        stack = module.replace(".base_layer", "")
        for expert in range(config.n_routed_experts):
            own_a = a.view(config.n_routed_experts, -1, a.shape[1])[expert]
            delta = scaling * b.view(len(b), -1, config.n_routed_experts)[:, :, expert] @ own_a
            parts = {"gate_proj": delta.chunk(2)[0], "up_proj": delta.chunk(2)[1]}
            if delta.shape[1] != config.hidden_size or len(delta) != 2 * config.moe_intermediate_size:
                parts = {"down_proj": delta}
            found |= {f"{stack}.{expert}.{projection}.weight": part for projection, part in parts.items()}
    return found


def test_touched_blocks_alone_are_requantised(release, tmp_path):
    model = adapted(load(release, **WIDE), target_modules=["o_proj", "kv_b_proj"], target_parameters=EXPERTS)
    for name, parameter in model.named_parameters():
        if ".self_attn.kv_b_proj.lora_B" in name:
            parameter.data[:256] = 0  # two rows of blocks
        if ".1.mlp.experts" in name and "lora_B" in name:
            parameter.data.view(len(parameter), -1, CONFIG.n_routed_experts)[:, :, 2:] = 0
    wanted_logits = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    printed = ok("merge-adapter", release, tmp_path / "merged", "--adapter", tmp_path / "adapter", "--workers", 2)
    before, found = read(release), read(tmp_path / "merged")
    changes = deltas(load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    assert before.keys() == found.keys()
    square_error = square_weights = changed_blocks = 0.0
    for name in [name for name in before if not name.endswith("_scale_inv")]:
        scale = name + "_scale_inv"
        if name not in changes or not changes[name].any():
            assert same_bits(found[name], before[name])
            assert scale not in before or same_bits(found[scale], before[scale])
            continue
        old = dequantize_independently(before[name], before[scale])
        wanted, got = old + changes[name], dequantize_independently(found[name], found[scale])
        for i in range(found[scale].shape[0]):
            for j in range(found[scale].shape[1]):
                block = slice(128 * i, 128 * (i + 1)), slice(128 * j, 128 * (j + 1))
                if not changes[name][block].any():
                    assert same_bits(found[name][block].contiguous(), before[name][block].contiguous())
                    assert found[scale][i, j] == before[scale][i, j]
                    continue
                fresh = dequantize_independently(*quantize_independently(wanted[block].float()))
                slack = 1.01 if "ue8m0" not in str(release) else 1.2  # scales are not the amax's
                assert (got[block] - wanted[block]).norm() <= slack * (fresh - wanted[block]).norm()
                if ".self_attn." in name and ".layers.2." not in name:  # which is the MTP module's
                    changed_blocks += 1
                    square_error += (got[block] - wanted[block]).square().sum()
                    square_weights += wanted[block].square().sum()
    line = re.search(
        r"attention: tensors changed 4, blocks (\d+) of (\d+); rounding took ([\d.e-]+) of the weights", printed
    )
    assert line and int(line[1]) == changed_blocks < int(line[2])
    assert float(line[3]) == pytest.approx((square_error / square_weights).sqrt().item(), rel=0.05)
    assert 0.015 < float(line[3]) < 0.04
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config == json.loads((release / "config.json").read_text())
    merged, base = (logits(load(folder, **WIDE)) for folder in (tmp_path / "merged", release))
    moved, apart = (base - wanted_logits).norm(), (merged - wanted_logits).norm()
    assert apart < 0.2 * moved
    on_codes = logits(load(tmp_path / "merged", dtype=torch.float32))
    torch.testing.assert_close(on_codes, merged, rtol=1e-3, atol=1e-3)


def test_dora_and_whole_modules_into_codes(release, tmp_path):
    model = adapted(
        load(release, **WIDE), target_modules=["q_b_proj"], use_dora=True, modules_to_save=["o_proj", "lm_head"]
    )
    whole = {
        name: p
        for name, p in model.named_parameters()
        if "modules_to_save" in name and "layers.1.self_attn.o_proj" in name
    }
    (parameter,) = whole.values()
    parameter.data[:, 130] += 0.3  # one block of columns
    wanted = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    ok("merge-adapter", release, tmp_path / "merged", "--adapter", tmp_path / "adapter")
    before, found = read(release), read(tmp_path / "merged")
    changed = {name for name in before if not same_bits(before[name], found[name])}
    assert O_PROJ in changed
    assert {name for name in changed if "q_b_proj" not in name} <= {O_PROJ, O_PROJ + "_scale_inv"}
    own = slice(128, 256)
    assert not torch.equal(found[O_PROJ][:, own].float(), before[O_PROJ][:, own].float())
    assert torch.equal(found[O_PROJ][:, 256:].float(), before[O_PROJ][:, 256:].float())
    base, merged = (logits(load(folder, **WIDE)) for folder in (release, tmp_path / "merged"))
    assert (merged - wanted).norm() < 0.2 * (base - wanted).norm()


def test_entries_of_some_experts_leave_the_others(release, tmp_path):
    expert_adapter(tmp_path / "adapter", load(release, **WIDE), MLP)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({key: tensor for key, tensor in load_file(file).items() if ".experts.3.up_proj" in key}, file)
    ok("merge-adapter", release, tmp_path / "merged", "--adapter", tmp_path / "adapter")
    before, found = read(release), read(tmp_path / "merged")
    changed = {name.removesuffix("_scale_inv") for name in before if not same_bits(before[name], found[name])}
    assert changed and all(".experts.3.up_proj" in name for name in changed)


def test_nothing_changes_where_nothing_was_learnt(release, tmp_path):
    """A fresh adapter has B = 0."""
    model = adapted(
        load(release, **WIDE), target_modules=["o_proj"], target_parameters=EXPERTS, init_lora_weights=True
    )
    model.save_pretrained(tmp_path / "adapter")
    printed = ok("merge-adapter", release, tmp_path / "merged", "--adapter", tmp_path / "adapter")
    assert "identical" in ok("diff", release, tmp_path / "merged")
    assert "changed" not in printed and f"as they were: tensors {len(read(release))}" in printed


def test_what_rounding_took_whole_is_said(release, tmp_path):
    model = adapted(load(release, **WIDE), target_modules=["o_proj"], init_lora_weights=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(1e-7)
    model.save_pretrained(tmp_path / "adapter")
    printed = ok("merge-adapter", release, tmp_path / "merged", "--adapter", tmp_path / "adapter")
    assert re.search(r"attention: tensors changed 0 of \d+, .*, 1 of the change: most of it", printed)
    assert f"as they were: tensors {len(read(release))}" in printed


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "v3"
    write_release(folder, SHAPES["v3"]())
    return folder


def adapter_of(base, folder, **kind):
    adapted(plain(base), **({"target_modules": ["o_proj"]} | kind)).save_pretrained(folder)
    return folder


def edit(folder, change=lambda tensors: tensors, **fields):
    file, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    save_file(change(load_file(file)), file)
    config.write_text(json.dumps(json.loads(config.read_text()) | fields))


def renamed(old, new):
    return lambda tensors: {key.replace(old, new): tensor for key, tensor in tensors.items()}


LORA_A = "base_model.model.model.layers.1.self_attn.o_proj.lora_A.weight"
CASES = {
    "another prefix": ({}, renamed("base_model.model.", "transformer."), {}, "wanted base_model.model"),
    "another module": ({}, renamed("o_proj", "out_proj"), {}, "found no model.layers.0.self_attn.out_proj.weight"),
    "another tensor": ({}, lambda t: t | {"base_model.model.model.norm.scale": torch.ones(64)}, {}, "found no model.norm.scale"),
    "half a pair": ({}, lambda t: {LORA_A: t[LORA_A]}, {}, "found one of lora_A and lora_B"),
    "twice": ({}, lambda t: t | {LORA_A.replace("A.w", "A.x.w"): t[LORA_A].clone()}, {}, "found two A for"),
    "codes": ({}, lambda t: t | {LORA_A: t[LORA_A].to(torch.float8_e4m3fn)}, {}, "found F8_E4M3, wanted a wider dtype"),
    "NaN": ({}, lambda t: t | {LORA_A: t[LORA_A] * torch.nan}, {}, "NaN or Inf"),
    "huge": ({}, lambda t: {k: v * 1e30 for k, v in t.items()}, {}, "o_proj.weight: found values beyond torch.bfloat16"),
    "no magnitude": ({}, lambda t: t, {"use_dora": True}, "use_dora True and no lora_magnitude_vector"),
    "a magnitude too many": ({"use_dora": True}, lambda t: t, {"use_dora": False}, "use_dora False and base_model.model"),
    "another length": (
        {"use_dora": True},
        lambda t: {k: v[:-1] if "magnitude" in k else v for k, v in t.items()},
        {},
        "magnitude [63], wanted rank 2",
    ),
    "activated": ({}, lambda t: t, {"alora_invocation_tokens": [5]}, "found alora_invocation_tokens (an adapter that some tokens"),
    "drawn": ({}, lambda t: t, {"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
    "some experts": (
        {"target_modules": [], "target_parameters": EXPERTS},
        lambda t: {k: v[:-2] if "experts.lora_A" in k else v for k, v in t.items()},
        {},
        "wanted a pair for the 16 experts 32 × 64",
    ),
    "some whole experts": (
        {"modules_to_save": ["experts"]},
        lambda t: {k: v[:-1].contiguous() if "down_proj" in k else v for k, v in t.items()},
        {},
        "found [15, 64, 32], wanted [16, 64, 32]",
    ),
    "tokens beyond": (
        {"trainable_token_indices": [1]},
        lambda t: t,
        {"trainable_token_indices": [128]},
        "for each of the trainable_token_indices [128]",
    ),
    "a bias that the base lacks": ({"lora_bias": True}, lambda t: t, {}, "found no model.layers.0.self_attn.o_proj.bias"),
    "no rank": ({}, lambda t: t, {"r": 0}, "found 0 for"),
    "other shapes": ({}, lambda t: {k: v[:, :-1].contiguous() for k, v in t.items()}, {}, "wanted rank 2 for"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_has_no_place_is_refused_by_name(case, base, tmp_path):
    kind, change, fields, message = CASES[case]
    edit(adapter_of(base, tmp_path / "adapter", **kind), change, **fields)
    assert message in refused("merge-adapter", base, tmp_path / "out", "--adapter", tmp_path / "adapter")
    assert not (tmp_path / "out").exists()


def test_other_folders_and_orders_are_refused(base, tmp_path):
    one = adapter_of(base, tmp_path / "one")
    two = adapter_of(base, tmp_path / "two", modules_to_save=["lm_head"])
    three = adapter_of(base, tmp_path / "three", modules_to_save=["lm_head"], target_modules=["q_b_proj"])
    four = adapter_of(base, tmp_path / "four", init_lora_weights="pissa")
    out = tmp_path / "out"
    for given, message in (
        ((one, two, three), "found an adapter of lm_head.weight that takes its place, wanted it before"),
        ((one, four), "o_proj.weight that begins from it, wanted it before"),
        ((base,), "adapter_config.json"),
    ):
        assert message in refused(
            "merge-adapter", base, out, *(part for folder in given for part in ("--adapter", folder))
        )
    ok("merge-adapter", base, tmp_path / "fine", "--adapter", four, "--adapter", one)
    assert "for each of 1 adapters" in refused(
        "merge-adapter", base, out, "--adapter", one, "--weight", 1, "--weight", 2
    )
    assert "a finite number" in refused("merge-adapter", base, out, "--adapter", one, "--weight", "nan")
    assert "merge-adapter wants --adapter" in refused("merge-adapter", base, out, "--weight", 1)
    assert "no use for --weight" in refused("reshard", base, out, "--weight", 1)
    (one / "adapter_model.safetensors").rename(one / "adapter_model.bin")
    assert "found adapter_model.bin, wanted adapter_model.safetensors" in refused(
        "merge-adapter", base, out, "--adapter", one
    )


def test_a_run_goes_on_only_with_the_same_adapters(base, tmp_path, monkeypatch):
    """After a kill; what decides the weights is the adapter's config too."""
    adapter = adapter_of(base, tmp_path / "adapter", target_modules="all-linear")
    arguments = (
        "merge-adapter",
        base,
        tmp_path / "out",
        "--adapter",
        adapter,
        "--max-shard-size",
        "200kB",
        "--workers",
        1,
    )
    write, written = _job.write_shard, []

    def stop(*given):
        if len(written) == 2:
            raise OSError("killed")
        written.append(given[1])
        return write(*given)

    with monkeypatch.context() as patch:
        patch.setattr(_job, "write_shard", stop)
        assert "killed" in refused(*arguments)
    alpha = json.loads((adapter / "adapter_config.json").read_text())["lora_alpha"]
    edit(adapter, lora_alpha=2 * alpha)
    assert "other inputs or options" in refused(*arguments)
    shutil.rmtree(adapter)
    adapter_of(base, adapter, target_modules="all-linear")
    assert "other inputs or options" in refused(*arguments)  # a file of another time
    shutil.rmtree(tmp_path / "out.partial")
    with monkeypatch.context() as patch:
        written.clear()
        patch.setattr(_job, "write_shard", stop)
        assert "killed" in refused(*arguments)
    assert "left" in ok(*arguments, "--dry-run")
    printed = ok(*arguments)
    assert "2 files were finished before, of which these lines say nothing" in printed
    ok("merge-adapter", base, tmp_path / "at once", "--adapter", adapter)
    assert "identical" in ok("diff", tmp_path / "out", tmp_path / "at once")


def test_blocks_of_rows_that_are_cut_short(tmp_path):
    """An adapter that changes the last rows alone: a block of 128 and half of one."""
    folder = tmp_path / "release"
    tensors = write_release(folder, CONFIG, fp8=True)
    name = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"  # 192 rows
    adapter = pair(torch.Generator().manual_seed(0), 192, 128, weight=name)
    adapter[next(key for key in adapter if "lora_B" in key)][:130] = 0
    lora(tmp_path / "adapter", adapter)
    ok("merge-adapter", folder, tmp_path / "merged", "--adapter", tmp_path / "adapter")
    found = read(tmp_path / "merged")
    assert same_bits(found[name][:128], tensors[name][:128]) and not same_bits(found[name][128:], tensors[name][128:])
    assert found[name + "_scale_inv"][0, 0] == tensors[name + "_scale_inv"][0, 0]


def test_into_two_formats_of_one_release(tmp_path):
    write_release(tmp_path / "bf16", SHAPES["kimi"]())
    ok("to-4bit", tmp_path / "bf16", tmp_path / "two", "--format", "int4", "--keep-fp8", "attention")
    model = adapted(load(tmp_path / "two", **WIDE), target_modules=["o_proj"], target_parameters=EXPERTS)
    model.save_pretrained(tmp_path / "adapter")
    base, wanted = logits(load(tmp_path / "two", **WIDE)), logits(model)
    for out, options in (("codes", []), ("floats", ["--dtype", "bfloat16"])):
        ok("merge-adapter", tmp_path / "two", tmp_path / out, "--adapter", tmp_path / "adapter", *options)
    before, after = read(tmp_path / "two"), read(tmp_path / "codes")
    assert {name: (t.dtype, t.shape) for name, t in after.items()} == {
        n: (t.dtype, t.shape) for n, t in before.items()
    }
    changed = {name for name in before if not same_bits(before[name], after[name])}
    assert O_PROJ in changed and "model.layers.1.mlp.experts.0.down_proj.weight_packed" in changed
    assert all(".o_proj." in name or ".experts." in name for name in changed)
    for out, settings, most in (("codes", WIDE, 0.5), ("floats", {}, 0.05)):
        assert (logits(load(tmp_path / out, **settings)) - wanted).norm() < most * (base - wanted).norm()


def test_into_int4_as_kimi_s_releases_have_it(tmp_path):
    """Routed experts alone are codes: eight to an int32 under a name of their own, with a scale for 32 of a row."""
    before = write_int4(tmp_path / "int4", SHAPES["kimi"]())
    model = adapted(load(tmp_path / "int4", **WIDE), target_modules=["o_proj"], target_parameters=EXPERTS)
    for name, parameter in model.named_parameters():
        if ".mlp.experts.lora_A" in name:  # of down_proj: nothing but the last column of all changes
            parameter.data[:, :-1] = 0
    wanted = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    changes = deltas(load_file(tmp_path / "adapter" / "adapter_model.safetensors"), 4.0, SHAPES["kimi"]())
    printed = ok("merge-adapter", tmp_path / "int4", tmp_path / "merged", "--adapter", tmp_path / "adapter")
    found = read(tmp_path / "merged")
    assert found.keys() == before.keys()
    for name in [name.removesuffix("_packed") for name in before if name.endswith("_packed")]:
        parts = [name + suffix for suffix in ("_packed", "_scale", "_shape")]
        old, new = ([tensors[part] for part in parts] for tensors in (before, found))
        assert same_bits(old[2], new[2])
        sums = unpack(*old[:2]) + changes[name]
        touched = changes[name].unflatten(1, (-1, 32)).any(-1)
        assert touched.any()
        groups = sums.float().unflatten(1, (-1, 32))
        scale = (groups.abs().amax(-1, keepdim=True) / 7.5).bfloat16().float()
        fresh = ((groups / scale).round().clamp(-8, 7) * scale - groups).norm(dim=-1)
        error = (unpack(*new[:2]).float().unflatten(1, (-1, 32)) - groups).norm(dim=-1)
        assert (error <= 1.001 * fresh + 1e-6)[touched].all()
        assert torch.equal(new[1][~touched], old[1][~touched])
        assert torch.equal(new[0].unflatten(1, (-1, 4))[~touched], old[0].unflatten(1, (-1, 4))[~touched])
    assert re.search(
        r"routed experts: tensors changed 96, blocks [\d,]+ of [\d,]+; rounding took 0\.\d+ of the weights", printed
    )
    base, merged = (logits(load(folder, **WIDE)) for folder in (tmp_path / "int4", tmp_path / "merged"))
    assert (merged - wanted).norm() < 0.5 * (base - wanted).norm()
    torch.testing.assert_close(logits(load(tmp_path / "merged", dtype=torch.float32)), merged, rtol=1e-3, atol=1e-3)
