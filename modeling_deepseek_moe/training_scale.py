"""The memory of a training step on one of several processes, part by part, from the config and how the model is divided.

What one process holds is that of `training_memory`, divided: tensor parallelism divides heads and the widths of MLPs, expert
parallelism the routed experts, a pipeline the layers; of what is left FSDP2 keeps a share for each data-parallel rank, and DDP all of
it. Communication needs buffers: DDP buckets of all gradients; FSDP2 the layer at work and the next one whole, with the gradients that
are reduced, and embedding, head and final norm whole from the forward to the backward pass.
"""

import copy
import math
from dataclasses import dataclass, replace
from functools import cached_property

from modeling_deepseek_moe.config import DeepseekMoeConfig
from modeling_deepseek_moe.training_memory import (
    FP32,
    LayerBytes,
    TrainingSetup,
    checkpoint_bytes,
    layer_bytes,
    loaded_tensors,
    state_bytes,
    step_moments,
    trained_values,
    update_bytes,
    weight_bytes,
)
from modeling_deepseek_moe.weights import LAYER_KEY

VOCABULARY = ("embed_tokens.", "lm_head.", ".shared_head.head.")
# Of FSDP2's largest layer: the weights of one and of the next; in a backward pass gradients, and the buffer that is reduced.
GATHERED, REDUCED = 2, 2
OPTIMIZER = "optimizer"
EXPERTS, DIVIDED, WHOLE = "experts", "divided", "whole"  # of tensors, by what tensor parallelism does with them
EMBEDDING, HEAD = -1, -2


@dataclass(frozen=True)
class Layout:
    """How many ranks share what; ``expert`` divides ``data``, on whose ranks the experts are spread.

    Attributes:
        sharded: FSDP2 over the data-parallel ranks; else each has a replica (DDP).
    """

    tensor: int = 1
    expert: int = 1
    pipeline: int = 1
    data: int = 1
    sharded: bool = True

    @property
    def ranks(self) -> int:
        return self.tensor * self.pipeline * self.data

    def problem(self, config: DeepseekMoeConfig) -> str | None:
        """Why a model cannot be divided so, with the numbers."""
        experts, layers = config.n_routed_experts or 0, config.num_hidden_layers
        if config.num_attention_heads % self.tensor:
            return f"tensor={self.tensor} does not divide {config.num_attention_heads} heads"
        if self.expert > 1 and (not experts or experts % self.expert):
            return f"expert={self.expert} does not divide {experts} experts"
        if self.data % self.expert:
            return f"expert={self.expert} does not divide {self.data} data-parallel ranks"
        if self.pipeline > layers:
            return f"pipeline={self.pipeline} is more than {layers} layers"
        return None

    def describe(self) -> str:
        """Such as ``EP 8 × FSDP2 16``."""
        named = {"TP": self.tensor, "PP": self.pipeline, "EP": self.expert}
        parts = [f"{name} {count}" for name, count in named.items() if count > 1]
        return " × ".join([*parts, f"{'FSDP2' if self.sharded else 'DDP'} {self.data}"])


@dataclass(frozen=True)
class RankMemory:
    """Bytes of the rank that needs most. ``activations`` are what is kept of the layers, and logits; ``buffers`` are for communication."""

    weights: int
    gradients: int
    moments: int
    activations: int
    buffers: int
    peak: int
    peak_at: str


class ModelSizes:
    """What is loaded and what is trained, by layer and by how it is divided: a sum over a release's tensors, made once.

    Attributes:
        held: bytes as loaded, by layer and kind; ``values`` likewise.
        trained: values by tensor, experts' stacks as one; ``where`` has their layers and kinds.
    """

    def __init__(self, config: DeepseekMoeConfig, setup: TrainingSetup):
        self.config, self.setup = config, setup
        specs, groups = loaded_tensors(config, setup), {}
        for name, spec in specs.items():
            groups.setdefault((self.place(name), kind_of(name)), {})[name] = spec
        self.held = {key: weight_bytes(config, setup, group) for key, group in groups.items()}
        self.values = {key: sum(math.prod(spec.shape) for spec in group.values()) for key, group in groups.items()}
        self.trained = trained_values(specs, setup)
        self.where = {name: (self.place(name), kind_of(name)) for name in self.trained}
        self._layers: dict[tuple[int, int], list[LayerBytes]] = {}

    def narrow(self, tensor: int) -> DeepseekMoeConfig:
        """The part of each layer that a rank of tensor parallelism computes."""
        config = copy.copy(self.config)
        config.num_attention_heads //= tensor
        config.intermediate_size = -(-config.intermediate_size // tensor)
        if config.n_routed_experts:
            config.moe_intermediate_size = -(-config.moe_intermediate_size // tensor)
        config.vocab_size = -(-config.vocab_size // tensor)
        return config

    def layers(self, tensor: int, compute: int) -> list[LayerBytes]:
        """Activations of each layer, without gradients of weights."""
        if (tensor, compute) not in self._layers:
            setup = replace(self.setup, itemsize=compute)
            self._layers[tensor, compute] = list(layer_bytes(self.narrow(tensor), setup, {}, FP32))
        return self._layers[tensor, compute]

    def place(self, name: str) -> int:
        """A tensor's layer, MTP layers with the last one; `EMBEDDING`, or `HEAD` with the final norm."""
        found = LAYER_KEY.match(name)
        if found is None:
            return EMBEDDING if "embed_tokens" in name else HEAD
        return min(int(found[1]), self.config.num_hidden_layers - 1)

    def all_values(self, kind: str | None = None) -> int:
        return sum(values for (_, own), values in self.values.items() if kind in (None, own))


def kind_of(name: str) -> str:
    if ".mlp.experts." in name:
        return EXPERTS
    if any(part in name for part in VOCABULARY):
        return DIVIDED
    return DIVIDED if "_proj" in name and ".indexer." not in name else WHOLE


def rank_memory(
    config: DeepseekMoeConfig,
    setup: TrainingSetup,
    layout: Layout,
    compute: int | None = None,
    sizes: ModelSizes | None = None,
) -> RankMemory:
    """The parts and the peak of a step after the first, on the rank of the pipeline that needs most.

    Args:
        setup: with the batch of one data-parallel rank.
        compute: bytes of an activation and of a gathered weight, if not ``setup.itemsize`` (mixed precision).
        sizes: those of ``config`` and ``setup``, if they were made before.

    Raises:
        ValueError: the model cannot be divided so.
    """
    if (problem := layout.problem(config)) is not None:
        raise ValueError(problem)
    sizes = sizes or ModelSizes(config, setup)
    stages = (_Stage(sizes, layout, compute or setup.itemsize, index) for index in range(layout.pipeline))
    return max((stage.memory() for stage in stages), key=lambda found: found.peak)


class _Stage:
    """What a rank of one stage of the pipeline has."""

    def __init__(self, sizes: ModelSizes, layout: Layout, compute: int, index: int):
        self.sizes, self.layout, self.index = sizes, layout, index
        self.config, self.setup = sizes.config, sizes.setup
        self.compute = replace(self.setup, itemsize=compute)
        self.width = self.setup.itemsize if self.setup.is_full else FP32
        places = {place for place, _ in sizes.held}
        self.places = {place for place in places if self._has(place)}
        self.trained = {name: n for name, n in sizes.trained.items() if sizes.where[name][0] in self.places}

    @property
    def is_last(self) -> bool:
        return self.index == self.layout.pipeline - 1

    def _has(self, place: int) -> bool:
        """Layers in runs of one length; the embedding with the first, norm, head and MTP layers with the last."""
        if place == EMBEDDING:
            return self.index == 0
        return self.is_last if place == HEAD else self._stage_of(place) == self.index

    def _stage_of(self, layer: int) -> int:
        return layer * self.layout.pipeline // self.config.num_hidden_layers

    def _split(self, kind: str) -> int:
        """Over how many ranks tensor and expert parallelism spread a kind of tensor."""
        return {
            EXPERTS: self.layout.tensor * self.layout.expert,
            DIVIDED: self.layout.tensor,
            WHOLE: 1,
        }[kind]

    def _kept(self, kind: str) -> int:
        """Over how many ranks it is spread between steps."""
        if not self.layout.sharded:
            return self._split(kind)
        return self.layout.data * (1 if kind == WHOLE else self.layout.tensor)

    @cached_property
    def own(self) -> dict[str, int]:
        """Trained values of this rank, by tensor."""
        return {name: -(-values // self._kept(self.sizes.where[name][1])) for name, values in self.trained.items()}

    def weights(self) -> int:
        """With an adapter, if there is one."""
        mine = (
            nbytes // self._kept(kind) for (place, kind), nbytes in self.sizes.held.items() if place in self.places
        )
        return sum(mine) + (0 if self.setup.is_full else FP32 * sum(self.own.values()))

    def memory(self) -> RankMemory:
        gradients = self.width * sum(self.own.values())
        moments = state_bytes(self.own, self.setup.optim, self.width)
        layers, logits = self.layers(), self.logits()
        root = self.root() if self.layout.sharded else 0
        whole = root if self.setup.is_full else 0  # gradients of what is gathered as one, until the pass has ended
        times = step_moments(
            self.sizes.narrow(self.layout.tensor), self.compute, layers, self._passed(layers) + whole, logits
        )
        always, passing = (0, root + self.gathered()) if self.layout.sharded else (gradients, 0)
        passing += self.exchanged()
        times = {name: nbytes + passing for name, nbytes in times.items()}
        times[OPTIMIZER] = gradients + update_bytes(self.own.values(), self.setup.optim, self.width)
        at = max(times, key=times.get)
        held = self.weights() + moments + always
        kept = checkpoint_bytes(self.config, self.compute) * len(layers)
        if not self.setup.gradient_checkpointing:
            kept = sum(layer.kept for layer in layers)
        return RankMemory(
            weights=self.weights(),
            gradients=gradients,
            moments=moments,
            activations=kept + logits,
            buffers=always + passing,
            peak=held + times[at],
            peak_at=at,
        )

    def _passed(self, layers: list[LayerBytes]) -> int:
        if self.layout.sharded:
            return sum(layer.gradients for layer in layers)
        return self.width * sum(self.own.values())

    def layers(self) -> list[LayerBytes]:
        """Of this stage; its first ones keep the activations of as many micro-batches as there are stages after it."""
        waiting, last = self.layout.pipeline - self.index, self.config.num_hidden_layers - 1
        learned: dict[int, int] = {}
        for name, values in self.own.items():
            place = self.sizes.where[name][0]
            learned[place] = learned.get(place, 0) + self.width * values
        found = enumerate(self.sizes.layers(self.layout.tensor, self.compute.itemsize))
        return [
            replace(one, kept=one.kept * waiting, gradients=learned.get(layer, 0))
            for layer, one in found
            if min(layer, last) in self.places
        ]

    def logits(self) -> int:
        vocab = -(-self.config.vocab_size // self.layout.tensor)
        return 2 * self.setup.tokens * vocab * self.compute.itemsize if self.is_last else 0

    def gathered(self) -> int:
        """Whole layers that FSDP2 holds for a moment, while it computes one and fetches the next."""
        whole: dict[int, int] = {}
        trained: dict[int, int] = {}
        for (place, kind), values in self.sizes.values.items():
            if place in self.places and place not in (EMBEDDING, HEAD):
                whole[place] = whole.get(place, 0) + values // self._split(kind)
        for name, values in self.trained.items():
            place, kind = self.sizes.where[name]
            if place not in (EMBEDDING, HEAD):
                trained[place] = trained.get(place, 0) + values // self._split(kind)
        most, learned = max(whole.values(), default=0), max(trained.values(), default=0)
        return self.compute.itemsize * (GATHERED * most + REDUCED * learned)

    def root(self) -> int:
        """Embedding, head and final norm, which FSDP2 gathers once a step."""
        mine = (
            values // self._split(kind)
            for (place, kind), values in self.sizes.values.items()
            if place in (EMBEDDING, HEAD) and place in self.places
        )
        return self.compute.itemsize * sum(mine)

    def exchanged(self) -> int:
        """Tokens on their way to other ranks' experts and back, to the next stage, and sums over tensor-parallel ranks."""
        row = self.setup.tokens * self.config.hidden_size * self.compute.itemsize
        experts = 2 * row * (self.config.num_experts_per_tok or 0) if self.layout.expert > 1 else 0
        return experts + (2 * row if self.layout.pipeline > 1 else 0) + (row if self.layout.tensor > 1 else 0)
