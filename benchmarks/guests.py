"""What decoding costs with a guest in the model: LoRA on one projection, bitsandbytes' 4-bit layers, torch.compile.

    python benchmarks/guests.py                  everything: about five minutes on two cores, 16 GB of memory
    python benchmarks/guests.py --only experts   one part; the others stay as they are in the result file

Parts, each with contestants in turns on the same weights (the model of `cpu.py`'s e2e, one token after the other from 128
cached ones on):
    lora     FP8 and bf16, plain and with LoRA (rank 8) on ``o_proj``: what the adapter leaves of the speed
    experts  FP8 and bf16, plain and with LoRA (rank 16) on all routed experts; and plain transformers with peft on the same; of
             a dense layer and one of experts in V2-Lite's dims with a small vocabulary, which takes 5 GB of memory: what a token
             takes, the largest tensor that an operation makes for it, and how much more memory the process holds meanwhile
    layers   FP8, plain and with LoRA (rank 16) on the layers of attention, and on all linear layers and routed experts: one token, one of
             each of 16 sequences, a prompt of 512
    bnb      NF4 linear layers, here and in plain transformers; experts are bf16 in both
    compile  a compiled step on a static cache, FP8, compared with the eager one on a growing cache
"""

import argparse
import gc
import json
import os
import tempfile
from functools import partial
from pathlib import Path

import common
import torch
import transformers
from cpu_e2e import CONFIG, build_plain, write_model
from decode import filled_caches
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, DynamicCache, FineGrainedFP8Config, StaticCache

from modeling_deepseek_moe.compat import CACHE_NAME

CONTEXT, TOKENS = 128, 6
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ATTENTION = ["q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
MLP = ("gate_proj", "up_proj", "down_proj")


# a layer of experts, and little in the denominator besides
ONE_LAYER = CONFIG | {"num_hidden_layers": 2, "vocab_size": 8192}
STATUS, REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def load(folder: Path, **settings) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **settings).eval()


def with_lora(model: torch.nn.Module) -> torch.nn.Module:
    import peft

    config = peft.LoraConfig(r=8, target_modules=["o_proj"], init_lora_weights=False)
    return peft.get_peft_model(model, config).to(torch.bfloat16).eval()


def with_experts(model: torch.nn.Module) -> torch.nn.Module:
    import peft

    config = peft.LoraConfig(r=16, target_modules=[], target_parameters=EXPERTS, init_lora_weights=False)
    return peft.get_peft_model(model, config).eval()


def tokens_of(model, cache, adapter: bool | None = None) -> None:
    """Some tokens, one after the other; with the model's adapter turned on or off first, if that is told."""
    if adapter is not None:
        (model.enable_adapter_layers if adapter else model.disable_adapter_layers)()
    for _ in range(TOKENS):
        model(torch.randint(0, model.config.vocab_size, (1, 1)), **{CACHE_NAME: cache}, logits_to_keep=1)


class Largest(TorchDispatchMode):
    """The most bytes of a tensor that any operation of torch made."""

    nbytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and not tensor._is_view():
                self.nbytes = max(self.nbytes, tensor.nbytes)
        return out


def held(field: str) -> int:
    """Bytes of this process: ``VmRSS`` now, ``VmHWM`` at most since `REFS` was written to."""
    [line] = [line for line in STATUS.read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1]) * 1024


def trace(model: torch.nn.Module) -> dict[str, int]:
    """Of one token: its largest tensor, and the memory above what was held before, which the engine's own is part of."""
    cache, token = filled_caches(model.config, CONTEXT)[0], torch.tensor([[7]])
    call = partial(model, token, **{CACHE_NAME: cache}, logits_to_keep=1)
    call()  # its experts are in memory
    with Largest() as largest:
        call()
    gc.collect()
    REFS.write_text("5")
    before = held("VmRSS")
    call()
    return {"largest_tensor_bytes": largest.nbytes, "peak_bytes_above": held("VmHWM") - before}


def race(models: dict[str, torch.nn.Module], rounds: int) -> dict[str, common.Timing]:
    contestants = {
        name: partial(tokens_of, model, filled_caches(model.config, CONTEXT)[0]) for name, model in models.items()
    }
    return common.interleave(contestants, rounds, warm_up=2)


def rows(times: dict[str, common.Timing], pairs: dict[str, str]) -> list[dict]:
    """Tokens/s, and the ratio to the contestant that each name is paired with."""
    found = []
    for name, timing in times.items():
        fields = {"contestant": name, "tokens_s": TOKENS / timing.median, **timing.fields()}
        if name in pairs:
            fields |= {"compared_with": pairs[name], "ratio": times[pairs[name]].median / timing.median}
        found.append(fields)
    return found


def lora(folder: Path, options: argparse.Namespace) -> list[dict]:
    dequantize = FineGrainedFP8Config(dequantize=True)
    models = {
        "FP8": load(folder),
        "FP8, LoRA on o_proj": with_lora(load(folder)),
        "bf16": load(folder, quantization_config=dequantize),
        "bf16, LoRA on o_proj": with_lora(load(folder, quantization_config=dequantize)),
    }
    times = race(models, options.rounds)
    return rows(times, {"FP8, LoRA on o_proj": "FP8", "bf16, LoRA on o_proj": "bf16"})


def lora_on_experts(folder: Path, options: argparse.Namespace) -> list[dict]:
    dequantize, found = FineGrainedFP8Config(dequantize=True), []
    for kind, load_one in (
        ("FP8", load),
        ("bf16", partial(load, quantization_config=dequantize)),
        ("plain transformers, bf16", partial(build_plain, config=ONE_LAYER)),
    ):
        name, is_plain = f"{kind}, LoRA on experts", kind.startswith("plain")
        adapted = with_experts(load_one(folder))
        if is_plain:  # one model with its adapter on and off: two, and a dense difference of all experts, are too much
            calls = {kind: (adapted, False), name: (adapted, True)}
        else:
            calls = {kind: (load_one(folder), None), name: (adapted, None)}
        contestants = {
            one: partial(tokens_of, model, filled_caches(model.config, CONTEXT)[0], adapter)
            for one, (model, adapter) in calls.items()
        }
        times = common.interleave(contestants, min(options.rounds, 2) if is_plain else options.rounds, warm_up=1)
        found += rows(times, {name: kind})
        found[-1] |= trace(adapted) | {
            "expert_bytes": 3 * 2 * ONE_LAYER["hidden_size"] * ONE_LAYER["moe_intermediate_size"]
        }
        del adapted, calls, contestants
        gc.collect()
    return found


def with_layers(model: torch.nn.Module, experts: bool) -> torch.nn.Module:
    import peft

    targets = [*ATTENTION, *(f"{mlp}.{name}" for mlp in ("shared_experts", "layers.0.mlp") for name in MLP if experts)]
    config = peft.LoraConfig(
        r=16, target_modules=targets, target_parameters=EXPERTS if experts else None, init_lora_weights=False
    )
    return peft.get_peft_model(model, config).eval()


def lora_on_layers(folder: Path, options: argparse.Namespace) -> list[dict]:
    models = {"FP8": load(folder)}
    models |= {f"FP8, LoRA on {what}": with_layers(load(folder), what == "all") for what in ("attention", "all")}
    found = []
    for case, (sequences, tokens) in {"a token": (1, 1), "16 sequences": (16, 1), "a prompt": (1, 512)}.items():
        contestants = {name: call_of(model, sequences, tokens) for name, model in models.items()}
        times = common.interleave(contestants, options.rounds, warm_up=2)
        for row in rows(times, dict.fromkeys(list(models)[1:], "FP8")):
            row["tokens_s"] *= sequences * (tokens if tokens > 1 else TOKENS) / TOKENS
            found.append(row | {"contestant": f"{case}: {row['contestant']}"})
    return found


def call_of(model: torch.nn.Module, sequences: int, tokens: int):
    """A prompt of ``tokens``; where that is one, as many as `tokens_of` takes, one after the other, of each sequence."""

    def ids(length: int) -> torch.Tensor:
        return torch.randint(0, model.config.vocab_size, (sequences, length))

    cache = DynamicCache(config=model.config)
    if tokens == 1:
        model(ids(CONTEXT), **{CACHE_NAME: cache}, logits_to_keep=1)

    def call() -> None:
        for _ in range(TOKENS if tokens == 1 else 1):
            own = cache if tokens == 1 else DynamicCache(config=model.config)
            model(ids(tokens), **{CACHE_NAME: own}, logits_to_keep=1)

    return call


def bnb(folder: Path, options: argparse.Namespace) -> list[dict]:
    source = folder.parent / "bf16"
    if not source.exists():
        load(folder, quantization_config=FineGrainedFP8Config(dequantize=True)).save_pretrained(source)
    four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    settings = {"dtype": torch.bfloat16, "quantization_config": four_bit}
    models = {
        "NF4, this package": AutoModelForCausalLM.from_pretrained(source, **settings).eval(),
        "NF4, plain": transformers.DeepseekV3ForCausalLM.from_pretrained(source, **settings).eval(),
    }
    found = rows(race(models, options.rounds), {"NF4, this package": "NF4, plain"})
    for row, model in zip(found, models.values(), strict=True):
        row["four_bit_layers"] = sum(type(module).__name__ == "Linear4bit" for module in model.modules())
        row["bytes"] = model.get_memory_footprint()
    return found


def compiled_step(folder: Path, options: argparse.Namespace) -> list[dict]:
    model = load(folder)
    call = torch.compile(model, fullgraph=True)
    cache = StaticCache(config=model.config, max_cache_len=CONTEXT + 32)
    model(torch.randint(0, CONFIG["vocab_size"], (1, CONTEXT)), **{CACHE_NAME: cache}, logits_to_keep=1)

    def compiled() -> None:
        for step in range(TOKENS):
            position = torch.tensor([[CONTEXT + step]])
            token = torch.randint(0, CONFIG["vocab_size"], (1, 1))
            call(token, position_ids=position, **{CACHE_NAME: cache}, logits_to_keep=1)
        for layer in cache.layers:  # take the tokens out again
            layer.cumulative_length.sub_(TOKENS)

    eager = partial(tokens_of, model, filled_caches(model.config, CONTEXT)[0])
    times = common.interleave({"compiled, static cache": compiled, "eager, growing cache": eager}, options.rounds, 2)
    return rows(times, {"compiled, static cache": "eager, growing cache"})


PARTS = {"lora": lora, "experts": lora_on_experts, "layers": lora_on_layers, "bnb": bnb, "compile": compiled_step}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", choices=PARTS, action="append", help="this part (may be given again)")
    parser.add_argument("--out", type=Path, default=common.RESULTS / "guests.json")
    parser.add_argument("--model-folder", type=Path, help="where models are written, or found (default: temporary)")
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    result = json.loads(options.out.read_text()) if options.only and options.out.exists() else {}
    with tempfile.TemporaryDirectory() as temporary:
        parent = options.model_folder or Path(temporary)
        for part in options.only or PARTS:
            folder = parent / ("one-layer" if part == "experts" else "model")
            write_model(folder, ONE_LAYER if part == "experts" else CONFIG)
            with torch.inference_mode(part != "bnb"), torch.no_grad():
                found = PARTS[part](folder, options)
            result[part] = {"machine": common.machine(), "rows": found}
            for row in found:
                ratio = f"  {row['ratio']:.3f} of {row['compared_with']}" if "ratio" in row else ""
                if "peak_bytes_above" in row:
                    parts = ("largest_tensor_bytes", "peak_bytes_above", "expert_bytes")
                    ratio += "".join(f"  {field} {row[field]:,}" for field in parts)
                extra = f"  {row['four_bit_layers']} layers, {row['bytes']:,} bytes" if "bytes" in row else ""
                print(f"{part:8} {row['contestant']:30} {row['tokens_s']:7.2f} tokens/s{ratio}{extra}", flush=True)
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(result, indent=2) + "\n")
    print("written to", options.out)


if __name__ == "__main__":
    main()
