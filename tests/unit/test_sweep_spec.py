"""What a sweep's file makes: its trials, and for every mistake a message with key, value and fix."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from pldr_train.errors import RecipeError
from pldr_train.recipe.yaml_text import to_yaml
from pldr_train.sweeps import Sweep
from pldr_train.sweeps.axes import cell_name, corner_cells
from pldr_train.sweeps.spec import load_spec, spec_from_dict
from tests.processes import ROOT
from tests.sweep_case import LR, NEEDING, changed_file, write_sweep

VARIANTS: dict[str, Any] = {
    "identity": {"model.custom_G_type": "identity", "dag.A_LM": 0.0, "dag.A_P": 0.0, "dag.G_LM": 0.0},
    "causal": {"model.gram_chunk_size": 8},
}
WARMUP = "optim.warmup_steps"


@pytest.fixture
def spec(tiny_data: Path, tmp_path: Path) -> Path:
    return write_sweep(tmp_path, tiny_data)


def with_keys(spec: Path, **keys: Any) -> Sweep:
    changed_file(spec, lambda values: values.update(keys))
    return Sweep(spec)


def problems(spec: Path, **keys: Any) -> list[str]:
    with pytest.raises(RecipeError) as raised:
        with_keys(spec, **keys)
    first, *lines = str(raised.value).splitlines()
    count = f"{len(lines)} problems" if len(lines) > 1 else "1 problem"
    assert first == f"{spec}: {count} in the sweep:"
    return [line.strip() for line in lines]


# ----------------------------------------------------------------------------------------------------------- trials


def test_a_grid_has_every_combination_with_every_seed_the_last_axis_fastest(spec: Path) -> None:
    trials = with_keys(spec, axes={LR: [1e-3, 3e-4], WARMUP: [2, 4]}).trials
    assert [trial.name for trial in trials] == [
        "lr-0.001_warmup_steps-2_seed-1", "lr-0.001_warmup_steps-2_seed-2",
        "lr-0.001_warmup_steps-4_seed-1", "lr-0.001_warmup_steps-4_seed-2",
        "lr-0.0003_warmup_steps-2_seed-1", "lr-0.0003_warmup_steps-2_seed-2",
        "lr-0.0003_warmup_steps-4_seed-1", "lr-0.0003_warmup_steps-4_seed-2",
    ]  # fmt: skip
    recipe = trials[5].recipe
    assert (recipe.optim.lr, recipe.optim.warmup_steps, recipe.run.seed) == (3e-4, 2, 2)
    assert (trials[5].axes, trials[5].seed, trials[5].cell) == ({LR: 3e-4, WARMUP: 2}, 2, 2)


def test_a_trials_run_lies_in_the_sweeps_folder_in_its_group_with_its_axes_as_tags(spec: Path, tmp_path: Path) -> None:
    trial = with_keys(spec, axes={LR: [1e-3], "variant": VARIANTS}).trials[0]
    run = trial.recipe.run
    assert (run.dir, run.name) == (str(tmp_path / "runs" / "small"), "lr-0.001_variant-identity_seed-1")
    assert trial.folder == Path(run.dir) / run.name
    assert (run.group, run.tags) == ("small", ("lr=0.001", "variant=identity"))


def test_labels_set_groups_of_keys(spec: Path) -> None:
    sweep = with_keys(spec, axes={"variant": VARIANTS}, seeds=[1])
    identity, causal = (trial.recipe for trial in sweep.trials)
    assert (identity.model.custom_G_type, identity.dag.G_LM, identity.model.gram_chunk_size) == ("identity", 0, None)
    assert (causal.model.custom_G_type, causal.dag.G_LM, causal.model.gram_chunk_size) == ("learned", 0.01, 8)
    assert [cell.name for cell in sweep.cells] == ["variant-identity", "variant-causal"]


def test_a_label_names_the_trial_that_differs_in_the_label_alone(spec: Path, tmp_path: Path) -> None:
    sweep = with_keys(spec, axes={LR: [1e-3, 3e-4], "variant": NEEDING}, seeds=[1, 2])
    sixth = sweep.planned()[5]
    assert sixth.name == "lr-0.0003_variant-given_seed-2"
    assert sixth.sources == {"model.custom_G_path": "lr-0.0003_variant-learned_seed-2"}
    assert sixth.recipe.model.custom_G_path == str(tmp_path / "runs/small/lr-0.0003_variant-learned_seed-2")
    assert sweep.planned()[7].sources == {}


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"given": {"model.custom_G_path": "trial:nothing"}},
            "axes.variant.given.model.custom_G_path=trial:nothing: no other label of this axis; there are given, "
            "learned",
        ),
        (
            {"given": {"model.custom_G_path": "trial:given"}},
            "axes.variant.given.model.custom_G_path=trial:given: no other label of this axis; there are given, learned",
        ),
        (
            {"learned": {"model.init_from": "trial:given"}},
            "axes.variant.given.model.custom_G_path=trial:learned: the trials of learned need others themselves; "
            "name a label whose trials do not",
        ),
        (
            {"given": {"data.path": "trial:learned"}},
            "axes.variant.given.data.path=trial:learned: names a trial, which this key does not take; "
            "model.custom_G_path and model.init_from do",
        ),
    ],
)
def test_a_trial_that_cannot_be_named_is_refused(spec: Path, changes: dict[str, Any], line: str) -> None:
    assert line in problems(spec, axes={"variant": NEEDING | changes})


def test_a_trial_that_the_conditions_leave_out_cannot_be_named(spec: Path) -> None:
    conditions = {LR: {"only_if": {"variant": ["learned"]}}}
    assert problems(spec, axes={"variant": NEEDING, LR: [1e-3, 3e-4]}, conditions=conditions, seeds=[1]) == [
        "model.custom_G_path: needs trial variant-learned_seed-1, which the conditions leave out; change one of them "
        "(in cell variant-given)"
    ]


def test_trials_are_named_by_grids_alone_and_not_under_set(spec: Path) -> None:
    search = {"method": "random", "trials": 3}
    assert problems(spec, axes={"variant": NEEDING}, sampler=search) == [
        "sampler.method=random: an axis names trials (trial:LABEL), which may not be drawn; use grid, or name runs"
    ]
    assert problems(spec, set={"model.init_from": "trial:learned"}, sampler="grid") == [
        "set.model.init_from=trial:learned: names a trial, which only the group of a label may; move it there, or name "
        "a run"
    ]


def test_set_is_of_all_trials_and_below_the_axes(spec: Path) -> None:
    sweep = with_keys(spec, set={"trainer.max_steps": 12, "dag.A_LM": 0.5}, axes={"variant": VARIANTS}, seeds=[1])
    assert [trial.recipe.trainer.max_steps for trial in sweep.trials] == [12, 12]
    assert [trial.recipe.dag.A_LM for trial in sweep.trials] == [0.0, 0.5]


def test_without_seeds_trials_have_the_recipes(spec: Path) -> None:
    assert [trial.seed for trial in with_keys(spec, seeds=[]).trials] == [5, 5, 5]


def test_an_axis_exists_only_where_its_condition_holds(spec: Path) -> None:
    sweep = with_keys(
        spec,
        axes={"optim.schedule": ["cosine", "wsd"], "optim.decay_fraction": [0.1, 0.2]},
        conditions={"optim.decay_fraction": {"only_if": {"optim.schedule": ["wsd"]}}},
        seeds=[1],
    )
    assert [cell.axes for cell in sweep.cells] == [
        {"optim.schedule": "cosine"},
        {"optim.schedule": "wsd", "optim.decay_fraction": 0.1},
        {"optim.schedule": "wsd", "optim.decay_fraction": 0.2},
    ]
    assert [cell.name for cell in sweep.cells][1] == "schedule-wsd_decay_fraction-0.1"


def test_a_random_search_is_the_same_each_time_and_within_its_ranges(spec: Path) -> None:
    axes = {
        LR: {"low": 1e-4, "high": 1e-1, "log": True},
        WARMUP: {"low": 2, "high": 10, "step": 4, "int": True},
        "optim.schedule": ["cosine", "wsd"],
        "optim.decay_fraction": {"low": 0.1, "high": 0.5},
    }
    keys = {
        "axes": axes,
        "conditions": {"optim.decay_fraction": {"only_if": {"optim.schedule": ["wsd"]}}},
        "sampler": {"method": "random", "trials": 20, "seed": 3},
        "seeds": [1],
    }
    sweep = with_keys(spec, **keys)
    cells = [cell.axes for cell in sweep.cells]
    assert cells == [cell.axes for cell in Sweep(spec).cells]
    assert len(cells) == sweep.num_trials == 20
    assert len({trial.name for trial in sweep.trials}) == 20
    assert all(1e-4 <= cell[LR] <= 1e-1 for cell in cells)
    assert sum(cell[LR] < 10**-2.5 for cell in cells) in range(4, 17)  # half of them, over the logarithm
    assert {cell[WARMUP] for cell in cells} == {2, 6, 10}
    assert all(("optim.decay_fraction" in cell) == (cell["optim.schedule"] == "wsd") for cell in cells)
    other = with_keys(spec, sampler={"method": "random", "trials": 20, "seed": 4})
    assert cells != [cell.axes for cell in other.cells]
    longer = with_keys(spec, sampler={"method": "random", "trials": 25, "seed": 3})
    assert [cell.axes for cell in longer.cells][:20] == cells


def test_a_search_is_checked_at_the_ends_of_its_ranges_before_it_begins(spec: Path) -> None:
    search = {"method": "tpe", "trials": 3}
    found = problems(spec, axes={WARMUP: {"low": 2, "high": 90, "int": True}}, sampler=search)
    assert found == ["optim.warmup_steps=90: exceeds trainer.max_steps=24; lower it or train longer "
                     "(in cell warmup_steps-90)"]  # fmt: skip
    assert with_keys(spec, axes={WARMUP: {"low": 2, "high": 9, "int": True}}).trials == []


def test_corners_have_each_value_once_where_its_condition_holds() -> None:
    spec = spec_from_dict({
        "name": "a", "recipe": "quickstart",
        "axes": {"optim.schedule": ["cosine", "wsd"], "optim.decay_fraction": {"low": 0.1, "high": 0.5}},
        "conditions": {"optim.decay_fraction": {"only_if": {"optim.schedule": ["wsd"]}}},
        "sampler": {"method": "tpe", "trials": 2},
    })  # fmt: skip
    assert list(corner_cells(spec.parsed_axes)) == [
        {"optim.schedule": "cosine"},
        {"optim.schedule": "wsd", "optim.decay_fraction": 0.1},
        {"optim.schedule": "wsd", "optim.decay_fraction": 0.1},
        {"optim.schedule": "wsd", "optim.decay_fraction": 0.5},
    ]


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({LR: 1e-3}, "lr-0.001"),
        ({LR: 3e-5}, "lr-3e-05"),
        ({LR: 1}, "lr-1"),
        ({"optim.clip_norm": None, LR: 1e-3}, "clip_norm-null_lr-0.001"),
        ({"model.reference_rope": True}, "reference_rope-true"),
    ],
)
def test_names_are_readable_and_tell_values_apart(values: dict[str, Any], name: str) -> None:
    spec = spec_from_dict({"name": "a", "recipe": "b", "axes": {key: [value] for key, value in values.items()}})
    assert cell_name(spec.parsed_axes, values) == name


def test_a_name_that_does_not_say_the_value_exactly_ends_in_a_digest_of_it() -> None:
    values = [0.1234567891, 0.1234567892]
    spec = spec_from_dict({"name": "a", "recipe": "b", "axes": {LR: values}})
    names = [cell_name(spec.parsed_axes, {LR: value}) for value in values]
    assert all(re.fullmatch(r"lr-0\.123457-[0-9a-f]{8}", name) for name in names)
    assert len(set(names)) == 2


def test_names_of_long_and_odd_values_are_safe_short_and_distinct() -> None:
    betas = [[0.9, 0.95], [0.9, 0.951], [0.8, 0.95]]
    many = {
        f"optim.{key}": [1] for key in ("lr", "eps", "weight_decay", "clip_value", "clip_norm", "final_lr_fraction")
    }
    axes = {"optim.betas": betas, **many, "data.text_column": ["a/../b " * 20]}
    spec = spec_from_dict({"name": "a", "recipe": "b", "axes": axes})
    names = [
        cell_name(spec.parsed_axes, {**{key: values[0] for key, values in axes.items()}, "optim.betas": beta})
        for beta in betas
    ]
    assert len(set(names)) == 3
    assert all(len(name) <= 100 and "/" not in name and " " not in name for name in names)


def test_values_of_other_types_are_other_values() -> None:
    spec = spec_from_dict({"name": "a", "recipe": "b", "axes": {LR: [1, 1.5, None]}})
    assert [axis.values for axis in spec.parsed_axes] == [(1, 1.5, None)]


def test_the_baseline_is_named_by_values_of_axes(spec: Path) -> None:
    sweep = with_keys(spec, axes={LR: [1e-3, 2e-3], WARMUP: [2, 4]}, baseline={LR: 1e-3})
    assert [cell.is_baseline for cell in sweep.cells] == [True, True, False, False]
    assert not any(cell.is_baseline for cell in with_keys(spec, baseline={}).cells)


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "sweeps").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_sweep_is_named_after_its_file_and_says_what_it_is_for(path: Path) -> None:
    sweep = Sweep(path)
    assert sweep.spec.name == path.stem == Sweep(path.stem).spec.name
    assert path.read_text().startswith("# ")
    assert sum(cell.is_baseline for cell in sweep.cells) in (1, len(sweep.cells) // 5)
    trials = sweep.trials
    models = {trial.recipe.model.width for trial in trials}
    if path.stem.endswith("-110m"):
        assert models == {896}
        assert all(trial.recipe.trainer.max_steps == 250_000 for trial in trials)
    else:
        assert models == {64}
        assert all(trial.recipe.trainer.threads == 1 for trial in trials)
        assert all(trial.recipe.trainer.accelerator == "cpu" for trial in trials)
        assert sum(trial.max_steps * trial.tokens_per_step for trial in trials) < 13_000_000


def test_the_phase_diagram_is_four_rates_two_warm_ups_and_two_seeds() -> None:
    sweep = Sweep("phase-diagram")
    assert sweep.spec.axes == {LR: [3e-4, 1e-3, 3e-3, 6e-3], WARMUP: [20, 200]}
    assert (len(sweep.cells), len(sweep.trials)) == (8, 16)
    assert all(trial.recipe.dag.trained == () for trial in sweep.trials)


# -------------------------------------------------------------------------------------------------------- messages


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"axes": {}}, "axes={}: a sweep needs an axis; name a recipe key and a list of values"),
    ({"axes": {"optim.lrr": [1]}}, "axes.optim.lrr: no key of a recipe; did you mean optim.lr?"),
    ({"axes": {LR: []}}, "axes.optim.lr=[]: an axis without values; give it some, or remove it"),
    ({"axes": {LR: 1e-3}}, "axes.optim.lr=0.001: must be a list, a range or labels, not a decimal number; write it as "
                           "[0.001]"),
    ({"axes": {LR: [1e-3, 1e-3]}}, "axes.optim.lr=[0.001, 0.001]: holds 0.001 twice; remove one"),
    ({"axes": {"run.seed": [1]}}, "axes.run.seed: cannot be an axis, list the seeds under `seeds`; remove it"),
    ({"axes": {"run.name": ["a"]}}, "axes.run.name: cannot be an axis, each trial has a name of its own; remove it"),
    ({"axes": {LR: {"low": 1, "high": 1}}, "sampler": {"method": "random", "trials": 2}},
     'axes.optim.lr={"low": 1, "high": 1}: low is not below high; correct one of them'),
    ({"axes": {LR: {"low": 0, "high": 1, "log": True}}, "sampler": {"method": "random", "trials": 2}},
     'axes.optim.lr={"low": 0, "high": 1, "log": true}: with log, low must be above 0; raise it'),
    ({"axes": {LR: {"low": 1, "high": 4, "log": True, "step": 1}}, "sampler": {"method": "random", "trials": 2}},
     'axes.optim.lr={"low": 1, "high": 4, "log": true, "step": 1}: log and step exclude each other; remove one'),
    ({"axes": {LR: {"low": 1, "high": 1.5, "int": True}}, "sampler": {"method": "random", "trials": 2}},
     'axes.optim.lr={"low": 1, "high": 1.5, "int": true}: with int, low, high and step must be whole; correct them'),
    ({"axes": {LR: {"low": "a", "high": 1}}, "sampler": {"method": "random", "trials": 2}},
     "axes.optim.lr.low=a: must be a number, not text; choose another value"),
    ({"axes": {LR: {"low": 1}}, "sampler": {"method": "random", "trials": 2}},
     "axes.optim.lr.high: missing; a range has both ends"),
    ({"axes": {LR: {"low": 1, "hihg": 2}}, "sampler": {"method": "random", "trials": 2}},
     "axes.optim.lr.hihg=2: unknown key; a range has low, high, log, step, int"),
    ({"axes": {LR: {"low": 1, "high": 2}}},
     'axes.optim.lr={"low": 1, "high": 2}: a range, of which sampler.method=grid knows no values; write a list, or set '
     "sampler.method to random or tpe"),
    ({"axes": {"variant": {"a": {"optim.lrr": 1}}}}, "axes.variant.a.optim.lrr=1: unknown key; did you mean optim.lr?"),
    ({"axes": {"variant": {"a": 1}}},
     "axes.variant.a=1: must be a mapping of recipe keys, not a whole number; write {} for none"),
    ({"axes": {"variant": {1: {}}}},
     "axes.variant: 1 is no label; use letters, digits and . _ + - (numbers and null in quotes)"),
    ({"axes": {"a b": {"x": {}}}},
     "axes.a b: the name of an axis of labels may hold letters, digits, '_' and '-' and begins with a letter; rename "
     "it"),
    ({"axes": {LR: [1e-3], "variant": {"a": {LR: 1e-3}}}},
     "axes.optim.lr and axes.variant both set optim.lr; leave it to one of them"),
    ({"set": {LR: 1e-3}}, "set.optim.lr=0.001: is an axis, too; remove it from one of the two"),
    ({"set": {"run.seed": 1}}, "set.run.seed=1: cannot be set here, list the seeds under `seeds`; remove it"),
    ({"set": {"optim.eeps": 1}}, "set.optim.eeps=1: unknown key; did you mean optim.eps?"),
    ({"set": [1]}, "set=[1]: must be a mapping; indent its entries below it"),
    ({"conditions": {"foo": {"only_if": {LR: [1e-3]}}}},
     "conditions.foo: no such axis; there are optim.lr"),
    ({"conditions": {LR: [1]}}, "conditions.optim.lr=[1]: must be {only_if: {AXIS: [VALUES]}}; write it so"),
    ({"axes": {LR: [1e-3], WARMUP: [2]}, "conditions": {LR: {"only_if": {WARMUP: [2]}}}},
     "conditions.optim.lr.only_if.optim.warmup_steps=[2]: axis optim.warmup_steps stands after optim.lr; move it "
     "before it"),
    ({"axes": {LR: [1e-3], WARMUP: [2]}, "conditions": {WARMUP: {"only_if": {LR: [3]}}}},
     "conditions.optim.warmup_steps.only_if.optim.lr=3: no value of that axis; choose among [0.001]"),
    ({"axes": {LR: [1e-3], WARMUP: [2]}, "conditions": {WARMUP: {"only_if": {LR: 1e-3}}}},
     "conditions.optim.warmup_steps.only_if.optim.lr=0.001: must be a list of values of that axis; write [...]"),
    ({"seeds": [1, 1]}, "seeds=[1, 1]: holds a value twice; choose another value"),
    ({"seeds": ["a"]}, "seeds.0=a: must be a whole number, not text; choose another value"),
    ({"sampler": "gird"}, "sampler.method=gird: must be grid, random or tpe; did you mean grid?"),
    ({"sampler": "tpe"}, "sampler.trials: missing; sampler.method=tpe needs the number of cells"),
    ({"sampler": {"trials": 3}},
     "sampler.trials=3: sampler.method=grid runs every cell; remove it, or set budget.trials"),
    ({"sampler": {"methd": "grid"}}, "sampler.methd=grid: unknown key; did you mean method?"),
    ({"metric": "leakage/sequental_nll"},
     "metric=leakage/sequental_nll: no such metric; did you mean leakage/sequential_nll?"),
    ({"set": {"monitor.targets": 0}, "metric": "leakage/sequential_nll"},
     "metric=leakage/sequential_nll: is not measured with monitor.targets=0; raise that, or choose another metric"),
    ({"goal": "up"}, "goal=up: must be minimize or maximize; choose one of them"),
    ({"value": "first"}, "value=first: must be last or best; choose one of them"),
    ({"baseline": {WARMUP: 2}}, "baseline.optim.warmup_steps=2: no such axis; there are optim.lr"),
    ({"baseline": {LR: 7}}, "baseline.optim.lr=7: no value of that axis; choose one of 0.001, 0.002, 0.004"),
    ({"budget": {"hour": 1}}, "budget.hour=1: unknown key; did you mean hours?"),
    ({"budget": {"hours": 0}}, "budget.hours=0: must be greater than 0.0; choose another value"),
    ({"pruning": "hyperband"},
     "pruning.warmup_steps=0: Hyperband needs the least step at which a trial may be stopped; set it, for instance to "
     "the second validation's"),
    ({"pruning": {"method": "medean"}},
     "pruning.method=medean: must be none, median or hyperband; did you mean median?"),
    ({"name": "a/b"}, "name=a/b: may hold only letters, digits, '.', '_' and '-' and not start with '.' or '-', for it "
                      "names a folder; rename it"),
    ({"nmae": "a"}, "nmae=a: unknown key; did you mean name?"),
    ({"axes": {LR: [1e-3, -1]}}, "optim.lr=-1: must be greater than 0.0; choose another value (in cell lr-"),
    ({"set": {"model.head_dim": 7}},
     "recipe=RECIPE: model.head_dim=7: odd, but the rotary embedding turns pairs; use an even number"),
    ({"axes": {"model.head_dim": [7, 9]}},
     "model.head_dim=7: odd, but the rotary embedding turns pairs; use an even number (in cell head_dim-7)"),
    ({"axes": {WARMUP: list(range(5001))}}, "axes: more than 10,000 trials; leave out values, or draw with "
                                            "sampler.method"),
]  # fmt: skip


@pytest.mark.parametrize(("keys", "message"), MISTAKES, ids=range(len(MISTAKES)))
def test_a_mistake_is_named_with_key_value_and_fix(spec: Path, keys: dict[str, Any], message: str) -> None:
    recipe = str(spec.parent / "recipe.yaml")
    assert any(line.startswith(message.replace("RECIPE", recipe)) for line in problems(spec, **keys))


def test_all_mistakes_are_named_at_once(spec: Path) -> None:
    found = problems(spec, goal="up", axes={LR: [], "optim.epss": [1]}, seeds=[1, 1], set={"a.b": 1})
    assert len(found) == 5


def test_a_problem_of_many_cells_is_named_once(spec: Path) -> None:
    found = problems(spec, axes={LR: [1e-3, 2e-3], "model.head_dim": [7, 8]})
    assert found == [
        "model.head_dim=7: odd, but the rotary embedding turns pairs; use an even number (in cell lr-0.001_head_dim-7 "
        "and 1 more)"
    ]


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("name: a\n")
    with pytest.raises(RecipeError, match="recipe: missing; add it to the file\n  axes: missing; add it to the file"):
        load_spec(tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_text("")
    with pytest.raises(RecipeError, match=r"a\.yaml is empty; a sweep needs name, recipe and axes, see docs/sweeps"):
        load_spec(tmp_path / "a.yaml")
    with pytest.raises(RecipeError, match=r"phase-diagran: no such sweep file; did you mean .*phase-diagram"):
        load_spec("phase-diagran")


def test_a_recipe_that_is_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(to_yaml({"name": "a", "recipe": "quickstrat", "axes": {LR: [1e-3]}}))
    with pytest.raises(RecipeError, match=r"quickstrat: no such recipe file; did you mean .*quickstart"):
        Sweep(tmp_path / "a.yaml")


def test_a_changed_search_is_refused(spec: Path) -> None:
    from pldr_train.sweeps.checks import check_before_run

    search = {"axes": {LR: {"low": 1e-4, "high": 1e-1, "log": True}}, "sampler": {"method": "tpe", "trials": 3}}
    check_before_run(with_keys(spec, **search))
    check_before_run(with_keys(spec, sampler={"method": "tpe", "trials": 9}))
    with pytest.raises(RecipeError, match=r"(?s)was changed since .*axes: cells were drawn with another"):
        check_before_run(with_keys(spec, axes={LR: {"low": 1e-4, "high": 1e-2, "log": True}}))


def test_missing_data_is_said_before_any_trial_begins(spec: Path) -> None:
    from pldr_train.sweeps.checks import check_before_run

    with pytest.raises(RecipeError, match=r"1 problem in the sweep:\n  data\.path=.*/none"):
        check_before_run(with_keys(spec, set={"data.path": str(spec.parent / "none")}))
