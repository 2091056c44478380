"""The MTP layers: against their equation, built from plain transformers' own modules with the file's own tensors."""

import pytest
import torch
import torch.nn.functional as F
from releases import SHAPES, write_release
from transformers import AutoModelForCausalLM
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as plain

from modeling_deepseek_moe import DeepseekV3ForCausalLM


def release(folder, depths=2):
    config = SHAPES["v3"]()
    config.num_nextn_predict_layers = depths
    return config, write_release(folder, config, dtype=torch.float32)


def norm(x, weight):
    return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def by_the_equation(tensors, config, depth, next_ids, hidden):
    """h' = M [RMSNorm(Emb(t_{i+1})); RMSNorm(h_i)] → plain decoder layer → norm, head (V3 report, 2.2)."""
    prefix = f"model.layers.{config.num_hidden_layers + depth}."
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    embedded = norm(F.embedding(next_ids, own["embed_tokens.weight"]), own["enorm.weight"])
    merged = torch.cat((embedded, norm(hidden, own["hnorm.weight"])), dim=-1) @ own["eh_proj.weight"].T
    plain_config = plain.DeepseekV3Config(**config.to_dict(), attn_implementation="eager")
    plain_config._experts_implementation = "eager"
    layer = plain.DeepseekV3DecoderLayer(plain_config, layer_idx=config.num_hidden_layers)
    experts = [own.pop(f"mlp.experts.{e}.{p}_proj.weight") for e in range(16) for p in ("gate", "up", "down")]
    stacked = {
        "mlp.experts.gate_up_proj": torch.stack([torch.cat(experts[3 * e : 3 * e + 2]) for e in range(16)]),
        "mlp.experts.down_proj": torch.stack(experts[2::3]),
    }
    layer.load_state_dict(own | stacked, strict=False)
    length = merged.shape[1]
    rope = plain.DeepseekV3RotaryEmbedding(plain_config)(merged, torch.arange(length)[None])
    causal = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)[None, None]
    hidden = norm(layer(merged, position_embeddings=rope, attention_mask=causal), own["shared_head.norm.weight"])
    return hidden @ own["shared_head.head.weight"].T, hidden


def test_logits_of_each_depth(tmp_path):
    config, tensors = release(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.randint(3, 128, (2, 12))
    with torch.no_grad():
        hidden = reference = model.model(ids).last_hidden_state
        for depth in range(2):
            next_ids = ids.roll(-1 - depth, 1)
            logits, hidden = model.mtp_logits(depth, next_ids, hidden)
            wanted, reference = by_the_equation(tensors, config, depth, next_ids, reference)
            torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="depth 2 asked for, the model has 2"):
        model.mtp_logits(2, ids, hidden)


def test_main_logits_do_not_depend_on_mtp(tmp_path):
    release(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.randint(3, 128, (2, 12))
    wanted = model(ids).logits
    with torch.no_grad():
        for parameter in model.model.mtp_layers.parameters():
            parameter.zero_()
    assert torch.equal(model(ids).logits, wanted)


def test_a_config_that_announces_mtp_the_files_lost(tmp_path, capfd):
    config = SHAPES["v3"]()
    write_release(tmp_path, config)
    model = DeepseekV3ForCausalLM.from_pretrained(tmp_path, num_nextn_predict_layers=1)
    assert len(model.model.mtp_layers) == 0
    assert model.config.num_nextn_predict_layers == 0
    model.save_pretrained(tmp_path / "again")
    AutoModelForCausalLM.from_pretrained(tmp_path / "again")
