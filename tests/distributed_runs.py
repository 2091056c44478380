"""What the tests of several processes have each of them do; run as a program it is one rank, which does all cases in a row.

``python distributed_runs.py FOLDER CASES`` with ``[[name, case, settings], ...]`` as JSON.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import accelerate
import accelerate.utils
import torch
from safetensors.torch import save_file
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from training_harness import Padded, Record, arguments
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainerCallback, set_seed
from transformers.distributed import DistributedConfig

import modeling_deepseek_moe as dsm
from modeling_deepseek_moe.distributed.agreement import check_ranks, on_all_ranks

STEPS, ROWS = 6, 8  # of a step, whatever the number of processes


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def train(folder, release, *, parts=None, resume=None, fp8=None, lora=None, targets=None, kill=None, **settings):
    """Train with the whole recipe; ``{"biases", "loads", "logs"}``, one entry a step.

    Args:
        parts: of `DistributedConfig`; nothing: DDP, or one process.
        fp8: ``fp8_wgrad``, to train in FP8. The gradients of the first step are left in ``folder/gradients.safetensors``.
        lora: what an adapter is trained on: ``"plain"`` weights, ``"fp8"`` or ``"int4"`` ones that are mapped, or ``"nf4"``. It is
            left in ``folder/adapter``, and its gradients as those of ``fp8``.
        targets: of the adapter, as `with_lora` takes them.
        kill: a rank and the step in which it kills itself.
    """
    set_seed(0)
    ranks = world_size()
    how = {"distributed_config": DistributedConfig(**parts)} if parts else {}
    if lora == "nf4":
        how["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(release, dtype=torch.float32, **how)
    if fp8 is not None:
        dsm.prepare_fp8_training(model, dsm.Fp8TrainingConfig(fp8))
    record = Record()
    callbacks = [dsm.BalanceLossCallback(1e-3), dsm.MoeTelemetryCallback(), record]
    if lora:
        model = with_lora(model, **(targets or {}))
    else:
        callbacks.append(dsm.MtpLossCallback())
    if lora or fp8 is not None:
        callbacks.append(Gradients(Path(folder) / "gradients.safetensors"))
    callbacks.append(dsm.LoadBalanceCallback(0.01))
    if parts or resume or settings.get("save_only_model"):
        settings["save_only_model"] = True
        callbacks.append(dsm.ShardedTrainingCallback(resume))
    if kill and kill[0] == int(os.environ["RANK"]):
        callbacks.append(Killed(kill[1]))
    settings |= {"ddp_backend": "gloo"} if ranks > 1 else {}
    batch = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": ROWS // 2 // ranks}
    training = arguments(folder, **(batch | {"max_steps": STEPS} | settings))
    trainer = Trainer(model, training, train_dataset=Padded(), callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume)
    if lora:
        trainer.save_model(Path(folder) / "adapter")
    loads = [json.loads(line)["load"] for line in (Path(folder) / "expert_load.jsonl").read_text().splitlines()]
    kinds = sorted({type(parameter).__name__ for parameter in model.parameters()})
    return {"biases": [list(biases.values()) for biases in record.biases], "loads": loads, "logs": record.logs} | {
        "kinds": kinds
    }


class Gradients(TrainerCallback):
    """Those of the first step, written by rank 0."""

    def __init__(self, file):
        self.file = file

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step:
            return
        named = ((name.removeprefix("module."), p.grad) for name, p in model.named_parameters() if p.grad is not None)
        found = {name: (g.full_tensor() if isinstance(g, DTensor) else g).clone() for name, g in named}
        if args.process_index == 0:
            save_file(found, self.file)


class Killed(dsm.LoadBalanceCallback):
    """Ends its process as the system would, in the midst of a step."""

    def __init__(self, step):
        super().__init__()
        self.step = step

    def on_train_begin(self, *args, **kwargs):
        pass

    def on_train_end(self, *args, **kwargs):
        pass

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            os.kill(os.getpid(), 9)


def with_lora(model, attention=("o_proj",), stacks=("gate_up_proj", "down_proj")):
    import peft

    experts = [f"mlp.experts.{name}" for name in stacks]
    targets = {"target_modules": list(attention), "target_parameters": experts or None}
    config = peft.LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights="gaussian", **targets)
    return peft.get_peft_model(model, config)


def sharded(release):
    """A model whose layers FSDP2 divides among the ranks, by hand."""
    model = AutoModelForCausalLM.from_pretrained(release, dtype=torch.float32)
    mesh = init_device_mesh("cpu", (world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def save(folder, release):
    """In the release's format from all ranks, plain and quantised, and as accelerate's FSDP2 does."""
    state = accelerate.PartialState(cpu=True, backend="gloo")
    model = sharded(release)
    model.save_pretrained(folder / "plain", max_shard_size="300KB")
    model.save_pretrained(folder / "fp8", quantize="fp8")
    model.save_pretrained(folder / "int4", quantize="int4")
    plugin = accelerate.utils.FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type="SHARDED_STATE_DICT")
    who = {"process_index": state.process_index, "num_processes": state.num_processes, "is_fsdp2": True}
    whose = SimpleNamespace(**who, wait_for_everyone=state.wait_for_everyone, is_main_process=state.is_main_process)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss.backward()
    accelerate.utils.save_fsdp_model(plugin, whose, model, str(folder / "checkpoint-1"))
    optimizer.step()
    accelerate.utils.save_fsdp_optimizer(plugin, whose, optimizer, model, str(folder / "checkpoint-1"))
    if state.is_main_process:
        (folder / "checkpoint-1" / "trainer_state.json").write_text('{"global_step": 1}')
    return {}


def said(do) -> str:
    try:
        do()
    except (OSError, ValueError, RuntimeError, dsm.CheckpointError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def refusals(folder, release):
    """What each rank is told where one of them cannot go on."""
    accelerate.PartialState(cpu=True, backend="gloo")
    rank = distributed.get_rank()
    config = dsm.read_config(release).to_dict()
    found = {"config": said(lambda: check_ranks(config=config | ({"num_experts_per_tok": 3} if rank == 1 else {})))}
    found["same"] = said(lambda: check_ranks(config=config))
    if rank == 1:  # as another environment would have it
        package = folder / "other" / "transformers-0.1.dist-info"
        package.mkdir(parents=True)
        (package / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 0.1\n")
        sys.path.insert(0, str(folder / "other"))
    found["version"] = said(check_ranks)
    if rank == 1:
        sys.path.pop(0)
    place = release if rank == 0 else folder / "nowhere"
    found["shard"] = said(lambda: on_all_ranks(lambda: dsm.CheckpointReader.open(place)))
    model = sharded(release)
    local = model.model.layers[1].mlp.experts.down_proj.to_local()
    if rank == 1:
        with torch.no_grad():
            local[0, 0, 0] = float("nan")
    found["nan"] = said(lambda: model.save_pretrained(folder / "nan", quantize="fp8"))
    distributed.barrier()
    found["left"] = sorted(path.name for path in folder.glob("nan/*"))
    return found


def run_cases(folder: Path, cases: list) -> None:
    torch.set_num_threads(1)
    rank = os.environ.get("RANK", "0")
    for name, case, settings in cases:
        place = folder / name
        place.mkdir(exist_ok=True)
        found = CASES[case](place, **settings)
        (place / f"rank-{rank}.json").write_text(json.dumps(found))


CASES = {"train": train, "save": save, "refusals": refusals}


def environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return os.environ | {n: str(v) for n, v in own.items()} | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def on_ranks(folder: Path, ranks: int, *cases: tuple, timeout: float = 300) -> dict[str, list[dict]]:
    """Do ``(name, case, settings)`` on several processes: by name, what each rank found."""
    port, command = free_port(), [sys.executable, __file__, str(folder), json.dumps(cases, default=str)]
    processes = [
        subprocess.Popen(command, env=environment(rank, ranks, port), stderr=subprocess.PIPE, text=True)
        for rank in range(ranks)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=timeout)
        assert process.returncode == 0, errors[-4000:]
    names = [name for name, *_ in cases]
    return {n: [json.loads((folder / n / f"rank-{r}.json").read_text()) for r in range(ranks)] for n in names}


if __name__ == "__main__":
    run_cases(Path(sys.argv[1]), json.loads(sys.argv[2]))
