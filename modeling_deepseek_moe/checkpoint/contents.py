"""What lies in a folder that has nothing to load, or weights of another maker: its name, and what to do with it."""

import re
from pathlib import Path

from modeling_deepseek_moe.checkpoint.headers import MAX_HEADER_BYTES, CheckpointError
from modeling_deepseek_moe.checkpoint.jsonfile import MAX_BYTES, read_json

WAY_OUT = "wanted a checkpoint in the Hugging Face layout"
# By name, the most telling first: what it is, and the way from there to a checkpoint that loads.
KINDS = (
    (r".*\.gguf", "GGUF weights (llama.cpp)", "download the release in safetensors that they were made of"),
    (
        r"model\d+-mp\d+\.safetensors",
        "ranks of DeepSeek's own inference code",
        "run `deepseek-moe convert native-to-hf`",
    ),
    (
        r"consolidated.*\.safetensors",
        "consolidated weights",
        "download the files model*.safetensors and model.safetensors.index.json of the same release",
    ),
    (
        r"model-\d+-of-\d+\.safetensors",
        "shards without model.safetensors.index.json",
        "download the index, or rename a single shard to model.safetensors",
    ),
    (r"adapter_model\.(safetensors|bin)", "an adapter", "load the model that it belongs to, then the adapter"),
    (r".*\.(bin|pt|pth|ckpt)", "pickled weights", "convert them to safetensors where you trust them"),
    (r".*\.safetensors", "safetensors under another name", "rename a single file to model.safetensors"),
)
# NVIDIA's ModelOpt writes this next to a config.json that may still be the one of the weights it started from.
MODELOPT_NAME = "hf_quant_config.json"
NVFP4_SCALES = ".weight_scale_2"  # of a whole matrix, next to those of its blocks: no format here has two
MODELOPT_BLOCKS = "FP8_PB"  # block-wise FP8, which the config describes


def describe(folder: Path) -> str | None:
    """What weights a folder (or a file) holds that are not to be loaded, and the way out; ``None`` where it holds none."""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else [folder.name]
    if "model.safetensors" in names or "model.safetensors.index.json" in names:
        return None
    for pattern, kind, way_out in KINDS:
        found = [name for name in names if re.fullmatch(pattern, name)]
        if found:
            return f"found {kind} ({found[0]}{f' and {len(found) - 1} more' if len(found) > 1 else ''}), {WAY_OUT}: {way_out}"
    return None


def refuse_file(path: Path) -> None:
    """
    Raises:
        CheckpointError: the path is that of a weights file, not of its folder.
    """
    if not path.is_file():
        return
    if path.suffix == ".safetensors":
        raise CheckpointError(f"{path}: found a safetensors file, wanted the folder that it lies in")
    said = describe(path)
    if said is not None:
        raise CheckpointError(f"{path}: {said}")


def refuse_other_makers(folder: Path) -> None:
    """
    Raises:
        CheckpointError: ModelOpt says that it quantised the weights, in a way that the config.json need not tell; or it
            does not say so, and its scales are there.
    """
    if f'{NVFP4_SCALES}"'.encode() in _named_tensors(folder):
        raise CheckpointError(
            f"{folder}: found tensors *{NVFP4_SCALES}, as NVFP4 weights have them, wanted FP8 in blocks or floating-point "
            "ones; take the release that they were made of"
        )
    file = folder / MODELOPT_NAME
    if not file.is_file():
        return
    quantization = read_json(file, "what ModelOpt says of its weights").get("quantization")
    algorithm = quantization.get("quant_algo") if isinstance(quantization, dict) else None
    if algorithm is not None and not str(algorithm).startswith(MODELOPT_BLOCKS):
        raise CheckpointError(
            f"{file}: quant_algo: found {str(algorithm)[:80]!r}, wanted none: weights quantised by ModelOpt are not "
            "supported, only quant_method 'fp8' in blocks; take the release that they were made of"
        )


def _named_tensors(folder: Path) -> bytes:
    """The text that names a folder's tensors: its index, or the header of its only file; parsed by others, if it can be."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    try:
        if index.is_file():
            with index.open("rb") as stream:
                return stream.read(min(index.stat().st_size, MAX_BYTES))  # read(n) sets n bytes aside first
        if single.is_file():
            with single.open("rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                return stream.read(min(length, single.stat().st_size, MAX_HEADER_BYTES))
    except OSError:
        pass  # who reads it next says by name what is wrong with it
    return b""
