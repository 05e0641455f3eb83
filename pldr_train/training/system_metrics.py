"""Throughput, utilisation and memory of a run: the `system/...` metrics of a log step."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

from pldr_train.distributed.world import World
from pldr_train.metrics.catalog import GPU_MEMORY_GIB, HOST_MEMORY_GIB, MFU, MONITOR_SHARE, TFLOPS_PER_S
from pldr_train.metrics.hardware import gpu_of_device
from pldr_train.metrics.throughput import flops_per_token, model_flops_utilisation
from pldr_train.recipe import Recipe

_GIB = 2**30


class SystemMetrics:
    """What follows from a window's throughput, and the memory at its end.

    Args:
        recipe: resolved.
        world: the processes.
        device: this process'.
    """

    def __init__(self, recipe: Recipe, world: World, device: torch.device) -> None:
        self._world, self._device = world, device
        self._flops = flops_per_token(
            recipe.model, recipe.data.context_length, dag_tensors=len(recipe.dag.trained)
        ).total
        self._peak = peak_flops(recipe, device)

    def values(self, tokens_per_s: float, monitor_s: float, trained_s: float) -> dict[str, float]:
        """The metrics of a window; called on all processes.

        Args:
            tokens_per_s: throughput of all processes.
            monitor_s: time that this process spent on the monitor's metrics.
            trained_s: time of the window's steps, waiting for data included.
        """
        memory = {HOST_MEMORY_GIB: host_memory_bytes() / _GIB}
        if self._device.type == "cuda":
            memory[GPU_MEMORY_GIB] = torch.cuda.max_memory_allocated(self._device) / _GIB
            torch.cuda.reset_peak_memory_stats(self._device)
        everywhere = self._world.gather(memory)
        values = {name: max(each[name] for each in everywhere) for name in memory}
        values[TFLOPS_PER_S] = tokens_per_s * self._flops / 1e12
        values[MONITOR_SHARE] = monitor_s / trained_s if trained_s > 0 else 0.0
        if self._peak is not None:
            peak = self._peak * self._world.size
            values[MFU] = model_flops_utilisation(tokens_per_s, self._flops, peak)
        return values


def peak_flops(recipe: Recipe, device: torch.device) -> float | None:
    """FLOPs per second that one device could do in the run's precision: the recipe's, or those of a known GPU."""
    if recipe.logging.peak_tflops is not None:
        return recipe.logging.peak_tflops * 1e12
    if device.type != "cuda":
        return None
    gpu = gpu_of_device(torch.cuda.get_device_name(device))
    return None if gpu is None else gpu.peak_flops(recipe.trainer.precision)


def host_memory_bytes() -> int:
    """Resident memory of this process; where the system does not tell, its peak."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    return pages * resource.getpagesize()
