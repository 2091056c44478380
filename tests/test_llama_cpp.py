"""Folders saved here through llama.cpp's own converter, and the logits that llama.cpp computes from the files, next to ours.

    LLAMA_CPP=/folder/of/llama_cpp_python-0.3.36 pytest -m long tests/test_llama_cpp.py

``LLAMA_CPP`` is the unpacked source distribution of llama-cpp-python, which brings llama.cpp's converter. The libraries are those of an
installed llama-cpp-python, or lie in ``$LLAMA_CPP_LIB_PATH`` (built by ``cmake -B build -DBUILD_SHARED_LIBS=ON`` in its vendor/llama.cpp).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from releases import SHAPES, write_release
from transformers import AutoModelForCausalLM, AutoTokenizer, FineGrainedFP8Config

import modeling_deepseek_moe as dsm

SCRIPTS = Path(__file__).parent / "receivers"
TEXT = "Question: Ada has 3 pens and buys 4 more. How many pens does Ada have now?\nAnswer: 3 + 4 = 7. The answer is \\boxed{7}."
LENGTH = 96
# Of the logits' norm, both in fp32 from the same file. Where ours runs on codes it runs on the values that they stand for.
TOLERANCE = 2e-5

# llama.cpp has the groups of V3, by the sum of their two best; those of V2, by their best, it computes as if they were V3's.
METHODS = {"v2": ("greedy", 1, 1)}


def tiny(folder: Path, **save) -> None:
    """DeepSeek-V3's shape, trained, with an MTP layer."""
    settings = {"quantization_config": FineGrainedFP8Config(dequantize=True), "dtype": torch.bfloat16} if save else {}
    AutoModelForCausalLM.from_pretrained(dsm.tiny_checkpoint(), **settings).save_pretrained(folder, **save)


def release(folder: Path, kind: str) -> None:
    """Random weights in another release's shape, YaRN and all, with rows of whole groups of 32."""
    config = SHAPES[kind]()
    config.vocab_size, config.kv_lora_rank, config.eos_token_id, config.bos_token_id = 657, 64, 1, 0
    if config.q_lora_rank is None:
        config.num_hidden_layers = 27  # by which llama.cpp knows the models without a query latent
    config.topk_method, config.n_group, config.topk_group = METHODS.get(
        kind, (config.topk_method, config.n_group, config.topk_group)
    )
    write_release(folder / "release", config)
    AutoModelForCausalLM.from_pretrained(folder / "release").save_pretrained(folder)


FOLDERS = {
    "v3-fp8": tiny,
    "v3-bf16": lambda folder: tiny(folder, max_shard_size="2MB"),
    "v3-int4": lambda folder: tiny(folder, quantize="int4"),
    "v2-lite": lambda folder: release(folder, "v2-lite"),
    "v2": lambda folder: release(folder, "v2"),
    "moonlight": lambda folder: release(folder, "moonlight"),
    "v3-yarn": lambda folder: release(folder, "v3"),
}


def rows() -> list[list[int]]:
    ids = AutoTokenizer.from_pretrained(dsm.tiny_checkpoint())(TEXT)["input_ids"]
    return [(5 * ids)[start : start + LENGTH] for start in (0, 7)]


def our_logits(folder: Path) -> np.ndarray:
    is_coded = "quantization_config" in json.loads((folder / "config.json").read_text())
    settings = {"quantization_config": FineGrainedFP8Config(dequantize=True)} if is_coded else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **settings)
    with torch.no_grad():
        return model.eval()(torch.tensor(rows())).logits.numpy()


def run(script: str, *arguments: object) -> str:
    command = [sys.executable, str(SCRIPTS / script), *map(str, arguments)]
    path = os.pathsep.join(filter(None, [os.environ["LLAMA_CPP"], os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": path}, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


@pytest.mark.long
@pytest.mark.peer
@pytest.mark.parametrize("name", FOLDERS)
def test_llama_cpp_computes_the_same_logits(name, tmp_path):
    root = os.environ.get("LLAMA_CPP")
    if root is None:
        pytest.skip("LLAMA_CPP is not set: the unpacked source distribution of llama-cpp-python")
    folder = tmp_path / "saved"
    FOLDERS[name](folder)
    AutoTokenizer.from_pretrained(dsm.tiny_checkpoint()).save_pretrained(folder)
    file, ids, out = (tmp_path / one for one in ("model.gguf", "ids.json", "logits.npy"))
    ids.write_text(json.dumps(rows()))
    run("llama_cpp_convert.py", root, folder, file, "f32")
    run("llama_cpp_logits.py", file, ids, out)
    ours, theirs = our_logits(folder), np.load(out)
    error = np.linalg.norm(ours - theirs) / np.linalg.norm(ours)
    print(f"{name}: relative error {error:.1e}, greatest {np.abs(ours - theirs).max():.1e}")
    assert error < TOLERANCE
    assert np.array_equal(ours.argmax(-1), theirs.argmax(-1))
