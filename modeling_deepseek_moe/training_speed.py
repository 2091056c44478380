"""How fast several GPUs can train a model at most: bounds by arithmetic, memory and network, for each way to divide it.

    bound per GPU = tokens of a step / (seconds that one of them takes for the step), as if the others took none

Runs that were published reach a quarter of what arithmetic allows (`EFFICIENCY`, and `docs/distributed.md` with each run's error);
memory and network are taken at their full speed, and as if they were used at the same time as the units that compute.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from modeling_deepseek_moe.anatomy import parameter_breakdown
from modeling_deepseek_moe.config import DeepseekMoeConfig
from modeling_deepseek_moe.training_memory import FP32, TrainingSetup
from modeling_deepseek_moe.training_scale import EXPERTS, Layout, ModelSizes, RankMemory, rank_memory

# Of the units' FLOP/s, what DeepSeek's, NVIDIA's and Automodel's runs of DeepSeek-V3 and Kimi-K2 reached: 0.19 to 0.36.
EFFICIENCY = 0.25
BF16 = 2
# A GPU's memory that a process does not get for its tensors: CUDA's context, NCCL's channels, and what the allocator cannot join.
RESERVED = 0.06
OPTIMIZER_PASSES = 7  # an optimizer reads weight, gradient and two moments, and writes all but the gradient
WEIGHT_PASSES = 3  # forward, backward for the inputs, backward for the weights
MOST_STAGES = 16


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU: bytes, dense BF16 and FP8 FLOP/s, and bytes per second of its memory, link to its node, and network."""

    name: str
    memory: int
    flops: float
    flops_fp8: float
    bandwidth: float
    link: float
    network: float

    def tokens_per_second(self, flops: tuple[float, float], fp8: bool = False) -> float:
        """What its units could do at their full speed; ``flops`` are those of `flops_per_token`."""
        layers, rest = flops
        return 1 / (layers / (self.flops_fp8 if fp8 else self.flops) + rest / self.flops)


# From the makers' data sheets; one network adapter for each GPU, of 400 Gb/s where nodes are sold for training.
GPUS = (
    Gpu("RTX 4090", 24 * 10**9, 165e12, 330e12, 1.01e12, 25e9, 3e9),
    Gpu("A100 40GB", 40 * 10**9, 312e12, 312e12, 1.56e12, 300e9, 25e9),
    Gpu("L40S", 48 * 10**9, 362e12, 733e12, 0.86e12, 25e9, 25e9),
    Gpu("H100 80GB", 80 * 10**9, 989e12, 1979e12, 3.35e12, 450e9, 50e9),
    Gpu("H200", 141 * 10**9, 989e12, 1979e12, 4.8e12, 450e9, 50e9),
    Gpu("B200", 180 * 10**9, 2250e12, 4500e12, 7.7e12, 900e9, 50e9),
    Gpu("B300", 288 * 10**9, 2500e12, 5000e12, 8.0e12, 900e9, 100e9),
)


@dataclass(frozen=True)
class Cluster:
    gpu: Gpu
    per_node: int
    nodes: int

    @property
    def ranks(self) -> int:
        return self.per_node * self.nodes


@dataclass(frozen=True)
class Run:
    """One way to train: what a rank holds, whether it fits, and tokens per second and GPU by each bound."""

    layout: Layout
    memory: RankMemory
    fits: bool
    by_flops: float
    by_memory: float
    by_network: float

    @property
    def bound(self) -> float:
        return min(self.by_flops, self.by_memory, self.by_network)

    @property
    def expected(self) -> float:
        """What runs like those that were published would make."""
        return min(EFFICIENCY * self.by_flops, self.by_memory, self.by_network)


def gpu_of(memory: int) -> Gpu:
    """The kind whose memory is nearest, with as much of it as was said."""
    nearest = min(GPUS, key=lambda gpu: abs(math.log(gpu.memory / memory)))
    return replace(nearest, memory=memory)


def flops_per_token(config: DeepseekMoeConfig, setup: TrainingSetup) -> tuple[float, float]:
    """Of a forward and a backward pass: of the layers' weights, 2 for each that a token meets and pass; of head and causal attention.

    Full training makes a pass for the outputs, one for the inputs' gradients and one for the weights'; an adapter spares the last,
    and gradient checkpointing repeats the first. FP8 training computes the first part in FP8.
    """
    sizes = parameter_breakdown(config)
    head, layers = sizes.active["head"].parameters, config.num_hidden_layers
    weights = sizes.active_parameters - sizes.active["embedding"].parameters - head
    if setup.mtp:
        chosen, count = sizes.experts
        idle = sizes.mtp_routed.parameters * (count - chosen) // count if count else 0
        weights += sizes.mtp_parameters - idle - sizes.mtp_copies
        layers, head = layers + sizes.mtp_layers, head * (1 + sizes.mtp_layers)
    # on average half of the row stands before a token
    scores = setup.seq_length * config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
    passes = (WEIGHT_PASSES if setup.is_full else WEIGHT_PASSES - 1) + setup.gradient_checkpointing
    return passes * 2.0 * weights, passes * (2.0 * head + layers * scores)


def training_runs(
    config: DeepseekMoeConfig, setup: TrainingSetup, cluster: Cluster, fp8: bool = False
) -> tuple[Run, ...]:
    """Every layout of the ranks, those that fit first, by the tokens that are expected of them."""
    sizes, by_flops = ModelSizes(config, setup), cluster.gpu.tokens_per_second(flops_per_token(config, setup), fp8)
    made = [_run(sizes, cluster, layout, by_flops) for layout in layouts(config, cluster)]
    return tuple(sorted(made, key=lambda run: (not run.fits, -run.expected if run.fits else run.memory.peak)))


def layouts(config: DeepseekMoeConfig, cluster: Cluster) -> Iterator[Layout]:
    """Tensor parallelism within a node, experts over data-parallel ranks, stages of whole nodes or within one."""
    for tensor in _powers(cluster.per_node):
        for pipeline in _powers(min(MOST_STAGES, cluster.ranks // tensor)):
            if cluster.ranks % (tensor * pipeline):
                continue
            data = cluster.ranks // (tensor * pipeline)
            for expert in _powers(min(data, 64)):
                for sharded in (True, False) if data > 1 else (False,):
                    layout = Layout(tensor, expert, pipeline, data, sharded)
                    if layout.problem(config) is None:
                        yield layout


def _powers(most: int) -> Iterator[int]:
    return (2**power for power in range(max(1, most).bit_length()))


def _run(sizes: ModelSizes, cluster: Cluster, layout: Layout, by_flops: float) -> Run:
    config, setup, gpu = sizes.config, sizes.setup, cluster.gpu
    memory = rank_memory(config, setup, layout, BF16, sizes)
    tokens = setup.tokens / (layout.tensor * layout.pipeline)  # whose ranks work on the same ones
    inside, outside = _network_traffic(sizes, layout, cluster)
    seconds = inside / gpu.link + outside / gpu.network
    return Run(
        layout=layout,
        memory=memory,
        fits=memory.peak <= gpu.memory * (1 - RESERVED),
        by_flops=by_flops,
        by_memory=tokens / (_memory_traffic(sizes, layout, memory) / gpu.bandwidth),
        by_network=tokens / seconds if seconds else math.inf,
    )


def _whole(sizes: ModelSizes, layout: Layout) -> float:
    """Weights that a rank computes with, once they are gathered."""
    experts = sizes.all_values(EXPERTS)
    return (experts / layout.expert + sizes.all_values() - experts) / (layout.tensor * layout.pipeline)


def _memory_traffic(sizes: ModelSizes, layout: Layout, memory: RankMemory) -> float:
    setup = sizes.setup
    passes = WEIGHT_PASSES if setup.is_full else WEIGHT_PASSES - 1
    own = memory.gradients / (setup.itemsize if setup.is_full else FP32)
    activations = sum(layer.kept for layer in sizes.layers(layout.tensor, BF16)) / layout.pipeline
    return passes * BF16 * _whole(sizes, layout) + OPTIMIZER_PASSES * FP32 * own + 2 * activations


def _network_traffic(sizes: ModelSizes, layout: Layout, cluster: Cluster) -> tuple[float, float]:
    """Bytes that a GPU sends in a step: within its node, and between nodes."""
    config, setup, sent = sizes.config, sizes.setup, [0.0, 0.0]

    def send(nbytes: float, ranks: int, apart: int) -> None:
        """Among ``ranks`` that lie ``apart`` ranks from each other; the part that stays in the node goes over its link."""
        if ranks > 1:
            inside = max(1, min(ranks, cluster.per_node // apart))
            total = nbytes * (ranks - 1) / ranks
            outside = total * (ranks - inside) / (ranks - 1)
            sent[0] += total - outside
            sent[1] += outside

    whole, share = _whole(sizes, layout), layout.tensor * layout.pipeline
    learned = whole if setup.is_full else sum(sizes.trained.values()) / share
    if (
        layout.sharded
    ):  # gathered twice and reduced once; in rings that pass a node's border once for each of its ranks
        send((2 * whole + learned) * BF16, layout.data, layout.tensor)
    else:
        send(2 * learned * FP32, layout.data, layout.tensor)
    row = setup.tokens * config.hidden_size * BF16
    moe = sum(config.is_moe_layer(layer) for layer in range(config.num_hidden_layers)) / layout.pipeline
    passes = 2 * (2 + setup.gradient_checkpointing)  # there and back, in each pass
    send(passes * moe * row * (config.num_experts_per_tok or 0) / layout.tensor, layout.expert, layout.tensor)
    send(2 * passes * config.num_hidden_layers / layout.pipeline * row, layout.tensor, 1)
    return sent[0], sent[1]
