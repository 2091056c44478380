"""``mtp``: the multi-token-prediction module, dropped, extracted into a folder of its own, or grafted onto a model.

A release stores it as the layers after the last one: ``model.layers.61`` in DeepSeek-V3.
"""

from modeling_deepseek_moe.anatomy import read_config
from modeling_deepseek_moe.checkpoint.headers import DTYPE_NAMES, CheckpointError
from modeling_deepseek_moe.conversion._conversion import Conversion, Options, Output
from modeling_deepseek_moe.conversion._source import Source, as_is
from modeling_deepseek_moe.formats import split_scale, weight_name
from modeling_deepseek_moe.weights import LAYER_KEY, release_tensors

ACTIONS = ("drop", "extract", "graft")


def plan(source: Source, options: Options) -> Output:
    """What ``--action`` says.

    Raises:
        ValueError: it is none of `ACTIONS`, or ``--mtp-from`` does not go with it.
    """
    action = options.action
    if action not in ACTIONS:
        raise ValueError(f"--action {action} is not known, wanted one of {', '.join(ACTIONS)}")
    if (action == "graft") != (options.mtp_from is not None):
        raise ValueError(f"--action {action} and --mtp-from {options.mtp_from}: graft wants it, others do not")
    if action == "graft":
        return graft(source, Source(options.mtp_from))
    return drop(source) if action == "drop" else extract(source)


def names(source: Source) -> dict[str, int]:
    """The MTP module's tensors, with the number of the layer that each belongs to."""
    depth = _depth(source)
    layers = {name: int(match[1]) for name in source.reader if (match := LAYER_KEY.match(name))}
    return {name: layer for name, layer in layers.items() if layer >= depth}


def drop(source: Source) -> Output:
    """The model without it."""
    gone = _wanted(source)
    plans = [as_is(source, info) for name, info in source.reader.items() if name not in gone]
    return Output(plans, source.config | {"num_nextn_predict_layers": 0})


def extract(source: Source) -> Output:
    """It alone, with the config of the model that it belongs to."""
    return Output([as_is(source, source.reader[name]) for name in _wanted(source)], source.config)


def graft(source: Source, module: Source) -> Output:
    """The model with the module of another folder: an extracted one, or a whole release with the same dims."""
    present = next(iter(names(source)), None)
    if present is not None:
        raise CheckpointError(f"{source.folder}: tensor {present}: found an MTP module already, wanted none: drop it")
    grafted, shift = _wanted(module), _depth(source) - _depth(module)
    config = read_config(source.folder)
    config.num_nextn_predict_layers = 1 + max(grafted.values()) - min(grafted.values())
    specs, depth = release_tensors(config), _depth(source)
    wanted = {name for name in specs if (match := LAYER_KEY.match(name)) and int(match[1]) >= depth}
    plans, form = [as_is(source, info) for info in source.reader.values()], source.weight_format
    has_codes = bool(source.config.get("quantization_config"))
    for name, layer in grafted.items():
        info = module.reader[name]
        new = name.replace(f"model.layers.{layer}.", f"model.layers.{layer + shift}.", 1)
        weight, suffix = split_scale(weight_name(new))
        spec = specs.get(weight)
        if spec is None or (
            not suffix and info.shape != (form.code_shape(spec.shape) if module.is_codes(info) else spec.shape)
        ):
            found = f"{DTYPE_NAMES[info.dtype]} {list(info.shape)}"
            raise CheckpointError(
                f"{info.file}: tensor {name}: found {found}, wanted {spec and list(spec.shape)} for {source.folder}"
            )
        if suffix:
            module.scale_of(module.reader[split_scale(name)[0] + module.weight_format.code_suffix])
        elif spec.quantized and (info.dtype == form.code_dtype) != has_codes:
            raise CheckpointError(
                f"{info.file}: tensor {name}: found {DTYPE_NAMES[info.dtype]}, wanted "
                f"{DTYPE_NAMES[form.code_dtype] if has_codes else 'no codes'} as in {source.folder}: convert one of them first"
            )
        if module.is_codes(info):
            module.scale_of(info)
            if module.weight_format != form:
                found = f"{module.weight_format.name} in blocks of {module.weight_format.block}"
                raise CheckpointError(f"{module.folder}: found {found}, wanted {form.name} in blocks of {form.block}")
        wanted.discard(weight_name(new))
        plans.append(as_is(module, info, new))
    if wanted:
        raise CheckpointError(f"{module.folder}: found no tensor for {min(wanted)}, wanted the whole MTP module")
    return Output(
        plans, source.config | {"num_nextn_predict_layers": config.num_nextn_predict_layers}, also_read=(module,)
    )


def _wanted(source: Source) -> dict[str, int]:
    found = names(source)
    if not found:
        raise CheckpointError(f"{source.folder}: found no tensor of a layer {_depth(source)}, wanted an MTP module")
    return found


def _depth(source: Source) -> int:
    depth = source.config.get("num_hidden_layers")
    if type(depth) is not int or depth < 1:
        raise CheckpointError(
            f"{source.folder / 'config.json'}: found num_hidden_layers {depth!r}, wanted a positive integer"
        )
    return depth


CONVERSION = Conversion(
    "mtp",
    plan,
    ("max_shard_size", "action", "mtp_from"),
    required={"action": f"one of {', '.join(ACTIONS)}"},
    inverse="mtp",  # graft puts back what drop took, from what extract kept
)
