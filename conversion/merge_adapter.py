"""``merge-adapter``: a LoRA adapter, as PEFT saves it, into the weights it was trained on: W + s·B·A.

Adapters of stacked experts (``target_parameters``) hold the matrices of all experts of a layer in one pair; modules that were
trained whole (``modules_to_save``) take the place of the checkpoint's. In a quantised checkpoint only the blocks that the adapter changes get new codes and a new scale; all others keep theirs.
"""

import math
import re
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import torch

from modeling_deepseek_moe.checkpoint.headers import DTYPE_NAMES, CheckpointError, TensorInfo
from modeling_deepseek_moe.checkpoint.jsonfile import read_json
from modeling_deepseek_moe.checkpoint.reader import CheckpointReader
from modeling_deepseek_moe.checkpoint.writer import TensorPlan
from modeling_deepseek_moe.conversion._blocks import WIDE, CodesAndScales, any_in_blocks
from modeling_deepseek_moe.conversion._conversion import Conversion, Options, Output
from modeling_deepseek_moe.conversion._source import Source, as_is
from modeling_deepseek_moe.formats import split_scale

KEY = re.compile(r"base_model\.model\.(.+)\.lora_(A|B)(?:\.\w+)?\.weight")
WHOLE_KEY = re.compile(r"base_model\.model\.(.+)")
EXPERTS_KEY = re.compile(r"(.+\.mlp\.experts)((?:\.base_layer)*)")
REFUSED = {
    "use_dora": "DoRA",
    "fan_in_fan_out": "transposed weights",
    "layer_replication": "replicated layers",
}


class Part(NamedTuple):
    """Which expert's matrices in a pair of stacked experts, and which rows of its B: gate's and up's lie in one."""

    expert: int
    experts: int
    rows: slice


class Pair(NamedTuple):
    """A of shape ``[r, in]``, B of shape ``[out, r]``, and s: ΔW = s·B·A.

    With a ``part``, A is ``[E·r, in]``, expert by expert, and B ``[out, r·E]``, whose columns of one expert lie E apart.
    """

    a: TensorInfo
    b: TensorInfo
    scaling: float
    part: Part | None = None


class Adapter:
    """A folder with ``adapter_config.json`` and ``adapter_model.safetensors``.

    Raises:
        CheckpointError: not LoRA, or LoRA of a kind that cannot be added to a weight here.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        file = self.folder / "adapter_config.json"
        self.config = read_json(file, "the config of an adapter, as PEFT writes it")
        kind = self.config.get("peft_type")
        if kind != "LORA":
            raise CheckpointError(f"{file}: found peft_type {kind!r}, wanted LORA")
        refused = [f"{option} ({name})" for option, name in REFUSED.items() if self.config.get(option)]
        if self.config.get("bias", "none") != "none":
            refused.append(f"bias {self.config['bias']!r}")
        if refused:
            raise CheckpointError(f"{file}: found {', '.join(refused)}, wanted plain LoRA")
        self.source = Source(self.folder, CheckpointReader([self.folder / "adapter_model.safetensors"]))
        # all experts of a layer are in two pairs, and each expert is merged by itself
        self._matrix = lru_cache(maxsize=4)(self._read_matrix)

    def matrices(self, pair: Pair) -> tuple[torch.Tensor, torch.Tensor]:
        """A ``[r, in]`` and B ``[out, r]`` in fp32.

        Raises:
            CheckpointError: NaN or Inf in one of them.
        """
        a, b = self._matrix(pair.a), self._matrix(pair.b)
        if pair.part is None:
            return a, b
        expert, experts, rows = pair.part
        a = a.view(experts, -1, a.shape[-1])[expert]
        return a, b.view(len(b), -1, experts)[rows, :, expert].contiguous()

    def _read_matrix(self, info: TensorInfo) -> torch.Tensor:
        values = self.source.read(info).float()
        if not torch.isfinite(values).all():
            raise CheckpointError(f"{info.file}: tensor {info.name}: found NaN or Inf, wanted finite values")
        return values

    def whole(self, base: Source) -> dict[str, TensorInfo]:
        """The modules that were trained whole: what takes the place of which tensor of ``base``.

        Raises:
            CheckpointError: one that ``base`` does not have so.
        """
        found = {}
        for key, info in self.source.reader.items():
            match = WHOLE_KEY.fullmatch(key)
            if KEY.fullmatch(key) or match is None:
                continue
            name = _name_in(base, match[1])
            if name is None or base.reader[name].shape != info.shape or base.reader[name].dtype not in WIDE.values():
                there = (
                    "no such tensor"
                    if name is None
                    else f"{DTYPE_NAMES[base.reader[name].dtype]} {list(base.reader[name].shape)}"
                )
                raise CheckpointError(
                    f"{info.file}: tensor {key}: found {DTYPE_NAMES[info.dtype]} {list(info.shape)} and {there} in "
                    f"{base.folder}, wanted LoRA's matrices, or a floating-point tensor of this model"
                )
            found[name] = info
        return found

    def pairs(self, base: Source) -> dict[str, Pair]:
        """What is added to which weight of ``base``.

        Raises:
            CheckpointError: a tensor that is no LoRA matrix, half a pair, or one that does not fit ``base``.
        """
        halves: dict[str, dict[str, TensorInfo]] = {}
        for key, info in self.source.reader.items():
            match = KEY.fullmatch(key)
            if match is not None:
                halves.setdefault(match[1], {})[match[2]] = info
        pairs = {}
        for module, half in halves.items():
            info = next(iter(half.values()))
            stacked = EXPERTS_KEY.fullmatch(module)
            name = None if stacked is not None else _name_in(base, f"{module}.weight")
            if stacked is None and name is None:
                raise CheckpointError(
                    f"{info.file}: tensor {info.name}: found no {module}.weight in {base.folder}, "
                    "wanted an adapter of this model"
                )
            if len(half) < 2:
                raise CheckpointError(f"{info.file}: tensor {info.name}: found one of lora_A and lora_B, wanted both")
            a, b = half["A"], half["B"]
            if a.dtype not in WIDE.values() or b.dtype not in WIDE.values():
                raise CheckpointError(f"{a.file}: tensor {a.name}: found {DTYPE_NAMES[a.dtype]}, wanted a wider dtype")
            if stacked is not None:
                pairs |= self._stacked_pairs(base, stacked[1], a, b)
                continue
            weight = base.reader[name]
            rank = self._of("rank_pattern", module, self.config.get("r"))
            if (a.shape, b.shape) != ((rank, weight.shape[-1]), (weight.shape[0], rank)):
                raise CheckpointError(
                    f"{a.file}: tensor {a.name}: found {list(a.shape)} and lora_B {list(b.shape)}, wanted rank {rank} "
                    f"for {name} {list(weight.shape)} of {base.folder}"
                )
            pairs[name] = Pair(a, b, self._scaling(module, rank))
        if not pairs and not len(self.source.reader):
            raise CheckpointError(f"{self.folder}: found no tensors, wanted an adapter's")
        return pairs

    def _stacked_pairs(self, base: Source, module: str, a: TensorInfo, b: TensorInfo) -> dict[str, Pair]:
        """The pair of a layer's stacked experts, expert by expert.

        Which of the two stacks it is for is told by its shapes: peft's name for it depends on the order of wrapping.
        """
        prefix = (_name_in(base, f"{module}.0.gate_proj.weight") or "").removesuffix(".0.gate_proj.weight")
        experts = 0
        while f"{prefix}.{experts}.gate_proj.weight" in base.reader:
            experts += 1
        if not experts:
            raise CheckpointError(
                f"{a.file}: tensor {a.name}: found no {module}.0.gate_proj.weight in {base.folder}, wanted an adapter of this model"
            )
        width, hidden = base.reader[f"{prefix}.0.gate_proj.weight"].shape
        stacks = {
            "gate_up_proj": (hidden, 2 * width, {"gate_proj": slice(0, width), "up_proj": slice(width, 2 * width)}),
            "down_proj": (width, hidden, {"down_proj": slice(0, hidden)}),
        }
        for stack, (inputs, outputs, projections) in stacks.items():
            rank = self._of("rank_pattern", f"{module}.{stack}", self.config.get("r"))
            if (a.shape, b.shape) == ((experts * rank, inputs), (outputs, experts * rank)):
                scaling = self._scaling(f"{module}.{stack}", rank)
                return {
                    f"{prefix}.{expert}.{projection}.weight": Pair(a, b, scaling, Part(expert, experts, rows))
                    for expert in range(experts)
                    for projection, rows in projections.items()
                }
        raise CheckpointError(
            f"{a.file}: tensor {a.name}: found {list(a.shape)} and lora_B {list(b.shape)}, wanted a pair for the {experts} "
            f"experts {width} × {hidden} of {module} in {base.folder}"
        )

    def _scaling(self, module: str, rank: float) -> float:
        alpha = self._of("alpha_pattern", module, self.config.get("lora_alpha"))
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def _of(self, field: str, module: str, default: float) -> float:
        """The pattern that a module's name ends in, as PEFT matches it; else the value for all."""
        patterns = self.config.get(field) or {}
        value = next((v for pattern, v in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module)), default)
        if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
            raise CheckpointError(
                f"{self.folder / 'adapter_config.json'}: found {value!r} for {module}, wanted a positive number"
            )
        return value


def plan(source: Source, options: Options) -> Output:
    """The checkpoint with the adapter in it, dtypes and config as they were."""
    adapter = Adapter(options.adapter)
    source.check_scales_have_weights()
    pairs, whole = adapter.pairs(source), adapter.whole(source)
    plans = []
    for info in source.reader.values():
        pair = pairs.get(info.name)
        if info.name in whole:
            plans.append(
                TensorPlan(info.name, info.dtype, info.shape, partial(_trained, adapter, whole[info.name], info))
            )
        elif pair is None:
            if split_scale(info.name)[0] not in pairs:
                plans.append(as_is(source, info))
        elif source.is_codes(info):
            make = partial(_merge_codes, source, info, source.scale_of(info), adapter, pair)
            shape = source.weight_format.value_shape(info.shape)
            plans += CodesAndScales(make).plans(info.name, shape, source.weight_format)
        elif info.dtype in WIDE.values():
            plans.append(TensorPlan(info.name, info.dtype, info.shape, partial(_merge, source, info, adapter, pair)))
        else:
            raise CheckpointError(f"{info.file}: tensor {info.name}: found {DTYPE_NAMES[info.dtype]}, wanted floats")
    return Output(plans, source.config, also_read=(adapter.source,))


def _name_in(base: Source, name: str) -> str | None:
    """A tensor's name in ``base``: AutoModel, without a head, has the decoder at the top."""
    return next((found for found in (name, f"model.{name}") if found in base.reader), None)


def _trained(adapter: Adapter, info: TensorInfo, wanted: TensorInfo) -> torch.Tensor:
    return adapter.source.read(info).to(wanted.dtype)


def _merge(source: Source, info: TensorInfo, adapter: Adapter, pair: Pair) -> Iterator[torch.Tensor]:
    a, b = adapter.matrices(pair)
    for rows, tile in source.tiles(info):
        made = (tile.float() + (b[rows] @ a) * pair.scaling).to(tile.dtype)
        if not torch.isfinite(made).all():
            raise CheckpointError(
                f"{info.file}: tensor {info.name}: found NaN or Inf once merged, wanted finite values"
            )
        yield made


def _merge_codes(
    source: Source, info: TensorInfo, scale_info: TensorInfo, adapter: Adapter, pair: Pair
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Blocks that the adapter changes get new codes and a new scale; a row of codes that is changed is one of a block."""
    a, b = adapter.matrices(pair)
    form, scales = source.weight_format, source.read_scale(scale_info)
    for rows, codes in source.tiles(info, form.block[0]):
        scale, delta = scales[form.scale_rows(rows)], (b[rows] @ a) * pair.scaling
        touched = any_in_blocks(delta != 0, form.block)
        if touched.any():
            new_codes, new_scale = form.quantize(form.dequantize(codes, scale, torch.float32).add_(delta))
            scale = torch.where(touched, new_scale, scale)
            shape = form.code_shape((1, form.block[1]))
            wanted = touched.repeat_interleave(form.block[0], 0).repeat_interleave(shape[1], 1)
            wanted = wanted[: len(codes), : codes.shape[1]]
            codes = torch.where(wanted, new_codes.view(torch.uint8), codes.view(torch.uint8)).view(codes.dtype)
        yield codes, scale


CONVERSION = Conversion(
    "merge-adapter",
    plan,
    ("max_shard_size", "adapter"),
    required={"adapter": "a folder with adapter_config.json"},
    no_inverse="sums are rounded to the weights' dtype: what was added cannot be taken off to the bit",
)
