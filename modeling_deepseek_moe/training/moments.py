"""AdamW with bf16 moments with fp32 weights (DeepSeek-V3 report, 3.3.3), from heavyball, an optional library."""

from typing import Any

import torch
from transformers import TrainingArguments


def bf16_moments(arguments: TrainingArguments) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """What ``Trainer(optimizer_cls_and_kwargs=...)`` takes: heavyball's AdamW with the settings of ``arguments``.

    Steps are computed in fp32, and the moments rounded to bf16 at random, up or down: on average nothing is lost.

    Raises:
        ValueError: heavyball is not installed, or ``arguments.optim`` is not AdamW.
    """
    if not arguments.optim.value.startswith("adamw_torch"):
        raise ValueError(f"bf16 moments: found optim={arguments.optim.value!r}, wanted 'adamw_torch'")
    try:
        import heavyball
    except ImportError:
        raise ValueError("bf16 moments need heavyball: pip install heavyball, or the extra train") from None

    class AdamW(heavyball.AdamW):
        def load_state_dict(self, state_dict):
            super().load_state_dict(state_dict)
            # torch gives every loaded state the dtype of its parameter
            for state in self.state.values():
                for transform in state.values():
                    for name, value in transform.items() if isinstance(transform, dict) else ():
                        if isinstance(value, torch.Tensor) and value.ndim:
                            transform[name] = value.bfloat16()

    if arguments.device.type == "cpu":
        heavyball.utils.compile_mode = None  # half a minute, and a compiler, for steps that take as long
    return AdamW, {
        "lr": arguments.learning_rate,
        "betas": (arguments.adam_beta1, arguments.adam_beta2),
        "eps": arguments.adam_epsilon,
        "weight_decay": arguments.weight_decay,
        "storage_dtype": "bfloat16",
    }
