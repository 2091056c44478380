"""What `Trainer` leaves out of the checkpoints of a model that transformers divided among ranks: all but the weights.

`Trainer` refuses to write the optimizer of such a model, and takes ``save_only_model=True``. The states of all ranks go to ``sharded_states``, by
``torch.distributed.checkpoint`` and under the parameters' names, so that any number of processes goes on from them.
"""

import json
from pathlib import Path

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import distributed, nn
from transformers import TrainerCallback, TrainerState
from transformers.distributed.checkpoint import load_optimizer_distributed, save_optimizer_distributed
from transformers.trainer import TRAINER_STATE_NAME

from modeling_deepseek_moe.checkpoint.headers import CheckpointError
from modeling_deepseek_moe.distributed.checkpoints import STATES_FOLDER
from modeling_deepseek_moe.distributed.chunks import read_chunks

SCHEDULER_FILE = "scheduler.pt"


class ShardedTrainingCallback(TrainerCallback):
    """Optimizer states in the checkpoints of a model loaded with ``distributed_config``, to be resumed on any number of ranks.

    Also on one process, from what several wrote and for several to go on from, with ``TrainingArguments(save_only_model=True)``. The
    model itself is in the checkpoint in the release format. States of random generators are not: with dropout, a training that is
    resumed draws others.

    Args:
        resume_from: the checkpoint that is given to ``Trainer.train``; ``None``: ``resume_from_checkpoint`` of the arguments, or the
            step's in ``output_dir``, if it is of the same training.

    Raises:
        ValueError: when `Trainer` is made, ``save_only_model=False``; at the start of a training that is resumed, one without states, with some missing, or of another training.
    """

    def __init__(self, resume_from: str | None = None):
        self.resume_from = resume_from

    def on_init_end(self, args, state, control, **kwargs):
        if not args.save_only_model:
            raise ValueError(
                "ShardedTrainingCallback: found save_only_model=False, wanted True: this callback writes the optimizer's states"
            )

    def on_save(self, args, state, control, model=None, optimizer=None, lr_scheduler=None, **kwargs):
        checkpoint = _checkpoint(args, state)
        if args.should_save:
            torch.save(lr_scheduler.state_dict(), checkpoint / SCHEDULER_FILE)
        save_optimizer_distributed(model, _unwrapped(optimizer), str(checkpoint / STATES_FOLDER))
        if distributed.is_available() and distributed.is_initialized():
            distributed.barrier()

    def on_train_begin(self, args, state, control, model=None, optimizer=None, lr_scheduler=None, **kwargs):
        if not state.global_step:
            return
        given = self.resume_from or args.resume_from_checkpoint
        is_told = given and Path(str(given)).is_dir()
        checkpoint = Path(given) if is_told else _checkpoint(args, state)
        if not is_told:
            _check_goes_on(checkpoint, state)
        try:
            read_chunks(checkpoint / STATES_FOLDER)
        except CheckpointError as error:
            raise ValueError(f"{checkpoint}: cannot go on with the optimizer: {error}") from None
        load_optimizer_distributed(model, _unwrapped(optimizer), str(checkpoint / STATES_FOLDER))
        lr_scheduler.load_state_dict(torch.load(checkpoint / SCHEDULER_FILE, weights_only=True))


def _check_goes_on(checkpoint: Path, state: TrainerState) -> None:
    """What ``Trainer.train`` was given is told to no callback: a checkpoint elsewhere can have the same number.

    Raises:
        ValueError: ``checkpoint`` is not there, or has another history of logs than the training goes on from.
    """
    file, found = checkpoint / TRAINER_STATE_NAME, "no checkpoint"
    if file.is_file():
        there = TrainerState.load_from_json(str(file))
        if json.dumps(there.log_history) == json.dumps(state.log_history):  # as text, for NaN is no NaN's equal
            return
        found = "the checkpoint of another training"
    raise ValueError(
        f"{checkpoint}: found {found}, wanted the one that Trainer.train goes on from at step {state.global_step}: give its path to "
        "ShardedTrainingCallback(resume_from=...) too"
    )


def is_sharded_by_transformers(model: nn.Module) -> bool:
    """Whether ``from_pretrained(distributed_config=...)`` divided the model among the ranks."""
    return bool(getattr(model, "is_distributed_loading_by_transformers", False))


def _checkpoint(args, state) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _unwrapped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    return optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
