"""A checkpoint seen through a config: canonical names, FP8 weights with their scales, and where the two disagree."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch

from modeling_deepseek_moe.checkpoint.headers import CheckpointError, MisfitError, TensorInfo
from modeling_deepseek_moe.checkpoint.jsonfile import read_json
from modeling_deepseek_moe.checkpoint.reader import CheckpointReader
from modeling_deepseek_moe.checkpoint.scales import WANTED_SCALES, Scales
from modeling_deepseek_moe.config import own_format
from modeling_deepseek_moe.formats import of_codes, split_scale
from modeling_deepseek_moe.weights import (
    EXPERT_KEY,
    LAYER_KEY,
    MTP_KEY,
    TensorSpec,
    release_tensors,
    unstack_info,
)

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Problem:
    """One disagreement of a checkpoint with its config, for which it is refused.

    ``kind`` is ``missing``, ``surplus`` (a layer or expert that the config does not have), ``shape``, ``dtype``,
    ``scale`` or ``value``; ``info`` is what the header says of the tensor, ``None`` when it is missing.
    """

    kind: str
    name: str
    info: TensorInfo | None
    found: str
    wanted: str


class Release:
    """A checkpoint seen through a config: canonical names (``model.…``), FP8 weights paired with their scales."""

    def __init__(self, reader: CheckpointReader, config):
        self.reader, self.config = reader, config
        self.scales: Scales | None = None  # once they are checked
        self._biases: dict[str, torch.Tensor] = {}  # of the routers, likewise
        # a headless model is saved without the prefix
        self.lacks_prefix = not any(name.startswith("model.") for name in reader)
        infos = reader.values()
        if any(".experts.gate_up_proj" in name or ".experts.down_proj" in name for name in reader):
            experts = config.n_routed_experts
            infos = (part for info in infos for part in unstack_info(info, experts))
        self.infos = {self.canonical(info.name): info for info in infos}
        self.weight_format = own_format(config)

    def canonical(self, name: str) -> str:
        return (
            f"model.{name}"
            if self.lacks_prefix and name.partition(".")[0] in ("layers", "embed_tokens", "norm")
            else name
        )

    def tensor(self, name: str) -> torch.Tensor:
        if self.scales is not None and name in self.scales:
            return self.scales[name]
        return self._biases[name] if name in self._biases else self.reader.view(self.infos[name])

    def is_quantized(self, name: str) -> bool:
        return (
            self.weight_format is not None
            and name in self.infos
            and not name.endswith(self.weight_format.scale_suffix)
            and self.infos[name].dtype == self.weight_format.code_dtype
        )

    def holds(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether it has a tensor of that name which stands for values of this shape."""
        stored = self.weight_format.code_shape(tuple(shape)) if self.is_quantized(name) else tuple(shape)
        return name in self.infos and self.infos[name].shape == stored

    def scale_name(self, name: str) -> str:
        """Of the scales of a weight."""
        return name + self.weight_format.scale_suffix

    def dequantized(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        return self.weight_format.dequantize(self.tensor(name), self.tensor(self.scale_name(name)), dtype)

    @property
    def has_mtp(self) -> bool:
        first = f"model.layers.{self.config.num_hidden_layers}."
        return any(name.startswith(first) for name in self.infos)

    def leave_out_layers(self) -> list[int]:
        """Drop the layers that the config on disk has and this one does not; returns their numbers.

        A config that differs from the folder's own was changed by the caller, whose wish that is. Where it keeps
        fewer decoder layers, the MTP layers go too: they continue from the last one. Layers that the folder's own
        config does not have either stay, and are refused by `check`.
        """
        depth, mtp = self.config.num_hidden_layers, self.config.num_nextn_predict_layers
        disk_depth = self._config_on_disk.num_hidden_layers
        disk_mtp = self._config_on_disk.num_nextn_predict_layers
        if depth < disk_depth:
            kept = depth
        elif depth == disk_depth and mtp < disk_mtp:
            kept = depth + mtp
        else:
            return []
        unwanted = range(kept, disk_depth + disk_mtp)
        numbers = {name: int(match[1]) for name in self.infos if (match := LAYER_KEY.match(name))}
        dropped = {name: number for name, number in numbers.items() if number in unwanted}
        self.infos = {name: info for name, info in self.infos.items() if name not in dropped}
        return sorted(set(dropped.values()))

    @cached_property
    def _config_on_disk(self):
        """The folder's own config; the one in memory where there is none, or none that is one of this family's."""
        file = self.reader.files[0].parent / "config.json"
        try:
            return type(self.config).from_dict(read_json(file))
        except (CheckpointError, ValueError):
            return self.config

    @property
    def announced_dtype(self) -> torch.dtype | None:
        """What the folder's own config says that the model is computed in."""
        return self._config_on_disk.dtype

    def _fits_on_disk(self, problem: Problem) -> bool:
        spec = release_tensors(self._config_on_disk).get(self.canonical(problem.name))
        return spec is not None and spec.shape == problem.info.shape

    def check(self, needs_head: bool, ignored: Collection[str] = ()) -> None:
        """Compare names, shapes and dtypes with the config, and look at the values of scales and router biases.

        Args:
            ignored: kinds of `Problem` to let pass.

        Raises:
            CheckpointError: for the first disagreement (`MisfitError` if the caller's own changes to
                the folder's config made it), naming file, tensor, what was found and what was wanted.
        """
        for problem in self.problems(needs_head):
            if problem.kind in ignored:
                continue
            file = self.where(problem.name) if problem.info is None else problem.info.file
            kind = MisfitError if problem.kind == "shape" and self._fits_on_disk(problem) else CheckpointError
            raise kind(f"{file}: tensor {problem.name}: found {problem.found}, wanted {problem.wanted}")

    def problems(self, needs_head: bool, read_values: bool = True) -> Iterator[Problem]:
        """Every disagreement with the config; from the headers alone with ``read_values=False``.

        Values come last: they are read when nothing in the headers stood against it, or when the caller goes on.
        """
        expected = release_tensors(self.config)
        if self.lacks_prefix or not needs_head:
            expected.pop("lm_head.weight", None)
        yield from self._surplus(expected)
        scales = {}
        for name, spec in expected.items():
            info = self.infos.get(name)
            if info is None:
                yield Problem("missing", name, None, "no such tensor", f"{list(spec.shape)} by the config")
                continue
            has_codes = spec.quantized and self.is_quantized(name)
            shape = self.weight_format.code_shape(spec.shape) if has_codes else spec.shape
            if info.shape != shape:
                wanted = f"{list(shape)} by the config"
                yield Problem("shape", info.name, info, f"shape {list(info.shape)}", wanted)
                if len(info.shape) != len(shape):
                    continue
            if has_codes or any(of_codes(info.dtype)):
                scale = self._scale_of(name)
                problem = self._quantized_problem(info, scale, spec)
                if problem is None:
                    scales[self.scale_name(name)] = scale
                else:
                    yield problem
            elif info.dtype not in FLOATS:
                wanted = f"one of {', '.join(str(dtype) for dtype in FLOATS)}"
                yield Problem("dtype", info.name, info, f"dtype {info.dtype}", wanted)
        if read_values:
            self.scales = Scales(
                self.reader, scales, torch.float32 if self.weight_format is None else self.weight_format.scale_dtype
            )
            for info, value, index in self.scales.unusable():
                yield Problem("scale", info.name, info, f"{value} at {index}", WANTED_SCALES)
            yield from self._unusable_biases(expected)

    def _unusable_biases(self, expected: dict[str, TensorSpec]) -> Iterator[Problem]:
        """Router biases that order nothing: they only pick experts, so that a NaN never reaches the logits to be seen."""
        for name in expected:
            info = self.infos.get(name) if name.endswith(".e_score_correction_bias") else None
            if info is None or info.dtype not in FLOATS:
                continue
            values = self._biases[name] = self.reader.view(info)
            bad = (~torch.isfinite(values)).nonzero()
            if len(bad):
                found = f"{values[tuple(bad[0])].item()} at {bad[0].tolist()}"
                yield Problem("value", info.name, info, found, "finite biases of the router")

    def where(self, name: str) -> str:
        """The file that holds the tensor's neighbours, to look in for what is missing."""
        stem = name.rpartition(".")[0]
        while stem:
            for other, info in self.infos.items():
                if other.startswith(stem + "."):
                    return str(info.file)
            stem = stem.rpartition(".")[0]
        return str(self.reader.files[0].parent)

    def _surplus(self, expected: dict[str, TensorSpec]) -> Iterator[Problem]:
        layers = self.config.num_hidden_layers + self.config.num_nextn_predict_layers
        for name, info in self.infos.items():
            if name in expected:
                continue
            weight, suffix = split_scale(name)
            if (
                suffix
                and self.weight_format is None
                and weight in self.infos
                and any(of_codes(self.infos[weight].dtype))
            ):
                continue  # the codes are what is named
            if weight in expected and suffix:
                if not (self.is_quantized(weight) and suffix == self.weight_format.scale_suffix):
                    found = f"a scale of {self.infos[weight].dtype if weight in self.infos else 'nothing'}"
                    codes = "codes" if self.weight_format is None else f"{self.weight_format.title} codes"
                    yield Problem("scale", info.name, info, found, f"{codes} next to it")
                continue
            if ".self_attn.indexer." in name:
                wanted = "attention without one: sparse attention (DeepSeek-V3.2) is not supported"
                yield Problem("surplus", info.name, info, "an indexer's tensor", wanted)
                continue
            layer = LAYER_KEY.match(name)
            if layer and int(layer[1]) >= layers:
                wanted = (
                    f"{layers} layers (num_hidden_layers={self.config.num_hidden_layers}, "
                    f"num_nextn_predict_layers={self.config.num_nextn_predict_layers})"
                )
                yield Problem("surplus", info.name, info, f"layer {layer[1]}", wanted)
                continue
            if MTP_KEY.match(name):
                wanted = f"a decoder layer (num_hidden_layers={self.config.num_hidden_layers})"
                yield Problem("surplus", info.name, info, f"MTP layer {layer[1]}", wanted)
                continue
            expert = EXPERT_KEY.match(name)
            if expert and int(expert[2]) >= (self.config.n_routed_experts or 0):
                wanted = f"n_routed_experts={self.config.n_routed_experts}"
                yield Problem("surplus", info.name, info, f"expert {expert[2]}", wanted)

    def _scale_of(self, name: str) -> TensorInfo | None:
        return None if self.weight_format is None else self.infos.get(self.scale_name(name))

    def _quantized_problem(self, info: TensorInfo, scale: TensorInfo | None, spec: TensorSpec) -> Problem | None:
        form = self.weight_format
        if form is None or not spec.quantized or info.dtype != form.code_dtype:
            wanted = "a floating-point tensor"
            if form is None:
                row = next(of_codes(info.dtype))
                wanted = f"no {row.title} without quantization_config (quant_method {row.method})"
            return Problem("dtype", info.name, info, f"dtype {info.dtype}", wanted)
        wanted = form.scale_shape(spec.shape)
        if scale is None:
            found = f"{form.title} codes without {info.name}{form.scale_suffix}"
            return Problem("scale", info.name, info, found, f"{_short(form.scale_dtype)} scales {list(wanted)}")
        if scale.dtype != form.scale_dtype:
            return Problem("scale", scale.name, scale, f"dtype {scale.dtype}", str(form.scale_dtype))
        if scale.shape != wanted:
            why = f"{list(wanted)} for {list(spec.shape)} in blocks {form.block}"
            return Problem("scale", scale.name, scale, f"shape {list(scale.shape)}", why)
        return None


def _short(dtype: torch.dtype) -> str:
    """``fp32``, ``bf16``."""
    return str(dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "fp")
