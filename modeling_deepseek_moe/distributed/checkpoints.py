"""Whether a checkpoint of `Trainer` that several processes wrote is whole, and which one is the newest that is.

FSDP2 writes ``pytorch_model_fsdp_0`` and ``optimizer_0`` (``SHARDED_STATE_DICT``) or ``pytorch_model_fsdp.bin`` and
``optimizer.bin`` (``FULL_STATE_DICT``). A rank that was killed in a save leaves one of them without its metadata, or with a shard that is
missing or short; trainer_state.json is written last, by rank 0, and says nothing of the other ranks' files.
"""

import re
import zipfile
from pathlib import Path

from transformers.utils import logging

from modeling_deepseek_moe.checkpoint.headers import CheckpointError
from modeling_deepseek_moe.checkpoint.jsonfile import read_json
from modeling_deepseek_moe.checkpoint.reader import CheckpointReader
from modeling_deepseek_moe.distributed.chunks import is_sharded, read_chunks

logger = logging.get_logger(__name__)
ADAPTER = "adapter_model.safetensors"
STATES_FOLDER = "sharded_states"  # the optimizer's, of a model that transformers divided (see `training.sharded`)
MODEL_FOLDER, OPTIMIZER_FOLDER = "pytorch_model_fsdp_0", "optimizer_0"
MODEL_FILE, OPTIMIZER_FILE = "pytorch_model_fsdp.bin", "optimizer.bin"
STATE = "trainer_state.json"


def checkpoints(folder: Path) -> list[Path]:
    """The ``checkpoint-N`` folders of a run, by step."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted((path for path in found if path.is_dir()), key=lambda path: int(path.name.partition("-")[2]))


def is_of_fsdp(checkpoint: Path) -> bool:
    """Whether FSDP wrote a checkpoint, which only FSDP resumes."""
    return any((checkpoint / name).exists() for name in (MODEL_FOLDER, MODEL_FILE))


def sharded_folder(checkpoint: Path) -> Path:
    """The folder of a checkpoint that holds the model's shards: one of its own, or the checkpoint itself.

    Raises:
        CheckpointError: there is none.
    """
    for folder in (checkpoint / MODEL_FOLDER, checkpoint):
        if is_sharded(folder):
            return folder
    if (checkpoint / MODEL_FOLDER).is_dir():
        raise CheckpointError(f"{checkpoint / MODEL_FOLDER}: found no .metadata: a save into it did not end")
    raise CheckpointError(
        f"{checkpoint}: found no sharded checkpoint, wanted one of SHARDED_STATE_DICT (fsdp_config) or of "
        "save_pretrained(distributed_checkpoint=True)"
    )


def fault_of(checkpoint: Path, adapter: bool = False) -> str | None:
    """What is wrong with a checkpoint of `Trainer`, which writes trainer_state.json last; ``None`` for nothing.

    Args:
        adapter: it is to hold an adapter, not a model.
    """
    if not checkpoint.is_dir():
        return "no such folder"
    if adapter and not (checkpoint / ADAPTER).is_file():
        return f"no {ADAPTER}"
    try:
        if not isinstance(read_json(checkpoint / STATE).get("global_step"), int):
            return f"a {STATE} without global_step"
        if is_of_fsdp(checkpoint):
            return _fsdp_fault(checkpoint)
        if adapter:
            CheckpointReader([checkpoint / ADAPTER])
        else:
            CheckpointReader.open(checkpoint)
        if (checkpoint / STATES_FOLDER).exists():
            read_chunks(checkpoint / STATES_FOLDER)
            return None
    except (CheckpointError, OSError) as error:
        return f"it damaged or cut short ({error})"
    for name in ("optimizer.pt", "scheduler.pt"):
        file = checkpoint / name
        if not file.exists():
            logger.warning(f"{file}: found none: training goes on with a new {file.stem}")
        elif not zipfile.is_zipfile(file):
            return f"{name} damaged or cut short"
    return None


def _fsdp_fault(checkpoint: Path) -> str | None:
    """
    Raises:
        CheckpointError: a part of the model or of the optimizer is missing or short.
    """
    if (checkpoint / MODEL_FOLDER).exists():
        read_chunks(sharded_folder(checkpoint))
        read_chunks(checkpoint / OPTIMIZER_FOLDER)
        return None
    for name in (MODEL_FILE, OPTIMIZER_FILE):
        file = checkpoint / name
        if not file.is_file():
            return f"no {name}"
        if not zipfile.is_zipfile(file):  # its directory lies at the end
            return f"{name} damaged or cut short"
    return None


def newest_whole(folder: Path) -> Path | None:
    """The newest ``checkpoint-N`` of a run that is whole; ``None`` if there is none."""
    return next((path for path in reversed(checkpoints(folder)) if fault_of(path) is None), None)
