"""Recipes read, written, and compared with that of a run that goes on."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pldr_train.recipe.checks import unusual_values
from pldr_train.recipe.old_keys import OLD_KEYS, replace_old_keys
from pldr_train.recipe.schema import PATH_KEYS, CrossCheckError, Recipe, TrainerSection, entry_keys, recipe_keys
from pldr_train.recipe.yaml_text import (
    Problem,
    apply_overrides,
    read_recipe_file,
    recipe_error,
    rephrase,
    show,
    to_yaml,
)

MAY_CHANGE_ON_RESUME = (
    "run.name",
    "run.dir",
    "run.notes",
    "run.tags",
    "run.group",
    "model.attn_implementation",
    "data.cache_dir",
    "data.num_workers",
    "data.source",
    "data.path",
    "data.tokenizer",
    "data.retries",
    "data.on_bad_shard",
    "trainer.max_steps",
    "trainer.validate_every_steps",
    "trainer.validation_rows",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.on_nonfinite",
    "trainer.max_nonfinite_steps",
    "trainer.threads",
    "trainer.compile",
    "trainer.micro_batch_size",
    "trainer.early_stop",
    "parallel.",
    "checkpoint.",
    "logging.",
    "monitor.",
    "evaluate.",
    "sample.",
)
"""Keys (or, ending in a dot, sections) that a resumed run may set differently from the saved one.

Where the documents and the tokenizer come from may change: what they are is compared by itself (files, rows, bytes).
A new name goes on from another run's checkpoint.
"""


_OF_ONE_RUN = frozenset({"run.name", "run.dir", "run.notes", "run.tags", "run.group", "run.seed"})


def _note(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"note: {text}", file=sys.stderr)


def load_recipe(path: str | Path, overrides: Sequence[str] = (), notice: Callable[[str], None] = _note) -> Recipe:
    """Read a recipe file (YAML 1.2), set the overrides ("optim.lr=1e-3", value in YAML) and check everything.

    `notice` is called for each key of an earlier version that was replaced, and for what is allowed and rarely wanted;
    by default it prints to standard error, on rank 0 alone.
    Raises RecipeError: for a file that is missing, empty or no YAML at once, otherwise one error with all problems.
    """
    # The file's old keys are replaced before the overrides are set: they mean what they meant with the file's values.
    values, problems, notices = replace_old_keys(read_recipe_file(Path(path)), TrainerSection)
    values, wrong = apply_overrides(values, overrides, (*recipe_keys(), *OLD_KEYS))
    values, of_overrides, more = replace_old_keys(values, TrainerSection, overrides)
    recipe = _checked(with_home(values), [*problems, *wrong, *of_overrides], str(path))
    for text in [*notices, *more, *unusual_values(recipe)]:
        notice(text)
    return recipe


def with_home(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values with `~` and `~user` in paths replaced, as a shell does it."""
    result = dict(values)
    for key in PATH_KEYS:
        section, _, leaf = key.partition(".")
        content = result.get(section)
        if isinstance(content, Mapping) and isinstance(content.get(leaf), str):
            result[section] = {**content, leaf: os.path.expanduser(content[leaf])}
    return result


def recipe_from_dict(values: Mapping[str, Any], source: str = "recipe") -> Recipe:
    """Build a recipe from nested plain values, such as a checkpoint's; `source` names them in the RecipeError."""
    values, problems, _ = replace_old_keys(values, TrainerSection)
    return _checked(values, problems, source)


def _checked(values: Mapping[str, Any], problems: Sequence[Problem], source: str) -> Recipe:
    """Validate, or raise one RecipeError with `problems` first, then wrong keys and values, then clashes."""
    wrong = list(problems)
    try:
        recipe = Recipe.model_validate(dict(values))
    except ValidationError as error:
        if not (clashes := _clashes(error)):
            wrong += [rephrase(each, values, recipe_keys(), entry_keys()) for each in error.errors(include_url=False)]
            clashes = _clashes_between_the_rest(values, wrong)
        keys = {key for problem in wrong for key in problem.keys}
        clashes = [
            clash for clash in clashes if not keys & {*clash.keys, *(key.partition(".")[0] for key in clash.keys)}
        ]
        raise recipe_error(source, [*wrong, *clashes]) from None
    if wrong:
        raise recipe_error(source, wrong)
    return recipe


def _clashes(error: ValidationError) -> list[Problem]:
    """Return the problems between keys that an error carries; none when single keys are wrong."""
    causes = (each.get("ctx", {}).get("error") for each in error.errors(include_url=False))
    return [problem for cause in causes if isinstance(cause, CrossCheckError) for problem in cause.problems]


def _clashes_between_the_rest(values: Mapping[str, Any], wrong: Sequence[Problem]) -> list[Problem]:
    """Return the problems between keys as if the wrong ones were left out."""
    keys = {key for problem in wrong for key in problem.keys}
    rest = {
        section: {name: value for name, value in content.items() if f"{section}.{name}" not in keys}
        for section, content in values.items()
        if section in Recipe.model_fields and isinstance(content, Mapping)
    }
    rest["run"] = {"name": "unnamed", **rest.get("run", {})}
    try:
        Recipe.model_validate(rest)
    except ValidationError as error:
        return _clashes(error)
    return []


def recipe_to_dict(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Return the recipe as nested plain values (lists for pairs); `recipe_from_dict` gives back an equal recipe."""
    return recipe.model_dump(mode="json")


def dump_recipe(recipe: Recipe) -> str:
    """Write a recipe as YAML that loads back to an equal one, floats to the last bit."""
    return to_yaml(recipe_to_dict(recipe))


def recipe_json_schema() -> dict[str, Any]:
    """Return the JSON Schema of a recipe file, for editors."""
    return Recipe.model_json_schema()


def may_change_on_resume(key: str) -> bool:
    """Return whether a resumed run may have another value of a key than the saved one."""
    return any(key.startswith(each) if each.endswith(".") else key == each for each in MAY_CHANGE_ON_RESUME)


def without_seed(values: Mapping[str, str]) -> dict[str, str]:
    """Return a recipe's keys and values without those of a single run: its seed, names, notes and folder.

    Args:
        values: dotted key -> value.
    """
    return {key: value for key, value in values.items() if key not in _OF_ONE_RUN}


def name_without_seed(name: str, seed: object) -> str | None:
    """Return the name of a run without its own seed; None if it does not end in that."""
    match = re.fullmatch(rf"(.+?)[-_.]?(?:s|seed)[-_.]?0*{re.escape(str(seed))}", name)
    return match.group(1) if match else None


def compare_for_resume(saved: Recipe, new: Recipe) -> list[str]:
    """Say which keys of `new` forbid going on with the run that `saved` describes, one line each; empty: none.

    Both are compared with their derived values filled in, so a default that is written out is no difference.
    """
    saved, new = saved.going_on(saved), new.going_on(saved)
    before, after = recipe_to_dict(saved.resolved()), recipe_to_dict(new.resolved())
    problems = []
    for key in recipe_keys():
        section, _, leaf = key.partition(".")
        old, current = before[section][leaf], after[section][leaf]
        if key == "data.validation_choice" and new.data.validation_documents is not None:
            continue  # an interval leaves nothing to choose
        if old != current and not may_change_on_resume(key):
            problems.append(f"{key}={show(current)}: the saved run has {show(old)}; set it back, or start another run")
    return problems


def refused_resume(problems: Sequence[str], checkpoint: Path) -> str:
    """Return the message about what `compare_for_resume` found of a checkpoint."""
    listing = "\n  ".join(problems)
    return (
        f"the recipe differs from that of {checkpoint}:\n  {listing}\n"
        "Put the values back, give the run a new run.name, start over with --resume never, or resume all the same "
        "with --force"
    )
