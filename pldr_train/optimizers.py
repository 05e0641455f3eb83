"""The optimizers that `optim.name` of a recipe can choose, and the groups of parameters that they are given.

One entry each, and no other module names one. To add an optimizer, add an entry. Its `builder` gets the groups and
returns a `torch.optim.Optimizer` with one of its own groups for each, in their order, whose state of a parameter is as
`state` says. Checkpoints, every strategy, verification and conversion then follow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from pldr_train.errors import RecipeError
from pldr_train.parameter_sets import SETS, matches, unmatched

if TYPE_CHECKING:
    from pldr_train.recipe.schema import GroupSection, OptimSection

DEFAULT_GROUP = "default"
"""Name of the group of all parameters that no entry of optim.groups matches."""


@dataclass(frozen=True)
class StateKind:
    """What an optimizer keeps of a parameter."""

    moments: tuple[str, ...]
    """Keys of its per-element state, which are also their names in checkpoints: an element for each of the parameter.
    """
    update: str | None = None
    """`module:function` for `train/update_ratio`, like `pldr_train.optim.adamw_update`; None: no such metric."""
    counts_steps: bool = True
    """Whether it has the key `step`."""

    def update_of(self) -> Callable[..., Any] | None:
        """Return the function that recomputes the last update, if there is one."""
        return None if self.update is None else _load(self.update)


@dataclass(frozen=True)
class OptimizerKind:
    """What the framework needs to know of an optimizer."""

    optimizer_class: str
    """Dotted name of its class."""
    builder: str
    """`module:function`, called with a list of (ParameterGroup, [(name, parameter), ...]) and the section `optim`;
    imported at its first use."""
    state: StateKind
    matrix_state: StateKind | None = None
    """Of weight matrices, where it differs: those of two axes, embedding and output head aside."""
    strategies: tuple[str, ...] | None = None
    """Values of `parallel.strategy` under which it is exact; None: all."""
    why_not: str = ""
    """Why it is not under the others."""

    def build(self, groups: Any, settings: OptimSection) -> Any:
        """Return the optimizer of groups of (name, parameter) pairs, see `group_parameters`."""
        return _load(self.builder)(groups, settings)

    def state_of(self, name: str, shape: Sequence[int]) -> StateKind:
        """Return what it keeps of a parameter."""
        if self.matrix_state is None or len(shape) != 2 or matches(name, ("embedding", "output_head")):
            return self.state
        return self.matrix_state

    @property
    def moments(self) -> tuple[str, ...]:
        """All names of per-element state, of whatever parameters."""
        more = () if self.matrix_state is None else self.matrix_state.moments
        return (*self.state.moments, *(name for name in more if name not in self.state.moments))


_ADAMW_STATE = StateKind(("exp_avg", "exp_avg_sq"), update="pldr_train.optim:adamw_update")

OPTIMIZERS = {
    "adamw": OptimizerKind(
        optimizer_class="torch.optim.adamw.AdamW",
        builder="pldr_train.optim:adamw_of_groups",
        state=_ADAMW_STATE,
    ),
    "muon": OptimizerKind(
        optimizer_class="pldr_train.optim.MuonWithAdamW",
        builder="pldr_train.optim:muon_of_groups",
        state=_ADAMW_STATE,
        matrix_state=StateKind(("momentum_buffer",), counts_steps=False),
        strategies=("single", "ddp", "fsdp"),
        why_not="which cuts matrices into runs of elements, while an update needs them whole",
    ),
}


def kind_of(optimizer: Any) -> OptimizerKind:
    """Return the entry of an optimizer's class."""
    names = [f"{cls.__module__}.{cls.__qualname__}" for cls in type(optimizer).__mro__]
    return next(kind for name in names for kind in OPTIMIZERS.values() if kind.optimizer_class == name)


def _load(place: str) -> Callable[..., Any]:
    module, _, function = place.partition(":")
    found: Callable[..., Any] = getattr(import_module(module), function)
    return found


# ----------------------------------------------------------------------------------------------- groups of parameters


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that are trained alike."""

    label: str
    """What its metrics are called by."""
    names: tuple[str, ...]
    """Of its parameters, in the model's order."""
    lr_factor: float
    weight_decay: float
    betas: tuple[float, float]
    eps: float
    frozen: bool


def group_labels(settings: OptimSection) -> list[str]:
    """Return what the metrics of each entry of `optim.groups` are called by."""
    return [
        group.name or ("_".join(group.match) if all(each in SETS for each in group.match) else f"group_{number}")
        for number, group in enumerate(settings.groups, start=1)
    ]


def group_parameters(settings: OptimSection, names: Sequence[str]) -> list[ParameterGroup]:
    """Return the groups of a model's parameters: those that no entry of `optim.groups` matches, then each entry's.

    The first is left out where it is empty.

    Args:
        settings: the recipe's.
        names: of all parameters of the model.

    Raises:
        RecipeError: an entry matches nothing, two match the same parameter, or everything is frozen.
    """
    problems = list(_mismatches(settings, names))
    if problems:
        raise RecipeError("\n  ".join(problems))
    rest = tuple(name for name in names if not any(matches(name, group.match) for group in settings.groups))
    own = ParameterGroup(DEFAULT_GROUP, rest, 1.0, settings.weight_decay, settings.betas, settings.eps, frozen=False)
    groups = [own] if rest else []
    for label, group in zip(group_labels(settings), settings.groups, strict=True):
        members = tuple(name for name in names if matches(name, group.match))
        groups.append(_own_settings(label, members, group, settings))
    if all(group.frozen for group in groups):
        raise RecipeError("optim.groups: freezes every parameter, so that nothing is trained; set freeze=false in one")
    return groups


def _own_settings(label: str, names: tuple[str, ...], group: GroupSection, settings: OptimSection) -> ParameterGroup:
    return ParameterGroup(
        label,
        names,
        group.lr_factor,
        settings.weight_decay if group.weight_decay is None else group.weight_decay,
        group.betas or settings.betas,
        group.eps or settings.eps,
        group.freeze,
    )


def _mismatches(settings: OptimSection, names: Sequence[str]) -> Iterator[str]:
    for number, group in enumerate(settings.groups):
        for pattern in unmatched(names, group.match):
            why = "no parameter of this model is in the set" if pattern in SETS else "no parameter's name fits"
            yield (
                f"optim.groups[{number}].match={pattern}: {why}; remove it, name a set ({', '.join(SETS)}), or write a "
                f"pattern over names like {names[len(names) // 2]}"
            )
        for other, later in enumerate(settings.groups[number + 1 :], start=number + 1):
            both = [name for name in names if matches(name, group.match) and matches(name, later.match)]
            if both:
                more = f" and {len(both) - 1} more" if len(both) > 1 else ""
                first, second = _list(group.match), _list(later.match)
                yield (
                    f"optim.groups[{other}].match={second}: matches {both[0]}{more} as optim.groups[{number}].match="
                    f"{first} does; a parameter is in one group: make them one entry with a list, or narrow a pattern"
                )


def _list(patterns: Sequence[str]) -> str:
    return f"[{', '.join(patterns)}]"


def stored_moments(settings: OptimSection, shapes: Mapping[str, Sequence[int]]) -> dict[str, tuple[str, ...]]:
    """Return the names of the moments that are kept of each parameter: none of those that are frozen.

    Args:
        settings: the recipe's.
        shapes: of all parameters of the model, by name.
    """
    kind = OPTIMIZERS[settings.name]
    frozen = {name for group in group_parameters(settings, list(shapes)) if group.frozen for name in group.names}
    return {name: () if name in frozen else kind.state_of(name, shape).moments for name, shape in shapes.items()}
