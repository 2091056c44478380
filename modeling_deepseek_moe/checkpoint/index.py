"""Which files a checkpoint folder consists of: one file, or shards with an index that names each tensor's."""

import json
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from modeling_deepseek_moe.checkpoint.contents import describe
from modeling_deepseek_moe.checkpoint.headers import CheckpointError, check_is_regular
from modeling_deepseek_moe.checkpoint.jsonfile import read_json
from modeling_deepseek_moe.checkpoint.transaction import recover

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
SHARD_NAME = re.compile(r"model-\d{5,}-of-\d{5,}\.safetensors")


def has_weights(folder: Path) -> bool:
    """Whether there is anything to load, once a save that was killed is ended (see `recover`)."""
    recover(folder)
    return any(_is_there(folder / name) for name in (WEIGHTS_NAME, INDEX_NAME))


def _is_there(file: Path) -> bool:
    """As `Path.is_file`, but a pipe or a device, which would be opened sooner or later, is an error."""
    if not _exists(file) or file.is_dir():
        return False
    check_is_regular(file, file.stat())
    return True


def resolve_shards(folder: Path, *, must_exist: bool = True) -> tuple[list[Path], dict[str, str] | None]:
    """The shard files of a folder and the index's weight map (``None`` for a single file, which comes first).

    With ``must_exist=False`` shards may be absent, as in the midst of a download. A save that was killed between its
    renames is ended first.

    Raises:
        CheckpointError: nothing to load, a malformed index, or an index naming a path outside the folder.
    """
    recover(folder)
    index_file = folder / INDEX_NAME
    if _is_there(folder / WEIGHTS_NAME):
        return [folder / WEIGHTS_NAME], None
    if not _is_there(index_file):
        found = describe(folder) or f"found neither {WEIGHTS_NAME} nor {INDEX_NAME}, wanted one of them"
        raise CheckpointError(f"{folder}: {found}")
    index = read_json(index_file, "metadata, weight_map")
    try:
        weight_map = index["weight_map"]
        # transformers, which reads the index again, fails without metadata
        if not (weight_map and isinstance(weight_map, dict) and isinstance(index["metadata"], dict)):
            raise ValueError("empty, or no JSON object")
    except (ValueError, KeyError) as error:
        raise CheckpointError(
            f"{index_file}: found no usable index ({error!r}), wanted metadata, weight_map"
        ) from None
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard.isprintable():
            raise CheckpointError(
                f"{index_file}: tensor {name}: found {str(shard)[:80]!r}, wanted the name of a shard"
            )
    shards = {shard: name for name, shard in reversed(weight_map.items())}  # with the first tensor of each
    for shard, name in sorted(shards.items()):
        path = PurePosixPath(shard.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts or ":" in shard or not path.parts:
            raise CheckpointError(
                f"{index_file}: tensor {name}: found shard path {shard!r}, wanted a path inside {folder}"
            )
        if must_exist and not _exists(folder / shard):
            raise CheckpointError(f"{index_file}: tensor {name}: found no file {shard} in {folder}, wanted that shard")
        if must_exist:
            check_is_regular(folder / shard, (folder / shard).stat())
    return [folder / shard for shard in sorted(shards)], weight_map


def _exists(file: Path) -> bool:
    """As `Path.exists`; False too for a name that is too long, and for links in a circle."""
    try:
        return file.exists()
    except OSError:
        return False


def index_text(shards: Mapping[str, list]) -> str:
    """The index of shards of `writer.TensorPlan`, by file name."""
    total = sum(plan.nbytes for plans in shards.values() for plan in plans)
    weight_map = {plan.name: file for file, plans in shards.items() for plan in plans}
    return (
        json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}, indent=2)
        + "\n"
    )


def is_weights(name: str) -> bool:
    """Whether a file is what a save names its shards and index, and so would be read as part of the checkpoint."""
    return name in (WEIGHTS_NAME, INDEX_NAME) or bool(SHARD_NAME.fullmatch(name))
