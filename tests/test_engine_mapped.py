"""The CPU engine on mapped files, whose addresses it is handed: files that are replaced, deleted, cut short or rewritten."""

import os

import pytest
import torch
from engine_cases import BACKENDS, needs_engine
from releases import SHAPES, same_bits, write_release
from transformers import AutoModelForCausalLM

from modeling_deepseek_moe import CheckpointError, use_backend
from modeling_deepseek_moe.quantized.mapped import MappedExperts

pytestmark = needs_engine

LAST = BACKENDS[-1]
# one token and a few take calls of their own; a prompt takes the experts' alone
TOKENS = pytest.mark.parametrize("tokens", [1, 4, 30])


@pytest.fixture
def model(tmp_path, monkeypatch):
    write_release(tmp_path / "release", SHAPES["v3"](), fp8=True, shards=2)
    monkeypatch.setattr(MappedExperts, "check_seconds", 0.0)
    return AutoModelForCausalLM.from_pretrained(tmp_path / "release", dtype="bfloat16").eval()


def logits(model, tokens: int) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(tokens)[None]).logits


def files_of(model) -> list:
    mapped = next(module for module in model.modules() if isinstance(module, MappedExperts))
    return sorted({info.file for index in range(mapped.num_experts) for info in mapped.infos(index).values()})


@TOKENS
@pytest.mark.parametrize("backend", [BACKENDS[0], LAST, "reference"])
@pytest.mark.parametrize("how", ["replaced", "deleted"])
def test_files_that_lost_their_names(model, how, backend, tokens, tmp_path):
    """Their bytes stay where they were."""
    with use_backend(backend):
        wanted = logits(model, tokens)
        for number, file in enumerate(files_of(model)):
            if how == "deleted":
                file.unlink()
            else:
                (tmp_path / str(number)).write_bytes(os.urandom(file.stat().st_size))
                (tmp_path / str(number)).replace(file)
        assert same_bits(logits(model, tokens), wanted)


def cut(file) -> None:
    os.truncate(file, file.stat().st_size - 10)


def empty(file) -> None:
    os.truncate(file, file.stat().st_size // 2)


def rewrite(file) -> None:
    data = file.read_bytes()
    file.write_bytes(data)
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 10**9))


@TOKENS
@pytest.mark.parametrize("backend", [LAST, "reference"])
@pytest.mark.parametrize("change", [cut, empty, rewrite], ids=lambda change: change.__name__)
def test_files_changed_in_place(model, change, backend, tokens):
    """Named before the engine reads the experts in them: reading on might kill the process, and this test."""
    block = next(layer for layer in model.model.layers if any(isinstance(m, MappedExperts) for m in layer.modules()))
    hidden = torch.randn(1, tokens, model.config.hidden_size).bfloat16()
    with use_backend(backend), torch.no_grad():
        wanted = block.mlp(hidden)
        assert same_bits(block.mlp(hidden), wanted)
        file = files_of(model)[-1]
        change(file)
        with pytest.raises(CheckpointError, match=str(file)):
            block.mlp(hidden)
