"""DeepSeek's own inference format: its names, split over tensor- and expert-parallel ranks, and back.

``model{rank}-mp{size}.safetensors``: routed experts go whole to one rank each, other matrices are cut along one
dimension or repeated on every rank. One table holds the names and the dimensions; both directions read it. DeepSeek's
inference model has no MTP module and refuses a rank file with tensors that it does not know, so the module is kept
beside the ranks, whole and under the release's names, in ``mtp.safetensors``.
"""

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from modeling_deepseek_moe.conversion import mtp
from modeling_deepseek_moe.conversion._job import Job, side_files
from modeling_deepseek_moe.conversion._source import Source, as_is

from modeling_deepseek_moe.checkpoint.headers import CheckpointError, TensorInfo
from modeling_deepseek_moe.checkpoint.reader import CheckpointReader
from modeling_deepseek_moe.checkpoint.writer import TensorPlan
from modeling_deepseek_moe.weights import SCALE_SUFFIX

# release name of the module → native name, dimension that ranks share (None: every rank has all of it)
MODULES = {
    "embed_tokens": ("embed", 0),
    "input_layernorm": ("attn_norm", None),
    "post_attention_layernorm": ("ffn_norm", None),
    "q_proj": ("wq", 0),
    "q_a_proj": ("wq_a", None),
    "q_a_layernorm": ("q_norm", None),
    "q_b_proj": ("wq_b", 0),
    "kv_a_proj_with_mqa": ("wkv_a", None),
    "kv_a_layernorm": ("kv_norm", None),
    "kv_b_proj": ("wkv_b", 0),
    "o_proj": ("wo", 1),
    "gate": ("gate", None),
    "gate_proj": ("w1", 0),
    "down_proj": ("w2", 1),
    "up_proj": ("w3", 0),
    "norm": ("norm", None),
    "lm_head": ("head", 0),
}
BLOCKS = {"self_attn": "attn", "mlp": "ffn"}
LEAVES = {"weight": "weight", "weight_scale_inv": "scale", "e_score_correction_bias": "bias"}
RELEASE_MODULES = {native: name for name, (native, _) in MODULES.items()}
RELEASE_BLOCKS = {native: name for name, native in BLOCKS.items()}
RELEASE_LEAVES = {native: name for name, native in LEAVES.items()}
EXPERT = re.compile(r"\.experts\.(\d+)\.")
MTP_FILE = "mtp.safetensors"
RANK_FILE = re.compile(r"model(\d+)-mp(\d+)\.safetensors")


def native_name(name: str) -> str:
    """``model.layers.3.self_attn.q_b_proj.weight_scale_inv`` → ``layers.3.attn.wq_b.scale``."""
    *path, module, leaf = name.removeprefix("model.").split(".")
    if module not in MODULES or leaf not in LEAVES:
        raise CheckpointError(f"tensor {name}: found a name that the native format has no place for")
    return ".".join((*(BLOCKS.get(part, part) for part in path), MODULES[module][0], LEAVES[leaf]))


def release_name(name: str) -> str:
    *path, module, leaf = name.split(".")
    if module not in RELEASE_MODULES or leaf not in RELEASE_LEAVES:
        raise CheckpointError(f"tensor {name}: found a name that is not of the native format")
    parts = (*(RELEASE_BLOCKS.get(part, part) for part in path), RELEASE_MODULES[module], RELEASE_LEAVES[leaf])
    found = ".".join(parts)
    return found if found.startswith("lm_head.") else f"model.{found}"


def cut_dim(name: str) -> int | None:
    """The dimension along which ranks share a tensor of this release name."""
    return None if EXPERT.search(name) else MODULES[name.split(".")[-2]][1]


def to_native(source: Source, world_size: int, options: dict) -> Job:
    """One file a rank. Every cut falls between blocks of scales, or there is an error."""
    if world_size < 1:
        raise ValueError(f"--world-size {world_size} is not a number of ranks")
    experts = source.config.get("n_routed_experts") or 0
    if experts % world_size:
        raise CheckpointError(f"{source.folder}: found {experts} routed experts, wanted a multiple of {world_size}")
    ranks: list[list[TensorPlan]] = [[] for _ in range(world_size)]
    mtp_names = mtp.names(source)
    for name, info in source.reader.items():
        if name in mtp_names:
            continue
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
    copies = side_files(source.folder)
    return Job("hf-to-native", options, [source], shards, source.config, with_index=False, copies=copies)


def _check_cut(source: Source, info: TensorInfo, dim: int, world_size: int) -> None:
    step = source.block[dim] if info.name + SCALE_SUFFIX in source.reader else 1
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


class Ranks(Source):
    """The files of all ranks of one world size, and the MTP module's, if there is one."""

    def __init__(self, folder: Path, files: list[Path]):
        self.ranks = [CheckpointReader([file]) for file in files]
        aside = Path(folder, MTP_FILE)
        self.mtp = CheckpointReader([aside] if aside.is_file() else [])
        super().__init__(folder, _AllRanks([*self.ranks, self.mtp]))


class _AllRanks:
    """What a job asks of its source's reader, for several at once."""

    def __init__(self, ranks: list[CheckpointReader]):
        self.files = [file for rank in ranks for file in rank.files]
        self.nbytes = sum(rank.nbytes for rank in ranks)
        self.mapped = ranks[0].mapped
        for file in self.files:
            self.mapped.expect(file)


def open_ranks(folder: Path) -> Ranks:
    found = sorted(file for file in Path(folder).glob("model*-mp*.safetensors") if RANK_FILE.fullmatch(file.name))
    if not found:
        raise CheckpointError(f"{folder}: found no model{{rank}}-mp{{size}}.safetensors, wanted one a rank")
    size = int(RANK_FILE.fullmatch(found[0].name)[2])
    for file in found:
        if int(RANK_FILE.fullmatch(file.name)[2]) != size:
            raise CheckpointError(f"{file}: found a rank of another world size, wanted {size}, as {found[0].name}")
    files = [Path(folder, f"model{rank}-mp{size}.safetensors") for rank in range(size)]
    if set(found) - set(files):
        raise CheckpointError(f"{sorted(set(found) - set(files))[0]}: found a rank beyond the world size {size}")
    return Ranks(folder, files)


def to_hf(source: Ranks) -> tuple[list[TensorPlan], dict]:
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
    return plans + [as_is(source, info) for info in source.mtp.values()], source.config


def _join(source: Source, infos: list[TensorInfo], dim: int | None) -> torch.Tensor:
    first = source.read(infos[0])
    if dim is not None:
        return torch.cat([first, *(source.read(info) for info in infos[1:])], dim)
    for info in infos[1:]:
        if not torch.equal(first.view(torch.uint8), source.read(info).view(torch.uint8)):
            raise CheckpointError(f"{info.file}: tensor {info.name}: found other bytes than in {infos[0].file}")
    return first
