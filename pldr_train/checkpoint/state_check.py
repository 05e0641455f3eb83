"""What a checkpoint's state file must hold for a run to go on from it, looked at without changing anything."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pldr_train.checkpoint.manifest import STATE_FILE
from pldr_train.checkpoint.state import STATE_FORMAT, STATE_KEY, settle_loop_progress
from pldr_train.data.rows.loader import LaneState
from pldr_train.errors import CheckpointError, UserError
from pldr_train.metrics.catalog import QUANTITIES
from pldr_train.runs.layout import MANIFEST_FILE
from pldr_train.runs.nonfinite import NonFiniteRecord

_ENTRIES: Mapping[str, type | tuple[type, ...]] = {
    "step": int,
    "optimizer_step": int,
    "recipe": dict,
    "lanes": dict,
    "source": dict,
    "random": list,
    "windows": list,
    "pending": dict,
    "validation_owed": bool,
    "nonfinite": dict,
}
_LIGHTNINGS: Mapping[str, type | tuple[type, ...]] = {
    "epoch": int,
    "global_step": int,
    "pytorch-lightning_version": str,
    "loops": dict,
    "callbacks": dict,
    "lr_schedulers": list,
}
_BROKEN = (AttributeError, IndexError, KeyError, OverflowError, RuntimeError, TypeError, ValueError)
"""What taking back something of another form raises."""


def state_problems(whole: Mapping[str, Any], manifest: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with a state file's content; a state of another format is left to who resumes.

    Args:
        whole: the file's content.
        manifest: of its checkpoint.
    """
    state = whole[STATE_KEY]
    if not isinstance(state, dict) or not isinstance(state.get("format"), int):
        yield f"{STATE_FILE} does not say its format"
        return
    if state["format"] != STATE_FORMAT:
        return
    wrong = [*_wrong_types(state, _ENTRIES), *_wrong_types(whole, _LIGHTNINGS)]
    if wrong:
        yield f"{STATE_FILE} lacks {', '.join(wrong)}, or holds something else there"
        return
    yield from _disagreements(state, manifest)
    for what, take_back in _parts(whole, state):
        try:
            take_back()
        except (*_BROKEN, UserError) as error:
            yield f"{STATE_FILE} holds no {what} that a run can go on with ({type(error).__name__}: {error})"


def _wrong_types(found: Mapping[str, Any], expected: Mapping[str, type | tuple[type, ...]]) -> list[str]:
    return [
        name
        for name, kind in expected.items()
        if not isinstance(found.get(name), kind) or (kind is int and isinstance(found[name], bool))
    ]


def _disagreements(state: Mapping[str, Any], manifest: Mapping[str, Any]) -> Iterator[str]:
    step, info = manifest["step"], manifest["info"]
    if state["step"] != step:
        yield f"{STATE_FILE} is of step {state['step']}, {MANIFEST_FILE} of step {step}"
    if state["recipe"] != info.get("recipe"):
        yield f"{STATE_FILE} and {MANIFEST_FILE} hold different recipes"
    if state["validation_owed"] != info.get("validation_owed"):
        yield f"{STATE_FILE} and {MANIFEST_FILE} disagree on whether a validation is owed"
    processes = info.get("processes")
    for name in ("random", "windows"):
        if len(state[name]) != processes:
            yield f"{STATE_FILE} holds {name} of {len(state[name])} processes, the run had {processes}"


def _parts(whole: Mapping[str, Any], state: Mapping[str, Any]) -> Iterator[tuple[str, Callable[[], object]]]:
    """(what, a function that takes it back as a resume does, into something that is thrown away)."""
    yield "lanes", lambda: LaneState.from_state_dict(state["lanes"], state["recipe"]["data"]["num_lanes"])
    yield "non-finite steps", lambda: _check_nonfinite(state["nonfinite"])
    yield "random generators", lambda: _check_random(state["random"])
    yield "window of the metrics", lambda: _check_windows(state["windows"])
    yield "line of metrics", lambda: _check_pending(state["pending"])
    yield "the optimizer's step", lambda: _require(0 <= state["optimizer_step"] <= state["step"])
    yield "loops", lambda: _check_loops(whole, state["step"])
    yield "schedule", lambda: _check_schedule(whole["lr_schedulers"])


def _require(condition: bool) -> None:
    if not condition:
        raise CheckpointError("it is out of its bounds")


def _check_nonfinite(saved: Mapping[str, Any]) -> None:
    record = NonFiniteRecord(1)
    record.load_state_dict(saved)
    _require(isinstance(saved["in_a_row"], int) and saved["in_a_row"] >= 0)
    record.as_plain()


def _check_random(states: Sequence[Mapping[str, Any]]) -> None:
    for saved in states:
        python, numpy = saved["python"], saved["numpy"]
        random.Random().setstate((python["version"], tuple(python["words"]), python["gauss"]))
        keys = numpy["keys"].numpy().astype(np.uint32)
        np.random.RandomState().set_state((numpy["name"], keys, numpy["position"], numpy["has_gauss"], numpy["cached"]))
        torch.Generator().set_state(saved["torch"].cpu().to(torch.uint8))
        _require(isinstance(saved["cuda"], list) and all(isinstance(each, Tensor) for each in saved["cuda"]))


def _check_windows(windows: Sequence[Mapping[str, Tensor]]) -> None:
    tensors = [window[name] for window in windows for name in ("sums", "weights")]
    # Windows of earlier versions lack the last quantity.
    lengths = (len(QUANTITIES), len(QUANTITIES) - 1)
    _require(all(isinstance(each, Tensor) and each.ndim == 1 and len(each) in lengths for each in tensors))


def _check_pending(pending: Mapping[str, Any]) -> None:
    _require(all(isinstance(name, str) and isinstance(each, int | float | str) for name, each in pending.items()))


def _check_loops(whole: Mapping[str, Any], step: int) -> None:
    settled: dict[str, Any] = {"loops": copy.deepcopy(whole["loops"])}
    settle_loop_progress(settled, step)
    _require(settled["loops"] == whole["loops"])
    _require(whole["global_step"] == step and whole["epoch"] >= 0)


def _check_schedule(schedules: Sequence[Mapping[str, Any]]) -> None:
    (schedule,) = schedules
    rates = schedule["_last_lr"]
    _require(isinstance(schedule["last_epoch"], int) and isinstance(rates, list) and len(rates) > 0)
    _require(all(isinstance(rate, float) for rate in [*rates, *schedule["base_lrs"]]))
    _require(len(schedule["lr_lambdas"]) == len(rates))
