"""Loading a release: every tensor checked against the config by its header, then handed over lazily.

What reaches the model are views into the mapped files, or tensors put together one at a time when transformers
asks for them: expert stacks, and dequantised weights where the caller wants those.
"""

import contextlib
import gc
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import chain
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.integrations.accelerate import get_device
from transformers.utils import logging

from modeling_deepseek_moe import formats
from modeling_deepseek_moe.bnb.loading import (
    Wish,
    bitsandbytes_config,
    quantize_experts,
    quantized_stacks,
    recognize_experts,
    stacked_experts,
    take_wish,
)
from modeling_deepseek_moe.bnb.packing import keep_readable
from modeling_deepseek_moe.bnb.saved import saved_state_dict
from modeling_deepseek_moe.checkpoint.contents import describe, refuse_file, refuse_other_makers
from modeling_deepseek_moe.checkpoint.headers import CheckpointError
from modeling_deepseek_moe.checkpoint.index import has_weights
from modeling_deepseek_moe.checkpoint.jsonfile import read_json
from modeling_deepseek_moe.checkpoint.reader import CheckpointReader
from modeling_deepseek_moe.config import QUANT_METHOD, on_disk
from modeling_deepseek_moe.device_memory import (
    accelerators,
    exhausted_in_conversions,
    give_back,
    not_loaded,
)
from modeling_deepseek_moe.field_checks import brief
from modeling_deepseek_moe.formats import WeightFormat, split_scale
from modeling_deepseek_moe.hybrid.model import place_experts, unhook_experts
from modeling_deepseek_moe.hybrid.placement import config_to_load, device_map_of, device_of, take_experts_out
from modeling_deepseek_moe.moe.router import DeepseekTopkRouter
from modeling_deepseek_moe.ops._memory import exhausted
from modeling_deepseek_moe.origin import Origin
from modeling_deepseek_moe.quantized.bitsandbytes_experts import BitsAndBytesExperts
from modeling_deepseek_moe.quantized.mapped import MappedExperts
from modeling_deepseek_moe.release import Release
from modeling_deepseek_moe.resuming import ResumingMixin
from modeling_deepseek_moe.streaming.model import enable_streaming_if_needed
from modeling_deepseek_moe.terminal import shown
from modeling_deepseek_moe.weights import EXPERT_KEY, LazyStack, LazyTensor, stack_sources

logger = logging.get_logger(__name__)

BIAS = ".e_score_correction_bias"


@dataclass
class Loading:
    """One call of `from_pretrained`: what its caller asked for, and the one release that it loads.

    ``reader`` is that of a local folder, whose headers are read already. ``wish`` is what bitsandbytes is to make of it.
    ``apart`` are the device map's entries that its quantiser was not shown.
    """

    reader: CheckpointReader | None
    wants_info: bool = False
    release: Release | None = None
    wish: Wish | None = None
    device_map: object = None
    apart: Mapping[str, object] = field(default_factory=dict)


# The one thing that `from_pretrained` hands on past transformers, which passes nothing of its caller's through.
_current: ContextVar[Loading | None] = ContextVar("loading", default=None)


def release_for(model: PreTrainedModel, files: Sequence[str | os.PathLike], ignored: Collection[str] = ()) -> Release:
    """The release in the files that transformers found, made once and checked in full against the model to be filled.

    A quantizer asks first, where there is one; ``ignored`` are kinds of problems that the caller lives with.
    """
    loading = _current.get() or Loading(None)
    if loading.release is not None:
        return loading.release
    reader = loading.reader
    if reader is None or set(reader.files) != {Path(file).absolute() for file in files}:
        reader = CheckpointReader(files)
    loading.release = release = Release(reader, model.config, loading.wish.stored if loading.wish else ())
    fit_model(model, release)
    needs_head = hasattr(model, "lm_head") and not model.config.tie_word_embeddings
    release.check(needs_head, ignored)
    return release


def fit_model(model: PreTrainedModel, release: Release) -> None:
    """Leave out what the caller did not want, and MTP layers and router biases that the release does not have.

    Derived checkpoints often lost the MTP module while their config still announces it.
    """
    config = model.config
    for gate in (module for module in model.modules() if isinstance(module, DeepseekTopkRouter)):
        if config.names.is_optional(BIAS) and not any(name.endswith(BIAS) for name in release.infos):
            gate.register_buffer(BIAS.removeprefix("."), None)
    folder = release.reader.files[0].parent
    left_out = release.leave_out_layers()
    said = ""
    if left_out:
        said = (
            f"{folder}: layer(s) {', '.join(map(str, left_out))} left out, as num_hidden_layers="
            f"{config.num_hidden_layers}, num_nextn_predict_layers={config.num_nextn_predict_layers} ask"
        )
    if config.num_nextn_predict_layers and not release.has_mtp:
        if said:
            said += "; MTP layers continue from the last decoder layer and are left out with it"
        else:
            said = (
                f"{folder}: the config announces {config.num_nextn_predict_layers} MTP layer(s), the checkpoint has "
                "none: the model is loaded without"
            )
        del model.base_model.layers[config.num_hidden_layers :]
        config.num_nextn_predict_layers = 0
    if said:
        logger.warning(f"{said}.")


def lazy_state_dict(model: PreTrainedModel, release: Release) -> dict[str, torch.Tensor | LazyStack | LazyTensor]:
    """The release under the model's parameter names, in the model's structure: plain, quantised or mapped.

    Where the model has a parameter of codes they go as they are; where it has a floating-point one they are
    dequantised to that parameter's dtype.
    """
    prefix = "" if model.base_model is not model else "model."
    targets = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    kept = MappedExperts, BitsAndBytesExperts  # whose tensors are none of a release's
    apart = {prefix + name for name, module in model.named_modules() if isinstance(module, kept)}
    state: dict[str, torch.Tensor | LazyStack | LazyTensor] = {}
    for name, info in release.infos.items():
        expert = EXPERT_KEY.match(name)
        if expert and (expert[1] in apart or f"{expert[1]}.gate_up_proj" in targets):
            continue
        weight, suffix = split_scale(name)
        if suffix and weight in targets and name not in targets:
            continue  # consumed by the dequantisation of its weight
        target, form = targets.get(name), release.format_of(name)
        if target is not None and form is not None and target.dtype != form.code_dtype:
            state[name] = LazyTensor(
                lambda name=name, dtype=target.dtype: release.dequantized(name, dtype),
                form.value_shape(info.shape),
                target.dtype,
            )
        else:
            state[name] = release.tensor(name)
    for name, target in targets.items():
        if ".mlp.experts." in name and name.rpartition(".")[0] not in apart:
            sources = stack_sources(name, target.shape[0])
            if all(source in release.infos for source in chain.from_iterable(sources)):  # else missing as a whole
                state[name] = _stack(release, sources, target)
    # what is no parameter's name is named by transformers, in a log: its control characters as text
    return {shown(name.removeprefix(prefix), keep=""): tensor for name, tensor in state.items()}


def _stack(release: Release, sources: list[list[str]], target: torch.Tensor) -> LazyStack:
    def decoded(source: str) -> WeightFormat | None:
        form = release.format_of(source)
        return form if form is not None and target.dtype != form.code_dtype else None

    def part(source: str):
        if decoded(source):
            return lambda: release.dequantized(source, target.dtype)
        return lambda: release.tensor(source)

    def shape_of(source: str) -> tuple[int, ...]:
        stored, form = release.infos[source].shape, decoded(source)
        return form.value_shape(stored) if form else stored

    shapes = list(map(shape_of, sources[0]))
    shape = (len(sources), sum(shape[0] for shape in shapes), *shapes[0][1:])
    return LazyStack([[part(source) for source in expert] for expert in sources], shape, target.dtype)


def _refuse_zero3() -> None:
    if is_deepspeed_zero3_enabled():
        raise ValueError(
            "found DeepSpeed's ZeRO-3 on, which takes parameters apart as they are made, wanted a whole model to load into: load it "
            "before TrainingArguments(deepspeed=...) is made, or shard it with distributed_config=DistributedConfig(fsdp_size=N)"
        )


class ReleaseLoadingMixin(ResumingMixin):
    """`from_pretrained` for release checkpoints. Mixed into the models before `PreTrainedModel`."""

    @classmethod
    def _load_pretrained_model(cls, model, state_dict, checkpoint_files, load_config, expected_keys=None):
        # transformers has no public hook between resolving the files and reading them; this is where it reads them.
        if model._hf_peft_config_loaded:  # an adapter's files, not a checkpoint's
            return super()._load_pretrained_model(model, state_dict, checkpoint_files, load_config, expected_keys)
        quantizer = load_config.hf_quantizer
        if quantizer is not None and getattr(quantizer.quantization_config, "quant_method", None) == "fp8":
            raise ValueError(
                "FineGrainedFP8Config applies to FP8 checkpoints here. To quantise a bf16 model, save it with "
                "save_pretrained(folder, quantize='fp8') and load that folder."
            )
        loading = _current.get() or Loading(None)
        if loading.apart:
            load_config.device_map.update(loading.apart)
        # What another quantiser saved is its own format, whose tensors no config tells: transformers loads that.
        config = None if quantizer is None else bitsandbytes_config(quantizer.quantization_config)
        is_foreign = (
            quantizer is not None
            and quantizer.pre_quantized
            and getattr(quantizer.quantization_config, "quant_method", None) != QUANT_METHOD
        )
        if state_dict is None and checkpoint_files and not is_foreign:
            ignored = {"shape"} if load_config.ignore_mismatched_sizes else set()
            release = release_for(model, checkpoint_files, ignored | ({"missing"} if loading.wants_info else set()))
            state_dict = lazy_state_dict(model, release)
            state_dict |= quantized_stacks(model, release, partial(_device_of, load_config.device_map))
            _remember_bias_dtypes(model, release)
            model.base_model.origin = Origin(release, model.dtype)
            loading.release = release = None  # the headers of all tensors: no one needs them now
        elif state_dict is None and checkpoint_files and config is not None:
            release = Release(CheckpointReader(checkpoint_files), model.config)
            recognize_experts(model, config, release)
            state_dict = saved_state_dict(model, release, partial(_is_on_cpu, load_config.device_map))
        loading.device_map = load_config.device_map  # each module's device, where the caller's was "auto"
        try:
            result = super()._load_pretrained_model(model, state_dict, checkpoint_files, load_config, expected_keys)
            failure = exhausted_in_conversions(result[0].conversion_errors)
        except RuntimeError as error:
            failure = exhausted(error)
            if failure is None:
                raise
        if failure is not None:
            raise torch.OutOfMemoryError(f"{not_loaded(model.state_dict())} ({failure})")
        place_experts(model, load_config.device_map)
        for module in stacked_experts(model).values():
            module.requires_grad_(False)
        # Saving falls back on the registered conversions, not on those that this load happened to need: none.
        model._weight_conversions = None
        keep_readable(model)
        if config is not None:
            enable_streaming_if_needed(model)  # this package's own quantizer does so itself
        return result

    def _get_dtype_plan(self, dtype):
        # transformers has no public hook between its quantizer's work on an empty model and measuring that for a device map
        loading = _current.get()
        if loading is not None and loading.wish is not None:
            quantize_experts(self, loading.wish.config, loading.device_map)
        elif loading is not None and loading.reader is not None:
            config = bitsandbytes_config(getattr(self.config, "quantization_config", None))
            if config is not None:
                recognize_experts(self, config, Release(loading.reader, self.config))
        return super()._get_dtype_plan(dtype)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As `PreTrainedModel.from_pretrained`; a local folder's index and headers are checked before anything else.

        With ``output_loading_info=True`` tensors that the checkpoint lacks are initialised and told there as
        ``missing_keys``; an FP8 checkpoint must have them all. A config with fewer layers than the folder's own is
        the caller's wish: the others are left out, and a warning names them.

        Raises:
            CheckpointError: a tensor is missing, or is not what the config wants.
            ValueError: an FP8 checkpoint, and the config of another quantiser; or DeepSpeed's ZeRO-3 is on already.
        """
        _refuse_zero3()
        path = pretrained_model_name_or_path
        subfolder, variant = kwargs.get("subfolder", ""), kwargs.get("variant")
        wish = take_wish(cls.config_class, path, kwargs)
        _refuse_requantising(path, kwargs.get("config"), kwargs.get("quantization_config"))
        with _collector_paused():
            reader = None
            if path is not None and variant is None and kwargs.get("gguf_file") is None:
                reader = _open_folder(path, subfolder)
            given, apart = kwargs.get("device_map"), {}
            if path is not None and (isinstance(given, Mapping) or (given is not None and wish is None)):
                config_of = cache(partial(config_to_load, cls, path, dict(kwargs)))
                given = kwargs["device_map"] = device_map_of(cls, kwargs, config_of)
                apart = take_experts_out(given, config_of, wish.config if wish else None)
            loading = Loading(reader, bool(kwargs.get("output_loading_info")), None, wish, given, apart)
            token = _current.set(loading)
            try:
                loaded = super().from_pretrained(path, *args, **kwargs)
                unhook_experts(loaded[0] if isinstance(loaded, tuple) else loaded)
                return loaded
            except RuntimeError as error:
                failure = exhausted(error)  # not the error: its traceback holds what was loaded
                if failure is None:
                    raise
            finally:
                _current.reset(token)
        free = "".join(f"; {give_back(device)}" for device in accelerators(loading.device_map))
        raise torch.OutOfMemoryError(
            f"{path}: the device's memory is exhausted while loading, nothing of the model is kept: {failure}{free}. A device "
            'map such as {"": 0, "model.layers.*.mlp.experts": "cpu"} leaves routed experts on the CPU, which computes them; '
            'device_map="auto" chooses it where the model does not fit what is free.'
        )

    def to(self, *args, **kwargs):
        """As `PreTrainedModel.to`; a model that still has tensors without data says which way it gets them.

        Raises:
            NotImplementedError: a tensor was never loaded.
        """
        try:
            return super().to(*args, **kwargs)
        except NotImplementedError as error:
            empty = [name for name, tensor in self.state_dict().items() if tensor.is_meta]
            if not empty:
                raise
            raise NotImplementedError(
                f"tensor {empty[0]}: found no data (it is on the meta device, as are {len(empty) - 1} others), wanted "
                "a loaded or initialised tensor. A checkpoint's experts are stacked, and its FP8 codes are kept, by "
                "from_pretrained(folder, device_map=..., offload_folder=...) only, not by loaders that copy tensor by "
                "tensor; dispatch_model takes a model loaded that way."
            ) from error


def _refuse_requantising(path, config, wanted) -> None:
    """Refuse FP8 weights for another quantiser by name; transformers' own error does not say the way out."""
    found = getattr(config, "quantization_config", None)
    if found is None or wanted is None:
        return
    found, wanted = (on_disk(c if isinstance(c, Mapping) else c.to_dict()) for c in (found, wanted))
    method = str(getattr(wanted.get("quant_method"), "value", wanted.get("quant_method")))
    if found.get("quant_method") in formats.methods() and "fp8" not in method:
        row = formats.of_config(found)
        raise ValueError(
            f"{path}: found {row.title} weights, wanted floating-point ones for {method}: turn them into bf16 with "
            f"{row.converter}, or with FineGrainedFP8Config(dequantize=True) and save_pretrained, and load that folder"
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
    """
    Raises:
        CheckpointError: a weights file instead of a folder, weights of another maker, or files that are no checkpoint.
    """
    folder = Path(path) / subfolder
    refuse_file(folder)
    refuse_other_makers(folder)
    if (folder / "config.json").exists():
        model_type = read_json(folder / "config.json", "the config of a checkpoint").get("model_type")
        if model_type is not None and not isinstance(model_type, str):
            raise CheckpointError(f"{folder / 'config.json'}: model_type: found {brief(model_type)}, wanted text")
    if has_weights(folder):
        return CheckpointReader.open(folder)
    # adapters and pickles are transformers' to load or refuse
    said = (
        describe(folder)
        if folder.is_dir() and not any(folder.glob("adapter_model*")) and not any(folder.glob("*.bin*"))
        else None
    )
    if said is not None:
        raise CheckpointError(f"{folder}: {said}")
    return None


def _is_on_cpu(device_map: dict | None, name: str) -> bool:
    return device_map is None or str(device_of(device_map, name)) in ("cpu", "None")


def _device_of(device_map: dict | None, name: str) -> torch.device | str | int:
    return "cpu" if device_map is None else get_device(device_map, name, valid_torch_device=True)


def _remember_bias_dtypes(model: PreTrainedModel, release: Release) -> None:
    """Router biases are held in fp32; one that was released narrower is written back so while it still fits."""
    prefix = "" if model.base_model is not model else "model."
    for name, module in model.named_modules():
        info = release.infos.get(f"{prefix}{name}.e_score_correction_bias")
        if info is not None:
            module.bias_release_dtype = info.dtype
