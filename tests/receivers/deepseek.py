"""The modules of vLLM's and SGLang's DeepSeek-V2/V3, which differ in a few names: one table of both."""

from collections.abc import Iterator
from dataclasses import dataclass

from receivers.table import DOWN, FLOAT, GATE, UP, Folder, Parameter


@dataclass(frozen=True)
class Names:
    """Where the two engines differ.

    Attributes:
        first: the merged projection of the query's latent and the key-value latent.
        first_at_once: it is filled at once with both concatenated, not shard by shard.
        experts: the module of the routed experts within ``mlp``.
        block: where the decoder layer of an MTP layer lies, after the layer's own prefix.
        draft: the prefix of an MTP layer's own modules.
    """

    first: str
    first_at_once: bool
    experts: str
    block: str
    draft: str
    draft_has_embedding: bool


def main_model(folder: Folder, names: Names) -> dict[str, Parameter]:
    config = folder.config
    found = [
        one
        for layer in range(config.num_hidden_layers)
        for one in decoder(folder, names, layer, f"model.layers.{layer}")
    ]
    found += [_plain("model.embed_tokens.weight", config.vocab_size, config.hidden_size)]
    found += [
        _plain("model.norm.weight", config.hidden_size),
        _plain("lm_head.weight", config.vocab_size, config.hidden_size),
    ]
    return {one.name: one for one in found}


def draft_model(folder: Folder, names: Names) -> dict[str, Parameter]:
    """The MTP layers, which both engines load as a model of its own."""
    config, found = folder.config, []
    width = config.hidden_size
    for layer in range(config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers):
        prefix = names.draft.format(layer=layer)
        found += decoder(folder, names, layer, names.block.format(layer=layer))
        found += [_plain(f"{prefix}.{name}.weight", width) for name in ("enorm", "hnorm", "shared_head.norm")]
        found.append(_plain(f"{prefix}.eh_proj.weight", width, 2 * width))
        if names.draft_has_embedding:
            found.append(_plain(f"{prefix}.shared_head.head.weight", config.vocab_size, width))
    if found and names.draft_has_embedding:
        embedding = {None: ((config.vocab_size, width), FLOAT)}
        found.append(
            Parameter("model.embed_tokens.weight", embedding, twice=True)
        )  # the model's, and the layer's copy
    return {one.name: one for one in found}


def decoder(folder: Folder, names: Names, layer: int, prefix: str) -> Iterator[Parameter]:
    """One layer's parameters; ``layer`` is its number in the folder, by which the config's exceptions are named."""
    config, at = folder.config, f"model.layers.{layer}"
    width = config.hidden_size
    yield _plain(f"{prefix}.input_layernorm.weight", width)
    yield _plain(f"{prefix}.post_attention_layernorm.weight", width)
    yield from _attention(folder, names, at, prefix)
    if not config.is_moe_layer(layer):
        yield from _mlp(folder, f"{at}.mlp", f"{prefix}.mlp", config.intermediate_size)
        return
    yield _plain(f"{prefix}.mlp.gate.weight", config.n_routed_experts, width)
    if config.topk_method == "noaux_tc":
        yield _plain(f"{prefix}.mlp.gate.e_score_correction_bias", config.n_routed_experts)
    inner = config.moe_intermediate_size
    if config.n_shared_experts:
        inside = ".mlp.shared_experts"
        yield from _mlp(folder, at + inside, prefix + inside, config.n_shared_experts * inner)
    module = f"{at}.mlp.experts.0"
    for stack, matrices, shape in (("w13", (GATE, UP), (inner, width)), ("w2", (DOWN,), (width, inner))):
        name = "down_proj" if stack == "w2" else "gate_proj"
        for suffix, slot in folder.linear(f"{module}.{name}", *shape).items():
            experts = {(expert, matrix): slot for expert in range(config.n_routed_experts) for matrix in matrices}
            yield Parameter(f"{prefix}.mlp.{names.experts}.{stack}_{suffix}", experts)


def _attention(folder: Folder, names: Names, at: str, prefix: str) -> Iterator[Parameter]:
    config = folder.config
    heads, latent = config.num_attention_heads, config.kv_lora_rank
    at, prefix = f"{at}.self_attn", f"{prefix}.self_attn"
    keys, query = latent + config.qk_rope_head_dim, heads * config.qk_head_dim
    yield _plain(f"{prefix}.kv_a_layernorm.weight", latent)
    if config.q_lora_rank is None:
        yield from _linear(folder, f"{at}.q_proj", f"{prefix}.q_proj", query, config.hidden_size)
        yield from _linear(
            folder, f"{at}.kv_a_proj_with_mqa", f"{prefix}.kv_a_proj_with_mqa", keys, config.hidden_size
        )
    else:
        yield _plain(f"{prefix}.q_a_layernorm.weight", config.q_lora_rank)
        yield from _linear(folder, f"{at}.q_b_proj", f"{prefix}.q_b_proj", query, config.q_lora_rank)
        rows = (config.q_lora_rank + keys,) if names.first_at_once else (config.q_lora_rank, keys)
        yield from _merged(folder, f"{at}.q_a_proj", f"{prefix}.{names.first}", rows, config.hidden_size)
    yield from _linear(
        folder, f"{at}.kv_b_proj", f"{prefix}.kv_b_proj", heads * (config.qk_nope_head_dim + config.v_head_dim), latent
    )
    yield from _linear(folder, f"{at}.o_proj", f"{prefix}.o_proj", config.hidden_size, heads * config.v_head_dim)


def _mlp(folder: Folder, at: str, prefix: str, inner: int) -> Iterator[Parameter]:
    width = folder.config.hidden_size
    yield from _merged(folder, f"{at}.gate_proj", f"{prefix}.gate_up_proj", (inner, inner), width)
    yield from _linear(folder, f"{at}.down_proj", f"{prefix}.down_proj", width, inner)


def _merged(folder: Folder, module: str, name: str, rows: tuple[int, ...], columns: int) -> Iterator[Parameter]:
    shards = [folder.linear(module, one, columns) for one in rows]
    for suffix in shards[0]:
        slots = {number if len(rows) > 1 else None: shard[suffix] for number, shard in enumerate(shards)}
        yield Parameter(f"{name}.{suffix}", slots)


def _linear(folder: Folder, module: str, name: str, rows: int, columns: int) -> Iterator[Parameter]:
    yield from _merged(folder, module, name, (rows,), columns)


def _plain(name: str, *shape: int) -> Parameter:
    return Parameter(name, {None: (shape, FLOAT)})
