"""Mirrors a run to Weights & Biases while it trains; whatever fails there, the training goes on.

All calls of W&B are made by a thread of their own, in order: a network or disk that does not answer holds up that
thread alone. What fails is reported once, and `pldr-train wandb replay` makes up for it from the run's folder.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers.logger import Logger

from pldr_train.metrics.catalog import STEP, TOKENS
from pldr_train.recipe import Recipe, recipe_to_dict
from pldr_train.runs.layout import CHECKPOINTS_FOLDER, folder_name, snapshot_file
from pldr_train.wandb_runs.artifacts import log_checkpoint
from pldr_train.wandb_runs.media import log_samples, log_snapshot, read_samples
from pldr_train.wandb_runs.opening import (
    Target,
    abandon_service,
    open_run,
    read_environment,
    run_id_of,
    tokens_per_step_of,
)
from pldr_train.wandb_switch import key_is_set, own_switch, resolve_mode

_log = logging.getLogger(__name__)

_MOST_WAITING = 20_000
"""Calls that may wait for W&B's thread; beyond, it is given up."""
_FINISH_S, _FINISH_WITH_CHECKPOINTS_S, _FINISH_FAILED_S = 120.0, 3600.0, 15.0
_GRACE_S = 15.0

_METRICS, _MEDIA, _SAMPLES, _CHECKPOINTS = "metrics", "heatmaps and histograms", "samples", "checkpoints"


class WandbMirror(Logger):
    """A logger of Lightning's that shows a run on W&B: metrics, snapshots, samples and, if asked to, checkpoints.

    Args:
        run: an open W&B run.
        recipe: resolved.
        folder: the run's.
        finish_s: how long the end may take at most.
    """

    def __init__(self, run: Any, recipe: Recipe, folder: Path, finish_s: float = _FINISH_S) -> None:
        super().__init__()
        self.run, self.recipe, self.folder = run, recipe, folder
        self._tokens_per_step = tokens_per_step_of(recipe_to_dict(recipe)) or 0
        self._finish_s = finish_s
        self._last_step: int | None = None
        self._failed: set[str] = set()
        self._shown_samples = 0
        self._shown_snapshots: set[int] = set()
        self._calls: queue.Queue[tuple[str, Callable[[], None]] | None] = queue.Queue(_MOST_WAITING)
        self._thread = threading.Thread(target=self._work, name="wandb-mirror", daemon=True)
        self._thread.start()

    @property
    def name(self) -> str:
        """Lightning's name of this logger."""
        return "wandb"

    @property
    def version(self) -> str:
        """The run's id on W&B."""
        return str(self.run.id)

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Nothing: the config holds the recipe already."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Show a line of metrics, with the axes that a validation's line lacks."""
        assert step is not None
        self._last_step = step
        values = {STEP: step, TOKENS: step * self._tokens_per_step} | dict(metrics)
        self._do(_METRICS, lambda: self.run.log(values, step=step))

    def after_validation(self, step: int) -> None:
        """Show the snapshot and the samples of a step, where there are any."""
        if self.recipe.logging.wandb_media:
            self._do(_MEDIA, lambda: self._show_snapshot(step))
        self._do(_SAMPLES, lambda: self._show_samples(step))

    def log_checkpoint(self, folder: Path, step: int, aliases: tuple[str, ...]) -> None:
        """Upload a checkpoint; it must stay where it is."""
        name = self.recipe.run.name
        self._do(_CHECKPOINTS, lambda: log_checkpoint(self.run, folder, step, aliases, name))

    def finish(self, exit_code: int = 0) -> None:
        """Show what came after the last line, close the run, and wait for that for a bounded time."""
        if self._last_step is not None:
            self.after_validation(self._last_step)
        if _METRICS in self._failed:
            self._drop_waiting()
        with contextlib.suppress(queue.Full):
            self._calls.put_nowait((_METRICS, lambda: self.run.finish(exit_code=exit_code)))
            self._calls.put_nowait(None)
        # After an error other processes, or the user, wait for this one to end.
        patience_s = (self._finish_s if exit_code == 0 else min(self._finish_s, _FINISH_FAILED_S)) + _GRACE_S
        self._thread.join(patience_s)
        if self._thread.is_alive():
            self._tell(_METRICS, f"it did not take everything within {patience_s:.0f} s")
        if _METRICS in self._failed:
            abandon_service()

    # The thread's side.

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            kind, action = call
            try:
                action()
            # Whatever it is that W&B raises, and it raises much: nothing of it may reach the training.
            except Exception as error:
                self._tell(kind, f"{type(error).__name__}: {_first_line(error)}")

    def _do(self, kind: str, action: Callable[[], None]) -> None:
        if self._failed & {kind, _METRICS}:
            return
        try:
            self._calls.put_nowait((kind, action))
        except queue.Full:
            self._tell(_METRICS, "it does not keep up")

    def _drop_waiting(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                self._calls.get_nowait()

    def _tell(self, kind: str, why: str) -> None:
        reported = bool(self._failed & {kind, _METRICS})
        self._failed.add(kind)
        if reported:
            return
        what = "Weights & Biases" if kind == _METRICS else f"{kind} on Weights & Biases"
        _log.warning(
            f"{what}: {why}; the run goes on without, its folder keeps everything. To show it there afterwards: "
            f"pldr-train wandb replay {self.folder}"
        )

    def _show_snapshot(self, step: int) -> None:
        path = snapshot_file(self.folder, step)
        if step in self._shown_snapshots or not path.exists():
            return
        self._shown_snapshots.add(step)
        with contextlib.suppress(FileNotFoundError):  # thinned out meanwhile
            log_snapshot(self.run, path, step)

    def _show_samples(self, step: int) -> None:
        samples = read_samples(self.folder)
        known = [each for each in samples if each["step"] <= step]
        if len(known) > self._shown_samples and known[-1]["step"] == step:
            self._shown_samples = len(known)
            log_samples(self.run, known, step)


class MirrorCallback(pl.Callback):
    """Shows what a step has left in the run's folder; it stands after the callback that writes there.

    Args:
        mirror: of the run.
    """

    def __init__(self, mirror: WandbMirror) -> None:
        self.mirror = mirror
        self._due: list[int] = []
        """Steps whose checkpoint is to be uploaded, and may still be on its way to the disk."""

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Upload a checkpoint that is kept for ever when it is whole, if the recipe asks for that."""
        recipe, step = self.mirror.recipe, trainer.global_step
        if recipe.logging.wandb_checkpoints and step in recipe.checkpoint.also_keep_steps:
            self._due.append(step)
        self._due = [step for step in self._due if not self._upload(step, ("kept",))]

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the snapshot and the samples of the step."""
        if trainer.state.fn == "fit":
            self.mirror.after_validation(trainer.global_step)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Upload the run's last checkpoint, if the recipe asks for that."""
        for step in self._due:
            if step != trainer.global_step:
                self._upload(step, ("kept",))
        if self.mirror.recipe.logging.wandb_checkpoints:
            self._upload(trainer.global_step, ("last",))

    def _upload(self, step: int, aliases: tuple[str, ...]) -> bool:
        """Upload a step's checkpoint; returns whether there is one."""
        folder = self.mirror.folder / CHECKPOINTS_FOLDER / folder_name(step)
        if folder.is_dir():
            self.mirror.log_checkpoint(folder, step, aliases)
            return True
        return False


_open: list[WandbMirror] = []


def wandb_mirror(recipe: Recipe, folder: Path) -> WandbMirror | None:
    """Return a logger whose W&B run keeps its id over resumes, or `None` if W&B is disabled or does not work.

    Where it cannot be online, it reports so and is offline: nothing is lost and `wandb sync` uploads it.

    Args:
        recipe: resolved.
        folder: the run's, with its environment.json.
    """
    wanted = mode = resolve_mode(recipe.logging.wandb)
    if mode == "disabled":
        return None
    switch = own_switch()
    if mode == "online" and switch is not None and switch.mode != "online":
        _log.warning(
            f"Weights & Biases: {switch.source} says {switch.mode}, but logging.wandb=online in the recipe counts: the "
            "run is uploaded; set logging.wandb=auto to follow W&B's own settings"
        )
    if mode == "online" and not key_is_set():
        _log.warning("Weights & Biases: no key is set (`wandb login`, or WANDB_API_KEY); the run is recorded offline")
        mode = "offline"
    longest_s = _FINISH_WITH_CHECKPOINTS_S if recipe.logging.wandb_checkpoints else _FINISH_S
    # The other processes of the run wait for this one to end, too.
    finish_s = min(longest_s, 0.8 * recipe.parallel.timeout_s)
    for each in dict.fromkeys((mode, "offline")):
        try:
            run = _opened(recipe, folder, each, finish_s)
        except Exception as error:  # see WandbMirror._work
            rest = (
                "recorded offline" if each == "online" else f"not mirrored (metrics.jsonl in {folder} has everything)"
            )
            abandon_service()  # it still holds the run
            _log.warning(f"Weights & Biases ({each}): {type(error).__name__}: {_first_line(error)}; the run is {rest}")
        else:
            mirror = WandbMirror(run, recipe, folder, finish_s)
            _open.append(mirror)
            if wanted == "online" and each == "offline":
                _log.info(f"upload it afterwards with: pldr-train wandb replay {folder} --mode online")
            return mirror
    return None


def finish_mirror(exit_code: int = 0) -> None:
    """Close the W&B runs that are open; to be called when the run's samples are written, however the run ended."""
    while _open:
        _open.pop().finish(exit_code)


@contextlib.contextmanager
def finishing_mirror() -> Iterator[None]:
    """Close the W&B runs that were opened meanwhile when all is done, the samples too, or when an error ends it."""
    try:
        yield
    except BaseException:
        finish_mirror(exit_code=1)
        raise
    finish_mirror()


def _opened(recipe: Recipe, folder: Path, mode: str, finish_s: float) -> Any:
    target = Target(
        mode=mode,
        run_id=run_id_of(folder),
        project=recipe.logging.wandb_project,
        entity=recipe.logging.wandb_entity,
        name=recipe.run.name,
        finish_timeout_s=finish_s,
    )
    return open_run(target, folder, recipe_to_dict(recipe), read_environment(folder))


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or "no message"
