"""One model loaded under one parallel plan after another; run as a program it is one rank of several.

``python plans_harness.py FOLDER``: reads ``cases.json`` there, ``{name: case}``, and writes ``NAME.RANK.pt`` for each: what
`observe` found, or the error. A case is ``{"release": folder, "load": arguments of `from_pretrained`, ...}``.
"""

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

import peft
import torch
from torch import distributed
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, FineGrainedFP8Config, TrainerState, set_seed
from transformers.distributed import DistributedConfig

import modeling_deepseek_moe as dsm
from modeling_deepseek_moe import __version__, quantizer
from modeling_deepseek_moe.distributed import plans
from modeling_deepseek_moe.ops.experts import may_run_natively, operands
from modeling_deepseek_moe.quantized.mapped import MappedExperts
from modeling_deepseek_moe.training.attach import step_loads

ROOT = Path(__file__).resolve().parents[1]
GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
DIVIDED = ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
LATENTS = {
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "q_lora_rank": 1536,
}
DIMS = {  # of attention, as the releases' config.json have them
    "DeepSeek-V3": LATENTS | {"model_type": "deepseek_v3", "hidden_size": 7168, "num_attention_heads": 128},
    "DeepSeek-V2": LATENTS | {"model_type": "deepseek_v2", "hidden_size": 5120, "num_attention_heads": 128},
}
IDS = (torch.arange(2 * 9).view(2, 9) * 7) % 120 + 3


def full(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def local_bytes(model, part: str) -> int:
    """Of the parameters whose names have ``part`` in them, on this rank."""
    found = (p for name, p in model.named_parameters() if part in name)
    return sum((p.to_local() if isinstance(p, DTensor) else p).nbytes for p in found)


def divided_bytes(model) -> int:
    """Of attention's projections that tensor parallelism divides, on this rank."""
    return sum(local_bytes(model, f".self_attn.{name}.") for name in DIVIDED)


def anonymous_bytes() -> int:
    """Memory of this process that no file backs."""
    return int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def engine_runs(module) -> bool:
    """Whether the CPU engine computes a layer of experts."""
    hidden, weights = torch.zeros(1, module.empty_stacks().matrices(0)["gate_proj"].codes.shape[1]), torch.ones(1, 2)
    return may_run_natively(module, operands(module), hidden, weights)


def observe(
    model,
    folder: Path,
    *,
    grads=False,
    balance=False,
    static=True,
    save=False,
    mtp=False,
    generate=True,
    mla_path=None,
    memory=None,
    drafts=None,
    drafted=True,
) -> dict:
    """Logits, gradients by name, loads, greedy tokens and bytes of a model; the same calls for one process and for several."""
    found = {"attention": local_bytes(model, ".self_attn."), "divided": divided_bytes(model)}
    found["mapped"] = [(m.first, m.num_experts) for m in model.modules() if isinstance(m, MappedExperts)]
    found["engine"] = all(engine_runs(m) for m in model.modules() if isinstance(m, MappedExperts))
    if drafts is not None:
        model.generate(IDS[:1], use_mtp=drafts, **GREEDY)
    if memory:
        model.set_expert_memory(memory)
    with torch.no_grad():
        found["logits"] = model(IDS).logits
        if mtp:
            hidden = model.model(IDS).last_hidden_state
            found["mtp"] = model.mtp_logits(0, IDS, hidden)[0]
    mask = torch.ones_like(IDS)
    if generate:
        found["greedy"] = model.generate(IDS, attention_mask=mask, **GREEDY)
    if generate and static:
        if mtp and drafted:
            found["drafted"] = model.generate(IDS[:1], attention_mask=mask[:1], use_mtp=True, **GREEDY)
        found["static"] = model.generate(IDS, attention_mask=mask, cache_implementation="static", **GREEDY)
    if grads:
        model.train()
        kwargs = {} if mla_path is None else {"mla_path": mla_path}
        model(IDS, labels=IDS, **kwargs).loss.backward()
        found["grads"] = {n: full(p.grad) for n, p in model.named_parameters() if p.grad is not None}
    if balance:
        found |= balanced(model)
    if save:
        model.save_pretrained(folder)
        if distributed.is_initialized():
            distributed.barrier()
    return found


def balanced(model) -> dict:
    """Tokens that each expert got in a step, by layer, and the biases after it."""
    callback, state = dsm.LoadBalanceCallback(0.01), TrainerState(max_steps=1)
    callback.on_train_begin(None, state, None, model=model)
    model.train()
    model(IDS)
    loads = {layer: counts.tolist() for layer, counts in step_loads(model, 0).items()}
    callback.on_pre_optimizer_step(None, state, None, model=model)
    callback.on_train_end(None, state, None, model=model)
    return {"loads": loads, "biases": callback.state()["attributes"]["biases"]}


def load(case: dict, rank: int):
    settings = dict(case.get("load", {})) | {"dtype": getattr(torch, case.get("dtype", "float32"))}
    if "plan" in case:
        settings["distributed_config"] = DistributedConfig(**case["plan"])
    if case.get("dequantize"):
        settings["quantization_config"] = FineGrainedFP8Config(dequantize=True)
    if case.get("nf4"):
        settings["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    release = case["release"][rank] if isinstance(case["release"], list) else case["release"]
    # experts as they would be on a card, in tensors of their own
    place = patch.object(quantizer, "_stays_on_cpu", lambda _: not case.get("stacked"))
    version = case.get("versions", {rank: __version__})[rank]
    with place, patch.object(plans, "__version__", version):
        model = AutoModelForCausalLM.from_pretrained(release, **settings).eval()
    if "plan" in case:  # another model can be loaded by the same object
        assert settings["distributed_config"].to_dict() == DistributedConfig(**case["plan"]).to_dict()
    if "load_adapter" in case:
        model.load_adapter(case["load_adapter"])
    if "adapted" in case:
        return peft.PeftModel.from_pretrained(model, case["adapted"], is_trainable=True)
    return adapted(model, **case["adapter"]) if "adapter" in case else model


def adapted(model, kind="LoraConfig", **settings):
    """With an adapter of random numbers."""
    set_seed(0)
    return peft.get_peft_model(model, getattr(peft, kind)(r=2, **settings))


def attention_of(release: str, plan: dict | None = None) -> int:
    """Bytes of attention in one layer of a release's dimensions, on this rank. On meta."""
    settings = DIMS[release] | {"num_hidden_layers": 1, "first_k_dense_replace": 1, "num_nextn_predict_layers": 0}
    config = {"deepseek_v2": dsm.DeepseekV2Config, "deepseek_v3": dsm.DeepseekV3Config}[settings.pop("model_type")]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config(**settings), dtype=torch.bfloat16)
    if plan is not None:
        asked, _, mesh = model.prepare_distribute_model(DistributedConfig(**plan))
        model = model.maybe_distribute_model(model, asked, mesh)
    return local_bytes(model, ".self_attn.")


def run_rank(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    distributed.init_process_group("gloo")
    for name, case in json.loads((folder / "cases.json").read_text()).items():
        start, said = time.monotonic(), {}
        try:
            if "dims" in case:
                torch.save({"attention": attention_of(case["dims"], case["plan"])}, folder / f"{name}.{rank}.pt")
                continue
            before = anonymous_bytes()
            model = load(case, rank)
            said["resident"] = anonymous_bytes() - before
            said["kinds"] = sorted({type(m).__name__ for m in model.modules()})
            said |= observe(model, folder / name, **case.get("observe", {}))
        except Exception as error:  # a test says which one it wants
            said |= {"error": f"{type(error).__name__}: {error}"}
            if os.environ.get("PLANS_TRACE"):
                raise
        said["seconds"] = time.monotonic() - start
        torch.save(said, folder / f"{name}.{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def run_ranks(folder: Path, ranks: int, cases: dict[str, dict], timeout: float = 300) -> dict[str, list[dict]]:
    """Run the cases on a number of processes; what each rank found, by case."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cases.json").write_text(json.dumps(cases))
    shared = {
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
    }
    started = []
    for rank in range(ranks):
        env = os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        with (folder / f"log.{rank}").open("w") as log:
            started.append(
                subprocess.Popen(
                    [sys.executable, __file__, str(folder)], env=env, stdout=log, stderr=subprocess.STDOUT
                )
            )
    try:
        deadline = time.monotonic() + timeout
        codes = [process.wait(max(1, deadline - time.monotonic())) for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    logs = "\n".join((folder / f"log.{rank}").read_text()[-3000:] for rank in range(ranks))
    assert codes == [0] * ranks, logs
    return {name: [torch.load(folder / f"{name}.{rank}.pt") for rank in range(ranks)] for name in cases}


if __name__ == "__main__":
    run_rank(Path(sys.argv[1]))
