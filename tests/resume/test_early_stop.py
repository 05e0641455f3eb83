"""`trainer.early_stop`: a run ends where a metric of validations has stopped improving, however often it was killed."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest

from pldr_train.cli import main
from pldr_train.commands.watch import watch
from pldr_train.errors import RecipeError
from pldr_train.fit import fit
from pldr_train.recipe import EarlyStopSection, recipe_from_dict
from pldr_train.recipe.yaml_text import to_yaml
from pldr_train.report.runs import open_runs
from pldr_train.run import Run
from pldr_train.runs.validations import best_first, early_end
from pldr_train.sweeps import Sweep
from pldr_train.sweeps.records import DONE, write_record
from pldr_train.sweeps.sweep import is_finished
from tests.resume.run_case import KilledError
from tests.sweep_case import write_sweep
from tests.tiny import metric_lines, tiny_values

# Losses fall, so that their largest is that of step 0: the patience of two validations ends a run at step 4.
FALLING = {"metric": "val/cross_entropy", "mode": "max", "patience": 2}
END = 4


def values_of(data: Path, runs: Path, early_stop: dict[str, Any] | None = FALLING, **checkpoint: Any) -> dict[str, Any]:
    return tiny_values(
        data,
        runs,
        trainer={"max_steps": 12, "validate_every_steps": 2, "early_stop": early_stop},
        checkpoint={"every_steps": 4, "keep_last": 9} | checkpoint,
    )


def steps_of(run: Path) -> list[int]:
    return sorted(each.step for each in Run(run).checkpoints)


@pytest.mark.parametrize(
    ("values", "settings", "ends"),
    [
        ({}, {"patience": 1}, False),
        ({0: 3.0}, {"patience": 1}, False),
        ({0: 3.0, 2: 3.0}, {"patience": 1}, True),
        ({0: 3.0, 2: 2.9}, {"patience": 1}, False),
        ({0: 3.0, 2: 2.9}, {"patience": 1, "min_delta": 0.5}, True),
        ({0: 3.0, 2: 3.1, 4: 2.9}, {"patience": 2}, False),
        ({0: 3.0, 2: 3.1, 4: 3.2}, {"patience": 2}, True),
        ({0: 3.0, 2: 3.1, 4: 3.2, 6: 2.0}, {"patience": 2}, False),
        # The best stays that of step 0: small steps do not add up to an improvement of each.
        ({0: 3.0, 2: 2.8, 4: 2.6}, {"patience": 2, "min_delta": 0.3}, False),
        ({0: 3.0, 2: 3.1, 4: 3.2}, {"patience": 2, "mode": "max"}, False),
        ({0: 3.0, 2: 2.9, 4: 2.8}, {"patience": 2, "mode": "max"}, True),
    ],
)
def test_the_count_is_of_validations_since_the_best(
    values: dict[int, float], settings: dict[str, Any], ends: bool
) -> None:
    assert (early_end(EarlyStopSection(**settings), values) is not None) == ends


def test_of_equal_values_the_later_is_the_better() -> None:
    assert best_first({1: 2.0, 2: 1.0, 3: 2.0}, EarlyStopSection()) == [2, 3, 1]
    assert best_first({1: 2.0, 2: 1.0, 3: 2.0}, EarlyStopSection(mode="max")) == [3, 1, 2]


def test_a_run_ends_early_is_finished_and_trains_on_with_more_patience(tiny_data: Path, tmp_path: Path) -> None:
    values = values_of(tiny_data, tmp_path)
    run, recipe = tmp_path / "tiny", recipe_from_dict(values)
    outcome = fit(recipe)
    losses = {line["step"]: line["val/cross_entropy"] for line in metric_lines(run) if "val/loss" in line}
    assert list(losses) == [0, 2, END]
    reason = (
        "ended early: val/cross_entropy has not improved in the last 2 validations, its best value is "
        f"{losses[0]:.6g} at step 0"
    )
    assert (outcome.step, outcome.ended_early, outcome.stopped_by, outcome.trained) == (END, reason, None, True)
    assert steps_of(run) == [END]
    assert [sample.step for sample in Run(run).samples] == [END]
    assert Run(run).stopped == reason

    before = (run / "metrics.jsonl").read_bytes()
    again = fit(recipe)
    assert (again.step, again.ended_early, again.trained, again.samples) == (END, reason, False, outcome.samples)
    assert (run / "metrics.jsonl").read_bytes() == before

    [shown], _ = open_runs([run])
    shown.read_on()
    assert shown.state == "finished"
    stream = io.StringIO()
    watch(shown, stream, once=False, interval_s=0, sleep=pytest.fail)
    assert "it ended early" in stream.getvalue()
    assert f"stopped: {reason}" in stream.getvalue()
    assert is_finished(run, recipe)

    patient = recipe_from_dict(values_of(tiny_data, tmp_path, FALLING | {"patience": 3}))
    assert not is_finished(run, patient)
    longer = fit(patient)
    assert (longer.step, steps_of(run)) == (6, [4, 6])
    endless = fit(recipe_from_dict(values_of(tiny_data, tmp_path, None)))
    assert (endless.step, endless.ended_early, Run(run).stopped) == (12, None, None)

    # It is the run that never ended.
    other = tmp_path / "other"
    fit(recipe_from_dict(values_of(tiny_data, other, None)))
    assert metric_lines(run) == metric_lines(other / "tiny")


def test_a_trial_of_a_sweep_that_ended_early_is_done(tiny_data: Path, tmp_path: Path) -> None:
    sections = {"trainer": {"max_steps": 12, "validate_every_steps": 2, "early_stop": FALLING}}
    spec = write_sweep(tmp_path, tiny_data, sections, axes={"optim.lr": [2e-3]}, seeds=[5])
    (waiting,) = Sweep(spec).trials
    assert waiting.state == "waiting"
    fit(waiting.recipe)
    (trial,) = Sweep(spec).trials
    assert (trial.state, trial.steps, trial.max_steps) == ("done", END, 12)
    # As a runner notes it: with the steps that were made.
    write_record(trial.folder, trial.record.changed(state=DONE, steps=trial.steps))
    assert Sweep(spec).trials[0].state == "done"


def test_the_last_step_is_no_early_end(tiny_data: Path, tmp_path: Path) -> None:
    outcome = fit(recipe_from_dict(values_of(tiny_data, tmp_path, FALLING | {"patience": 6})))
    assert (outcome.step, outcome.ended_early) == (12, None)
    assert not (tmp_path / "tiny" / "stopped.json").exists()


class KilledIn(pl.Callback):
    """Ends the process, as far as the run can tell, in a hook after a step."""

    def __init__(self, hook: str, step: int) -> None:
        def kill(trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == step:
                raise KilledError

        setattr(self, hook, kill)


@pytest.mark.parametrize(
    ("hook", "step"),
    [
        ("on_train_batch_end", 3),  # goes on from nothing: there is no checkpoint yet
        ("on_validation_start", END),  # from a checkpoint that owes the validation
        ("on_validation_end", END),  # its line is written, and the run's end is not saved
        ("on_train_end", END),  # saved, without samples
    ],
)
def test_a_killed_run_ends_where_it_would_have_ended(tiny_data: Path, tmp_path: Path, hook: str, step: int) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    fit(recipe_from_dict(values_of(tiny_data, straight)))
    recipe = recipe_from_dict(values_of(tiny_data, killed))
    with pytest.raises(KilledError):
        fit(recipe, callbacks=[KilledIn(hook, step)])
    outcome = fit(recipe)
    assert (outcome.step, outcome.trained) == (END, hook != "on_train_end")
    assert outcome.ended_early is not None
    assert metric_lines(killed / "tiny") == metric_lines(straight / "tiny")
    samples = [(each / "tiny" / "samples.jsonl").read_text() for each in (killed, straight)]
    assert samples[0] == samples[1]
    assert json.loads((killed / "tiny" / "stopped.json").read_text()) == {
        "text": outcome.ended_early,
        "finished": True,
    }


def test_a_run_from_another_ones_checkpoint_counts_its_own_validations(tiny_data: Path, tmp_path: Path) -> None:
    fit(recipe_from_dict(values_of(tiny_data, tmp_path)))
    values = values_of(tiny_data, tmp_path)
    values["run"]["name"] = "second"
    outcome = fit(recipe_from_dict(values), resume=str(tmp_path / "tiny" / "checkpoints" / "last"))
    assert (outcome.step, outcome.ended_early is None) == (10, False)


def test_a_validation_without_the_metric_does_not_count(tiny_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "tiny"
    values = values_of(tiny_data, tmp_path, FALLING | {"patience": 3})
    fit(recipe_from_dict(values))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if line["step"] == 2 and "val/cross_entropy" in line:
            line["val/cross_entropy"] = math.nan
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert fit(recipe_from_dict(values)).step == 8


@pytest.mark.parametrize(
    ("metric", "problem"),
    [
        ("val/los", "no such metric; did you mean val/loss?"),
        ("train/loss", "is written at log steps, not at validations; name another, such as val/cross_entropy"),
        ("val/dag/layer_7/A_LM", "no such metric; did you mean val/dag/layer_1/A_LM?"),
    ],
)
def test_a_metric_that_no_validation_has_is_refused(tiny_data: Path, tmp_path: Path, metric: str, problem: str) -> None:
    with pytest.raises(RecipeError) as error:
        recipe_from_dict(values_of(tiny_data, tmp_path, {"metric": metric}))
    assert f"trainer.early_stop.metric={metric}: {problem}" in str(error.value)


def test_the_command_says_why_it_ended(tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(to_yaml(values_of(tiny_data, tmp_path / "runs")))
    assert main(["fit", str(recipe)]) == 0
    *_, last = capsys.readouterr().out.splitlines()
    assert last.startswith("step 4 of 12, ended early: val/cross_entropy has not improved in the last 2 validations")
    assert main(["fit", str(recipe), "data.path=/gone"]) == 0  # a run that is done needs no data
    said = capsys.readouterr().out
    assert "run tiny is complete (step 4 of 12, ended early: " in said
    assert "Train on with a higher trainer.early_stop.patience, or trainer.early_stop=null" in said
