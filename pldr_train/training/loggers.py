"""Loggers beside the metrics file: the terminal's line or bar, `logging.also`, and those of `fit`'s caller."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

import lightning.pytorch as pl
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger
from tqdm import tqdm

from pldr_train.errors import RecipeError
from pldr_train.metrics import catalog
from pldr_train.printing import can_show_a_bar, format_seconds
from pldr_train.recipe import Recipe
from pldr_train.runs.layout import CSV_FOLDER, TENSORBOARD_FOLDER


class Progress(Logger):
    """Shows cross-entropy, DAG losses, the last gap between sequential and block NLL, tokens/s and the time left.

    It is a logger, so that it shows the very values that are written to the metrics.

    Args:
        recipe: the resolved recipe.
        stream: where to; a terminal gets a moving bar, anything else one line a log step.
        clock: seconds, monotonic.
    """

    def __init__(
        self, recipe: Recipe, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__()
        self._stream = stream or sys.stdout
        self._clock = clock
        self._max_steps = recipe.trainer.max_steps
        self._dag_is_trained = bool(recipe.dag.trained)
        self._bar: Any = None
        self._begun: tuple[float, int] | None = None
        self._gap: float | None = None

    @property
    def name(self) -> str:
        """Lightning's name of this logger."""
        return "progress"

    @property
    def version(self) -> str:
        """Lightning asks for one."""
        return "0"

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Nothing to show."""

    def begin(self, step: int) -> None:
        """The run goes on from `step`."""
        self._begun = (self._clock(), step)
        if can_show_a_bar(self._stream):
            self._bar = tqdm(
                total=self._max_steps, initial=step, file=self._stream, unit="step", dynamic_ncols=True, leave=True
            )

    def advance(self, step: int) -> None:
        """Step `step` is done."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Show what was logged at a step."""
        assert step is not None
        self._gap = metrics.get(catalog.GAP, self._gap)
        if catalog.TRAIN_LOSS in metrics:
            if self._bar is not None:
                self._bar.set_postfix_str(self._training_text(metrics), refresh=True)
            else:
                left = self._time_left(step)
                self._print(f"step {step:>6}/{self._max_steps}  {self._training_text(metrics)}  {left}")
        if catalog.VAL_LOSS in metrics:
            accuracy = f"accuracy {metrics[catalog.VAL_ACCURACY]:.1%}"
            text = f"validation at step {step}: {self._scores(catalog.VAL, metrics)}  {accuracy}{_gap_text(metrics)}"
            self._bar.write(text, file=self._stream) if self._bar is not None else self._print(text)

    def end(self) -> None:
        """The run is over or left."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _print(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def _training_text(self, metrics: Mapping[str, float]) -> str:
        parts = [self._scores(catalog.TRAIN, metrics)]
        if self._gap is not None:
            parts.append(f"gap {shown_gap(self._gap)}")
        parts.append(f"{metrics[catalog.TOKENS_PER_S]:,.0f} tok/s")
        if self._dag_is_trained:  # at the end, which a narrow terminal cuts off
            dag = [f"{name} {metrics[f'{catalog.TRAIN}/{catalog.dag_name(name)}']:.3g}" for name in catalog.DAG_TENSORS]
            parts.append(f"DAG {' '.join(dag)}")
        return "  ".join(parts)

    def _scores(self, group: str, metrics: Mapping[str, float]) -> str:
        """Return the cross-entropy first: it compares between runs, whatever is trained beside it."""
        text = f"cross-entropy {metrics[f'{group}/{catalog.CROSS_ENTROPY}']:.4f}"
        return f"{text}  with DAG {metrics[f'{group}/{catalog.LOSS}']:.4f}" if self._dag_is_trained else text

    def _time_left(self, step: int) -> str:
        assert self._begun is not None
        begun_at, first_step = self._begun
        if step <= first_step:
            return ""
        seconds = (self._clock() - begun_at) / (step - first_step) * (self._max_steps - step)
        return f"ETA {format_seconds(seconds)}"


class ProgressCallback(pl.Callback):
    """Moves the progress with the loop."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin at the step that the run goes on from."""
        self._progress.begin(trainer.global_step)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """One step further."""
        self._progress.advance(trainer.global_step)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the terminal clean."""
        self._progress.end()


def _gap_text(metrics: Mapping[str, float]) -> str:
    if catalog.GAP not in metrics:
        return ""
    ends = [shown_gap(metrics[end]) for end in (catalog.GAP_LOW, catalog.GAP_HIGH) if end in metrics]
    interval = f" [{', '.join(ends)}]" if ends else ""
    return f"  gap {shown_gap(metrics[catalog.GAP])}{interval}"


def shown_gap(gap: float) -> str:
    """Return a gap in nat/token, to a thousandth."""
    text = f"{gap:.3f}"
    return "0.000" if text == "-0.000" else text


def recipe_loggers(recipe: Recipe, folder: Path, step: int) -> list[Logger]:
    """Return the loggers of `logging.also`, which write below the run's folder.

    Args:
        recipe: resolved.
        folder: the run's.
        step: where this start begins; TensorBoard drops what an earlier start logged after it.

    Raises:
        RecipeError: a package is missing.
    """
    loggers: list[Logger] = []
    for name in dict.fromkeys(recipe.logging.also):
        if name == "csv":  # one folder version_N for each start, as Lightning does
            loggers.append(CSVLogger(folder, name=CSV_FOLDER))
            continue
        try:
            loggers.append(
                TensorBoardLogger(
                    folder, name=TENSORBOARD_FOLDER, version="", default_hp_metric=False, purge_step=step + 1
                )
            )
        except ModuleNotFoundError as error:
            raise RecipeError(
                "logging.also: tensorboard is not installed; pip install 'pldr_train[tensorboard]', or take it out of "
                "logging.also"
            ) from error
    return loggers
