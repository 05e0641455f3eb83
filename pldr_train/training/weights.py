"""Weights that a run starts from instead of random ones: another model's, and a predefined G."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from pldr_train.building import empty_model, fill_model, model_config, parameters_taken, put_whole
from pldr_train.checkpoint.finding import named_checkpoint
from pldr_train.checkpoint.shards import read_weights
from pldr_train.curvature.files import NAME as CURVATURE_NAME
from pldr_train.curvature.files import read_curvature
from pldr_train.errors import CheckpointError, DataError, RecipeError, UserError
from pldr_train.model import PldrllmConfig, PldrllmForCausalLM
from pldr_train.model.power_law_attention import MetricLearner
from pldr_train.recipe import Recipe
from pldr_train.recipe.attention import FLASH_PACKAGES, PORTABLE
from pldr_train.recipe.schema import Recomputed
from pldr_train.recipe.yaml_text import show
from pldr_train.untrusted import read_json

_log = logging.getLogger(__name__)


def given_weights(model: PldrllmForCausalLM, recipe: Recipe) -> dict[str, Tensor] | None:
    """Return what `model.init_from` names, instead of random weights; None without it.

    Args:
        model: an empty one of the recipe's sizes.
        recipe: resolved. With `model.init_from_only` the parameters that it names are returned.

    Raises:
        DataError: there is no run, checkpoint or model's folder, or it is damaged.
        RecipeError: the weights do not fit the recipe's sizes, or `model.init_from_only` names no parameter.
    """
    if recipe.model.init_from is None:
        return None
    only = recipe.model.init_from_only
    taken = None if only is None else parameters_taken(model, recipe)
    folder = Path(recipe.model.init_from)
    try:
        theirs = _weights_at(folder)
    except UserError as error:
        raise DataError(f"model.init_from={error}") from error
    ours = model.state_dict()
    if taken is not None:
        ours = {name: ours[name] for name in taken}
        theirs = {name: tensor for name, tensor in theirs.items() if name in ours}
    wrong = sorted(
        name
        for name in ours.keys() | theirs.keys()
        if name not in ours or name not in theirs or ours[name].shape != theirs[name].shape
    )
    if wrong:
        part = "" if only is None else f" in what model.init_from_only={show(only)} takes of it"
        raise RecipeError(
            f"model.init_from={folder} has other sizes than this recipe's model{part} ({len(wrong)} tensors differ, "
            f"the first is {wrong[0]}); make the model section equal to its config.json"
        )
    return dict(theirs)


def _weights_at(folder: Path) -> dict[str, Tensor]:
    """Return the weights of a run, a checkpoint or a model's folder, by their names in our code."""
    if (folder / "config.json").is_file():
        return dict(load_model_folder(folder).state_dict())
    checkpoint = named_checkpoint(folder)
    if checkpoint is None:
        raise DataError(
            f"{folder}: no checkpoint and no config.json there; name a run, a checkpoint or a folder written by "
            "save_pretrained"
        )
    return read_weights(checkpoint)


def saved_model(recipe: Recipe, checkpoint: Path) -> PldrllmForCausalLM:
    """Return the model of a checkpoint, on the CPU. Raises CheckpointError if it is damaged."""
    model = empty_model(model_config(recipe))
    fill_model(model, recipe.run.seed, put_whole, read_weights(checkpoint))
    return model


def recompute(model: PldrllmForCausalLM, what: Recomputed) -> None:
    """Have training steps compute parts of the model again in the backward instead of keeping their activations."""
    if what == "layers":
        # Renamed in transformers 5; both are there for a while.
        enable: Any = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    for module in model.modules():
        if isinstance(module, MetricLearner):
            module.recomputes = what == "metric_learner"


def compile_layers(model: PldrllmForCausalLM, backend: Any = "inductor") -> None:
    """Have the decoder layers compiled at their first call: they share their code, so one compilation serves all.

    Args:
        model: sharded already, if it is to be; with its backend of attention. A layer is one graph, but with
            FlashAttention, whose package may interrupt it.
        backend: of torch.compile.
    """
    whole = model.config._attn_implementation not in FLASH_PACKAGES
    for layer in model.decoder.layers:
        layer.compile(backend=backend, fullgraph=whole)


def set_predefined_curvature(model: PldrllmForCausalLM, recipe: Recipe) -> None:
    """Set the G that `model.custom_G_path` names, if it names one.

    Raises:
        DataError: the file is missing or unreadable.
        RecipeError: G does not fit the recipe's sizes.
    """
    if recipe.model.custom_G_path is None:
        return
    path = Path(recipe.model.custom_G_path)
    try:
        curvature = read_curvature(path)[CURVATURE_NAME]
    except DataError as error:
        raise DataError(f"model.custom_G_path={error}") from error
    try:
        model.decoder.set_predefined_curvature(curvature)
    except ValueError as error:
        raise RecipeError(f"model.custom_G_path={path}: {error}") from error


def load_model_folder(source: Path) -> PldrllmForCausalLM:
    """Return the model in a folder in transformers' format, whole, in eval mode.

    Raises:
        CheckpointError: it is another architecture, not all of a language model, or does not fit its own config.json.
        DataError: a weights file is corrupt.
    """
    options = {}
    backend = _attention_of(_model_config(source))
    if backend not in (None, *PORTABLE):
        _log.info(f"{source}: its config.json says attn_implementation={backend}; it attends through sdpa here")
        options["attn_implementation"] = "sdpa"
    try:
        model, loading = PldrllmForCausalLM.from_pretrained(source, output_loading_info=True, **options)
    except SafetensorError as error:
        raise DataError(f"{source}: its weights file is corrupt ({error}); copy it anew") from error
    except RuntimeError as error:
        raise CheckpointError(
            f"{source}: its weights have other sizes than its config.json says; copy both from the same model"
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{source} cannot be loaded: {error}") from error
    # transformers initialises what is missing and goes on. The identity alone comes out of that as it was.
    rebuilt = "decoder.predefined_" if model.config.custom_G_type == "identity" else None
    missing = sorted(name for name in loading["missing_keys"] if rebuilt is None or not name.startswith(rebuilt))
    if missing:
        raise CheckpointError(
            f"{source}: its weights are not all of a language model: {len(missing)} tensors are missing, the first is "
            f"{missing[0]}; copy the folder anew, or name a model that was saved with its language head"
        )
    if model.config.custom_G_type is not None and not bool(torch.isfinite(model.decoder.predefined_curvature).all()):
        raise CheckpointError(
            f"{source}: custom_G_type={model.config.custom_G_type!r}, but its G was never set or is not finite; name a "
            "model that was trained with one"
        )
    model.eval()
    loaded: PldrllmForCausalLM = model
    return loaded


def _attention_of(config: Mapping[str, Any]) -> Any:
    return config.get("attn_implementation", config.get("_attn_implementation"))


def _model_config(source: Path) -> dict[str, Any]:
    """Return what config.json holds. Refuses another architecture's, which would be read as that of a PLDR-LLM of the
    default sizes.
    """
    try:
        config = read_json(source / "config.json")
        found = config.get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{source / 'config.json'} cannot be read ({error}); copy it anew") from error
    if found != PldrllmConfig.model_type:
        raise CheckpointError(
            f"{source}: its config.json says model_type={found!r}, not {PldrllmConfig.model_type!r}; name a PLDR-LLM"
        )
    return dict(config)
