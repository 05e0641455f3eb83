"""The same sweep for Weights & Biases' agents, whose command runs one trial of ours."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from pldr_train.errors import UserError
from pldr_train.recipe.yaml_text import parse_yaml, to_yaml
from pldr_train.sweeps.axes import Axis
from pldr_train.sweeps.sweep import Planned, Sweep

SEED = "run.seed"
_METHODS = {"grid": "grid", "random": "random", "tpe": "bayes"}


def wandb_sweep_yaml(sweep: Sweep, spec: str) -> str:
    """Return W&B's file of a sweep.

    Its agents run `pldr-train sweep trial SPEC axis=value ...`, so that their runs lie in the sweep's folder, under
    the names that our runner gives them.

    Raises:
        UserError: the sweep has conditions, which W&B's sweeps have not, or trials that need others first.
    """
    if sweep.spec.conditions:
        names = ", ".join(sweep.spec.conditions)
        raise UserError(f"conditions={names}: W&B's sweeps know none; leave these axes out, or run it with sweep run")
    for planned in sweep.planned():
        if planned.sources:
            text = f"{planned.name} needs {', '.join(planned.sources.values())} first, and W&B's agents keep no order"
            raise UserError(f"{text}; name runs instead of trial:LABEL, or run it with sweep run")
    parameters = {axis.name: _parameter(axis) for axis in sweep.axes}
    parameters[SEED] = {"values": list(sweep.seeds)}
    values: dict[str, Any] = {
        "name": sweep.spec.name,
        "project": sweep.base.logging.wandb_project,
        "method": _METHODS[sweep.spec.sampler.method],
        "metric": {"name": sweep.spec.metric, "goal": sweep.spec.goal},
        "parameters": parameters,
        "command": ["pldr-train", "sweep", "trial", spec, "${args_no_hyphens}"],
    }
    if sweep.base.logging.wandb_entity is not None:
        values["entity"] = sweep.base.logging.wandb_entity
    if sweep.spec.sampler.trials is not None:
        values["run_cap"] = sweep.num_trials
    return to_yaml(values)


def _parameter(axis: Axis) -> dict[str, Any]:
    span = axis.span
    if span is None:
        # A list or null would come back as Python writes it; as JSON it is a text that we read.
        return {"values": [value if _is_plain(value) else json.dumps(value) for value in axis.values]}
    low, high = (int(span.low), int(span.high)) if span.whole else (span.low, span.high)
    if span.log:
        name = "q_log_uniform_values" if span.whole else "log_uniform_values"
    elif span.whole:
        name = "int_uniform"
    else:
        name = "uniform"
    if span.step is not None:
        return {
            "distribution": "q_uniform",
            "min": low,
            "max": high,
            "q": int(span.step) if span.whole else span.step,
        }
    return {"distribution": name, "min": low, "max": high}


def _is_plain(value: Any) -> bool:
    return isinstance(value, int | float | str) and not isinstance(value, bool)


def planned_of_words(sweep: Sweep, words: Sequence[str]) -> Planned:
    """Return the trial that `axis=value` words name.

    Raises:
        UserError: an axis is unknown, missing or given twice, or has no such value.
    """
    given: dict[str, Any] = {}
    names = [axis.name for axis in sweep.axes]
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or name not in (*names, SEED) or name in given:
            raise UserError(f"{word}: give each of {', '.join((*names, SEED))} once, as {names[0]}=VALUE")
        given[name] = _value_of(sweep, name, text)
    seed = given.pop(SEED, sweep.seeds[0])
    values: dict[str, Any] = {}
    for axis in sweep.axes:
        if axis.is_active(values):
            if axis.name not in given:
                raise UserError(f"{axis.name}: missing; give {axis.name}=VALUE")
            values[axis.name] = given[axis.name]
    for planned in sweep.planned():
        if planned.axes == values and planned.seed == seed:
            return planned
    return sweep.plan(values, seed, len(sweep.planned()))


def _value_of(sweep: Sweep, name: str, text: str) -> Any:
    try:
        value = parse_yaml(text)
    except ValueError as error:
        raise UserError(f"{name}={text}: no value in YAML ({error}); correct it") from error
    if name == SEED:
        if value not in sweep.seeds:
            raise UserError(f"{name}={text}: no seed of the sweep; choose one of {', '.join(map(str, sweep.seeds))}")
        return value
    axis = next(each for each in sweep.axes if each.name == name)
    if axis.span is not None:
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not axis.span.low <= value <= axis.span.high
        ):
            raise UserError(f"{name}={text}: must be a number from {axis.span.low:g} to {axis.span.high:g}")
        return int(value) if axis.span.whole else float(value)
    # A number may come back in another form: 1 for 1.0, "true" for true.
    for choice in axis.values:
        if choice == value or str(choice) == text or json.dumps(choice) == text:
            return choice
    listing = ", ".join(json.dumps(choice) for choice in axis.values)
    raise UserError(f"{name}={text}: no value of that axis; choose one of {listing}")
