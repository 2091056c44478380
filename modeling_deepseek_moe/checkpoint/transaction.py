"""Several files of a folder take their names together, or none does, even if the process is killed in between.

All of them lie finished under temporary names when a record of the renames to come is written. The first rename decides:
before it, whoever finds the record (the next load or save) puts everything back; after it, they do the rest. So a
config.json, which is renamed first, always belongs to the weights that are found with it.
"""

from collections.abc import Collection, Mapping
from pathlib import Path

from transformers.utils import logging

from modeling_deepseek_moe.checkpoint.atomic import LEFTOVER, copy_flushed, flush_folder, temporary_path, write_file
from modeling_deepseek_moe.checkpoint.headers import CheckpointError
from modeling_deepseek_moe.checkpoint.journal import to_json
from modeling_deepseek_moe.checkpoint.jsonfile import read_json
from modeling_deepseek_moe.checkpoint.lock import locked_folder

RECORD_NAME = ".deepseek-moe-save.json"

logger = logging.get_logger(__name__)


def move_in(folder: Path, texts: Mapping[str, Path], weights: Mapping[str, Path], leaving: Collection[str]) -> None:
    """Give finished files their names, in place of an earlier save's; an error puts those back.

    The caller holds the folder's lock. Texts are replaced one by one, in their order. Then the old weights leave, and
    the new ones come: shards of two saves never lie together under their final names.

    Args:
        texts, weights: temporary files by the name that each takes.
        leaving: names of the weights that are there.
    """
    files = {name: path.name for name, path in {**texts, **weights}.items()}
    replaced = [name for name in texts if (folder / name).is_file()]
    aside = {name: temporary_path(folder / name, "old").name for name in (*replaced, *leaving)}
    try:
        for name in replaced:  # copied: a config.json that is away for a moment may be looked for just then
            copy_flushed(folder / name, folder / aside[name])
        write_file(folder / RECORD_NAME, to_json({"files": files, "aside": aside}))
        for name, path in texts.items():
            path.replace(folder / name)
        for name in leaving:
            (folder / name).replace(folder / aside[name])
        for name, path in weights.items():
            path.replace(folder / name)
        flush_folder(folder)
    except BaseException:
        # Backwards, and by renames: a kill in the middle of this is found as one in the middle of the way there.
        for name, temporary in reversed(files.items()):
            if not (folder / temporary).exists():
                (folder / name).replace(folder / temporary)
        _go_back(folder, files, aside)
        raise
    _go_on(folder, files, aside)


def recover(folder: Path) -> None:
    """End a save that was killed between its renames, if there is one: nothing is lost.

    Raises:
        CheckpointError: it cannot be ended: a save goes on at this moment, or the folder cannot be written to.
    """
    record = folder / RECORD_NAME
    if not record.is_file():
        return
    try:
        with locked_folder(folder):
            finish(folder)
    except BlockingIOError:
        raise CheckpointError(
            f"{folder}: found a save into it under way, wanted a finished one: try again in a moment"
        ) from None
    except OSError as error:
        raise CheckpointError(
            f"{record}: found a save that was killed between its renames, wanted to finish it, which failed "
            f"({error.strerror or error}): save once more, or open the folder where it can be written to"
        ) from error


def finish(folder: Path) -> None:
    """As `recover`, for who holds the folder's lock."""
    if not (folder / RECORD_NAME).is_file():
        return
    files, aside = _read_record(folder)
    if (folder / next(iter(files.values()))).exists():
        _go_back(folder, files, aside)
        logger.warning(
            f"{folder}: a save into it was killed before its files took their names; the one before is kept."
        )
    else:
        _go_on(folder, files, aside)
        logger.warning(f"{folder}: a save into it was killed while its files took their names; they have them now.")


def _read_record(folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """A folder may come from anywhere: nothing outside it, and no file but those of a save, is ever renamed."""
    file = folder / RECORD_NAME
    record = read_json(file, "the renames of a save")
    files, aside = record.get("files"), record.get("aside")
    for names in (files, aside):
        for name, other in names.items() if isinstance(names, dict) else (("", ""),):
            match = LEFTOVER.fullmatch(str(other))
            if not (match and match[1] == name and Path(name).name == name == str(name) and Path(other).name == other):
                raise CheckpointError(f"{file}: found {name!r}: {other!r}, wanted names of a save: remove this file")
    if not files:
        raise CheckpointError(f"{file}: found no files, wanted those of a save: remove this file")
    return files, aside


def _go_back(folder: Path, files: Mapping[str, str], aside: Mapping[str, str]) -> None:
    for name, old in aside.items():
        if (folder / old).exists():
            (folder / old).replace(folder / name)
    for temporary in files.values():
        (folder / temporary).unlink(missing_ok=True)
    _forget(folder)


def _go_on(folder: Path, files: Mapping[str, str], aside: Mapping[str, str]) -> None:
    for name in aside.keys() - files.keys():
        (folder / name).unlink(missing_ok=True)
    for name, temporary in files.items():
        if (folder / temporary).exists():
            (folder / temporary).replace(folder / name)
    for old in aside.values():
        (folder / old).unlink(missing_ok=True)
    _forget(folder)


def _forget(folder: Path) -> None:
    flush_folder(folder)
    (folder / RECORD_NAME).unlink(missing_ok=True)
