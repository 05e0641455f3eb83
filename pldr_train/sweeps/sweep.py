"""A sweep as an object: its spec and its trials as their folders have them, for runners, reports and notebooks."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pldr_train.errors import RecipeError
from pldr_train.recipe import Recipe, dump_recipe, recipe_from_dict
from pldr_train.recipe.old_keys import replace_old_keys
from pldr_train.recipe.reading import with_home
from pldr_train.recipe.schema import TrainerSection
from pldr_train.recipe.yaml_text import Problem, read_recipe_file, recipe_error, show
from pldr_train.runs.layout import CHECKPOINTS_FOLDER, METRICS_FILE, SAMPLES_FILE, checkpoint_folders, named_step
from pldr_train.runs.lines import read_samples
from pldr_train.runs.metrics import Metrics, read_metrics
from pldr_train.runs.validations import early_end_of
from pldr_train.sweeps.axes import (
    cell_name,
    cell_settings,
    corner_cells,
    grid_cells,
    referenced_label,
    trial_name,
)
from pldr_train.sweeps.records import (
    DONE,
    FAILED,
    LOG_FILE,
    PRUNED,
    RECORD_FILE,
    RUNNING,
    WAITING,
    Record,
    RecordFile,
    is_claimed,
    read_sweep_file,
)
from pldr_train.sweeps.spec import MOST_TRIALS, SWEEPS, SweepSpec, load_spec, spec_path

if TYPE_CHECKING:
    from pldr_train.run import Run

_MOST_TAG_CHARACTERS = 64


@dataclass(frozen=True)
class Planned:
    """A trial that the spec asks for."""

    name: str
    axes: Mapping[str, Any]
    """Axis -> value or label; axes that do not exist in its cell are left out."""
    seed: int
    cell: int
    """Number of its cell in the order of the sweep."""
    recipe: Recipe
    sources: Mapping[str, str]
    """Recipe key -> name of the trial whose run it names; these are done before this one begins."""


class Trial:
    """One trial, as its folder was when `Sweep.trials` was read; metrics are read when they are first used.

    Args:
        planned: what the spec asks for.
        spec: the sweep's.
        folder: the trial's, which is its run's; it need not exist.
        record: what runners have noted.
        is_running: whether someone runs it.
    """

    def __init__(
        self, planned: Planned, spec: SweepSpec, folder: Path, record: Record | None, is_running: bool
    ) -> None:
        self.name, self.axes, self.seed, self.cell = planned.name, planned.axes, planned.seed, planned.cell
        self.recipe, self.folder = planned.recipe, folder
        self.record = record or Record(planned.name, dict(planned.axes), planned.seed, planned.cell)
        self._spec, self._is_running = spec, is_running

    def __repr__(self) -> str:
        return f"Trial({self.name!r}, {self.state}, {self.steps:,} of {self.max_steps:,} steps)"

    @cached_property
    def state(self) -> str:
        """`waiting`, `running` (on whatever machine), `done`, `failed` or `pruned`."""
        if self.record.state in (FAILED, PRUNED):
            return self.record.state
        if self.record.state == DONE and self.record.steps >= self.max_steps:
            return DONE  # also in the moment before its claim is given up
        if self._is_running:
            return RUNNING
        return DONE if is_finished(self.folder, self.recipe) else WAITING

    @property
    def error(self) -> str | None:
        """Of a failed trial: the last lines that it printed."""
        return self.record.error if self.state == FAILED else None

    @property
    def log(self) -> Path:
        """The file with all that it printed."""
        return self.folder / LOG_FILE

    @property
    def started_s(self) -> float | None:
        """Unix time of its first start."""
        return self.record.started_s

    @property
    def ended_s(self) -> float | None:
        """Unix time of its last end; None while it runs."""
        return None if self.state == RUNNING else self.record.ended_s

    @property
    def max_steps(self) -> int:
        """Steps of the whole trial."""
        return self.recipe.trainer.max_steps

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one step."""
        return self.recipe.trainer.batch_size * self.recipe.data.context_length

    @cached_property
    def metrics(self) -> Metrics:
        """All metrics of its run as columns; empty where there are none."""
        try:
            return read_metrics(self.folder / METRICS_FILE)
        except OSError:
            return Metrics(())

    @property
    def steps(self) -> int:
        """The last step in its metrics."""
        return int(self.metrics.steps[-1]) if len(self.metrics.steps) else 0

    @cached_property
    def intermediate(self) -> tuple[tuple[int, float], ...]:
        """The sweep's metric at validations: (step, value) in order; values that are not finite are left out."""
        if self._spec.metric not in self.metrics:
            return ()
        steps, values = self.metrics.points(self._spec.metric)
        pairs = zip(steps.tolist(), values.tolist(), strict=True)
        return tuple((step, value) for step, value in pairs if isinstance(value, float) and math.isfinite(value))

    @property
    def objective(self) -> float | None:
        """The value that counts, the last or the best so far as the spec says; None without any."""
        if not self.intermediate:
            return None
        if self._spec.value == "last":
            return self.intermediate[-1][1]
        best = min if self._spec.goal == "minimize" else max
        return best(value for _, value in self.intermediate)

    @property
    def run(self) -> Run:
        """Its run as an object; imports torch. Raises UserError where the folder holds no run yet."""
        from pldr_train.run import Run  # noqa: PLC0415, torch is not needed for anything else here

        return Run(self.folder)


@dataclass(frozen=True)
class Cell:
    """Trials that differ in their seed alone."""

    name: str
    axes: Mapping[str, Any]
    trials: tuple[Trial, ...]
    """In the order of the seeds."""
    is_baseline: bool
    """Whether it has the values that the spec names as the baseline."""


class Sweep:
    """A sweep: its spec, and its trials as their folders have them at the moment of reading.

    Args:
        path: the spec's file, or the name of one that comes along.
        overrides: recipe keys that all trials have, over those of the spec's `set`.

    Raises:
        RecipeError: the spec, its recipe or the recipe of a trial has problems; all of them are listed.
    """

    def __init__(self, path: str | Path, overrides: Mapping[str, Any] | None = None) -> None:
        self.path = spec_path(path)
        self.spec = load_spec(self.path)
        self._base = _base_values(self.spec, overrides or {}, str(self.path))
        self._files: dict[str, RecordFile] = {}
        self.axes = self.spec.parsed_axes
        self.base = base = self._base_recipe()
        """The recipe that trials differ from, with `set`."""
        self.seeds = self.spec.seeds or (base.run.seed,)
        self.folder = Path(base.run.dir) / self.spec.name
        self._check_metric(base)
        self._static = self._plan_ahead()

    def __repr__(self) -> str:
        return f"Sweep({str(self.path)!r})"

    # What the spec asks for.

    def _base_recipe(self) -> Recipe:
        try:
            return recipe_from_dict(self._values({}, None, "base", {}), str(self.spec.recipe))
        except RecipeError as error:
            lines = [Problem((), f"recipe={self.spec.recipe}: {line}") for line in _problem_lines(error)]
            raise recipe_error(str(self.path), lines, SWEEPS) from None

    def _check_metric(self, base: Recipe) -> None:
        metric = self.spec.metric
        if metric.startswith("leakage/") and base.monitor.targets == 0:
            text = f"metric={metric}: is not measured with monitor.targets=0; raise that, or choose another metric"
            raise recipe_error(str(self.path), [Problem(("metric",), text)], SWEEPS)

    def _values(
        self, axes: Mapping[str, Any], seed: int | None, name: str, sources: Mapping[str, str]
    ) -> dict[str, Any]:
        """Return the recipe of a trial as plain values."""
        values = {section: dict(content) for section, content in self._base.items()}
        settings = cell_settings(self.axes, axes) | {key: str(self.folder / each) for key, each in sources.items()}
        for key, value in settings.items():
            section, _, leaf = key.partition(".")
            values.setdefault(section, {})[leaf] = value
        run = values.setdefault("run", {})
        words = [f"{axis.rpartition('.')[2]}={show(value)}"[:_MOST_TAG_CHARACTERS] for axis, value in axes.items()]
        run["tags"] = [*run.get("tags", ()), *(word for word in words if word not in run.get("tags", ()))]
        run |= {"name": name, "group": self.spec.name}
        if seed is not None:
            run |= {"seed": seed, "dir": str(self.folder)}
        return values

    def _sources(self, axes: Mapping[str, Any], seed: int) -> dict[str, str]:
        """Return recipe key -> name of the trial that a cell names there with `trial:LABEL`."""
        return {
            key: trial_name(cell_name(self.axes, {**axes, axis.name: label}), seed)
            for axis in self.axes
            if axis.name in axes
            for key, value in axis.settings(axes[axis.name]).items()
            if (label := referenced_label(key, value)) is not None
        }

    def plan(self, axes: Mapping[str, Any], seed: int, cell: int) -> Planned:
        """Return the trial of a cell's values and a seed. Raises RecipeError if these make no recipe."""
        name = trial_name(cell_name(self.axes, axes), seed)
        sources = self._sources(axes, seed)
        recipe = recipe_from_dict(self._values(axes, seed, name, sources), name)
        return Planned(name, axes, seed, cell, recipe, sources)

    def _plan_ahead(self) -> list[Planned] | None:
        """Return all trials, where they are known before any is run; checks all recipes that can be known."""
        if self.spec.sampler.method == "tpe":
            self._plan_all(list(corner_cells(self.axes)))
            return None
        if self.spec.sampler.method == "grid":
            cells: list[dict[str, Any]] = []
            for cell in grid_cells(self.axes):
                cells.append(cell)
                if len(cells) * len(self.seeds) > MOST_TRIALS:
                    text = f"axes: more than {MOST_TRIALS:,} trials; leave out values, or draw with sampler.method"
                    raise recipe_error(str(self.path), [Problem(("axes",), text)], SWEEPS)
        else:
            from pldr_train.sweeps.study import random_cells  # noqa: PLC0415, Optuna takes a while to import

            cells = random_cells(self.spec)
        return self._plan_all(cells)

    def _plan_all(self, cells: Sequence[Mapping[str, Any]]) -> list[Planned]:
        planned: list[Planned] = []
        wrong: dict[str, list[str]] = {}
        for number, cell in enumerate(cells):
            try:
                planned += [self.plan(cell, seed, number) for seed in self.seeds]
            except RecipeError as error:
                for line in _problem_lines(error):
                    wrong.setdefault(line, []).append(cell_name(self.axes, cell))
        names = {each.name for each in planned}
        for each in planned:
            for key, source in each.sources.items():
                if source not in names and not wrong:
                    text = f"{key}: needs trial {source}, which the conditions leave out; change one of them"
                    wrong.setdefault(text, []).append(cell_name(self.axes, each.axes))
        if wrong:
            problems = [Problem((), f"{line} ({_where(names, len(cells))})") for line, names in wrong.items()]
            raise recipe_error(str(self.path), problems, SWEEPS)
        return planned

    # What the folders have.

    def planned(self) -> list[Planned]:
        """Return the trials so far: all that there will be, with tpe those that were drawn.

        In a search those that W&B's agents have drawn come last.
        """
        if self.spec.sampler.method == "grid" and self._static is not None:
            return self._static
        known = {planned.name for planned in self._static or ()}
        return [*(self._static or ()), *(planned for planned in self._drawn() if planned.name not in known)]

    def _drawn(self) -> Iterator[Planned]:
        """Yield the trials of cells that were drawn, with all seeds: a kill may have come before all had a record."""
        numbers: dict[str, int] = {}
        cells: dict[str, Mapping[str, Any]] = {}
        for record in self._records():
            try:
                name = cell_name(self.axes, record.axes)
                if trial_name(name, record.seed) != record.name:
                    continue
            except KeyError:  # of a spec that was changed meanwhile
                continue
            cells[name], numbers[name] = record.axes, min(record.cell, numbers.get(name, record.cell))
        for name in sorted(cells, key=lambda each: (numbers[each], each)):
            try:
                yield from [self.plan(cells[name], seed, numbers[name]) for seed in self.seeds]
            except (RecipeError, KeyError):
                continue

    def _records(self) -> Iterator[Record]:
        for path in sorted(self.folder.glob(f"*/{RECORD_FILE}")):
            record = self._file(path.parent.name).read()
            if record is not None and record.name == path.parent.name:
                yield record

    def _file(self, name: str) -> RecordFile:
        return self._files.setdefault(name, RecordFile(self.folder / name))

    def record(self, planned: Planned) -> Record | None:
        """Return what runners have noted of a trial; None before its first start."""
        return self._file(planned.name).read()

    def trial(self, planned: Planned, is_running: bool | None = None) -> Trial:
        """Return a trial as its folder is now; `is_running`: known already, by the holder of its claim."""
        folder = self.folder / planned.name
        if is_running is None:
            is_running = is_claimed(folder)  # first: what ends between the two lines has a record
        return Trial(planned, self.spec, folder, self.record(planned), is_running)

    @property
    def trials(self) -> list[Trial]:
        """All trials, in the order of the sweep."""
        return [self.trial(planned) for planned in self.planned()]

    @property
    def num_trials(self) -> int:
        """How many trials there will be in all, should no cell be drawn twice from here on."""
        return len(self.planned()) + self.num_to_draw * len(self.seeds)

    @property
    def num_drawn(self) -> int:
        """How many cells a search with tpe has drawn so far, those that were drawn twice included."""
        noted = read_sweep_file(self.folder).get("drawn", 0)
        return max(len({planned.cell for planned in self.planned()}), noted if isinstance(noted, int) else 0)

    @property
    def num_to_draw(self) -> int:
        """How many cells a search with tpe has still to draw; 0 for other samplers, whose cells are known."""
        return 0 if self._static is not None else max(0, (self.spec.sampler.trials or 0) - self.num_drawn)

    @property
    def cells(self) -> list[Cell]:
        """All trials by cell, in the order of the sweep."""
        groups: dict[str, list[Trial]] = {}
        for trial in self.trials:
            groups.setdefault(cell_name(self.axes, trial.axes), []).append(trial)
        baseline = self.spec.baseline
        return [
            Cell(
                name,
                trials[0].axes,
                tuple(trials),
                bool(baseline) and all(trials[0].axes.get(axis) == value for axis, value in baseline.items()),
            )
            for name, trials in groups.items()
        ]

    @property
    def best(self) -> Trial | None:
        """The trial that is done and has the best objective; None without any."""
        return self.best_of(self.trials)

    def best_of(self, trials: Iterable[Trial]) -> Trial | None:
        """Return the best of trials that were read already; None if none is done with an objective."""
        sign = 1 if self.spec.goal == "minimize" else -1
        found = [
            (sign * trial.objective, trial) for trial in trials if trial.state == DONE and trial.objective is not None
        ]
        return min(found, key=lambda pair: pair[0])[1] if found else None

    @property
    def strangers(self) -> list[str]:
        """Names of folders of trials that the spec does not ask for, such as those of an axis that was changed."""
        known = {planned.name for planned in self.planned()}
        return [record.name for record in self._records() if record.name not in known]

    def study(self) -> Any:
        """Return an `optuna.Study` of the trials, made of their folders, for importances and plots. Imports Optuna."""
        from pldr_train.sweeps.study import study_of_folders  # noqa: PLC0415, Optuna takes a while to import

        return study_of_folders(self, self.trials)


def is_finished(folder: Path, recipe: Recipe) -> bool:
    """Return whether a run has made all its steps or ended early, saved the last and written its samples."""
    last = recipe.trainer.max_steps
    saved = [named_step(path.name) or 0 for path in checkpoint_folders(folder / CHECKPOINTS_FOLDER)]
    if not saved:
        return False
    if saved[0] < last:
        try:
            ended_early = early_end_of(folder, recipe, saved[0]) is not None
        except OSError:
            ended_early = False
        if not ended_early:
            return False
        last = saved[0]
    if not recipe.sample.prompts:
        return True
    path = folder / SAMPLES_FILE
    if not os.path.lexists(path):
        return False
    try:
        return any(sample.step >= last for sample in read_samples(path)[0])
    except OSError:
        return False


def trial_recipe_text(planned: Planned) -> str:
    """Return the file that `fit` is given."""
    return dump_recipe(planned.recipe)


def _base_values(spec: SweepSpec, overrides: Mapping[str, Any], source: str) -> dict[str, dict[str, Any]]:
    """Return the base recipe's values with `set` and the overrides."""
    values, problems, _ = replace_old_keys(read_recipe_file(Path(spec.recipe)), TrainerSection)
    sections = {name: content for name, content in values.items() if isinstance(content, dict)}
    problems += [
        Problem((name,), f"recipe={spec.recipe}: {name} is no section")
        for name in values
        if name not in sections and values[name] is not None
    ]
    if problems:
        raise recipe_error(source, problems, SWEEPS)
    sections.setdefault("logging", {}).setdefault("progress", False)  # what it prints goes to a file
    for key, value in {**spec.set, **overrides}.items():
        section, _, leaf = key.partition(".")
        sections[section] = {**sections.get(section, {}), leaf: value}
    return with_home(sections)


def _problem_lines(error: RecipeError) -> list[str]:
    lines = str(error).splitlines()
    return [line.strip() for line in lines[1:]] or lines


def _where(names: Sequence[str], number: int) -> str:
    if len(names) == number:
        return "in every cell"
    more = f" and {len(names) - 1:,} more" if len(names) > 1 else ""
    return f"in cell {names[0]}{more}"
