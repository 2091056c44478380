"""The models: embedding, decoder layers, norm, heads. A token's path from ``input_ids`` to logits reads top-down.

`DeepseekMoeModel` and its heads are the one implementation; the classes at the end, and `named_models`, only bind it.
"""

import contextlib
from functools import partial

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GenericForSequenceClassification, GenericForTokenClassification
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from modeling_deepseek_moe.adapters import AdapterMixin
from modeling_deepseek_moe.attention import DeepseekAttention
from modeling_deepseek_moe.block import DeepseekDecoderLayer
from modeling_deepseek_moe.bnb.model import BitsAndBytesMixin
from modeling_deepseek_moe.cache import prepare_cache
from modeling_deepseek_moe.compat import CACHE_NAME, takes_cache
from modeling_deepseek_moe.config import DeepseekMoeConfig, DeepseekV2Config, DeepseekV3Config
from modeling_deepseek_moe.cross_entropy import next_token_loss
from modeling_deepseek_moe.decoding.mixin import DraftingMixin
from modeling_deepseek_moe.distributed.plans import ParallelPlansMixin
from modeling_deepseek_moe.engine import next_token
from modeling_deepseek_moe.engine.report import EngineReportMixin
from modeling_deepseek_moe.engine.runs import recomputable, runs
from modeling_deepseek_moe.families import KimiK2Config
from modeling_deepseek_moe.hybrid.model import HybridMixin
from modeling_deepseek_moe.indexer import DeepseekIndexer
from modeling_deepseek_moe.indexer_loss import DENSE
from modeling_deepseek_moe.layer_context import check_labels, layer_context
from modeling_deepseek_moe.layers import DeepseekRMSNorm
from modeling_deepseek_moe.loading import ReleaseLoadingMixin
from modeling_deepseek_moe.masks import PromptMaskMixin
from modeling_deepseek_moe.moe.experts import DeepseekExperts
from modeling_deepseek_moe.moe.router import DeepseekTopkRouter
from modeling_deepseek_moe.moe.training_state import TrainingPass, TrainingState, sequence_ids
from modeling_deepseek_moe.moving import MovingMixin
from modeling_deepseek_moe.mtp import DeepseekMtpLayer
from modeling_deepseek_moe.objective import Objective
from modeling_deepseek_moe.ops.experts import IMPLEMENTATION
from modeling_deepseek_moe.ops.linear import project
from modeling_deepseek_moe.origin import Origin
from modeling_deepseek_moe.paged import ContinuousLatentMixin
from modeling_deepseek_moe.quantized.mapped import MappedExperts
from modeling_deepseek_moe.resizing import ResizingMixin
from modeling_deepseek_moe.resuming import accept_release_keys
from modeling_deepseek_moe.rope import DeepseekRotaryEmbedding
from modeling_deepseek_moe.saving import ReleaseSavingMixin


class DeepseekMoePreTrainedModel(
    AdapterMixin,
    ParallelPlansMixin,
    ReleaseLoadingMixin,
    ReleaseSavingMixin,
    ResizingMixin,
    HybridMixin,
    MovingMixin,
    EngineReportMixin,
    BitsAndBytesMixin,
    PreTrainedModel,
):
    """What transformers needs to know about the family, weight initialisation, and the release format's load and save."""

    config_class = DeepseekMoeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("DeepseekDecoderLayer", "DeepseekMtpLayer")
    _skip_keys_device_placement = (CACHE_NAME,)
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _can_record_outputs = {
        "hidden_states": DeepseekDecoderLayer,
        "attentions": DeepseekAttention,
        "router_logits": OutputRecorder(DeepseekTopkRouter, index=0),
    }

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True  # transformers would guess it from this file's text; the attention lives in another

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        return super().get_correct_experts_implementation(requested_experts or IMPLEMENTATION)

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """Read by DistributedDataParallel when it wraps the model: what gets no gradient, for which DDP would wait.

        The MTP layers without their loss, and indexers that are not trained, or all else where they alone are; codes, which each
        rank has loaded and gloo does not send in FP8. The names are as they are here and as they are inside a ``PeftModel``.
        """
        base = self.base_model
        state = base.training_state or TrainingState()
        indexers = [module for module in base.modules() if isinstance(module, DeepseekIndexer)]
        modules = [] if state.mtp_weight else list(base.mtp_layers)
        if state.indexer_stage is None:
            modules += indexers
        unused = {id(parameter) for module in modules for parameter in module.parameters()}
        if state.indexer_stage == DENSE:
            learned = {id(parameter) for module in indexers for parameter in module.parameters()}
            unused |= {id(parameter) for parameter in self.parameters()} - learned
        names = [name for name, p in self.named_parameters() if id(p) in unused or p.dtype.itemsize == 1]
        return names + [f"base_model.model.{name}" for name in names]

    @torch.no_grad()
    def _init_weights(self, module):
        std = self.config.initializer_range
        if isinstance(module, DeepseekTopkRouter):
            init.normal_(module.weight, mean=0.0, std=std)
            if module.e_score_correction_bias is not None:
                init.zeros_(module.e_score_correction_bias)
        elif isinstance(module, DeepseekExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)
        elif not any(parameter.dtype.itemsize == 1 for parameter in module.parameters(recurse=False)):
            super()._init_weights(module)  # FP8 codes are loaded, never initialised
        embedding_std = getattr(self.config, "embedding_initializer_range", None)
        if embedding_std is not None and isinstance(module, nn.Embedding):
            init.normal_(module.weight, mean=0.0, std=embedding_std)
            if module.padding_idx is not None and not getattr(module.weight, "_is_hf_initialized", False):
                init.zeros_(module.weight[module.padding_idx])  # a slice has not the mark of what was loaded

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        count = super().num_parameters(only_trainable=only_trainable, exclude_embeddings=exclude_embeddings)
        if only_trainable:
            return count
        return count + sum(module.num_mapped for module in self.modules() if isinstance(module, MappedExperts))


class DeepseekMoeModel(DeepseekMoePreTrainedModel):
    """Embedding, decoder layers and final norm; the MTP layers follow the decoder layers in ``layers``, as released."""

    def __init__(self, config: DeepseekMoeConfig):
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        depth, mtp_depth = config.num_hidden_layers, config.num_nextn_predict_layers
        self.layers = nn.ModuleList(
            [DeepseekDecoderLayer(config, i) for i in range(depth)]
            + [DeepseekMtpLayer(config, i) for i in range(depth, depth + mtp_depth)]
        )
        self.norm = DeepseekRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = DeepseekRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.has_gaps = False  # whether other stages of a pipeline have some of the layers
        self.training_state: TrainingState | None = None
        self.origin = Origin()  # of the files that it is loaded from, once it is
        for module in self.modules():
            if isinstance(module, DeepseekExperts):
                module.register_load_state_dict_pre_hook(accept_release_keys)
            elif isinstance(module, DeepseekTopkRouter) and module.e_score_correction_bias is not None:
                self._keep_in_fp32_modules_strict = ("e_score_correction_bias",)
            elif isinstance(module, DeepseekIndexer):
                # a few rows that weigh the heads, which releases and transformers keep from fp16 and from quantisers too
                self._keep_in_fp32_modules = ("indexer.weights_proj",)
        self.post_init()

    @property
    def mtp_layers(self) -> nn.ModuleList:
        """The MTP layers, one a depth (none if the checkpoint has none)."""
        return self.layers[self.config.num_hidden_layers :]

    @takes_cache
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        mla_path: str | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MoeModelOutputWithPast:
        """As every decoder of transformers; ``mla_path`` forces ``"absorbed"`` or ``"expanded"`` (``None``: by cost)."""
        self.origin.check(self)
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        past_length = prepare_cache(cache, self.config, inputs_embeds.shape[1])
        if self.training_state is not None and self.training and "training_pass" not in kwargs:
            shape, device = inputs_embeds.shape[:2], inputs_embeds.device
            sequences = sequence_ids(shape, device, attention_mask, position_ids)
            kwargs["training_pass"] = TrainingPass(self.training_state, sequences)
        context = layer_context(
            self, inputs_embeds, attention_mask, position_ids, cache, past_length, mla_path, **kwargs
        )
        hidden_states = inputs_embeds
        layers = list(self.layers)[: self.config.num_hidden_layers]
        if self.has_gaps:
            layers = [layer for layer in layers if not isinstance(layer, nn.Identity)]
        for run in runs(self, layers, hidden_states, cache, context):  # through the layers and the norm
            hidden_states = run(hidden_states, use_cache=use_cache, **{CACHE_NAME: cache}, **context)
        return MoeModelOutputWithPast(last_hidden_state=hidden_states, **{CACHE_NAME: cache})

    def mtp(
        self,
        depth: int,
        input_ids: torch.LongTensor,
        hidden_states: torch.FloatTensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """The hidden states of MTP layer ``depth`` (0 first); see `DeepseekMtpLayer.forward` for the arguments.

        Args:
            cache: of this layer alone.

        Raises:
            ValueError: the model has no MTP layer of that depth.
        """
        if not 0 <= depth < len(self.mtp_layers):
            raise ValueError(f"MTP depth {depth} asked for, the model has {len(self.mtp_layers)} MTP layers")
        past_length = prepare_cache(cache, self.config, input_ids.shape[1])
        context = layer_context(self, hidden_states, attention_mask, position_ids, cache, past_length, None, **kwargs)
        layer = self.mtp_layers[depth]
        if context.get("training_pass") is not None:
            layer = partial(recomputable, layer)
        return layer(input_ids, hidden_states, **{CACHE_NAME: cache}, **context)


DECODER_FORWARD = DeepseekMoeModel.forward  # where another is put in its place, that is called


class DeepseekMoeForCausalLM(
    DeepseekMoePreTrainedModel, DraftingMixin, ContinuousLatentMixin, PromptMaskMixin, GenerationMixin
):
    """The language model: `DeepseekMoeModel` and ``lm_head``."""

    model_class: type[DeepseekMoeModel]
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: DeepseekMoeConfig):
        super().__init__(config)
        self.model = self.model_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.loss_function = next_token_loss
        self.post_init()

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mla_path: str | None = None,
        row_weights: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MoeCausalLMOutputWithPast:
        """Next-token logits ``[B, S, vocab_size]`` and, with ``labels``, their shifted cross-entropy.

        In training with a `TrainingState` the loss is that of `Objective`, and ``aux_loss`` its balance part, which the indexers'
        dense stage leaves out of it. Outside training the loss is multiplied by the mean of ``row_weights`` ``[B]``: with the
        labels of each row over the mean of the data set, `Trainer`'s mean over rows is the one over labels.
        """
        if type(self.model).forward is DECODER_FORWARD:
            wishes = dict(kwargs, inputs_embeds=inputs_embeds, labels=labels, mla_path=mla_path)
            tokens = input_ids, attention_mask, position_ids, cache, logits_to_keep
            logits = next_token.logits(self, *tokens, wishes)
            if logits is not None:  # of a decoding step, for which the engine has done the same in one call
                return MoeCausalLMOutputWithPast(logits=logits, **{CACHE_NAME: cache})
        objective = None
        if labels is not None:
            check_labels(self)
        if labels is not None and self.training and self.model.training_state is not None:
            objective = Objective(self, input_ids, labels, attention_mask, position_ids, kwargs)
            kwargs["training_pass"] = objective.training_pass
        with contextlib.nullcontext() if objective is None else objective.graph():
            outputs: MoeModelOutputWithPast = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                cache=cache,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                mla_path=mla_path,
                **kwargs,
            )
            logits = project(self.lm_head, slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = aux_loss = None
        if objective is not None:
            loss, aux_loss = objective.loss(logits, outputs.last_hidden_state)
        elif labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
            if row_weights is not None and not self.training:
                loss = loss * row_weights.to(loss.device).mean()
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )

    def mtp_logits(self, depth: int, input_ids, hidden_states, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits ``[B, S, vocab_size]`` of MTP layer ``depth``, and its hidden states, which the next depth takes."""
        hidden_states = self.model.mtp(depth, input_ids, hidden_states, **kwargs)
        return self.mtp_head(depth, hidden_states), hidden_states

    def mtp_head(self, depth: int, hidden_states: torch.Tensor) -> torch.Tensor:
        """Logits ``[..., vocab_size]`` of what `DeepseekMoeModel.mtp` gave for that depth."""
        return project(self.model.mtp_layers[depth].shared_head.head, hidden_states)


# The names of the releases. `architectures` on disk is written from them.


class DeepseekV2Model(DeepseekMoeModel):
    config_class = DeepseekV2Config


class DeepseekV2ForCausalLM(DeepseekMoeForCausalLM):
    config_class = DeepseekV2Config
    model_class = DeepseekV2Model


class DeepseekV2ForSequenceClassification(GenericForSequenceClassification, DeepseekMoePreTrainedModel):
    config_class = DeepseekV2Config


class DeepseekV2ForTokenClassification(GenericForTokenClassification, DeepseekMoePreTrainedModel):
    config_class = DeepseekV2Config


class DeepseekV3Model(DeepseekMoeModel):
    config_class = DeepseekV3Config


class DeepseekV3ForCausalLM(DeepseekMoeForCausalLM):
    config_class = DeepseekV3Config
    model_class = DeepseekV3Model


class DeepseekV3ForSequenceClassification(GenericForSequenceClassification, DeepseekMoePreTrainedModel):
    config_class = DeepseekV3Config


class DeepseekV3ForTokenClassification(GenericForTokenClassification, DeepseekMoePreTrainedModel):
    config_class = DeepseekV3Config


class KimiK2Model(DeepseekMoeModel):
    config_class = KimiK2Config


class KimiK2ForCausalLM(DeepseekMoeForCausalLM):
    config_class = KimiK2Config
    model_class = KimiK2Model
    release_architecture = "DeepseekV3ForCausalLM"


class KimiK2ForSequenceClassification(GenericForSequenceClassification, DeepseekMoePreTrainedModel):
    config_class = KimiK2Config


class KimiK2ForTokenClassification(GenericForTokenClassification, DeepseekMoePreTrainedModel):
    config_class = KimiK2Config
