"""What the control groups of this process allow it: memory and processor time, on the whole path up to the root.

A container, a batch system or a service manager may set its limit at the process's own group, or at any above it; each
holds for all below. cgroup v2 and v1, and systems that mount both, are read alike.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path("/sys/fs/cgroup")
PROCESS = Path("/proc/self/cgroup")
MEMORY, CPU = "memory", "cpu"
# a v1 group without a limit has the largest number of pages that fit; nothing has an exabyte
UNLIMITED = 1 << 60


class Memory(NamedTuple):
    """The smallest limit in bytes, and the least that is left below any: each ``None`` where there is no limit."""

    limit: int | None
    available: int | None


def memory(root: Path = ROOT, process: Path = PROCESS) -> Memory:
    """The memory that the groups of this process allow. Cached file pages that would go are not counted as used."""
    limits, left = [], []
    for folder in _folders(MEMORY, root, process):
        stat = _statistics(folder / "memory.stat")
        pages = stat.get("total_inactive_file", stat.get("inactive_file", 0))
        for limit_name, usage_name in (
            ("memory.max", "memory.current"),
            ("memory.high", "memory.current"),  # above it a process is held up until it hardly runs
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            limit, usage = _number(folder / limit_name), _number(folder / usage_name)
            if limit is not None and limit < UNLIMITED:
                limits.append(limit)
                left.append(max(0, limit - max(0, (usage or 0) - pages)))
        # of all groups above, also of those that a container does not see
        limit = stat.get("hierarchical_memory_limit", UNLIMITED)
        if limit < UNLIMITED:
            limits.append(limit)
    return Memory(min(limits, default=None), min(left, default=None))


def cpus(root: Path = ROOT, process: Path = PROCESS) -> float | None:
    """The processors' time that the groups of this process may use, in processors; ``None`` without a quota."""
    quotas = []
    for folder in _folders(CPU, root, process):
        quota, period = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
        words = _words(folder / "cpu.max")
        if len(words) == 2 and all(word.isdecimal() for word in words):
            quota, period = int(words[0]), int(words[1])
        if quota is not None and period and quota > 0:
            quotas.append(quota / period)
    return min(quotas, default=None)


def threads(wanted: int, root: Path = ROOT, process: Path = PROCESS) -> int:
    """``wanted`` threads, or as many as have a processor of their own under the quota, at least one.

    More would use the quota up while they wait for each other, and then all of them stand still.
    """
    allowed = cpus(root, process)
    return wanted if allowed is None else max(1, min(wanted, math.floor(allowed)))


def _folders(controller: str, root: Path, process: Path) -> Iterator[Path]:
    """The folders of a controller's groups, the process's own first; each once, those alone that are there.

    What ``/proc/self/cgroup`` says may be a path of the host where a container sees its own group as the root: a part of
    it that is not there is skipped, the root never.
    """
    paths = {"": "/"}  # by controller; v2 has none, and one path for all
    for line in _lines(process):
        _, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        paths |= dict.fromkeys(names.split(","), path)
    seen = set()
    # v2 alone, next to v1, and v1, whose controllers may share a folder
    mounts = [(root, paths[""]), (root / "unified", paths[""])]
    mounts += [(folder, paths.get(controller, "/")) for folder in _mounts(controller, root)]
    for mount, path in mounts:
        parts = [part for part in path.split("/") if part not in ("", ".", "..")]
        for count in range(len(parts), -1, -1):
            folder = mount.joinpath(*parts[:count])
            if folder not in seen and folder.is_dir():
                seen.add(folder)
                yield folder


def _mounts(controller: str, root: Path) -> list[Path]:
    try:
        return sorted(folder for folder in root.iterdir() if controller in folder.name.split(","))
    except OSError:
        return []


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(errors="replace").splitlines()
    except OSError:
        return []


def _words(file: Path) -> list[str]:
    return " ".join(_lines(file)).split()


def _number(file: Path) -> int | None:
    """``None`` where there is no such file, or no number in it (``max``)."""
    words = _words(file)
    return int(words[0]) if words and words[0].lstrip("-").isdecimal() else None


def _statistics(file: Path) -> dict[str, int]:
    pairs = (line.split() for line in _lines(file))
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdecimal()}
