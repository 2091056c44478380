"""``consolidate``: a sharded checkpoint of a training as a release-format folder, in one process and a few megabytes.

Each tensor of the release is read from the shards by ranges of rows: nothing is gathered. The dtype is the training's; what no
shard holds, the MTP layers' copies of embedding and head, is the model's own.
"""

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from modeling_deepseek_moe.anatomy import read_config
from modeling_deepseek_moe.checkpoint.headers import CheckpointError
from modeling_deepseek_moe.checkpoint.jsonfile import read_json
from modeling_deepseek_moe.checkpoint.mapped import MappedFiles
from modeling_deepseek_moe.checkpoint.writer import TensorPlan
from modeling_deepseek_moe.conversion._conversion import Conversion, Options, Output
from modeling_deepseek_moe.conversion._source import TILE_BYTES
from modeling_deepseek_moe.distributed.checkpoints import sharded_folder
from modeling_deepseek_moe.distributed.chunks import StoredTensor, read_chunks
from modeling_deepseek_moe.weights import release_tensors, stack_boxes

SHARED = {".embed_tokens.weight": "model.embed_tokens.weight", ".shared_head.head.weight": "lm_head.weight"}


class _Files:
    """What a run asks of its input's files: which they are, their bytes, and that they stay as they are."""

    def __init__(self, files: set[Path], nbytes: int):
        self.files, self.nbytes, self.mapped = sorted(files), nbytes, MappedFiles()
        for file in self.files:
            self.mapped.expect(file)


class ShardedSource:
    """The tensors of a sharded checkpoint by the model's names, to be read a range of rows at a time."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.tensors = read_chunks(sharded_folder(self.folder))
        parts = [chunk for tensor in self.tensors.values() for chunk in tensor.chunks]
        self.reader = _Files({chunk.file for chunk in parts}, sum(chunk.length for chunk in parts))


def plan(source: ShardedSource, options: Options) -> Output:
    """Every tensor of the release, from the boxes of it that the shards hold.

    Raises:
        CheckpointError: a tensor of the config is missing, has another shape, or is none of the config's.
        ValueError: no config.json, or an adapter's checkpoint.
    """
    file = _config_file(source.folder, options.config)
    config = read_config(file)
    if any(".lora_" in name for name in source.tensors):
        raise ValueError(
            f"{source.folder}: found an adapter's tensors, wanted a model's: train it with fsdp_config state_dict_type "
            "FULL_STATE_DICT, whose checkpoints hold the adapter's folder"
        )
    tensors = {name.removeprefix("module."): tensor for name, tensor in source.tensors.items()}
    parts = {}
    for name, tensor in tensors.items():
        parts |= {part: (tensor, offsets, sizes) for part, offsets, sizes in stack_boxes(name, tensor.shape)}
    plans = []
    for name, spec in release_tensors(config).items():
        kept = next((owner for end, owner in SHARED.items() if name.endswith(end) and name not in parts), name)
        if kept not in parts:
            raise CheckpointError(
                f"{source.folder}: tensor {name}: found none, wanted {list(spec.shape)} as {file} says"
            )
        tensor, offsets, sizes = parts[kept]
        shape = sizes[len(sizes) - len(spec.shape) :]
        if shape != spec.shape:
            raise CheckpointError(
                f"{source.folder}: tensor {name}: found {list(shape)}, wanted {list(spec.shape)} as {file} says: a shard is "
                "missing, or the config is another model's"
            )
        made = partial(_tiles, tensor, offsets, sizes, shape)
        plans.append(TensorPlan(config.names.released(name), tensor.dtype, shape, made))
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    unknown = sorted(parts.keys() - release_tensors(config).keys() - tied)
    if unknown:
        raise CheckpointError(
            f"{source.folder}: tensor {unknown[0]}: found one that {file} does not speak of, wanted none"
        )
    fields = dict(read_json(file, "the config of the checkpoint"))
    fields.pop("quantization_config", None)
    fields["torch_dtype"] = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    fields.pop("dtype", None)
    return Output(plans, fields, decided_by=[fields])


def _config_file(folder: Path, given: Path | None) -> Path:
    """Sharded checkpoints hold none: the given one, or that of the run."""
    places = [given] if given is not None else [folder, folder.parent]
    for place in places:
        file = place / "config.json" if place.is_dir() else place
        if file.is_file():
            return file
    raise ValueError(
        f"{places[0]}: found no config.json, wanted the model's: --config FOLDER that the training started from"
    )


def _tiles(
    tensor: StoredTensor, offsets: tuple[int, ...], sizes: tuple[int, ...], shape: tuple[int, ...]
) -> Iterator[torch.Tensor]:
    """A box of a tensor in ranges of its rows, as ``shape`` without the leading dimensions of 1."""
    if not shape:
        yield tensor.read(offsets, sizes)
        return
    at = len(sizes) - len(shape)
    width = max(1, math.prod(shape[1:]) * tensor.dtype.itemsize)
    step = max(1, TILE_BYTES // width)
    for first in range(0, shape[0], step):
        rows = min(step, shape[0] - first)
        begin = (*offsets[:at], offsets[at] + first, *offsets[at + 1 :])
        yield tensor.read(begin, (*sizes[:at], rows, *sizes[at + 1 :])).reshape(rows, *shape[1:])


CONVERSION = Conversion(
    "consolidate",
    plan,
    options=("max_shard_size", "config"),
    no_inverse="a training on several processes makes its own shards",
    open=ShardedSource,
)
