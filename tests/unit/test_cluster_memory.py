"""Memory and network volume of several processes against real tensors and figures made by hand."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Iterable
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor

from pldr_train.errors import UserError
from pldr_train.metrics.cluster_memory import (
    DEFAULT_BUCKET_ELEMENTS,
    Placement,
    Traffic,
    Work,
    cluster_memory,
    flat_partition_elements,
    network_traffic,
    owned_gradient_elements,
    parameter_shapes,
    parts,
    recomputed_flops_per_token,
    row_shard_elements,
    tensor_partition_elements,
)
from pldr_train.metrics.hardware import GPUS, gpu_named
from pldr_train.metrics.throughput import count_parameters, flops_per_token, memory_estimate
from pldr_train.recipe import ModelSection

PAPER = ModelSection(vocab_size=32000, num_hidden_layers=5, num_attention_heads=14, head_dim=64, intermediate_size=2389)
PAPER_PARAMETERS = 109_689_362
SMALL = ModelSection(
    vocab_size=301,
    num_hidden_layers=2,
    num_attention_heads=3,
    head_dim=8,
    intermediate_size=50,
    num_reslayerA=1,
    num_denseA=2,
    A_dff=7,
)
WORK = Work(context_length=1024, micro_batch_size=4)


def small_model(shape: ModelSection = SMALL) -> Any:
    from pldr_train.model import PldrllmConfig, PldrllmForCausalLM

    return PldrllmForCausalLM(
        PldrllmConfig(
            vocab_size=shape.vocab_size,
            num_hidden_layers=shape.num_hidden_layers,
            num_attention_heads=shape.num_attention_heads,
            hidden_size=shape.width,
            head_dim=shape.head_dim,
            intermediate_size=shape.inner_width,
            num_reslayerA=shape.num_reslayerA,
            num_denseA=shape.num_denseA,
            A_dff=shape.A_dff,
            custom_G_type=None if shape.learned_g else "identity",
        )
    )


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind tensors, each counted once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


# ------------------------------------------------------------------------------------------------- against real objects


@pytest.mark.parametrize("learned_g", [True, False])
def test_parameter_shapes_are_those_of_the_model_in_its_order(learned_g: bool) -> None:
    shape = SMALL.model_copy(update={"custom_G_type": "learned" if learned_g else "identity"})
    with torch.device("meta"):
        model = small_model(shape)
    assert parameter_shapes(shape) == [tuple(parameter.shape) for parameter in model.parameters()]


def test_the_papers_model_has_its_published_number_of_parameters() -> None:
    assert sum(map(prod, parameter_shapes(PAPER))) == count_parameters(PAPER) == PAPER_PARAMETERS


def test_a_single_process_holds_what_a_real_model_and_its_stepped_optimizer_hold() -> None:
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids = torch.arange(32).view(2, 16)
    model(input_ids=ids, use_cache=False).logits.square().mean().backward()
    optimizer.step()
    moments = [
        state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")
    ]  # not their counters
    memory = cluster_memory(SMALL, Work(16, 2, precision="fp32"), Placement("single", 1))
    assert memory.parameters == num_bytes(model.parameters())
    assert memory.gradients == num_bytes(parameter.grad for parameter in model.parameters())
    assert memory.moments == memory.optimizer == num_bytes(moments)
    assert (memory.cast_copies, memory.buckets, memory.gathered, memory.masters, memory.host) == (0, 0, 0, 0, 0)


def test_fsdp_shares_are_those_of_real_chunks() -> None:
    for processes in (1, 2, 3, 8, 64):
        shares = [tensor.chunk(processes)[0].numel() for tensor in map(torch.empty, parameter_shapes(SMALL))]
        assert row_shard_elements(parameter_shapes(SMALL), processes) == sum(shares)
        memory = cluster_memory(SMALL, WORK, Placement("fsdp", processes))
        assert (memory.parameters, memory.gradients, memory.moments) == (
            4 * sum(shares),
            4 * sum(shares),
            8 * sum(shares),
        )


# ------------------------------------------------------------------------------------------------------ by hand


def test_flat_partitions_are_padded_to_twice_the_processes() -> None:
    assert [flat_partition_elements([7, 6], n) for n in (1, 2, 3, 8)] == [14, 8, 6, 2]


def test_tensor_partitions_are_padded_one_by_one() -> None:
    assert [tensor_partition_elements([7, 6, 1], n) for n in (1, 2, 4, 100)] == [14, 4 + 3 + 1, 2 + 2 + 1, 3]


def test_owned_gradients_are_those_of_the_process_with_the_most() -> None:
    # 20 elements on 2 processes, 10 each: the tensor of 12 lies on both.
    assert owned_gradient_elements([5, 12, 3], 2) == 5 + 12
    assert owned_gradient_elements([5, 12, 3], 1) == 20
    assert owned_gradient_elements([10, 10], 2) == 10
    # Partitions of 4 elements: several lie inside the tensor of 12.
    assert owned_gradient_elements([5, 12, 3], 5) == 5 + 12


@pytest.mark.parametrize(("processes", "sent"), [(2, 4 * PAPER_PARAMETERS), (4, 6 * PAPER_PARAMETERS)])
def test_ddp_sends_two_shares_of_the_fp32_gradients_once_a_step(processes: int, sent: int) -> None:
    traffic = network_traffic(PAPER, Placement("ddp", processes))
    assert traffic == Traffic(per_micro_batch=0, per_step=sent)  # 2 (N - 1) / N * 4 P
    assert traffic.total(1) == traffic.total(8)


def test_a_process_alone_sends_nothing() -> None:
    for strategy in ("single", "ddp", "fsdp", "zero-1", "zero-2", "zero-3"):
        assert network_traffic(PAPER, Placement(strategy, 1)).total(3) == 0


def test_zero_1_reduces_once_and_zero_2_in_every_micro_batch() -> None:
    # P is even: on 2 processes padded by 2, to a multiple of 4. All-reduce: 4 P a process; gather: half of 4 (P + 2).
    reduced, gathered = 4 * PAPER_PARAMETERS, 2 * (PAPER_PARAMETERS + 2)
    assert network_traffic(PAPER, Placement("zero-1", 2)) == Traffic(0, reduced + gathered)
    assert network_traffic(PAPER, Placement("zero-2", 2)) == Traffic(reduced, gathered)
    assert network_traffic(PAPER, Placement("zero-2", 2, "bf16")) == Traffic(reduced // 2, gathered // 2)


def test_fsdp_gathers_the_layers_twice_and_the_root_once() -> None:
    # On 2 processes nothing of the paper's model is padded but 5 layers * 19 tensors with an odd number of rows.
    shapes = parameter_shapes(PAPER)
    padded = 2 * row_shard_elements(shapes, 2)
    root = 2 * 32000 * 896 + 32000 + 2 * 896
    assert network_traffic(PAPER, Placement("fsdp", 2)) == Traffic(2 * (padded + padded - root) + 2 * padded, 0)


def test_zero_3_gathers_a_second_time_only_what_does_not_stay_until_the_backward() -> None:
    # Of the paper's model all that is gathered stays: one gather, one reduce-scatter; the small tensors once a step.
    sizes = [prod(tensor) for tensor in parameter_shapes(PAPER)]
    small = 2 * sum(-(-size // 2) for size in sizes if size <= 100_000)
    padded = 2 * sum(-(-size // 2) for size in sizes)
    assert network_traffic(PAPER, Placement("zero-3", 2)) == Traffic(2 * (padded - small) + 2 * padded, 2 * small)
    large = PAPER.model_copy(update={"num_hidden_layers": 200})
    assert count_parameters(large) > 1_000_000_000
    sizes = [prod(tensor) for tensor in parameter_shapes(large)]
    small = 2 * sum(-(-size // 2) for size in sizes if size <= 100_000)
    padded = 2 * sum(-(-size // 2) for size in sizes)
    twice = padded - small - 500_000_000
    assert network_traffic(large, Placement("zero-3", 2)).per_micro_batch == 2 * (padded - small + twice) + 2 * padded


def test_every_stage_shards_more() -> None:
    totals = [cluster_memory(PAPER, WORK, Placement(f"zero-{stage}", 8)) for stage in (1, 2, 3)]
    assert totals[0].gradients == 4 * PAPER_PARAMETERS > totals[1].gradients > totals[2].gradients
    assert totals[0].parameters == totals[1].parameters > totals[2].parameters
    assert totals[0].moments == 2 * totals[0].masters
    bf16 = cluster_memory(PAPER, WORK, Placement("zero-1", 8, "bf16"))
    assert (2 * bf16.parameters, bf16.masters) == (totals[0].parameters, totals[0].masters)
    assert (bf16.cast_copies, totals[0].cast_copies) == (0, 2 * PAPER_PARAMETERS)


def test_the_reduce_bucket_is_there_in_full_whatever_the_model() -> None:
    memory = cluster_memory(PAPER, WORK, Placement("zero-2", 8))
    assert memory.buckets == 4 * 2 * min(DEFAULT_BUCKET_ELEMENTS, PAPER_PARAMETERS)
    small = cluster_memory(PAPER, WORK, Placement("zero-2", 8, "bf16", reduce_bucket_mib=16.0))
    assert small.buckets == 2 * 16 * 2**20
    assert cluster_memory(PAPER, WORK, Placement("ddp", 8)).buckets == 0


def test_an_offloaded_optimizer_moves_to_the_host() -> None:
    sizes = [prod(tensor) for tensor in parameter_shapes(PAPER)]
    partition = flat_partition_elements(sizes, 8)
    for weights, c in (("fp32", 4), ("bf16", 2)):
        memory = cluster_memory(PAPER, WORK, Placement("zero-2", 8, weights, offload_optimizer="cpu"))
        assert memory.optimizer == 0
        assert memory.host == (4 + 8 + 4 + c) * partition + c * max(sizes)  # max: one tensor's gradient on its way
        share = tensor_partition_elements(sizes, 8)
        third = cluster_memory(PAPER, WORK, Placement("zero-3", 8, weights, offload_optimizer="cpu"))
        assert (third.optimizer, third.gradients, third.host) == (0, 0, (4 + 8 + 4 + c) * share)
        nvme = cluster_memory(PAPER, WORK, Placement("zero-3", 8, weights, offload_optimizer="nvme"))
        assert nvme.nvme == 16 * share
    whole = cluster_memory(PAPER, WORK, Placement("zero-3", 8))
    away = cluster_memory(PAPER, WORK, Placement("zero-3", 8, offload_parameters="cpu"))
    assert away.host == whole.parameters - away.parameters > 0


def test_checkpointing_keeps_inputs_and_one_layer_and_costs_a_forward_of_the_layers() -> None:
    whole = cluster_memory(PAPER, WORK, Placement("ddp", 8))
    less = cluster_memory(PAPER, dataclasses.replace(WORK, activation_checkpointing="layers"), Placement("ddp", 8))
    one_layer = memory_estimate(PAPER.model_copy(update={"num_hidden_layers": 1}), 1024, 4).activations
    inputs, deductive = 5 * 4 * 1024 * 896 * 4, 5 * 3 * 4 * 14 * 64 * 64 * 4
    assert less.activations == one_layer + inputs + deductive < whole.activations / 2
    assert less.logits == whole.logits
    forward = flops_per_token(PAPER, 1024, training=False)
    assert recomputed_flops_per_token(PAPER, 1024, "layers") == pytest.approx(forward.total - 2 * 896 * 32000)


def test_recomputing_metric_learners_alone_saves_much_for_few_flops() -> None:
    whole = cluster_memory(PAPER, WORK, Placement("ddp", 8))
    work = dataclasses.replace(WORK, activation_checkpointing="metric_learner")
    less = cluster_memory(PAPER, work, Placement("ddp", 8))
    learners = sum(8 * (2 * rows * (64 + 4 * 170) * 2 + rows * 64 * 4 + rows * 64 * 2) for rows in [4 * 14 * 64] * 5)
    assert whole.activations - less.activations == learners * 4 // 5
    forward = flops_per_token(PAPER, 1024, training=False)
    assert recomputed_flops_per_token(PAPER, 1024, "metric_learner") == forward.metric_learner < 0.05 * forward.total
    assert recomputed_flops_per_token(PAPER, 1024, "none") == 0.0


def test_the_total_is_the_larger_of_backward_and_step() -> None:
    memory = cluster_memory(PAPER, WORK, Placement("zero-1", 2))
    figures = dict(parts(memory))
    stays = figures["parameters"] + figures["gradients"] + figures["optimizer"]
    passing = sum(figures[name] for name in ("cast_copies", "gathered", "buckets", "activations", "logits"))
    assert memory.total == stays + passing
    idle = dataclasses.replace(memory, cast_copies=0, buckets=0, activations=0, logits=0)
    assert idle.total == stays + memory.step_copies == stays + 4 * flat_partition_elements([PAPER_PARAMETERS], 2)


# ------------------------------------------------------------------------------------------------------- hardware


def test_an_unknown_gpu_is_answered_with_the_names_there_are() -> None:
    assert gpu_named("H200") is GPUS["h200"]
    with pytest.raises(UserError, match="did you mean h200") as raised:
        gpu_named("h20")
    assert all(name in str(raised.value) for name in GPUS)
    with pytest.raises(UserError, match="--gpu potato: unknown; there are h100"):
        gpu_named("potato")


def test_peaks_depend_on_the_precision() -> None:
    assert GPUS["h200"].peak_flops("bf16") == pytest.approx(989.4e12)
    assert GPUS["a100-80gb"].peak_flops("fp32") == pytest.approx(19.5e12)
    for gpu in GPUS.values():
        assert gpu.bf16_tflops > gpu.fp32_tflops


def test_it_needs_no_torch() -> None:
    modules = "pldr_train.metrics.cluster_memory, pldr_train.metrics.hardware"
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "False"
