"""One rank of `test_distributed_zero`: ``python zero_rank.py STAGE``, three steps; rank 0 prints the losses. Stage 0 is one process."""

import json
import sys

import torch
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

import modeling_deepseek_moe as dsm

RANKS, STEPS = 2, 3


def main(stage: int) -> None:
    plain = FineGrainedFP8Config(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(dsm.tiny_checkpoint(), dtype=torch.float32, quantization_config=plain)
    ids = torch.randint(0, 200, (STEPS, RANKS, 24), generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    step = alone if stage == 0 else engine_of(model, optimizer, stage)
    losses = [step(model, optimizer, batch) for batch in ids]
    if stage == 0 or torch.distributed.get_rank() == 0:
        print("losses", json.dumps(losses), flush=True)


def alone(model, optimizer, batch: torch.Tensor) -> float:
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return float(loss)


def engine_of(model, optimizer, stage: int):
    import deepspeed

    # products of its own that it would compile for minutes; torch's are used instead
    deepspeed.ops.__compatible_ops__.update(dict.fromkeys(deepspeed.ops.__compatible_ops__, False))
    deepspeed.init_distributed("gloo")
    settings = {"train_micro_batch_size_per_gpu": 1, "gradient_clipping": 1.0, "zero_allow_untested_optimizer": True}
    settings |= {"zero_force_ds_cpu_optimizer": False}
    # no parameter is left whole on each rank
    settings["zero_optimization"] = {"stage": stage, "stage3_param_persistence_threshold": 0}
    engine, *_ = deepspeed.initialize(model=model, config=settings, optimizer=optimizer)

    def step(model, optimizer, batch: torch.Tensor) -> float:
        own = batch[torch.distributed.get_rank()].unsqueeze(0)
        loss = engine(input_ids=own, labels=own).loss
        engine.backward(loss)
        engine.step()
        mean = loss.detach().clone()
        torch.distributed.all_reduce(mean)
        return float(mean) / RANKS

    return step


if __name__ == "__main__":
    main(int(sys.argv[1]))
