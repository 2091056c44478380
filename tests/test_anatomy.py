"""Counting from a config and inspecting from headers, against the published figures of the releases."""

import json
import math
import struct
import time
import tracemalloc
from collections import Counter

import pytest
from releases import FP8, SHAPES, write_release
from transformers import AutoModelForCausalLM

from modeling_deepseek_moe import (
    CheckpointError,
    CheckpointReader,
    formats,
    inspect_checkpoint,
    parameter_breakdown,
    read_config,
)
from modeling_deepseek_moe.anatomy import CONFIGS, describe
from modeling_deepseek_moe.checkpoint import reader as checkpoint_reader
from modeling_deepseek_moe.checkpoint.mapped import MappedFiles
from modeling_deepseek_moe.quantized.mapped import MappedExperts
from modeling_deepseek_moe.weights import release_tensors

# The architecture fields of the released config.json files, written out: nothing here relies on a default.
V3 = {
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_nextn_predict_layers": 1,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "moe_layer_freq": 1,
    "first_k_dense_replace": 3,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "max_position_embeddings": 163840,
    "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
    },
    "torch_dtype": "bfloat16",
    "quantization_config": FP8,
}
KIMI_K2 = V3 | {
    "model_type": "kimi_k2",
    "vocab_size": 163840,
    "num_nextn_predict_layers": 0,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "n_routed_experts": 384,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 2.827,
    "max_position_embeddings": 131072,
    "rope_theta": 50000.0,
    "rope_scaling": V3["rope_scaling"] | {"factor": 32.0},
}
MOONLIGHT = {name: value for name, value in KIMI_K2.items() if name != "quantization_config"} | {
    "model_type": "deepseek_v3",
    "hidden_size": 2048,
    "intermediate_size": 11264,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "n_shared_experts": 2,
    "n_routed_experts": 64,
    "num_experts_per_tok": 6,
    "routed_scaling_factor": 2.446,
    "q_lora_rank": None,
    "max_position_embeddings": 8192,
    "rope_scaling": None,
}
V2_LITE = MOONLIGHT | {
    "model_type": "deepseek_v2",
    "architectures": ["DeepseekV2ForCausalLM"],
    "vocab_size": 102400,
    "intermediate_size": 10944,
    "scoring_func": "softmax",
    "topk_method": "greedy",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "max_position_embeddings": 163840,
}
V2 = V2_LITE | {
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_hidden_layers": 60,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_routed_experts": 160,
    "topk_method": "group_limited_greedy",
    "n_group": 8,
    "topk_group": 3,
    "routed_scaling_factor": 16.0,
    "q_lora_rank": 1536,
}
BILLION = 10**9


def config_of(fields):
    return CONFIGS[fields["model_type"]].from_dict(dict(fields))


@pytest.mark.parametrize(
    "fields, total, active",
    [
        pytest.param(V3, "671", "37", id="V3-671B-A37B"),
        pytest.param(V2, "236", "21", id="V2-236B-A21B"),
        pytest.param(V2_LITE, "15.7", "2.4", id="V2-Lite-15.7B-A2.4B"),
        pytest.param(MOONLIGHT, "16", "3", id="Moonlight-16B-A3B"),
        pytest.param(KIMI_K2, "1.0e+03", "32", id="Kimi-K2-1T-A32B"),
    ],
)
def test_published_sizes(fields, total, active):
    breakdown = parameter_breakdown(config_of(fields))
    assert rounded(breakdown.parameters, total) == total
    # V2-Lite has 2.451B by this convention, published as 2.4B: cut off, not rounded
    assert rounded(breakdown.active_parameters - (2e6 if fields is V2_LITE else 0), active) == active


def rounded(count, like):
    """``count`` in billions, to as many digits as ``like`` has."""
    digits = len(like.partition("e")[0].replace(".", ""))
    return f"{count / BILLION:.{digits}g}" if "e" not in like else f"{count / BILLION:.{digits - 1}e}"


@pytest.mark.parametrize(
    "fields, total, active",
    [pytest.param(V2_LITE, 15.29, 2.24, id="V2-Lite"), pytest.param(MOONLIGHT, 15.29, 2.24, id="Moonlight")],
)
def test_published_sizes_without_embedding_and_head(fields, total, active):
    """Table 5 of the Moonlight report (arXiv:2502.16982) counts both models so."""
    breakdown = parameter_breakdown(config_of(fields))
    outer = sum(breakdown.stored[part].parameters for part in ("embedding", "head"))
    assert round((breakdown.parameters - outer) / BILLION, 2) == total
    active_outer = sum(breakdown.active[part].parameters for part in ("embedding", "head"))
    assert round((breakdown.active_parameters - active_outer) / BILLION, 2) == active


def test_v3_exactly():
    breakdown = parameter_breakdown(config_of(V3))
    assert breakdown.parameters == 671_026_419_200
    assert breakdown.mtp_copies == 2 * 129280 * 7168
    stored = breakdown.stored.values()
    # the Hub counts scales too: 684.53B values, shown as 685B
    assert round(sum(size.parameters + size.scales for size in stored) / BILLION) == 685
    assert breakdown.cache_bytes() == 70_272
    assert breakdown.cache_bytes(1000) == 70_272_000
    assert breakdown.weight_format == formats.FP8
    # every Linear is FP8 but embedding, head (and their copies), gate, eh_proj
    norms = 62 * (2 * 7168 + 1536 + 512) + 7168 + 3 * 7168
    kept = 4 * 129280 * 7168 + 59 * (256 * 7168 + 256) + 2 * 7168 * 7168 + norms
    assert sum(size.parameters - size.quantized for size in stored) == kept


def test_bytes_are_those_of_the_files(tmp_path):
    for name, fp8 in (("v3-mtp", True), ("v3", False), ("v2-lite", False), ("kimi", True)):
        write_release(tmp_path / name, SHAPES[name](), fp8=fp8)
        breakdown = parameter_breakdown(read_config(tmp_path / name))
        reader = CheckpointReader.open(tmp_path / name)
        assert breakdown.stored_bytes(breakdown.weight_format, breakdown.itemsize) == reader.nbytes
        weights = [info for tensor, info in reader.items() if not tensor.endswith("_scale_inv")]
        assert breakdown.parameters + breakdown.mtp_parameters == sum(math.prod(info.shape) for info in weights)


def test_tied_embeddings_are_counted_once_and_used_twice():
    config = SHAPES["v3"]()
    config.tie_word_embeddings = True
    tied, untied = parameter_breakdown(config), parameter_breakdown(SHAPES["v3"]())
    assert tied.parameters == untied.parameters - config.vocab_size * config.hidden_size
    assert tied.active_parameters == untied.active_parameters


def test_description_names_the_essentials():
    text = describe(config_of(V3))
    assert text["layers"] == "61 (3 dense, 58 MoE) + 1 MTP"
    assert text["experts"] == "256 routed of width 2048, 8 per token, 4 of 8 groups; 1 shared"
    assert text["weights"] == "FP8 in blocks of 128×128, the rest bfloat16"


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "not JSON"),
        ("[]", "found a list, wanted a JSON object"),
        (json.dumps({"model_type": "llama"}), "model_type='llama', wanted one of deepseek_v2"),
        (json.dumps(V3 | {"topk_method": "best"}), "topk_method='best' is not supported"),
        (json.dumps(V3 | {"hidden_size": "wide"}), "hidden_size"),
    ],
)
def test_a_config_that_cannot_be_used_is_named(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    is_text = message in ("not JSON", "found a list, wanted a JSON object")
    with pytest.raises(CheckpointError if is_text else ValueError, match=message) as caught:
        read_config(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)


@pytest.mark.parametrize(
    "fields, message", [({"quant_method": "awq"}, "quant_method='awq'"), (FP8 | {"fmt": "e5m2"}, "fmt='e5m2'")]
)
def test_another_quantisation_is_refused(fields, message):
    with pytest.raises(ValueError, match=f"{message} is not supported"):
        parameter_breakdown(config_of(V3 | {"quantization_config": fields}))


def write_sparse(folder, fields, shards):
    """A release's folder with real headers and no data but scales of 1: every shard is a sparse file of its size."""
    config = config_of(fields)
    tensors = {}
    for name, spec in release_tensors(config).items():
        tensors[name] = ("F8_E4M3" if spec.quantized else "BF16", spec.shape)
        if name.endswith("e_score_correction_bias"):
            tensors[name] = ("F32", spec.shape)
        if spec.quantized:
            tensors[f"{name}_scale_inv"] = ("F32", tuple(-(-size // 128) for size in spec.shape))
    (folder / "config.json").write_text(json.dumps(fields))
    names, weight_map = list(tensors), {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:06d}.safetensors"
        header, end = {}, 0
        for name in names[shard::shards]:
            dtype, shape = tensors[name]
            start, end = end, end + math.prod(shape) * {"F8_E4M3": 1, "BF16": 2, "F32": 4}[dtype]
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # as the safetensors library does: the data lie aligned
        with (folder / file).open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(8 + len(text) + end)
            for entry in header.values():
                if entry["dtype"] == "F32" and len(entry["shape"]) == 2:
                    stream.seek(8 + len(text) + entry["data_offsets"][0])
                    stream.write(struct.pack("<f", 1.0) * math.prod(entry["shape"]))
        weight_map |= dict.fromkeys(header, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


@pytest.fixture(scope="module")
def v3_folder(tmp_path_factory):
    """DeepSeek-V3's layout: 61 + 1 layers, 91,991 tensors, 163 shards, 689 GB on the label."""
    folder = tmp_path_factory.mktemp("v3")
    try:
        write_sparse(folder, V3, 163)
    except OSError as error:
        pytest.skip(f"no sparse files of 4 GB here: {error}")
    return folder


@pytest.mark.slow
def test_inspecting_the_layout_of_v3(v3_folder):
    """Seconds, and little memory."""
    start = time.perf_counter()
    found = inspect_checkpoint(v3_folder)
    seconds = time.perf_counter() - start
    assert found.is_loadable and not found.findings
    assert (found.total.tensors, found.shards) == (91_991, 163)
    assert found.total.nbytes == found.breakdown.stored_bytes(formats.FP8) == 688_574_839_360
    assert sum(tally.values for part, tally in found.parts.items() if part != "scales") == 684_489_845_504
    assert found.dtypes["float8_e4m3fn"].tensors == found.parts["scales"].tensors == 45_808
    assert seconds < 30  # about 2 s on an idle core


@pytest.mark.slow
def test_loading_the_layout_of_v3(v3_folder, monkeypatch):
    """Seconds too: each header is parsed once, and no expert's codes become a tensor. `benchmarks/load.py` times it."""
    calls = Counter()

    def count(owner, name):
        real = getattr(owner, name)

        def counted(*args, **kwargs):
            calls[name] += 1
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    count(checkpoint_reader, "read_header")
    count(MappedFiles, "open")
    count(MappedFiles, "view")
    model = AutoModelForCausalLM.from_pretrained(v3_folder)
    assert calls["read_header"] == 163
    assert calls["open"] == 2 * 163  # to read the scales, and to map
    assert calls["view"] == 91_991 - 45_808 - 59 * 256 * 3  # neither scales nor experts
    experts = [module for module in model.modules() if isinstance(module, MappedExperts)]
    assert [module.num_mapped for module in experts] == 59 * [256 * 3 * 2048 * 7168]
    assert experts[-1].addresses().shape == (256, 3, 2)


def test_inspecting_takes_memory_for_headers_only(tmp_path):
    write_sparse(tmp_path, V2_LITE | {"quantization_config": FP8}, 4)
    tracemalloc.start()
    inspect_checkpoint(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30e6  # of 16 GB
