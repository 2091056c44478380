"""``deepseek-moe train``: the report's recipe from a YAML file or flags."""

import logging
import os
from pathlib import Path
from typing import Annotated

import typer

from modeling_deepseek_moe.cli import _slurm


def train(
    context: typer.Context,
    recipe: Annotated[
        Path | None,
        typer.Argument(help="A YAML file of options.", show_default="flags alone", metavar="[RECIPE.yaml]"),
    ] = None,
) -> None:
    """Train, fine-tune or continue a model by DeepSeek-V3's recipe, from a YAML file, flags, or both.

    Options are those below and all of transformers' TrainingArguments, by their names, in the file or as flags, which go
    before the file: --output_dir, --learning_rate, --max_steps, --per_device_train_batch_size, --resume_from_checkpoint ...

    \b
    model            [cyan]--model[/] FOLDER to start from, or [cyan]--config[/] config.json to start from scratch; [cyan]--tokenizer[/];
                     [cyan]--dtype[/] float32. An FP8 release is dequantised, and written as FP8 again.
    data             [cyan]--train_file[/] and [cyan]--eval_file[/], JSON (lines), Parquet or text, rows with "messages" (and "tools"),
                     "text" or "input_ids" (and masks); [cyan]--max_length[/] 1024; [cyan]--packing[/] whole documents to a row,
                     kept apart; [cyan]--assistant_only_loss[/] true: of chats, what the assistant says.
    adapter          [cyan]--lora[/] on the weights as they are, bf16 or FP8, or [cyan]--qlora[/] on 4-bit ones (bitsandbytes' NF4);
                     [cyan]--lora_rank[/] 16, [cyan]--lora_alpha[/] twice that, [cyan]--lora_dropout[/] 0, [cyan]--lora_init[/] as peft has it,
                     [cyan]--lora_targets[/] all, or attention, dense, shared, experts or names of layers. The recipe is off.
    recipe           [cyan]--load_balance_gamma[/] 0.001 and [cyan]--load_balance_until[/] 1.0; [cyan]--balance_alpha[/] 0.0001;
                     [cyan]--mtp_weight[/] 0.3, [cyan]--mtp_later_weight[/] 0.1, [cyan]--mtp_switch_at[/] 0.676; 0 turns each off;
                     [cyan]--fp8[/] false and [cyan]--fp8_wgrad[/] true.

    \b
    Examples:
      [cyan]deepseek-moe train recipe.yaml[/]
      [cyan]deepseek-moe train recipe.yaml --learning_rate 1e-5[/]
      [cyan]deepseek-moe train --model DeepSeek-V2-Lite --train_file chat.jsonl --output_dir runs/sft[/]
      [cyan]deepseek-moe train --model DeepSeek-V2-Lite --train_file chat.jsonl --output_dir runs/qlora --qlora --max_steps 300[/]
      [cyan]torchrun --nproc-per-node 8 $(which deepseek-moe) train recipe.yaml --fsdp_size 8[/]
      [cyan]srun --ntasks-per-node 8 deepseek-moe train recipe.yaml --fsdp_size 8[/]   ranks are srun's tasks
      [cyan]deepseek-moe report runs/sft[/]   afterwards
    """
    # Trainer's module imports every optional library that is installed: only this command pays for that.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from modeling_deepseek_moe.cli import _train_memory, _train_run
    from modeling_deepseek_moe.distributed import ranks

    _train_memory.spare_memory()
    os.environ.update(_slurm.ranks(os.environ))

    arguments = list(context.args)
    if recipe is not None and str(recipe).startswith("--"):
        arguments, recipe = [str(recipe), *arguments], None
    _train_run.run(recipe, arguments)
    ranks.leave()
