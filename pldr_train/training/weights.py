"""Weights that a run starts from instead of random ones: another model's, and a predefined G."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError

from pldr_train.curvature.files import NAME as CURVATURE_NAME
from pldr_train.curvature.files import read_curvature
from pldr_train.errors import DataError, RecipeError
from pldr_train.model import PldrllmForCausalLM
from pldr_train.recipe import Recipe


def load_initial_weights(model: PldrllmForCausalLM, recipe: Recipe) -> None:
    """Fill a freshly initialised model with what `model.init_from` and `model.custom_G_path` name.

    Raises:
        DataError: a file is missing or unreadable.
        RecipeError: the weights do not fit the recipe's sizes.
    """
    if recipe.model.init_from is not None:
        _load_model(model, Path(recipe.model.init_from))
    if recipe.model.custom_G_path is not None:
        _load_predefined_curvature(model, Path(recipe.model.custom_G_path))


def _load_model(model: PldrllmForCausalLM, folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise DataError(f"model.init_from={folder}: no config.json there; name a folder written by save_pretrained")
    try:
        source = PldrllmForCausalLM.from_pretrained(folder)
    except (OSError, SafetensorError) as error:
        raise DataError(f"model.init_from={folder} cannot be loaded: {error}") from error
    ours, theirs = model.state_dict(), source.state_dict()
    wrong = sorted(
        name
        for name in ours.keys() | theirs.keys()
        if name not in ours or name not in theirs or ours[name].shape != theirs[name].shape
    )
    if wrong:
        raise RecipeError(
            f"model.init_from={folder} has other sizes than this recipe's model ({len(wrong)} tensors differ, the "
            f"first is {wrong[0]}); make the model section equal to its config.json"
        )
    model.load_state_dict(theirs)


def _load_predefined_curvature(model: PldrllmForCausalLM, path: Path) -> None:
    try:
        curvature = read_curvature(path)[CURVATURE_NAME]
    except DataError as error:
        raise DataError(f"model.custom_G_path={path}: {error}") from error
    try:
        model.decoder.set_predefined_curvature(curvature)
    except ValueError as error:
        raise RecipeError(f"model.custom_G_path={path}: {error}") from error
