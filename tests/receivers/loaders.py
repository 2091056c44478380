"""The engines' own loading functions, read from their sources and run on a folder.

Importing an engine wants its GPU libraries; the functions that hand tensors out want none. They are taken from the source with
`ast` and called with stand-ins for what they ask: a model that names its parameters (those of the tables), and no pipeline ranks.

The sources are those of an installed engine, or lie in ``$RECEIVERS/PACKAGE``, for instance by

    pip download --no-deps vllm sglang kt-kernel && unzip 'vllm*.whl' -d $RECEIVERS
"""

import __future__

import ast
import concurrent.futures
import importlib.util
import os
import re
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from safetensors import safe_open

from receivers import ktransformers
from receivers.table import Folder, Parameter

VLLM = ("model_executor/models/deepseek_v2.py", "model_executor/models/deepseek_mtp.py")
SGLANG = "srt/models/deepseek_common/deepseek_weight_loader.py"


def source_of(package: str) -> Path | None:
    """The folder of an engine's package, if it is installed or lies in ``$RECEIVERS``."""
    given = os.environ.get("RECEIVERS")
    if given and (Path(given) / package).is_dir():
        return Path(given) / package
    found = importlib.util.find_spec(package)
    return Path(found.origin).parent if found and found.origin else None


def taken(file: Path, names: list[str], namespace: dict) -> dict:
    """Functions, classes and methods (``Class.method``) of a file, in a namespace that has what they refer to."""
    tree, found = ast.parse(file.read_text()), []
    for name in names:
        owner, _, inner = name.rpartition(".")
        body = next(node.body for node in tree.body if getattr(node, "name", None) == owner) if owner else tree.body
        node = next(node for node in body if getattr(node, "name", None) == inner)
        node.decorator_list = [] if owner else node.decorator_list
        found.append(node)
    code = compile(
        ast.Module(found, []), str(file), "exec", flags=__future__.annotations.compiler_flag, dont_inherit=True
    )
    exec(code, namespace)
    return namespace


def _model(parameters: dict[str, Parameter], folder: Folder, **more) -> SimpleNamespace:
    return SimpleNamespace(config=folder.config, named_parameters=parameters.items, **more)


def load_by_vllm(root: Path, folder: Folder, parameters: list[dict[str, Parameter]]) -> None:
    """`DeepseekV2Model.load_weights` under the name ``model.``, and `DeepSeekMTP.load_weights`."""
    layers = root / "model_executor" / "layers" / "fused_moe"
    mapping = _vllm_experts(layers)
    space = {
        "typing": typing,
        "Callable": Callable,
        "fused_moe_make_expert_params_mapping": mapping,
        "get_pp_missing_layer_names": lambda model: [],
        "is_pp_missing_parameter": lambda name, model: False,
        "_try_load_fp8_indexer_wk": lambda *args: False,
        "is_mtp_completeness_check_enabled": lambda: True,
        "maybe_remap_kv_scale_name": lambda name, names: name,
        "default_weight_loader": lambda parameter, tensor: parameter.weight_loader(parameter, tensor),
    }
    taken(root / "model_executor" / "models" / "utils.py", ["get_spec_layer_idx_from_weight_name"], space)
    main, draft = parameters
    own = {"num_redundant_experts": 0, "use_mha": False, "is_fused_shared_expert_enabled": False}
    load = taken(root / VLLM[0], ["DeepseekV2Model.load_weights"], space.copy())["load_weights"]
    load(_model(main, folder, **own), folder.tensors())
    names = ["DeepSeekMTP.load_weights", "DeepSeekMTP._rewrite_spec_layer_name"]
    found = taken(root / VLLM[1], names, space.copy())
    start, count = folder.config.num_hidden_layers, folder.config.num_nextn_predict_layers
    model = _model(draft, folder, **own, model=SimpleNamespace(mtp_start_layer_idx=start, num_mtp_layers=count))
    model._rewrite_spec_layer_name = lambda *args: found["_rewrite_spec_layer_name"](model, *args)
    found["load_weights"](model, folder.tensors())


def _vllm_experts(layers: Path) -> Callable:
    file = layers / "routed_experts.py"
    names = ["RoutedExperts.make_expert_params_mapping", "RoutedExperts.build_expert_params_mapping"]
    space = {
        "EplbState": SimpleNamespace(build_initial_global_physical_to_logical_map=lambda count, more: range(count))
    }
    taken(file, names, space)
    space["RoutedExperts"] = SimpleNamespace(build_expert_params_mapping=space["build_expert_params_mapping"])
    return space["make_expert_params_mapping"]


def load_by_sglang(root: Path, folder: Folder, parameters: list[dict[str, Parameter]]) -> None:
    """`DeepseekV2WeightLoaderMixin.do_load_weights` of the model and of the one that drafts."""
    experts = root / "srt" / "layers" / "moe" / "fused_moe_triton" / "layer.py"
    mapping = taken(experts, ["FusedMoE.make_expert_params_mapping"], {"List": list, "Tuple": tuple})
    space = {
        "concurrent": concurrent,
        "torch": torch,
        "re": re,
        "dataclass": dataclass,
        "List": list,
        "logger": SimpleNamespace(warning=_refuse),
        "FusedMoE": SimpleNamespace(
            make_expert_params_mapping=lambda **given: mapping["make_expert_params_mapping"](None, **given)
        ),
        "is_wint4afp8_or_wint4a16_config": lambda config: False,
        "should_async_load": lambda tensor: False,
        "maybe_executor_submit": lambda func, func_args, func_kwargs=None, **_: func(
            *func_args, **(func_kwargs or {})
        ),
        "default_weight_loader": lambda parameter, tensor: parameter.weight_loader(parameter, tensor),
        "_is_npu": False,
    }
    taken(root / "srt" / "layers" / "utils" / "common.py", ["get_layer_id"], space)
    names = ["NextNEnabledConfig", "NextNDisabledConfig", "_clone_if_runai_streamed_tensor"]
    names += ["_load_fused_expert_tensor", "_resolve_quark_fp8_block_scale_name"]
    names += [f"DeepseekV2WeightLoaderMixin.{one}" for one in ("do_load_weights", "_initialize_nextn_conf")]
    space["RUNAI_STREAMER_TENSOR_ATTR"] = "streamed"
    taken(root / SGLANG, names, space)
    for is_draft, own in enumerate(parameters):
        if not own:
            continue
        model = _model(own, folder, num_fused_shared_experts=0, quant_config=None, model=SimpleNamespace())
        model.pp_group = SimpleNamespace(is_last_rank=True)
        model._initialize_nextn_conf = lambda *args, model=model: space["_initialize_nextn_conf"](model, *args)
        model._maybe_quant_weights_to_fp8_ue8m0 = lambda weights, *_: weights
        model.post_load_weights = lambda **_: None
        space["NVFP4_CKPT_FP8_ATTN_QUANT_MODULES"] = []
        space["do_load_weights"](model, folder.tensors(), is_nextn=bool(is_draft))


def _refuse(text: str) -> None:
    """The engine warns of a tensor that it has no place for, and goes on."""
    raise AssertionError(text)


def load_by_ktransformers(root: Path, folder: Folder, parameters: list[dict[str, Parameter]]) -> None:
    """The loader of `kt_kernel` for what the folder holds, layer by layer; and SGLang's for the rest, where it is at hand."""
    method, name = ktransformers.LOADERS[folder.quantization.get("quant_method")]
    space = {"os": os, "np": np, "torch": torch, "safe_open": safe_open}
    taken(root / "utils" / "loader.py", ["SafeTensorLoader", name], space)
    loader, experts = space[name](str(folder.path)), parameters[0]
    codes = {"BF16": "weight", "FP8": "weight", "RAWINT4": "weight_packed"}[method]
    scales = {"FP8": "weight_scale_inv", "RAWINT4": "weight_scale"}.get(method)
    stored = dict(folder.tensors())
    for layer in sorted({int(key.split(".")[0]) for key in experts}):
        found = loader.load_experts(f"model.layers.{layer}")
        for projection in ktransformers.PROJECTIONS:
            for expert in range(len(found[projection])):
                at = f"model.layers.{layer}.mlp.experts.{expert}.{projection}_proj."
                for key, suffix in ((projection, codes), (f"{projection}_scale", scales)):
                    if suffix is None:
                        continue
                    same = _bytes(found[key][expert]) == _bytes(stored[at + suffix])
                    assert same, f"{at}{suffix}: not what kt_kernel reads"
                    experts[f"{layer}.{projection}"].put((expert, suffix), stored[at + suffix], at + suffix)
                if method == "RAWINT4":
                    shape = stored[at + "weight_shape"]
                    experts[f"{layer}.{projection}"].put((expert, "weight_shape"), shape, at)


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()
