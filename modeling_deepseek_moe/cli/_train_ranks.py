"""``deepseek-moe train`` on several processes: what the ranks must have in common, and how a model is divided among them."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig, TrainingArguments
from transformers.distributed import DistributedConfig

from modeling_deepseek_moe.checkpoint.reader import CheckpointReader
from modeling_deepseek_moe.cli._train_options import RunOptions
from modeling_deepseek_moe.distributed.agreement import check_ranks, on_all_ranks

# of TrainingArguments: what ranks that differ in it would wait for each other with, or drift apart by
SHARED = (
    *("max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate"),
    *("lr_scheduler_type", "optim", "seed", "data_seed", "bf16", "gradient_checkpointing", "save_steps", "output_dir"),
)


def check_agreement(options: RunOptions, training: TrainingArguments, config: PreTrainedConfig) -> None:
    """
    Raises:
        ValueError: on every rank: the ranks have other packages, options or configs; fsdp on a CPU; or a model that one of
            them cannot read.
    """
    if training.fsdp and training.device.type == "cpu":
        raise ValueError(
            "fsdp: found a CPU, where accelerate shards nothing and says nothing, wanted --fsdp_size N, or an accelerator"
        )
    if options.fsdp_size > 1 and training.fsdp:
        raise ValueError("found fsdp and fsdp_size, wanted one: accelerate's sharding, or transformers'")
    size = options.fsdp_size * options.dp_replicate_size
    if size > 1 and size != training.world_size:
        raise ValueError(
            f"fsdp_size × dp_replicate_size: found {size}, wanted the {training.world_size} process(es) of the launcher"
        )
    settings = {name: getattr(training, name) for name in SHARED}
    check_ranks(options=asdict(options), training=settings, config=config.to_dict())
    if options.model is not None and Path(options.model).is_dir():
        folder = options.model
        on_all_ranks(lambda: CheckpointReader.open(folder))


def distributed_settings(options: RunOptions) -> dict[str, DistributedConfig]:
    """What ``from_pretrained`` is given so that each rank holds its part of the model; nothing for a whole one."""
    sizes = options.fsdp_size, options.ep_size, options.dp_replicate_size
    if max(sizes) == 1:
        return {}
    return {"distributed_config": DistributedConfig(fsdp_size=sizes[0], ep_size=sizes[1], dp_replicate_size=sizes[2])}


def is_in_parts(parameters: Sequence[torch.Tensor]) -> bool:
    """Whether a rank holds a part of the model only."""
    return any(isinstance(parameter, DTensor) for parameter in parameters)
