"""``error A B``: how far the weights of B are from A's by part, and, on a text, its logits: what a quantisation costs."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_deepseek_moe import formats
from modeling_deepseek_moe.checkpoint.headers import CheckpointError
from modeling_deepseek_moe.conversion._blocks import WIDE
from modeling_deepseek_moe.conversion._errors import WeightErrors
from modeling_deepseek_moe.conversion._source import Source, quantization_of
from modeling_deepseek_moe.weights import HEAD_KEY, TensorSpec

ROWS = 128  # compared at a time: whole blocks of every format
WINDOW = 256  # tokens that are read together


class LogitsError(NamedTuple):
    """Over ``tokens`` of a text: the perplexity of both, and the mean of KL(A ‖ B) in nats."""

    tokens: int
    perplexity: float
    perplexity_made: float
    divergence: float


def weight_errors(a: Source, b: Source, report: Callable[[int], None] = lambda nbytes: None) -> WeightErrors:
    """Of every weight that a release keeps in FP8, whichever formats it has in both; of the head where B has codes there.

    Args:
        report: told of bytes of A that are read.

    Raises:
        CheckpointError: B lacks a weight, or has it in another shape.
    """
    (one, two), errors = (_Weights(source) for source in (a, b)), WeightErrors()
    for name, spec in a.specs.items():
        made = two.infos.get(name)
        is_wanted = spec.quantized or (HEAD_KEY.match(name) and made is not None and made.dtype not in WIDE.values())
        if not is_wanted or name not in one.infos:
            continue
        if name not in two.infos:
            raise CheckpointError(f"{b.folder}: tensor {name}: found absent, wanted it as in {a.folder}")
        for values, others in zip(one.rows(name, spec), two.rows(name, spec), strict=True):
            errors.add(spec.part, values, others)
        report(one.infos[name].nbytes)
    return errors


class _Weights:
    """The weights of a folder by their own names, whichever format has them; those of bitsandbytes too."""

    def __init__(self, source: Source):
        self._source = source
        self.infos = {formats.weight_name(name): info for name, info in source.reader.items()}
        try:
            self._foreign = formats.foreign_of_config(quantization_of(source.config))
        except ValueError as error:
            raise CheckpointError(f"{source.folder / 'config.json'}: {error}") from None

    def rows(self, name: str, spec: TensorSpec) -> Iterator[torch.Tensor]:
        """`ROWS` rows at a time, in fp32.

        Raises:
            CheckpointError: a weight of another shape.
        """
        info, source = self.infos[name], self._source
        foreign = self._foreign if self._foreign and info.dtype == self._foreign.code_dtype else None
        form = foreign or (None if self._foreign else source.format_of(info))
        wanted = form.on_disk(name, spec.shape)[name + form.code_suffix][1] if form else spec.shape
        if info.shape != wanted:
            raise CheckpointError(f"{info.file}: tensor {info.name}: found {list(info.shape)}, wanted {list(wanted)}")
        scale = None
        if form is not None:
            of = source.reader.get(name + form.scale_suffix) if foreign else source.scale_of(info)
            if of is None or math.prod(of.shape) != math.prod(form.scale_shape(spec.shape)):
                raise CheckpointError(
                    f"{info.file}: tensor {info.name}: found codes without their scales, wanted both"
                )
            scale = source.read_scale(of).view(form.scale_shape(spec.shape))
        shape, width = form.code_shape(spec.shape) if form else spec.shape, info.nbytes // spec.shape[0]
        for first in range(0, spec.shape[0], ROWS):
            rows = slice(first, min(first + ROWS, spec.shape[0]))
            start, end = info.start + rows.start * width, info.start + rows.stop * width
            tile = source.read(info._replace(shape=(rows.stop - first, shape[1]), start=start, end=end))
            if form is None or scale is None:
                yield tile.float()
            else:
                yield form.dequantize(tile, scale[form.scale_rows(rows)], torch.float32)


@torch.no_grad()
def logits_error(a: Path, b: Path, text: str) -> LogitsError:
    """Both models on a text, in windows of `WINDOW` tokens; a document begins where the tokenizer's BOS stands in it.

    Raises:
        ValueError: a text of less than two tokens.
    """
    one, two = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (a, b))
    tokens, sums = 0, torch.zeros(3, dtype=torch.float64)
    for window in _windows(AutoTokenizer.from_pretrained(a), text):
        p, q = (model(window[None]).logits[0, :-1].double().log_softmax(-1) for model in (one, two))
        wanted = window[1:, None]
        sums += torch.stack([-p.gather(1, wanted).sum(), -q.gather(1, wanted).sum(), (p.exp() * (p - q)).sum()])
        tokens += len(wanted)
    if not tokens:
        raise ValueError("found a text of less than two tokens, wanted one to read")
    own, made, divergence = (sums / tokens).tolist()
    return LogitsError(tokens, math.exp(own), math.exp(made), divergence)


def _windows(tokenizer, text: str) -> Iterator[torch.Tensor]:
    bos = tokenizer.bos_token
    for document in text.split(bos) if bos else [text]:
        ids = tokenizer((bos or "") + document, add_special_tokens=False, return_tensors="pt").input_ids[0]
        yield from (window for window in ids.split(WINDOW) if document.strip() and len(window) > 1)
