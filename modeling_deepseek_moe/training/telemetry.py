"""What the experts do, in the logs of `Trainer`: MaxVio, entropy, dead experts, bias range, each loss, tokens per second."""

import inspect
import json
import math
import time
from pathlib import Path

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import CallbackHandler, ExportableState
from transformers.utils import logging

from modeling_deepseek_moe.checkpoint.atomic import write_file
from modeling_deepseek_moe.moe.balance import load_entropy, max_violation
from modeling_deepseek_moe.training.attach import attach_state, detach_state, routers, step_loads

logger = logging.get_logger(__name__)
LOADS_FILE = "expert_load.jsonl"
LOSSES = ("lm_loss", "mtp_loss", "balance_loss", "indexer_loss")


class MoeTelemetryCallback(TrainerCallback, ExportableState):
    """Adds figures of the experts and the parts of the loss to what `Trainer` logs, and so to its reporters.

    ``max_vio``: max load / mean load − 1 of each step and layer, averaged; ``max_vio_worst_layer``: averaged over the
    steps, of the worst layer; ``max_vio_epoch``: of the load since the epoch began, averaged over the layers;
    ``load_entropy``: 1 is even; ``dead_experts``: how many got no token since the last log, all layers together;
    ``bias_min``, ``bias_max``; ``lm_loss``, ``mtp_loss``, ``balance_loss`` (with α) and ``indexer_loss``: as they are trained, means over
    labels; ``tokens_per_second``: without padding, all ranks together. Counts are as `LoadBalanceCallback` takes them.

    The loads themselves go to ``expert_load.jsonl`` in the output folder, one line a log:
    ``{"step": 10, "load": {"1": [tokens of expert 0, ...], ...}}``.

    Raises:
        ValueError: from a log, where the loss was NaN or infinite since the log before.
    """

    def __init__(self):
        self.epoch_load: dict[str, list[int]] = {}  # of the checkpoint that training resumes from
        self.run_load: dict[str, list[int]] = {}
        self._epoch: dict[int, torch.Tensor] = {}
        self._run: dict[int, torch.Tensor] = {}
        self._skips_epoch_begin = False
        self._start_window()

    def on_init_end(self, args, state, control, **kwargs):
        # `Trainer` puts the reporters that it makes itself before the callbacks it is given, and tells no callback
        # where they are kept: unless this one goes first, they report a log before the figures are in it.
        handler = inspect.currentframe().f_back.f_locals.get("self")
        if isinstance(handler, CallbackHandler):
            handler.callbacks.remove(self)
            handler.callbacks.insert(0, self)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        saved = state.stateful_callbacks.get(type(self).__name__) if state.global_step else None
        saved = saved["attributes"] if saved else {"epoch_load": self.epoch_load, "run_load": self.run_load}
        device = next(model.parameters()).device
        self._epoch, self._run = (
            {int(layer): torch.tensor(load, device=device) for layer, load in saved[name].items()}
            for name in ("epoch_load", "run_load")
        )
        # the first epoch that begins after a resume began before the checkpoint, unless that was at an epoch's end
        self._skips_epoch_begin = bool(self._epoch) and state.epoch is not None and state.epoch % 1 > 0
        state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        training = attach_state(model)
        training.take_loads()
        training.take_sums()
        if state.is_world_process_zero:
            _forget_after(Path(args.output_dir) / LOADS_FILE, state.global_step)
        self._start_window()

    def on_epoch_begin(self, args, state, control, **kwargs):
        if not self._skips_epoch_begin:
            self._epoch = {}
        self._skips_epoch_begin = False

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self._steps += 1
        for layer, load in step_loads(model, state.global_step).items():
            violation = max_violation(load)
            self._violations[layer] = self._violations[layer] + violation if layer in self._violations else violation
            for total in (self._window, self._epoch, self._run):
                total[layer] = total[layer] + load if layer in total else load

    def on_log(self, args, state, control, logs=None, model=None, **kwargs):
        if logs is None or "loss" not in logs or not self._steps:
            return
        figures = self._load_figures() | self._bias_figures(model)
        totals = _totals(attach_state(model).take_sums())
        figures |= _loss_figures(totals, time.monotonic() - self._begin)
        logs |= figures
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1] |= figures
        if state.is_world_process_zero and self._window:
            line = {"step": state.global_step, "load": _lists(self._window)}
            with open(Path(args.output_dir) / LOADS_FILE, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        steps = self._steps
        self._start_window()
        bad = [name for name in LOSSES if not math.isfinite(figures.get(name, 0.0))]
        if bad:
            raise ValueError(
                f"{bad[0]} is {figures[bad[0]]} in steps {state.global_step - steps + 1} to {state.global_step}: "
                "training cannot recover from it. A lower learning rate, gradient clipping (max_grad_norm) or bf16 "
                "in place of fp16 are what helps most often"
            )
        if totals.get("lm_loss_labels") == 0:
            logger.warning(
                f"no label in the last {steps} step(s) up to {state.global_step}: nothing was learned from them"
            )

    def on_train_end(self, args, state, control, model=None, **kwargs):
        for layer, load in sorted(self._run.items()):
            dead = (load == 0).nonzero().flatten().tolist()
            if dead:
                logger.warning(f"layer {layer}: {len(dead)} expert(s) got no token in the whole training: {dead}")
        detach_state(model)

    def state(self) -> dict:
        """What ``trainer_state.json`` keeps."""
        return {"args": {}, "attributes": {"epoch_load": _lists(self._epoch), "run_load": _lists(self._run)}}

    def _start_window(self) -> None:
        self._begin, self._steps = time.monotonic(), 0
        self._window: dict[int, torch.Tensor] = {}
        self._violations: dict[int, torch.Tensor] = {}

    def _load_figures(self) -> dict[str, float]:
        if not self._window:
            return {}
        violations = torch.stack(list(self._violations.values())) / self._steps
        window = list(self._window.values())
        return {
            "max_vio": violations.mean().item(),
            "max_vio_worst_layer": violations.max().item(),
            "max_vio_epoch": torch.stack([max_violation(load) for load in self._epoch.values()]).mean().item(),
            "load_entropy": torch.stack([load_entropy(load) for load in window]).mean().item(),
            "dead_experts": sum(int((load == 0).sum()) for load in window),
        }

    def _bias_figures(self, model) -> dict[str, float]:
        biases = [router.e_score_correction_bias for _, router in routers(model)]
        biases = [bias for bias in biases if bias is not None]
        if not biases:
            return {}
        return {
            "bias_min": min(bias.min().item() for bias in biases),
            "bias_max": max(bias.max().item() for bias in biases),
        }


def _totals(sums: dict[str, torch.Tensor]) -> dict[str, float]:
    """The sums over all ranks."""
    if not sums:
        return {}
    names = sorted(sums)
    values = torch.stack([sums[name].double() for name in names])
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(values)
    return dict(zip(names, values.tolist(), strict=True))


def _loss_figures(totals: dict[str, float], seconds: float) -> dict[str, float]:
    figures = {name: totals[name] / max(totals[f"{name}_labels"], 1) for name in LOSSES if name in totals}
    if "tokens" in totals:
        figures["tokens_per_second"] = totals["tokens"] / max(seconds, 1e-9)
    return figures


def _lists(loads: dict[int, torch.Tensor]) -> dict[str, list[int]]:
    return {str(layer): load.tolist() for layer, load in sorted(loads.items())}


def _forget_after(file: Path, step: int) -> None:
    """Drop what a training that is started again, from ``step``, had recorded after it."""
    if not file.exists():
        return
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if json.loads(line)["step"] <= step]
    write_file(file, "".join(line + "\n" for line in (lines if step else [])))
