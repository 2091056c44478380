"""What steps of whole models launch and wait for on a card: run as a program, with the guard loaded before torch is.

Models have V2-Lite's or V3's dimensions, one dense layer and one or two of experts: the difference is a layer of experts.
"""

import json
import sys
from collections import Counter
from contextlib import nullcontext
from unittest import mock

import peft
import torch
from gpu.fake import DEVICE, Watch, card, equal_slots, fake_mode, fake_model, no_kernels, on_other_devices
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch._dynamo.backends.common import aot_autograd
from transformers import DynamicCache, QuantizedCache, StaticCache
from transformers.generation import ContinuousBatchingConfig
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.distributed import DistributedHelper

from modeling_deepseek_moe import (
    DeepseekV2Config,
    DeepseekV3Config,
    Fp8StaticCache,
    Fp8TrainingConfig,
    prepare_fp8_training,
)
from modeling_deepseek_moe.compat import CACHE_NAME
from modeling_deepseek_moe.paged import PagedModel
from modeling_deepseek_moe.training.attach import attach_state

MLA = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
LITE = {
    "vocab_size": 102400,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_attention_heads": 16,
    "n_routed_experts": 64,
    "num_experts_per_tok": 6,
    "q_lora_rank": None,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
}
V3 = {"first_k_dense_replace": 1, "num_nextn_predict_layers": 0}
SMALL = LITE | {"hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 128, "n_routed_experts": 8}
CONFIGS = {"lite": (DeepseekV2Config, LITE), "small": (DeepseekV2Config, SMALL), "v3": (DeepseekV3Config, V3)}
PROMPT = 2  # tokens that are cached before one is decoded


CACHES = {
    "growing": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config=config, max_cache_len=64),
    "growing FP8": lambda config: QuantizedCache("fp8", config),
    "static FP8": lambda config: Fp8StaticCache(config=config, max_cache_len=64),
}


def config_of(shape: str, layers: int):
    kind, fields = CONFIGS[shape]
    return kind(**fields, **MLA, num_hidden_layers=layers)


def decode(model, watch: Watch, cache_class: str, rows: int = 1) -> None:
    """One token of each row after a prompt, as `generate` asks for it."""
    cache = CACHES[cache_class](model.config)
    with torch.no_grad():
        prefill(model, Watch(), cache, rows)
        ids = torch.zeros(rows, 1, dtype=torch.long, device=DEVICE)
        mask = torch.ones(rows, PROMPT + 1, dtype=torch.long, device=DEVICE)
        positions = torch.full((rows, 1), PROMPT, device=DEVICE)
        with watch:
            call(model, ids, cache, attention_mask=mask, position_ids=positions)


def decode_paged(model, watch: Watch, rows: int = 8) -> None:
    """One token of each of several requests whose latents are in pages, as the manager of `generate_batch` asks for it."""
    paged = PagedModel(model)
    sizes = {"page_size": 16, "num_blocks": 32, "max_batch_tokens": 64, "max_requests_per_batch": rows}
    settings = ContinuousBatchingConfig(**sizes, max_blocks_per_request=0, max_memory_percent=1.0)
    pages = PagedAttentionCache(paged.config, settings, DEVICE, DistributedHelper(None, None), torch.bfloat16)
    (kind,) = pages.cache_allocators

    def numbers(size: int, dtype=torch.int32) -> torch.Tensor:
        return torch.zeros(size, dtype=dtype, device=DEVICE)

    places = {"read_index": [numbers(rows * 20, torch.int64)], "write_index": [numbers(rows, torch.int64)]}
    lengths = {"cu_seq_lens_q": numbers(rows + 1), "cu_seq_lens_k": {kind: numbers(rows + 1)}}
    lengths |= {"max_length_q": 1, "max_length_k": {kind: 33}}
    ids = numbers(rows, torch.int64)
    with torch.no_grad(), watch:
        paged(ids[None], ids[None], pages, ids, **places, **lengths)


def prefill(model, watch: Watch, cache=None, rows: int = 1) -> None:
    ids = torch.zeros(rows, 16 if cache is None else PROMPT, dtype=torch.long, device=DEVICE)
    cache = DynamicCache(config=model.config) if cache is None else cache
    with torch.no_grad(), watch:
        call(model, ids, cache, attention_mask=torch.ones_like(ids))


def call(model, ids, cache, **kwargs):
    return model(ids, **{CACHE_NAME: cache}, use_cache=True, logits_to_keep=1, **kwargs)


def train(model, watch: Watch) -> None:
    """Forward and backward of a micro-batch."""
    model.train()
    ids = torch.zeros(2, 16, dtype=torch.long, device=DEVICE)
    with watch:
        loss = model(ids, labels=ids, attention_mask=torch.ones_like(ids)).loss
        loss.backward()


def train_fp8(model, watch: Watch) -> None:
    """As `train`, with products in FP8."""
    train(prepare_fp8_training(model), watch)


def train_fp8_bf16_wgrad(model, watch: Watch) -> None:
    train(prepare_fp8_training(model, Fp8TrainingConfig(fp8_wgrad=False)), watch)


def train_balanced(model, watch: Watch) -> None:
    """As `train`, with the router's loads counted and a balance loss."""
    attach_state(model).balance_alpha = 1e-4
    train(model, watch)


def train_adapted(model, watch: Watch) -> None:
    """As `train`, of adapters on the attention's output and the routed experts alone."""
    stacks = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = peft.LoraConfig(r=16, target_modules=["o_proj"], target_parameters=stacks)
    # fake parameters cannot be moved: adapters are made where they belong
    stay = [mock.patch.object(kind, MOVE, lambda *_, **__: None) for kind in (BaseTunerLayer, ParamWrapper)]
    with DEVICE, stay[0], stay[1], mock.patch.object(torch.nn.Module, "to", lambda module, *_, **__: module):
        adapted = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    train(adapted, watch)


STEPS = {
    "decode": lambda model, watch: decode(model, watch, "growing"),
    "decode-rows": lambda model, watch: decode(model, watch, "growing", rows=8),
    "decode-static": lambda model, watch: decode(model, watch, "static"),
    "decode-codes": lambda model, watch: decode(model, watch, "growing FP8"),
    "decode-static-codes": lambda model, watch: decode(model, watch, "static FP8"),
    "decode-paged": decode_paged,
    "prefill": prefill,
    "train": train,
    "train-balanced": train_balanced,
    "train-fp8": train_fp8,
    "train-fp8-bf16-wgrad": train_fp8_bf16_wgrad,
    "train-adapted": train_adapted,
}
MOVE = "_move_adapter_to_device_of_base_layer"  # peft's
# SM90 tries out torch's own product of codes, which takes a card
CARDS = {"train-fp8": (8, 9), "train-fp8-bf16-wgrad": (8, 9)}
WAITS = ("train-fp8", "train-adapted")  # steps that look at the routing on the host, once a layer, without Triton


def measure(name: str) -> dict:
    """Of a step named ``shape/weights/step``, with ``/triton`` if that is there: launches of a layer of experts and of the rest, and what waits."""
    shape, weights, step, *triton = name.split("/")
    watches = []
    for layers in (2, 3):
        with fake_mode(), card(*CARDS.get(step, (9, 0)), triton=bool(triton)):
            model = fake_model(config_of(shape, layers), weights)
            elsewhere = on_other_devices(model)
            watch = Watch()
            watches.append(watch)
            try:
                with no_kernels(watch), equal_slots() if step in WAITS and not triton else nullcontext():
                    STEPS[step](model, watch)
            except Exception as error:
                return {"error": f"{type(error).__name__}: {error}", **watch.told(), "elsewhere": elsewhere}
    short, long = watches
    return {
        "error": None,
        "elsewhere": elsewhere,
        "layer": long.count - short.count,
        "rest": 2 * short.count - long.count,
        "kernels": dict(long.kernels - short.kernels),
        **long.told(),
    }


def compiled(name: str) -> dict:
    """Of a decoding step with a static cache, named as for `measure`, in one graph for torch.compile.

    ``graphs``: how many there are. ``unknown``: what has a shape that no one knows before the step. ``operators``: this package's.
    """
    shape, weights, step, *triton = name.split("/")
    graphs: list = []
    torch._dynamo.reset()  # else sizes that differ from those of another step before would be unknown

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    with fake_mode(), card(9, 0, triton=bool(triton)), torch.no_grad():
        model = fake_model(config_of(shape, 2), weights)
        cache = CACHES["static FP8" if step.endswith("codes") else "static"](model.config)
        prefill(model, Watch(), cache)
        ids = torch.zeros(1, 1, dtype=torch.long, device=DEVICE)
        given = {"attention_mask": torch.ones(1, 64, dtype=torch.long, device=DEVICE)}
        given |= {"position_ids": torch.full((1, 1), PROMPT, device=DEVICE)}
        step = torch.compile(model.forward, fullgraph=True, backend=aot_autograd(fw_compiler=keep))
        try:
            call(step, ids, cache, **given)
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"[:2000]}
    nodes = [node for graph in graphs for node in graph.graph.nodes]
    shapes = {str(node): node.meta["val"].shape for node in nodes if hasattr(node.meta.get("val"), "shape")}
    own = Counter(str(node.target).split(".")[1] for node in nodes if str(node.target).startswith("deepseek_moe."))
    return {
        "error": None,
        "graphs": len(graphs),
        "unknown": [node for node, shape in shapes.items() if not all(type(size) is int for size in shape)],
        "reads": [
            str(node) for node in nodes if "_local_scalar_dense" in str(node.target) or "nonzero" in str(node.target)
        ],
        "operators": dict(own),
    }


def main() -> None:
    what, *names = sys.argv[1:]
    json.dump({name: {"measure": measure, "compile": compiled}[what](name) for name in names}, sys.stdout)


if __name__ == "__main__":
    main()
