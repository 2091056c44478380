"""What is said on a machine whose card or Triton cannot run the kernels, found from what is really missing there."""

import importlib.util
import sys
from contextlib import nullcontext

import pytest
import torch
from test_gpu_dispatch import CUDA, layer, on_card, refusal

from modeling_deepseek_moe.ops import _libraries, _triton, block_fp8
from modeling_deepseek_moe.ops._dispatch import BackendError, use_backend
from modeling_deepseek_moe.ops.experts import runs_on_card

HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")


@pytest.fixture
def told(monkeypatch) -> list[str]:
    """Warnings of a fallback; none were told before, and nothing was looked at."""
    found = []
    monkeypatch.setattr(_libraries.logger, "warning", found.append)
    for asked in (_libraries.announce_fallback, _triton._unusable, _triton._cannot_start):
        asked.cache_clear()
    yield found
    for asked in (_libraries.announce_fallback, _triton._unusable, _triton._cannot_start):
        asked.cache_clear()


@pytest.fixture
def hopper(monkeypatch):
    """This machine has a card that runs the kernels, as far as torch can tell."""
    monkeypatch.setattr(_triton, "_capability", lambda index: 90)
    monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())


def check(reason: str, told: list[str]) -> None:
    """``auto`` falls back and says why, once; a backend asked for by name raises with it, in every kind of operation."""
    told.clear()
    _libraries.announce_fallback.cache_clear()
    for _ in range(2):
        assert reason in _triton.refusal(CUDA)
        assert not runs_on_card(refusal(*layer("fp8")))
    [line] = told
    assert line.startswith("cuda:0: plain torch computes in place of this package's kernels") and reason in line
    codes, scale = on_card(128, 256, dtype=torch.float8_e4m3fn), on_card(1, 2, dtype=torch.float32)
    with use_backend("triton"):
        with pytest.raises(BackendError, match="FP8 linear: backend 'triton'") as error:
            block_fp8.linear(on_card(3, 256), codes, scale)
        assert reason in str(error.value)
        with pytest.raises(BackendError, match="routed experts: backend 'triton'") as error:
            runs_on_card(refusal(*layer("bf16")))
        assert reason in str(error.value)
    with use_backend("reference"):
        assert _triton.refusal(CUDA) is not None
    assert len(told) == 1


@pytest.mark.parametrize("generation", [70, 75])
def test_cards_that_are_too_old(generation, told, monkeypatch):
    monkeypatch.setattr(_triton, "_capability", lambda index: generation)
    check(f"needs SM80, found SM{generation}", told)


def test_rocm(told, hopper, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    check("needs CUDA, got ROCm", told)


def test_no_triton(told, hopper, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else find_spec(name))
    check("triton is not installed", told)


def test_a_triton_that_does_not_import(told, hopper, monkeypatch, tmp_path):
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("raise OSError('libtriton.so: undefined symbol')")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.partition(".")[0] == "triton"]:
        monkeypatch.delitem(sys.modules, name)
    check("Triton cannot be imported (OSError: libtriton.so: undefined symbol)", told)


@needs_triton
@pytest.mark.parametrize(
    ("version", "refused"), [("3.5.1", True), ("2.9.0+git1", True), ("3.6.0", False), ("3.10.0", False)]
)
def test_an_old_triton(version, refused, told, hopper, monkeypatch):
    import triton

    monkeypatch.setattr(triton, "__version__", version)
    if refused:
        check(f"needs Triton 3.6 or later, found {version}", told)
    else:
        assert _triton._unusable() is None


@needs_triton
def test_the_interpreter(told, hopper, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    check("is not for Triton's interpreter (TRITON_INTERPRET=1)", told)


@pytest.fixture
def first_launch(told, hopper, monkeypatch, tmp_path):
    """Triton as in a process that has started no kernel, with nothing compiled before."""
    from triton.runtime import driver

    from modeling_deepseek_moe.ops._triton_probe import nothing

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(driver, "_default", None)
    monkeypatch.setattr(driver, "_active", None)
    nothing.device_caches.clear()
    yield driver
    nothing.device_caches.clear()


@needs_triton
def test_no_compiler_for_the_first_launch(first_launch, told, monkeypatch, tmp_path):
    from triton.backends.nvidia.driver import CudaDriver

    monkeypatch.setattr(CudaDriver, "is_active", staticmethod(lambda: True))
    monkeypatch.setattr("triton.backends.nvidia.driver.library_dirs", lambda: [str(tmp_path)])
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    check("Triton cannot start a kernel (RuntimeError: Failed to find C compiler", told)


@needs_triton
def test_a_compiler_that_fails(first_launch, told, monkeypatch, tmp_path):
    """As without Python's headers."""
    from triton.backends.nvidia.driver import CudaDriver

    monkeypatch.setattr(CudaDriver, "is_active", staticmethod(lambda: True))
    monkeypatch.setattr("triton.backends.nvidia.driver.library_dirs", lambda: [str(tmp_path)])
    monkeypatch.setenv("CC", "false")
    check("Triton cannot start a kernel (CalledProcessError: Command '['false'", told)


class Card:
    """A driver that knows its card, and starts nothing."""

    def __getattr__(self, name):
        return lambda *arguments: 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


class Loader:
    """Of what was compiled."""

    def get_device_properties(self, device):
        return {"max_shared_mem": 1 << 16}

    def load_binary(self, *arguments):
        return 0, 0, 0, 0, 1024


@needs_triton
def test_no_ptxas(first_launch, told, monkeypatch):
    from triton import knobs

    monkeypatch.setattr(first_launch, "_active", Card())
    monkeypatch.setattr(knobs.NvidiaTool, "from_path", staticmethod(lambda path: None))
    check("Triton cannot start a kernel (RuntimeError: Cannot find ptxas", told)


@needs_triton
def test_a_cache_that_cannot_be_written(first_launch, told, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setattr(first_launch, "_active", Card())
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file" / "cache"))
    check("Triton cannot start a kernel (NotADirectoryError", told)


@needs_triton
def test_with_all_of_it_the_probe_compiles_and_is_started(first_launch, monkeypatch):
    """What is missing then is the card alone: so the failures above are those that are named."""
    monkeypatch.setattr(first_launch, "_active", Card())
    assert "no attribute 'get_device_properties'" in _triton._cannot_start(0)
    monkeypatch.setattr(Card, "utils", Loader(), raising=False)
    monkeypatch.setattr(Card, "launcher_cls", lambda self, *arguments: lambda *started: None, raising=False)
    assert _triton._cannot_start.__wrapped__(0) is None
