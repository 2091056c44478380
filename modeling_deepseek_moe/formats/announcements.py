"""How a release's ``quantization_config`` says what its weights are: as flat fields for the table of formats to compare.

DeepSeek's are flat already. compressed-tensors' (Kimi-K2-Thinking) are groups of modules with a scheme each, of which
this family's releases have one, and a list of the modules that keep floating-point weights.
"""

import re
from collections.abc import Callable, Mapping, Sequence

from transformers.quantizers.quantizers_utils import should_convert_module

COMPRESSED_TENSORS = "compressed-tensors"
BLOCK = "weight_block_size"
MIXED = "mixed-precision"  # where each group names its own format
LINEAR = "Linear"
NO_CODES = "none"  # activations that are not quantised
# transformers' name for `ignored` where fields are flat; a release without it keeps its head in floating point.
SKIPPED = "modules_to_not_convert"
HEAD = "lm_head"


def schemes(fields: Mapping) -> list[dict]:
    """The flat fields of each group of modules, in their order: of one group, but for compressed-tensors.

    Raises:
        ValueError: groups that are none.
    """
    if fields.get("quant_method") != COMPRESSED_TENSORS:
        return [dict(fields)]
    groups = fields.get("config_groups")
    if not isinstance(groups, Mapping) or not groups or not all(isinstance(g, Mapping) for g in groups.values()):
        raise ValueError(f"quantization_config: config_groups={_brief(groups)} is not supported, wanted groups")
    return [{"quant_method": COMPRESSED_TENSORS} | _scheme(group, fields.get("format")) for group in groups.values()]


def _scheme(group: Mapping, format_of_all: object) -> dict:
    weights = group.get("weights")
    if not isinstance(weights, Mapping):
        raise ValueError(f"quantization_config: weights={_brief(weights)} is not supported, wanted their scheme")
    activations = [group.get(name) for name in ("input_activations", "output_activations")]
    size, block = weights.get("group_size"), weights.get("block_structure")
    return {
        "format": group.get("format") or format_of_all,
        "activations": NO_CODES if activations == [None, None] else "quantised",
        BLOCK: block if size is None else [1, size],
        **{name: weights.get(name) for name in ("num_bits", "type", "strategy", "symmetric", "actorder")},
    }


def _brief(value: object) -> str:
    return repr(value)[:80]


def compressed_tensors(flat: Mapping, block: Sequence[int], ignored: Sequence[str]) -> dict:
    """The inverse of `schemes`: linear layers have these weights, but for modules ``ignored``."""
    size = {"group_size": block[1]} if flat["strategy"] == "group" else {"block_structure": list(block)}
    names = ("num_bits", "type", "strategy", "symmetric")
    weights = size | {"dynamic": False} | {name: flat[name] for name in names}
    group = {"targets": [LINEAR], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": COMPRESSED_TENSORS,
        "format": flat["format"],
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(ignored),
    }


def with_group(fields: dict, other: dict, targets: Sequence[str]) -> dict:
    """compressed-tensors' fields with the scheme of ``other`` for the modules ``targets``."""
    first, second = ({**f["config_groups"]["group_0"], "format": f["format"]} for f in (fields, other))
    groups = {"group_0": first, "group_1": second | {"targets": list(targets)}}
    return {**fields, "format": MIXED, "config_groups": groups}


def scheme_of(fields: Mapping | None) -> Callable[[str], int | None]:
    """Of a module, by its name: which of `schemes` its weight has; ``None`` if it keeps a floating-point one.

    Names and ``re:`` patterns, of ``ignore`` first and then of the groups, go before kinds of modules.

    Raises:
        ValueError: lists of names that are none, or a pattern that is none.
    """
    fields = fields or {}
    ignored = _patterns("ignore", fields.get("ignore"))
    if fields.get("quant_method") != COMPRESSED_TENSORS:
        skipped = _names(SKIPPED, fields.get(SKIPPED))

        def only(module: str) -> int | None:
            kept = any(pattern.match(module) for pattern in ignored) or not should_convert_module(module, skipped)
            return None if kept else 0

        return only
    groups = [group.get("targets") for group in fields["config_groups"].values()]
    named = [_patterns("targets", names) for names in groups]
    default = next((index for index, names in enumerate(groups) if names and LINEAR in names), None)

    def scheme(module: str) -> int | None:
        if any(pattern.match(module) for pattern in ignored):
            return None
        found = (index for index, patterns in enumerate(named) if any(p.match(module) for p in patterns))
        return next(found, default)

    return scheme


def head_has_codes(fields: Mapping | None) -> bool:
    """Whether a ``quantization_config`` says of the head that it is codes, which no release of DeepSeek's or Kimi's does.

    Raises:
        ValueError: as `scheme_of`.
    """
    if not fields or (fields.get("quant_method") != COMPRESSED_TENSORS and fields.get(SKIPPED) is None):
        return False
    return scheme_of(fields)(HEAD) is not None


def _names(field: str, names: object) -> list[str]:
    names = names or ()
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"quantization_config: {field}={_brief(names)} is not supported, wanted names")
    return list(names)


def _patterns(field: str, names: object) -> list[re.Pattern]:
    patterns = []
    for name in _names(field, names):
        try:
            patterns.append(re.compile(name[3:] if name.startswith("re:") else re.escape(name) + "$"))
        except re.error as error:
            raise ValueError(
                f"quantization_config: {field}: found {name[:80]!r} ({error}), wanted a pattern"
            ) from None
    return patterns
