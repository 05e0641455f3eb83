"""Memory of one process and its network volume for each way of sharing a run, as closed formulas over plain integers.

P parameters, N processes, c bytes of a model weight (4 in fp32, 2 in bf16). What the engines hold, checked against real
objects and, for DeepSpeed 0.19.8, against its source (runtime/zero/stage_1_and_2.py, stage3.py,
partitioned_param_coordinator.py) and runs of two processes:

- single, ddp: weights 4P, gradients 4P (DDP's buckets are the gradients, `gradient_as_bucket_view`), AdamW moments 8P.
- fsdp (FSDP2, fp32): every tensor cut along its first axis into ceil(rows / N) rows, so a (14, 64, 64) tensor takes
  2/14 of itself on 8 processes; weights, gradients, moments 4 + 4 + 8 bytes of that. The root unit (embedding, head)
  stays gathered through forward and backward, and so do its gradients until the end; two layers are in flight.
- ZeRO-1 and -2: one flat tensor of all weights, padded to a multiple of 2N. It stays whole (c P), also in fp32 beside
  the fp32 masters of the partition (4P/N); moments 8P/N. Gradients: stage 1 all of them until the step (c P); stage 2
  those of every tensor that overlaps the partition, whole tensors (so an embedding larger than P/N counts in full), and
  with several micro-batches twice: the sum so far and the new ones. In the step a flat fp32 copy of the partition's.
- ZeRO-3: each tensor cut into ceil(n / N) elements: weights c, fp32 masters 4 (also beside fp32 weights: no sharing),
  moments 8, one flat buffer of gradients c. Tensors of up to 100,000 elements stay whole besides. A gathered weight is
  given back only when its next use is 1e9 elements of weights away: up to 5e8 elements stay gathered from forward to
  backward, which is a whole small model.
- Every stage allocates its reduce bucket in full (c bytes an element; here as many elements as the model has, at most
  DeepSpeed's own 5e8), and a reduction flattens what is in it into a copy.
- autocast keeps a bf16 copy of the weights (2P) with fp32 weights under every strategy; none with bf16 weights.
- The optimizer offloaded: masters, moments and fp32 gradients of the partition in host memory; on the device stage 1
  keeps its gradients, stage 2 one tensor's. On NVMe the host keeps gradients and swap buffers.

Exact: weights, gradients, moments, masters, bucket. Estimates: activations (metrics/throughput.py), layers in flight of
FSDP and ZeRO-3, swap buffers. Not counted: the CUDA context, fragmentation, NCCL's own buffers.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from math import prod

from pldr_train.metrics.throughput import flops_per_token, memory_estimate
from pldr_train.recipe import ModelSection
from pldr_train.recipe.schema import Recomputed

STRATEGIES = ("single", "ddp", "fsdp", "zero-1", "zero-2", "zero-3")
DEFAULT_BUCKET_ELEMENTS = 500_000_000
"""DeepSpeed's reduce_bucket_size; a smaller model gets a bucket of its size."""
PERSISTED_ELEMENTS = 100_000
"""DeepSpeed's stage3_param_persistence_threshold: tensors up to this size are not given back."""
MAX_REUSE_ELEMENTS = 1_000_000_000
"""DeepSpeed's stage3_max_reuse_distance, counted there and back from forward to backward."""
_PREFETCH_ELEMENTS = 50_000_000
_SUB_GROUP_ELEMENTS = 1_000_000_000
_SWAP_BUFFERS = 4
_BYTES = {"fp32": 4, "bf16": 2}

SAVED_BYTES = 4 + 8
"""Of a parameter in a checkpoint, and in the copies that `checkpoint.async_save` makes of it: weight and moments, fp32.
The machines copy equal shares, whatever the strategy."""


@dataclass(frozen=True)
class Placement:
    """How a run is spread over `num_processes`: one of STRATEGIES; weights fp32 or (ZeRO) bf16 with fp32 masters."""

    strategy: str
    num_processes: int
    weights: str = "fp32"
    offload_optimizer: str | None = None
    """ZeRO: cpu, or (stage 3) nvme."""
    offload_parameters: str | None = None
    """Stage 3: cpu or nvme."""
    reduce_bucket_mib: float | None = None
    """ZeRO: size of the reduce bucket; None: the model's elements, at most 5e8."""

    def __post_init__(self) -> None:
        assert self.strategy in STRATEGIES
        assert self.num_processes >= 1
        assert self.weights == "fp32" or self.stage

    @property
    def stage(self) -> int:
        """ZeRO's stage; 0 for the other strategies."""
        return int(self.strategy[-1]) if self.strategy.startswith("zero-") else 0

    @property
    def weight_bytes(self) -> int:
        """Bytes of a model weight, c."""
        return _BYTES[self.weights]

    def bucket_elements(self, num_parameters: int) -> int:
        """Return the elements of ZeRO's reduce bucket: no more than there are, unless the recipe says so."""
        if self.reduce_bucket_mib is None:
            return min(DEFAULT_BUCKET_ELEMENTS, num_parameters)
        return int(self.reduce_bucket_mib * 2**20) // self.weight_bytes


@dataclass(frozen=True)
class Work:
    """What one process computes in a step: `micro_batches` times `micro_batch_size` rows of `context_length` tokens."""

    context_length: int
    micro_batch_size: int
    micro_batches: int = 1
    precision: str = "bf16"
    fused_attention: bool = True
    dag_tensors: int = 0
    activation_checkpointing: Recomputed = "none"


@dataclass(frozen=True)
class ClusterMemory:
    """Bytes of one process, by what they hold. On the device but for `host` and `nvme`."""

    parameters: int
    gradients: int
    moments: int
    masters: int
    """fp32 weights that ZeRO's optimizer keeps for its partition."""
    cast_copies: int
    gathered: int
    """Whole weights of a sharding strategy that are in use."""
    buckets: int
    """Gradients on their way: ZeRO's reduce bucket and its copy, FSDP's whole gradients in flight."""
    activations: int
    logits: int
    step_copies: int = 0
    """Taken in the optimizer's step, when what forward and backward held is free again."""
    host: int = 0
    nvme: int = 0

    @property
    def optimizer(self) -> int:
        """Moments and masters."""
        return self.moments + self.masters

    @property
    def total(self) -> int:
        """Peak on the device: what stays, and the larger of backward and step."""
        in_backward = self.cast_copies + self.gathered + self.buckets + self.activations + self.logits
        return self.parameters + self.gradients + self.optimizer + max(in_backward, self.step_copies)


@dataclass(frozen=True)
class Traffic:
    """Bytes that one process sends to others (and receives) in each micro-batch and, besides, once a step."""

    per_micro_batch: int
    per_step: int

    def total(self, micro_batches: int) -> int:
        """Return the bytes of a step."""
        return micro_batches * self.per_micro_batch + self.per_step


# ----------------------------------------------------------------------------------------------------- sizes of tensors


def _linear(inputs: int, outputs: int) -> list[tuple[int, ...]]:
    return [(outputs, inputs), (outputs,)]


def _glu(width: int, inner_width: int) -> list[tuple[int, ...]]:
    return [*_linear(width, inner_width), *_linear(width, inner_width), *_linear(inner_width, width)]


def layer_shapes(model: ModelSection) -> list[tuple[int, ...]]:
    """Return the shapes of one layer's parameters, in the model's order."""
    d, width, heads = model.head_dim, model.width, model.num_attention_heads
    norm: list[tuple[int, ...]] = [(width,), (width,)]
    head_norm: list[tuple[int, ...]] = [(d,), (d,)]
    shapes = _linear(width, width) * 4
    if model.learned_g:
        shapes += head_norm + (_glu(d, model.A_dff) * model.num_denseA + head_norm) * model.num_reslayerA
        shapes += [(heads, d, d)] * 5
    return [*shapes, *norm, *_glu(width, model.inner_width), *norm]


def root_shapes(model: ModelSection) -> list[tuple[int, ...]]:
    """Return the shapes outside the layers: embedding, its norm (2), and the head with its bias (2)."""
    width = model.width
    return [(model.vocab_size, width), (width,), (width,), *_linear(width, model.vocab_size)]


def parameter_shapes(model: ModelSection) -> list[tuple[int, ...]]:
    """Return the shapes of all parameters, in the order of `model.parameters()`."""
    root = root_shapes(model)
    return [*root[:3], *layer_shapes(model) * model.num_hidden_layers, *root[3:]]


def flat_partition_elements(sizes: Sequence[int], num_processes: int) -> int:
    """Return the elements of a process's partition in ZeRO-1 and -2: all tensors in one, padded to a multiple of 2N."""
    return -(-sum(sizes) // (2 * num_processes)) * 2


def owned_gradient_elements(sizes: Sequence[int], num_processes: int) -> int:
    """Return the elements of the tensors that overlap a flat partition, counted whole; of the process that has the
    most.
    """
    offsets = list(itertools.accumulate(sizes, initial=0))
    partition, most = flat_partition_elements(sizes, num_processes), 0
    for start in range(0, offsets[-1], partition):
        first = bisect_right(offsets, start) - 1
        behind = bisect_left(offsets, min(start + partition, offsets[-1]))
        most = max(most, offsets[behind] - offsets[first])
    return most


def tensor_partition_elements(sizes: Sequence[int], num_processes: int) -> int:
    """Return the elements of one process's share in ZeRO-3: each tensor padded to a multiple of N."""
    return sum(-(-size // num_processes) for size in sizes)


def row_shard_elements(shapes: Sequence[tuple[int, ...]], num_processes: int) -> int:
    """Return the elements of the first process's share in FSDP2: ceil(rows / N) rows of each tensor."""
    return sum(-(-tensor[0] // num_processes) * prod(tensor[1:]) for tensor in shapes)


def _split_persisted(sizes: Sequence[int]) -> tuple[list[int], list[int]]:
    """(tensors that ZeRO-3 frees, tensors that stay)."""
    return [n for n in sizes if n > PERSISTED_ELEMENTS], [n for n in sizes if n <= PERSISTED_ELEMENTS]


# --------------------------------------------------------------------------------------------------------------- memory


def cluster_memory(model: ModelSection, work: Work, placement: Placement) -> ClusterMemory:
    """Return the bytes of one process in a training step; see the module's text for what is exact and what is an
    estimate.
    """
    activations, logits = _activations(model, work)
    sizes = [prod(tensor) for tensor in parameter_shapes(model)]
    mixed = work.precision == "bf16" and placement.weights == "fp32"
    computed = ClusterMemory(0, 0, 0, 0, 2 * sum(sizes) if mixed else 0, 0, 0, activations, logits)
    if placement.stage == 3:
        return _zero_3(sizes, placement, computed)
    if placement.stage:
        return _zero_1_2(sizes, work, placement, computed)
    if placement.strategy == "fsdp":
        return _fsdp(model, placement.num_processes, computed)
    everything = sum(sizes)
    return replace(computed, parameters=4 * everything, gradients=4 * everything, moments=8 * everything)


def _activations(model: ModelSection, work: Work) -> tuple[int, int]:
    """(activations, logits) in bytes.

    With layers computed again: every layer's fp32 input and fp32 deductive outputs, and all that one layer keeps. With
    metric learners computed again: all but what lies in their units, and that of one layer.
    """

    def estimate(layers: int, units: int = model.num_reslayerA) -> tuple[int, int]:
        memory = memory_estimate(
            model.model_copy(update={"num_hidden_layers": layers, "num_reslayerA": units}),
            work.context_length,
            work.micro_batch_size,
            precision=work.precision,
            fused_attention=work.fused_attention,
            dag_tensors=work.dag_tensors,
        )
        return memory.activations, memory.logits

    activations, logits = estimate(model.num_hidden_layers)
    if work.activation_checkpointing == "none":
        return activations, logits
    if work.activation_checkpointing == "metric_learner":
        without = estimate(model.num_hidden_layers, 0)[0]
        return without + (activations - without) // model.num_hidden_layers, logits
    activations = estimate(1)[0]
    kept = work.micro_batch_size * work.context_length * model.width * 4
    if model.learned_g:
        grams = model.num_grams(work.context_length)
        kept += 3 * work.micro_batch_size * model.num_attention_heads * model.head_dim**2 * grams * 4
    return activations + model.num_hidden_layers * kept, logits


def _fsdp(model: ModelSection, processes: int, computed: ClusterMemory) -> ClusterMemory:
    root = row_shard_elements(root_shapes(model), processes)
    layer = row_shard_elements(layer_shapes(model), processes)
    share = root + model.num_hidden_layers * layer
    in_flight = processes * (root + min(2, model.num_hidden_layers) * layer)
    return replace(
        computed,
        parameters=4 * share,
        gradients=4 * share,
        moments=8 * share,
        gathered=4 * in_flight,
        buckets=4 * in_flight,
    )


def _bucket_bytes(placement: Placement, num_elements: int) -> int:
    """Return the bucket and the flattened copy of what a reduction finds in it."""
    bucket = placement.bucket_elements(num_elements)
    return placement.weight_bytes * (bucket + min(bucket, num_elements))


def _zero_1_2(sizes: Sequence[int], work: Work, placement: Placement, computed: ClusterMemory) -> ClusterMemory:
    c, processes = placement.weight_bytes, placement.num_processes
    partition, owned = flat_partition_elements(sizes, processes), owned_gradient_elements(sizes, processes)
    again = work.micro_batches > 1
    held = replace(
        computed,
        parameters=c * processes * partition,
        gradients=c * sum(sizes) if placement.stage == 1 else c * owned * (2 if again else 1),
        buckets=_bucket_bytes(placement, sum(sizes)),
    )
    if placement.offload_optimizer is None:
        copies = (4 if c == 4 else 4 + c) * partition
        return replace(held, moments=8 * partition, masters=4 * partition, step_copies=copies)
    gradients = held.gradients if placement.stage == 1 else c * max(sizes)
    host = (4 + 8 + 4 + c) * partition + c * max(sizes) + (c * owned if again else 0)
    return replace(held, gradients=gradients, host=host)


def _zero_3(sizes: Sequence[int], placement: Placement, computed: ClusterMemory) -> ClusterMemory:
    c, processes = placement.weight_bytes, placement.num_processes
    partition = tensor_partition_elements(sizes, processes)
    given_back, persisted = _split_persisted(sizes)
    small = tensor_partition_elements(persisted, processes)
    large = partition - small
    in_use = MAX_REUSE_ELEMENTS // 2 + _PREFETCH_ELEMENTS + max(given_back, default=0)
    bucket = c * placement.bucket_elements(sum(sizes))
    held = replace(
        computed,
        parameters=c * (partition + processes * small),
        gathered=c * min(processes * large, in_use),
        buckets=_bucket_bytes(placement, sum(sizes)),
        step_copies=bucket,
    )
    host = nvme = 0
    if placement.offload_parameters is not None:
        held = replace(held, parameters=held.parameters - c * large)
        host, nvme = (c * large, 0) if placement.offload_parameters == "cpu" else (0, c * large)
    if placement.offload_optimizer is None:
        copies = (4 if c == 4 else 4 + c) * min(partition, _SUB_GROUP_ELEMENTS) + bucket
        states = {"gradients": c * partition, "moments": 8 * partition, "masters": 4 * partition}
        return replace(held, **states, step_copies=copies, host=host, nvme=nvme)
    states_bytes = (4 + 8 + 4) * partition
    if placement.offload_optimizer == "cpu":
        return replace(held, host=host + states_bytes + c * partition, nvme=nvme)
    swap = _SWAP_BUFFERS * 4 * min(partition, _SUB_GROUP_ELEMENTS)
    return replace(held, host=host + c * partition + swap, nvme=nvme + states_bytes)


# -------------------------------------------------------------------------------------------------------------- network


def _ring(num_bytes: int, num_processes: int) -> int:
    """Return the bytes that each process sends when `num_bytes` are gathered or reduce-scattered; an all-reduce is
    both.
    """
    return num_bytes * (num_processes - 1) // num_processes


def network_traffic(model: ModelSection, placement: Placement) -> Traffic:
    """Return the bytes that one process sends in a step, with ring algorithms; metrics and norms are not counted.

    - ddp: one all-reduce of 4P at the step's last micro-batch.
    - fsdp: each micro-batch gathers all weights in the forward, the layers again in the backward (the root unit
      stayed), and reduce-scatters all gradients, 4 bytes each, padding included.
    - ZeRO-1: an all-reduce of c P once a step, then the weights are gathered (c P). ZeRO-2: the all-reduce in every
      micro-batch. (DeepSpeed's `reduce_scatter` with its default `use_multi_rank_bucket_allreduce` all-reduces.)
    - ZeRO-3: each micro-batch gathers the weights in the forward, those beyond 5e8 elements again in the backward, and
      reduce-scatters all gradients; once a step the small tensors that stay are gathered. c bytes each.
    """
    processes, c = placement.num_processes, placement.weight_bytes
    sizes = [prod(tensor) for tensor in parameter_shapes(model)]

    def padded(tensors: Sequence[int]) -> int:
        return processes * tensor_partition_elements(tensors, processes)

    if placement.strategy == "single" or processes == 1:
        return Traffic(0, 0)
    if placement.strategy == "ddp":
        return Traffic(0, 2 * _ring(4 * sum(sizes), processes))
    if placement.strategy == "fsdp":
        root = processes * row_shard_elements(root_shapes(model), processes)
        layers = processes * row_shard_elements(layer_shapes(model), processes) * model.num_hidden_layers
        return Traffic(_ring(4 * (root + layers), processes) * 2 + _ring(4 * layers, processes), 0)
    if placement.stage == 3:
        given_back, persisted = _split_persisted(sizes)
        again = max(0, padded(given_back) - MAX_REUSE_ELEMENTS // 2)
        gathered = _ring(c * padded(given_back), processes) + _ring(c * again, processes)
        return Traffic(gathered + _ring(c * padded(sizes), processes), _ring(c * padded(persisted), processes))
    reduced = 2 * _ring(c * sum(sizes), processes)
    weights = _ring(c * processes * flat_partition_elements(sizes, processes), processes)
    return Traffic(0, reduced + weights) if placement.stage == 1 else Traffic(reduced, weights)


# ----------------------------------------------------------------------------------------------------------------- time


def recomputed_flops_per_token(model: ModelSection, context_length: int, what: Recomputed) -> float:
    """Return the FLOPs for each token that activation checkpointing adds: the forward once more of the layers, without
    the head, or of their metric learners.
    """
    forward = flops_per_token(model, context_length, training=False)
    return {
        "none": 0.0, "metric_learner": forward.metric_learner, "layers": forward.total - forward.output_head,
    }[what]  # fmt: skip


def parts(memory: ClusterMemory) -> Iterator[tuple[str, int]]:
    """Yield every figure by its name, `optimizer` and `total` included."""
    for field in fields(memory):
        yield field.name, getattr(memory, field.name)
    yield "optimizer", memory.optimizer
    yield "total", memory.total
