"""What a run was of: the model's files, the versions of what ran it, the machine."""

import hashlib
import importlib.metadata
import os
import platform
from pathlib import Path

import torch

from modeling_deepseek_moe import __version__
from modeling_deepseek_moe.config import quantization_fields

SAMPLED_BLOCKS, BLOCK = 16, 65_536
PACKAGES = ("torch", "transformers", "tokenizers", "lm-eval", "math-verify", "sympy", "datasets")


def fingerprint(folder: Path) -> str:
    """Of a checkpoint folder: names and sizes of its weight files, their beginnings, and 16 blocks of 64 KiB of each.

    A whole SHA-256 of 671 GB takes a quarter of an hour. Training of all weights changes every block; what changes a few tensors only may
    go unseen.
    """
    digest = hashlib.sha256()
    for file in sorted(Path(folder).glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}\n".encode())
        with file.open("rb") as data:
            for i in range(SAMPLED_BLOCKS + 1):
                data.seek(i * max(0, size - BLOCK) // SAMPLED_BLOCKS)
                digest.update(data.read(BLOCK))
    return digest.hexdigest()


def adapter_fingerprints(model) -> dict[str, str]:
    """SHA-256 of each adapter's tensors, by the adapter's name; of a model without adapters there is none."""
    configs = getattr(model, "peft_config", None)
    if not configs:
        return {}
    from peft import get_peft_model_state_dict

    found = {}
    for name in configs:
        digest = hashlib.sha256()
        for key, tensor in sorted(get_peft_model_state_dict(model, adapter_name=name).items()):
            digest.update(key.encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        found[name] = digest.hexdigest()
    return found


def model_facts(model, folder: Path | None, label: str) -> dict:
    """As `Evaluation.model` keeps them; the hashes are None for a model that came from no folder."""
    config = Path(folder) / "config.json" if folder else None
    adapters = adapter_fingerprints(model)
    return {
        "label": label,
        "path": str(folder) if folder else None,
        "config_sha256": hashlib.sha256(config.read_bytes()).hexdigest() if config and config.is_file() else None,
        "checkpoint_fingerprint": fingerprint(folder) if folder else None,
        "dtype": str(model.dtype).removeprefix("torch."),
        "parameters": model.num_parameters(),
        "quantization": quantization_fields(model.config),
        **({"adapters": adapters} if adapters else {}),
    }


def versions() -> dict[str, str]:
    found = {"modeling_deepseek_moe": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine() -> str:
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ", ".join([f"{platform.machine()}, {os.cpu_count()} CPUs", *gpus])
