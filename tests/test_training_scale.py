"""`plan --train --gpus`: parts of a rank in each layout, peaks that processes took, published speeds, and what is refused."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from typer.testing import CliRunner

import modeling_deepseek_moe as dsm
from modeling_deepseek_moe.cli import app
from modeling_deepseek_moe.training_memory import LORA, QLORA, TrainingSetup, predict_training_memory
from modeling_deepseek_moe.training_scale import Layout, ModelSizes, rank_memory
from modeling_deepseek_moe.training_speed import EFFICIENCY, GPUS, Cluster, flops_per_token, gpu_of, training_runs

ROOT = Path(__file__).resolve().parents[1]
SIZES = {
    **{"vocab_size": 512, "hidden_size": 128, "intermediate_size": 384, "moe_intermediate_size": 64},
    **{"num_hidden_layers": 4, "num_attention_heads": 4, "n_routed_experts": 8, "num_experts_per_tok": 2},
    **{"n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1, "q_lora_rank": 64},
    **{"kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32},
    **{"num_nextn_predict_layers": 0, "max_position_embeddings": 1024},
}
SETUP = TrainingSetup(batch_size=2, seq_length=64)
KINDS = {"h800": "H100 80GB", "h100": "H100 80GB", "gb200": "B200", "b200": "B200", "gb300": "B300"}


@pytest.fixture(scope="module")
def small():
    return dsm.DeepseekV3Config(**SIZES)


@pytest.mark.parametrize("method", ["full", LORA, QLORA])
def test_one_rank_has_what_one_process_has(small, method):
    setup = replace(SETUP, method=method)
    alone, rank = predict_training_memory(small, setup), rank_memory(small, setup, Layout(sharded=False))
    assert rank.weights == pytest.approx(alone.weights + alone.adapter, rel=1e-3)
    assert (rank.gradients, rank.moments) == (alone.gradients, alone.optimizer)
    assert rank.activations == alone.activations + alone.logits
    # DDP's buckets; what a process keeps without a tensor in it is no part of a rank's
    assert rank.peak == pytest.approx(alone.peak - alone.retained + rank.gradients, rel=1e-3)


@pytest.mark.parametrize("layout", [Layout(data=4), Layout(data=4, expert=2), Layout(tensor=2, data=2)], ids=str)
def test_fsdp_divides_what_stays(small, layout):
    alone, rank = rank_memory(small, SETUP, Layout(sharded=False)), rank_memory(small, SETUP, layout)
    sizes = ModelSizes(small, SETUP)
    whole = sum(nbytes for (_, kind), nbytes in sizes.held.items() if kind == "whole")
    share = alone.weights / 4 + whole * (layout.tensor - 1) / 4  # what no rank of tensor parallelism has a part of
    assert rank.weights == pytest.approx(share, rel=0.01)
    assert rank.moments == pytest.approx(2 * rank.gradients, rel=0.01)
    assert rank.gradients < alone.gradients / 3


def test_expert_parallelism_without_sharding_divides_experts_alone(small):
    alone, rank = (rank_memory(small, SETUP, Layout(sharded=False, data=n, expert=n)) for n in (1, 2))
    experts = 4 * ModelSizes(small, SETUP).all_values("experts")
    assert alone.weights - rank.weights == experts // 2


def test_tensor_parallelism_divides_heads_and_widths(small):
    one, two = (rank_memory(small, SETUP, Layout(tensor=n, sharded=False)) for n in (1, 2))
    assert 0.5 < two.activations / one.activations < 0.8
    assert two.weights < 0.7 * one.weights


def test_a_pipeline_divides_layers_and_its_first_stage_keeps_more_batches(small):
    config = dsm.DeepseekV3Config(**SIZES | {"first_k_dense_replace": 0, "num_hidden_layers": 8})
    one, four = (
        rank_memory(config, replace(SETUP, seq_length=512), Layout(pipeline=n, sharded=False)) for n in (1, 4)
    )
    assert four.weights < 0.4 * one.weights
    assert (
        four.activations
        > 0.9 * one.activations - predict_training_memory(config, replace(SETUP, seq_length=512)).logits
    )


def test_wider_batches_and_checkpointing(small):
    wide = replace(SETUP, batch_size=8)
    plain, spared = (
        rank_memory(small, replace(wide, gradient_checkpointing=given), Layout(data=2)) for given in (False, True)
    )
    assert spared.activations < plain.activations and spared.peak < plain.peak
    assert rank_memory(small, wide, Layout(data=2), compute=2).activations < 0.7 * plain.activations


@pytest.fixture(scope="module")
def flops():
    """Of a token at 4,096 a row, by config class."""
    return cache(lambda kind: flops_per_token(kind(), TrainingSetup(batch_size=1, seq_length=4096)))


def measured():
    return json.loads((ROOT / "benchmarks" / "results" / "plan_train.json").read_text())


@pytest.mark.parametrize("row", measured()["rows"], ids=lambda row: row["case"])
def test_the_peaks_that_two_processes_took(row):
    """`benchmarks/plan_train.py` measured them; what is predicted now is held to them."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        from plan_train import CASES
    finally:
        sys.path.pop(0)
    is_sharded, setup = CASES[row["case"]]
    found = rank_memory(dsm.DeepseekV3Config(**measured()["config"]), setup, Layout(data=2, sharded=is_sharded))
    assert found.peak == pytest.approx(row["measured"], rel=0.1)


@pytest.mark.long
@pytest.mark.parametrize("name", ["DDP", "FSDP2"])
def test_two_processes_take_what_is_predicted(name):
    code = f"import plan_train; print(plan_train.run({name!r})['ratio'])"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    settings = {"cwd": ROOT / "benchmarks", "env": environment, "capture_output": True, "text": True}
    done = subprocess.run(command, check=False, timeout=300, **settings)
    assert done.returncode == 0, done.stderr[-3000:]
    assert float(done.stdout.split()[-1]) == pytest.approx(1, abs=0.1)


def published():
    """Rows of the page's table: run, model, GPU, precision, published, bound, share, error."""
    lines = (ROOT / "docs" / "distributed.md").read_text().splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("| published run"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


@pytest.mark.parametrize("row", published(), ids=lambda row: row[0])
def test_the_page_states_the_error_of_published_speeds(row, flops):
    _, model, gpu, precision, speed, bound, share, error = row
    kind = next(one for one in GPUS if one.name == KINDS[gpu.lower()])
    limit = kind.tokens_per_second(
        flops(dsm.KimiK2Config if "Kimi" in model else dsm.DeepseekV3Config), precision != "BF16"
    )
    speed = int(speed.replace(",", ""))
    assert int(bound.replace(",", "")) == round(limit)
    assert share == f"{speed / limit:.0%}"
    assert error == f"{EFFICIENCY * limit / speed - 1:+.0%}".replace("-", "−")


def test_flops_of_v3_are_six_for_each_weight_that_is_met_and_attention(flops):
    v3 = dsm.DeepseekV3Config()
    layers, rest = flops(dsm.DeepseekV3Config)
    assert layers == pytest.approx(6 * 35.6e9, rel=0.01)
    assert rest == pytest.approx(6 * 7168 * 129280 + 3 * 61 * 4096 * 128 * (192 + 128), rel=1e-6)
    adapter, _ = flops_per_token(v3, TrainingSetup(LORA, seq_length=4096))
    assert adapter == pytest.approx(layers * 2 / 3)
    more, _ = flops_per_token(v3, TrainingSetup(seq_length=4096, mtp=True))
    assert 1.01 < more / layers < 1.05


def test_runs_come_in_the_order_of_what_is_expected(small):
    runs = training_runs(small, SETUP, Cluster(gpu_of(80 * 10**9), 4, 2))
    assert all(run.fits and run.layout.ranks == 8 for run in runs)
    assert [run.expected for run in runs] == sorted((run.expected for run in runs), reverse=True)
    assert all(run.expected <= run.bound for run in runs)
    slow = training_runs(small, SETUP, Cluster(replace(gpu_of(80 * 10**9), network=1e9, link=1e9), 4, 2))
    assert max(run.by_network for run in slow) < max(run.by_network for run in runs)
    alone = training_runs(small, SETUP, Cluster(gpu_of(80 * 10**9), 1, 1))
    assert [run.layout for run in alone] == [Layout(sharded=False)] and alone[0].by_network == float("inf")


def test_nothing_sent_is_no_bound_in_json():
    found = json.loads(plan("--train", "full", "--gpus", "1x80GB", "--json").stdout)
    assert [one["by_network"] for one in found["layouts"]] == [None]


@pytest.mark.parametrize(
    "layout, words",
    [
        (Layout(tensor=3), "tensor=3 does not divide 4 heads"),
        (Layout(data=3, expert=3), "expert=3 does not divide 8 experts"),
        (Layout(data=2, expert=4), "expert=4 does not divide 2 data-parallel ranks"),
        (Layout(pipeline=5), "pipeline=5 is more than 4 layers"),
    ],
)
def test_a_layout_that_cannot_be(small, layout, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        rank_memory(small, SETUP, layout)


def plan(*options):
    return CliRunner().invoke(app, ["plan", dsm.tiny_checkpoint(), *map(str, options)])


def test_the_command():
    result = plan("--train", "full", "--gpus", "2x80GB", "--nodes", 2, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["verdict"] == "fits" and found["cluster"]["gpu"]["name"] == "H100 80GB"
    assert {"DDP 4", "FSDP2 4", "EP 2 × FSDP2 4"} <= {one["name"] for one in found["layouts"]}
    shown = plan("--train", "lora", "--gpus", "2x80GB")
    assert "fits in" in shown.stdout and "FSDP2 2" in shown.stdout and "tokens/s" in shown.stdout
    shown = plan("--train", "full", "--gpus", "8x24GB", "--batch-size", 1000000)
    assert "does not fit" in shown.stdout and "more --nodes" in " ".join(shown.stdout.split())
    assert "tokens/s a GPU (≤ by FLOPs, memory, network)" in shown.stdout and "…" not in shown.stdout  # in 80 columns
    for options, words in (
        (["--nodes", 3], "found --nodes without --gpus"),
        (["--gpus", "8x80GB"], "found --gpus without --train"),
        (["--fp8", "--train", "full"], "found --fp8 without --gpus"),
        (["--train", "full", "--gpus", "80GB"], "--gpus: found '80GB', wanted how many"),
        (["--train", "full", "--gpus", "8x0GB"], "--gpus: found '8x0GB', wanted how many"),
    ):
        result = plan(*options)
        assert result.exit_code == 2 and words in " ".join(result.output.split())
