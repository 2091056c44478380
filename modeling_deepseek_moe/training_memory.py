"""How much memory a training step takes at its peak, from the config alone: each part counted, and when it is there.

Weights, an adapter and the optimizer's states are there throughout. A forward pass adds what autograd keeps of each layer; a backward
pass frees that from the last layer to the first and leaves gradients, so that the peak is where both meet, in the loss or in the
optimizer's step. Counted for a CPU, in one dtype without autocast.

Legend: T tokens of a batch, D hidden size, H heads, K experts per token, I width of an MLP, r rank of an adapter.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from modeling_deepseek_moe.config import DeepseekMoeConfig, quantization_fields
from modeling_deepseek_moe.formats import of_config
from modeling_deepseek_moe.weights import TensorSpec, release_tensors

# What a process needs besides: the interpreter with torch, transformers, peft and bitsandbytes.
PROCESS_BYTES = 600_000_000
# What a training adds to that and no tensor has: products that torch and oneDNN compiled, of which `train` has each keep 32 of up to
# 0.6 MB, and holes in the heap between tensors below 1 MiB. Measured beyond the counts were 11 to 78 MB, whatever the model.
RETAINED_BYTES = 40_000_000
FULL, LORA, QLORA = METHODS = ("full", "lora", "qlora")
FP32 = 4
# Bytes that an optimizer keeps of a value, beyond those of the tensors' own dtype; the second for each of their own bytes.
STATES = {
    "sgd": (0, 0),
    "adamw_torch": (0, 2),
    "adamw_torch_fused": (0, 2),
    "adamw_bnb_8bit": (2, 0),
    "adamw_8bit": (2, 0),
    "paged_adamw_8bit": (2, 0),
    "paged_adamw_32bit": (8, 0),
    "lion_8bit": (1, 0),
    "paged_lion_8bit": (1, 0),
    "lion_32bit": (4, 0),
    "paged_lion_32bit": (4, 0),
}
BLOCK_8BIT, SMALL_8BIT = 256, 4096  # values that share a scale, and how many a tensor has at least to be in 8 bits
# fp32 copies of a tensor that bitsandbytes makes of it on a CPU, and that of AdamW one by one, while they update it
COPIES_8BIT, COPIES_TORCH = 6, 2
ADAPTED = ("attention", "dense", "shared experts", "routed experts")
FOUR_BIT = (
    0.5 + 1 / 64 + 4 / (64 * 256)
)  # bytes a value: codes of 4 bits, scales of 8 for 64, and of those fp32 ones for 256


@dataclass(frozen=True)
class TrainingSetup:
    """What is trained, and how.

    Attributes:
        method: ``"full"``, or an adapter on all linear layers and experts: ``"lora"`` on the weights as they are, ``"qlora"`` on
            4-bit ones.
        itemsize: bytes of an activation, and, of ``"full"``, of a weight.
        mtp: whether MTP layers are trained; an adapter's base is loaded without them otherwise.
        accumulates: more than one micro-batch a step, so that gradients are there during the next one's forward pass.

    Raises:
        ValueError: a method or an optimizer that is not among those above, or numbers below 1.
    """

    method: str = FULL
    rank: int = 16
    batch_size: int = 8
    seq_length: int = 1024
    itemsize: int = FP32
    optim: str = "adamw_torch_fused"
    gradient_checkpointing: bool = False
    accumulates: bool = False
    mtp: bool = False

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"method={self.method!r} is not one of {', '.join(METHODS)}")
        if self.optim not in STATES:
            raise ValueError(f"optim={self.optim!r} is not one of those that are counted: {', '.join(STATES)}")
        for name in ("rank", "batch_size", "seq_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")

    @property
    def tokens(self) -> int:
        return self.batch_size * self.seq_length

    @property
    def is_full(self) -> bool:
        return self.method == FULL


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of each part, and of all that is there at the peak; ``peak_at`` says when that is.

    ``activations`` are what autograd keeps of all layers together, ``checkpoints`` their inputs alone; ``logits`` are those of the head with
    their gradient; ``retained`` is what the process keeps without a tensor in it, and about the same for all models.
    """

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    checkpoints: int
    logits: int
    retained: int
    peak: int
    peak_at: str
    trained_parameters: int


@dataclass(frozen=True)
class LayerBytes:
    """Bytes of one layer: kept for the backward pass, made in passing in it, and of the gradients that it leaves."""

    kept: int
    passing: int
    gradients: int


def predict_training_memory(config: DeepseekMoeConfig, setup: TrainingSetup) -> TrainingMemory:
    """The parts and the peak of a training step after the first, which has no optimizer's states yet."""
    specs = loaded_tensors(config, setup)
    trained = trained_values(specs, setup)
    width = setup.itemsize if setup.is_full else FP32  # of what is trained: peft keeps adapters in fp32
    weights = weight_bytes(config, setup, specs)
    adapter = 0 if setup.is_full else FP32 * sum(trained.values())
    optimizer = state_bytes(trained, setup.optim, width)
    layers = list(layer_bytes(config, setup, trained, width))
    gradients = width * sum(trained.values())
    logits = 2 * setup.tokens * config.vocab_size * setup.itemsize
    held = weights + adapter + optimizer
    moments = step_moments(config, setup, layers, gradients, logits)
    moments["optimizer"] = gradients + update_bytes(trained.values(), setup.optim, width)
    peak_at = max(moments, key=moments.get)
    return TrainingMemory(
        weights=weights,
        adapter=adapter,
        gradients=gradients,
        optimizer=optimizer,
        activations=sum(layer.kept for layer in layers),
        checkpoints=len(layers) * checkpoint_bytes(config, setup),
        logits=logits,
        retained=RETAINED_BYTES,
        peak=held + moments[peak_at] + RETAINED_BYTES,
        peak_at=peak_at,
        trained_parameters=sum(trained.values()),
    )


def loaded_tensors(config: DeepseekMoeConfig, setup: TrainingSetup) -> dict[str, TensorSpec]:
    specs = release_tensors(config)
    if setup.is_full or setup.mtp:
        return specs
    return {name: spec for name, spec in specs.items() if spec.part != "mtp"}


def trained_values(specs: dict[str, TensorSpec], setup: TrainingSetup) -> dict[str, int]:
    """Values of each tensor that is trained, by the weight that it is or belongs to; experts' stacks as one tensor.

    MTP layers without their loss have no gradients.
    """
    found: dict[str, int] = {}
    for name, spec in specs.items():
        if name.endswith("e_score_correction_bias") or (spec.part == "mtp" and not setup.mtp):
            continue
        stem, _, rest = name.partition(".mlp.experts.")
        if setup.is_full:
            is_copy = spec.part == "mtp" and name.endswith((".embed_tokens.weight", ".shared_head.head.weight"))
            if not is_copy:
                stack = "down_proj" if "down_proj" in rest else "gate_up_proj"
                key = f"{stem}.mlp.experts.{stack}" if rest else name
                found[key] = found.get(key, 0) + math.prod(spec.shape)
        elif spec.quantized:
            rows, cols = spec.shape
            if not rest:
                found[f"{name}.A"], found[f"{name}.B"] = setup.rank * cols, setup.rank * rows
            elif "up_proj" not in rest:  # gate's and up's are one pair
                rows, key = (rows, "down_proj") if "down_proj" in rest else (2 * rows, "gate_up_proj")
                for half, values in (("A", cols), ("B", rows)):
                    full = f"{stem}.mlp.experts.{key}.{half}"
                    found[full] = found.get(full, 0) + setup.rank * values
    return found


def weight_bytes(config: DeepseekMoeConfig, setup: TrainingSetup, specs: dict[str, TensorSpec]) -> int:
    if setup.is_full:
        return setup.itemsize * sum(math.prod(spec.shape) for spec in specs.values())
    own = of_config(quantization_fields(config)) if setup.method == LORA else None
    total = 0.0
    for spec in specs.values():
        values = math.prod(spec.shape)
        if not spec.quantized:
            total += values * setup.itemsize
        elif setup.method == QLORA:
            total += values * FOUR_BIT
        elif own is None:
            total += values * setup.itemsize
        else:
            total += own.nbytes(values, math.prod(own.scale_shape(spec.shape)))
    return int(total)


def state_bytes(trained: dict[str, int], optim: str, width: int) -> int:
    """Of all tensors; `Trainer` keeps an embedding's in 32 bits where others are in 8."""
    fixed, of_own = STATES[optim]
    total = 0.0
    for name, values in trained.items():
        each = fixed + of_own * width
        if "8bit" in optim:
            is_small = values < SMALL_8BIT or name.endswith("embed_tokens.weight")
            each = fixed * FP32 if is_small else fixed * (1 + FP32 / BLOCK_8BIT)
        total += values * each
    return int(total)


def update_bytes(sizes, optim: str, width: int) -> int:
    """What an optimizer makes in passing of the largest tensor."""
    copies = {"sgd": 0, "adamw_torch_fused": 0, "adamw_torch": COPIES_TORCH * width}
    return max(sizes, default=0) * copies.get(optim, COPIES_8BIT * FP32)


def step_moments(
    config: DeepseekMoeConfig, setup: TrainingSetup, layers: list[LayerBytes], gradients: int, logits: int
) -> dict[str, int]:
    """Bytes besides weights and states in the loss, and in the backward pass of each layer."""
    before = gradients if setup.accumulates else 0
    saved = [checkpoint_bytes(config, setup) if setup.gradient_checkpointing else layer.kept for layer in layers]
    heads = sum(layer.gradients for layer in layers)
    left = gradients - heads  # of the head, the final norm and, in the end, the embedding
    found = {"loss": before + sum(saved) + logits}
    head = config.hidden_size * config.vocab_size * setup.itemsize if setup.is_full else 0
    found["head"] = (before or head) + sum(saved) + logits // 2
    done = head
    for index in reversed(range(len(layers))):
        layer = layers[index]
        done += layer.gradients
        there = sum(saved[:index]) + layer.kept + layer.passing + (before or done)
        found[f"layer {index}"] = there
    found["embedding"] = before or (heads + left)
    return found


def checkpoint_bytes(config: DeepseekMoeConfig, setup: TrainingSetup) -> int:
    return setup.tokens * config.hidden_size * setup.itemsize


def layer_bytes(
    config: DeepseekMoeConfig, setup: TrainingSetup, trained: dict[str, int], width: int
) -> Iterator[LayerBytes]:
    depth = config.num_hidden_layers + (config.num_nextn_predict_layers if setup.mtp else 0)
    for index in range(depth):
        is_moe = config.is_moe_layer(index)
        kept = _attention(config, setup) + (
            _moe(config, setup) if is_moe else _mlp(setup, config.intermediate_size, config.hidden_size)
        )
        kept += 2 * _norm(setup, config.hidden_size)
        if index >= config.num_hidden_layers:  # two norms and eh_proj of both, a norm, and logits of its own
            kept += 3 * _norm(setup, config.hidden_size) + 2 * config.hidden_size * setup.itemsize
            kept += 2 * config.vocab_size * setup.itemsize
        own = width * sum(n for name, n in trained.items() if name.startswith(f"model.layers.{index}."))
        yield LayerBytes(setup.tokens * kept, setup.tokens * _passing(config, setup, is_moe), own)


def _norm(setup: TrainingSetup, size: int) -> int:
    """Of an RMSNorm, a token: its input in fp32; for its weight the normed input, and for the layers after it the output."""
    return FP32 * (size + 1) + (2 * size * setup.itemsize if setup.is_full else 0)


def _low_rank(setup: TrainingSetup, size: int, is_kept: bool = False) -> int:
    """Of an adapter on a linear layer, a token: its input in the adapter's fp32, a copy of what is narrower, and ``r`` values."""
    if setup.is_full:
        return 0
    copy = 0 if setup.itemsize == FP32 and is_kept else FP32 * size
    return copy + FP32 * setup.rank


def _attention(config: DeepseekMoeConfig, setup: TrainingSetup) -> int:
    b, heads, head_dim = setup.itemsize, config.num_attention_heads, config.qk_head_dim
    latent, hidden, value = config.kv_lora_rank, config.hidden_size, config.v_head_dim
    kept = b * (4 * heads * head_dim) + FP32 * heads  # query, key, value as wide, output; log-sum-exp
    kept += b * heads * value if setup.is_full else _low_rank(setup, heads * value)
    kept += b * (latent + config.qk_rope_head_dim) if b == FP32 else 0  # the norm's input is a part of it
    kept += _norm(setup, latent) - (FP32 * latent if b == FP32 else 0) + _low_rank(setup, latent)
    first = 0
    if config.q_lora_rank is None:
        first += _low_rank(setup, hidden)
    else:
        first += _low_rank(setup, hidden) + _norm(setup, config.q_lora_rank) + _low_rank(setup, config.q_lora_rank)
    # of an fp32 input that several adapters share one copy is kept
    return kept + first + _low_rank(setup, hidden, is_kept=True)


def _mlp(setup: TrainingSetup, width: int, hidden: int) -> int:
    """Products of gate and up, and the activation; with an adapter its inputs."""
    kept = 3 * width * setup.itemsize
    if setup.is_full:
        return kept + width * setup.itemsize
    return kept + _low_rank(setup, width) + _low_rank(setup, hidden) + _low_rank(setup, hidden, is_kept=True)


def _moe(config: DeepseekMoeConfig, setup: TrainingSetup) -> int:
    b, hidden, chosen = setup.itemsize, config.hidden_size, config.num_experts_per_tok
    kept = 2 * chosen * config.moe_intermediate_size * b
    kept += FP32 * config.n_routed_experts + chosen * 32
    if not setup.is_full:
        kept += b * hidden  # the experts' input
    elif b != FP32:
        kept += FP32 * hidden  # the router's
    if config.n_shared_experts:
        kept += _mlp(setup, config.n_shared_experts * config.moe_intermediate_size, hidden)
    return kept


def _passing(config: DeepseekMoeConfig, setup: TrainingSetup, is_moe: bool) -> int:
    """Made in passing in a layer's backward pass, a token: gradients of the experts' inputs, or of gate and up."""
    b, hidden = setup.itemsize, config.hidden_size
    if is_moe:
        return b * hidden * (config.num_experts_per_tok + 2)
    return b * (3 * config.intermediate_size + hidden)
