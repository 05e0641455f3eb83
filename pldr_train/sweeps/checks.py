"""What is checked before a sweep goes on: files that its trials need, and whether its spec is still that of before."""

from __future__ import annotations

from typing import Any

from pldr_train.errors import RecipeError
from pldr_train.recipe import compare_for_resume, recipe_from_dict
from pldr_train.recipe.checks import missing_data_files, missing_model_files
from pldr_train.recipe.yaml_text import Problem, read_recipe_file, recipe_error
from pldr_train.sweeps.records import TRIAL_RECIPE, read_sweep_file, write_sweep_file
from pldr_train.sweeps.spec import SWEEPS, SweepSpec
from pldr_train.sweeps.sweep import Sweep

_FIX = "Put the values back, give the sweep a new name, or move {folder} away and begin it again"


def check_before_run(sweep: Sweep) -> None:
    """Check files and spec, and note what was searched.

    Raises:
        RecipeError: files are missing, or trials were begun with another recipe or search.
    """
    problems = {
        problem.text
        for planned in sweep.planned()
        for problem in (*missing_model_files(planned.recipe), *missing_data_files(planned.recipe))
        if not planned.sources.keys() & set(problem.keys)
    }
    if problems:
        raise recipe_error(str(sweep.path), [Problem((), text) for text in sorted(problems)], SWEEPS)
    changed = [*_changed_search(sweep), *_changed_recipes(sweep)]
    if changed:
        listing = "\n  ".join(changed)
        fix = _FIX.format(folder=sweep.folder)
        raise RecipeError(f"{sweep.path}: was changed since trials in {sweep.folder} were begun:\n  {listing}\n{fix}")
    if sweep.spec.sampler.method != "grid":
        sweep.folder.mkdir(parents=True, exist_ok=True)
        write_sweep_file(sweep.folder, {**read_sweep_file(sweep.folder), "search": _search(sweep.spec)})


def _search(spec: SweepSpec) -> dict[str, Any]:
    """Return what decides which cells are drawn; more of them may be drawn later."""
    values = spec.model_dump(mode="json", include={"axes", "conditions", "metric", "goal", "value"})
    return {**values, "sampler.method": spec.sampler.method, "sampler.seed": spec.sampler.seed}


def _changed_search(sweep: Sweep) -> list[str]:
    before = read_sweep_file(sweep.folder).get("search")
    if not isinstance(before, dict) or sweep.spec.sampler.method == "grid":
        return []
    now = _search(sweep.spec)
    return [f"{key}: cells were drawn with another value" for key in now if key in before and before[key] != now[key]]


def _changed_recipes(sweep: Sweep) -> list[str]:
    found: dict[str, list[str]] = {}
    for planned in sweep.planned():
        path = sweep.folder / planned.name / TRIAL_RECIPE
        if not path.is_file():
            continue
        try:
            saved = recipe_from_dict(read_recipe_file(path), str(path))
        except RecipeError:  # damaged; it is written again when the trial is begun
            continue
        for line in compare_for_resume(saved, planned.recipe):
            found.setdefault(line.partition(";")[0], []).append(planned.name)
    return [f"{line} ({_names(names)})" for line, names in found.items()]


def _names(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1:,} more"
