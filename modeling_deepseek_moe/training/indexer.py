"""Training of the indexers of DeepSeek Sparse Attention (DeepSeek-V3.2 report, section 2.1) as a callback of `Trainer`."""

from torch import nn
from transformers import TrainerCallback

from modeling_deepseek_moe.indexer import DeepseekIndexer
from modeling_deepseek_moe.indexer_loss import DENSE, SPARSE
from modeling_deepseek_moe.training.attach import attach_state, detach_state, find_model


class IndexerLossCallback(TrainerCallback):
    """Trains every layer's indexer by KL(p ‖ softmax(I)): p is attention's distribution, summed over heads and normalised.

    ``"dense"``, the warm-up: attention is to all keys, and the indexers' loss is the only one, so that nothing else learns (the
    report: 1,000 steps at a learning rate of 0.001). ``"sparse"``: attention is to the keys that were chosen, the model learns
    by its own losses, and the indexers, whose inputs are detached, by KL over the chosen keys (15,000 steps at 7.3e-6).
    The loss is a sum over layers and a mean over each sequence's tokens, prompts too; sequences weigh as their labels do in the
    next token's loss. Evaluation is sparse in both stages.

    Raises:
        ValueError: an unknown stage; when `Trainer` is made, a model without indexers or whose indexers are not to be trained; at
            the start of training, FSDP, DeepSpeed, or, on several processes, a callback added after `Trainer` was made.
    """

    def __init__(self, stage: str = SPARSE):
        if stage not in (DENSE, SPARSE):
            raise ValueError(f"stage={stage!r} must be {DENSE!r} or {SPARSE!r}")
        self.stage = stage
        self._saw_init = False

    def on_init_end(self, args, state, control, model=None, **kwargs):
        _check_learns(model)
        self._saw_init = True
        if args.world_size > 1:  # before DDP wraps the model and asks whom to wait for
            attach_state(model).indexer_stage = self.stage

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        for name in ("fsdp", "deepspeed"):
            if getattr(args, name, None):
                raise ValueError(
                    f"IndexerLossCallback: found {name}, wanted whole parameters: an indexer's gradient is computed where its layer "
                    "runs, and added where the loss is"
                )
        if not self._saw_init and args is not None and args.world_size > 1:  # a loop by hand has no arguments
            raise ValueError(
                "IndexerLossCallback: found it added after Trainer was made, when ranks may already have agreed whose gradients to "
                "share, wanted Trainer(..., callbacks=[IndexerLossCallback()])"
            )
        _check_learns(model)
        attach_state(model).indexer_stage = self.stage

    def on_train_end(self, args, state, control, model=None, **kwargs):
        detach_state(model)


def _check_learns(model: nn.Module) -> None:
    base = find_model(model)
    indexers = [module for module in base.modules() if isinstance(module, DeepseekIndexer)]
    if not any(parameter.requires_grad for indexer in indexers for parameter in indexer.parameters()):
        found = (
            "indexers without a parameter that is trained"
            if indexers
            else f"{base.config.model_type} without indexers"
        )
        raise ValueError(f"IndexerLossCallback: found {found}, wanted some to train (deepseek_v32, glm_moe_dsa)")
