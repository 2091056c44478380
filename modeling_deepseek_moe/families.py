"""The model types: DeepSeek's own, and what others released of this architecture under names of their own.

Each config class says where its releases differ from DeepSeek-V3's: defaults, spellings (`ReleaseNames`), and fields
that mean something here under another name. A field that would change what is computed, and is not understood, is
refused by its name. `FAMILIES`, at the end, is the table that registering, inspecting and planning go by.
"""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict

from modeling_deepseek_moe.config import DeepseekMoeConfig, DeepseekV2Config, DeepseekV3Config
from modeling_deepseek_moe.field_checks import brief
from modeling_deepseek_moe.layer_types import IndexedConfig, LayerTypesConfig
from modeling_deepseek_moe.release_names import ReleaseNames

# What an object around a text model's config says of the text model too.
SHARED = ("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype")
EXPERT_FIELDS = (
    *("moe_intermediate_size", "n_shared_experts", "n_routed_experts", "num_experts_per_tok", "moe_layer_freq"),
    *("first_k_dense_replace", "scoring_func", "topk_method", "n_group", "topk_group", "norm_topk_prob"),
    *("routed_scaling_factor", "output_router_logits"),
)


@strict
class KimiK2Config(DeepseekV3Config):
    """Kimi-K2: DeepSeek-V3's architecture under another ``model_type``."""

    model_type = "kimi_k2"
    vocab_size: int = 163840
    num_nextn_predict_layers: int = 0
    num_attention_heads: int = 64
    n_routed_experts: int | None = 384
    first_k_dense_replace: int = 1
    n_group: int | None = 1
    topk_group: int | None = 1
    routed_scaling_factor: float | int = 2.827


@strict
class Glm4MoeLiteConfig(LayerTypesConfig):
    """GLM-4.7-Flash: DeepSeek-V3's layers with wider heads for values, one group of experts."""

    model_type = "glm4_moe_lite"
    only: ClassVar[dict[str, Any]] = DeepseekV3Config.only | {"use_qk_norm": False}
    vocab_size: int = 154880
    hidden_size: int = 2048
    intermediate_size: int = 10240
    moe_intermediate_size: int = 1536
    num_hidden_layers: int = 47
    num_nextn_predict_layers: int = 0
    num_attention_heads: int = 20
    n_routed_experts: int | None = 64
    num_experts_per_tok: int | None = 4
    first_k_dense_replace: int = 1
    n_group: int | None = 1
    topk_group: int | None = 1
    routed_scaling_factor: float | int = 1.8
    q_lora_rank: int | None = 768
    qk_nope_head_dim: int = 192
    v_head_dim: int = 256
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 202752


@strict
class YoutuConfig(DeepseekV3Config):
    """Youtu-LLM: latent attention and dense layers throughout. An ``initializer_range`` of ``None`` follows from the width."""

    model_type = "youtu"
    vocab_size: int = 128256
    hidden_size: int = 2048
    intermediate_size: int = 6144
    num_hidden_layers: int = 32
    num_nextn_predict_layers: int = 0
    num_attention_heads: int = 16
    n_shared_experts: int | None = None
    n_routed_experts: int | None = None
    num_experts_per_tok: int | None = None
    n_group: int | None = None
    topk_group: int | None = None
    max_position_embeddings: int = 131072
    initializer_range: float | None = None
    embedding_initializer_range: float | None = None
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 128000
    eos_token_id: int | list[int] | None = 128001

    def __post_init__(self, **kwargs):
        if self.initializer_range is None:
            self.initializer_range = 2 / (5 * self.hidden_size) ** 0.5 if self.hidden_size > 0 else 0.02
        if self.embedding_initializer_range is None:
            self.embedding_initializer_range = 2 * self.initializer_range
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        if self.n_routed_experts:
            raise ValueError(f"n_routed_experts={self.n_routed_experts} must be null: all layers of youtu are dense")
        super().validate_architecture()

    def write_release(self, fields: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in super().write_release(fields).items() if name not in EXPERT_FIELDS}


@strict
class SarvamMLAConfig(DeepseekV3Config):
    """Sarvam-105B: DeepSeek-V3 with other spellings, and sizes of heads that follow from others."""

    model_type = "sarvam_mla"
    names: ClassVar[ReleaseNames] = ReleaseNames(
        fields={"num_experts": "n_routed_experts", "num_shared_experts": "n_shared_experts"}
    )
    attribute_map: ClassVar[dict[str, str]] = DeepseekV3Config.attribute_map | {
        "num_shared_experts": "n_shared_experts"
    }
    only: ClassVar[dict[str, Any]] = DeepseekV3Config.only | {
        **{"use_bias": False, "use_qkv_bias": False, "use_qk_norm": False, "norm_head": False},
        **{"embedding_dropout": 0, "output_dropout": 0},
        **{"score_function": "sigmoid", "moe_router_enable_expert_bias": True},
    }
    vocab_size: int = 262144
    hidden_size: int = 4096
    intermediate_size: int = 16384
    num_hidden_layers: int = 32
    num_nextn_predict_layers: int = 0
    num_attention_heads: int = 64
    n_routed_experts: int | None = 128
    first_k_dense_replace: int = 1
    n_group: int | None = 1
    topk_group: int | None = 1
    q_lora_rank: int | None = None
    initializer_range: float = 0.006

    def __post_init__(self, **kwargs):
        heads = kwargs.pop("q_head_dim", None)
        width = self.qk_nope_head_dim + self.qk_rope_head_dim
        if heads not in (None, width):
            raise ValueError(f"q_head_dim={brief(heads)} must be qk_nope_head_dim + qk_rope_head_dim = {width}")
        rope = kwargs.get("rope_scaling")
        if isinstance(rope, dict):
            kwargs["rope_scaling"] = {key: _yarn(value) if "type" in key else value for key, value in rope.items()}
        super().__post_init__(**kwargs)

    def write_release(self, fields: dict[str, Any]) -> dict[str, Any]:
        fields = super().write_release(fields)
        rope = fields.get("rope_scaling")
        if rope and rope.get("type") == "yarn":
            fields["rope_scaling"] = rope | {"type": "deepseek_yarn"}
        # what its own code, and other engines, read in place of the widths they follow from
        derived = {"head_dim": self.kv_lora_rank + self.qk_rope_head_dim, "q_head_dim": self.qk_head_dim}
        return fields | derived


def _yarn(kind: Any) -> Any:
    return "yarn" if kind == "deepseek_yarn" else kind


@strict
class AXK1Config(LayerTypesConfig):
    """A.X-K1: DeepSeek-V3 with a norm after each mixture of experts; its release has no router biases.

    Its dense layers come with the weights of such a norm too, which nothing reads.
    """

    model_type = "axk1"
    has_post_mlp_norm: ClassVar[bool] = True
    names: ClassVar[ReleaseNames] = ReleaseNames(
        moved={".post_mlp_layernorm.": ".mlp.post_mlp_layernorm."},
        carried=r"model\.layers\.\d+\.mlp\.post_mlp_layernorm\.weight$",
        optional=r"\.e_score_correction_bias$",
    )
    # of how it was trained, and nothing of what is computed
    only: ClassVar[dict[str, Any]] = {
        name: value for name, value in DeepseekV3Config.only.items() if name != "ep_size"
    } | {"llama_4_scaling": None}
    vocab_size: int = 163840
    num_nextn_predict_layers: int = 0
    num_attention_heads: int = 64
    n_routed_experts: int | None = 192
    first_k_dense_replace: int = 1
    max_position_embeddings: int = 32768
    bos_token_id: int | None = 163691
    eos_token_id: int | list[int] | None = 163691


@strict
class KimiK25Config(KimiK2Config):
    """Kimi-K2.5, K2.6 and K2.7: Kimi-K2 as the text model of a larger one. Its vision tower is kept for saving, and not run.

    On disk the fields of the text model are in ``text_config``; here they are the config's own, and ``around`` keeps the rest.
    """

    model_type = "kimi_k25"
    names: ClassVar[ReleaseNames] = ReleaseNames(
        prefix="language_model.", carried=r"(model\.)?(vision_tower|mm_projector|multi_modal_projector)\."
    )

    def __post_init__(self, **kwargs):
        if "text_config" in kwargs:
            raise ValueError(
                "text_config must be read by from_dict or from_pretrained: its fields are the config's own here"
            )
        super().__post_init__(**kwargs)

    @classmethod
    def read_release(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """
        Raises:
            ValueError: ``text_config`` is no config of a text model that this is.
        """
        if "text_config" not in fields:
            return super().read_release(fields)
        text = fields["text_config"]
        if not isinstance(text, dict):
            raise ValueError(f"text_config={brief(text)} must be an object")
        kind = text.get("model_type", "deepseek_v3")
        if kind not in (KimiK2Config.model_type, DeepseekV3Config.model_type):
            raise ValueError(f"text_config: model_type={brief(kind)} must be 'kimi_k2' or 'deepseek_v3'")
        outer = {name: value for name, value in fields.items() if name != "text_config"}
        inner = {name: text[name] for name in ("model_type", "architectures", *SHARED) if name in text}
        quantised = [one["quantization_config"] for one in (outer, text) if one.get("quantization_config")]
        flat = {name: value for name, value in text.items() if name not in ("model_type", "architectures", "auto_map")}
        flat |= {name: outer[name] for name in (*SHARED, "model_type", "architectures", "auto_map") if name in outer}
        flat |= {"quantization_config": quantised[0]} if quantised else {}
        return super().read_release(flat | {"around": {"outer": outer, "text": inner}})

    def write_release(self, fields: dict[str, Any]) -> dict[str, Any]:
        fields = super().write_release(fields)
        around = fields.pop("around", None) or {}
        outer, inner = dict(around.get("outer", {})), dict(around.get("text", {}))
        own = ("model_type", "architectures", "auto_map", "transformers_version", "quantization_config")
        text = {name: value for name, value in fields.items() if name not in own}
        text |= {"model_type": inner.get("model_type", KimiK2Config.model_type)}
        text |= {"architectures": inner.get("architectures", ["DeepseekV3ForCausalLM"])}
        is_outer = bool(outer.get("quantization_config"))
        for name in ("auto_map", "quantization_config", "dtype", "torch_dtype"):
            outer.pop(name, None)
        shared = [name for name in SHARED if name in outer or name not in inner or "dtype" in name]
        outer |= {name: fields[name] for name in (*own, *shared) if name in fields}
        if "quantization_config" in outer and not is_outer:
            text["quantization_config"] = outer.pop("quantization_config")
        return outer | {"text_config": text}


@strict
class DeepseekV32Config(IndexedConfig):
    """DeepSeek-V3.2: DeepSeek-V3 with an indexer in every layer, whose rotary pairs are halves."""

    model_type = "deepseek_v32"
    only: ClassVar[dict[str, Any]] = IndexedConfig.only | {"indexer_types": None}
    max_position_embeddings: int = 163840


@strict
class GlmMoeDsaConfig(IndexedConfig):
    """GLM-5 and its successors: wider heads for values, one group of experts; from 5.2 on layers share their indices.

    ``indexer_types`` says of each layer whether it has an indexer; else ``index_topk_pattern``, or ``index_topk_freq`` and
    ``index_skip_topk_offset``.
    """

    model_type = "glm_moe_dsa"
    vocab_size: int = 154880
    hidden_size: int = 6144
    intermediate_size: int = 12288
    num_hidden_layers: int = 78
    num_attention_heads: int = 64
    n_group: int | None = 1
    topk_group: int | None = 1
    q_lora_rank: int | None = 2048
    qk_nope_head_dim: int = 192
    v_head_dim: int = 256
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 202752
    index_n_heads: int = 32
    indexer_rope_interleave: bool = True
    indexer_types: list | None = None
    index_topk_pattern: str | list | None = None
    index_topk_freq: int = 1
    index_skip_topk_offset: int = 2

    def write_release(self, fields: dict[str, Any]) -> dict[str, Any]:
        """Rotary parameters in one object, as these releases have them."""
        fields = super().write_release(fields)
        theta, scaling = fields.pop("rope_theta", None), dict(fields.pop("rope_scaling", None) or {})
        kind = scaling.pop("type", "default")
        return fields | {"rope_parameters": {"rope_theta": theta, "rope_type": kind, **scaling}}


# Every model type, by what its classes' names begin with: registering, inspecting and planning go by this table.
FAMILIES: dict[str, type[DeepseekMoeConfig]] = {
    "DeepseekV2": DeepseekV2Config,
    "DeepseekV3": DeepseekV3Config,
    "KimiK2": KimiK2Config,
    "KimiK25": KimiK25Config,
    "Glm4MoeLite": Glm4MoeLiteConfig,
    "Youtu": YoutuConfig,
    "SarvamMLA": SarvamMLAConfig,
    "AXK1": AXK1Config,
    "DeepseekV32": DeepseekV32Config,
    "GlmMoeDsa": GlmMoeDsaConfig,
}
