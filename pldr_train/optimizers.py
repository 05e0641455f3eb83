"""The optimizers that `optim.name` of a recipe can choose: one entry each, and no other module names one.

To add an optimizer, add an entry. Its `builder` gets the named parameters and the recipe's section and returns a
`torch.optim.Optimizer` whose state of a parameter holds `moments`, each with an element for every element of the
parameter. Checkpoints, every strategy, verification and conversion then follow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class OptimizerKind:
    """What the framework needs to know of an optimizer."""

    optimizer_class: str
    """Dotted name of its class."""
    moments: tuple[str, ...]
    """Keys of its per-element state, which are also their names in checkpoints."""
    builder: str
    """`module:function`, called with (name, parameter) pairs and the section `optim`; imported at its first use."""
    update: str | None = None
    """`module:function` for `train/update_ratio`, like `pldr_train.optim.adamw_update`; None: no such metric."""
    counts_steps: bool = True
    """Whether its state of a parameter has the key `step`."""

    def build(self, named_parameters: Any, settings: Any) -> Any:
        """Return the optimizer of a model's (name, parameter) pairs, as the section `optim` says."""
        return _load(self.builder)(named_parameters, settings)

    def update_of(self) -> Callable[..., Any] | None:
        """Return the function that recomputes the last update, if there is one."""
        return None if self.update is None else _load(self.update)


OPTIMIZERS = {
    "adamw": OptimizerKind(
        optimizer_class="torch.optim.adamw.AdamW",
        moments=("exp_avg", "exp_avg_sq"),
        builder="pldr_train.optim:adamw_of_recipe",
        update="pldr_train.optim:adamw_update",
    )
}


def kind_of(optimizer: Any) -> OptimizerKind:
    """Return the entry of an optimizer's class."""
    names = [f"{cls.__module__}.{cls.__qualname__}" for cls in type(optimizer).__mro__]
    return next(kind for name in names for kind in OPTIMIZERS.values() if kind.optimizer_class == name)


def _load(place: str) -> Callable[..., Any]:
    module, _, function = place.partition(":")
    found: Callable[..., Any] = getattr(import_module(module), function)
    return found
