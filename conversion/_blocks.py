"""What conversions from and to quantised formats share: weights in blocks with a scale each, made in one go, and the new config."""

from collections.abc import Callable, Iterator

import torch

from modeling_deepseek_moe.checkpoint.writer import TensorPlan
from modeling_deepseek_moe.config import DeepseekMoeConfig
from modeling_deepseek_moe.conversion._conversion import Options
from modeling_deepseek_moe.conversion._source import Source
from modeling_deepseek_moe.formats import RELEASED, WeightFormat

WIDE = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def wide_dtype(name: str) -> torch.dtype:
    """The dtype that ``--dtype`` names.

    Raises:
        ValueError: it is none of `WIDE`.
    """
    if name not in WIDE:
        raise ValueError(f"--dtype {name} is not known, wanted one of {', '.join(WIDE)}")
    return WIDE[name]


def with_dtype(config: dict, dtype: str, quantization: dict | None = None) -> dict:
    """The config with ``torch_dtype`` and ``quantization_config`` of what is written, all else as it was."""
    gone = ("quantization_config", "dtype", *([] if quantization is None else [RELEASED]))
    config = {key: value for key, value in config.items() if key not in gone}
    config["torch_dtype"] = dtype
    if isinstance(config.get("text_config"), dict):  # a text model in a larger one
        return config | {"text_config": with_dtype(config["text_config"], dtype, quantization)}
    return config if quantization is None else config | {"quantization_config": quantization}


def check_head(source: Source, config: DeepseekMoeConfig, options: Options) -> None:
    """Whether ``--head`` has a head to quantise.

    Raises:
        ValueError: the head is the embedding.
    """
    if options.head is not None and config.tie_word_embeddings:
        raise ValueError(
            f"--head {options.head}: {source.folder}: found tie_word_embeddings=True, wanted a head of its own: its weight is "
            "the embedding's, which is looked up row by row"
        )


class CodesAndScales:
    """Codes of a weight and its scales, made in one go though they are written one after the other.

    ``make`` yields both for a range of rows at a time. The scales wait while codes are written; they are made again
    if their turn comes in another run.
    """

    def __init__(self, make: Callable[[], Iterator[tuple[torch.Tensor, torch.Tensor]]]):
        self._make, self._waiting = make, []

    def _codes(self) -> Iterator[torch.Tensor]:
        made = []
        for codes, scales in self._make():
            made.append(scales)
            yield codes
        self._waiting.append(torch.cat(made))

    def _scales(self) -> torch.Tensor:
        return self._waiting.pop() if self._waiting else torch.cat([scales for _, scales in self._make()])

    def plans(self, name: str, shape: tuple[int, ...], form: WeightFormat) -> list[TensorPlan]:
        """Of a weight of this name and shape."""
        (codes, (dtype, code_shape)), (scales, (scale_dtype, scale_shape)) = form.on_disk(name, shape).items()
        return [
            TensorPlan(codes, dtype, code_shape, lambda: (part.reshape(-1, code_shape[1]) for part in self._codes())),
            TensorPlan(scales, scale_dtype, scale_shape, lambda: self._scales().reshape(scale_shape)),
            *(TensorPlan.of(name + suffix, make(shape)) for suffix, make in form.others.items()),
        ]
