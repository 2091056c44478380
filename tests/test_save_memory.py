"""Saving needs no second copy of the model, and leaves nothing out."""

from pathlib import Path

import pytest
import torch
from releases import (
    COMMON,
    SHAPES,
    V3,
    write_release,
)
from transformers import AutoModelForCausalLM

import modeling_deepseek_moe as dsm


@pytest.mark.parametrize("quantize", [None, "fp8"])
def test_saving_makes_no_second_copy(tmp_path, quantize):
    """200 MB of stacked experts are written with a few matrices' worth of memory."""
    sizes = {"hidden_size": 1024, "moe_intermediate_size": 1024, "n_routed_experts": 32, "num_hidden_layers": 2}
    with torch.device("meta"):
        model = dsm.DeepseekV3ForCausalLM(dsm.DeepseekV3Config(**(COMMON | V3 | sizes))).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.zero_()
    size = sum(parameter.nbytes for parameter in model.parameters())
    assert size > 200e6
    model.save_pretrained(tmp_path / "warm", max_shard_size="50MB", quantize=quantize)
    before = reset_peak()
    model.save_pretrained(tmp_path / "a", quantize=quantize)
    assert peak() - before < 0.1 * size


def reset_peak() -> int:
    """Restart the kernel's count of this process's peak resident memory; resident bytes now."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        pytest.skip(f"the peak of resident memory cannot be reset here: {error}")
    return peak()


def peak() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


@pytest.mark.parametrize("settings", [{"variant": "x"}, {"save_original_format": False}], ids=str)
def test_mapped_experts_are_never_left_out(tmp_path, settings):
    write_release(tmp_path / "release", SHAPES["v3"](), fp8=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "release")
    with pytest.raises(ValueError, match="cannot write mapped FP8 experts"):
        model.save_pretrained(tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()
