"""The losses besides the next token's as callbacks of `Trainer`: sequence-wise balance, multi-token prediction."""

from transformers import TrainerCallback
from transformers.utils import logging

from modeling_deepseek_moe.mtp import share_mtp_weights
from modeling_deepseek_moe.training.attach import attach_state, detach_state, find_language_model, find_model

logger = logging.get_logger(__name__)


class BalanceLossCallback(TrainerCallback):
    """Adds ``α Σ_i f_i P_i`` of every MoE layer to the loss, sequence by sequence (V3 report, eq. 17-20).

    Packed sequences are taken apart and padding is left out. V2's softmax form is the same with its own scores.

    Args:
        alpha: α; ``None`` takes the config's ``aux_loss_alpha``. V3's report trained with 0.0001.
        by_sequence: ``None`` takes the config's ``seq_aux`` (``True`` where it has none); ``False`` takes all tokens
            of a micro-batch as one sequence.

    Raises:
        ValueError: at the start of training, no ``alpha`` here and none in the config.
    """

    def __init__(self, alpha: float | None = None, by_sequence: bool | None = None):
        self.alpha, self.by_sequence = alpha, by_sequence

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        config = find_model(model).config
        alpha = getattr(config, "aux_loss_alpha", None) if self.alpha is None else self.alpha
        if alpha is None:
            raise ValueError(
                "BalanceLossCallback: found no alpha and no aux_loss_alpha in the config, wanted one of them"
            )
        training = attach_state(model)
        training.balance_alpha = alpha
        training.balance_by_sequence = (
            getattr(config, "seq_aux", True) if self.by_sequence is None else self.by_sequence
        )

    def on_train_end(self, args, state, control, model=None, **kwargs):
        detach_state(model)


class MtpLossCallback(TrainerCallback):
    """Adds ``λ/D · Σ_k CE_k`` over the D MTP layers to the loss (V3 report, 2.2); padding and packed boundaries masked.

    From the moment that `Trainer` is made the MTP layers share the model's embedding and head; they are saved as the
    copies that the release's keys are.

    Args:
        weight: λ, 0.3 in the report,
        later_weight: and 0.1
        switch_at: after this part of the training (10T of 14.8T tokens).

    Raises:
        ValueError: when `Trainer` is made, a model without MTP layers; at the start of a training of several processes, a
            callback that was added after `Trainer` was made, or reentrant checkpointing.
    """

    def __init__(self, weight: float = 0.3, later_weight: float = 0.1, switch_at: float = 10 / 14.8):
        self.weight, self.later_weight, self.switch_at = weight, later_weight, switch_at
        self._saw_init = False

    def on_init_end(self, args, state, control, model=None, **kwargs):
        self._share(model)
        self._saw_init = True
        attach_state(model).mtp_weight = self.weight  # before DDP wraps the model and asks whom to wait for

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if args is not None and args.world_size > 1:  # a loop by hand has no arguments
            self._check_ranks(args)
        self._share(model)  # if the callback came after the Trainer

    def _check_ranks(self, args) -> None:
        if not self._saw_init:
            raise ValueError(
                "MtpLossCallback: found it added after Trainer was made, when ranks may already have agreed not to share "
                "the MTP layers' gradients, wanted Trainer(..., callbacks=[MtpLossCallback()])"
            )
        checkpointing = args.gradient_checkpointing_kwargs or {}  # 5.24 has a newer name, and keeps this one in step
        if args.gradient_checkpointing and checkpointing.get("use_reentrant"):
            raise ValueError(
                "MtpLossCallback: found reentrant checkpointing on several processes, wanted gradient_checkpointing_kwargs="
                "{'use_reentrant': False}: an MTP layer uses the model's embedding again within a checkpointed layer, whose "
                "gradient the ranks would then share before it is whole, and drift apart"
            )

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        is_early = state.global_step < self.switch_at * state.max_steps
        attach_state(model).mtp_weight = self.weight if is_early else self.later_weight

    def on_train_end(self, args, state, control, model=None, **kwargs):
        detach_state(model)

    def _share(self, model) -> None:
        language_model = find_language_model(model)
        if not len(language_model.model.mtp_layers):
            raise ValueError("MtpLossCallback: found a model without MTP layers, wanted num_nextn_predict_layers >= 1")
        if share_mtp_weights(language_model) and language_model.name_or_path:  # a new model's always differ
            logger.warning(
                "the MTP layers' copies of embedding and head differed from the model's, which replace them"
            )
