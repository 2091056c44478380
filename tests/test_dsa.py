"""DeepSeek Sparse Attention next to plain transformers: numbers, tokens, choices, caches, and what is refused."""

import json
from functools import cache, partial

import pytest
import torch
import transformers
from families import FIELDS, write_family
from releases import same_bits
from safetensors.torch import load_file, save_file
from test_generation import cacheless
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

import modeling_deepseek_moe as dsm
from modeling_deepseek_moe import CheckpointError, read_config
from modeling_deepseek_moe.cache import IndexedLatentLayer
from modeling_deepseek_moe.compat import CACHE_NAME
from modeling_deepseek_moe.indexer import DeepseekIndexer
from modeling_deepseek_moe.ops.indexer import reference
from modeling_deepseek_moe.ops.sparse_attention import reference as attention
from modeling_deepseek_moe.sparse_attention import DeepseekSparseAttention

KINDS = {
    "deepseek_v32": ("DeepseekV32Config", "DeepseekV32ForCausalLM"),
    "glm_moe_dsa": ("GlmMoeDsaConfig", "GlmMoeDsaForCausalLM"),
}
GREEDY = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
TOPK = FIELDS["deepseek_v32"]["index_topk"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    @cache
    def of(kind, fp8=False):
        folder = tmp_path_factory.mktemp(kind)
        write_family(folder, kind, fp8=fp8)
        return folder

    return of


@pytest.fixture(scope="module", params=list(KINDS))
def pair(request, folders):
    """This package's model and plain transformers', of the same weights in fp32."""
    folder = folders(request.param)
    ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    config_class, model_class = (getattr(transformers, name) for name in KINDS[request.param])
    theirs = model_class.from_pretrained(folder, config=config_class.from_pretrained(folder), dtype=torch.float32)
    return ours, theirs.eval()


def prompt(rows=1, length=30):
    return torch.randint(3, 128, (rows, length), generator=torch.Generator().manual_seed(rows * 100 + length))


def padded(rows=3, length=30):
    ids, mask = prompt(rows, length), torch.ones(rows, length, dtype=torch.long)
    for row in range(rows):
        mask[row, : 7 * row] = 0
    return ids * mask, mask


def choices_of(model, kind):
    """What each indexer of a model chooses from here on."""
    found = []
    for module in model.modules():
        if type(module).__name__ == kind:
            module.register_forward_hook(lambda module, args, output: found.append(output))
    return found


@pytest.mark.parametrize("length", [TOPK, TOPK + 1, 40])
def test_numbers_are_those_of_transformers(pair, length):
    ours, theirs = pair
    ids = prompt(2, length)
    with torch.no_grad():
        assert (ours(ids).logits - theirs(input_ids=ids).logits).abs().max() < 1e-4


def test_choices_are_those_of_transformers(pair):
    ours, theirs = pair
    hooks = [module for module in ours.modules() if isinstance(module, DeepseekIndexer)]
    mine = choices_of(ours, "DeepseekIndexer")
    others = choices_of(
        theirs, type(next(m for m in theirs.modules() if type(m).__name__.endswith("Indexer"))).__name__
    )
    ids = prompt(2, 40)
    with torch.no_grad():
        ours(ids), theirs(input_ids=ids)
    full = sum(ours.config.has_indexer(layer) for layer in range(3))
    assert len(mine) == len(others) == full and len(hooks) == full + 1
    for own, other in zip(mine, others, strict=True):
        for row in range(2):
            for query in range(TOPK - 1, 40):  # before, plain chooses what its mask then takes away
                assert set(own[row, query].tolist()) == set(other[row, query].tolist())
            assert own[row, 3].tolist() == [0, 1, 2, 3] + [-1] * (TOPK - 4)
    for module in (*ours.modules(), *theirs.modules()):
        module._forward_hooks.clear()


@pytest.mark.parametrize("length", [3, 30])
def test_tokens_are_those_of_transformers(pair, length):
    """From below ``index_topk`` to beyond, and beyond from the start, with and without padding."""
    ours, theirs = pair
    ids = prompt(2, length)
    assert torch.equal(ours.generate(ids, **GREEDY), theirs.generate(input_ids=ids, **GREEDY))
    ids, mask = padded()
    found = ours.generate(ids, attention_mask=mask, **GREEDY)
    assert torch.equal(found, theirs.generate(input_ids=ids, attention_mask=mask, **GREEDY))


CACHES = {
    "none": lambda model: None,
    "without a config": lambda model: DynamicCache(),
    "dynamic": lambda model: DynamicCache(config=model.config),
    "static": lambda model: StaticCache(config=model.config, max_cache_len=64),
}


@pytest.mark.parametrize("kind", list(CACHES))
@pytest.mark.parametrize("length", [3, 30])
def test_caches_agree_with_no_cache(pair, kind, length):
    ours, _ = pair
    ids, mask = padded(2, length) if length > 14 else (prompt(2, length), torch.ones(2, length, dtype=torch.long))
    given = CACHES[kind](ours)
    settings = {} if given is None else {CACHE_NAME: given}
    found = ours.generate(ids, attention_mask=mask, **settings, **GREEDY)
    assert torch.equal(found, cacheless(ours, ids, mask, 12))
    if kind == "without a config":
        first = given.layers[0]
        assert all(type(layer) is IndexedLatentLayer for layer in given.layers)
        assert first.indexer_keys.shape == (2, length + 11, 16)
        assert first._key_buffer.data_ptr() == first.indexer_keys.data_ptr()  # not copied for the last token


def test_a_prompt_in_pieces_is_the_whole(pair):
    ours, _ = pair
    ids, given = prompt(2, 30), DynamicCache()
    with torch.no_grad():
        pieces = [ours(part, **{CACHE_NAME: given}).logits for part in ids.split([5, 1, 4, 12, 8], dim=1)]
        assert (torch.cat(pieces, dim=1) - ours(ids).logits).abs().max() < 1e-4


def test_rows_of_a_cache_move_and_go(pair):
    """Reordered and repeated for beams, cropped for drafts that were wrong: as if it had been so from the start."""
    ours, _ = pair
    ids, order = prompt(3, 24), torch.tensor([2, 0, 0])
    with torch.no_grad():
        given, fresh = DynamicCache(), DynamicCache()
        ours(ids, **{CACHE_NAME: given})
        given.crop(-4)
        given.reorder_cache(order)
        ours(ids[order, :20], **{CACHE_NAME: fresh})
        for _ in range(2):  # the first update after that copies, the next does not
            step = [ours(ids[:, 20:21], **{CACHE_NAME: one}).logits for one in (given, fresh)]
            assert (step[0] - step[1]).abs().max() < 1e-4
    beams = {"num_beams": 3, "do_sample": False, "max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(ours.generate(ids, **beams), ours.generate(ids, use_cache=False, **beams))


def test_packed_rows_are_as_if_alone(pair):
    ours, _ = pair
    ids = prompt(1, 40)
    positions = torch.cat((torch.arange(25), torch.arange(15)))[None]
    with torch.no_grad():
        packed = ours(ids, position_ids=positions, use_cache=False).logits
        alone = torch.cat((ours(ids[:, :25]).logits, ours(ids[:, 25:]).logits), dim=1)
    assert (packed - alone).abs().max() < 1e-4


def test_a_dense_mask_is_taken_as_it_is(pair):
    ours, _ = pair
    ids, mask = padded(2, 30)
    causal = torch.ones(30, 30).tril().bool()
    dense = (causal & mask.bool()[:, None])[:, None]
    with torch.no_grad():
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        by_key = ours(ids, attention_mask=mask, position_ids=positions).logits
        by_pair = ours(ids, attention_mask=dense, position_ids=positions).logits
    assert (by_key - by_pair)[mask.bool()].abs().max() < 1e-4


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["whole", "reentrant", "checkpointed"])
def test_gradients_are_those_of_transformers(pair, checkpointing):
    """A shared layer that is run once more takes the choice that it took before."""
    ours, theirs = pair
    ids = prompt(2, 30)
    ours.train()
    if checkpointing is not None:
        ours.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        ours.enable_input_require_grads()
    ours(ids, labels=ids, use_cache=False).loss.backward()
    theirs(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    wanted = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        if name in wanted and wanted[name] is not None:
            assert (parameter.grad - wanted[name]).abs().max() < 1e-4, name
    assert all(p.grad is None for n, p in ours.named_parameters() if ".indexer." in n)
    ours.gradient_checkpointing_disable()
    ours.eval().zero_grad()
    theirs.zero_grad()


def test_an_indexer_that_sees_few_keys_changes_nothing(folders, tmp_path):
    """Below ``index_topk`` the model is DeepSeek-V3 bit by bit."""
    folder = folders("deepseek_v32")
    tensors = load_file(folder / "model.safetensors")
    fields = json.loads((folder / "config.json").read_text())
    fields = {name: value for name, value in fields.items() if not name.startswith("index")}
    (tmp_path / "config.json").write_text(json.dumps(fields | {"model_type": "deepseek_v3"}))
    dense = {name: tensor for name, tensor in tensors.items() if ".indexer." not in name}
    save_file(dense, tmp_path / "model.safetensors", metadata={"format": "pt"})
    sparse = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    v3 = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(sparse(prompt(2, TOPK)).logits, v3(prompt(2, TOPK)).logits)
        assert not torch.equal(sparse(prompt(2, 40)).logits, v3(prompt(2, 40)).logits)


@pytest.mark.parametrize("length", [3072, pytest.param(16384, marks=pytest.mark.long)])
def test_nothing_of_queries_times_keys_is_made(length, monkeypatch):
    """A padded prompt through two layers: no tensor has as many numbers as it has pairs of tokens."""
    padding, largest, workspace = 5, 0, min(1 << 20, length**2 // 36)
    fields = {"num_hidden_layers": 2, "vocab_size": 32, "hidden_size": 16, "index_topk": 16, "index_n_heads": 1}
    fields |= {"num_attention_heads": 1, "num_key_value_heads": 1, "n_routed_experts": None, "q_lora_rank": 8}
    model = dsm.DeepseekV32Model(dsm.DeepseekV32Config(**FIELDS["deepseek_v32"] | fields)).eval()
    for module in (reference, attention):
        monkeypatch.setattr(module, "WORKSPACE", workspace)

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, arguments=(), keywords=None):
            nonlocal largest
            result = function(*arguments, **keywords or {})
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.untyped_storage().nbytes() // result.element_size())
            return result

    mask = (torch.arange(length) >= padding).long()[None]
    for positions in (None, (mask.cumsum(-1) - 1).clamp(min=0)):  # the latter as `generate` does
        with torch.no_grad(), Watch():
            model(torch.full((1, length), 5), attention_mask=mask, position_ids=positions, use_cache=True)
    assert workspace / 4 < largest <= 2 * workspace < length**2 / 16


@pytest.mark.parametrize("kind", list(KINDS))
def test_mtp_drafts_and_the_text_is_the_same(folders, kind):
    model = AutoModelForCausalLM.from_pretrained(folders(kind), dtype=torch.float32).eval()
    assert model.model.mtp_layers[0].self_attn.indexer is not None
    for rows, settings in ((3, {}), (1, {"cache_implementation": "static"})):
        ids, mask = padded(rows, 20)
        wanted = model.generate(ids, attention_mask=mask, **GREEDY, **settings)
        found = model.generate(ids, attention_mask=mask, use_mtp=2, **GREEDY, **settings)
        assert torch.equal(found, wanted) and model.draft_stats.steps


@pytest.mark.parametrize("kind", list(KINDS))
def test_fp8_keeps_the_head_weights_of_indexers(folders, tmp_path, kind):
    """In blocks of 128 as the release has them: codes of ``wq_b`` and ``wk``, the rest floating-point."""
    model = AutoModelForCausalLM.from_pretrained(folders(kind, fp8=True)).eval()
    indexer = model.model.layers[0].self_attn.indexer
    assert indexer.wq_b.weight.dtype == indexer.wk.weight.dtype == torch.float8_e4m3fn
    assert indexer.weights_proj.weight.dtype == indexer.k_norm.bias.dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    saved, wanted = (load_file(folder / "model.safetensors") for folder in (tmp_path, folders(kind, fp8=True)))
    assert saved.keys() == wanted.keys() and all(same_bits(saved[name], wanted[name]) for name in saved)
    ids, mask = padded(2, 20)
    assert torch.equal(model.generate(ids, attention_mask=mask, **GREEDY), cacheless(model, ids, mask, 12))


def damaged(folder, target, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text((folder / "config.json").read_text())


DAMAGES = {
    "missing": (
        lambda tensors: tensors.pop("model.layers.1.self_attn.indexer.k_norm.bias"),
        r"layers\.1\.self_attn\.indexer\.k_norm\.bias: found no such tensor, wanted \[16\]",
    ),
    "misshapen": (
        lambda tensors: tensors.update({"model.layers.0.self_attn.indexer.wk.weight": torch.zeros(8, 64).bfloat16()}),
        r"layers\.0\.self_attn\.indexer\.wk\.weight: found shape \[8, 64\], wanted \[16, 64\]",
    ),
    "unknown": (
        lambda tensors: tensors.update({"model.layers.0.self_attn.indexer.gain.weight": torch.zeros(4)}),
        r"layers\.0\.self_attn\.indexer\.gain\.weight: found an indexer's tensor, wanted wq_b\.weight, .* and no other of an indexer",
    ),
    "beyond": (
        lambda tensors: tensors.update({"model.layers.9.self_attn.indexer.wk.weight": torch.zeros(16, 64)}),
        r"layers\.9\.self_attn\.indexer\.wk\.weight: found layer 9, wanted \d layers",
    ),
}


@pytest.mark.parametrize("case", list(DAMAGES))
def test_a_damaged_indexer_is_refused(folders, tmp_path, case):
    change, message = DAMAGES[case]
    damaged(folders("deepseek_v32"), tmp_path, change)
    with pytest.raises(CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_an_indexer_in_a_layer_that_shares_is_refused(folders, tmp_path):
    name = "model.layers.2.self_attn.indexer.wk.weight"
    damaged(folders("glm_moe_dsa"), tmp_path, lambda tensors: tensors.update({name: torch.zeros(16, 64).bfloat16()}))
    with pytest.raises(
        CheckpointError, match=r"layers\.2.*an indexer's tensor, wanted .*indexer_types shares in layer 2"
    ):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_v32_labelled_deepseek_v3_is_refused(folders, tmp_path):
    damaged(folders("deepseek_v32"), tmp_path, lambda tensors: None)
    fields = json.loads((tmp_path / "config.json").read_text()) | {"model_type": "deepseek_v3"}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="index_topk=8: sparse attention"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({n: v for n, v in fields.items() if not n.startswith("index")}))
    with pytest.raises(CheckpointError, match=r"indexer\.\S+: found an indexer's tensor"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


BAD = {
    "index_topk=0 must be at least 1": {"index_topk": 0},
    "index_topk=-5 must be at least 1": {"index_topk": -5},
    "index_n_heads=0 must be at least 1": {"index_n_heads": 0},
    "index_head_dim=4 must be at least 8": {"index_head_dim": 4},
    "q_lora_rank=None must be a rank": {"q_lora_rank": None},
    "layer_types=.* must be 'indexed_attention'": {"layer_types": ["full_attention"] * 3},
    r"indexer_types=\['full'\] must say": {"indexer_types": ["full"]},
    "indexer_types=.*'half'.* must say": {"indexer_types": ["full", "half", "full"]},
    "indexer_types=.* must say 'full' of the first layer": {"indexer_types": ["shared", "full", "full"]},
    "index_topk_pattern='FXS' must say": {"indexer_types": None, "index_topk_pattern": "FXS"},
}


@pytest.mark.parametrize("message", list(BAD))
def test_fields_are_refused_by_name(tmp_path, message):
    (tmp_path / "config.json").write_text(json.dumps(FIELDS["glm_moe_dsa"] | BAD[message]))
    with pytest.raises(ValueError, match=message):
        read_config(tmp_path)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"index_topk_freq": 4},
        {"index_topk_freq": 4, "index_skip_topk_offset": 3},
        {"index_topk_pattern": "FFSSFSSS"},
    ],
)
def test_layers_share_as_in_transformers(fields):
    sizes = {"num_hidden_layers": 8}
    wanted = transformers.GlmMoeDsaConfig(**sizes, **fields).indexer_types
    config = dsm.GlmMoeDsaConfig(**sizes, **fields)
    assert config.layer_indexers() == wanted and config.has_indexer(8)
    choosers = [
        DeepseekSparseAttention(
            dsm.GlmMoeDsaConfig(**FIELDS["glm_moe_dsa"] | sizes | {"indexer_types": wanted, "mlp_layer_types": None}),
            layer,
        ).chooser
        for layer in range(8)
    ]
    assert choosers == [max(i for i in range(layer + 1) if wanted[i] == "full") for layer in range(8)]


def test_wishes_that_sparse_attention_has_not_are_refused(pair):
    ours, _ = pair
    ids = prompt(1, 20)
    model = partial(ours, use_cache=False)
    ours.set_attn_implementation("eager")
    with torch.no_grad():
        assert len(model(ids[:, :TOPK], output_attentions=True).attentions) == 3
        for wish in ({"output_attentions": True}, {"mla_path": "expanded"}):
            with pytest.raises(ValueError, match=f"{next(iter(wish))}=.*at most index_topk={TOPK}"):
                model(ids, **wish)
    ours.set_attn_implementation("sdpa")
    starts = ours.init_continuous_batching, partial(ours.generate_batch, [[3, 4, 5]])
    for call in (*starts, lambda: ours.continuous_batching_context_manager().__enter__()):
        with pytest.raises(ValueError, match=f"continuous batching: found model_type='{ours.config.model_type}'"):
            call()


def test_a_cache_without_room_for_keys_is_refused(pair, folders):
    ours, _ = pair
    filled = DynamicCache()
    for layer in range(3):
        filled.update(torch.zeros(1, 1, 4, 32), torch.zeros(1, 1, 4, 8), layer)
    with pytest.raises(ValueError, match="layer 0: found 4 tokens without the indexer's keys"):
        ours(prompt(1, 3), **{CACHE_NAME: filled})
    other = AutoModelForCausalLM.from_pretrained(folders("deepseek_v32"), dtype=torch.float32).config
    plain = transformers.DeepseekV3Config(num_hidden_layers=3)
    static = StaticCache(config=plain, max_cache_len=32)
    assert other.has_indexers
    with pytest.raises(ValueError, match="layer 0: found StaticLayer, which holds no keys of an indexer"):
        ours(prompt(1, 3), **{CACHE_NAME: static})
