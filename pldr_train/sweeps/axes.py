"""The axes of a sweep, its cells, and the names and recipes of its trials."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field, ValidationError

from pldr_train.recipe import recipe_keys
from pldr_train.recipe.schema import Section
from pldr_train.recipe.yaml_text import Problem, show, suggest_key, type_in_words, unknown_key_text

NOT_SWEPT = {
    "run.name": "each trial has a name of its own",
    "run.dir": "the sweep's folder holds the trials",
    "run.group": "it is the sweep's name",
    "run.seed": "list the seeds under `seeds`",
}
"""Keys that neither `set` nor an axis may have, and why; `run.dir` may stand in `set`."""
RUN_KEYS = ("model.custom_G_path", "model.init_from")
"""Keys that take a run; in a label's group `trial:LABEL` stands for the trial that differs in this label alone."""
_REFERENCE = "trial:"
_FREE_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")
_MOST_NAME_CHARACTERS = 100


class RangeSection(Section):
    """A range of values, both ends included."""

    low: Annotated[float, Field(ge=-1e18, le=1e18)]
    high: Annotated[float, Field(ge=-1e18, le=1e18)]
    log: bool = False
    """Drawn evenly over the logarithm."""
    step: Annotated[float, Field(gt=0, le=1e18)] | None = None
    """Only low, low + step, low + 2 step, ..."""
    whole: Annotated[bool, Field(alias="int")] = False
    """Whole numbers; in the file `int`."""


@dataclass(frozen=True)
class Axis:
    """An axis: a list of choices, or a range."""

    name: str
    choices: Mapping[Any, Mapping[str, Any]] = field(default_factory=dict)
    """Value or label (of a list as a value its JSON) -> recipe keys with their values."""
    values: tuple[Any, ...] = ()
    """The choices as they stand in the file."""
    span: RangeSection | None = None
    only_if: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """The axis exists only where these axes have one of these values."""

    @property
    def label(self) -> str:
        """The last word of its key, or its name."""
        return self.name.rpartition(".")[2]

    def is_active(self, values: Mapping[str, Any]) -> bool:
        """Return whether the axis exists beside these values of the axes before it."""
        return all(name in values and values[name] in allowed for name, allowed in self.only_if.items())

    def settings(self, value: Any) -> Mapping[str, Any]:
        """Return the recipe keys that a value sets."""
        return self.choices[_hashable(value)] if self.span is None else {self.name: value}


def referenced_label(key: str, value: Any) -> str | None:
    """Return the label whose trial a recipe key names with `trial:LABEL`; None for any other value."""
    return value.removeprefix(_REFERENCE) if key in RUN_KEYS and _is_reference(value) else None


def names_trials(content: Any) -> bool:
    """Return whether the content of an axis in a file names trials with `trial:LABEL`."""
    groups = content.values() if isinstance(content, dict) else ()
    return any(_is_reference(value) for group in groups if isinstance(group, dict) for value in group.values())


def _is_reference(value: Any) -> bool:
    return isinstance(value, str) and value.startswith(_REFERENCE)


def _hashable(value: Any) -> Any:
    """Return a key that tells values of different types apart: 1, 1.0 and true are three."""
    return (type(value).__name__, json.dumps(value, sort_keys=True))


def parse_axes(axes: Mapping[str, Any], conditions: Mapping[str, Any]) -> tuple[Axis, ...]:
    """Return the axes of a file that was checked."""
    parsed = []
    for name, content in axes.items():
        only_if = {key: tuple(each) for key, each in conditions.get(name, {}).get("only_if", {}).items()}
        if isinstance(content, list):
            choices = {_hashable(value): {name: value} for value in content}
            parsed.append(Axis(name, choices, tuple(content), None, only_if))
        elif {"low", "high"} & content.keys():
            parsed.append(Axis(name, {}, (), RangeSection.model_validate(dict(content)), only_if))
        else:
            choices = {_hashable(label): group for label, group in content.items()}
            parsed.append(Axis(name, choices, tuple(content), None, only_if))
    return tuple(parsed)


# ---------------------------------------------------------------------------------------------------------- problems


def settings_problems(settings: Mapping[Any, Any], place: str) -> Iterator[Problem]:
    """Yield what is wrong with recipe keys that stand under `place`."""
    known = recipe_keys()
    for key, value in settings.items():
        where = f"{place}.{key}"
        if key in NOT_SWEPT and not (key == "run.dir" and place == "set"):
            yield Problem((where,), f"{where}={show(value)}: cannot be set here, {NOT_SWEPT[key]}; remove it")
        elif key not in known:
            yield Problem((where,), f"{where}={show(value)}: {unknown_key_text(str(key), known)}")
        elif place == "set" and _is_reference(value):
            text = "names a trial, which only the group of a label may; move it there, or name a run"
            yield Problem((where,), f"{where}={show(value)}: {text}")


def axis_problems(
    axes: Mapping[Any, Any], conditions: Mapping[Any, Any], settings: Mapping[Any, Any]
) -> Iterator[Problem]:
    """Yield what is wrong with the axes and conditions of a file."""
    if not axes:
        yield Problem(("axes",), "axes={}: a sweep needs an axis; name a recipe key and a list of values")
    for name, content in axes.items():
        yield from _axis_problems(name, content, settings)
    yield from _shared_keys(axes)
    yield from _condition_problems(axes, conditions)


def _axis_problems(name: Any, content: Any, settings: Mapping[Any, Any]) -> Iterator[Problem]:
    where, known = f"axes.{name}", recipe_keys()
    is_labelled = isinstance(content, dict) and not {"low", "high"} & content.keys()
    if name in NOT_SWEPT:
        yield Problem((where,), f"{where}: cannot be an axis, {NOT_SWEPT[name]}; remove it")
    elif is_labelled and content:
        if name not in known and not (isinstance(name, str) and _FREE_NAME.fullmatch(name)):
            text = "the name of an axis of labels may hold letters, digits, '_' and '-' and begins with a letter"
            yield Problem((where,), f"{where}: {text}; rename it")
        yield from _label_problems(where, content)
    elif content in ([], {}):
        yield Problem((where,), f"{where}={show(content)}: an axis without values; give it some, or remove it")
    elif name not in known:
        near = suggest_key(str(name), known)
        fix = f"did you mean {near}?" if near else "an axis with a list or a range is named after a recipe key"
        yield Problem((where,), f"{where}: no key of a recipe; {fix}")
    elif isinstance(content, dict):
        yield from _range_problems(where, content)
    elif not isinstance(content, list):
        text = f"must be a list, a range or labels, not {type_in_words(content)}; write it as [{show(content)}]"
        yield Problem((where,), f"{where}={show(content)}: {text}")
    else:
        seen = [_hashable(value) for value in content]
        for value in {show(value) for value in content if seen.count(_hashable(value)) > 1}:
            yield Problem((where,), f"{where}={show(content)}: holds {value} twice; remove one")
    if not is_labelled and name in settings:
        text = f"set.{name}={show(settings[name])}: is an axis, too; remove it from one of the two"
        yield Problem((where, f"set.{name}"), text)


def _label_problems(where: str, content: Mapping[Any, Any]) -> Iterator[Problem]:
    for label, group in content.items():
        if not (isinstance(label, str) and _LABEL.fullmatch(label)):
            text = f"{show(label)} is no label; use letters, digits and . _ + - (numbers and null in quotes)"
            yield Problem((where,), f"{where}: {text}")
        elif not isinstance(group, dict):
            text = f"must be a mapping of recipe keys, not {type_in_words(group)}; write {{}} for none"
            yield Problem((where,), f"{where}.{label}={show(group)}: {text}")
        else:
            yield from settings_problems(group, f"{where}.{label}")
            yield from _reference_problems(where, label, content)


def _reference_problems(where: str, label: str, content: Mapping[Any, Any]) -> Iterator[Problem]:
    for key, value in content[label].items():
        if not _is_reference(value):
            continue
        place, source = f"{where}.{label}.{key}", value.removeprefix(_REFERENCE)
        group = content.get(source)
        if key not in RUN_KEYS:
            text = f"names a trial, which this key does not take; {' and '.join(RUN_KEYS)} do"
        elif source == label or not isinstance(group, dict):
            text = f"no other label of this axis; there are {', '.join(map(str, content))}"
        elif any(map(_is_reference, group.values())):
            text = f"the trials of {source} need others themselves; name a label whose trials do not"
        else:
            continue
        yield Problem((place,), f"{place}={show(value)}: {text}")


def _range_problems(where: str, content: Mapping[Any, Any]) -> Iterator[Problem]:
    names = ("low", "high", "log", "step", "int")
    if unknown := [key for key in content if key not in names]:
        text = f"unknown key; a range has {', '.join(names)}"
        yield from (Problem((where,), f"{where}.{key}={show(content[key])}: {text}") for key in unknown)
        return
    if missing := [key for key in ("low", "high") if key not in content]:
        yield Problem((where,), f"{where}.{missing[0]}: missing; a range has both ends")
        return
    try:
        span = RangeSection.model_validate(dict(content))
    except ValidationError as error:
        for each in error.errors(include_url=False):
            expected = "true or false" if each["loc"][0] in ("log", "int") else "a number"
            text = f"must be {expected}, not {type_in_words(each['input'])}; choose another value"
            yield Problem((where,), f"{where}.{each['loc'][0]}={show(each['input'])}: {text}")
        return
    shown = show(dict(content))
    if span.low >= span.high:
        yield Problem((where,), f"{where}={shown}: low is not below high; correct one of them")
    if span.log and span.low <= 0:
        yield Problem((where,), f"{where}={shown}: with log, low must be above 0; raise it")
    if span.log and span.step is not None:
        yield Problem((where,), f"{where}={shown}: log and step exclude each other; remove one")
    ends = [span.low, span.high, *([span.step] if span.step is not None else [])]
    if span.whole and any(not float(end).is_integer() for end in ends):
        yield Problem((where,), f"{where}={shown}: with int, low, high and step must be whole; correct them")


def _shared_keys(axes: Mapping[Any, Any]) -> Iterator[Problem]:
    """Yield the recipe keys that two axes set."""
    owners: dict[str, Any] = {}
    for name, content in axes.items():
        keys = {name}
        if isinstance(content, dict) and not {"low", "high"} & content.keys():
            keys = {key for group in content.values() if isinstance(group, dict) for key in group}
        for key in sorted(map(str, keys)):
            first = owners.setdefault(key, name)
            if first != name:
                text = f"axes.{first} and axes.{name} both set {key}; leave it to one of them"
                yield Problem((f"axes.{first}", f"axes.{name}"), text)


def _condition_problems(axes: Mapping[Any, Any], conditions: Mapping[Any, Any]) -> Iterator[Problem]:
    order = list(axes)
    for name, content in conditions.items():
        where = f"conditions.{name}"
        if name not in axes:
            yield Problem((where,), f"{where}: no such axis; {_near(name, order)}")
            continue
        others = content.get("only_if") if isinstance(content, dict) and list(content) == ["only_if"] else None
        if not isinstance(others, dict) or not others:
            text = "must be {only_if: {AXIS: [VALUES]}}; write it so"
            yield Problem((where,), f"{where}={show(content)}: {text}")
            continue
        for other, allowed in others.items():
            place = f"{where}.only_if.{other}"
            if other not in axes:
                yield Problem((place,), f"{place}={show(allowed)}: no such axis; {_near(other, order)}")
            elif order.index(other) >= order.index(name):
                text = f"axis {other} stands after {name}; move it before it"
                yield Problem((place,), f"{place}={show(allowed)}: {text}")
            elif not isinstance(allowed, list) or not allowed:
                yield Problem((place,), f"{place}={show(allowed)}: must be a list of values of that axis; write [...]")
            elif isinstance(axes[other], dict) and {"low", "high"} & axes[other].keys():
                yield Problem((place,), f"{place}={show(allowed)}: that axis is a range; name one with single values")
            else:
                yield from (
                    Problem((place,), f"{place}={show(value)}: no value of that axis; choose among {show(axes[other])}")
                    for value in allowed
                    if value not in axes[other]
                )


def _near(name: Any, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(name), names, n=1)
    return f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"


# ------------------------------------------------------------------------------------------------------------- cells


def grid_cells(axes: Sequence[Axis]) -> Iterator[dict[str, Any]]:
    """Yield the values of every cell of a grid, the last axis changing fastest; axes that do not exist are left out."""

    def following(place: int, values: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if place == len(axes):
            yield values
            return
        axis = axes[place]
        if not axis.is_active(values):
            yield from following(place + 1, values)
            return
        for value in axis.values:
            yield from following(place + 1, {**values, axis.name: value})

    return following(0, {})


def corner_cells(axes: Sequence[Axis]) -> Iterator[dict[str, Any]]:
    """Yield cells that have each value, and both ends of each range, at least once, for checks before a search."""
    ends = {axis.name: _ends(axis) for axis in axes}
    for changed in axes:
        for value in ends[changed.name]:
            values: dict[str, Any] = {}
            for axis in axes:
                if axis is changed:
                    values[axis.name] = value
                elif axis.is_active(values):
                    allowed = changed.only_if.get(axis.name, ends[axis.name])
                    values[axis.name] = allowed[0]
            yield {axis.name: values[axis.name] for axis in axes if axis.is_active(values) and axis.name in values}


def _ends(axis: Axis) -> tuple[Any, ...]:
    if axis.span is None:
        return axis.values
    ends = (axis.span.low, axis.span.high)
    return tuple(map(int, ends)) if axis.span.whole else tuple(map(float, ends))


def cell_settings(axes: Sequence[Axis], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recipe keys that a cell sets."""
    return {
        key: setting
        for axis in axes
        if axis.name in values
        for key, setting in axis.settings(values[axis.name]).items()
    }


def values_digest(values: Mapping[str, Any]) -> str:
    """Return eight hexadecimal digits that stand for a cell's values."""
    return hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=4).hexdigest()


def cell_name(axes: Sequence[Axis], values: Mapping[str, Any]) -> str:
    """Return the readable name of a cell, which is safe as a folder's: lr-0.001_warmup_steps-20.

    Where it does not say the values exactly, or would be too long, a digest of them follows.
    """
    labels = [axis.label for axis in axes]
    parts, exact = [], True
    for axis in axes:
        if axis.name not in values:
            continue
        label = axis.label if labels.count(axis.label) == 1 else axis.name
        word, is_exact = _word(values[axis.name])
        parts.append(f"{label}-{word}")
        exact = exact and is_exact
    name = "_".join(parts) or "cell"
    if exact and len(name) <= _MOST_NAME_CHARACTERS:
        return name
    return f"{name[: _MOST_NAME_CHARACTERS - 9]}-{values_digest(values)}"


def _word(value: Any) -> tuple[str, bool]:
    """Return a value as a word of a folder's name, and whether it says the value exactly."""
    if isinstance(value, float):
        text = f"{value:.6g}"
        exact = float(text) == value
    else:
        text, exact = (value, True) if isinstance(value, str) else (json.dumps(value), True)
    word = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-") or "x"
    return word, exact and word == text


def trial_name(cell: str, seed: int) -> str:
    """Return the name of a trial of a cell."""
    return f"{cell}_seed-{seed}"
