"""``convert merge-adapter`` into folders of bitsandbytes, and peft's own merge there, next to bitsandbytes' own functions."""

import gc
import json
import re
import threading
import weakref

import pytest
import torch

peft = pytest.importorskip("peft")
bitsandbytes = pytest.importorskip("bitsandbytes")
from adapters import EXPERTS, adapted, plain  # noqa: E402
from bnb_models import WIDTHS, apart, load, logits, wish, write_folders  # noqa: E402
from releases import same_bits  # noqa: E402
from test_conversion_parts import refused  # noqa: E402
from test_conversion_roundtrip import ok, read  # noqa: E402

from modeling_deepseek_moe.conversion._bitsandbytes import MadeTogether, open_folder  # noqa: E402

pytestmark = pytest.mark.tools

KINDS = ["nf4", "fp4-double", "int8"]
O_PROJ = "model.layers.1.self_attn.o_proj.weight"
TARGETS = {"target_modules": ["o_proj"], "target_parameters": EXPERTS, "lora_alpha": 0.2}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_folders(tmp_path_factory)


@pytest.fixture(scope="module", params=[(kind, width) for kind in KINDS for width in WIDTHS], ids="-".join)
def base(request, folders, tmp_path_factory):
    """A saved model, an adapter of half of its experts, and the weights that both come to in fp32, by release name."""
    kind, width = request.param
    folder = tmp_path_factory.mktemp("base")
    load(folders[width, False], wish(kind), dtype=torch.float32).save_pretrained(folder / "bnb")
    wide = load(folder / "bnb", dtype=torch.float32).dequantize(torch.float32)
    wide.save_pretrained(folder / "wide")
    model = adapted(wide, **TARGETS)
    for name, parameter in model.named_parameters():
        if ".mlp.experts" in name and "lora_B" in name:
            parameter.data.view(len(parameter), -1, wide.config.n_routed_experts)[:, :, 4:] = 0
    model.save_pretrained(folder / "adapter")
    model.merge_and_unload().save_pretrained(folder / "sums")
    return kind, folder


def rounded(kind, weight):
    """As bitsandbytes quantises it again."""
    functional = bitsandbytes.functional
    if kind == "int8":
        codes, absmax, _ = functional.int8_vectorwise_quant(weight.half())
        return functional.int8_vectorwise_dequant(codes, absmax)
    own = functional.quantize_4bit(
        weight.reshape(1, -1), blocksize=64, quant_type=kind[:3], compress_statistics="double" in kind
    )
    return functional.dequantize_4bit(*own).view(weight.shape)


def test_in_the_format_that_it_had(base, tmp_path):
    """Matrices that no adapter touches keep every byte; the others are as near as bitsandbytes' own quantisation."""
    kind, folder = base
    printed = ok("merge-adapter", folder / "bnb", tmp_path / "out", "--adapter", folder / "adapter", "--workers", 2)
    before, found, sums = read(folder / "bnb"), read(tmp_path / "out"), read(folder / "sums")
    wide = read(folder / "wide")
    assert {name: t.shape for name, t in before.items()} == {name: t.shape for name, t in found.items()}
    # by value: FP4 has a negative zero, and what is added to it for an expert that has B = 0 is a zero of either sign
    touched = {name for name in sums if not torch.equal(sums[name], wide[name])}
    assert O_PROJ in touched and len(touched) == 2 + 3 * 4
    stems = tuple(name.removesuffix(".weight") + "." for name in touched)
    assert all(same_bits(found[name], before[name]) for name in before if not name.startswith(stems))
    made = load(tmp_path / "out", dtype=torch.float32)
    expected = logits(made)
    made.dequantize(torch.float32).save_pretrained(tmp_path / "read")
    for name, weight in read(tmp_path / "read").items():
        if name in touched:
            wanted = sums[name]
            assert apart(weight, wanted) <= 1.03 * apart(rounded(kind, wanted), wanted) < 0.15
    line = r"routed experts: tensors changed 12, blocks [\d,]+ of [\d,]+; rounding took ([\d.e-]+) of the weights"
    assert 1e-4 < float(re.search(line, printed)[1]) < 0.2
    assert torch.equal(logits(load(tmp_path / "out", dtype=torch.float32)), expected)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads(
        (folder / "bnb" / "config.json").read_text()
    )


def test_in_floating_point_as_a_release(base, tmp_path):
    """The sums rounded once; plain transformers loads them."""
    _, folder = base
    for dtype in ("float32", "bfloat16"):
        printed = ok(
            "merge-adapter", folder / "bnb", tmp_path / dtype, "--adapter", folder / "adapter", "--dtype", dtype
        )
        assert "decoded: weights" in printed
    sums, wide, narrow = read(folder / "sums"), read(tmp_path / "float32"), read(tmp_path / "bfloat16")
    assert sums.keys() == wide.keys() == narrow.keys()
    for name, weight in sums.items():
        torch.testing.assert_close(wide[name].float(), weight.float(), rtol=1e-5, atol=1e-6)
    assert narrow[O_PROJ].dtype == torch.bfloat16 and same_bits(narrow[O_PROJ], wide[O_PROJ].bfloat16())
    assert "quantization_config" not in json.loads((tmp_path / "bfloat16" / "config.json").read_text())
    assert apart(logits(plain(tmp_path / "float32")), logits(load(folder / "sums", dtype=torch.float32))) < 1e-5


@pytest.mark.parametrize("kind", [*KINDS, "nf4-double"])
@pytest.mark.parametrize("width", WIDTHS)
def test_peft_merges_into_attention_and_experts_alike(folders, kind, width):
    """Attention by peft's and bitsandbytes' own layers, experts in memory: as near as bitsandbytes quantises the sums."""
    model = adapted(load(folders[width, False], wish(kind), dtype=torch.float32), **TARGETS)
    own = load(folders[width, False], wish(kind), dtype=torch.float32)
    wide = adapted(own.dequantize(torch.float32), **TARGETS)
    sums = dict(wide.merge_and_unload().named_parameters())
    parameters = dict(model.merge_and_unload().dequantize(torch.float32).named_parameters())
    for name in (O_PROJ, *(f"model.layers.1.{stack}" for stack in EXPERTS)):
        assert apart(parameters[name], sums[name]) < {"int8": 0.012, "nf4": 0.11, "fp4": 0.14}[kind.split("-")[0]], (
            name
        )


def test_what_is_merged_is_taken_out_again(folders):
    """``unmerge_adapter``: experts to the byte."""
    model = adapted(load(folders["blocks", False], wish("nf4-double"), dtype=torch.float32), **TARGETS)
    experts = {name: p.detach().clone() for name, p in model.named_parameters() if ".mlp.experts" in name}
    model.merge_adapter()
    assert any(not torch.equal(p, experts[name]) for name, p in model.named_parameters() if name in experts)
    model.unmerge_adapter()
    assert all(torch.equal(p, experts[name]) for name, p in model.named_parameters() if name in experts)


def test_what_is_refused(folders, tmp_path):
    load(folders["blocks", False], wish("nf4"), dtype=torch.float32).save_pretrained(tmp_path / "bnb")
    model = adapted(load(tmp_path / "bnb", dtype=torch.float32), **TARGETS)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(
        ValueError, match=r"mlp\.experts.*mapped files.*convert merge-adapter.*call model\.dequantize\(\)"
    ):
        model.merge_and_unload()
    config = json.loads((tmp_path / "bnb" / "config.json").read_text())
    config["quantization_config"]["bnb_4bit_quant_type"] = "fp4"
    (tmp_path / "bnb" / "config.json").write_text(json.dumps(config))
    message = refused("merge-adapter", tmp_path / "bnb", tmp_path / "out", "--adapter", tmp_path / "adapter")
    assert "without" in message and "quant_state.bitsandbytes__fp4" in message
    floats = refused(
        "merge-adapter",
        folders["blocks", False],
        tmp_path / "out",
        "--adapter",
        tmp_path / "adapter",
        "--dtype",
        "bfloat16",
    )
    assert "found no codes, wanted some for --dtype bfloat16" in floats


def test_what_is_made_together_waits_for_one_matrix_at_a_time():
    """A run that goes on takes only some tensors of a matrix that lies in two files; the next matrix ends the wait for the rest."""
    held, made = threading.local(), []

    def make():
        tensors = {name: torch.zeros(3) for name in ("codes", "absmax")}
        made.append(weakref.ref(tensors["codes"]))
        return tensors

    first, second = MadeTogether(make, held), MadeTogether(make, held)
    first.take("absmax")
    gc.collect()
    assert made[0]() is not None
    second.take("codes"), second.take("absmax")
    gc.collect()
    assert made[0]() is None and len(made) == 2
    assert first.take("codes").shape == (3,) and len(made) == 3


def test_a_matrix_state_is_read_once(folders, tmp_path, monkeypatch):
    load(folders["blocks", False], wish("nf4"), dtype=torch.float32).save_pretrained(tmp_path)
    source, read_states = open_folder(tmp_path), []
    function = type(source)._read_state
    monkeypatch.setattr(
        type(source), "_read_state", lambda self, info: read_states.append(info.name) or function(self, info)
    )
    info = next(info for info in source.reader.values() if source.is_codes(info))
    for _ in range(2):
        source.named(info, source.matrix(info))
        source.value_shape(info.name)
    assert read_states == [info.name]
