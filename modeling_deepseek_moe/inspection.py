"""Looking at a checkpoint folder without loading it: config and headers against each other, in seconds.

Only ``config.json``, the shard index and the safetensors headers are read, so a 685 GB folder takes as long as its
163 headers. What is reported is what loading would refuse, by the same rules (`Release.problems`) except for the
values of the scales, which are not in the headers.
"""

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import cast

import torch

from modeling_deepseek_moe.anatomy import PARTS, ParameterBreakdown, describe, parameter_breakdown, read_config
from modeling_deepseek_moe.bnb.formats import BLOCK, check_storage, is_bitsandbytes, split_part
from modeling_deepseek_moe.checkpoint.headers import CheckpointError, TensorInfo, read_header
from modeling_deepseek_moe.checkpoint.index import resolve_shards
from modeling_deepseek_moe.checkpoint.reader import CheckpointReader
from modeling_deepseek_moe.config import quantization_fields
from modeling_deepseek_moe.formats import split_scale
from modeling_deepseek_moe.release import Problem, Release
from modeling_deepseek_moe.weights import EXPERT_KEY, TensorSpec, release_tensors

GENERATING = ("ForCausalLM", "ForConditionalGeneration")  # what the architectures with a head are called
CLASSIFIER = "score."  # the head of a classification model, which no release has


@dataclass
class Tally:
    """Tensors, values and bytes that have something in common."""

    tensors: int = 0
    values: int = 0
    nbytes: int = 0

    def add(self, info: TensorInfo) -> None:
        self.tensors += 1
        self.values += info.nbytes // info.dtype.itemsize
        self.nbytes += info.nbytes


@dataclass(frozen=True)
class Finding:
    """Something wrong with a folder, or odd about it.

    ``kind`` is ``file`` (a shard or the index), one of `Problem`'s kinds, or, for what does not stop a load,
    ``ignored`` (a tensor that no model of this config has) or ``no mtp``.
    """

    kind: str
    where: str
    message: str
    fatal: bool = True


@dataclass
class Inspection:
    """What a folder holds, and what is wrong with it. ``parts`` are `PARTS`, ``scales`` and ``other``."""

    folder: str
    architecture: dict[str, str]
    breakdown: ParameterBreakdown
    shards: int = 0
    total: Tally = field(default_factory=Tally)
    dtypes: dict[str, Tally] = field(default_factory=dict)
    parts: dict[str, Tally] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    @property
    def is_loadable(self) -> bool:
        """Whether nothing in the headers stands against loading the folder as it is."""
        return not any(finding.fatal for finding in self.findings)

    def findings_by_kind(self) -> dict[str, list[Finding]]:
        kinds: dict[str, list[Finding]] = {}
        for finding in self.findings:
            kinds.setdefault(finding.kind, []).append(finding)
        return kinds


class _Headers(dict[str, TensorInfo]):
    """All headers that could be read, in place of a `CheckpointReader`, which stops at the first that cannot."""

    def __init__(self, files: list[Path]):
        super().__init__()
        self.files = files


def inspect_checkpoint(
    folder: str | os.PathLike, on_shard: Callable[[int, int], None] = lambda done, total: None
) -> Inspection:
    """Read the headers of a folder and compare them with its config.

    Args:
        on_shard: called after every shard with the shards done and all shards.

    Raises:
        ValueError: no usable config, or codes of bitsandbytes in another dtype than bytes'.
        CheckpointError: no weights at all, or an index that cannot be used.
    """
    folder = Path(folder)
    config = read_config(folder)
    check_storage(quantization_fields(config))
    found = Inspection(str(folder), describe(config), parameter_breakdown(config))
    files, weight_map = resolve_shards(folder, must_exist=False)
    found.shards = len(files)
    shards = {name: folder / shard for name, shard in (weight_map or {}).items()}
    headers, unread = _read_headers(files, shards, found, on_shard)
    _check_index(headers, shards, unread, found)

    release = Release(cast(CheckpointReader, headers), config)
    if config.num_nextn_predict_layers and not release.has_mtp and not unread:
        message = f"the config announces {config.num_nextn_predict_layers} MTP layer(s), the files have none"
        found.findings.append(Finding("no mtp", str(folder), f"{message}: the model loads without", fatal=False))
        config.num_nextn_predict_layers = 0
    in_unread = {release.canonical(name) for name, file in shards.items() if file in unread}
    architectures = config.architectures or ["ForCausalLM"]
    needs_head = architectures[0].endswith(GENERATING) and not config.tie_word_embeddings
    refused = set()
    foreign = is_bitsandbytes(quantization_fields(config))
    problems = _bitsandbytes_problems if foreign else partial(Release.problems, read_values=False)
    for problem in problems(release, needs_head):
        refused.add(problem.name)
        if not _is_explained(problem, in_unread):
            found.findings.append(_finding(problem, folder))
    found.findings.extend(_mixed_experts(release, folder))
    _tally(release, release_tensors(config), refused, found)
    return found


def _bitsandbytes_problems(release: Release, needs_head: bool) -> Iterator[Problem]:
    """Weights that are missing, or have another number of values than the config wants, of a folder that bitsandbytes' layers saved."""
    for name, spec in release_tensors(release.config).items():
        if name == "lm_head.weight" and (release.lacks_prefix or not needs_head):
            continue
        info, count = release.infos.get(name), math.prod(spec.shape)
        if info is None:
            yield Problem("missing", name, None, "no such tensor", f"{list(spec.shape)} by the config")
            continue
        wanted = math.ceil(count / 2) if info.dtype == torch.uint8 else count
        if math.prod(info.shape) != wanted:
            why = f"{wanted} values for {list(spec.shape)} by the config"
            yield Problem("shape", info.name, info, f"shape {list(info.shape)} in {info.dtype}", why)
        if info.dtype in (torch.uint8, torch.int8):
            yield from _scale_problem(release, name, info, math.ceil(count / BLOCK), spec.shape[0])


def _scale_problem(release: Release, name: str, info: TensorInfo, blocks: int, rows: int) -> Iterator[Problem]:
    """The scales of codes: one for each of a 4-bit weight's blocks, or for each row of int8."""
    if info.dtype == torch.uint8:
        scale, wanted = f"{name}.absmax", blocks
    else:
        scale, wanted = f"{name.removesuffix('weight')}SCB", rows
    found = release.infos.get(scale)
    if found is None:
        yield Problem("scale", info.name, info, f"codes without {scale}", f"{wanted} scales")
    elif math.prod(found.shape) != wanted:
        yield Problem("scale", found.name, found, f"shape {list(found.shape)}", f"{wanted} scales for {name}")


def _mixed_experts(release: Release, folder: Path) -> Iterator[Finding]:
    """Layers whose routed experts are quantised in part, which only loads dequantised: the first other tensor of each."""
    layers: dict[str, dict[bool, TensorInfo]] = {}
    for name, info in release.infos.items():
        expert = EXPERT_KEY.match(name)
        if expert and split_scale(name)[1] is None:
            layers.setdefault(expert[1], {}).setdefault(release.is_quantized(name), info)
    for kinds in layers.values():
        if len(kinds) > 1:
            info = kinds[False]
            message = f"{info.name}: found dtype {info.dtype}, wanted {release.weight_format.code_dtype} like the layer's other experts"
            yield Finding("dtype", info.file.relative_to(folder).as_posix(), message)


def _read_headers(
    files: list[Path], shards: dict[str, Path], found: Inspection, on_shard: Callable[[int, int], None]
) -> tuple[_Headers, set[Path]]:
    """Headers by tensor name, and the files whose header cannot be read. ``shards``: where the index has each tensor."""
    headers, unread = _Headers(files), set()
    for done, file in enumerate(files, 1):
        try:
            tensors = read_header(file)
        except CheckpointError as error:
            unread.add(file)
            lost = sum(shard == file for shard in shards.values())
            message = str(error).removeprefix(f"{file}: ") + (f" ({lost} tensors)" if lost else "")
            found.findings.append(Finding("file", file.name, message))
            tensors = {}
        for name, info in tensors.items():
            if name in headers:
                message = f"tensor {name}: found again, it is also in {headers[name].file.name}"
                found.findings.append(Finding("file", file.name, message))
            headers[name] = info
        on_shard(done, len(files))
    return headers, unread


def _check_index(headers: _Headers, shards: dict[str, Path], unread: set[Path], found: Inspection) -> None:
    for name, file in shards.items():
        info = headers.get(name)
        if file not in unread and (info is None or info.file != file):
            where = "absent" if info is None else f"in {info.file.name}"
            message = f"tensor {name}: the index says it is here, found it {where}"
            found.findings.append(Finding("file", file.name, message))


def _is_explained(problem: Problem, in_unread: set[str]) -> bool:
    """Whether what is missing, a tensor or one of a weight and its scale, is in a shard that is reported already."""
    if problem.kind == "scale":
        weight, _ = split_scale(problem.name)
        return any(split_scale(name)[0] == weight for name in in_unread)
    return problem.info is None and problem.name in in_unread


def _finding(problem: Problem, folder: Path) -> Finding:
    where = "" if problem.info is None else problem.info.file.relative_to(folder).as_posix()
    return Finding(problem.kind, where, f"{problem.name}: found {problem.found}, wanted {problem.wanted}")


def _tally(release: Release, specs: dict[str, TensorSpec], refused: set[str], found: Inspection) -> None:
    """Count every tensor by dtype and by part; those that belong to no part are ``other``."""
    parts = {part: Tally() for part in (*PARTS, "scales", "other")}
    for name, info in (release.infos | release.carried).items():
        weight, suffix = split_part(name)
        if name in specs:
            part = specs[name].part
        elif suffix and weight in specs:
            part = "scales"
        elif name.startswith(CLASSIFIER):
            part = "head"
        else:
            part = "other"
            if info.name not in refused and name not in release.carried:
                message = f"{info.name}: {info.dtype} {list(info.shape)} has no place in this model"
                found.findings.append(Finding("ignored", info.file.name, message, fatal=False))
        dtype = str(info.dtype).removeprefix("torch.")
        for tally in (found.total, parts[part], found.dtypes.setdefault(dtype, Tally())):
            tally.add(info)
    found.parts = {part: tally for part, tally in parts.items() if tally.tensors}
