"""What a run keeps of itself beside its loss: metrics of weights and machine, snapshots, samples, and the alarm that
goes off when the model reads the future.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import lightning.pytorch as pl

from pldr_train.distributed.world import World
from pldr_train.errors import DataError
from pldr_train.metrics import catalog
from pldr_train.recipe import MonitorSection, Recipe
from pldr_train.runs.folder import RunFolder
from pldr_train.runs.snapshots import write_snapshot
from pldr_train.training.module import PldrllmModule
from pldr_train.training.monitor import beating
from pldr_train.training.sampling import sample_texts
from pldr_train.training.saving import datamodule_of
from pldr_train.training.strategies import SharedRun
from pldr_train.training.system_metrics import SystemMetrics
from pldr_train.training.weight_metrics import power_law_norms, update_ratios

_log = logging.getLogger(__name__)

LARGE_GAP = 0.5
"""nat/token. Training text is new to the model, so that only chance parts the two: of ten documents or more, whose mean
NLLs differ by about 1 nat/token, less than this in nine cases of ten. A perplexity 1.65 times as high."""


class Observer:
    """Measures, writes and judges between two steps; every method is called on all processes.

    Args:
        recipe: resolved.
        folder: the run's, written by rank 0.
        world: the processes.
    """

    def __init__(self, recipe: Recipe, folder: RunFolder, world: World) -> None:
        self.recipe, self.folder, self.world = recipe, folder, world
        self.alarm = LeakageAlarm(recipe.monitor)
        self._gap_is_told = False
        self._system: SystemMetrics | None = None

    def step_values(
        self, trainer: pl.Trainer, module: PldrllmModule, tokens_per_s: float, trained_s: float
    ) -> dict[str, float]:
        """The metrics of weights and machine at a log step.

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
                    values |= update_ratios(live, recipe.optim, module.lr_of_step, self.world)
                if recipe.monitor.deductive:
                    values |= power_law_norms(live, recipe.model.num_hidden_layers, self.world)
        if self._system is None:
            self._system = SystemMetrics(recipe, self.world, module.device)
        values |= self._system.values(tokens_per_s, module.monitor_s, trained_s)
        module.monitor_s = 0.0
        return values

    def validated(
        self, trainer: pl.Trainer, module: PldrllmModule, values: Mapping[str, float], trained: Mapping[str, float]
    ) -> str | None:
        """Keep what a validation is kept of; returns why the run must end, if it must.

        Args:
            trainer: after the validation.
            module: its monitor has measured.
            values: what was measured.
            trained: what was measured of the last training steps.
        """
        step = trainer.global_step
        self._judge_gap(trainer, values, trained)
        self._keep_snapshot(module, step)
        is_last = step >= self.recipe.trainer.max_steps
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
        if self._gap_is_told or ours is None or theirs is None or ours - theirs <= LARGE_GAP:
            return
        self._gap_is_told = True
        if self.world.is_main:
            documents = datamodule_of(trainer).split.validation_text()
            _log.warning(
                f"step {trainer.global_step:,}: validation cross-entropy {ours:.3f} exceeds that of the last training "
                f"steps, {theirs:.3f}, by {ours - theirs:.3f} nat/token. The model has learned its training documents "
                "by heart (too many epochs: give more text or lower trainer.max_steps), or the validation documents "
                f"({documents}) are of another kind (data.validation_choice=spread takes some of all)"
            )

    def _samples_at(self, step: int) -> bool:
        """Whether a multiple of `sample.every_steps` has come since the validation before."""
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
            except DataError as error:  # no reason to end a run; its checkpoints will tell whether there is one
                _log.warning(f"step {step:,}: no snapshot was kept: {error}")

    def _sample(self, trainer: pl.Trainer, module: PldrllmModule, step: int) -> None:
        settings = self.recipe.sample
        with beating(module.model, module.monitor.beat):
            tokenizer, together = datamodule_of(trainer).tokenizer, self.world.size > 1
            texts = sample_texts(module.model, tokenizer, settings, self.recipe.run.seed, together)
        if not self.world.is_main:
            return
        try:
            self.folder.add_samples(step, settings.prompts, texts)
        except OSError as error:  # as with snapshots
            _log.warning(f"step {step:,}: no samples were kept: {error.strerror}")


class LeakageAlarm:
    """Judges the gap between sequential and block NLL, and tells of it once, and again when it has doubled.

    Args:
        settings: `max_gap`, and `leakage` for what the message advises.
    """

    def __init__(self, settings: MonitorSection) -> None:
        self._settings = settings
        self._told_gap = 0.0

    def judge(self, values: Mapping[str, float]) -> str | None:
        """What to say of a validation's `leakage/...` values, or None. Without an interval nothing is said."""
        gap, low, high = (values.get(name) for name in (catalog.GAP, catalog.GAP_LOW, catalog.GAP_HIGH))
        if gap is None or low is None or high is None:
            return None
        if catalog.gap_verdict(low, high, self._settings.max_gap) != "leaks":
            return None
        stops = self._settings.leakage == "stop"
        if not stops and gap < 2 * self._told_gap:
            return None
        self._told_gap = gap
        return (
            f"the model reads the future: NLL {values[catalog.BLOCK_NLL]:.3f} nat/token in one pass over a row, "
            f"{values[catalog.SEQUENTIAL_NLL]:.3f} for the same tokens from those before them alone; the gap "
            f"{gap:.3f} (95 % interval {low:.3f} to {high:.3f}) exceeds monitor.max_gap={self._settings.max_gap}. "
            "Its training loss does not say how well it models language. A G that cannot see ahead always helps "
            "(model.gram_chunk_size, model.custom_G_type=identity); in published runs a higher optim.lr or a shorter "
            "optim.warmup_steps did"
        )
