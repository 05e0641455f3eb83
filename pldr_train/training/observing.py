"""What a run measures and keeps beside its loss.

Throughput, utilisation and memory; sizes of weights and of the last update, whatever strategy spread them; snapshots,
samples, and the alarm that goes off when the model reads the future.
"""

from __future__ import annotations

import logging
import math
import re
import resource
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import Tensor

from pldr_train.checkpoint.live_state import WEIGHT, LiveState, optimizer_step_of
from pldr_train.distributed.world import World
from pldr_train.errors import DataError
from pldr_train.metrics import catalog
from pldr_train.metrics.catalog import (
    GPU_MEMORY_GIB,
    HOST_MEMORY_GIB,
    MFU,
    MONITOR_SHARE,
    TFLOPS_PER_S,
    UPDATE_RATIO,
    WEIGHT_GROUPS,
    group_name,
)
from pldr_train.metrics.hardware import gpu_of_device
from pldr_train.metrics.layer_metrics import DEDUCTIVE, PARAMETER_METRICS, PARAMETERS
from pldr_train.metrics.throughput import flops_per_token, model_flops_utilisation
from pldr_train.optimizers import OPTIMIZERS, group_parameters
from pldr_train.recipe import MonitorSection, OptimSection, Recipe
from pldr_train.runs.folder import RunFolder
from pldr_train.runs.snapshots import write_snapshot
from pldr_train.training.module import PldrllmModule
from pldr_train.training.monitor import heartbeat_during
from pldr_train.training.sampling import sample_texts
from pldr_train.training.saving import datamodule_of
from pldr_train.training.strategies import SharedRun

_log = logging.getLogger(__name__)

LARGE_GAP = 0.5
"""nat/token. Training text is new to the model, so that only chance parts the two: of ten documents or more, whose mean
NLLs differ by about 1 nat/token, less than this in nine cases of ten. A perplexity 1.65 times as high."""


class Observer:
    """Measure, write and judge between two steps; every method is called on all processes.

    Args:
        recipe: resolved.
        folder: the run's, written by rank 0.
        world: the processes.
    """

    def __init__(self, recipe: Recipe, folder: RunFolder, world: World) -> None:
        self.recipe, self.folder, self.world = recipe, folder, world
        self.alarm = LeakageAlarm(recipe.monitor)
        self._gap_reported = False
        self._system: SystemMetrics | None = None

    def step_values(
        self, trainer: pl.Trainer, module: PldrllmModule, tokens_per_s: float, trained_s: float
    ) -> dict[str, float]:
        """Return the metrics of weights and machine at a log step.

        Args:
            trainer: after the step.
            module: with its model, of which this process may hold a share.
            tokens_per_s: throughput of the window.
            trained_s: time of the window's steps.
        """
        values: dict[str, float] = {}
        recipe, strategy = self.recipe, trainer.strategy
        # On a disk each weight would be read several times over.
        if isinstance(strategy, SharedRun) and recipe.parallel.offload_optimizer != "nvme":
            with module.monitoring():
                live = strategy.live_state()
                if module.step_is_finite():  # otherwise there was no update
                    values |= update_ratios(live, recipe.optim, module.lr_of_step, module.parameter_names, self.world)
                if recipe.monitor.deductive:
                    values |= power_law_norms(live, recipe.model.num_hidden_layers, self.world)
        if self._system is None:
            self._system = SystemMetrics(recipe, self.world, module.device)
        values |= self._system.values(tokens_per_s, module.monitor_s, trained_s)
        module.monitor_s = 0.0
        return values

    def validated(
        self,
        trainer: pl.Trainer,
        module: PldrllmModule,
        values: Mapping[str, float],
        trained: Mapping[str, float],
        is_last: bool,
    ) -> str | None:
        """Keep what a validation is kept of; returns why the run must end, if it must.

        Args:
            trainer: after the validation.
            module: its monitor has measured.
            values: what was measured.
            trained: what was measured of the last training steps.
            is_last: whether the run ends with it.
        """
        step = trainer.global_step
        self._judge_gap(trainer, values, trained)
        self._keep_snapshot(module, step)
        if self._samples_at(step) and not is_last:
            self._sample(trainer, module, step)
        problem = self.alarm.judge(values)
        if problem is None:
            return None
        stops = self.recipe.monitor.leakage == "stop" and step > 0 and not is_last
        if self.world.is_main and not stops:
            _log.warning(f"step {step:,}: {problem}")
        return f"step {step:,}: {problem}" if stops else None

    def _judge_gap(self, trainer: pl.Trainer, values: Mapping[str, float], trained: Mapping[str, float]) -> None:
        """Warn once of a validation that is much harder than training."""
        ours, theirs = values.get(catalog.VAL_CROSS_ENTROPY), trained.get(catalog.TRAIN_CROSS_ENTROPY)
        if self._gap_reported or ours is None or theirs is None or ours - theirs <= LARGE_GAP:
            return
        self._gap_reported = True
        if self.world.is_main:
            documents = datamodule_of(trainer).split.validation_text()
            _log.warning(
                f"step {trainer.global_step:,}: validation cross-entropy {ours:.3f} exceeds that of the last training "
                f"steps, {theirs:.3f}, by {ours - theirs:.3f} nat/token. The model has learned its training documents "
                "by heart (too many epochs: give more text or lower trainer.max_steps), or the validation documents "
                f"({documents}) are of another kind (data.validation_choice=spread takes some of all)"
            )

    def _samples_at(self, step: int) -> bool:
        """Return whether a multiple of `sample.every_steps` has come since the validation before."""
        every, between = self.recipe.sample.every_steps, self.recipe.trainer.validate_every_steps
        return every is not None and step > 0 and step // every > max(0, step - between) // every

    def _keep_snapshot(self, module: PldrllmModule, step: int) -> None:
        keep = self.recipe.monitor.snapshots
        # A predefined G never changes.
        tensors = module.monitor.snapshot if step == 0 or self.recipe.model.custom_G_type == "learned" else {}
        if not (self.world.is_main and keep and tensors):
            return
        with module.monitoring():
            try:
                write_snapshot(self.folder.path, step, tensors, keep)
            except DataError as error:  # no reason to end a run; a checkpoint that cannot be written ends it
                _log.warning(f"step {step:,}: no snapshot was kept: {error}")

    def _sample(self, trainer: pl.Trainer, module: PldrllmModule, step: int) -> None:
        settings = self.recipe.sample
        with heartbeat_during(module.model, module.monitor.beat):
            tokenizer, together = datamodule_of(trainer).tokenizer, self.world.size > 1
            texts = sample_texts(module.model, tokenizer, settings, self.recipe.run.seed, together)
        if not self.world.is_main:
            return
        try:
            self.folder.add_samples(step, settings.prompts, texts)
        except OSError as error:  # as with snapshots
            _log.warning(f"step {step:,}: no samples were kept: {error.strerror}")


class LeakageAlarm:
    """Judge the gap between sequential and block NLL; warn of it once, and again when it has doubled.

    Args:
        settings: `max_gap`, and `leakage` for what the message advises.
    """

    def __init__(self, settings: MonitorSection) -> None:
        self._settings = settings
        self._reported_gap = 0.0

    def judge(self, values: Mapping[str, float]) -> str | None:
        """Return what to say of a validation's `leakage/...` values, or None. Without an interval nothing is said."""
        gap, low, high = (values.get(name) for name in (catalog.GAP, catalog.GAP_LOW, catalog.GAP_HIGH))
        if gap is None or low is None or high is None:
            return None
        if catalog.gap_verdict(low, high, self._settings.max_gap) != "leaks":
            return None
        stops = self._settings.leakage == "stop"
        if not stops and gap < 2 * self._reported_gap:
            return None
        self._reported_gap = gap
        return (
            f"the model reads the future: NLL {values[catalog.BLOCK_NLL]:.3f} nat/token in one pass over a row, "
            f"{values[catalog.SEQUENTIAL_NLL]:.3f} for the same tokens from those before them alone; the gap "
            f"{gap:.3f} (95 % interval {low:.3f} to {high:.3f}) exceeds monitor.max_gap={self._settings.max_gap}. "
            "Its training loss does not say how well it models language. A G that cannot see ahead always helps "
            "(model.gram_chunk_size, model.custom_G_type=identity); in published runs a higher optim.lr or a shorter "
            "optim.warmup_steps did"
        )


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
        """Return the metrics of a window; called on all processes.

        Args:
            tokens_per_s: throughput of all processes.
            monitor_s: time that this process spent on the monitor's metrics.
            trained_s: time of the window's steps, waiting for data included.
        """
        memory = {HOST_MEMORY_GIB: host_memory_bytes() / _GIB}
        if self._device.type == "cuda":
            memory[GPU_MEMORY_GIB] = torch.cuda.max_memory_allocated(self._device) / _GIB
            torch.cuda.reset_peak_memory_stats(self._device)
        values = dict(zip(memory, self._world.max(list(memory.values())), strict=True))
        values[TFLOPS_PER_S] = tokens_per_s * self._flops / 1e12
        values[MONITOR_SHARE] = monitor_s / trained_s if trained_s > 0 else 0.0
        if self._peak is not None:
            peak = self._peak * self._world.size
            values[MFU] = model_flops_utilisation(tokens_per_s, self._flops, peak)
        return values


def peak_flops(recipe: Recipe, device: torch.device) -> float | None:
    """Return the FLOPs per second that one device could do in the run's precision: the recipe's, or those of a known
    GPU.
    """
    if recipe.logging.peak_tflops is not None:
        return recipe.logging.peak_tflops * 1e12
    if device.type != "cuda":
        return None
    gpu = gpu_of_device(torch.cuda.get_device_name(device))
    return None if gpu is None else gpu.peak_flops(recipe.trainer.precision)


def host_memory_bytes() -> int:
    """Resident memory of this process; where the system does not report it, its peak."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    return pages * resource.getpagesize()


_LAYER = re.compile(r"\blayers\.(\d+)\.")
_GROUPS = (
    ("embed_tokens.", "embedding"),
    (".metric_learner.", "metric_learner"),
    (".power_law.", "power_law"),
    ("_norm.", "norms"),
    (".attention.", "attention"),
    (".feed_forward.", "feed_forward"),
    ("lm_head.", "output_head"),
)
"""Parts of a weight's name and its group, the first that fits."""


def group_of(name: str) -> str:
    """Return the group, of `WEIGHT_GROUPS`, that a weight belongs to."""
    return next(group for part, group in _GROUPS if part in name)


@torch.no_grad()
def update_ratios(
    live: LiveState, settings: OptimSection, lr_of: Callable[[float], float], names: Sequence[str], world: World
) -> dict[str, float]:
    """2-norm of the optimizer's last update over the 2-norm of the weights before it, as `train/update_ratio/<group>`,
    and of each of the recipe's groups, if it has any.

    The update is computed from the optimizer's state and the weights as they are after the step: with w before, w'
    after it and the optimizer's direction u (see `optim.adamw_update`),

        w' = w - lr (u + decay w)
        w = (w' + lr u) / (1 - lr decay)

    so the three inner products of u and w' give both norms. No copy of the weights before the step is needed, and
    shards give sums that add up. Frozen weights do not count. Groups without other weights are left out, and so are
    those with weights whose update cannot be found so, and all before the first step.

    Args:
        live: this process' share of weights and moments.
        settings: the recipe's.
        lr_of: gives the last step's learning rate of a group, from its lr_factor.
        names: of all parameters of the model.
        world: the processes.
    """
    step, kind = optimizer_step_of(live), OPTIMIZERS[settings.name]
    if kind.state.update is None:
        return {}
    groups = {group.label: group for group in group_parameters(settings, names) if not group.frozen}
    labels = {name: label for label, group in groups.items() for name in group.names}
    # A process may hold nothing of some groups; all add up the same list.
    products = {(part, label): torch.zeros(3, dtype=torch.float64) for label in groups for part in WEIGHT_GROUPS}
    for part in live.parts() if step else ():
        if not part.moments:
            continue
        label, update = labels[part.name], kind.state_of(part.name, part.shape).update_of()
        if update is None:
            products[group_of(part.name), label] += math.nan
        else:
            three = update(part.read, part.read(WEIGHT).float(), groups[label], step)
            products[group_of(part.name), label] += torch.stack(three).double().cpu()
    totals = _over_processes([value for sums in products.values() for value in sums.tolist()], live, world)
    squares: dict[str, tuple[float, float]] = {}
    for (part_name, label), uu, uw, ww in zip(products, totals[::3], totals[1::3], totals[2::3], strict=True):
        found = _squared_norms(uu, uw, ww, lr_of(groups[label].lr_factor), groups[label].weight_decay)
        own = [group_name(label, "update_ratio")] if settings.groups else []
        for name in (f"{UPDATE_RATIO}/{part_name}", *own):
            update_squared, before = squares.get(name, (0.0, 0.0))
            squares[name] = (update_squared + found[0], before + found[1])
    return {
        name: math.sqrt(max(squared, 0.0) / before)
        for name, (squared, before) in squares.items()
        if before > 0 and math.isfinite(squared)
    }


def _squared_norms(uu: float, uw: float, ww: float, lr: float, decay: float) -> tuple[float, float]:
    """Squared 2-norms of the update and of the weights before it, from the inner products of u and w'."""
    kept = 1 - lr * decay
    before = (ww + 2 * lr * uw + lr**2 * uu) / kept**2
    with_before = (uw + lr * uu) / kept  # u times w
    return lr**2 * (uu + 2 * decay * with_before + decay**2 * before), before


@torch.no_grad()
def power_law_norms(live: LiveState, num_layers: int, world: World) -> dict[str, float]:
    """`PARAMETER_METRICS` of W, P and a of each layer and over all.

    Empty with a predefined G, which has none.
    """
    grid = {(layer, short): [0.0, 0.0] for layer in range(num_layers) for short in PARAMETERS}
    by_attribute = {attribute: short for short, attribute in PARAMETERS.items()}
    for part in live.parts():
        short, found = by_attribute.get(part.name.rpartition(".")[2]), _LAYER.search(part.name)
        if short is not None and found is not None:
            own = grid[int(found[1]), short]
            if part.replicated and not world.is_main:
                continue  # one process counts it
            own[0] += float(_squares(part.read(WEIGHT)))
            own[1] += part.num_elements
    totals = _over_processes([value for pair in grid.values() for value in pair], live, world)
    sums = dict(zip(grid, zip(totals[::2], totals[1::2], strict=True), strict=True))
    values: dict[str, float] = {}
    for short in PARAMETERS:
        of_layers = [sums[layer, short] for layer in range(num_layers)]
        values |= _norms(f"{DEDUCTIVE}/{short}", of_layers)
        for layer, each in enumerate(of_layers):
            values |= _norms(f"{DEDUCTIVE}/layer_{layer}/{short}", [each])
    return values


def _norms(name: str, sums: Iterable[tuple[float, float]]) -> dict[str, float]:
    squares, count = (sum(column) for column in zip(*sums, strict=True))
    if count == 0 or not math.isfinite(squares):
        return {}
    return {f"{name}/{metric.name}": metric.value(squares, count) for metric in PARAMETER_METRICS}


def _squares(tensor: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(tensor)
    return norm.double().square()


def _over_processes(values: list[float], live: LiveState, world: World) -> list[float]:
    return values if live.replicated else world.sum(values)
