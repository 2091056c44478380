"""``verify``: a release against its own config, every value looked at, every file hashed, in one pass over the bytes."""

import hashlib
import os
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

from modeling_deepseek_moe import formats
from modeling_deepseek_moe.checkpoint.atomic import write_file
from modeling_deepseek_moe.checkpoint.headers import CheckpointError, TensorInfo, read_header
from modeling_deepseek_moe.checkpoint.ranges import read_range
from modeling_deepseek_moe.checkpoint.scales import WANTED_SCALES, are_usable
from modeling_deepseek_moe.inspection import Finding, inspect_checkpoint

CHUNK = 16 << 20
SUM_LINE = re.compile(r"([0-9a-fA-F]{64}) [ *](.+)")


@dataclass
class Verification:
    """What was found. ``sums``: sha256 by file name, for every file of the folder that is not hidden."""

    findings: list[Finding] = field(default_factory=list)
    sums: dict[str, str] = field(default_factory=dict)
    nbytes: int = 0

    @property
    def is_sound(self) -> bool:
        return not any(finding.fatal for finding in self.findings)


def folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in _files(folder))


def verify(
    folder: Path,
    wanted_sums: dict[str, str] | None = None,
    *,
    workers: int = 1,
    report: Callable[[int], None] = lambda nbytes: None,
) -> Verification:
    """Read every file of a folder once.

    Args:
        wanted_sums: sha256 by file name; another one, or a file that is absent, is a finding.
        report: told of bytes read, from several threads.

    Raises:
        ValueError: no usable config.
        CheckpointError: no weights at all, or an index that cannot be used.
    """
    folder = Path(folder)
    result = Verification(findings=list(inspect_checkpoint(folder).findings))
    lock = threading.Lock()

    def told(nbytes: int) -> None:
        with lock:
            report(nbytes)

    with ThreadPoolExecutor(workers) as pool:
        files = _files(folder)
        for file, (digest, size, findings) in zip(
            files, pool.map(lambda f: _verify_file(f, told), files), strict=True
        ):
            result.sums[file.relative_to(folder).as_posix()] = digest
            result.nbytes += size
            result.findings += findings
    for name, wanted in (wanted_sums or {}).items():
        found = result.sums.get(name, "no such file")
        if found != wanted:
            result.findings.append(Finding("sha256", name, f"found {found}, wanted {wanted}"))
    return result


def read_sums(file: Path) -> dict[str, str]:
    """A list as ``sha256sum`` writes it."""
    sums = {}
    for number, line in enumerate(file.read_text().splitlines(), 1):
        match = SUM_LINE.fullmatch(line)
        if match is None:
            raise CheckpointError(f"{file}: line {number}: found {line[:80]!r}, wanted a sha256 and a file name")
        sums[match[2].removeprefix("./")] = match[1].lower()
    if not sums:
        raise CheckpointError(f"{file}: found nothing, wanted lines of a sha256 and a file name")
    return sums


def write_sums(file: Path, sums: dict[str, str]) -> None:
    """A list that ``sha256sum -c``, run inside the folder, checks."""
    write_file(file, "".join(f"{digest}  {name}\n" for name, digest in sums.items()))


def _files(folder: Path) -> list[Path]:
    """Also those of folders inside, where an index may say that shards are."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path for path in paths if not any(part.startswith(".") for part in path.relative_to(folder).parts))


def _verify_file(file: Path, report: Callable[[int], None]) -> tuple[str, int, list[Finding]]:
    digest, size, findings = hashlib.sha256(), 0, []
    try:
        infos = (
            sorted(read_header(file).values(), key=lambda info: info.start) if file.suffix == ".safetensors" else []
        )
    except CheckpointError:
        infos = []  # the inspection has said so; its bytes are hashed all the same
    bad: dict[str, str] = {}
    with file.open("rb", buffering=0) as stream:
        for info, data in _pieces(stream, infos, os.fstat(stream.fileno()).st_size):
            digest.update(data)
            size += len(data)
            report(len(data))
            problem = _problem(info, data) if info is not None and info.name not in bad else None
            if problem:
                bad[info.name] = problem
                findings.append(Finding("values", file.name, f"{info.name}: found {problem}"))
    return digest.hexdigest(), size, findings


def _pieces(stream, infos: list[TensorInfo], size: int) -> Iterator[tuple[TensorInfo | None, memoryview]]:
    """All bytes in order, whole values of one tensor at a time; what belongs to none comes with ``None``."""
    position, buffer = 0, memoryview(bytearray(CHUNK))
    for info in (*infos, None):
        for owner, end in ((None, info.start if info else size), (info, info.end if info else size)):
            while position < end:
                data = buffer[: min(CHUNK, end - position)]  # of whole values: a chunk is, and a tensor is
                read_range(stream, position, data, stream.name)
                position += len(data)
                yield owner, data


def _problem(info: TensorInfo, data: memoryview) -> str | None:
    suffix = formats.split_scale(info.name)[1]
    # bitsandbytes has a scale of 0 for a block of zeros, and tables next to the scales
    is_scale = any(suffix == row.scale_suffix for row in formats.FORMATS if not row.foreign)
    form = None if suffix is not None else next(formats.of_codes(info.dtype), None)
    if form is not None and form.nan_code is not None:
        codes = torch.frombuffer(data, dtype=torch.uint8)
        return "NaN codes, wanted numbers" if bool(codes.bitwise_and(0x7F).max() == form.nan_code) else None
    if not info.dtype.is_floating_point:
        return None
    values = torch.frombuffer(data, dtype=info.dtype)
    if info.dtype in (torch.float8_e5m2, torch.float8_e8m0fnu):  # which torch compares in no other way
        values = values.float()
    low, high = (value.item() for value in values.aminmax())  # a NaN makes both NaN
    if not (float("-inf") < low and high < float("inf")):
        return "NaN or Inf, wanted finite values"
    if is_scale and not are_usable(values):
        return f"a scale of {low}, wanted {WANTED_SCALES}"
    return None
