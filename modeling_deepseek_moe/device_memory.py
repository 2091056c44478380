"""An accelerator whose memory is exhausted: known by its error, and how much is free once what was allocated is given back."""

import gc
from collections.abc import Iterable, Mapping

import torch

from modeling_deepseek_moe.weights import natural_order

NEITHER = ("cpu", "disk", "meta")
AUTOMATIC = ("auto", "balanced", "balanced_low_0", "sequential")  # device maps that are made of sizes


def exhausted_in_conversions(errors: Mapping[str, str]) -> str | None:
    """As `exhausted`, of what transformers wrote down while a quantiser ran on the device, and went on."""
    lines = (line.strip() for text in errors.values() for line in text.splitlines())
    return next((line for line in lines if torch.OutOfMemoryError.__name__ in line), None)


def not_loaded(tensors: Mapping[str, torch.Tensor]) -> str:
    """Which of a model's tensors have no data yet, the one first that was on its way."""
    missing = sorted((name for name, tensor in tensors.items() if tensor.is_meta), key=natural_order)
    at = f"{missing[0]} takes {tensors[missing[0]].nbytes:,} bytes, " if missing else ""
    nbytes = sum(tensors[name].nbytes for name in missing)
    return f"{at}{len(missing)} of {len(tensors)} tensors, {nbytes:,} bytes, were not loaded"


def accelerator(device: object) -> torch.device:
    """What a device map calls a device, a number or a name.

    Raises:
        ValueError: a number, and no accelerator.
    """
    if not isinstance(device, int):
        return torch.device(str(device))
    current = torch.accelerator.current_accelerator()
    if current is None:
        raise ValueError(f"device_map: found device {device}, wanted one that this machine has: it has no accelerator")
    return torch.device(current.type, device)


def accelerators(device_map: object) -> list[torch.device]:
    """Those that a device map, or the one device in its place, names: all where it names none."""
    if device_map is None or str(device_map) in AUTOMATIC:
        return [accelerator(index) for index in range(torch.accelerator.device_count())]
    named: Iterable = device_map.values() if isinstance(device_map, Mapping) else [device_map]
    return [
        accelerator(device) for device in dict.fromkeys(named) if device is not None and str(device) not in NEITHER
    ]


def has_own_memory(device: torch.device) -> bool:
    """Whether what is copied there takes none of the host's memory: not of MPS, nor of a GPU that shares it."""
    if device.type == "cuda":
        return not getattr(torch.cuda.get_device_properties(device), "is_integrated", False)
    return device.type in ("xpu", torch._C._get_privateuse1_backend_name())


def give_back(device: torch.device | str) -> str:
    """Give memory that nothing refers to back to the device, and say how much is free there then: ``"1,024 bytes are free on cuda:0"``.

    It is said within the report of another failure, and raises none of its own.
    """
    gc.collect()
    device = torch.device(device)
    module = getattr(torch, device.type, None)
    empty_cache, mem_get_info = (getattr(module, name, None) for name in ("empty_cache", "mem_get_info"))
    unknown = f"how much is free on {device} is not known"
    try:
        if empty_cache is not None:
            empty_cache()
        if mem_get_info is None:
            return unknown
        free, _ = mem_get_info(device)
    except RuntimeError as error:  # a device whose context did not fit
        return f"{unknown} ({' '.join(str(error).split())})"
    return f"{free:,} bytes are free on {device}"
