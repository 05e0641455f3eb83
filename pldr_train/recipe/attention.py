"""Attention backends that do not run everywhere: what each needs of the recipe and of the machine."""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from typing import TYPE_CHECKING

from pldr_train.recipe.yaml_text import Problem

if TYPE_CHECKING:
    from pldr_train.recipe.schema import Recipe

PORTABLE = ("sdpa", "eager")
"""Backends of every device and precision. Weights depend on no backend, so what is loaded attends through these."""
FLEX = "flex_attention"
FLASH_PACKAGES = {
    "flash_attention_2": "flash-attn",
    "flash_attention_3": "flash-attn-3",
    "flash_attention_4": "flash-attn-4",
}
"""The distribution that each version of FlashAttention comes in; transformers calls all of them alike."""
_KEY = "model.attn_implementation"
_FLASH_WIDEST, _FLEX_NARROWEST = 256, 16


def is_installed(distribution: str) -> bool:
    """Return whether a distribution is installed; nothing is imported."""
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def attention_clashes(recipe: Recipe) -> list[Problem]:
    """List what contradicts the backend within the recipe."""
    backend, width = recipe.model.attn_implementation, recipe.model.head_dim
    problems = []

    def refuse(other: str, why: str) -> None:
        problems.append(Problem((_KEY, other), f"{_KEY}={backend}: {why}"))

    if backend in PORTABLE:
        return []
    if recipe.trainer.accelerator == "cpu":
        refuse(
            "trainer.accelerator", "trains on a GPU only, but trainer.accelerator=cpu; set sdpa, or auto or cuda there"
        )
    if backend == FLEX and width < _FLEX_NARROWEST:
        refuse(
            "model.head_dim", f"needs a head_dim of at least {_FLEX_NARROWEST}, not model.head_dim={width}; set sdpa"
        )
    if backend in FLASH_PACKAGES and recipe.trainer.precision != "bf16":
        why = f"computes in bf16 only, but trainer.precision={recipe.trainer.precision}; set sdpa, or bf16 there"
        refuse("trainer.precision", why)
    if backend in FLASH_PACKAGES and width > _FLASH_WIDEST:
        refuse("model.head_dim", f"needs a head_dim of at most {_FLASH_WIDEST}, not model.head_dim={width}; set sdpa")
    return problems


def missing_for_attention(recipe: Recipe, gpus: int, has: Callable[[str], bool] = is_installed) -> str | None:
    """Return what the backend needs and a machine lacks, with the fix; None if nothing is known to be missing.

    Args:
        recipe: to be trained there.
        gpus: that the run can use there.
        has: whether a distribution is installed there.
    """
    backend = recipe.model.attn_implementation
    if backend in PORTABLE:
        return None
    if not gpus:
        return f"{_KEY}={backend}: trains on a GPU only, and torch sees none here; set sdpa"
    package = FLASH_PACKAGES.get(backend)
    if package is not None and not has(package):
        return f"{_KEY}={backend}: needs the package {package}, which is not installed; install it, or set sdpa"
    return None
