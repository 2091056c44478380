"""Loading a release: every tensor checked against the config by its header, then handed over lazily.

What reaches the model are views into the mapped files, or tensors put together one at a time when transformers
asks for them: expert stacks, and dequantised weights where the caller wants those.
"""

import contextlib
import gc
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from modeling_deepseek_moe.checkpoint import INDEX_NAME, WEIGHTS_NAME, CheckpointReader
from modeling_deepseek_moe.headers import CheckpointError, TensorInfo
from modeling_deepseek_moe.mapped_experts import MappedExperts
from modeling_deepseek_moe.moe.experts import DeepseekExperts
from modeling_deepseek_moe.ops import block_fp8
from modeling_deepseek_moe.scales import Scales
from modeling_deepseek_moe.weights import (
    EXPERT_KEY,
    LAYER_KEY,
    MTP_KEY,
    SCALE_SUFFIX,
    LazyStack,
    LazyTensor,
    TensorSpec,
    release_tensors,
    stack_sources,
    unstack_info,
)

logger = logging.get_logger(__name__)
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# What `from_pretrained` tells the functions that transformers calls in its course: whether the caller asked for the
# loading info, where missing tensors are then told; and the reader of a local folder, whose headers it has read.
_wants_loading_info = ContextVar("wants_loading_info", default=False)
_opened = ContextVar("opened", default=None)


@dataclass(frozen=True)
class Problem:
    """One disagreement of a checkpoint with its config, for which it is refused.

    ``kind`` is ``missing``, ``surplus`` (a layer or expert that the config does not have), ``shape``, ``dtype`` or
    ``scale``; ``info`` is what the header says of the tensor, ``None`` when it is missing.
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
        # a headless model is saved without the prefix
        self.is_bare = not any(name.startswith("model.") for name in reader)
        infos = reader.values()
        if any(".experts.gate_up_proj" in name or ".experts.down_proj" in name for name in reader):
            experts = config.n_routed_experts
            infos = (part for info in infos for part in unstack_info(info, experts))
        self.infos = {self.canonical(info.name): info for info in infos}
        quantization = getattr(config, "quantization_config", None)
        if quantization is not None and not isinstance(quantization, Mapping):
            quantization = quantization.to_dict()
        self.is_fp8 = bool(quantization) and quantization.get("quant_method") in ("fp8", "deepseek_moe_fp8")
        self.block = tuple((quantization or {}).get("weight_block_size") or block_fp8.BLOCK)

    def canonical(self, name: str) -> str:
        return (
            f"model.{name}" if self.is_bare and name.partition(".")[0] in ("layers", "embed_tokens", "norm") else name
        )

    def tensor(self, name: str) -> torch.Tensor:
        if self.scales is not None and name in self.scales:
            return self.scales[name]
        return self.reader.view(self.infos[name])

    def is_quantized(self, name: str) -> bool:
        return name in self.infos and self.infos[name].dtype == block_fp8.FP8_DTYPE

    def dequantized(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        return block_fp8.dequantize(self.tensor(name), self.tensor(name + SCALE_SUFFIX), dtype, self.block)

    @property
    def has_mtp(self) -> bool:
        first = f"model.layers.{self.config.num_hidden_layers}."
        return any(name.startswith(first) for name in self.infos)

    def check(self, needs_head: bool, ignored: Collection[str] = ()) -> None:
        """Compare names, shapes and dtypes with the config, and look at every scale's values.

        Args:
            ignored: kinds of `Problem` to let pass.

        Raises:
            CheckpointError: for the first disagreement, naming file, tensor, what was found and what was wanted.
        """
        for problem in self.problems(needs_head):
            if problem.kind in ignored:
                continue
            file = self.where(problem.name) if problem.info is None else problem.info.file
            raise CheckpointError(f"{file}: tensor {problem.name}: found {problem.found}, wanted {problem.wanted}")

    def problems(self, needs_head: bool, read_scales: bool = True) -> Iterator[Problem]:
        """Every disagreement with the config; from the headers alone with ``read_scales=False``.

        Scales come last: they are read when nothing in the headers stood against it, or when the caller goes on.
        """
        expected = release_tensors(self.config)
        if self.is_bare or not needs_head:
            expected.pop("lm_head.weight", None)
        yield from self._surplus(expected)
        scales = {}
        for name, spec in expected.items():
            info = self.infos.get(name)
            if info is None:
                yield Problem("missing", name, None, "no such tensor", f"{list(spec.shape)} by the config")
                continue
            if info.shape != spec.shape:
                wanted = f"{list(spec.shape)} by the config"
                yield Problem("shape", info.name, info, f"shape {list(info.shape)}", wanted)
                if len(info.shape) != len(spec.shape):
                    continue
            if info.dtype == block_fp8.FP8_DTYPE:
                scale = self.infos.get(name + SCALE_SUFFIX)
                problem = self._quantized_problem(info, scale, spec)
                if problem is None:
                    scales[name + SCALE_SUFFIX] = scale
                else:
                    yield problem
            elif info.dtype not in FLOATS:
                wanted = f"one of {', '.join(str(dtype) for dtype in FLOATS)}"
                yield Problem("dtype", info.name, info, f"dtype {info.dtype}", wanted)
        if read_scales:
            self.scales = Scales(self.reader, scales)
            for info, value, index in self.scales.unusable():
                yield Problem("scale", info.name, info, f"{value} at {index}", "finite, non-negative scales")

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
            weight = name.removesuffix(SCALE_SUFFIX)
            if name in expected or (weight in expected and weight != name):
                if weight != name and not self.is_quantized(weight):
                    found = f"a scale of {self.infos[weight].dtype if weight in self.infos else 'nothing'}"
                    yield Problem("scale", info.name, info, found, "FP8 codes beside it")
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

    def _quantized_problem(self, info: TensorInfo, scale: TensorInfo | None, spec: TensorSpec) -> Problem | None:
        if not (self.is_fp8 and spec.quantized):
            reason = (
                "a floating-point tensor" if self.is_fp8 else "no FP8 without quantization_config (quant_method fp8)"
            )
            return Problem("dtype", info.name, info, f"dtype {info.dtype}", reason)
        wanted = block_fp8.scale_shape(info.shape, self.block)
        if scale is None:
            found = f"FP8 codes without {info.name}{SCALE_SUFFIX}"
            return Problem("scale", info.name, info, found, f"fp32 scales {list(wanted)}")
        if scale.dtype != torch.float32:
            return Problem("scale", scale.name, scale, f"dtype {scale.dtype}", "torch.float32")
        if scale.shape != wanted:
            why = f"{list(wanted)} for {list(info.shape)} in blocks {self.block}"
            return Problem("scale", scale.name, scale, f"shape {list(scale.shape)}", why)
        return None


def open_release(checkpoint_files: Sequence[str | os.PathLike], config) -> Release:
    """The release in the files that transformers found; headers that `from_pretrained` read are not read again."""
    reader = _opened.get()
    if reader is None or set(reader.files) != {Path(file).absolute() for file in checkpoint_files}:
        reader = CheckpointReader(checkpoint_files)
    return Release(reader, config)


def prepare(model: PreTrainedModel, release: Release, ignored: Collection[str] = ()) -> None:
    """Check a release against a model about to be filled, and drop MTP layers that the release does not have.

    Derived checkpoints often lost the MTP module while their config still announces it. ``ignored`` is as for
    `Release.check`.
    """
    config, base = model.config, model.base_model
    if config.num_nextn_predict_layers and not release.has_mtp:
        logger.warning(
            f"{release.reader.files[0].parent}: the config announces {config.num_nextn_predict_layers} MTP layer(s), "
            "the checkpoint has none: the model is loaded without."
        )
        del base.layers[config.num_hidden_layers :]
        config.num_nextn_predict_layers = 0
        release.config.num_nextn_predict_layers = 0
    needs_head = hasattr(model, "lm_head") and not config.tie_word_embeddings
    release.check(needs_head, ignored)


def lazy_state_dict(model: PreTrainedModel, release: Release) -> dict[str, torch.Tensor | LazyStack | LazyTensor]:
    """The release under the model's parameter names, in the model's structure: plain, FP8-resident or mapped.

    Where the model has an FP8 parameter the codes go as they are; where it has a floating-point one they are
    dequantised to that parameter's dtype.
    """
    prefix = "" if model.base_model is not model else "model."
    targets = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    mapped = {prefix + name for name, module in model.named_modules() if isinstance(module, MappedExperts)}
    state = {}
    for name, info in release.infos.items():
        expert = EXPERT_KEY.match(name)
        if expert and (expert[1] in mapped or f"{expert[1]}.gate_up_proj" in targets):
            continue
        weight = name.removesuffix(SCALE_SUFFIX)
        if weight != name and weight in targets and name not in targets:
            continue  # consumed by the dequantisation of its weight
        target = targets.get(name)
        if target is not None and release.is_quantized(name) and target.dtype != block_fp8.FP8_DTYPE:
            state[name] = LazyTensor(
                lambda name=name, dtype=target.dtype: release.dequantized(name, dtype), info.shape, target.dtype
            )
        else:
            state[name] = release.tensor(name)
    for name, target in targets.items():
        if ".mlp.experts." in name:
            sources = stack_sources(name, target.shape[0])
            if all(source in release.infos for source in chain.from_iterable(sources)):  # else missing as a whole
                state[name] = _stack(release, sources, target)
    return {name.removeprefix(prefix) if prefix else name: tensor for name, tensor in state.items()}


def _stack(release: Release, sources: list[list[str]], target: torch.Tensor) -> LazyStack:
    def part(source: str):
        if release.is_quantized(source) and target.dtype != block_fp8.FP8_DTYPE:
            return lambda: release.dequantized(source, target.dtype)
        return lambda: release.tensor(source)

    shapes = [release.infos[source].shape for source in sources[0]]
    shape = (len(sources), sum(shape[0] for shape in shapes), *shapes[0][1:])
    return LazyStack([[part(source) for source in expert] for expert in sources], shape, target.dtype)


def accept_release_keys(module: DeepseekExperts, state_dict: dict, prefix: str, *_) -> None:
    """A `load_state_dict` pre-hook: experts stored one by one, as saved, are copied into the stacks.

    `Trainer` resumes with ``load_state_dict`` on the saved files. Shards may each hold some of the experts.
    """
    for stack, parameter in module.named_parameters(recurse=False):
        sources = stack_sources(prefix + stack, module.num_experts)
        present = [name for names in sources for name in names if name in state_dict]
        if not present:
            continue
        for names, expert in zip(sources, parameter.detach().unbind(0), strict=True):
            for name, rows in zip(names, expert.chunk(len(names)), strict=True):
                if name in state_dict:
                    rows.copy_(state_dict.pop(name))
        if len(present) == len(sources) * len(sources[0]):
            state_dict[prefix + stack] = parameter.detach()


class ReleaseLoadingMixin:
    """`from_pretrained` for release checkpoints. Mixed into the models before `PreTrainedModel`."""

    @classmethod
    def _load_pretrained_model(cls, model, state_dict, checkpoint_files, load_config, expected_keys=None):
        # transformers has no public hook between resolving the files and reading them; this is where it reads them.
        quantizer = load_config.hf_quantizer
        if quantizer is not None and getattr(quantizer.quantization_config, "quant_method", None) == "fp8":
            raise ValueError(
                "FineGrainedFP8Config applies to FP8 checkpoints here. To quantise a bf16 model, save it with "
                "save_pretrained(folder, quantize='fp8') and load that folder."
            )
        # What another quantiser saved is its own format, whose tensors no config tells: transformers loads that.
        is_foreign = quantizer is not None and quantizer.pre_quantized and not hasattr(quantizer, "release")
        if state_dict is None and checkpoint_files and not is_foreign:
            release = getattr(quantizer, "release", None)
            if release is None:
                release = open_release(checkpoint_files, model.config)
                ignored = {"shape"} if load_config.ignore_mismatched_sizes else set()
                prepare(model, release, ignored | ({"missing"} if _wants_loading_info.get() else set()))
            state_dict = lazy_state_dict(model, release)
            _remember_bias_dtypes(model, release)
        result = super()._load_pretrained_model(model, state_dict, checkpoint_files, load_config, expected_keys)
        # Saving falls back on the registered conversions, not on those that this load happened to need: none.
        model._weight_conversions = None
        return result

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As `PreTrainedModel.from_pretrained`; a local folder's index and headers are checked before anything else.

        With ``output_loading_info=True`` tensors that the checkpoint lacks are initialised and told there as
        ``missing_keys``; an FP8 checkpoint must have them all.

        Raises:
            CheckpointError: a tensor is missing, or is not what the config wants.
            ValueError: an FP8 checkpoint, and the config of another quantiser.
        """
        path = pretrained_model_name_or_path
        subfolder, variant = kwargs.get("subfolder", ""), kwargs.get("variant")
        _refuse_requantising(path, kwargs.get("config"), kwargs.get("quantization_config"))
        with _collector_paused():
            reader = None
            if path is not None and variant is None and kwargs.get("gguf_file") is None:
                reader = _open_folder(path, subfolder)
            wants_info = _wants_loading_info.set(bool(kwargs.get("output_loading_info")))
            opened = _opened.set(reader)
            try:
                return super().from_pretrained(path, *args, **kwargs)
            finally:
                _wants_loading_info.reset(wants_info)
                _opened.reset(opened)


def _refuse_requantising(path, config, wanted) -> None:
    """Refuse FP8 weights for another quantiser by name; transformers' own error does not say the way out."""
    found = getattr(config, "quantization_config", None)
    if found is None or wanted is None:
        return
    found, wanted = (dict(c) if isinstance(c, Mapping) else c.to_dict() for c in (found, wanted))
    method = str(getattr(wanted.get("quant_method"), "value", wanted.get("quant_method")))
    if found.get("quant_method") in ("fp8", "deepseek_moe_fp8") and "fp8" not in method:
        raise ValueError(
            f"{path}: found FP8 weights, wanted floating-point ones for {method}: turn them into bf16 with "
            "`deepseek-moe convert fp8-to-bf16`, or with FineGrainedFP8Config(dequantize=True) and save_pretrained, and "
            "load that folder"
        )


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    """A load makes hundreds of thousands of small objects and no garbage in cycles.

    Python's collector, set off by their number, would go over the whole process to find that out, several times.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _open_folder(path, subfolder: str) -> CheckpointReader | None:
    folder = Path(path) / subfolder
    if any((folder / name).is_file() for name in (WEIGHTS_NAME, INDEX_NAME)):
        return CheckpointReader.open(folder)
    return None


def _remember_bias_dtypes(model: PreTrainedModel, release: Release) -> None:
    """Router biases are held in fp32; one that was released narrower is written back so while it still fits."""
    prefix = "" if model.base_model is not model else "model."
    for name, module in model.named_modules():
        info = release.infos.get(f"{prefix}{name}.e_score_correction_bias")
        if info is not None:
            module.bias_release_dtype = info.dtype
