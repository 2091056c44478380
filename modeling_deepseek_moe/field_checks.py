"""What the fields of a config may hold, looked at before anything is computed or listed from them.

A config.json comes from anywhere: a count of 2 · 10⁹, text for a number or a rope without its factor is refused by the
field's name, in the words ``field=value must be …``.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch

# Far beyond any model, and few enough to be listed tensor by tensor.
MAX_LAYERS, MAX_EXPERTS = 4096, 1 << 18
MAX_WIDTH, MAX_TOKENS = 1 << 20, 1 << 40  # products of widths stay within 64 bits
COUNTS = {
    "vocab_size": (1, 1 << 24),
    "hidden_size": (1, MAX_WIDTH),
    "intermediate_size": (1, MAX_WIDTH),
    "num_hidden_layers": (1, None),
    "num_nextn_predict_layers": (0, None),
    "num_attention_heads": (1, 1 << 16),
    "moe_layer_freq": (1, MAX_WIDTH),
    "first_k_dense_replace": (0, MAX_WIDTH),
    "n_routed_experts": (0, None),
    "n_shared_experts": (0, MAX_LAYERS),
    "n_group": (1, MAX_EXPERTS),
    "kv_lora_rank": (1, MAX_WIDTH),
    "q_lora_rank": (1, MAX_WIDTH),
    "qk_nope_head_dim": (1, MAX_WIDTH),
    "qk_rope_head_dim": (None, MAX_WIDTH),  # of pairs: see the config
    "v_head_dim": (1, MAX_WIDTH),
    "max_position_embeddings": (1, MAX_TOKENS),
}
# name -> lower and upper bound, and whether the lower one itself is allowed
NUMBERS = {
    "routed_scaling_factor": (-1e6, 1e6, True),
    "rms_norm_eps": (0, 1, True),
    "initializer_range": (0, 1e6, True),
    "attention_dropout": (0, 1, True),
}
ROPE_NUMBERS = {
    "rope_theta": (1, 1e18, False),
    "factor": (1, 1e6, True),
    "beta_fast": (0, 1e6, False),
    "beta_slow": (0, 1e6, False),
    "mscale": (0, 1e6, True),
    "mscale_all_dim": (0, 1e6, True),
    "attention_factor": (0, 1e6, False),
    "low_freq_factor": (0, 1e6, False),
    "high_freq_factor": (0, 1e6, False),
    "partial_rotary_factor": (1, 1, True),
}
ROPE_NEEDS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
DTYPE_NAMES = tuple(str(dtype).removeprefix("torch.") for dtype in FLOATS)
# Latent attention sees the whole context in every layer. A value that asks for something else is refused; one that
# asks for nothing is left out, since transformers takes its mere presence for a wish.
WHOLE_CONTEXT = ("sliding_window", "attention_chunk_size", "kv_sharing_modes", "per_layer_config")


def check_counts(config: Any) -> None:
    """Whole numbers within bounds, by the table; also those that layers and experts make together.

    Raises:
        ValueError: one is not.
    """
    for name, (low, high) in COUNTS.items():
        value = getattr(config, name)
        if value is None:
            continue
        check_count(name, value, low, high)
    if config.n_routed_experts:
        check_count("moe_intermediate_size", config.moe_intermediate_size, 1, MAX_WIDTH)
    layers = config.num_hidden_layers + config.num_nextn_predict_layers
    if layers > MAX_LAYERS:
        raise ValueError(
            f"num_hidden_layers={brief(config.num_hidden_layers)} and num_nextn_predict_layers="
            f"{brief(config.num_nextn_predict_layers)} must be at most {MAX_LAYERS} together"
        )
    if layers * (config.n_routed_experts or 0) > MAX_EXPERTS:
        raise ValueError(
            f"n_routed_experts={brief(config.n_routed_experts)} must be at most {MAX_EXPERTS // layers} in {layers} layers"
        )
    pad = config.pad_token_id
    if pad is not None and (isinstance(pad, bool) or not -config.vocab_size <= pad < config.vocab_size):
        raise ValueError(f"pad_token_id={brief(pad)} must be below vocab_size={config.vocab_size}")


def check_numbers(config: Any) -> None:
    """
    Raises:
        ValueError: a number is not finite, or out of bounds.
    """
    for name, bounds in NUMBERS.items():
        _check_number(name, getattr(config, name), *bounds)


def check_texts(name: str, value: Any) -> None:
    """
    Raises:
        ValueError: it is no list of texts.
    """
    if value is not None and not (isinstance(value, list | tuple) and all(isinstance(text, str) for text in value)):
        raise ValueError(f"{name}={brief(value)} must be a list of texts or null")


def check_dtype(name: str, value: Any) -> None:
    """
    Raises:
        ValueError: it names no floating-point dtype that a model can be computed in.
    """
    if value is not None and value not in FLOATS and value not in DTYPE_NAMES:
        raise ValueError(f"{name}={brief(value)} must be one of {', '.join(DTYPE_NAMES)}")


def check_rope(name: str, rope: Any) -> None:
    """A rope as releases (``rope_scaling``) or transformers (``rope_parameters``) spell it.

    Raises:
        ValueError: it lacks a field that its type needs, or one holds something else than a number in bounds.
    """
    if rope is None:
        return
    if not isinstance(rope, Mapping):
        raise ValueError(f"{name}={brief(rope)} must be an object or null")
    kinds = [rope[key] for key in ("rope_type", "type") if rope.get(key) is not None]
    for kind in kinds:
        if not isinstance(kind, str):
            raise ValueError(f"{name} type={brief(kind)} must be text")
    for field in ROPE_NEEDS.get(kinds[0], ()) if kinds else ():
        if rope.get(field) is None:
            raise ValueError(f"{name}: {field}={rope.get(field)} must be given for type={kinds[0]!r}")
    for field, value in rope.items():
        if field in ROPE_NUMBERS and value is not None:
            _check_number(f"{name}: {field}", value, *ROPE_NUMBERS[field])
        elif field == "original_max_position_embeddings":
            check_count(f"{name}: {field}", value, 1, MAX_TOKENS)
        elif field in ("short_factor", "long_factor"):
            if not isinstance(value, list | tuple):
                raise ValueError(f"{name}: {field}={brief(value)} must be a list of numbers")
            for item in value:
                _check_number(f"{name}: {field}", item, 0, 1e6, False)
        elif isinstance(value, Mapping):
            raise ValueError(f"{name}: {field}={brief(value)} must be no object: all layers have one rope")


def check_rope_lists(rope: Mapping, width: int) -> None:
    """
    Raises:
        ValueError: factors by frequency are not as many as there are frequencies.
    """
    for field in ("short_factor", "long_factor"):
        if isinstance(rope.get(field), list | tuple) and len(rope[field]) != width // 2:
            raise ValueError(
                f"rope_scaling: {field} of {len(rope[field])} numbers must have qk_rope_head_dim/2={width // 2}"
            )


def drop_whole_context(fields: dict[str, Any]) -> None:
    """Take out of ``fields`` what says of the context that all of it is seen.

    Raises:
        ValueError: a field says otherwise.
    """
    for name in WHOLE_CONTEXT:
        value = fields.get(name)
        if value and not (name == "sliding_window" and fields.get("use_sliding_window") is False):
            raise ValueError(f"{name}={brief(value)} must be null: attention sees the whole context in every layer")
        fields.pop(name, None)
    kinds = fields.pop("layer_types", None)
    if kinds is not None and (not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds)):
        raise ValueError(f"layer_types={brief(kinds)} must be a list of 'full_attention' or null")


def check_names(kind: type, fields: Mapping[str, Any]) -> None:
    """
    Raises:
        ValueError: a field has the name of a method or of a value that is computed, in whose place it would be put.
    """
    for name in fields:
        own = getattr(kind, name, None)
        if callable(own) or (isinstance(own, property) and own.fset is None):
            raise ValueError(f"{name}={brief(fields[name])} must go: a config has no field of that name")
    labels = fields.get("num_labels")
    if labels is not None:
        check_count("num_labels", labels, 1, MAX_WIDTH)


def brief(value: Any) -> str:
    """A value in an error, cut where it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of too many digits, nesting without end
        text = f"a {type(value).__name__} too large to print"
    return text if len(text) <= 80 else text[:77] + "..."


def check_count(name: str, value: Any, low: int | None, high: int | None) -> None:
    """
    Raises:
        ValueError: it is no whole number within the bounds.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name}={brief(value)} must be a whole number")
    if low is not None and value < low:
        raise ValueError(f"{name}={brief(value)} must be at least {low}")
    if high is not None and value > high:
        raise ValueError(f"{name}={brief(value)} must be at most {high}")


def _check_number(name: str, value: Any, low: float, high: float, with_low: bool) -> None:
    if (
        not isinstance(value, int | float)
        or isinstance(value, bool)
        or (isinstance(value, float) and math.isnan(value))
    ):
        raise ValueError(f"{name}={brief(value)} must be a number")
    if value < low or (value == low and not with_low):
        raise ValueError(f"{name}={brief(value)} must be {'at least' if with_low else 'above'} {low}")
    if value > high:
        raise ValueError(f"{name}={brief(value)} must be at most {high:g}")
