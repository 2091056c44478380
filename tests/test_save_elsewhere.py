"""Saved folders load elsewhere: in plain transformers, and through remote code."""

import json
import os
import subprocess
import sys

import pytest
import torch
from releases import (
    COMMON,
    SHAPES,
    V3,
    write_release,
)
from test_save_load import fields, logits, relative, resave
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

import modeling_deepseek_moe as dsm

# every FP8 weight a multiple of 128 both ways: plain transformers reads no other
WHOLE = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "kv_lora_rank": 128,
    "q_lora_rank": 128,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 128,
    "v_head_dim": 128,
}

V3_WHOLE = COMMON | V3 | WHOLE


ELSEWHERE = """
import json, sys
import torch
from transformers import AutoModelForCausalLM

folders, out = json.loads(sys.argv[1]), sys.argv[2]
ids = torch.randint(3, 128, (2, 17), generator=torch.Generator().manual_seed(1))
report = {}

def load(name, folder, **settings):
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **settings)
    with torch.no_grad():
        logits = model.to(torch.float32)(ids).logits
    keys = {kind: sorted(info[kind]) for kind in ("missing_keys", "unexpected_keys")}
    report[name] = keys | {"logits": logits, "module": type(model).__module__, "class": type(model).__name__}

for name, folder in folders["plain"].items():
    load(name, folder, attn_implementation="eager")
report["imported"] = "modeling_deepseek_moe" in sys.modules
for name, folder in folders["remote"].items():
    load(name, folder, trust_remote_code=True)
torch.save(report, out)
"""

PLAIN = {
    "v3": ("v3", False),
    "moonlight": ("moonlight", False),
    "v2-lite": ("v2-lite", False),
    "v2": ("v2", False),
    "v3-mtp": ("v3-mtp", False),
    "v3-fp8": (V3_WHOLE, True),
    "v3-mtp-fp8": (V3_WHOLE | {"num_nextn_predict_layers": 1}, True),
}

REMOTE = {"remote-v3": ("v3-mtp", False), "remote-v2-fp8": ("v2", True), "remote-kimi": ("kimi", False)}


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """Releases loaded and saved here, then loaded there: by plain transformers, then with remote code."""
    root = tmp_path_factory.mktemp("elsewhere")
    for name, (kind, fp8) in (PLAIN | REMOTE).items():
        config = SHAPES[kind]() if isinstance(kind, str) else dsm.DeepseekV3Config(**kind)
        write_release(root / "releases" / name, config, fp8=fp8, shards=2)
        resave(
            root / "releases" / name,
            root / name,
            max_shard_size="200KB",
            **({"remote_code": True} if name in REMOTE else {}),
        )
    folders = {
        kind: {name: str(root / name) for name in names} for kind, names in (("plain", PLAIN), ("remote", REMOTE))
    }
    command = [sys.executable, "-c", ELSEWHERE, json.dumps(folders), str(root / "report.pt")]
    environment = os.environ | {"HF_MODULES_CACHE": str(root / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=root, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return root, torch.load(root / "report.pt")


@pytest.mark.parametrize("name", PLAIN)
def test_plain_transformers_loads_it(elsewhere, name):
    root, report = elsewhere
    assert not report["imported"]
    found = report[name]
    assert found["module"].startswith("transformers.")
    assert found["missing_keys"] == []
    # plain transformers knows MTP layers to ignore by the number that they have in DeepSeek-V3, 61
    mtp = "model.layers.3." if "mtp" in name else None
    assert [key for key in found["unexpected_keys"] if not (mtp and key.startswith(mtp))] == []
    settings = {"quantization_config": FineGrainedFP8Config(dequantize=True)} if "fp8" in name else {}
    ours = AutoModelForCausalLM.from_pretrained(root / name, **settings).to(torch.float32)  # from bf16, as there
    assert relative(found["logits"], logits(ours)) < 1e-5


@pytest.mark.parametrize("name", REMOTE)
def test_remote_code_finds_the_package(elsewhere, name):
    root, report = elsewhere
    found = report[name]
    assert found["module"] == "modeling_deepseek_moe.modeling"
    assert (
        found["class"]
        == f"{ {'v3': 'DeepseekV3', 'v2': 'DeepseekV2', 'kimi': 'KimiK2'}[name.split('-')[1]] }ForCausalLM"
    )
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    ours = AutoModelForCausalLM.from_pretrained(root / name, trust_remote_code=True).to(torch.float32)
    assert relative(found["logits"], logits(ours)) < 1e-5


def test_remote_code_writes_shim_and_auto_map(tmp_path):
    write_release(tmp_path / "a", SHAPES["v3"]())
    resave(tmp_path / "a", tmp_path / "b", remote_code=True)
    code = [file.name for file in (tmp_path / "b").glob("*.py")]
    assert code == ["hub_deepseek_moe.py"]
    auto_map = fields(tmp_path / "b")["auto_map"]
    assert auto_map["AutoConfig"] == "hub_deepseek_moe.DeepseekV3Config"
    assert auto_map["AutoModelForCausalLM"] == "hub_deepseek_moe.DeepseekV3ForCausalLM"
    for name in auto_map.values():
        assert hasattr(dsm, name.removeprefix("hub_deepseek_moe."))
    # without remote code a save keeps no promise of the shim
    resave(tmp_path / "b", tmp_path / "c")
    assert "auto_map" not in fields(tmp_path / "c")
