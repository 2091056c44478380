"""Whether all ranks are about to do the same: the same packages, config and settings, before a collective waits for one that is not.

A rank with another config would be an error deep in a library, or a wait until the process group's time-out.
"""

import json
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import TypeVar, cast

from torch import distributed

from modeling_deepseek_moe.checkpoint.headers import CheckpointError

Result = TypeVar("Result")
PACKAGES = ("modeling_deepseek_moe", "transformers", "accelerate", "torch", "peft", "bitsandbytes")


def check_ranks(**facts: Mapping | str | int | None) -> None:
    """Compare what the ranks have, package versions besides. Called on all ranks; on one process it does nothing.

    Args:
        facts: by name, as JSON has them: configs field by field.

    Raises:
        ValueError: on every rank, where one differs from rank 0: names the rank, the field and both values.
    """
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return
    own = _flat({"package": {name: _version(name) for name in PACKAGES}, **facts})
    everyone: list[dict[str, str]] = [{} for _ in range(distributed.get_world_size())]
    distributed.all_gather_object(everyone, own)
    first = everyone[0]
    faults = [
        f"rank {rank}: {name}: found {theirs.get(name, 'none')}, wanted {first.get(name, 'none')} as on rank 0"
        for rank, theirs in enumerate(everyone)
        for name in sorted(theirs.keys() | first.keys())
        if theirs.get(name) != first.get(name)
    ]
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise ValueError(f"{faults[0]}{more}: the ranks of a training have one config and one set of packages")


def on_all_ranks(do: Callable[[], Result]) -> Result:
    """What ``do`` returns, once it has succeeded on every rank. It must not wait for other ranks.

    Raises:
        OSError, ValueError, CheckpointError: as ``do`` raised on this rank; a ValueError that names the rank and what it said, on the
            others.
    """
    result, failure = None, None
    try:
        result = do()
    except (OSError, ValueError, CheckpointError) as error:
        failure = error
    if distributed.is_available() and distributed.is_initialized():
        said: list[str | None] = [None] * distributed.get_world_size()
        distributed.all_gather_object(said, None if failure is None else str(failure))
        other = next(((rank, text) for rank, text in enumerate(said) if text is not None), None)
        if failure is None and other is not None:
            raise ValueError(f"rank {other[0]} failed: {other[1]}")
    if failure is not None:
        raise failure
    return cast(Result, result)


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "none"


def _flat(facts: Mapping, prefix: str = "") -> dict[str, str]:
    """``{"config": {"hidden_size": 64}}`` → ``{"config.hidden_size": "64"}``."""
    flat: dict[str, str] = {}
    for name, value in facts.items():
        if isinstance(value, Mapping):
            flat |= _flat({str(key): part for key, part in value.items()}, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = json.dumps(value, default=str, sort_keys=True)
    return flat
