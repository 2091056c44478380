"""Steps of whole models on a CUDA device that is none: what they launch for a layer, and that nothing waits for the device.

No GPU is needed, and none was measured: tensors have shapes and devices, and no values. ``gpu.fake`` says how.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from gpu.fake import build_guard

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(shutil.which("g++") is None, reason="the device guard is compiled with g++"),
]

# Launches of one more layer of experts. They may only become fewer; what is lower here is to be written here.
CEILINGS = {
    "lite/bf16/decode": 84,
    "lite/bf16/decode-static": 87,
    "lite/bf16/prefill": 99,
    "lite/bf16/train": 249,
    "lite/bf16/train-balanced": 297,
    "lite/fp8/decode": 237,
    "lite/fp8/decode-static": 240,
    "small/fp8/prefill": 328,
    "small/bf16/train-fp8": 4033,
    "lite/bf16/decode-codes": 103,
    "lite/fp8/decode/triton": 12,
    "lite/fp8/decode-codes/triton": 12,
    "v3/fp8/decode-static-codes/triton": 13,
    "lite/fp8/decode-static/triton": 12,
    "lite/bf16/decode-static/triton": 13,
    "v3/fp8/decode-static/triton": 13,
    "v3/fp8/decode-paged/triton": 42,
    "small/fp8/prefill/triton": 56,
    "small/bf16/train-fp8/triton": 462,
    "small/bf16/train-fp8-bf16-wgrad/triton": 451,
    "small/fp8/train-adapted/triton": 269,
    "small/int4/train-adapted/triton": 248,
    "small/nf4/train-adapted/triton": 248,
    "small/nf4-nested/train-adapted/triton": 272,
}
SLACK = 0.1  # how far above its count a ceiling may be: one left high would let an old fault back in
# transformers' own, once for each layer of a new cache: empty tensors that it makes on the host
NEW_CACHE = ("self.keys = torch.tensor([], ", "self.values = torch.tensor([], ")


@pytest.fixture(scope="module")
def guard(tmp_path_factory) -> Path:
    return build_guard(tmp_path_factory.mktemp("guard"))


COMPILED = ["v3/fp8/decode-static/triton", "lite/bf16/decode-static/triton", "lite/bf16/decode-static-codes/triton"]


@pytest.fixture(scope="module")
def found(guard) -> dict[str, dict]:
    return told_by(guard, "measure", CEILINGS)


def told_by(guard: Path, what: str, steps) -> dict[str, dict]:
    """Of all steps, in a process of its own, where the guard is loaded before torch looks for devices."""
    program = f"import ctypes; ctypes.CDLL({str(guard)!r}); from gpu.steps import main; main()"
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, "-c", program, what, *steps],
        check=False,
        env={**os.environ, "PYTHONPATH": path, "DEEPSEEK_MOE_BACKEND": "auto"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout)


@pytest.mark.parametrize("step", CEILINGS)
def test_nothing_waits_for_the_device_and_nothing_is_elsewhere(found, step):
    got = found[step]
    assert got["error"] is None and got["waits"] == []
    assert got["elsewhere"] == []
    crossings = [line for line in got["crossings"] if not any(own in line for own in NEW_CACHE)]
    assert crossings == [] and got["on_cpu"] == []


@pytest.mark.parametrize("step", CEILINGS)
def test_launches_of_a_layer(found, step):
    layer, ceiling = found[step]["layer"], CEILINGS[step]
    assert layer <= ceiling, f"{step}: {layer} launches, the most used are {found[step]['kernels']}"
    assert layer >= (1 - SLACK) * ceiling, f"{step}: {layer} launches, lower the ceiling of {ceiling}"


def test_a_step_is_one_graph_for_a_compiler(guard):
    """Nothing in it waits for a value or has a shape that depends on one: so a CUDA graph can hold it too."""
    for step, got in told_by(guard, "compile", COMPILED).items():
        assert got["error"] is None, got["error"]
        assert (got["graphs"], got["unknown"], got["reads"]) == (1, [], []), step
        assert {"triton_mla_decode", "triton_route", "experts_on_card"} <= set(got["operators"])


def test_a_read_of_the_host_is_found_by_its_line(guard):
    """The gate itself: a tensor's value asked for, and a copy to the host."""
    program = f"""
import ctypes; ctypes.CDLL({str(guard)!r})
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException
from gpu.fake import DEVICE, Watch, fake_mode
with fake_mode():
    x, watch = torch.zeros(4, device=DEVICE), Watch()
    with watch:
        (x + 1).cpu()
        try:
            x.sum().item()
        except DataDependentOutputException:
            pass
        try:
            x + torch.zeros(4)
        except RuntimeError as error:
            print("mixed" if "device" in str(error) else error)
print(len(watch.waits), len(watch.crossings), dict(watch.kernels))
"""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    result = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=False)
    assert result.stdout.split("\n")[:2] == ["mixed", "1 1 {'add': 1, '_to_copy': 1, 'sum': 1}"], result.stderr[-2000:]
