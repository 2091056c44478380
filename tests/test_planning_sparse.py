"""What `plan`, `inspect` and `bench` say of sparse attention: cache, bytes read and tokens per second at 32k and 128k."""

import json

import pytest
from families import FIELDS
from typer.testing import CliRunner

from modeling_deepseek_moe import DeepseekV3Config, Machine, make_plan, parameter_breakdown
from modeling_deepseek_moe.anatomy import CONFIGS, describe
from modeling_deepseek_moe.cli.app import app
from modeling_deepseek_moe.formats import FP8
from modeling_deepseek_moe.machine import Bandwidth

QUANTIZATION = {"quant_method": "fp8", "weight_block_size": [128, 128]}
K32, K128 = 32_768, 131_072
LATENT, KEY = 61 * (512 + 64) * 2, 61 * 128 * 2  # bytes per token


def config_of(name, **changes):
    return CONFIGS[name](quantization_config=QUANTIZATION, **changes)


def plan_of(config, gigabytes=2000, context=4096):
    found = parameter_breakdown(config)
    return found, make_plan(
        found, Machine(gigabytes * 10**9, gigabytes * 10**9, 64, Bandwidth(400e9, 10**9, 3)), context
    )


def test_bytes_of_v32_by_hand():
    found, made = plan_of(config_of("deepseek_v32"))
    assert found.cache_bytes() == made.cache_bytes_per_token == LATENT + KEY == 85_888
    assert [found.cache_read_bytes(tokens) for tokens in (100, 2048)] == [100 * LATENT, 2048 * LATENT]  # no-op below
    assert found.cache_read_bytes(2049) == 2049 * KEY + 2048 * LATENT
    short, long = made.long_contexts
    assert (short.tokens, long.tokens) == (K32, K128)
    assert long.cache_bytes == K128 * 85_888 and long.dense_bytes == K128 * LATENT
    assert long.sparse_bytes == K128 * KEY + 2048 * LATENT
    weights = found.active_bytes(FP8)
    assert long.sparse_tokens_per_second == pytest.approx(0.85 * 400e9 / (weights + long.sparse_bytes))
    assert long.dense_tokens_per_second == pytest.approx(0.85 * 400e9 / (weights + long.dense_bytes))
    assert made.options[0].read_bytes_per_token == weights + found.cache_read_bytes(4096)
    _, small = plan_of(config_of("deepseek_v32"), gigabytes=64)
    assert small.options[0].verdict == "from disk"
    assert small.long_contexts[1].sparse_tokens_per_second < long.sparse_tokens_per_second  # experts from the disk
    _, none = plan_of(config_of("deepseek_v32"), gigabytes=1)
    assert none.long_contexts[1].sparse_tokens_per_second == long.sparse_tokens_per_second  # what memory would give


def test_layers_that_share_indices_cache_no_keys():
    """GLM-5.2's shapes: 21 of 78 layers with an indexer."""
    kinds = ["full" if layer < 3 or layer % 4 == 2 else "shared" for layer in range(78)]
    found, _ = plan_of(config_of("glm_moe_dsa", indexer_types=kinds))
    own = kinds.count("full")
    assert found.indexer_values_per_token == own * 128 < 78 * 128
    assert found.cache_bytes() == 2 * (78 * 576 + own * 128)
    assert (
        f"32 heads of 128 in {own} of 78 layers" in describe(config_of("glm_moe_dsa", indexer_types=kinds))["indexer"]
    )


def test_dense_models_are_as_they_were():
    found, made = plan_of(DeepseekV3Config(quantization_config=QUANTIZATION))
    assert found.index_topk is None and made.long_contexts == ()
    assert found.cache_read_bytes(K128) == found.cache_bytes(K128) == K128 * LATENT
    assert "indexer" not in describe(DeepseekV3Config())
    _, short = plan_of(config_of("deepseek_v32", max_position_embeddings=65_536))
    assert [one.tokens for one in short.long_contexts] == [K32]


def test_what_is_printed(tmp_path):
    fields = FIELDS["deepseek_v32"] | {"max_position_embeddings": 163_840}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    text = CliRunner().invoke(app, ["plan", str(tmp_path)]).output
    layers = fields["num_hidden_layers"]
    assert f"indexer     {fields['index_n_heads']} heads of 16 in every layer, attention to 8 keys at most" in text
    assert f"{2 * layers * (32 + 8 + 16):,} bytes per token" in text
    rows = [line.split() for line in text.splitlines() if line.strip().startswith(("32,768", "131,072"))]
    assert len(rows) == 2 and "read of the cache for a token: the indexer's keys of all" in " ".join(text.split())
    found = json.loads(CliRunner().invoke(app, ["plan", str(tmp_path), "--json"]).output)
    assert found["long_contexts"][1]["sparse_bytes"] == 2 * layers * (131_072 * 16 + 8 * 40)
    long = CliRunner().invoke(app, ["plan", str(tmp_path), "--json", "--context", "163841"])
    assert json.loads(long.stdout)["context"] == 163_841
    assert "--context: 163,841 tokens are more than the model's 163,840" in " ".join(long.stderr.split())
