"""Config fields that have a word for each layer: dense or sparse in its experts, with an indexer of its own or another's indices."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict

from modeling_deepseek_moe.config import DeepseekV3Config
from modeling_deepseek_moe.field_checks import MAX_TOKENS, MAX_WIDTH, brief, check_count

DENSE, SPARSE = "dense", "sparse"
FULL, SHARED = "full", "shared"
INDEXED = "indexed_attention"  # transformers' word for a layer that keeps an indexer's keys too


@strict
class LayerTypesConfig(DeepseekV3Config):
    """Takes ``mlp_layer_types``, a word for each layer, in place of ``first_k_dense_replace``."""

    def __post_init__(self, **kwargs):
        if kwargs.get("mlp_layer_types") is not None:
            self.read_layer_types(kwargs["mlp_layer_types"])
        super().__post_init__(**kwargs)

    def read_layer_types(self, kinds: Any) -> None:
        """
        Raises:
            ValueError: no such list, fewer words than layers, or sparse layers before dense ones.
        """
        layers = self.num_hidden_layers
        words = kinds[:layers] if isinstance(kinds, list) else []
        dense = next((index for index, kind in enumerate(words) if kind != DENSE), len(words))
        if len(words) != layers or any(kind != SPARSE for kind in words[dense:]):
            raise ValueError(
                f"mlp_layer_types={brief(kinds)} must be {DENSE!r} for the first layers and {SPARSE!r} for all others of "
                f"num_hidden_layers={layers}"
            )
        self.first_k_dense_replace = dense

    def write_release(self, fields: dict[str, Any]) -> dict[str, Any]:
        fields = super().write_release(fields)
        if "mlp_layer_types" in fields:
            sparse = [self.is_moe_layer(layer) for layer in range(self.num_hidden_layers)]
            fields["mlp_layer_types"] = [SPARSE if is_sparse else DENSE for is_sparse in sparse]
        return fields


@strict
class IndexedConfig(LayerTypesConfig):
    """DeepSeek Sparse Attention: each query attends to the ``index_topk`` keys that an indexer scores highest.

    A layer that shares has no indexer and takes the indices of the last one before it that has. MTP layers have their own.
    """

    has_indexers: ClassVar[bool] = True
    index_topk: int = 2048
    index_n_heads: int = 64
    index_head_dim: int = 128
    indexer_rope_interleave: bool = False

    def __post_init__(self, **kwargs):
        kinds = kwargs.pop("layer_types", None)
        if kinds is not None and set(kinds) - {INDEXED, "deepseek_sparse_attention"}:
            raise ValueError(f"layer_types={brief(kinds)} must be {INDEXED!r} for every layer")
        super().__post_init__(**kwargs)

    @property
    def layer_types(self) -> list[str]:
        """By which transformers chooses the layers of a cache."""
        return [INDEXED] * self.num_hidden_layers

    def validate_architecture(self):
        super().validate_architecture()
        check_count("index_topk", self.index_topk, 1, MAX_TOKENS)
        check_count("index_n_heads", self.index_n_heads, 1, 1 << 16)
        check_count("index_head_dim", self.index_head_dim, self.qk_rope_head_dim, MAX_WIDTH)
        if self.q_lora_rank is None:
            raise ValueError(
                "q_lora_rank=None must be a rank: the indexer's queries are made of the latent of the queries"
            )
        kinds = self.layer_indexers()
        if len(kinds) < self.num_hidden_layers or set(kinds) - {FULL, SHARED} or kinds[0] != FULL:
            field = next(
                (f for f in ("indexer_types", "index_topk_pattern") if getattr(self, f, None)), "index_topk_freq"
            )
            raise ValueError(
                f"{field}={brief(getattr(self, field, None))} must say {FULL!r} of the first layer, and {FULL!r} or {SHARED!r} "
                f"of all num_hidden_layers={self.num_hidden_layers}: found {brief(kinds)}"
            )

    def layer_indexers(self) -> list[Any]:
        """``"full"`` or ``"shared"`` for each decoder layer, by the first field that says so."""
        pattern = getattr(self, "indexer_types", None) or getattr(self, "index_topk_pattern", None)
        if isinstance(pattern, str):
            return [{"F": FULL, "S": SHARED}.get(letter, letter) for letter in pattern]
        if pattern is not None:
            return list(pattern)
        every, first = max(getattr(self, "index_topk_freq", 1), 1), getattr(self, "index_skip_topk_offset", 2)
        return [SHARED if max(layer - first + 1, 0) % every else FULL for layer in range(self.num_hidden_layers)]

    def has_indexer(self, layer_idx: int) -> bool:
        """Whether a layer (MTP layers count on) chooses its keys itself."""
        return layer_idx >= self.num_hidden_layers or self.layer_indexers()[layer_idx] == FULL
