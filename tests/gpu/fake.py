"""Whole models on tensors that claim to be on a CUDA device and hold nothing: what a step would launch, and wait for.

`FakeTensorMode` knows shapes, dtypes and devices alone. An operation on tensors of two devices raises as it would on a card;
one that needs a value on the host (``item``, ``nonzero``, ``bincount``) raises too, and is noted by the line that asked.
"""

import contextlib
import ctypes
import subprocess
import traceback
from collections import Counter
from pathlib import Path
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.cpp_extension import include_paths, library_paths
from transformers import AutoModelForCausalLM, initialization

from modeling_deepseek_moe import formats
from modeling_deepseek_moe.moe.experts import DeepseekExperts
from modeling_deepseek_moe.ops import _triton
from modeling_deepseek_moe.ops.experts import Slots, triton_codes
from modeling_deepseek_moe.quantized.bitsandbytes_experts import BitsAndBytesExperts
from modeling_deepseek_moe.quantized.experts import StackedQuantizedExperts
from modeling_deepseek_moe.quantized.linear import QuantizedLinear
from modeling_deepseek_moe.weights import release_tensors

DEVICE = torch.device("cuda:0")
NO_KERNEL = {
    *("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "empty_permuted"),
    *("lift_fresh", "device", "_unsafe_view", "promote_types"),
}
LAUNCHES = {
    "triton_mla_decode": 3,
    "triton_mla_decode_pages": 3,
    "experts_on_card": 3,
    "experts_and_norm_on_card": 3,
}  # of operators that start several kernels
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}


def build_guard(folder: Path) -> Path:
    """Compile ``guard.cpp``; takes a second or two."""
    library = folder / "guard.so"
    includes = [f"-I{path}" for path in include_paths()]
    libraries = [option for path in library_paths() for option in (f"-L{path}", f"-Wl,-rpath,{path}")]
    source = str(Path(__file__).with_name("guard.cpp"))
    command = [
        "g++",
        "-O1",
        "-shared",
        "-fPIC",
        "-std=c++20",
        *includes,
        source,
        *libraries,
        "-lc10",
        "-ltorch_cpu",
        "-o",
        str(library),
    ]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return library


def load_guard(library: Path) -> None:
    """Before anything else of torch runs in the process: its autograd engine looks for devices once."""
    ctypes.CDLL(str(library))


@contextlib.contextmanager
def card(major: int, minor: int, *, triton: bool):
    """While it lasts, the card has this capability, and there is Triton or not: no kernel is started."""
    with (
        mock.patch.object(torch.cuda, "get_device_capability", lambda device=None: (major, minor)),
        mock.patch.object(_triton, "_unusable", lambda: None if triton else "triton is not installed"),
        mock.patch.object(_triton, "_cannot_start", lambda index: None),
        mock.patch.object(_triton, "_capability", lambda index: 10 * major + minor),
    ):
        yield


@contextlib.contextmanager
def no_kernels(watch: "Watch"):
    """While it lasts, ``watch`` counts what this package starts itself outside of its operators, and nothing is started."""

    def launch(kernel, grid, device, *arguments, warps: int = 4, **constants) -> None:
        watch.kernels[kernel.fn.__name__] += 0 not in grid

    def table_of(name: str, device: torch.device) -> torch.Tensor:
        """A constant, which a process copies to a card once."""
        return torch.empty(256, dtype=torch.int32, device=device)

    with mock.patch.object(_triton, "launch", launch), mock.patch.object(triton_codes, "table_of", table_of):
        yield


def fake_model(config, weights: str, dtype: torch.dtype = torch.bfloat16):
    """A model of ``config`` on the device, as `from_pretrained` lays it out there.

    Args:
        weights: ``"bf16"``, ``"fp8"`` (a release: linear layers too), or of its experts alone ``"int4"``, and ``"nf4"`` and
            ``"nf4-nested"`` by bitsandbytes.
    """
    with initialization.no_init_weights(), torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        specs = release_tensors(config) if weights == "fp8" else {}
        for name, module in list(model.named_modules()):
            spec = specs.get(f"{name}.weight")
            if isinstance(module, torch.nn.Linear) and spec is not None and spec.quantized:
                sizes = module.in_features, module.out_features, module.bias is not None
                model.set_submodule(name, QuantizedLinear(*sizes, formats.of_config(FP8)))
            elif isinstance(module, DeepseekExperts) and weights.startswith("nf4"):
                options = weights.endswith("nested"), torch.bfloat16, torch.bfloat16
                model.set_submodule(name, BitsAndBytesExperts(config, formats.NF4, *options))
            elif isinstance(module, DeepseekExperts) and weights != "bf16":
                model.set_submodule(name, StackedQuantizedExperts(config, formats.by_name(weights)))
    return model.eval()


def equal_slots():
    """While it lasts, experts get equally many rows: how many they get is what a fake tensor cannot tell."""

    def of(cls, topk_indices: torch.Tensor, num_experts: int) -> Slots:
        order = topk_indices.flatten().argsort(stable=True)
        places = torch.empty_like(order)
        places[order] = torch.arange(len(order), device=order.device)
        share, rest = divmod(len(order), num_experts)
        return cls(order, places.view(topk_indices.shape), [share + (index < rest) for index in range(num_experts)])

    return mock.patch.object(Slots, "of", classmethod(of))


def on_other_devices(model) -> list[str]:
    """Tensors of the model that are not on the device."""
    named = (*model.named_parameters(), *model.named_buffers())
    return [name for name, tensor in named if tensor.device != DEVICE]


class Watch(TorchDispatchMode):
    """Notes what a device would do and what a host would wait for, while it lasts.

    ``kernels``: launches by operator. ``waits``: operators that need a value of the device on the host, by line.
    ``crossings``: copies from one device to another, by line. ``on_cpu``: operators on tensors of the CPU alone.
    """

    def __init__(self):
        super().__init__()
        self.kernels, self.waits, self.crossings, self.on_cpu = Counter(), Counter(), Counter(), Counter()

    @property
    def count(self) -> int:
        return sum(self.kernels.values())

    def told(self) -> dict[str, list[str]]:
        """What a step must not have."""
        return {"waits": list(self.waits), "crossings": list(self.crossings), "on_cpu": list(self.on_cpu)}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        namespace, _, name = str(func).partition(".")
        if namespace == "prim":
            return func(*args, **kwargs)
        name = name.partition(".")[0]
        given = {t.device.type for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        try:
            out = func(*args, **kwargs)
        except (
            torch._subclasses.fake_tensor.DataDependentOutputException,
            torch._subclasses.fake_tensor.DynamicOutputShapeException,
        ):
            self.waits[f"{name} {_line()}"] += 1
            raise
        made = {t.device.type for t in tree_leaves(out) if isinstance(t, torch.Tensor)}
        if name.startswith("index_put") and any(i is not None and i.dtype == torch.bool for i in args[1]):
            self.waits[f"{name} by a mask {_line()}"] += 1
        if name in ("_to_copy", "copy_") and len(made | given) > 1:
            self.crossings[f"{name} {_line()}"] += 1
        if "cuda" in given | made:
            if not (func.is_view or name in NO_KERNEL):
                self.kernels[name] += LAUNCHES.get(name, 1)
        elif name not in NO_KERNEL:
            self.on_cpu[f"{name} {_line()}"] += 1
        return out


def _line() -> str:
    """Where in this package or in transformers an operator was called."""
    ours = ("modeling_deepseek_moe", "transformers")
    frames = [f for f in traceback.extract_stack() if any(part in f.filename for part in ours)]
    if not frames:
        return "elsewhere"
    found = frames[-1]
    return f"{'/'.join(Path(found.filename).parts[-3:])}:{found.lineno} {found.line}"


def fake_mode() -> FakeTensorMode:
    return FakeTensorMode(allow_non_fake_inputs=False)
