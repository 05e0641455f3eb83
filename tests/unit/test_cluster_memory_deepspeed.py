"""What ZeRO holds and sends, against two processes of real DeepSpeed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from pldr_train.metrics.cluster_memory import Placement, Work, cluster_memory, network_traffic
from tests.distributed.fleet import run_pair
from tests.unit.test_cluster_memory import SMALL, num_bytes, small_model

SMALL_BUCKET_ELEMENTS = 50_000


CASES = [(stage, weights, micro) for stage in (1, 2, 3) for weights in ("fp32", "bf16") for micro in (1, 2)]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str, int], list[dict[str, int]]]:
    """What two processes of DeepSpeed hold and send: case -> one record for each rank."""
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("deepspeed")
    records = run_pair(_measure_deepspeed, folder)
    return {case: [record["/".join(map(str, case))] for record in records] for case in CASES}


def _measure_deepspeed(_rank: int) -> dict[str, dict[str, int]]:
    from pldr_train.training.strategies import import_deepspeed

    deepspeed = import_deepspeed()
    deepspeed.init_distributed("gloo", verbose=False)
    sent = _count_sent_bytes()
    records = {"/".join(map(str, case)): _measure_case(*case, sent) for case in CASES}
    deepspeed.comm.barrier()
    return records


def _count_sent_bytes() -> list[int]:
    """Count what this process of two sends: half of what is gathered, all that is all-reduced."""
    from deepspeed.comm.torch import TorchBackend

    sent = [0]

    def counted(name: str, argument: int, halves: int) -> None:
        original: Callable[..., Any] = getattr(TorchBackend, name)

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            named = {"all_reduce": "tensor", "all_gather_into_tensor": "output_tensor"}.get(name, "input_tensor")
            tensor = args[argument] if len(args) > argument else kwargs[named]
            if tensor.numel() > 1:  # not the norm and the overflow flag
                sent[0] += halves * tensor.numel() * tensor.element_size() // 2
            return original(self, *args, **kwargs)

        setattr(TorchBackend, name, call)

    counted("all_reduce", 0, 2)
    counted("all_gather_into_tensor", 0, 1)
    counted("reduce_scatter_tensor", 1, 1)
    return sent


def _measure_case(stage: int, weights: str, micro_batches: int, sent: list[int]) -> dict[str, int]:
    import deepspeed
    from deepspeed.utils import set_z3_leaf_modules

    from pldr_train.model.modeling_pldrllm import PldrllmDecoderLayer

    torch.manual_seed(0)
    model = small_model()
    if stage == 3:
        set_z3_leaf_modules(model, [PldrllmDecoderLayer])
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": micro_batches,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": SMALL_BUCKET_ELEMENTS},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": weights == "bf16"},
    }
    record: dict[str, int] = {}
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-3)
    engine, *_ = deepspeed.initialize(model=model, optimizer=adamw, config=settings)
    zero = engine.optimizer
    if stage < 3:
        _record_before_release(zero, model, stage, record)
    ids = torch.arange(32).view(2, 16)
    for _ in range(3):
        sent[0] = 0
        for _ in range(micro_batches):
            loss = engine(input_ids=ids, use_cache=False).logits.float().square().mean()
            engine.backward(loss)
            engine.step()
        record["sent"] = sent[0]
    masters = zero.fp32_partitioned_groups_flat if stage == 3 else zero.single_partition_of_fp32_groups
    states = [value for state in zero.optimizer.state.values() for value in state.values()]
    held = [parameter.data for parameter in model.parameters()]
    held += zero.fp16_partitioned_groups_flat if stage == 3 else zero.bit16_groups_flat
    if stage == 3:
        record["gradients"] = num_bytes([zero.grad_partitions_flat_buffer])
        record["bucket"] = num_bytes(bucket.buffer for bucket in zero.ipg_buckets.values())
    return record | {
        "parameters": num_bytes(tensor for tensor in held if tensor.numel()),
        "masters": num_bytes(masters),
        "moments": num_bytes(value for value in states if torch.is_tensor(value) and value.numel() > 1),
    }


def _record_before_release(zero: Any, model: Any, stage: int, record: dict[str, int]) -> None:
    """Record the gradients when they are the most: before stage 1 reduces them, before stage 2 lets the new ones go."""
    reduce, release = zero.reduce_gradients, zero._release_ipg_buffers

    def before_reduction(*args: Any, **kwargs: Any) -> None:
        if stage == 1:
            record["gradients"] = num_bytes(parameter.grad for parameter in model.parameters())
        reduce(*args, **kwargs)

    def before_release() -> None:
        record["bucket"] = num_bytes(tensor for bucket in zero.ipg_buckets.values() for tensor in bucket.buffer)
        if stage == 2:
            held = [tensor for group in zero.averaged_gradients.values() if group for tensor in group]
            record["gradients"] = num_bytes([*held, zero.grads_in_partition])
        release()

    zero.reduce_gradients, zero._release_ipg_buffers = before_reduction, before_release


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_zero_holds_exactly_what_real_deepspeed_holds(measured: dict[Any, list[dict[str, int]]], case: Any) -> None:
    stage, weights, micro = case
    placement = Placement(f"zero-{stage}", 2, weights)
    memory = cluster_memory(SMALL, Work(16, 2, micro_batches=micro), placement)
    for record in measured[case]:
        for name in ("parameters", "masters", "moments"):
            assert record[name] == getattr(memory, name), name
        assert record["bucket"] == SMALL_BUCKET_ELEMENTS * placement.weight_bytes
    padding = 2 * 4 if stage == 2 else 0  # the last partition's padding may be a tensor of its own
    most = max(record["gradients"] for record in measured[case])
    assert memory.gradients <= most <= memory.gradients + padding
    # Stage 2 holds more than its partition, and twice as much with several micro-batches.
    share = memory.parameters / 2
    assert memory.gradients > micro * share if stage == 2 else memory.gradients > 0


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_zero_sends_exactly_what_real_deepspeed_sends(measured: dict[Any, list[dict[str, int]]], case: Any) -> None:
    stage, weights, micro = case
    expected = network_traffic(SMALL, Placement(f"zero-{stage}", 2, weights)).total(micro)
    assert {record["sent"] for record in measured[case]} == {expected}
