"""Small configs in the shapes of the releases, and checkpoint folders written without this package's own writer."""

import json
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, FineGrainedFP8Config

from modeling_deepseek_moe import DeepseekV2Config, DeepseekV3Config, KimiK2Config, tiny_checkpoint
from modeling_deepseek_moe.weights import release_tensors

YARN = {
    "type": "yarn",
    "factor": 40,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 64,
}
COMMON = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 2560,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
V3 = {"q_lora_rank": 24, "n_group": 4, "topk_group": 2, "n_shared_experts": 1, "num_nextn_predict_layers": 0}
SHAPES = {
    "v3": lambda: DeepseekV3Config(**COMMON, **V3, rope_scaling=dict(YARN), rope_theta=10000),
    "v3-mtp": lambda: DeepseekV3Config(
        **COMMON, **(V3 | {"num_nextn_predict_layers": 1}), rope_scaling=dict(YARN), rope_theta=10000
    ),
    "moonlight": lambda: DeepseekV3Config(
        **COMMON, **(V3 | {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "n_shared_experts": 2})
    ),
    "kimi": lambda: KimiK2Config(**COMMON, **(V3 | {"n_group": 1, "topk_group": 1})),
    "v2-lite": lambda: DeepseekV2Config(
        **COMMON, q_lora_rank=None, rope_scaling=YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}
    ),
    "v2": lambda: DeepseekV2Config(
        **COMMON,
        q_lora_rank=24,
        topk_method="group_limited_greedy",
        n_group=4,
        topk_group=2,
        routed_scaling_factor=16.0,
        rope_scaling=YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
    ),
}
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}


def write_release(
    folder: Path, config, *, fp8: bool = False, seed: int = 0, dtype: torch.dtype = torch.bfloat16, shards: int = 1
) -> dict[str, torch.Tensor]:
    """Write random weights as a release stores them, with the safetensors library; returns them by name.

    FP8 weights get random codes and random scales, so nothing about them comes from this package's quantiser.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, spec in release_tensors(config).items():
        if name.endswith("e_score_correction_bias"):
            tensors[name] = torch.randn(spec.shape, generator=generator) * 0.3
        elif len(spec.shape) == 1:
            tensors[name] = (1 + torch.randn(spec.shape, generator=generator) * 0.1).to(dtype)
        elif fp8 and spec.quantized:
            tensors[name] = (
                (torch.randn(spec.shape, generator=generator) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
            )
            blocks = tuple(-(-size // 128) for size in spec.shape)
            tensors[name + "_scale_inv"] = (torch.rand(blocks, generator=generator) + 0.5) * 1e-3
        else:
            tensors[name] = (torch.randn(spec.shape, generator=generator) * 0.1).to(dtype)
    folder.mkdir(parents=True, exist_ok=True)
    fields = json.loads(config.to_json_string(use_diff=True)) | {"torch_dtype": str(dtype).removeprefix("torch.")}
    family = {"deepseek_v2": "DeepseekV2"}.get(config.model_type, "DeepseekV3")
    fields |= {"architectures": [f"{family}ForCausalLM"]} | ({"quantization_config": dict(FP8)} if fp8 else {})
    (folder / "config.json").write_text(json.dumps(fields))
    names = sorted(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return tensors
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[shard::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return tensors


def dequantize_independently(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Block by block in fp64: the definition, spelled out."""
    out = torch.empty(weight.shape, dtype=torch.float64)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            rows, cols = slice(128 * i, 128 * (i + 1)), slice(128 * j, 128 * (j + 1))
            out[rows, cols] = weight[rows, cols].to(torch.float64) * scale[i, j].to(torch.float64)
    return out


def quantize_independently(weight, block=(128, 128)):
    """Block by block in fp64; the scale is rounded to fp32, since that is what a release stores."""
    weight = weight.double()
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    scales = torch.empty(
        [-(-size // step) for size, step in zip(weight.shape, block, strict=True)], dtype=torch.float32
    )
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            rows = slice(i * block[0], (i + 1) * block[0])
            cols = slice(j * block[1], (j + 1) * block[1])
            amax = weight[rows, cols].abs().max()
            scales[i, j] = amax / 448 if amax > 0 else 1.0
            codes[rows, cols] = (
                (weight[rows, cols] / scales[i, j].double()).clamp(-448, 448).float().to(torch.float8_e4m3fn)
            )
    return codes, scales


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Dtype, shape and every bit: NaN equals itself, -0 does not equal 0."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def write_tiny_fp32(folder: Path) -> Path:
    """The shipped checkpoint in fp32, with its tokenizer."""
    settings = {"quantization_config": FineGrainedFP8Config(dequantize=True), "dtype": "float32"}
    AutoModelForCausalLM.from_pretrained(tiny_checkpoint(), **settings).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_checkpoint()).save_pretrained(folder)
    return folder


def two_layer_releases(tmp_path_factory):
    """Folders by ``(kind, fp8)`` of a release's shape with one dense layer and one of experts, each written once."""

    @cache
    def of(kind: str, fp8: bool = False) -> Path:
        folder = tmp_path_factory.mktemp(kind)
        config = SHAPES[kind]()
        config.num_hidden_layers = 2
        write_release(folder, config, fp8=fp8)
        return folder

    return of
