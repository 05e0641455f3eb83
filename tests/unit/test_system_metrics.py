"""Throughput, utilisation and memory: what follows from a window's tokens per second, and where it is absent."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from pldr_train.distributed.world import World
from pldr_train.metrics.hardware import GPUS, gpu_of_device
from pldr_train.metrics.throughput import flops_per_token
from pldr_train.recipe import Recipe, recipe_from_dict
from pldr_train.training.observing import SystemMetrics, host_memory_bytes, peak_flops

CPU = torch.device("cpu")


def recipe(**logging: Any) -> Recipe:
    values = {"run": {"name": "unit"}, "data": {"source": "quickstart"}, "dag": {"A_P": 0.1}, "logging": logging}
    return recipe_from_dict(values).resolved()


class Pair(World):
    """Two processes, of which the other has more memory."""

    def max(self, numbers: Sequence[float]) -> list[float]:
        return [2 * number for number in numbers]


def test_flops_follow_from_the_tokens_and_the_models_formula() -> None:
    chosen = recipe(peak_tflops=50.0)
    values = SystemMetrics(chosen, Pair(0, 2), CPU).values(10_000.0, 0.3, 60.0)
    flops = flops_per_token(chosen.model, 1024, dag_tensors=1).total
    assert values["system/tflops_per_s"] == pytest.approx(1e4 * flops / 1e12)
    # Both processes' tokens over both processes' peaks.
    assert values["system/mfu"] == pytest.approx(1e4 * flops / (2 * 50e12))
    assert values["system/monitor_share"] == pytest.approx(0.005)


def test_the_memory_is_the_largest_of_all_processes() -> None:
    values = SystemMetrics(recipe(), Pair(0, 2), CPU).values(1.0, 0.0, 0.0)
    own = Path("/proc/self/status").read_text()
    resident_kib = next(int(line.split()[1]) for line in own.splitlines() if line.startswith("VmRSS"))
    assert values["system/host_memory_gib"] == pytest.approx(2 * resident_kib / 2**20, rel=0.1)
    assert host_memory_bytes() > 2**26
    assert "system/gpu_memory_gib" not in values
    assert values["system/monitor_share"] == 0.0


def test_without_a_known_peak_there_is_no_utilisation() -> None:
    assert peak_flops(recipe(), CPU) is None
    assert "system/mfu" not in SystemMetrics(recipe(), World(), CPU).values(1.0, 0.0, 1.0)


@pytest.mark.parametrize(
    ("driver", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA B200", "b200"),
    ],
)
def test_a_gpu_is_known_by_the_drivers_name(driver: str, name: str) -> None:
    assert gpu_of_device(driver) is GPUS[name]


@pytest.mark.parametrize(
    "driver", ["NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA GeForce RTX 4090 D", "NVIDIA L40", ""]
)
def test_a_card_of_another_speed_is_not_taken_for_a_known_one(driver: str) -> None:
    assert gpu_of_device(driver) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpus_memory_is_measured_since_the_last_line() -> None:
    device = torch.device("cuda")
    metrics = SystemMetrics(recipe(), World(), device)
    metrics.values(1.0, 0.0, 1.0)
    block = torch.empty(2**28, dtype=torch.uint8, device=device)
    del block
    assert metrics.values(1.0, 0.0, 1.0)["system/gpu_memory_gib"] >= 0.25
    assert metrics.values(1.0, 0.0, 1.0)["system/gpu_memory_gib"] < 0.25
