"""`benchmarks/gpu.py` without a card: its budget, its files, its refusal, and its models on a CPU."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
CPU = torch.device("cpu")
SMALL = {
    **{
        "num_hidden_layers": 2,
        "hidden_size": 256,
        "intermediate_size": 256,
        "moe_intermediate_size": 128,
        "vocab_size": 99,
    },
    **{"n_routed_experts": 8, "num_attention_heads": 2, "num_key_value_heads": 2, "kv_lora_rank": 128},
    **{"qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 32, "num_experts_per_tok": 2},
}


@pytest.fixture(scope="module")
def gpu():
    """By its file: another folder of tests has the name."""
    spec = importlib.util.spec_from_file_location("benchmark_of_gpus", BENCHMARKS / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def models(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_models

    return gpu_models


@pytest.fixture
def parts(models):
    import gpu_parts

    return gpu_parts


def test_parts_are_dropped_from_the_bottom(gpu):
    parts = [gpu.Part(name, seconds, None) for name, seconds in (("a", 5), ("b", 10), ("c", 1))]
    assert [part.name for part in gpu.fitting(parts, 15)] == ["a", "b"]
    assert [part.name for part in gpu.fitting(parts, 14)] == ["a"]
    assert len(gpu.fitting(parts, 16)) == 3


def test_each_part_leaves_its_file_and_a_failure_stops_nothing(gpu, tmp_path):
    def fails(device):
        raise RuntimeError("out of memory")

    parts = [
        gpu.Part("good", 0, lambda device: {"on": str(device)}),
        gpu.Part("bad", 0, fails),
        gpu.Part("last", 0, lambda _: {}),
    ]
    results = gpu.run(parts, CPU, tmp_path / "out", 100)
    files = sorted((tmp_path / "out").iterdir())
    assert [file.name for file in files] == ["01-good.json", "02-bad.json", "03-last.json"]
    assert [json.loads(file.read_text()) for file in files] == results
    assert results[0]["on"] == "cpu" and results[1]["error"] == "RuntimeError: out of memory"


def test_a_part_for_which_no_time_is_left_is_not_begun(gpu, tmp_path, monkeypatch):
    clock = iter([0, 0, 50, 50])
    monkeypatch.setattr(gpu.time, "monotonic", lambda: next(clock))
    parts = [gpu.Part("slow", 10, lambda _: {}), gpu.Part("late", 60, lambda _: {})]
    assert [result["part"] for result in gpu.run(parts, CPU, tmp_path, 100)] == ["slow"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_nothing_is_measured(gpu, capsys):
    assert gpu.main([]) == 2
    assert "found no CUDA device, wanted one" in capsys.readouterr().err


def test_the_parts_fit_into_the_budget(gpu, parts, capsys):
    assert sum(seconds for _, seconds, _ in parts.PARTS) <= gpu.BUDGET < 480
    assert gpu.main(["--plan"]) == 0
    *rows, total = capsys.readouterr().out.splitlines()
    assert [row.split()[2] for row in rows] == ["machine:", *(f"{name}:" for name, _, _ in parts.PARTS)]
    assert total.endswith("left out: 0") and float(total.split()[0]) < 480
    assert gpu.main(["--plan", "--budget", "70"]) == 0
    assert "left out: 8" in capsys.readouterr().out


MEASURED = ("decode_experts", "attention", "end_to_end", "many_tokens", "plain_transformers")


@pytest.mark.parametrize("name", MEASURED)
def test_a_part_runs_on_small_models(parts, models, name, monkeypatch):
    """Its calls into this package and into transformers, on a CPU; what it would measure is not looked at."""
    monkeypatch.setattr(models, "V2_LITE", models.V2_LITE | SMALL)
    monkeypatch.setattr(models, "CASES", ((1, 8), (2, 8), (1, 4)))
    monkeypatch.setattr(parts, "V2_LITE", (8, 2, 256, 128))
    monkeypatch.setattr(parts, "V3", (16, 2, 256, 128))
    called = []
    monkeypatch.setattr(parts, "seconds_of", lambda call, *how: called.append(call(0)) or 1e-3)
    monkeypatch.setattr(models.attention, "__defaults__", (((1, 24), (3, 8)),))
    [run] = [run for title, _, run in parts.PARTS if title == name]
    found = run(CPU)
    # attention gives its weights too, or None
    assert all(isinstance(result[0] if isinstance(result, tuple) else result, torch.Tensor) for result in called)
    rows = (
        found.get("rows")
        or found.get("longest", None)
        or [row for part in found.values() if isinstance(part, dict) for row in part["rows"]]
    )
    assert rows


def test_parity_on_a_cpu(parts):
    """The engine stands for the kernels."""
    assert 0 < parts.parity(CPU, "cpu")["largest"] < 0.05


@pytest.mark.parametrize("name", ["fp8", "bf16"])
def test_models_generate(models, name):
    found = models.tokens_per_second(models.build(CPU, name, **SMALL), 2, 12, steps=4)
    assert found["prompt_tokens_per_s"] > 0 and {"tokens_per_s", "ms_per_step"} <= set(found)


def test_experts_apart(models):
    import gpu_hybrid

    found = gpu_hybrid.hybrid(
        CPU, context=8, steps=3, layers=3, **{k: v for k, v in SMALL.items() if k != "num_hidden_layers"}
    )
    assert [row["held_share"] for row in found["rows"]] == [0.0, 0.1, 0.5, 1.0]
    # a difference of two times: of three steps it may have either sign
    assert all(row["tokens_per_s"] and row["predicted_tokens_per_s"] > 0 for row in found["rows"])


def test_charts_of_what_there_is(models, tmp_path):
    import gpu_plot

    row = {"batch": 1, "context": 1024, "tokens_per_s": 90.0}
    results = [
        {"part": "machine", "card": "Card 1"},
        {"part": "limits", "read_TBps": 3.0},
        {"part": "decode_experts", "rows": [{"shape": "V3", "format": "int4", "tokens": 1, "GBps": 2400.0}]},
        {"part": "end_to_end", "fp8": {"rows": [row]}, "bf16": {"rows": [row]}},
        {"part": "plain_transformers", "error": "RuntimeError: out of memory"},
        {
            "part": "hybrid",
            "layers": 9,
            "rows": [{"held_share": 0.1, "tokens_per_s": 9.0, "predicted_tokens_per_s": 10.0, "of_predicted": 0.9}],
        },
    ]
    files = gpu_plot.write(results, tmp_path)
    assert [file.name for file in files] == ["experts.svg", "tokens.svg", "hybrid.svg"]
    text = "".join(file.read_text() for file in files)
    assert "80 % of a read" in text and "10% of the experts" in text and "transformers" not in text
    assert gpu_plot.write([], tmp_path) == []


def test_both_models_train(models):
    for model in (models.build(CPU, "bf16", **SMALL), models.build_plain(CPU, **SMALL)):
        assert models.step_ms(model, 1, 16, rounds=1) > 0
