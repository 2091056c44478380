"""``hf-to-native``: a release in DeepSeek's own inference format (see `_native`), cut for a number of ranks."""

from collections.abc import Iterator
from functools import partial

import torch

from modeling_deepseek_moe.checkpoint.headers import CheckpointError, TensorInfo
from modeling_deepseek_moe.checkpoint.writer import TensorPlan
from modeling_deepseek_moe.conversion import mtp
from modeling_deepseek_moe.conversion._conversion import Conversion, Options, Output
from modeling_deepseek_moe.conversion._native import EXPERT, MTP_FILE, cut_dim, native_name
from modeling_deepseek_moe.conversion._source import Source, as_is
from modeling_deepseek_moe.weights import HEAD_KEY

MAX_RANKS = 4096  # more than any cluster that serves one model has


def plan(source: Source, options: Options) -> Output:
    """One file a rank. Every cut falls between blocks of scales, or there is an error."""
    world_size = 1 if options.world_size is None else options.world_size
    if not 1 <= world_size <= MAX_RANKS:
        raise ValueError(f"--world-size {world_size} is not a number of ranks, wanted 1 to {MAX_RANKS}")
    experts = source.config.get("n_routed_experts") or 0
    if experts % world_size:
        raise CheckpointError(f"{source.folder}: found {experts} routed experts, wanted a multiple of {world_size}")
    ranks: list[list[TensorPlan]] = [[] for _ in range(world_size)]
    mtp_names = mtp.names(source)
    for name, info in source.reader.items():
        if name in mtp_names:
            continue
        if HEAD_KEY.match(name) and source.is_codes(info):
            raise CheckpointError(
                f"{info.file}: tensor {name}: found codes, wanted the head in bf16, as DeepSeek's own code has it: convert with "
                "fp8-to-bf16 and bf16-to-fp8 first"
            )
        native, dim, expert = native_name(name), cut_dim(name), EXPERT.search(name)
        if expert:
            owner = int(expert[1]) // (experts // world_size)
            if owner >= world_size:
                raise CheckpointError(
                    f"{info.file}: tensor {name}: found expert {expert[1]}, wanted {experts} experts"
                )
            ranks[owner].append(as_is(source, info, native))
            continue
        shape = info.shape
        if dim is not None:
            _check_cut(source, info, dim, world_size)
            shape = tuple(size // world_size if axis == dim else size for axis, size in enumerate(shape))
        for rank, plans in enumerate(ranks):
            plans.append(TensorPlan(native, info.dtype, shape, partial(_part, source, info, dim, rank, shape)))
    shards = {f"model{rank}-mp{world_size}.safetensors": plans for rank, plans in enumerate(ranks)}
    if mtp_names:
        shards[MTP_FILE] = [as_is(source, source.reader[name]) for name in mtp_names]
    return Output(shards, source.config)


def _check_cut(source: Source, info: TensorInfo, dim: int, world_size: int) -> None:
    step = source.weight_format.block[dim] if source.scale_name(info.name) in source.reader else 1
    if info.shape[dim] % (world_size * step):
        raise CheckpointError(
            f"{info.file}: tensor {info.name}: found {info.shape[dim]} along dimension {dim}, wanted a multiple of "
            f"{world_size} ranks × {step}, so that no block of scales is cut"
        )


def _part(
    source: Source, info: TensorInfo, dim: int | None, rank: int, shape: tuple[int, ...]
) -> Iterator[torch.Tensor]:
    if dim == 0:  # one run of bytes: no rank reads what belongs to another
        size = info.nbytes // (info.shape[0] // shape[0])
        info = info._replace(shape=shape, start=info.start + rank * size, end=info.start + (rank + 1) * size)
    for _, tile in source.tiles(info):
        yield tile.narrow(1, rank * shape[1], shape[1]) if dim == 1 else tile


CONVERSION = Conversion("hf-to-native", plan, ("world_size",), inverse="native-to-hf")
