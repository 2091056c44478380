"""What a saved folder says of itself: unknown fields, generation settings, RoPE in either spelling."""

import json

import torch
from releases import (
    SHAPES,
    YARN,
    write_release,
)
from test_save_load import (
    FORMATS,
    KINDS,
    assert_same_fields,
    edit_config,
    fields,
    logits,
    resave,
)

UNKNOWN = {
    "ep_size": 1,
    "aux_loss_alpha": 0.001,
    "seq_aux": True,
    "nested": {"a": [1, {"b": None}], "c": 2.0},
    "nothing": None,
    "a_list": [],
}


@FORMATS
@KINDS
def test_unknown_fields_survive(tmp_path, kind, fp8):
    write_release(tmp_path / "a", SHAPES[kind](), fp8=fp8)
    edit_config(tmp_path / "a", **UNKNOWN)
    resave(tmp_path / "a", tmp_path / "b")
    assert_same_fields(fields(tmp_path / "b"), fields(tmp_path / "a") | UNKNOWN)


def test_foreign_code_is_not_announced(tmp_path):
    """A release's ``auto_map`` names files that a save does not copy."""
    write_release(tmp_path / "a", SHAPES["v3"]())
    edit_config(tmp_path / "a", auto_map={"AutoConfig": "configuration_deepseek.DeepseekV3Config"})
    resave(tmp_path / "a", tmp_path / "b")
    assert "auto_map" not in fields(tmp_path / "b")


def test_generation_config_survives(tmp_path):
    write_release(tmp_path / "a", SHAPES["v3"]())
    wanted = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "eos_token_id": [2, 7]}
    (tmp_path / "a" / "generation_config.json").write_text(json.dumps(wanted))
    resave(tmp_path / "a", tmp_path / "b")
    assert_same_fields(json.loads((tmp_path / "b" / "generation_config.json").read_text()), wanted)


def test_rope_in_either_spelling(tmp_path):
    """Both spellings mean the same, and the release's is what is written."""
    write_release(tmp_path / "old", SHAPES["v3"]())
    write_release(tmp_path / "new", SHAPES["v3"]())
    old = fields(tmp_path / "old")
    assert old["rope_scaling"] == YARN
    assert "rope_parameters" not in old
    new = {name: value for name, value in old.items() if name not in ("rope_scaling", "rope_theta")}
    parameters = {name: value for name, value in YARN.items() if name != "type"}
    new["rope_parameters"] = parameters | {"rope_type": "yarn", "rope_theta": old["rope_theta"]}
    (tmp_path / "new" / "config.json").write_text(json.dumps(new))
    models = [resave(tmp_path / name, tmp_path / f"{name}-saved") for name in ("old", "new")]
    assert torch.equal(logits(models[0]), logits(models[1]))
    for name in ("old-saved", "new-saved"):
        assert_same_fields(fields(tmp_path / name), old)
        assert "rope_parameters" not in fields(tmp_path / name)


def test_plain_rope(tmp_path):
    write_release(tmp_path / "a", SHAPES["moonlight"]())
    edit_config(tmp_path / "a", rope_theta=50000.0, rope_scaling=None)
    model = resave(tmp_path / "a", tmp_path / "b")
    assert model.config.rope_parameters["rope_theta"] == 50000.0
    assert_same_fields(fields(tmp_path / "b"), {"rope_theta": 50000.0, "rope_scaling": None})
