"""Adapters of ``deepseek-moe train``: which layers ``lora_targets`` means, the base in 4 bits, and what both are refused with.

The base is frozen and keeps the weights that it has: fp32, bf16, FP8 codes as released, or with ``qlora`` the 4-bit codes that
bitsandbytes makes while it loads. What is written is an adapter's folder, as peft writes it.
"""

import importlib.util
from dataclasses import dataclass

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from modeling_deepseek_moe.config import DeepseekMoeConfig

ATTENTION = ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
# What a part's layers are called in an adapter, by the end of their paths: a bare gate_proj stands for the routed experts.
PARTS = {
    "attention": ATTENTION,
    "dense": tuple(f"mlp.{name}" for name in PROJECTIONS),
    "shared": tuple(f"shared_experts.{name}" for name in PROJECTIONS),
    "experts": ("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
}
NAMES = ATTENTION
ALL = "all"


@dataclass
class LoraOptions:
    """The options of an adapter; those that are ``None`` were not given.

    Raises:
        ValueError: both kinds at once, options of an adapter without one, or values that it cannot have.
    """

    lora: bool = False
    qlora: bool = False
    lora_rank: int | None = None
    lora_alpha: float | None = None
    lora_targets: str | None = None
    lora_dropout: float | None = None
    lora_init: str | None = None

    def __post_init__(self):
        given = {name: value for name, value in vars(self).items() if name.startswith("lora_") and value is not None}
        if self.lora and self.qlora:
            raise ValueError("found lora and qlora, wanted one: qlora is lora on a base in 4 bits")
        if given and not self.trains_adapter:
            raise ValueError(f"found {', '.join(given)} without lora or qlora, wanted one of them")
        if self.lora_rank is not None and self.lora_rank < 1:
            raise ValueError(f"lora_rank={self.lora_rank} must be at least 1")
        if self.lora_alpha is not None and not self.lora_alpha > 0:
            raise ValueError(f"lora_alpha={self.lora_alpha} must be above 0")
        if self.lora_dropout is not None and not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout={self.lora_dropout} must be at least 0 and below 1")
        if self.trains_adapter:
            parse_targets(self.lora_targets or ALL)

    @property
    def trains_adapter(self) -> bool:
        return self.lora or self.qlora

    @property
    def rank(self) -> int:
        return 16 if self.lora_rank is None else self.lora_rank

    @property
    def alpha(self) -> float:
        """Twice the rank unless told otherwise: the product of the two matrices counts double."""
        return 2 * self.rank if self.lora_alpha is None else self.lora_alpha


def parse_targets(text: str) -> tuple[str, ...]:
    """Parts and names of layers, divided by commas.

    Raises:
        ValueError: one that is neither.
    """
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    wrong = [name for name in names if name not in (ALL, *PARTS, *NAMES)]
    if wrong or not names:
        raise ValueError(
            f"lora_targets: found {', '.join(wrong) or 'none'}, wanted {ALL}, parts ({', '.join(PARTS)}), or names of layers "
            f"({', '.join(NAMES)}), divided by commas"
        )
    return names


def check_rank(options: LoraOptions, config: DeepseekMoeConfig) -> None:
    """Before anything is loaded.

    Raises:
        ValueError: a rank that a routed expert's matrix, which is to be adapted, does not have.
    """
    most = min(config.hidden_size, config.moe_intermediate_size) if config.n_routed_experts else options.rank
    if options.rank > most and not {ALL, "experts"}.isdisjoint(parse_targets(options.lora_targets or ALL)):
        raise ValueError(
            f"lora_rank: found {options.rank}, wanted at most {most}: the matrix of a routed expert is {config.hidden_size} × "
            f"{config.moe_intermediate_size}; or lora_targets without experts"
        )


def four_bit(dtype: torch.dtype) -> BitsAndBytesConfig:
    """QLoRA's base (arXiv:2305.14314): NF4 with quantised scales, computed in ``dtype``.

    Raises:
        ValueError: bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError('qlora needs bitsandbytes: pip install "modeling_deepseek_moe[bnb]"')
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def add_adapter(model: PreTrainedModel, options: LoraOptions) -> nn.Module:
    """peft's model around ``model``, whose own weights are frozen.

    Raises:
        ValueError: peft is not installed, the model has no layer that is meant, or its weights cannot take an adapter.
    """
    try:
        import peft
    except ImportError:
        raise ValueError('lora needs peft: pip install "modeling_deepseek_moe[peft]"') from None
    modules, parameters = find_targets(model, options.lora_targets or ALL)
    settings = {} if options.lora_init is None else {"init_lora_weights": options.lora_init}
    config = peft.LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=options.lora_dropout or 0.0,
        target_modules=modules,
        target_parameters=parameters or None,
        task_type="CAUSAL_LM",
        **settings,
    )
    return peft.get_peft_model(model, config)


def find_targets(model: nn.Module, text: str) -> tuple[list[str], list[str]]:
    """What of a model ``lora_targets`` means, as peft's ``target_modules`` and ``target_parameters``.

    Raises:
        ValueError: a part or a name that the model lacks.
    """
    wanted, modules, parameters = parse_targets(text), [], []
    there = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for target in wanted:
        for part in PARTS if target == ALL else [target]:
            if part in PARTS:
                found = _part(model, there, part, optional=target == ALL)
                (parameters if part == "experts" else modules).extend(found)
            elif any(name.endswith(f".{part}") for name in there):
                modules.append(part)
            else:
                raise ValueError(f"lora_targets: found {part}, of which the model has no layer")
    if not modules and not parameters:
        raise ValueError(f"lora_targets={text!r}: the model has no layer that is meant")
    return sorted(set(modules)), sorted(set(parameters))


def _part(model: nn.Module, there: list[str], part: str, optional: bool) -> list[str]:
    if part == "experts":
        found = list(PARTS[part]) if any(name.endswith(".mlp.experts") for name, _ in model.named_modules()) else []
    else:
        found = [end for end in PARTS[part] if any(name.endswith(f".{end}") for name in there)]
    if not found and not optional:
        raise ValueError(f"lora_targets: found {part}, and in the model no such layers")
    return found
