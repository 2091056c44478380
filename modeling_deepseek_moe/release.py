"""A checkpoint seen through a config: canonical names, FP8 weights with their scales, and where the two disagree."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from modeling_deepseek_moe.checkpoint.headers import CheckpointError, MisfitError, TensorInfo
from modeling_deepseek_moe.checkpoint.jsonfile import read_json
from modeling_deepseek_moe.checkpoint.reader import CheckpointReader
from modeling_deepseek_moe.checkpoint.scales import WANTED_SCALES, Scales
from modeling_deepseek_moe.config import own_formats
from modeling_deepseek_moe.formats import WeightFormat, named_for_codes, of_codes, split_scale, weight_name
from modeling_deepseek_moe.weights import (
    EXPERT_KEY,
    LAYER_KEY,
    MTP_KEY,
    TensorSpec,
    release_tensors,
    unstack_info,
)

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
INTEGERS = (torch.int32, torch.int64)  # what says a shape


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

    def __init__(self, reader: CheckpointReader, config, weight_formats: Sequence[WeightFormat] = ()):
        """
        Args:
            weight_formats: of the weights, where the config is another quantiser's by now and no longer tells them.
        """
        self.reader, self.config = reader, config
        self.scales: list[Scales] = []  # once they are checked, those that are kept in memory, of each format
        self._biases: dict[str, torch.Tensor] = {}  # of the routers, likewise
        # a headless model is saved without the prefix
        self._names = config.names
        self.lacks_prefix = not any(self._names.own(name).startswith("model.") for name in reader)
        infos = reader.values()
        if any(".experts.gate_up_proj" in name or ".experts.down_proj" in name for name in reader):
            experts = config.n_routed_experts
            infos = (part for info in infos for part in unstack_info(info, experts))
        self.infos: dict[str, TensorInfo] = {}
        for info in infos:
            first = self.infos.setdefault(self.canonical(info.name), info)
            if first is not info:
                raise CheckpointError(f"{info.file}: tensor {info.name}: found {first.name} too, wanted one of them")
        self.weight_formats = tuple(weight_formats) or own_formats(config)
        # what no layer reads and saving keeps: not those among them that this model does read
        carried = [name for name in self.infos if self._names.is_carried(name)]
        wanted = release_tensors(config) if carried else {}
        self.carried = {name: self.infos.pop(name) for name in carried if name not in wanted}

    def canonical(self, name: str) -> str:
        """The name in a whole model of the weight, if they are codes of one, or of any other tensor."""
        name = self._names.own(weight_name(name))
        return (
            f"model.{name}"
            if self.lacks_prefix and name.partition(".")[0] in ("layers", "embed_tokens", "norm")
            else name
        )

    def tensor(self, name: str) -> torch.Tensor:
        for scales in self.scales:
            if name in scales:
                return scales[name]
        return self._biases[name] if name in self._biases else self.reader.view(self.infos[name])

    @property
    def weight_format(self) -> WeightFormat | None:
        """The first of its formats, and mostly the only one."""
        return next(iter(self.weight_formats), None)

    def format_of(self, name: str) -> WeightFormat | None:
        """Which of them the tensor of that name has, if it is the codes of a weight."""
        info = self.infos.get(name)
        if info is None or split_scale(name)[1] is not None:
            return None
        return next((form for form in self.weight_formats if form.code_dtype == info.dtype), None)

    def is_quantized(self, name: str) -> bool:
        return self.format_of(name) is not None

    def holds(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether it has a tensor of that name which stands for values of this shape."""
        form = self.format_of(name)
        stored = tuple(shape) if form is None else form.code_shape(tuple(shape))
        return name in self.infos and self.infos[name].shape == stored

    def scale_name(self, name: str) -> str:
        """Of the scales of a weight that is codes."""
        return name + self.format_of(name).scale_suffix

    def dequantized(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        return self.format_of(name).dequantize(self.tensor(name), self.tensor(self.scale_name(name)), dtype)

    def scales_of_experts(self, names: Sequence[str]) -> torch.Tensor | list[TensorInfo]:
        """All scales of the routed experts of a layer in one piece, or where they are; ``names`` are their weights'."""
        first = self.scale_name(names[0])
        for scales in self.scales:
            if first in scales:
                return scales.of_experts(first)
        return [self.infos[self.scale_name(name)] for name in names]

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
        for name in list(self.carried):
            if (match := LAYER_KEY.match(name)) and int(match[1]) in unwanted:
                del self.carried[name]
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
        if not any(map(self._names.is_optional, self.infos)):
            expected = {name: spec for name, spec in expected.items() if not self._names.is_optional(name)}
        yield from self._surplus(expected)
        scales: dict[torch.dtype, dict[str, TensorInfo]] = {}
        others: dict[str, tuple[int, ...]] = {}
        for name, spec in expected.items():
            info = self.infos.get(name)
            if info is None:
                yield Problem("missing", name, None, "no such tensor", f"{list(spec.shape)} by the config")
                continue
            unread = self._unread_codes(info)
            if unread is not None:
                yield unread
                continue
            form = self.format_of(name) if spec.quantized else None
            shape = form.code_shape(spec.shape) if form else spec.shape
            if info.shape != shape:
                wanted = f"{list(shape)} by the config"
                yield Problem("shape", info.name, info, f"shape {list(info.shape)}", wanted)
                if len(info.shape) != len(shape):
                    continue
            if form or any(of_codes(info.dtype)):
                scale = self.infos.get(self.scale_name(name)) if form else None
                problem = self._quantized_problem(info, scale, spec, form)
                if problem is None:
                    scales.setdefault(form.scale_dtype, {})[self.scale_name(name)] = scale
                    others |= {name + suffix: spec.shape for suffix in form.others}
                else:
                    yield problem
            elif info.dtype not in FLOATS:
                wanted = f"one of {', '.join(str(dtype) for dtype in FLOATS)}"
                yield Problem("dtype", info.name, info, f"dtype {info.dtype}", wanted)
        if read_values:
            for info, value, index in self._unusable_scales(scales):
                yield Problem("scale", info.name, info, f"{value} at {index}", WANTED_SCALES)
            yield from self._untrue_others({name: shape for name, shape in others.items() if name in self.infos})
            yield from self._unusable_biases(expected)

    def _unusable_scales(self, found: dict[torch.dtype, dict[str, TensorInfo]]):
        """Read all scales, and keep them in memory, but for those that a row has one of for each group of its codes.

        These are an eighth of the codes, too much to hold next to weights that stay in their files.
        """
        fine = {form.scale_suffix for form in self.weight_formats if form.block[0] == 1}
        for dtype, infos in found.items():
            layers: dict[str, dict[str, TensorInfo]] = {}
            kept: dict[str, TensorInfo] = {}
            for name, info in infos.items():
                layer = LAYER_KEY.match(name)
                own = layers.setdefault(layer[1] if layer else name, {}) if split_scale(name)[1] in fine else kept
                own[name] = info
            for layer, parts in list(layers.items()):
                # the engine takes an address for each expert, and of a layer's the first says where all are
                if any(info.start % dtype.itemsize for info in parts.values()):
                    kept |= layers.pop(layer)
            for parts in filter(None, (kept, *layers.values())):
                scales = Scales(self.reader, parts, dtype, among_mapped=parts is not kept)
                if parts is kept:
                    self.scales.append(scales)
                yield from scales.unusable()

    def _untrue_others(self, shapes: dict[str, tuple[int, ...]]) -> Iterator[Problem]:
        """What stands by codes and scales, such as the weight's shape, and says something else of the weight.

        Args:
            shapes: of the weights, by the names of those tensors.
        """
        for number, suffix, make in [
            (number, suffix, make)
            for number, form in enumerate(self.weight_formats)
            for suffix, make in form.others.items()
        ]:
            infos = {name: self.infos[name] for name in shapes if name.endswith(suffix)}
            if not infos:
                continue
            dtype = next(iter(infos.values())).dtype
            if dtype not in INTEGERS or any(info.dtype != dtype for info in infos.values()):
                info = next(info for info in infos.values() if info.dtype not in INTEGERS or info.dtype != dtype)
                yield Problem(
                    "dtype", info.name, info, f"dtype {info.dtype}", f"{INTEGERS[0]}, or {INTEGERS[1]} in all"
                )
                continue
            values = Scales(self.reader, infos, dtype, among_mapped=True)
            made = {shape: make(shape).tolist() for shape in set(shapes.values())}
            for name, info in infos.items():
                found, wanted = values[name].tolist(), made[shapes[name]]
                if found != wanted:
                    yield Problem("value", info.name, info, str(found), f"{wanted} by the config")
            forms = list(self.weight_formats)
            forms[number] = forms[number].with_other(suffix, dtype)
            self.weight_formats = tuple(forms)

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
            if suffix and weight in self.infos and self._names_codes(self.infos[weight]):
                continue  # the codes are what is named
            if weight in expected and suffix:
                form = self.format_of(weight)
                if form is None or suffix not in (form.scale_suffix, *form.others):
                    found = f"a scale of {self.infos[weight].dtype if weight in self.infos else 'nothing'}"
                    codes = "codes" if self.weight_format is None else f"{self.weight_format.title} codes"
                    yield Problem("scale", info.name, info, found, f"{codes} next to it")
                continue
            layer = LAYER_KEY.match(name)
            if ".self_attn.indexer." in name and not (layer and int(layer[1]) >= layers):
                yield Problem("surplus", info.name, info, "an indexer's tensor", self._instead_of(name, expected))
                continue
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

    def _instead_of(self, name: str, expected: dict[str, TensorSpec]) -> str:
        """What is wanted where an indexer has a tensor too many."""
        prefix = name[: name.index(".indexer.")] + ".indexer."
        known = [other.removeprefix(prefix) for other in expected if other.startswith(prefix)]
        if known:
            return f"{', '.join(known)} and no other of an indexer"
        sparse = "deepseek_v32 and glm_moe_dsa have sparse attention"
        reason = f"indexer_types shares in layer {LAYER_KEY.match(name)[1]}" if self.config.has_indexers else sparse
        return f"attention without one by the config (model_type={self.config.model_type!r}: {reason})"

    def _names_codes(self, info: TensorInfo) -> bool:
        """Whether it is said of a weight's codes themselves that they cannot be read."""
        return self._unread_codes(info) is not None or (self.weight_format is None and any(of_codes(info.dtype)))

    def _unread_codes(self, info: TensorInfo) -> Problem | None:
        """What has the name of codes, and is none of this release's."""
        row = named_for_codes(info.name)
        if row is None:
            return None
        form = next((form for form in self.weight_formats if form.code_suffix == row.code_suffix), None)
        if form is None:
            return Problem("dtype", info.name, info, f"dtype {info.dtype}", _unannounced(row))
        if info.dtype != form.code_dtype:
            return Problem("dtype", info.name, info, f"dtype {info.dtype}", str(form.code_dtype))
        return None

    def _quantized_problem(
        self, info: TensorInfo, scale: TensorInfo | None, spec: TensorSpec, form: WeightFormat | None
    ) -> Problem | None:
        if form is None:
            wanted = "a floating-point tensor"
            if not self.weight_formats:
                wanted = _unannounced(next(of_codes(info.dtype)))
            return Problem("dtype", info.name, info, f"dtype {info.dtype}", wanted)
        wanted = form.scale_shape(spec.shape)
        if scale is None:
            found = f"{form.title} codes without {weight_name(info.name)}{form.scale_suffix}"
            return Problem("scale", info.name, info, found, f"{_short(form.scale_dtype)} scales {list(wanted)}")
        if scale.dtype != form.scale_dtype:
            return Problem("scale", scale.name, scale, f"dtype {scale.dtype}", str(form.scale_dtype))
        if scale.shape != wanted:
            why = f"{list(wanted)} for {list(spec.shape)} in blocks {form.block}"
            return Problem("scale", scale.name, scale, f"shape {list(scale.shape)}", why)
        return None


def _unannounced(row: WeightFormat) -> str:
    return f"no {row.title} without quantization_config (quant_method {row.method})"


def _short(dtype: torch.dtype) -> str:
    """``fp32``, ``bf16``."""
    return str(dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "fp")
