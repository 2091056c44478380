"""Models with random weights on a card, and what `gpu_parts` measures of them: attention, decoding, training, a trace."""

import inspect
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from transformers import AutoModelForCausalLM, DeepseekV2ForCausalLM, initialization
from transformers import DeepseekV2Config as PlainConfig

import modeling_deepseek_moe as dsm
from modeling_deepseek_moe.formats import by_name
from modeling_deepseek_moe.moe.experts import DeepseekExperts
from modeling_deepseek_moe.ops.absorbed_attention import absorbed_attention
from modeling_deepseek_moe.quantized.experts import StackedQuantizedExperts
from modeling_deepseek_moe.quantized.linear import QuantizedLinear
from modeling_deepseek_moe.weights import release_tensors

V2_LITE = {
    **{"vocab_size": 102400, "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408},
    **{"num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16, "n_shared_experts": 2},
    **{"n_routed_experts": 64, "num_experts_per_tok": 6, "first_k_dense_replace": 1, "q_lora_rank": None},
    **{"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128},
    **{"routed_scaling_factor": 1.0, "topk_method": "greedy", "n_group": 1, "topk_group": 1, "norm_topk_prob": False},
    "max_position_embeddings": 163840,
}
# what transformers calls the cache in a forward, by release
CACHE = "cache" if "cache" in inspect.signature(DeepseekV2ForCausalLM.forward).parameters else "past_key_values"
LAYER_BYTES = 1.2e9  # of V2-Lite in bf16
NAN_CODE = 0x7F


@torch.no_grad()
def fill(module: nn.Module) -> None:
    """Random weights: codes of every value but NaN, and scales that make them as large as trained ones."""
    for name, tensor in module.named_parameters():
        if tensor.dtype == torch.float8_e8m0fnu:
            tensor.view(torch.uint8).random_(118, 122)
        elif tensor.dtype == torch.float8_e4m3fn:
            codes = tensor.view(torch.uint8).random_(0, 256)
            codes[codes & NAN_CODE == NAN_CODE] = 0
        elif tensor.dtype in (torch.uint8, torch.int32):
            tensor.view(torch.uint8).random_(0, 256)
        elif "scale" in name or "absmax" in name:
            tensor.uniform_(1e-4, 2e-4) if "_inv" in name else tensor.uniform_(3e-3, 6e-3)
        elif "norm" in name:
            tensor.fill_(1)
        else:
            tensor.normal_(0, 0.02)


def layers_for(device: torch.device) -> int:
    """V2-Lite's 27, or as many as the card holds in bf16 next to a cache."""
    if device.type != "cuda":
        return V2_LITE["num_hidden_layers"]
    return max(2, min(27, int(0.6 * torch.cuda.get_device_properties(device).total_memory / LAYER_BYTES)))


def build(device: torch.device, name: str, **changes) -> nn.Module:
    """This package's V2-Lite: ``"fp8"``, laid out as a release that is loaded onto a card, or ``"bf16"``."""
    config = dsm.DeepseekV2Config(**(V2_LITE | {"num_hidden_layers": layers_for(device)} | changes))
    with initialization.no_init_weights(), torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        if name == "fp8":
            row, specs = by_name("fp8"), release_tensors(config)
            for place, module in list(model.named_modules()):
                spec = specs.get(f"{place}.weight")
                if isinstance(module, nn.Linear) and spec is not None and spec.quantized:
                    model.set_submodule(
                        place, QuantizedLinear(module.in_features, module.out_features, module.bias is not None, row)
                    )
                elif isinstance(module, DeepseekExperts):
                    model.set_submodule(place, StackedQuantizedExperts(config, row))
    fill(model)
    return model.eval()


def build_plain(device: torch.device, **changes) -> nn.Module:
    """transformers' own model of the same dimensions, in bf16."""
    config = PlainConfig(**(V2_LITE | {"num_hidden_layers": layers_for(device)} | changes))
    with initialization.no_init_weights(), torch.device(device):
        model = DeepseekV2ForCausalLM._from_config(config, dtype=torch.bfloat16)
    fill(model)
    return model.eval()


def synchronized(device: torch.device) -> float:
    """The time, when the card has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.no_grad()
def tokens_per_second(model: nn.Module, batch: int, context: int, steps: int = 32) -> dict:
    """Of `generate` after a prompt: the difference of two lengths, so that the prompt's time drops out."""
    device = model.device
    prompt = torch.randint(0, model.config.vocab_size, (batch, context), device=device)
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}

    def seconds(count: int) -> float:
        start = synchronized(device)
        model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, **options)
        return synchronized(device) - start

    seconds(4)
    first, more = seconds(4), seconds(4 + steps)
    return {
        **{"batch": batch, "context": context, "prompt_tokens_per_s": batch * context / first},
        "tokens_per_s": batch * steps / (more - first),
        "ms_per_step": 1e3 * (more - first) / steps,
    }


def runs(build_model: Callable[[], nn.Module], cases: tuple[tuple[int, int], ...]) -> dict:
    model = build_model()
    rows = [tokens_per_second(model, *case) for case in cases]
    held = sum(tensor.nbytes for tensor in model.parameters())
    return {"layers": model.config.num_hidden_layers, "weights_GB": held / 1e9, "rows": rows}


CASES = ((1, 1024), (1, 8192), (8, 1024), (8, 8192), (64, 1024))


def end_to_end(device: torch.device) -> dict:
    """`generate` with V2-Lite's dimensions in FP8, then in bf16."""
    found = {}
    for name in ("fp8", "bf16"):
        found[name] = runs(lambda name=name: build(device, name), CASES)
        torch.cuda.empty_cache()
    return found


def plain_transformers(device: torch.device) -> dict:
    """The same dimensions in transformers' own model, in bf16."""
    return {"bf16": runs(lambda: build_plain(device), CASES[:3])}


CACHES = ((1, 1024), (1, 8192), (1, 32768), (8, 8192), (64, 1024), (64, 8192))  # batch, length


@torch.no_grad()
def attention(device: torch.device, caches: tuple[tuple[int, int], ...] = CACHES) -> dict:
    """GB/s of latents that one new token's attention takes, of V2-Lite's 16 heads and V3's 128."""
    from gpu_parts import seconds_of

    rows = []
    for heads in (16, 128):
        layer = nn.Linear(512, heads * 256, bias=False, dtype=torch.bfloat16, device=device)
        for batch, length in caches:
            q = torch.randn((batch, heads, 1, 192), dtype=torch.bfloat16, device=device).split((128, 64), -1)
            cache = torch.randn((batch, 1, length, 576), dtype=torch.bfloat16, device=device)
            latents = [part.contiguous() for part in cache.split((512, 64), -1)]
            seconds = seconds_of(
                lambda _, q=q, c=latents, w=layer: absorbed_attention(*q, *c, None, w, 192**-0.5), 10, 3
            )
            rows.append(
                {
                    "heads": heads,
                    "batch": batch,
                    "length": length,
                    "us": 1e6 * seconds,
                    "GBps": cache.nbytes / seconds / 1e9,
                }
            )
    return {"rows": rows}


def step_ms(model: nn.Module, batch: int, length: int, rounds: int = 4) -> float:
    """Forward and backward of one batch, gradients from nothing."""
    tokens, times = torch.randint(0, model.config.vocab_size, (batch, length), device=model.device), []
    model.train()
    for _ in range(rounds + 1):
        model.zero_grad(set_to_none=True)
        start = synchronized(model.device)
        model(input_ids=tokens, labels=tokens).loss.backward()
        times.append(synchronized(model.device) - start)
    return 1e3 * statistics.median(times[1:])


def training(device: torch.device, layers: int = 4, batch: int = 2, length: int = 2048) -> dict:
    """A training step in bf16: this package's model and transformers' own."""
    found = {"layers": layers, "tokens": batch * length}
    for name, make in (("ours", lambda: build(device, "bf16", num_hidden_layers=layers)),
                       ("plain transformers", lambda: build_plain(device, num_hidden_layers=layers))):  # fmt: skip
        found[f"{name}, ms"] = step_ms(make(), batch, length)
        torch.cuda.empty_cache()
    return found


@torch.no_grad()
def trace(device: torch.device, layers: int = 4) -> dict:
    """The kernels of one decoding step in FP8: how many, and the ones that take longest."""
    model = build(device, "fp8", num_hidden_layers=layers)
    out = model(torch.randint(0, model.config.vocab_size, (1, 1024), device=device), use_cache=True)
    token = torch.zeros((1, 1), dtype=torch.int64, device=device)
    for _ in range(3):
        model(token, **{CACHE: out[CACHE]}, use_cache=True)
    with torch.profiler.profile() as profile:
        model(token, **{CACHE: out[CACHE]}, use_cache=True)
        synchronized(device)
    on_card = [event for event in profile.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA]
    longest = sorted(on_card, key=lambda event: -event.self_device_time_total)[:25]
    return {
        "layers": layers,
        "kernels": sum(event.count for event in on_card),
        "us": sum(event.self_device_time_total for event in on_card),
        "longest": [{"name": e.key[:80], "count": e.count, "us": e.self_device_time_total} for e in longest],
    }
