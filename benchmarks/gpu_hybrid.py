"""`gpu.py`'s part of a GPU that is smaller than the model: tokens per second by the share of experts in its memory, and as predicted."""

import torch
from gpu_models import build, synchronized, tokens_per_second
from torch import nn

from modeling_deepseek_moe.anatomy import parameter_breakdown
from modeling_deepseek_moe.hybrid.costs import measure_rates
from modeling_deepseek_moe.hybrid.layer import HybridMoE
from modeling_deepseek_moe.hybrid.places import ExpertPlaces
from modeling_deepseek_moe.hybrid.prediction import Given, Split, predict
from modeling_deepseek_moe.hybrid.slots import expert_bytes
from modeling_deepseek_moe.moe.layer import DeepseekMoE

SHARES = (0.0, 0.1, 0.5, 1.0)
LAYERS = 9  # of V2-Lite, so that random codes are made in seconds


def hybrid_model(device: torch.device, **changes) -> nn.Module:
    """V2-Lite in FP8 with its experts in main memory and all else on a device, as ``device_map="auto"`` leaves them."""
    model = build(torch.device("cpu"), "fp8", **changes)
    layers = [layer for layer in model.model.layers if isinstance(layer.mlp, DeepseekMoE)]
    experts = {layer.mlp.layer_idx: layer.mlp.experts for layer in layers}
    places = ExpertPlaces(device, experts, model.config.num_experts_per_tok)
    for layer in layers:
        layer.mlp = HybridMoE.of(layer.mlp, places)
    return model.to(device)


def read_bandwidth(device: torch.device, size: int = 1 << 30) -> float:
    """Bytes per second of a sum, the fastest of five."""
    data, times = torch.zeros(size // 8, dtype=torch.int64, device=device), []
    for _ in range(5):
        start = synchronized(device)
        data.sum()
        times.append(synchronized(device) - start)
    return size / min(times)


def predicted(config, context: int, share: float, cpu: float, gpu: float, link: float) -> Split:
    """What `plan` says of a share, by bandwidths that were measured."""
    breakdown = parameter_breakdown(config)
    none = predict(breakdown, config, context, Given(1 << 60, cpu, gpu, link))[0]
    room = none.gpu_bytes + int(none.cpu_bytes * share) + 1
    return predict(breakdown, config, context, Given(room, cpu, gpu, link))[-1]


def hybrid(device: torch.device, context: int = 256, steps: int = 24, layers: int = LAYERS, **changes) -> dict:
    """A row for each share: measured, predicted, and how far the first is from the second."""
    model, rates, gpu = (
        hybrid_model(device, num_hidden_layers=layers, **changes),
        measure_rates(device),
        read_bandwidth(device),
    )
    first = next(layer.mlp.experts for layer in model.model.layers if isinstance(layer.mlp, DeepseekMoE))
    count = first.num_experts * sum(isinstance(layer.mlp, DeepseekMoE) for layer in model.model.layers)
    rows = []
    for share in SHARES:
        model.set_expert_memory(gpu=round(share * count) * expert_bytes(first) if share else None, compute="cpu")
        row = tokens_per_second(model, 1, context, steps)
        wanted = predicted(model.config, context, share, rates.cpu_bytes, gpu, rates.link_bytes).tokens_per_second
        rows.append(
            {
                "held_share": share,
                **row,
                "predicted_tokens_per_s": wanted,
                "of_predicted": row["tokens_per_s"] / wanted,
            }
        )
    bandwidths = {"cpu_GBps": rates.cpu_bytes / 1e9, "gpu_GBps": gpu / 1e9, "link_GBps": rates.link_bytes / 1e9}
    return {"layers": layers, **bandwidths, "rows": rows}
