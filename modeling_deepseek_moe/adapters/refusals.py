"""What adapters cannot have: refused by name, before anything is changed, with the way out."""

import re
from collections.abc import Iterable
from dataclasses import fields

from torch import nn

from modeling_deepseek_moe.adapters.targets import Targets, is_experts, suffix
from modeling_deepseek_moe.bnb.packing import is_packed, is_quantized_by_bitsandbytes
from modeling_deepseek_moe.ops.experts import STACKS
from modeling_deepseek_moe.quantized.experts import QuantizedExperts
from modeling_deepseek_moe.quantized.linear import QuantizedLinear

# Methods that work on what goes into or comes out of a layer, or on its dequantised weight; others compute with the codes.
METHODS = ("LORA", "ADALORA", "IA3", "LOHA", "LOKR", "VERA")
# Of them, those that size their matrices by the codes, of which several may share an element.
OF_SHAPE = ("LOHA", "LOKR")
# Methods of peft 0.21 that take bitsandbytes' int8 codes for weights.
BLIND = ("DEFT", "HRA", "PEANUT")
FROM_WEIGHT = ("kasa_config", "use_bdlora")  # variants of LoRA that start from the weight or in its dtype
STARTS = (True, False, "gaussian")  # init_lora_weights that look at no weight and at no data
OF_DATA = "eva"  # which looks at no weight either
# Those that leave the weight as it is: what is stored takes their place.
LEAVING = ("orthogonal", "lora_ga", "mica")
PLAIN = ("lora_dropout", "fan_in_fan_out", "lora_bias")  # fields that low-rank products of experts have no use for


def check_config(modules: dict[str, nn.Module], targets: Targets) -> None:
    """
    Raises:
        ValueError: the adapter wants of stacked experts, or of weights that are codes, what they cannot give.
    """
    config = targets.config
    if config.peft_type.value == "LORA":
        experts = [name for name, module in modules.items() if is_experts(module)]
        _check_experts(experts, modules, config, targets.reaches_experts)
        _check_start(modules, targets)
    _check_codes(modules.items(), config)


def _check_experts(experts: list[str], modules: dict[str, nn.Module], config, reaches_experts: bool) -> None:
    from peft.tuners.tuners_utils import check_target_module_exists

    for name in experts if config.target_modules not in (None, "all-linear") else ():
        if check_target_module_exists(config, name):
            raise ValueError(
                f"{name}: found the module of all routed experts among target_modules, wanted its stacks: "
                f'target_parameters=["mlp.experts.{STACKS[0]}", "mlp.experts.{STACKS[1]}"]'
            )
    if not experts or not reaches_experts:
        return
    found = {field: getattr(config, field) for field in PLAIN if getattr(config, field)} | variants(config)
    wrong = ", ".join(f"{field}={str(value)[:40]!s}" for field, value in found.items())
    if wrong:
        raise ValueError(
            f"{experts[0]}: found {wrong} for an adapter of stacked experts, wanted LoRA or rsLoRA without dropout whose "
            "matrices start from random numbers and zeros: name the layers of attention and the shared experts alone, in an adapter of theirs"
        )
    _check_ranks(experts[0], modules[experts[0]], config)


def variants(config) -> dict:
    """What a LoRA config asks for beyond two matrices that start from random numbers and zeros, by field."""
    found = {f.name: getattr(config, f.name) for f in fields(config) if f.metadata.get("is_lora_variant")}
    if config.init_lora_weights not in STARTS:
        found["init_lora_weights"] = config.init_lora_weights
    return {field: value for field, value in found.items() if value}


def _check_start(modules: dict[str, nn.Module], targets: Targets) -> None:
    config = targets.config
    start = config.init_lora_weights
    if str(start).lower() == "orthogonal":
        for name, module in modules.items():
            if is_quantized_by_bitsandbytes(module) and targets.reaches(name):
                raise ValueError(
                    f"{name}: found bitsandbytes' codes, wanted floating-point weights for init_lora_weights={start!r}, which starts in "
                    "their dtype: leave it out; a stored adapter loads with true in its place in adapter_config.json"
                )
    found = {field: "LoRA without it does not" for field in FROM_WEIGHT if getattr(config, field, None)}
    if start not in STARTS and start != OF_DATA and not is_overwritten(config):
        found["init_lora_weights"] = f"{', '.join(map(repr, STARTS))} do not"
    if not found:
        return
    field, instead = next(iter(found.items()))
    for name, module in modules.items():
        if isinstance(module, QuantizedLinear) and targets.reaches(name):
            raise ValueError(
                f"{name}: found {_resident(module)}, wanted bf16 or fp32 ones for {field}={str(getattr(config, field))[:40]!r}, which starts "
                f"from the weight or in its dtype: {instead}; or {_way_out(module)}"
            )


def is_overwritten(config) -> bool:
    """Whether a LoRA config is a stored adapter's, whose start leaves the weight as it is and so can be any."""
    return config.inference_mode and str(config.init_lora_weights).lower() in LEAVING


def _resident(module: QuantizedLinear | QuantizedExperts) -> str:
    kind = "codes" if isinstance(module, QuantizedLinear) else "routed experts"
    return f"{module.weight_format.title}-resident {kind}"


def _way_out(module: QuantizedLinear | QuantizedExperts) -> str:
    form = module.weight_format
    return form.to_floats if form.foreign else f"{form.to_floats}, or convert it with {form.converter}"


def _check_ranks(name: str, experts: nn.Module, config) -> None:
    from peft.utils.other import get_pattern_key

    shapes = stack_shapes(experts)
    for stack, shape in zip(STACKS, shapes, strict=True):
        rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), f"{name}.{stack}"), config.r)
        if rank > min(shape):
            raise ValueError(
                f"{name}.{stack}: found rank {rank}, wanted at most {min(shape)}: the matrix of one expert is "
                f"{shape[0]} × {shape[1]}"
            )


def stack_shapes(experts: nn.Module) -> tuple[tuple[int, int], tuple[int, int]]:
    """``(2I, D)`` and ``(D, I)``: of one expert's matrices in the two stacks."""
    if isinstance(experts, QuantizedExperts):
        gate, *_ = experts.matrices(0).values()
        width, hidden = experts.weight_format.value_shape(tuple(gate.codes.shape))
    else:
        width, hidden = experts.intermediate_dim, experts.hidden_dim
    return (2 * width, hidden), (hidden, width)


def _check_codes(modules: Iterable[tuple[str, nn.Module]], config) -> None:
    parameters = sorted(getattr(config, "target_parameters", None) or ())
    copies = tuple(getattr(config, "modules_to_save", None) or ())
    method = config.peft_type.value
    if not parameters and not copies and method in METHODS and method not in OF_SHAPE:
        return
    for name, module in modules:
        parts = name.split(".")
        parents = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
        is_copied = bool(copies) and any(parent.endswith(copies) for parent in parents)
        if is_quantized_by_bitsandbytes(module):
            wish = f"modules_to_save={list(copies)}, which trains a copy" if is_copied else ""
            if method in OF_SHAPE and _is_packed(module) and _is_target(config, name):
                wish = f"peft_type={method}, whose matrices have the weight's shape"
            if method in BLIND and _is_target(config, name):
                wish = f"peft_type={method}, which takes codes for weights"
            if wish:
                raise ValueError(
                    f"{name}: found bitsandbytes' codes, wanted floating-point weights for {wish}: load the model with the layer's name "
                    "among llm_int8_skip_modules, next to 'lm_head'; or call model.dequantize()"
                )
            continue
        if not isinstance(module, QuantizedLinear | QuantizedExperts):
            continue
        kept, way_out = _resident(module), _way_out(module)
        found = [
            target for target in parameters if isinstance(module, QuantizedLinear) and suffix(target, f"{name}.weight")
        ]
        if found:
            raise ValueError(
                f"{name}: found {kept}, wanted bf16 or fp32 ones for target_parameters={found}, of which peft makes the sum: "
                f"name the layer in target_modules; or {way_out}"
            )
        if is_copied:
            raise ValueError(
                f"{name}: found {kept}, wanted bf16 or fp32 ones for modules_to_save={list(copies)}, which trains a copy: "
                f"{way_out}"
            )
        methods = [own for own in METHODS if not (_is_packed(module) and own in OF_SHAPE)]
        if method not in methods and _is_target(config, name):
            raise ValueError(
                f"{name}: found {kept}, wanted bf16 or fp32 ones for an adapter of peft_type={method}; on such codes there are "
                f"{', '.join(methods)}: {way_out}"
            )


def _is_target(config, name: str) -> bool:
    from peft.tuners.tuners_utils import check_target_module_exists

    return config.target_modules == "all-linear" or bool(check_target_module_exists(config, name))


def _is_packed(module: nn.Module) -> bool:
    """Whether an element of a linear layer's codes is several weights."""
    return isinstance(module, nn.Linear) and module.weight.shape != (module.out_features, module.in_features)


def check_packed(modules: Iterable[tuple[str, nn.Module]]) -> None:
    """
    Raises:
        ValueError: DoRA has measured weights that bitsandbytes packed when the model was used.
    """
    for name, module in modules:
        if getattr(module, "lora_magnitude_vector", None) and is_packed(module.base_layer):
            name = re.sub(r"\.(base_layer|original_module)\b", "", name)
            raise ValueError(
                f"{name}: found 4-bit codes that bitsandbytes packed when the model was used, wanted them as loaded, since "
                "DoRA reads them: call model.train() before the adapter is made"
            )
