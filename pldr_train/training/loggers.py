"""Loggers beside the run's own metrics file: what `logging.also` names, and what a caller of `fit` gives."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger

from pldr_train.errors import RecipeError
from pldr_train.recipe import Recipe
from pldr_train.runs.layout import CSV_FOLDER, TENSORBOARD_FOLDER


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
