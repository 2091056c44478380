"""What a model of the family is made of, from its config alone: parameters by part, bytes, cache.

*Active* parameters are those that one token uses: everything except the routed experts that it is not sent to, with
the embedding counted as the one row that is looked up and the head in full. MTP layers are counted apart, since
decoding runs without them. By this convention DeepSeek-V3 has 671.0B parameters, 36.6B active, and 13.5B in its MTP
module (copies of embedding and head included): the published 671B and 37B, and, with the scales, the 685B values that
the Hub counts.
"""

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError

from modeling_deepseek_moe import formats
from modeling_deepseek_moe.bnb.formats import announced, has_codes, scheme_of
from modeling_deepseek_moe.checkpoint.contents import describe as describe_contents
from modeling_deepseek_moe.checkpoint.contents import refuse_file, refuse_other_makers
from modeling_deepseek_moe.checkpoint.headers import CheckpointError
from modeling_deepseek_moe.checkpoint.jsonfile import read_json
from modeling_deepseek_moe.config import DeepseekMoeConfig, quantization_fields
from modeling_deepseek_moe.families import FAMILIES
from modeling_deepseek_moe.field_checks import brief
from modeling_deepseek_moe.formats import WeightFormat
from modeling_deepseek_moe.ops._latent_rows import row_bytes
from modeling_deepseek_moe.weights import release_tensors

CONFIG_NAME = "config.json"
CONFIGS = {config.model_type: config for config in FAMILIES.values()}
PARTS = (
    "embedding",
    "attention",
    "dense",
    "shared experts",
    "routed experts",
    "router",
    "norms",
    "head",
    "mtp",
)


def read_config(path: str | os.PathLike) -> DeepseekMoeConfig:
    """The config in a folder, or in a ``config.json`` given itself. Nothing else of the folder is read.

    Raises:
        CheckpointError: a folder without one, a file that is not JSON, or weights that another maker quantised.
        ValueError: no such path, a ``model_type`` of another family, or fields that are refused by name.
    """
    file = Path(path)
    if not file.exists():
        raise ValueError(f"{file}: found no such file or folder, wanted a checkpoint folder or a {CONFIG_NAME}")
    refuse_file(file)
    if file.is_dir():
        refuse_other_makers(file)
        file /= CONFIG_NAME
        if not file.exists() and (said := describe_contents(file.parent)) is not None:
            raise CheckpointError(f"{file.parent}: {said}")
    fields = read_json(file, "the config of a checkpoint")
    model_type = fields.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIGS:
        raise ValueError(f"{file}: found model_type={brief(model_type)}, wanted one of {', '.join(CONFIGS)}")
    try:
        return CONFIGS[model_type].from_dict(fields)
    except (ValueError, TypeError, AttributeError, StrictDataclassError) as error:
        cause = error
        while cause.__cause__ is not None:  # what the config's checks said, without the layers around it
            cause = cause.__cause__
        raise ValueError(f"{file}: {cause}") from error


@dataclass(frozen=True)
class Size:
    """Values of one part of a model.

    Of its ``parameters``, a quantised release stores ``quantized`` as codes with ``scales`` next to them, those of
    ``matrices`` weights, and ``fp32`` (router biases) are fp32 in every release. Where it has a second format, ``others``
    are stored in that, in ``other_bytes``.
    """

    parameters: int = 0
    quantized: int = 0
    scales: int = 0
    fp32: int = 0
    matrices: int = 0
    others: int = 0
    other_bytes: int = 0

    def __add__(self, other: "Size") -> "Size":
        return Size(*(own + its for own, its in zip(self._counts, other._counts, strict=True)))

    def share(self, part: int, whole: int) -> "Size":
        """``part / whole`` of everything, e.g. 8 of 256 experts."""
        return Size(*(value * part // whole for value in self._counts))

    @property
    def _counts(self) -> Iterable[int]:
        """In the order of the fields. `dataclasses.astuple` copies each of them: two thirds of the time for V3."""
        return vars(self).values()

    def nbytes(self, weight_format: WeightFormat | None, itemsize: int = 2) -> int:
        """Bytes with codes and scales in a format, or (``None``) with every weight in ``itemsize`` bytes."""
        if weight_format is None:
            return 4 * self.fp32 + itemsize * (self.parameters - self.fp32)
        kept = 4 * self.fp32 + itemsize * (self.parameters - self.fp32 - self.quantized - self.others)
        return kept + self.other_bytes + weight_format.nbytes(self.quantized, self.scales, self.matrices)


@dataclass(frozen=True)
class ParameterBreakdown:
    """Sizes by part (see `PARTS`): ``stored`` in a release, and ``active``, what decoding one token reads."""

    stored: dict[str, Size]
    active: dict[str, Size]
    mtp_copies: int  # parameters of the MTP layers that repeat embedding and head
    mtp_routed: Size  # routed experts of the MTP layers, a part of ``stored["mtp"]``
    mtp_embedding: Size  # and their copies of the embedding
    mtp_layers: int
    experts: tuple[int, int]  # of a layer: chosen for a token, and all
    cache_values_per_token: int  # layers · (kv_lora_rank + qk_rope_head_dim), and the indexers' keys
    weight_format: WeightFormat | None  # as released
    itemsize: int  # bytes of an unquantised weight, as released
    context: int  # the model's
    index_topk: int | None = None  # the latents that a token attends to at most; ``None``: all
    indexer_values_per_token: int = 0  # of those cached, the indexers' keys
    latent_layers: int = 0  # that cache a latent for each token ...
    latent_rank: int = 0  # kv_lora_rank, the values of each
    fp8_latents: bool = False  # kept as codes with their scales

    @property
    def parameters(self) -> int:
        """The main model's parameters, without MTP."""
        return sum(size.parameters for part, size in self.stored.items() if part != "mtp")

    @property
    def mtp_parameters(self) -> int:
        return self.stored["mtp"].parameters

    @property
    def active_parameters(self) -> int:
        return sum(size.parameters for size in self.active.values())

    def stored_bytes(self, weight_format: WeightFormat | None, itemsize: int = 2) -> int:
        """All weights, MTP included."""
        return sum(size.nbytes(weight_format, itemsize) for size in self.stored.values())

    def active_bytes(self, weight_format: WeightFormat | None, itemsize: int = 2) -> int:
        """Weights that decoding one token reads."""
        return sum(size.nbytes(weight_format, itemsize) for size in self.active.values())

    def with_fp8_latents(self) -> "ParameterBreakdown":
        """The same with a cache in FP8, as ``cache_config={"backend": "fp8"}`` and `Fp8StaticCache` keep it.

        Raises:
            ValueError: a model with indexers, which has none.
        """
        if self.index_topk is not None:
            raise ValueError("cache in FP8: found a model with indexers, which has no such cache, wanted one without")
        return replace(self, fp8_latents=True)

    def cache_bytes(self, tokens: int = 1, itemsize: int = 2) -> int:
        """The cache of ``tokens`` tokens: latents, and the indexers' keys."""
        return self.latent_bytes(tokens, itemsize) + tokens * self.indexer_values_per_token * itemsize

    def latent_bytes(self, tokens: int, itemsize: int = 2) -> int:
        """The latents alone, with the rotated keys next to them."""
        values, own = self.cache_values_per_token - self.indexer_values_per_token, 0
        if self.fp8_latents:
            values -= self.latent_layers * self.latent_rank
            own = self.latent_layers * row_bytes(self.latent_rank)
        return tokens * (values * itemsize + own)

    def cache_read_bytes(self, tokens: int, itemsize: int = 2) -> int:
        """What decoding one token reads of a cache of ``tokens``: every latent, or every indexer's key and the latents it chose."""
        if self.index_topk is None or tokens <= self.index_topk:
            return self.latent_bytes(tokens, itemsize)
        return tokens * self.indexer_values_per_token * itemsize + self.latent_bytes(self.index_topk, itemsize)


def parameter_breakdown(config: DeepseekMoeConfig) -> ParameterBreakdown:
    """The sizes of the release that a config describes.

    Raises:
        ValueError: the config announces a quantisation that is none of `formats`.
    """
    fields = quantization_fields(config)
    rows, scheme = announced(fields) or (None,), scheme_of(fields)
    stored = dict.fromkeys(PARTS, Size())
    mtp_copies, mtp_routed, mtp_embedding = 0, Size(), Size()
    for name, spec in release_tensors(config).items():
        count = math.prod(spec.shape)
        fp32 = count if name.endswith("e_score_correction_bias") else 0
        theirs = config.names.released(name)
        number = scheme(theirs.removesuffix(".weight")) if has_codes(fields, theirs, spec.quantized) else None
        form = formats.FP8 if number is None else rows[number] or formats.FP8
        if number is None or not form.fits(spec.shape):
            found = Size(count, fp32=fp32)
        elif form.name == (rows[0] or formats.FP8).name:
            found = Size(count, count, math.prod(form.scale_shape(spec.shape)), fp32, 1)
        else:
            nbytes = form.nbytes(count, math.prod(form.scale_shape(spec.shape)), 1)
            found = Size(count, fp32=fp32, others=count, other_bytes=nbytes)
        stored[spec.part] += found
        if spec.part == "mtp":
            mtp_copies += count * name.endswith((".embed_tokens.weight", ".shared_head.head.weight"))
            if ".mlp.experts." in name:
                mtp_routed += found
            elif name.endswith(".embed_tokens.weight"):
                mtp_embedding += found

    active = {part: size for part, size in stored.items() if part != "mtp"}
    active["embedding"] = Size(config.hidden_size)
    if config.n_routed_experts:
        active["routed experts"] = stored["routed experts"].share(config.num_experts_per_tok, config.n_routed_experts)
    if config.tie_word_embeddings:
        active["head"] = stored["embedding"]
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else getattr(torch, config.dtype or "bfloat16")
    return ParameterBreakdown(
        stored=stored,
        active=active,
        mtp_copies=mtp_copies,
        mtp_routed=mtp_routed,
        mtp_embedding=mtp_embedding,
        mtp_layers=config.num_nextn_predict_layers or 0,
        experts=(config.num_experts_per_tok or 0, config.n_routed_experts or 0),
        cache_values_per_token=sum(_cached_values(config, layer) for layer in range(config.num_hidden_layers)),
        weight_format=rows[0],
        itemsize=dtype.itemsize,
        context=config.max_position_embeddings,
        index_topk=config.index_topk if config.has_indexers else None,
        indexer_values_per_token=_indexers(config) * getattr(config, "index_head_dim", 0),
        latent_layers=config.num_hidden_layers,
        latent_rank=config.kv_lora_rank,
    )


def _cached_values(config: DeepseekMoeConfig, layer: int) -> int:
    """Of a layer, for each token."""
    key = config.index_head_dim if config.has_indexer(layer) else 0
    return config.kv_lora_rank + config.qk_rope_head_dim + key


def _indexers(config: DeepseekMoeConfig) -> int:
    """Decoder layers with an indexer."""
    return sum(config.has_indexer(layer) for layer in range(config.num_hidden_layers))


def describe(config: DeepseekMoeConfig) -> dict[str, str]:
    """The architecture in words, one line each."""
    moe_layers = sum(config.is_moe_layer(layer) for layer in range(config.num_hidden_layers))
    layers = f"{config.num_hidden_layers} ({config.num_hidden_layers - moe_layers} dense, {moe_layers} MoE)"
    if config.num_nextn_predict_layers:
        layers += f" + {config.num_nextn_predict_layers} MTP"
    groups = f", {config.topk_group} of {config.n_group} groups" if (config.n_group or 1) > 1 else ""
    experts = "none"
    if config.n_routed_experts:
        experts = (
            f"{config.n_routed_experts} routed of width {config.moe_intermediate_size}, "
            f"{config.num_experts_per_tok} per token{groups}; {config.n_shared_experts or 0} shared"
        )
    normalised = "normalised, " if config.norm_topk_prob else ""
    rope = config.rope_parameters or {}
    kind = rope.get("rope_type", "default")
    context = f"{config.max_position_embeddings:,} tokens"
    if kind != "default":
        original = rope.get("original_max_position_embeddings")
        context += f" ({kind} × {rope.get('factor')}" + (f" from {original:,})" if original else ")")
    rows = {row.name: row for row in announced(quantization_fields(config))}
    stored = " and ".join(f"{row.title} in {_blocks(row)}" for row in rows.values())
    dtype = str(config.dtype or "bfloat16").removeprefix("torch.")
    indexer = {}
    if config.has_indexers:
        own = _indexers(config)
        where = "every layer" if own == config.num_hidden_layers else f"{own} of {config.num_hidden_layers} layers"
        indexer["indexer"] = (
            f"{config.index_n_heads} heads of {config.index_head_dim} in {where}, attention to {config.index_topk:,} keys at most"
        )
    return {
        "model": f"{config.model_type}, {', '.join(config.architectures or ['no architecture named'])}",
        "layers": layers,
        "width": f"{config.hidden_size:,}, vocabulary {config.vocab_size:,}",
        "attention": f"{config.num_attention_heads} heads of {config.qk_nope_head_dim} + {config.qk_rope_head_dim} rope, "
        f"latent {config.kv_lora_rank}, query latent {config.q_lora_rank or 'none'}",
        **indexer,
        "experts": experts,
        "router": f"{config.scoring_func}, {config.topk_method}, {normalised}× {config.routed_scaling_factor}",
        "context": context,
        "weights": f"{stored}, the rest {dtype}" if stored else dtype,
    }


def _blocks(form: WeightFormat) -> str:
    rows, columns = form.block
    return "rows" if columns == formats.MAX_BLOCK else f"blocks of {rows}×{columns}"
