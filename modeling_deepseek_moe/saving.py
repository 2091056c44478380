"""Saving in the release format: the same keys, bytes and dtypes as loaded, streamed and atomic."""

import copy
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import chain

import torch
from huggingface_hub import HfApi
from transformers.utils import logging

from modeling_deepseek_moe import formats
from modeling_deepseek_moe.anatomy import read_config
from modeling_deepseek_moe.bnb.formats import METHOD as BITSANDBYTES
from modeling_deepseek_moe.bnb.loading import coded_experts
from modeling_deepseek_moe.bnb.packing import without_classes
from modeling_deepseek_moe.checkpoint.reader import CheckpointReader
from modeling_deepseek_moe.checkpoint.writer import TensorPlan, write_checkpoint
from modeling_deepseek_moe.compat import ModelMixin
from modeling_deepseek_moe.config import QUANT_METHOD
from modeling_deepseek_moe.distributed.release_parts import is_written_by_ranks, own_class, save_from_ranks
from modeling_deepseek_moe.formats import WeightFormat
from modeling_deepseek_moe.hub import auto_map, shim_files
from modeling_deepseek_moe.mtp import SharedModule
from modeling_deepseek_moe.offloaded import with_offloaded
from modeling_deepseek_moe.origin import is_same, released_bias
from modeling_deepseek_moe.quantized.bitsandbytes_experts import BitsAndBytesMatrices
from modeling_deepseek_moe.quantized.experts import QuantizedExperts
from modeling_deepseek_moe.quantized.linear import QuantizedLinear
from modeling_deepseek_moe.quantized.mapped import MappedExperts
from modeling_deepseek_moe.release import Release
from modeling_deepseek_moe.weights import EXPERT_KEY, linear_modules, natural_order, release_tensors, unstack

# `Trainer` reads the config of a checkpoint it resumes from with the bare `PreTrainedConfig`, which fails on a scaled
# rope in the release's spelling. In these folders, and only there, transformers' own spelling is written.
TRAINER_CHECKPOINT = re.compile(r"checkpoint-\d+")


class ReleaseSavingMixin(ModelMixin):
    """`save_pretrained` in the release format. Mixed into the models before `PreTrainedModel`."""

    release_architecture: str | None = None  # what `architectures` says on disk, if not the class's own name

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "5GB",
        *,
        quantize: str | None = None,
        like: str | os.PathLike | None = None,
        remote_code: bool = False,
        **kwargs,
    ) -> None:
        """Write config, generation config and weights in the release format.

        Tensors stream to the disk one at a time; everything appears at once, or, after an error, nothing does.

        Args:
            state_dict: what to save instead of the model's own, under the model's names.
            max_shard_size: bytes, or text such as ``"5GB"``.
            quantize: the name of a format, such as ``"fp8"``: what a release keeps in FP8 is written as codes and scales, by
                the rule of ``like`` or of the release it was dequantised from (``scale_fmt: ue8m0``), if of that kind.
            like: the release that the model was loaded from: its dtypes are reused, and tensors that training did not
                change (compared after dequantising, where it is FP8) are written byte for byte.
            remote_code: also write the shim and ``auto_map`` with which ``trust_remote_code=True`` finds this package.
            kwargs: as `PreTrainedModel.save_pretrained`. What FSDP2 sharded is written by all ranks, each its part: call it on all.
                Adapters, distributed checkpoints, other shards, offloaded weights and ``variant`` are saved by transformers itself.

        Raises:
            OSError: disk full. Nothing that was in the folder is touched.
            ValueError: ``quantize`` is unknown, or another format than that of codes that the model holds; a weight to
                quantise holds NaN or Inf; or weights were quantised in place.
        """
        form = _asked_for(quantize)
        if is_written_by_ranks(self, state_dict, like, kwargs):
            return self._save_from_ranks(save_directory, form, max_shard_size, remote_code)
        tensors = without_classes(with_offloaded(self) if state_dict is None else state_dict)
        self._refuse_unknown_format(tensors)
        if self._saved_by_transformers(tensors, kwargs):
            self._refuse_mapped(save_directory, kwargs, own=bool(quantize or remote_code or like))
            return super().save_pretrained(
                save_directory, is_main_process, state_dict, push_to_hub, max_shard_size, **kwargs
            )
        if not is_main_process:
            return None
        if os.path.isfile(save_directory):
            raise NotADirectoryError(f"{save_directory}: found a file, wanted a directory to save into")
        release = None if like is None else Release(CheckpointReader.open(like), read_config(like))
        form = self._format_held(form, release)
        write_checkpoint(
            save_directory,
            self._plans(tensors, form, release),
            max_shard_size=max_shard_size,
            texts=self._texts(form, remote_code, save_directory, release),
            show_progress=logging.is_progress_bar_enabled(),
        )
        if push_to_hub:
            asked = {name: kwargs.get(name) for name in ("repo_id", "token", "private", "commit_message")}
            _push(save_directory, **asked)
        return None

    def _save_from_ranks(
        self, folder: str | os.PathLike, form: WeightFormat | None, max_shard_size: int | str, remote_code: bool
    ) -> None:
        form = self._format_held(form, None)
        save_from_ranks(self, folder, form, max_shard_size, self._texts(form, remote_code, folder))

    def _plans(self, tensors: dict, form: WeightFormat | None, release: Release | None) -> list[TensorPlan]:
        """Everything that is written, under the release's names."""
        origin, names = self.base_model.origin, self.config.names
        origin.check(self)
        stored = _as_stored(self, _plans(self, tensors, form, release), form)
        plans = [replace(plan, name=names.released(plan.name)) for plan in stored]
        return plans + [TensorPlan.of(name, tensor) for name, tensor in origin.carried().items()]

    def _refuse_mapped(self, save_directory: str | os.PathLike, asked: Iterable[str], own: bool) -> None:
        """
        Args:
            own: whether something was asked for that transformers' saving does not know.

        Raises:
            ValueError: so it was; or mapped experts: they are no parameters, and transformers would write a checkpoint
                without them.
        """
        if own:
            raise ValueError(
                "quantize, like and remote_code need a plain model: no adapters, shards, offloading or variant"
            )
        if getattr(self, "_hf_peft_config_loaded", False):
            return
        said = f"{save_directory}: transformers' own saving (asked for by {', '.join(asked) or 'sharded weights'}) cannot write"
        if coded_experts(self):
            raise ValueError(
                f"{said} routed experts as bitsandbytes does; leave that out, or call model.dequantize() first"
            )
        if any(isinstance(module, MappedExperts) for module in self.modules()):
            raise ValueError(
                f"{said} mapped FP8 experts; leave that out, or load with FineGrainedFP8Config(dequantize=True)"
            )

    def _refuse_unknown_format(self, tensors: dict) -> None:
        """
        Raises:
            ValueError: weights were quantised in place, so that no config says how to load them.
        """
        quantizer = getattr(self, "hf_quantizer", None)
        has_format = quantizer is not None and quantizer.quantization_config.quant_method != QUANT_METHOD
        if has_format or getattr(self, "_hf_peft_config_loaded", False):
            return
        for name, tensor in chain(tensors.items(), self.named_parameters()):
            kind = type(tensor)
            if isinstance(tensor, torch.Tensor) and kind.__module__.partition(".")[0] != "torch":
                raise ValueError(
                    f"tensor {name}: found {kind.__module__}.{kind.__name__}, quantised after the model was loaded, wanted "
                    "one whose format a config tells: save the model before that, and quantise it again when it is loaded, or "
                    "load it with from_pretrained(folder, quantization_config=...), TorchAoConfig for torchao"
                )

    def _saved_by_transformers(self, tensors: dict, kwargs: dict) -> bool:
        quantizer = getattr(self, "hf_quantizer", None)
        return bool(
            getattr(self, "_hf_peft_config_loaded", False)
            or kwargs.get("distributed_checkpoint")
            or kwargs.get("variant") is not None
            or kwargs.get("save_original_format") is False
            or (
                quantizer is not None
                and quantizer.quantization_config.quant_method not in (QUANT_METHOD, BITSANDBYTES)
            )
            or any(not _is_plain(tensor) for tensor in tensors.values() if isinstance(tensor, torch.Tensor))
        )

    def _format_held(self, wanted: WeightFormat | None, release: Release | None) -> WeightFormat | None:
        """The format of the codes that the model holds, in their blocks, if it holds any: others join them.

        Else that of the ``release`` that is saved after, where it has the same kind of codes as is ``wanted``.

        Raises:
            ValueError: it is another than ``wanted``; codes are not turned into those of another format.
        """
        if wanted is None:
            return None
        if release and release.weight_format and release.weight_format.method == wanted.method:
            wanted = release.weight_format
        elif release is None:
            wanted = formats.remembered(getattr(self.config, formats.RELEASED, None), wanted)
        if coded_experts(self) or self._is_quantized_by(BITSANDBYTES):
            raise ValueError(
                f"quantize={wanted.name!r}: found weights that bitsandbytes quantised, wanted floating-point ones: call "
                "model.dequantize() first"
            )
        held = {form.name: form for form in _forms_held(self).values()}
        if held and wanted.name not in held:
            raise ValueError(
                f"quantize={wanted.name!r}: found weights in {next(iter(held))!r}, wanted floating-point ones: load the model "
                "with FineGrainedFP8Config(dequantize=True)"
            )
        return held.get(wanted.name, wanted)

    def _is_quantized_by(self, method: str) -> bool:
        quantizer = getattr(self, "hf_quantizer", None)
        return quantizer is not None and quantizer.quantization_config.quant_method == method

    def _texts(
        self, form: WeightFormat | None, remote_code: bool, folder: str | os.PathLike, like: Release | None = None
    ) -> dict[str, str]:
        for_trainer = TRAINER_CHECKPOINT.fullmatch(os.path.basename(os.path.normpath(folder)))
        config = copy.deepcopy(self.config)
        dtype = (like and like.config.dtype) or self.dtype  # that of the tensors that are written
        config.dtype = str(dtype).removeprefix("torch.")
        config.architectures = [self.release_architecture or own_class(self).__name__]
        if form and hasattr(config, formats.RELEASED):
            delattr(config, formats.RELEASED)
        if form and getattr(config, "quantization_config", None) is None:
            wide = linear_modules(config, lambda name, spec: not (spec.quantized and form.fits(spec.shape)))
            config.quantization_config = form.quantization_config(wide)
        fields = config.to_diff_dict()
        # An inherited auto_map names files that were not copied here; other engines would look for them.
        fields.pop("auto_map", None)
        fields["torch_dtype"] = fields.pop("dtype")
        if for_trainer and fields["rope_scaling"] is not None:
            fields["rope_parameters"] = config.rope_parameters
            del fields["rope_scaling"], fields["rope_theta"]
        fields = config.write_release(fields)
        texts = {}
        if remote_code:
            fields["auto_map"] = auto_map(own_class(self))
            texts |= shim_files()
        texts["config.json"] = json.dumps(fields, indent=2, sort_keys=True) + "\n"
        if self.can_generate():
            texts["generation_config.json"] = self.generation_config.to_json_string(use_diff=True)
        return texts


def _is_plain(tensor: torch.Tensor) -> bool:
    """Neither offloaded nor sharded."""
    return tensor.device.type != "meta" and type(tensor) in (torch.Tensor, torch.nn.Parameter)


def _asked_for(quantize: str | None) -> WeightFormat | None:
    try:
        return None if quantize is None else formats.by_name(quantize)
    except ValueError as error:
        raise ValueError(f"quantize={error}") from None


def _push(
    folder: str | os.PathLike, repo_id: str | None, token: str | None, private: bool | None, commit_message: str | None
) -> None:
    api = HfApi(token=token)
    repo = api.create_repo(
        repo_id or os.path.basename(os.path.normpath(folder)), exist_ok=True, private=private
    ).repo_id
    api.upload_folder(repo_id=repo, folder_path=folder, commit_message=commit_message)


def _plans(
    model, tensors: dict[str, torch.Tensor], form: WeightFormat | None, release: Release | None
) -> list[TensorPlan]:
    plans = []
    specs = release_tensors(model.config).items() if form else ()
    quantized = {name for name, spec in specs if spec.quantized and form.fits(spec.shape)}
    prefix = "model." if model.base_model is model else ""
    views = list(_release_views(model, tensors))
    kept = {} if release else model.base_model.origin.as_released({prefix + name: tensor for name, tensor in views})
    for name, tensor in views:
        if prefix + name in kept and prefix + name not in quantized:
            plans.append(TensorPlan.of(name, kept[prefix + name]))
            continue
        original = release and release.infos.get(prefix + name)
        if (
            original is not None
            and not any(formats.of_codes(tensor.dtype))
            and release.holds(prefix + name, tensor.shape)
        ):
            as_released = _as_released(release, name, prefix + name, tensor.detach(), form is not None)
            if as_released:
                plans += as_released
                continue
        if prefix + name in quantized and not any(formats.of_codes(tensor.dtype)):
            plans += _quantized(name, tensor, form)
        else:
            plans.append(TensorPlan.of(name, tensor))
    return plans


def _forms_held(model) -> dict[str, WeightFormat]:
    """The formats of a model's layers that hold codes, by the layers' names; bitsandbytes' name their tensors themselves."""
    modules = ((name, m.owner if isinstance(m, SharedModule) else m) for name, m in model.named_modules())
    layers = [(name, m) for name, m in modules if isinstance(m, QuantizedLinear | QuantizedExperts)]
    return {name: m.weight_format for name, m in layers if not isinstance(m, BitsAndBytesMatrices)}


def _as_stored(model, plans: Iterable[TensorPlan], form: WeightFormat | None) -> list[TensorPlan]:
    """Codes and scales under the names that the format has for them in files, and its other tensors; in their order."""
    held = _forms_held(model)
    specs = release_tensors(model.config) if form or held else {}
    prefix, stored = "model." if model.base_model is model else "", []
    for plan in plans:
        weight, suffix = formats.split_scale(plan.name)
        spec = specs.get(prefix + weight)
        if spec is None or not spec.quantized or not (suffix or any(formats.of_codes(plan.dtype))):
            stored.append(plan)
            continue
        expert = EXPERT_KEY.match(weight)
        form_of = held.get(expert[1] if expert else weight.removesuffix(".weight"), form)
        codes, scales = form_of.on_disk(weight, spec.shape).items()
        name, (dtype, shape) = scales if suffix else codes
        if form_of.in_a_column:
            stored.append(TensorPlan(name, dtype, shape, partial(_reshaped, plan, shape)))
        else:
            stored.append(replace(plan, name=name))
        if not suffix:
            stored += [TensorPlan.of(weight + other, make(spec.shape)) for other, make in form_of.others.items()]
    return sorted(stored, key=lambda plan: natural_order(plan.name))


def _reshaped(plan: TensorPlan, shape: tuple[int, ...]) -> torch.Tensor:
    made = plan.produce()
    return (made if isinstance(made, torch.Tensor) else torch.cat(list(made))).reshape(shape)


def _release_views(model, tensors: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor under its release name, as a view: nothing is copied here."""
    ignored = set(model._keys_to_ignore_on_save or ())
    coded = coded_experts(model)
    for name, tensor in tensors.items():
        if name.rpartition(".")[0] in coded:
            continue
        source = model.all_tied_weights_keys.get(name)
        if name in ignored or (source in tensors and tensor.data_ptr() == tensors[source].data_ptr()):
            continue
        if name.endswith(".e_score_correction_bias"):
            tensor = released_bias(model.get_submodule(name.rpartition(".")[0]), tensor)
        yield from unstack(name, tensor)
    for prefix, module in coded.items():
        for name, tensor in module.named_tensors():
            yield f"{prefix}.{name}", tensor
    for prefix, module in model.named_modules():
        if isinstance(module, MappedExperts) and prefix not in coded:
            for name, matrix in module.named_matrices():
                yield f"{prefix}.{name}.weight", matrix.codes
                yield f"{prefix}.{name}.weight{module.weight_format.scale_parameter}", matrix.scales


def _quantized(name: str, tensor: torch.Tensor, form: WeightFormat) -> list[TensorPlan]:
    # The codes are made apart from the scales: a shard's scales are written first, and its codes may not pile up.
    shape, weight = tuple(tensor.shape), tensor.detach()
    scales = form.scale_dtype, form.scale_shape(shape)
    return [
        TensorPlan(name, form.code_dtype, form.code_shape(shape), lambda: form.quantize(weight)[0]),
        TensorPlan(name + form.scale_suffix, *scales, lambda: form.scales(weight)),
    ]


def _as_released(release: Release, name: str, key: str, tensor: torch.Tensor, keep_codes: bool) -> list[TensorPlan]:
    """The release's codes and scales of a tensor that is still what they stand for, or it in the release's dtype.

    Nothing for a weight that is to be quantised again, and for a router's bias, which is fp32 once it was trained.
    """
    if release.is_quantized(key):
        if not (keep_codes and torch.equal(release.dequantized(key, tensor.dtype), tensor.cpu())):
            return []
        parts = ((name, key), (release.scale_name(name), release.scale_name(key)))
        return [TensorPlan.of(part, release.tensor(source)) for part, source in parts]
    if key.endswith(".e_score_correction_bias"):
        return []
    dtype = release.infos[key].dtype
    if dtype != tensor.dtype and is_same(released := release.tensor(key), tensor):
        return [TensorPlan.of(name, released)]
    return [TensorPlan(name, dtype, tuple(tensor.shape), lambda: tensor.to(dtype))]
