"""What the demo teaches: a kind of problem that the tiny checkpoint never saw, with the recipe that it was trained by."""

import itertools
import random
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from modeling_deepseek_moe.modeling import DeepseekV3ForCausalLM
from modeling_deepseek_moe.ops.linear.cpu import torch_is_slow
from modeling_deepseek_moe.tiny.corpus import GOODS, NAMES, Problem, problems
from modeling_deepseek_moe.tiny.recipe import BATCH_ROWS, ROW_TOKENS, PackedProblems, make_trainer

LEARNING_RATE = 1e-3  # the checkpoint was trained at up to 2.5e-3; more would cost what it knows
WARMUP_STEPS = 10
HELD_OUT_PART = 10


def sharing(seed: int, *, held_out: bool = False) -> Iterator[Problem]:
    """Division problems without end, from the numbers of `random.Random(seed)`; one in ten, by checksum, is held out."""
    draw = random.Random(seed).random

    def between(low: int, high: int) -> int:
        return low + int(draw() * (high - low + 1))

    while True:
        name, goods = NAMES[between(0, len(NAMES) - 1)], GOODS[between(0, len(GOODS) - 1)]
        friends, each = between(2, 9), between(2, 9)
        question = f"{name} shares out {friends * each} {goods} to {friends} friends. How many {goods} does each get?"
        if (zlib.crc32(question.encode()) % HELD_OUT_PART == 0) == held_out:
            solution = f"{friends * each} / {friends} = {each}. The answer is \\boxed{{{each}}}."
            yield Problem("sharing", question, solution, str(each), question)


def lessons(seed: int) -> Iterator[Problem]:
    """New problems and old ones in turns: with new ones alone the model would forget."""
    return itertools.chain.from_iterable(zip(sharing(seed), problems(seed), strict=True))


class Budget(TrainerCallback):
    """Shows how far training is, and stops it after ``seconds``."""

    def __init__(self, steps: int, seconds: float, console: Console):
        self.steps, self.seconds, self.start, self.out_of_time = steps, seconds, time.monotonic(), False
        columns = ("[progress.description]{task.description}", "{task.fields[loss]}", "{task.fields[rate]}")
        first, *rest = map(TextColumn, columns)
        self.progress = Progress(first, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), *rest, console=console)
        self.task = self.progress.add_task("Training", total=steps, loss="", rate="")

    def on_train_begin(self, args, state, control, **kwargs):
        self.start = time.monotonic()
        self.progress.start()

    def on_step_end(self, args, state, control, **kwargs):
        seconds = time.monotonic() - self.start
        rate = f"{state.global_step * BATCH_ROWS * ROW_TOKENS / seconds:,.0f} tokens/s"
        self.progress.update(self.task, completed=state.global_step, rate=rate)
        if seconds >= self.seconds:
            self.out_of_time = state.global_step < self.steps
            control.should_training_stop = True

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.progress.update(self.task, loss=f"loss {float(logs['loss']):.3f}")

    def on_train_end(self, args, state, control, **kwargs):
        self.progress.stop()


def make_demo_trainer(
    model: DeepseekV3ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path, *, budget: Budget, seed: int
) -> Trainer:
    """The recipe's `Trainer` over `lessons`."""
    rows = PackedProblems(tokenizer, BATCH_ROWS * budget.steps, lessons(seed))
    settings = {"learning_rate": LEARNING_RATE, "warmup_steps": WARMUP_STEPS}
    settings |= {"logging_steps": min(10, budget.steps), "logging_first_step": True}  # a short one is reported too
    settings["bf16"] = not torch_is_slow()
    trainer = make_trainer(model, rows, folder, seed=seed, **settings)
    trainer.add_callback(budget)
    trainer.remove_callback(PrinterCallback)  # the progress bar says it
    return trainer
