"""The file of a sweep: its keys, and what must hold between them. All problems are reported in one RecipeError."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError

from pldr_train.metrics.catalog import why_unknown
from pldr_train.recipe.schema import Section, Text
from pldr_train.recipe.yaml_text import (
    NAME_PATTERN,
    FileKind,
    Problem,
    read_recipe_file,
    recipe_error,
    rephrase,
    show,
)
from pldr_train.sweeps.axes import Axis, axis_problems, names_trials, parse_axes, settings_problems

SWEEPS = FileKind(
    "sweep",
    Path("recipes/sweeps"),
    "a sweep needs name, recipe and axes, see docs/sweeps.md",
    "a sweep is made of keys such as `name:`, `recipe:` and `axes:`",
)
MOST_TRIALS = 10_000

Count = Annotated[int, Field(ge=1, le=MOST_TRIALS)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Name = Annotated[str, Field(pattern=NAME_PATTERN, max_length=64)]


def _method_alone(value: Any) -> Any:
    return {"method": value} if isinstance(value, str) else value


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(values)) != len(values):
        raise ValueError("holds a value twice")
    return values


class SamplerSection(Section):
    """Which cells of the axes become trials."""

    method: Literal["grid", "random", "tpe"] = "grid"
    """grid: every combination of the axes' values; random: drawn independently; tpe: drawn where earlier trials were
    good (Optuna's tree-structured Parzen estimator)."""
    trials: Count | None = None
    """With random and tpe: how many cells are drawn, each of which is run with every seed."""
    seed: Seed = 0
    """With random and tpe: of the draws."""


class BudgetSection(Section):
    """Where the sweep ends although cells are left; null: nowhere."""

    trials: Count | None = None
    """Trials that are begun, those that failed included."""
    tokens: Annotated[int, Field(ge=1, le=2**60)] | None = None
    """Tokens that all trials train on. A trial that would exceed them is not begun."""
    hours: Annotated[float, Field(gt=0, le=1e6)] | None = None
    """Hours that trials run, added up over trials. Once they are used up, the running trials save and stop."""


class PruningSection(Section):
    """Which trials are stopped before their end, judged at their validations by the sweep's metric."""

    method: Literal["none", "median", "hyperband"] = "none"
    """median: what is worse than the median of the trials before it at the same step; hyperband: Optuna's Hyperband."""
    warmup_steps: Annotated[int, Field(ge=0, le=10**9)] = 0
    """No trial is stopped before this step; with hyperband the least step at which one is stopped."""
    startup_trials: Annotated[int, Field(ge=0, le=MOST_TRIALS)] = 5
    """With median: no trial is stopped before so many are done."""


class SweepSpec(Section):
    """A sweep. Build one with `load_spec`, whose errors are worded for users."""

    name: Name
    """Its folder is <run.dir of the recipe>/<name>, with a folder in it for each trial."""
    recipe: Text
    """The recipe that trials differ from: a file, relative to the working directory, or the name of one that comes
    along."""
    set: dict[str, Any] = {}  # noqa: RUF012, pydantic copies it
    """Recipe keys with the values that all trials have instead of the recipe's."""
    axes: dict[str, Any]
    """What trials differ in: a recipe key with a list of values or a range, or any name with labels of groups of
    keys."""
    conditions: dict[str, Any] = {}  # noqa: RUF012
    """Axes that exist only where another axis has certain values: {axis: {only_if: {other axis: [values]}}}."""
    seeds: Annotated[tuple[Seed, ...], BeforeValidator(_as_tuple), AfterValidator(_distinct)] = ()
    """Each cell is run with each of them as run.seed; []: the recipe's own alone."""
    sampler: Annotated[SamplerSection, BeforeValidator(_method_alone)] = SamplerSection()
    metric: Text = "leakage/sequential_nll"
    """The objective: a metric of validations."""
    goal: Literal["minimize", "maximize"] = "minimize"
    value: Literal["last", "best"] = "last"
    """Which of a trial's values counts."""
    baseline: dict[str, Any] = {}  # noqa: RUF012
    """Values of axes that name the cells which others are compared with; those of the same values of the axes left
    out."""
    budget: BudgetSection = BudgetSection()
    pruning: Annotated[PruningSection, BeforeValidator(_method_alone)] = PruningSection()
    max_failures: Annotated[int, Field(ge=1, le=MOST_TRIALS)] | None = None
    """After so many failed trials no more are begun; null: all are."""
    storage: Text | None = None
    """URL of Optuna's storage, such as postgresql://user@host/name; null: the file study.journal in the sweep's
    folder."""

    @property
    def parsed_axes(self) -> tuple[Axis, ...]:
        """The axes in the order of the file."""
        return parse_axes(self.axes, self.conditions)


def load_spec(path: str | Path) -> SweepSpec:
    """Read a sweep's file (YAML 1.2) and check it, its recipe aside.

    Raises:
        RecipeError: the file cannot be read, or has problems, all of which are listed.
    """
    return spec_from_dict(read_recipe_file(Path(path), SWEEPS), str(path))


def spec_from_dict(values: Mapping[str, Any], source: str = "sweep") -> SweepSpec:
    """Build a sweep from plain values; `source` names them in the RecipeError."""
    try:
        spec = SweepSpec.model_validate(dict(values))
    except ValidationError as error:
        problems = [_worded(each, values) for each in error.errors(include_url=False)]
        problems += _problems_of_mappings(values)
        raise recipe_error(source, problems, SWEEPS) from None
    problems = [*_problems_of_mappings(values), *_problems_between_keys(spec)]
    if problems:
        raise recipe_error(source, problems, SWEEPS)
    return spec


def _worded(error: Any, values: Mapping[str, Any]) -> Problem:
    """Word one record of pydantic's error."""
    place = [str(part) for part in error["loc"]]
    key, known = ".".join(place), _keys_beside(place)
    if error["type"] == "missing":
        return Problem((key,), f"{key}: missing; add it to the file")
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(place[-1], known, n=1, cutoff=0.5)
        fix = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        return Problem((key,), f"{key}={show(error['input'])}: unknown key; {fix}")
    if error["type"] == "dict_type":
        return Problem((key,), f"{key}={show(error['input'])}: must be a mapping; indent its entries below it")
    return rephrase(error, values, ())


def _keys_beside(place: Sequence[str]) -> list[str]:
    sections: dict[str, type[Section]] = {
        "sampler": SamplerSection,
        "budget": BudgetSection,
        "pruning": PruningSection,
    }
    section = sections.get(place[0], SweepSpec) if len(place) > 1 else SweepSpec
    return list(section.model_fields)


def _problems_of_mappings(values: Mapping[str, Any]) -> list[Problem]:
    """Check what pydantic leaves open, as far as it is a mapping at all."""
    axes, conditions, settings = (values.get(name, {}) for name in ("axes", "conditions", "set"))
    problems: list[Problem] = []
    if isinstance(settings, dict):
        problems += settings_problems(settings, "set")
    if isinstance(axes, dict):
        problems += axis_problems(
            axes,
            conditions if isinstance(conditions, dict) else {},
            settings if isinstance(settings, dict) else {},
        )
    return problems


def _problems_between_keys(spec: SweepSpec) -> Iterator[Problem]:
    sampler = spec.sampler
    searches = sampler.method != "grid"
    if searches and sampler.trials is None:
        yield Problem(
            ("sampler.trials",), f"sampler.trials: missing; sampler.method={sampler.method} needs the number of cells"
        )
    if not searches and sampler.trials is not None:
        yield Problem(
            ("sampler.trials",),
            f"sampler.trials={sampler.trials}: sampler.method=grid runs every cell; remove it, or set budget.trials",
        )
    if searches and any(map(names_trials, spec.axes.values())):
        text = f"sampler.method={sampler.method}: an axis names trials (trial:LABEL), which may not be drawn"
        yield Problem(("sampler.method",), f"{text}; use grid, or name runs")
    for name, values in spec.axes.items():
        if not searches and isinstance(values, dict) and {"low", "high"} & values.keys():
            text = f"axes.{name}={show(values)}: a range, of which sampler.method=grid knows no values"
            yield Problem((f"axes.{name}",), f"{text}; write a list, or set sampler.method to random or tpe")
    problem = why_unknown(spec.metric)
    if problem is not None:
        yield Problem(("metric",), f"metric={spec.metric}: {problem}")
    if spec.pruning.method == "hyperband" and spec.pruning.warmup_steps == 0:
        text = "pruning.warmup_steps=0: Hyperband needs the least step at which a trial may be stopped; set it"
        yield Problem(("pruning.warmup_steps",), f"{text}, for instance to the second validation's")
    yield from _baseline_problems(spec)


def _baseline_problems(spec: SweepSpec) -> Iterator[Problem]:
    for name, value in spec.baseline.items():
        if name not in spec.axes:
            near = difflib.get_close_matches(str(name), list(spec.axes), n=1)
            fix = f"did you mean {near[0]}?" if near else f"there are {', '.join(spec.axes)}"
            yield Problem((f"baseline.{name}",), f"baseline.{name}={show(value)}: no such axis; {fix}")
            continue
        choices = spec.axes[name]
        if isinstance(choices, list | dict) and not (isinstance(choices, dict) and {"low", "high"} & choices.keys()):
            if value not in choices:
                listing = ", ".join(map(show, choices))
                text = f"baseline.{name}={show(value)}: no value of that axis; choose one of {listing}"
                yield Problem((f"baseline.{name}",), text)
        else:
            text = f"baseline.{name}={show(value)}: that axis is a range, which holds no value for certain; remove it"
            yield Problem((f"baseline.{name}",), text)


def spec_path(path: str | Path) -> Path:
    """Return a spec's path with `~` replaced."""
    return Path(os.path.expanduser(path))
