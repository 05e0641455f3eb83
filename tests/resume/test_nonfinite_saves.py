"""No checkpoint ever holds what a step with a gradient that is not finite made of the weights."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from pldr_train.recipe import recipe_from_dict
from tests.processes import SERVER, as_a_fresh_process
from tests.tiny import tiny_values

BAD_STEP = 7


def fit_badly(values: dict[str, Any], ending: str, told: str) -> None:
    """Train with an infinite gradient at one step, whose loss is finite, and let the run end with that step."""
    as_a_fresh_process()
    from pldr_train.data.datamodule import PldrDataModule
    from pldr_train.errors import DataError, RecipeError
    from pldr_train.fit import fit
    from pldr_train.training import stepping
    from pldr_train.training.nonfinite_policy import NonFinitePolicy

    norms, measured = [], stepping.whole_norm
    check, load = NonFinitePolicy.check, PldrDataModule.train_dataloader

    def norm_of(*arguments: Any) -> Any:
        norms.append(measured(*arguments))
        return norms[-1] * (float("inf") if len(norms) == BAD_STEP else 1.0)

    def check_then_ask_to_stop(policy: Any, datamodule: Any, **options: Any) -> None:
        check(policy, datamodule, **options)
        if len(norms) == BAD_STEP:
            os.kill(os.getpid(), signal.SIGTERM)

    def until_the_bad_step(datamodule: Any) -> Any:
        batches = iter(load(datamodule))
        yield from (next(batches) for _ in range(BAD_STEP))
        yield {"error": str(DataError("no documents"))}

    stepping.whole_norm = norm_of
    if ending == "signal":
        NonFinitePolicy.check = check_then_ask_to_stop  # type: ignore[method-assign]
    else:
        PldrDataModule.train_dataloader = until_the_bad_step  # type: ignore[method-assign]
    try:
        fit(recipe_from_dict(values))
    except RecipeError as error:
        Path(told).write_text(str(error))


@pytest.mark.parametrize("ending", ["signal", "documents"])
def test_a_run_that_ends_with_a_bad_step_is_not_saved_after_it(tiny_data: Path, tmp_path: Path, ending: str) -> None:
    values = tiny_values(tiny_data, tmp_path, logging={"every_steps": 100}, trainer={"validate_every_steps": 100})
    child = SERVER.Process(target=fit_badly, args=(values, ending, str(tmp_path / "told")))
    child.start()
    child.join(120)
    assert child.exitcode == 0
    assert f"step {BAD_STEP}: the loss or its gradient is NaN or infinite" in (tmp_path / "told").read_text()
    saved = sorted(path.name for path in (tmp_path / "tiny" / "checkpoints").glob("step-*"))
    assert saved == ["step-00000005"]
