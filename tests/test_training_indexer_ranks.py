"""Indexers trained by two processes learn what one learns from the same rows."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_training_indexer import STAGES, small, trainer_of

import modeling_deepseek_moe as dsm


def train(folder: Path, stage: str, ranks: int) -> dict[str, torch.Tensor]:
    model = small()
    options = {"optim": "sgd", "learning_rate": 0.1, "per_device_train_batch_size": 4 // ranks, "max_grad_norm": 0.0}
    options |= {"ddp_backend": "gloo"} if ranks > 1 else {}
    trainer_of(model, folder, dsm.IndexerLossCallback(stage), steps=3, **options).train()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_learn_what_one_does(tmp_path, stage):
    wanted, ranks = train(tmp_path / "alone", stage, 1), 2
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = os.environ | {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    command = [sys.executable, __file__, str(tmp_path), stage]
    processes = [
        subprocess.Popen(
            command, env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE, text=True
        )
        for rank in range(ranks)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=150)
        assert process.returncode == 0, errors[-3000:]
    first, second = (torch.load(tmp_path / f"rank-{rank}.pt") for rank in range(ranks))
    for name, found in first.items():
        assert torch.equal(found, second[name]), name
        torch.testing.assert_close(found, wanted[name], rtol=1e-4, atol=1e-5, msg=name)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.save(train(Path(sys.argv[1]) / "ranks", sys.argv[2], 2), Path(sys.argv[1]) / f"rank-{os.environ['RANK']}.pt")
