"""Tasks of lm-evaluation-harness inside a run: what `evaluate` in the recipe asks for.

All processes score the same items, so that no one waits for another and sharded weights are at hand in every pass. The
run's random generators are left as they were.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pldr_train.checkpoint.state import random_state, restore_random_state
from pldr_train.distributed.world import World
from pldr_train.errors import RecipeError
from pldr_train.metrics.catalog import TASKS_GROUP, task_metric
from pldr_train.model import PldrllmTokenizer
from pldr_train.recipe import Recipe
from pldr_train.recipe.yaml_text import show
from pldr_train.tasks.scoring import SCORINGS, Scoring
from pldr_train.training.module import PldrllmModule
from pldr_train.training.monitor import heartbeat_during

_log = logging.getLogger(__name__)


def check_installed(recipe: Recipe) -> None:
    """Check that the tasks of a recipe, if it has any, can be run here. Raises RecipeError."""
    tasks = recipe.evaluate.tasks
    if tasks and importlib.util.find_spec("lm_eval") is None:
        raise RecipeError(
            f"evaluate.tasks={show(tasks)}: needs lm-evaluation-harness, which is not installed; run `pip install "
            "'lm-eval>=0.4.13,<0.5'` in this environment (it is the extra `eval` of pldr_train), or set it to []"
        )


class _LeftError(Exception):
    """The run leaves in the midst of a task."""


class TaskEvaluation:
    """Scores the model in training on the recipe's tasks; every method is called on all processes.

    Args:
        recipe: resolved.
        world: the processes.
    """

    def __init__(self, recipe: Recipe, world: World) -> None:
        self._recipe, self._settings, self._world = recipe, recipe.evaluate, world
        self._tasks: dict[str, Any] = {}
        self._tokenizer: Any = None
        self._told = set[str]()

    def load(self, tokenizer_path: Path) -> None:
        """Read the tasks and their data; rank 0 first, which fetches what is missing.

        Raises:
            DataError: a task is not known, or cannot be read.
            RecipeError: a metric that the run is judged by is of none of the tasks.
        """
        if not self._settings.tasks:
            return
        self._world.on_all(self._load, here=self._world.is_main)
        self._world.on_all(self._load, here=not self._world.is_main)
        self._world.on_all(self._check_judged)
        self._tokenizer = PldrllmTokenizer(str(tokenizer_path))

    def _load(self) -> None:
        # Imported here: most runs need no lm-evaluation-harness, which takes seconds.
        from pldr_train.tasks.running import load_tasks  # noqa: PLC0415

        folder = self._settings.tasks_dir
        before = random_state()
        try:
            self._tasks = load_tasks(self._settings.tasks, None if folder is None else Path(folder), _asked())
        finally:
            restore_random_state(before)

    def _check_judged(self) -> None:
        for key in ("checkpoint.keep_best", "trainer.early_stop"):
            section, _, leaf = key.partition(".")
            judged = getattr(getattr(self._recipe, section), leaf)
            if judged is None or not judged.metric.startswith(f"{TASKS_GROUP}/"):
                continue
            known = [
                task_metric(name, metric, scoring == "block")
                for name, task in self._tasks.items()
                for metric in task.aggregation()
                for scoring in self._scorings
            ]
            # A filter's name may stand behind that of the metric.
            if not any(judged.metric == name or judged.metric.startswith(f"{name}_") for name in known):
                raise RecipeError(
                    f"{key}.metric={judged.metric}: the tasks of evaluate.tasks give {', '.join(known)}; name one of "
                    "them"
                )

    @property
    def _scorings(self) -> Sequence[Scoring]:
        scoring = self._settings.scoring
        return SCORINGS if scoring == "both" else (scoring,)

    def is_due(self, step: int) -> bool:
        """Return whether the validation after `step` steps is one after which the tasks are scored."""
        trainer = self._recipe.trainer
        number = step // (trainer.validate_every_steps or 1)
        return bool(self._tasks) and (step >= trainer.max_steps or number % self._settings.every_validations == 0)

    def values(self, module: PldrllmModule, leaves: Callable[[], bool]) -> dict[str, float] | None:
        """Return the scores as metrics; None where the run leaves meanwhile.

        Args:
            module: with its model.
            leaves: whether the run leaves; asked before each pass, the same on all processes.

        Raises:
            DataError: an item of a task does not fit the model.
        """

        def before_pass() -> None:
            module.monitor.beat()
            if leaves():
                raise _LeftError

        before = random_state()
        try:
            with module.scoring() as model, heartbeat_during(model, before_pass), contextlib.suppress(_LeftError):
                return self._world.on_all(lambda: self._score(model))
        finally:
            restore_random_state(before)
        return None

    def _score(self, model: Any) -> dict[str, float]:
        from pldr_train.tasks.running import run_task, truncation_text  # noqa: PLC0415, see _load

        values: dict[str, float] = {}
        for name, task in self._tasks.items():
            found = run_task(
                model,
                self._tokenizer,
                name,
                task,
                self._scorings,
                self._settings.limit,
                self._recipe.trainer.micro_batch_size or 1,
                self._recipe.run.seed,
                _asked(),
                together=self._world.size > 1,
                quiet=True,
            )
            text = truncation_text(found, model)
            if text is not None and text not in self._told and self._world.is_main:
                _log.warning(text)
                self._told.add(text)
            for scoring, scored in found.by_scoring.items():
                for metric, value in scored.values.items():
                    values[task_metric(name, metric, scoring == "block")] = value
        return values


def _asked() -> Any:
    from pldr_train.tasks.running import Asked  # noqa: PLC0415, see TaskEvaluation._load

    return Asked("evaluate.tasks=", "evaluate.tasks_dir=")
