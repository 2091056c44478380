"""Tools that load a folder by themselves, next to plain transformers; the command line's tokenizers."""

import json
import shutil
import sys

import pytest
import torch
import transformers
from releases import write_tiny_fp32
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import modeling_deepseek_moe as dsm
from modeling_deepseek_moe.cli._model import load_tokenizer
from modeling_deepseek_moe.cli._train_data import load_documents
from modeling_deepseek_moe.tokens import encode_text

pytestmark = pytest.mark.tools

TEXT = "Question: Solve x + 4 = 11 for x.\nAnswer:"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_fp32(tmp_path_factory.mktemp("fp32"))


def test_pipeline_is_generate(folder):
    pipe = pipeline("text-generation", model=str(folder), device="cpu")
    assert type(pipe.model) is dsm.DeepseekV3ForCausalLM
    ids = pipe.tokenizer(TEXT, return_tensors="pt")
    made = pipe.model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids.input_ids.shape[1] :]
    found = pipe(TEXT, max_new_tokens=12, do_sample=False, return_full_text=False)[0]["generated_text"]
    assert found == pipe.tokenizer.decode(made, skip_special_tokens=True) and found


def test_serve_with_the_documented_line(folder, monkeypatch):
    from transformers.cli.serving.model_manager import ModelManager

    names = sys.modules["transformers"]  # which transformers replaces while it is imported
    monkeypatch.setattr(names, "DeepseekV3ForCausalLM", AutoModelForCausalLM)
    (served,) = ModelManager(device="cpu", force_model=str(folder)).loaded_models.values()
    assert type(served.model) is dsm.DeepseekV3ForCausalLM


def test_lm_eval_hf_as_plain(folder):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    ours = HFLM(str(folder), device="cpu", dtype="float32", batch_size=1)
    assert type(ours.model) is dsm.DeepseekV3ForCausalLM
    config = transformers.DeepseekV3Config.from_pretrained(folder)
    model = transformers.DeepseekV3ForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32)
    theirs = HFLM(model, tokenizer=AutoTokenizer.from_pretrained(folder), device="cpu", batch_size=1)
    scored = [Instance("loglikelihood", {}, (TEXT, text), 0) for text in (" x = 7", " no")]
    for found, wanted in zip(ours.loglikelihood(scored), theirs.loglikelihood(scored), strict=True):
        assert found[0] == pytest.approx(wanted[0], abs=1e-3) and found[1] == wanted[1]
    asked = [Instance("generate_until", {}, (TEXT, {"until": ["\n"], "max_gen_toks": 12}), 0)]
    assert ours.generate_until(asked) == theirs.generate_until(asked)


@pytest.mark.parametrize("asked", [True, False])
def test_bos_as_the_release_says(folder, tmp_path, asked):
    shutil.copytree(folder, tmp_path / "bos")
    file = tmp_path / "bos" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"add_bos_token": asked}))
    tokenizer = load_tokenizer(tmp_path / "bos")
    bare = tokenizer(TEXT, add_special_tokens=False).input_ids
    wanted = [tokenizer.bos_token_id, *bare] if asked else bare
    assert encode_text(tokenizer, TEXT) == wanted
    assert encode_text(tokenizer, tokenizer.bos_token + TEXT) == [tokenizer.bos_token_id, *bare]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": TEXT}))
    row = load_documents(str(tmp_path / "rows.jsonl"), tokenizer, 512, False)[0]["input_ids"]
    assert row[: len(wanted)] == wanted


def test_tokenizers_that_are_code_name_the_option(tmp_path):
    (tmp_path / "tiktoken.model").write_text("")
    table = {"auto_map": {"AutoTokenizer": ["tokenization_here.Here", None]}, "tokenizer_class": "Here"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(table))
    (tmp_path / "tokenization_here.py").write_text("raise RuntimeError('executed')")
    with pytest.raises(ValueError, match="--trust-remote-code"):
        load_tokenizer(tmp_path)
    with pytest.raises(RuntimeError, match="executed"):
        load_tokenizer(tmp_path, trust_remote_code=True)
