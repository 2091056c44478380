"""One configuration for the DeepSeek MoE family, read from the fields that the releases carry.

`DeepseekV2Config` and `DeepseekV3Config` differ only in ``model_type`` and defaults; `families` has the others. Every field
that changes the computation is honoured or refused by name; unknown fields are kept and saved again. On disk the
release's spelling is used: ``rope_theta`` + ``rope_scaling``, ``num_nextn_predict_layers``, ``quant_method: fp8``.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from modeling_deepseek_moe import field_checks, formats
from modeling_deepseek_moe.compat import CACHE_NAME
from modeling_deepseek_moe.distributed import tables
from modeling_deepseek_moe.field_checks import MAX_EXPERTS, MAX_LAYERS  # noqa: F401 (the bounds of a config)
from modeling_deepseek_moe.release_names import ReleaseNames

# The name under which this package registers its own loader of the formats' `quant_method`s with transformers, in memory
# only: the quantizer that transformers uses for other models' "fp8" stays as it is. `METHOD_FIELD` is the release's own.
QUANT_METHOD, METHOD_FIELD = "deepseek_moe", "release_quant_method"
# What transformers' own quantisers saved, and load here: those that tests hold. Others it would skip with a warning, or
# load in part.
FOREIGN_METHODS = ("bitsandbytes", "torchao")
BARE_ERRORS = (TypeError, AttributeError, KeyError, ArithmeticError, RecursionError)
SCORING_FUNCS = ("sigmoid", "softmax")
ROPE_FIELDS = ("rope_theta", "rope_scaling", "partial_rotary_factor")  # on disk
TOPK_METHODS = ("greedy", "group_limited_greedy", "noaux_tc")


@strict
class DeepseekMoeConfig(PreTrainedConfig):
    """Architecture of a DeepSeek MoE model. Field names and meanings are the releases'.

    ``q_lora_rank=None`` means no query compression; ``n_group=None`` means one group. A layer ``i`` is a
    mixture of experts when ``i >= first_k_dense_replace`` and ``i % moe_layer_freq == 0``. ``rope_interleave``
    says that rotary pairs lie next to each other, as in every release.

    Raises:
        ValueError: an unknown ``scoring_func``, ``topk_method`` or ``hidden_act``, or counts that do not divide.
    """

    names: ClassVar[ReleaseNames] = ReleaseNames()
    has_post_mlp_norm: ClassVar[bool] = False
    has_indexers: ClassVar[bool] = False
    # Fields that mean something in other models, and the one value that says what is computed here.
    only: ClassVar[dict[str, Any]] = {"pretraining_tp": 1, "ep_size": 1, "mlp_bias": False}
    keys_to_ignore_at_inference: ClassVar[list[str]] = [CACHE_NAME]
    attribute_map: ClassVar[dict[str, str]] = {
        "num_local_experts": "n_routed_experts",
        "num_experts": "n_routed_experts",
        "num_mtp_layers": "num_nextn_predict_layers",
    }
    base_model_tp_plan: ClassVar[dict[str, Any] | None] = tables.TENSOR
    base_model_pp_plan: ClassVar[dict[str, Any] | None] = tables.PIPELINE
    base_model_fsdp_plan: ClassVar[dict[Any, str]] = tables.SHARDED
    base_model_ep_plan: ClassVar[dict[str, Any] | None] = tables.EXPERTS

    vocab_size: int = 129280
    hidden_size: int = 7168
    intermediate_size: int = 18432
    moe_intermediate_size: int = 2048
    num_hidden_layers: int = 61
    num_nextn_predict_layers: int = 0
    num_attention_heads: int = 128
    num_key_value_heads: int | None = None
    n_shared_experts: int | None = 1
    n_routed_experts: int | None = 256
    num_experts_per_tok: int | None = 8
    moe_layer_freq: int = 1
    first_k_dense_replace: int = 3
    scoring_func: str = "sigmoid"
    topk_method: str = "noaux_tc"
    n_group: int | None = None
    topk_group: int | None = None
    norm_topk_prob: bool = True
    routed_scaling_factor: float | int = 1.0
    kv_lora_rank: int = 512
    q_lora_rank: int | None = None
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    attention_bias: bool = False
    attention_dropout: float | int = 0.0
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 4096
    rope_parameters: dict | None = None
    rope_interleave: bool = True
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    output_router_logits: bool = False
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 1

    def __post_init__(self, **kwargs):
        self._check_fields(kwargs)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        # transformers recognises a latent-attention config, and sizes rotary tables, by these two.
        self.qk_head_dim = self.qk_nope_head_dim + self.qk_rope_head_dim
        self.head_dim = self.qk_rope_head_dim
        kwargs.pop("qk_head_dim", None)
        kwargs.pop("head_dim", None)
        if not kwargs.get("quantization_config"):
            kwargs.pop("quantization_config", None)  # null or {}: transformers would look for a method in it
        quantization = kwargs.get("quantization_config")
        if isinstance(quantization, dict) and quantization.get("quant_method") in formats.methods():
            kwargs["quantization_config"] = in_memory(quantization)
        if isinstance(kwargs.get("rope_scaling"), dict):
            kwargs["rope_scaling"] = dict(kwargs["rope_scaling"])  # the base class writes into it
        super().__post_init__(**kwargs)

    def _check_fields(self, others: dict[str, Any]) -> None:
        """What would fail without a name, or work without an effect, further on; ``others`` are undeclared fields."""
        field_checks.check_names(type(self), others)
        field_checks.check_texts("architectures", self.architectures)
        field_checks.check_dtype("dtype", self.dtype)
        field_checks.check_dtype("torch_dtype", others.get("torch_dtype"))
        field_checks.check_rope("rope_scaling", others.get("rope_scaling"))
        field_checks.check_rope("rope_parameters", self.rope_parameters)
        if others.get("rope_theta") is not None:
            field_checks.check_rope("config", {"rope_theta": others["rope_theta"]})
        field_checks.drop_whole_context(others)
        _check_quantization(others.get("quantization_config"))

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """As `PreTrainedConfig.from_dict`; an error is a `ValueError` and names the field, and the file where it is known."""
        folder = kwargs.get("name_or_path")
        where = f"{folder}/config.json: " if folder else ""
        try:
            config_dict = cls.read_release(config_dict)
            return super().from_dict(config_dict, **kwargs)
        except (StrictDataclassError, ValueError) as error:
            raise ValueError(f"{where}{error}") from error
        except BARE_ERRORS as error:
            # what transformers says of a field that it did not look at first
            said = f"{type(error).__name__}: {error}"
            raise ValueError(f"{where}{cls._culprit(config_dict)}, wanted what a config has there ({said})") from error

    @classmethod
    def read_release(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """The fields of a release's ``config.json`` as this class has them.

        Raises:
            ValueError: a field is there in two spellings, with two values.
        """
        read = dict(fields)
        for theirs, ours in cls.names.fields.items():
            if theirs in read and read.get(ours, read[theirs]) != read[theirs]:
                said = f"{theirs}={field_checks.brief(read[theirs])} and {ours}={field_checks.brief(read[ours])}"
                raise ValueError(f"{said} must be equal: they are one field")
            if theirs in read:
                read[ours] = read.pop(theirs)
        return read

    def write_release(self, fields: dict[str, Any]) -> dict[str, Any]:
        """The inverse of `read_release`, of what `to_dict` or `to_diff_dict` gave."""
        spelled = {ours: theirs for theirs, ours in self.names.fields.items()}
        return {spelled.get(name, name): value for name, value in fields.items()}

    @classmethod
    def _culprit(cls, fields: dict[str, Any]) -> str:
        """The one field without which the others make a config."""
        for name, value in fields.items():
            try:
                cls(**{other: fields[other] for other in fields if other != name})
            except (StrictDataclassError, ValueError, *BARE_ERRORS):
                continue
            return f"{name}: found {field_checks.brief(value)}"
        return f"found fields of wrong kinds among {', '.join(map(str, fields))}"

    def validate_architecture(self):
        """Called after every construction, by the base class."""
        _one_of("scoring_func", self.scoring_func, SCORING_FUNCS)
        _one_of("topk_method", self.topk_method, TOPK_METHODS)
        _one_of("hidden_act", self.hidden_act, ACT2FN)
        _one_of("rope_scaling type", self.rope_parameters["rope_type"], ("default", *ROPE_INIT_FUNCTIONS))
        field_checks.check_counts(self)
        field_checks.check_numbers(self)
        field_checks.check_rope_lists(self.rope_parameters, self.qk_rope_head_dim)
        if self.qk_rope_head_dim < 2 or self.qk_rope_head_dim % 2:
            raise ValueError(
                f"qk_rope_head_dim={self.qk_rope_head_dim} must be even and at least 2: it turns in pairs"
            )
        for name, supported in self.only.items():
            if getattr(self, name, None) not in (None, supported):
                raise ValueError(f"{name}={getattr(self, name)} is not supported, only {supported}")
        if getattr(self, "index_topk", None) and not self.has_indexers:
            raise ValueError(
                f"index_topk={self.index_topk}: sparse attention is of deepseek_v32 and glm_moe_dsa, found {self.model_type}"
            )
        if self.num_key_value_heads != self.num_attention_heads:
            raise ValueError(
                f"num_key_value_heads={self.num_key_value_heads} must equal num_attention_heads="
                f"{self.num_attention_heads}: latent attention expands keys and values for every head"
            )
        if not self.n_routed_experts:
            return
        experts, groups = self.n_routed_experts, self.n_group or 1
        if self.num_experts_per_tok is None or not 1 <= self.num_experts_per_tok <= experts:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} must be in [1, n_routed_experts={experts}]"
            )
        if experts % groups:
            raise ValueError(f"n_routed_experts={experts} is not divisible by n_group={groups}")
        if groups > 1 and self.topk_method != "greedy":
            kept = self.topk_group or 0
            if not 1 <= kept <= groups:
                raise ValueError(f"topk_group={self.topk_group} must be in [1, n_group={groups}]")
            if self.topk_method == "noaux_tc" and experts // groups < 2:
                raise ValueError(f"noaux_tc scores a group by its two best experts; n_group={groups} leaves fewer")
            if self.num_experts_per_tok > kept * (experts // groups):
                raise ValueError(
                    f"num_experts_per_tok={self.num_experts_per_tok} must be at most {kept * (experts // groups)}, the "
                    f"experts of topk_group={kept} groups"
                )

    def is_moe_layer(self, layer_idx: int) -> bool:
        """Whether layer ``layer_idx`` (MTP layers count on from ``num_hidden_layers``) routes to experts."""
        return bool(
            self.n_routed_experts and layer_idx >= self.first_k_dense_replace and layer_idx % self.moe_layer_freq == 0
        )

    def has_indexer(self, layer_idx: int) -> bool:
        """Whether a layer chooses the keys that it attends to."""
        return False

    @property
    def softmax_scale(self) -> float:
        """Attention scale ``(d_nope + d_rope)^-½ · mscale²``, mscale = 0.1·mscale_all_dim·ln(factor) + 1 (YaRN)."""
        scale = self.qk_head_dim**-0.5
        rope = self.rope_parameters
        if rope.get("rope_type", "default") != "default" and rope.get("mscale_all_dim") and rope["factor"] > 1:
            scale *= (0.1 * rope["mscale_all_dim"] * math.log(rope["factor"]) + 1.0) ** 2
        return scale

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        rope = output.pop("rope_parameters", None)
        if rope is not None:
            output["rope_theta"] = rope.pop("rope_theta", self.default_theta)
            kind = rope.pop("rope_type", "default")
            rope.pop("type", None)
            if "partial_rotary_factor" in rope:  # which transformers moves there
                output["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
            output["rope_scaling"] = None if kind == "default" else {**rope, "type": kind}
        for derived in ("qk_head_dim", "head_dim"):
            output.pop(derived, None)
        quantization = output.get("quantization_config")
        if isinstance(quantization, dict):
            output["quantization_config"] = on_disk(quantization)
        return output

    def to_json_string(self, use_diff: bool = True) -> str:
        """As `PreTrainedConfig.to_json_string`, in the release's spelling."""
        fields = json.loads(super().to_json_string(use_diff))
        return json.dumps(self.write_release(fields), indent=2, sort_keys=True) + "\n"

    def to_diff_dict(self) -> dict[str, Any]:
        # Every architecture field is written, changed or not: other engines' defaults are not this package's.
        output, complete = super().to_diff_dict(), self.to_dict()
        inherited = {field.name for field in fields(PreTrainedConfig)}
        names = [field.name for field in fields(self) if field.name not in inherited]
        output.update({name: complete[name] for name in (*names, *ROPE_FIELDS) if name in complete})
        if "quantization_config" in complete:
            output["quantization_config"] = complete["quantization_config"]
        return output


@strict
class DeepseekV2Config(DeepseekMoeConfig):
    """DeepSeek-V2 and V2-Lite: softmax scores, greedy or group-limited top-k."""

    model_type = "deepseek_v2"
    vocab_size: int = 102400
    hidden_size: int = 4096
    intermediate_size: int = 11008
    moe_intermediate_size: int = 1407
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    n_shared_experts: int | None = 2
    n_routed_experts: int | None = 64
    num_experts_per_tok: int | None = 6
    first_k_dense_replace: int = 0
    scoring_func: str = "softmax"
    topk_method: str = "greedy"
    norm_topk_prob: bool = False
    q_lora_rank: int | None = 1536
    max_position_embeddings: int = 2048
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2


@strict
class DeepseekV3Config(DeepseekMoeConfig):
    """DeepSeek-V3, R1, Moonlight: sigmoid scores, bias-corrected group-limited top-k, MTP."""

    model_type = "deepseek_v3"
    num_nextn_predict_layers: int = 1
    n_group: int | None = 8
    topk_group: int | None = 4
    routed_scaling_factor: float | int = 2.5
    q_lora_rank: int | None = 1536


def in_memory(fields: Mapping) -> dict:
    """A release's ``quantization_config`` under the name of this package's own loader."""
    return {**fields, "quant_method": QUANT_METHOD, METHOD_FIELD: fields["quant_method"]}


def on_disk(fields: Mapping) -> dict:
    """The inverse of `in_memory`; fields of any other quantiser as they are."""
    if fields.get("quant_method") != QUANT_METHOD:
        return dict(fields)
    own = {key: value for key, value in fields.items() if key != METHOD_FIELD}
    return {**own, "quant_method": fields.get(METHOD_FIELD, formats.FP8.method)}


def quantization_fields(config) -> dict | None:
    """The ``quantization_config`` of a config as a release has it; ``None`` where it announces none."""
    quantization = getattr(config, "quantization_config", None)
    if not quantization:
        return None
    return on_disk(quantization if isinstance(quantization, Mapping) else quantization.to_dict())


def own_formats(config) -> tuple[formats.WeightFormat, ...]:
    """The formats of a config's weights; none for floating-point ones, and for what another quantiser made.

    Raises:
        ValueError: a kind of this family's own formats that is not supported.
    """
    fields = quantization_fields(config)
    return formats.all_of_config(fields) if fields and fields.get("quant_method") in formats.methods() else ()


def own_format(config) -> formats.WeightFormat | None:
    """The first of `own_formats`."""
    return next(iter(own_formats(config)), None)


def _check_quantization(fields: Any) -> None:
    """One rule for what a config announces, whichever door reads it.

    Raises:
        ValueError: no object, or a method or kind of weights that does not load here.
    """
    if not fields:
        return
    if not isinstance(fields, Mapping):
        if hasattr(fields, "to_dict"):  # an object of transformers, put there by a caller
            return
        raise ValueError(f"quantization_config={field_checks.brief(fields)} must be an object or null")
    fields = on_disk(fields)
    method = getattr(fields.get("quant_method"), "value", fields.get("quant_method"))
    if method is None and (fields.get("load_in_4bit") or fields.get("load_in_8bit")):
        return
    if method not in FOREIGN_METHODS:
        formats.of_config(fields)


def _one_of(name: str, value: Any, allowed) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not supported, wanted one of {', '.join(map(str, allowed))}")
