"""A LoRA adapter as peft saves it: which tensors of a checkpoint it changes, and how.

Adapters of stacked experts (``target_parameters``) hold the matrices of all experts of a layer in one pair, and modules
that were trained whole (``modules_to_save``) those experts in one tensor; a release has each expert by itself.
"""

import math
import re
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path

import torch

from modeling_deepseek_moe.checkpoint.headers import DTYPE_NAMES, CheckpointError, TensorInfo
from modeling_deepseek_moe.checkpoint.jsonfile import read_json
from modeling_deepseek_moe.checkpoint.reader import CheckpointReader
from modeling_deepseek_moe.conversion._blocks import WIDE
from modeling_deepseek_moe.conversion._changes import BEGINNINGS, Added, Change, LowRank, Tokens, Whole
from modeling_deepseek_moe.conversion._source import Source

PREFIX = "base_model.model."
FILE = "adapter_model.safetensors"
# peft leaves the adapter's name out; states of a training have it
KEYS = {
    re.compile(r"(.+)\.lora_(A|B)(?:\.\w+)?\.weight"): "",
    re.compile(r"(.+)\.lora_embedding_(A|B)(?:\.\w+)?"): "embedding ",
    re.compile(r"(.+)\.(lora_magnitude_vector)(?:\.\w+)*"): "",
    re.compile(r"(.+)\.(lora_B)\.(?:\w+\.)?bias"): "",
    re.compile(r"(.+)\.token_adapter\.(trainable_tokens)_delta(?:\.\w+)?"): "",
}
WRAPPED = re.compile(r"\.(token_adapter|base_layer|original_module|modules_to_save(\.\w+(?=\.\w+$))?)(?=\.)")
EXPERTS_KEY = re.compile(r"(.+\.mlp\.experts)((?:\.base_layer)*)")
STACK_KEY = re.compile(r"(.+\.mlp\.experts)\.(gate_up_proj|down_proj)")
REFUSED = {
    "fan_in_fan_out": "transposed weights",
    "layer_replication": "replicated layers",
    "alora_invocation_tokens": "an adapter that some tokens switch on",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "arrow_config": "routed adapters",
    "kasa_config": "KaSA",
    "monteclora_config": "sampled adapters",
}
# beginnings that cannot be made again from the weight alone: drawn at random, or from data or gradients
LOST = re.compile(r"pissa_niter_.*|corda|lora_ga|loftq")


class Adapter:
    """A folder with ``adapter_config.json`` and ``adapter_model.safetensors``.

    Raises:
        CheckpointError: not LoRA, or LoRA of a kind that cannot be merged.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        file = self.folder / "adapter_config.json"
        self.config = read_json(file, "the config of an adapter, as PEFT writes it")
        kind = self.config.get("peft_type")
        if kind != "LORA":
            raise CheckpointError(f"{file}: found peft_type {kind!r}, wanted LORA")
        refused = [f"{option} ({name})" for option, name in REFUSED.items() if self.config.get(option)]
        if refused:
            raise CheckpointError(f"{file}: found {', '.join(refused)}, wanted LoRA that adds to weights")
        beginning = self.config.get("init_lora_weights")
        if isinstance(beginning, str) and LOST.fullmatch(beginning):
            raise CheckpointError(
                f"{file}: found init_lora_weights {beginning!r}, whose beginning cannot be made again, wanted an adapter saved "
                "with path_initial_model_for_weight_conversion; or merge into a folder of the model that was trained on, with "
                "init_lora_weights true"
            )
        self.beginning = beginning if beginning in BEGINNINGS else None
        if not (self.folder / FILE).exists() and (self.folder / "adapter_model.bin").exists():
            raise CheckpointError(
                f"{self.folder}: found adapter_model.bin, wanted {FILE}: load it with peft and save it"
            )
        self.source = Source(self.folder, CheckpointReader([self.folder / FILE]))
        # B of all experts of a layer is one tensor whose columns of one expert lie apart, and each expert is merged by itself
        self._columns = lru_cache(maxsize=2)(self._by_expert)

    def changes(self, base: Source) -> dict[str, list[Change]]:
        """What is done to which tensor of ``base``, in order.

        Raises:
            CheckpointError: a tensor that has no place in ``base``, half a pair, or one of another shape.
        """
        changes: dict[str, list[Change]] = {}
        modules: dict[str, dict[str, TensorInfo]] = {}
        for key, info in self.source.reader.items():
            if not key.startswith(PREFIX):
                raise CheckpointError(f"{info.file}: tensor {key}: found another name, wanted {PREFIX}...")
            if info.dtype not in WIDE.values():
                raise CheckpointError(
                    f"{info.file}: tensor {key}: found {DTYPE_NAMES[info.dtype]}, wanted a wider dtype"
                )
            module, role = _role(key.removeprefix(PREFIX))
            if role is None:
                for name, change in self._whole(base, module, info):
                    changes.setdefault(name, []).append(change)
            elif modules.setdefault(module, {}).setdefault(role, info) is not info:
                raise CheckpointError(f"{info.file}: tensor {key}: found two {role} for {module}, wanted one adapter")
        for module, found in modules.items():
            for name, change in self._low_rank(base, module, found):
                changes.setdefault(name, []).append(change)
        if not len(self.source.reader):
            raise CheckpointError(f"{self.folder}: found no tensors, wanted an adapter's")
        return changes

    def _low_rank(self, base: Source, module: str, found: dict[str, TensorInfo]) -> Iterator[tuple[str, Change]]:
        """What the matrices of one module change."""
        info = next(iter(found.values()))
        tokens, bias = found.pop("trainable_tokens", None), found.pop("lora_B", None)
        if tokens is not None:
            yield self._tokens(base, module, tokens)
            if not found:
                return
        stacked = EXPERTS_KEY.fullmatch(module)
        name = "" if stacked else _place(base, f"{module}.weight", info)
        pairs = [(kind + "A", kind + "B") for kind in ("", "embedding ") if {kind + "A", kind + "B"} & found.keys()]
        if len(pairs) != 1 or not found.keys() >= set(pairs[0]):
            raise CheckpointError(f"{info.file}: tensor {info.name}: found one of lora_A and lora_B, wanted both")
        a, b = (found.pop(half) for half in pairs[0])
        magnitude = found.pop("lora_magnitude_vector", None)
        odd = [extra for extra in (magnitude, bias) if extra is not None and (stacked or "embedding A" in pairs[0])]
        if odd or found:
            extra = (*odd, *found.values())[0]
            raise CheckpointError(
                f"{extra.file}: tensor {extra.name}: found it for {module}, wanted lora_A and lora_B alone"
            )
        if stacked is not None:
            yield from self._stacked(base, stacked[1], a, b)
            return
        shape, rank = base.value_shape(name), self._rank(module)
        inputs, outputs = shape[::-1] if pairs[0] == ("A", "B") else shape
        if (a.shape, b.shape) != ((rank, inputs), (outputs, rank)) or (magnitude and magnitude.shape != (outputs,)):
            scale = f", magnitude {list(magnitude.shape)}" if magnitude else ""
            raise CheckpointError(
                f"{a.file}: tensor {a.name}: found {list(a.shape)} and lora_B {list(b.shape)}{scale}, wanted rank {rank} "
                f"for {name} {list(shape)} of {base.folder}"
            )
        if bool(self.config.get("use_dora")) != (magnitude is not None):
            there = "no lora_magnitude_vector" if magnitude is None else magnitude.name
            raise CheckpointError(
                f"{a.file}: tensor {a.name}: found use_dora {bool(self.config.get('use_dora'))} and {there}, wanted both or "
                "none (DoRA)"
            )
        scaling = self._scaling(module, rank)
        read_a, read_b = partial(self._read, a), partial(self._read, b)
        if pairs[0] != ("A", "B"):  # an embedding's is W + s·(B·A)ᵀ
            read_a, read_b = (lambda: self._read(b).T), (lambda: self._read(a).T)
        yield name, LowRank(read_a, read_b, scaling, magnitude and partial(self._read, magnitude), self.beginning)
        if bias is not None:
            target = _place(base, f"{module}.bias", bias)
            _check_shape(base, target, bias, bias.shape)
            yield target, Added(partial(self._read, bias), scaling)

    def _stacked(self, base: Source, module: str, a: TensorInfo, b: TensorInfo) -> Iterator[tuple[str, Change]]:
        """The pair of a layer's stacked experts, expert by expert.

        Which of the two stacks it is for is told by its shapes: peft's name for it depends on the order of wrapping.
        """
        experts, prefix, width, hidden = _experts(base, module, a)
        for stack, projections in _stacks(width, hidden).items():
            inputs, outputs = (hidden, 2 * width) if stack == "gate_up_proj" else (width, hidden)
            rank = self._rank(f"{module}.{stack}")
            if (a.shape, b.shape) != ((experts * rank, inputs), (outputs, experts * rank)):
                continue
            scaling = self._scaling(f"{module}.{stack}", rank)
            for expert in range(experts):
                read_a = partial(self._rows, a, expert * rank, (expert + 1) * rank)
                for projection, rows in projections.items():
                    read_b = partial(self._part_of_b, b, experts, expert, rows)
                    yield f"{prefix}.{expert}.{projection}.weight", LowRank(read_a, read_b, scaling)
            return
        raise CheckpointError(
            f"{a.file}: tensor {a.name}: found {list(a.shape)} and lora_B {list(b.shape)}, wanted a pair for the {experts} "
            f"experts {width} × {hidden} of {module} in {base.folder}"
        )

    def _whole(self, base: Source, name: str, info: TensorInfo) -> Iterator[tuple[str, Change]]:
        """What a tensor that was trained whole takes the place of."""
        name = WRAPPED.sub("", name)
        stack = STACK_KEY.fullmatch(name)
        if stack is None:
            target = _place(base, name, info)
            _check_shape(base, target, info, info.shape)
            yield target, Whole(lambda rows: self._rows(info, rows.start, rows.stop))
            return
        experts, prefix, width, hidden = _experts(base, stack[1], info)
        projections = _stacks(width, hidden)[stack[2]]
        height = sum(rows.stop - rows.start for rows in projections.values())
        wanted = (experts, height, hidden if stack[2] == "gate_up_proj" else width)
        if info.shape != wanted:
            raise CheckpointError(f"{info.file}: tensor {info.name}: found {list(info.shape)}, wanted {list(wanted)}")
        flat = info._replace(shape=(experts * height, wanted[2]))
        for expert in range(experts):
            for projection, own in projections.items():
                first = expert * height + own.start
                yield f"{prefix}.{expert}.{projection}.weight", Whole(partial(self._rows_from, flat, first))

    def _tokens(self, base: Source, module: str, info: TensorInfo) -> tuple[str, Change]:
        name = _place(base, f"{module}.weight", info)
        indices, shape = self.config.get("trainable_token_indices"), base.value_shape(name)
        if isinstance(indices, dict):
            indices = next((listed for key, listed in indices.items() if f".{module}".endswith(f".{key}")), None)
        known = isinstance(indices, list) and all(type(i) is int and 0 <= i < shape[0] for i in indices)
        if not known or info.shape != (len(indices), shape[1]):
            raise CheckpointError(
                f"{info.file}: tensor {info.name}: found {list(info.shape)}, wanted a row of {name} {list(shape)} for each of "
                f"the trainable_token_indices {str(indices)[:80]}"
            )
        return name, Tokens(tuple(indices), partial(self._read, info))

    def _read(self, info: TensorInfo) -> torch.Tensor:
        values = self.source.read(info)
        if not torch.isfinite(values).all():
            raise CheckpointError(f"{info.file}: tensor {info.name}: found NaN or Inf, wanted finite values")
        return values

    def _rows(self, info: TensorInfo, start: int, stop: int) -> torch.Tensor:
        width = info.nbytes // info.shape[0]
        part = info._replace(
            shape=(stop - start, *info.shape[1:]), start=info.start + start * width, end=info.start + stop * width
        )
        return self._read(part)

    def _rows_from(self, info: TensorInfo, first: int, rows: slice) -> torch.Tensor:
        return self._rows(info, first + rows.start, first + rows.stop)

    def _by_expert(self, info: TensorInfo, experts: int) -> torch.Tensor:
        """B of a stack ``[out, r·E]``, whose columns of one expert lie E apart → ``[E, out, r]``."""
        return self._read(info).unflatten(1, (-1, experts)).permute(2, 0, 1).contiguous()

    def _part_of_b(self, info: TensorInfo, experts: int, expert: int, rows: slice) -> torch.Tensor:
        return self._columns(info, experts)[expert, rows]

    def _rank(self, module: str) -> int:
        return int(self._of("rank_pattern", module, "r"))

    def _scaling(self, module: str, rank: float) -> float:
        alpha = self._of("alpha_pattern", module, "lora_alpha")
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def _of(self, field: str, module: str, default: str) -> float:
        """The pattern that a module's name, or its weight's, ends in, as PEFT matches it; else the value for all."""
        names = (module, f"{module}.weight") if self.config.get("target_parameters") else (module,)
        patterns = self.config.get(field) or {}
        hits = (v for p, v in patterns.items() if any(re.match(rf"(.*\.)?({p})$", name) for name in names))
        value = next(hits, self.config.get(default))
        if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
            raise CheckpointError(
                f"{self.folder / 'adapter_config.json'}: found {value!r} for {module}, wanted a positive number"
            )
        return value


def _role(key: str) -> tuple[str, str | None]:
    """A tensor's module, and what it is to it; its own name and ``None`` if it was trained whole."""
    for pattern, kind in KEYS.items():
        match = pattern.fullmatch(key)
        if match is not None:
            return match[1], kind + match[2]
    return key, None


def _place(base: Source, name: str, info: TensorInfo) -> str:
    """A tensor's name in ``base``: AutoModel, without a head, has the decoder at the top."""
    for found in (name, f"model.{name}"):
        if base.holding(found) is not None:
            return found
    raise CheckpointError(
        f"{info.file}: tensor {info.name}: found no {name} in {base.folder}, wanted an adapter of this model"
    )


def _check_shape(base: Source, name: str, info: TensorInfo, shape: tuple[int, ...]) -> None:
    wanted = base.value_shape(name)
    if wanted != shape:
        raise CheckpointError(
            f"{info.file}: tensor {info.name}: found {DTYPE_NAMES[info.dtype]} {list(shape)}, wanted {list(wanted)} as {name} "
            f"of {base.folder}"
        )


def _experts(base: Source, module: str, info: TensorInfo) -> tuple[int, str, int, int]:
    """How many experts a layer of ``base`` has, what their names begin with, and the shape of a gate."""
    first = _place(base, f"{module}.0.gate_proj.weight", info)
    prefix, experts = first.removesuffix(".0.gate_proj.weight"), 0
    while base.holding(f"{prefix}.{experts}.gate_proj.weight") is not None:
        experts += 1
    width, hidden = base.value_shape(first)
    return experts, prefix, width, hidden


def _stacks(width: int, hidden: int) -> dict[str, dict[str, slice]]:
    """Which rows of an expert in a stack are which projection's."""
    return {
        "gate_up_proj": {"gate_proj": slice(0, width), "up_proj": slice(width, 2 * width)},
        "down_proj": {"down_proj": slice(0, hidden)},
    }
