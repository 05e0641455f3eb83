"""How the layers attend in training and between its steps; `pldr_train.recipe.attention` says what backends need."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from pldr_train.errors import RecipeError
from pldr_train.model import PldrllmForCausalLM
from pldr_train.recipe import Recipe
from pldr_train.recipe.attention import PORTABLE, missing_for_attention
from pldr_train.training.strategies import trains_on_gpu


def check_attention(recipe: Recipe) -> None:
    """Check that this machine has what the recipe's backend needs. Raises RecipeError."""
    missing = missing_for_attention(recipe, torch.cuda.device_count() if trains_on_gpu(recipe) else 0)
    if missing is not None:
        raise RecipeError(missing)


def set_attention(model: PldrllmForCausalLM, recipe: Recipe) -> None:
    """Have a model attend as the recipe says.

    Raises:
        RecipeError: this machine cannot; also where a package of FlashAttention is there and does not work.
    """
    backend = recipe.model.attn_implementation
    if backend in PORTABLE:
        return  # that of its configuration
    check_attention(recipe)
    try:
        model.set_attn_implementation(backend)
    except (ImportError, OSError, ValueError) as error:
        raise RecipeError(f"model.attn_implementation={backend}: {error}; repair that, or set sdpa") from error


@contextmanager
def uncompiled(model: Any) -> Iterator[None]:
    """Around passes of many lengths and any precision: compiled code would be made anew for each length.

    Where training attends through a backend that is compiled too, or computes in bf16 only, they take sdpa.
    """
    backend = model.config._attn_implementation
    if backend not in PORTABLE:
        model.config._attn_implementation = "sdpa"
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        model.config._attn_implementation = backend
