"""``native-to-hf``: a release from the files of DeepSeek's own inference format (see `_native`)."""

from functools import partial
from pathlib import Path
from typing import cast

import torch

from modeling_deepseek_moe.checkpoint.headers import CheckpointError, TensorInfo
from modeling_deepseek_moe.checkpoint.reader import CheckpointReader
from modeling_deepseek_moe.checkpoint.writer import TensorPlan
from modeling_deepseek_moe.conversion._conversion import Conversion, Options, Output
from modeling_deepseek_moe.conversion._native import EXPERT, MTP_FILE, RANK_FILE, cut_dim, release_name
from modeling_deepseek_moe.conversion._source import Source, as_is


class Ranks(Source):
    """The files of all ranks of one world size, and the MTP module's, if there is one."""

    def __init__(self, folder: Path, files: list[Path]):
        self.ranks = [CheckpointReader([file]) for file in files]
        aside = Path(folder, MTP_FILE)
        self.mtp = CheckpointReader([aside] if aside.is_file() else [])
        super().__init__(folder, cast(CheckpointReader, _AllRanks([*self.ranks, self.mtp])))


class _AllRanks:
    """What a job asks of its source's reader, for several at once."""

    def __init__(self, ranks: list[CheckpointReader]):
        self.files = [file for rank in ranks for file in rank.files]
        self.nbytes = sum(rank.nbytes for rank in ranks)
        self.mapped = ranks[0].mapped
        for file in self.files:
            self.mapped.expect(file)


def open_ranks(folder: Path) -> Ranks:
    """
    Raises:
        CheckpointError: no rank files, one too few or too many, or those of two world sizes.
    """
    found = sorted(file for file in Path(folder).glob("model*-mp*.safetensors") if RANK_FILE.fullmatch(file.name))
    if not found:
        raise CheckpointError(f"{folder}: found no model{{rank}}-mp{{size}}.safetensors, wanted one a rank")
    size = int(RANK_FILE.fullmatch(found[0].name)[2])
    for file in found:
        if int(RANK_FILE.fullmatch(file.name)[2]) != size:
            raise CheckpointError(f"{file}: found a rank of another world size, wanted {size}, as {found[0].name}")
    if len(found) > size:
        last = max(found, key=lambda file: int(RANK_FILE.fullmatch(file.name)[1]))
        raise CheckpointError(f"{last}: found a rank beyond the world size {size}")
    names = {file.name for file in found}
    for rank in range(size):  # stops at the first that is absent: the size is only what a name says
        if f"model{rank}-mp{size}.safetensors" not in names:
            raise CheckpointError(
                f"{Path(folder, f'model{rank}-mp{size}.safetensors')}: found no such file, wanted {size} ranks as "
                f"{found[0].name} says"
            )
    return Ranks(folder, [Path(folder, f"model{rank}-mp{size}.safetensors") for rank in range(size)])


def plan(source: Ranks, options: Options) -> Output:
    """Parts joined again; what every rank repeats must be the same on all of them."""
    holders: dict[str, list[TensorInfo]] = {}
    for rank in source.ranks:
        for name, info in rank.items():
            holders.setdefault(name, []).append(info)
    plans, size = [], len(source.ranks)
    for native, infos in holders.items():
        name = release_name(native)
        dim = cut_dim(name)
        wanted = 1 if EXPERT.search(name) else size
        kinds = {(info.dtype, info.shape) for info in infos}
        if len(infos) != wanted or len(kinds) != 1:
            raise CheckpointError(
                f"{infos[0].file}: tensor {native}: found on {len(infos)} ranks in {len(kinds)} kinds, "
                f"wanted {wanted} alike"
            )
        shape = tuple(n * size if axis == dim else n for axis, n in enumerate(infos[0].shape))
        plans.append(TensorPlan(name, infos[0].dtype, shape, partial(_join, source, infos, dim)))
    return Output(plans + [as_is(source, info) for info in source.mtp.values()], source.config)


def _join(source: Source, infos: list[TensorInfo], dim: int | None) -> torch.Tensor:
    first = source.read(infos[0])
    if dim is not None:
        return torch.cat([first, *(source.read(info) for info in infos[1:])], dim)
    for info in infos[1:]:
        if not torch.equal(first.view(torch.uint8), source.read(info).view(torch.uint8)):
            raise CheckpointError(f"{info.file}: tensor {info.name}: found other bytes than in {infos[0].file}")
    return first


CONVERSION = Conversion("native-to-hf", plan, inverse="hf-to-native", open=open_ranks)
