"""What a runner of a sweep decides; its trials are played, so that every moment is the test's."""

from __future__ import annotations

import os
import resource
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest

from pldr_train.errors import UserError
from pldr_train.sweeps import Sweep, processes, runner
from pldr_train.sweeps.processes import Workers, choose_workers, visible_gpus
from pldr_train.sweeps.records import Claim, ask_to_stop
from pldr_train.sweeps.runner import Runner
from pldr_train.sweeps.study import Study
from tests.sweep_case import LR, NEEDING, Played, changed_file, write_sweep

DONE = (3.0, 2.0, 1.0)
"""Values of a trial of 24 steps."""
Play = Callable[[Path], Played]


@pytest.fixture(autouse=True)
def _without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_POLL_S", 0.001)
    monkeypatch.setattr(runner, "_LOOK_S", 0.0)


class Stage:
    """Runs a sweep whose trials are played; remembers them, their variables and what the runner said."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.played: list[Played] = []
        self.environments: list[dict[str, str]] = []
        self.commands: list[list[str]] = []
        self.said: list[str] = []
        self._play: Play = lambda folder: Played(folder, DONE)
        monkeypatch.setattr(processes, "start_process", self._start)

    def _start(self, command: Sequence[str], environment: dict[str, str], log: Path, keep: int) -> Played:
        os.fstat(keep)
        self.commands.append(list(command))
        self.environments.append(environment)
        played = self._play(log.parent)
        self.played.append(played)
        return played

    @property
    def started(self) -> list[str]:
        return [played.folder.name for played in self.played]

    def run(self, spec: Path, play: Play | None = None, workers: int = 1, **options: Any) -> int:
        self._play = play or self._play
        sweep = Sweep(spec)
        return Runner(sweep, Study(sweep), Workers(workers, 1), write_line=self.said.append, **options).run()


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    return Stage(monkeypatch)


@pytest.fixture
def spec(tiny_data: Path, tmp_path: Path) -> Path:
    return write_sweep(tmp_path, tiny_data)


def states(spec: Path) -> list[str]:
    return [trial.state for trial in Sweep(spec).trials]


def test_all_trials_run_in_order_and_none_again(stage: Stage, spec: Path) -> None:
    assert stage.run(spec) == 0
    assert stage.started == [trial.name for trial in Sweep(spec).trials]
    assert stage.started[:3] == ["lr-0.001_seed-1", "lr-0.001_seed-2", "lr-0.002_seed-1"]
    assert states(spec) == ["done"] * 6
    assert stage.run(spec) == 0
    assert len(stage.started) == 6


def test_a_trial_that_ends_badly_has_failed_keeps_its_last_lines_and_the_others_run(stage: Stage, spec: Path) -> None:
    def play(folder: Path) -> Played:
        bad = folder.name == "lr-0.001_seed-2"
        if bad:
            with (folder / "trial.log").open("a") as log:
                log.write("note: something\nerror: optim.lr is too high\n")
        return Played(folder, DONE[:1] if bad else DONE, 2 if bad else 0)

    assert stage.run(spec, play) == 1
    trials = Sweep(spec).trials
    assert [trial.state for trial in trials] == ["done", "failed", *["done"] * 4]
    assert trials[1].error == "note: something\nerror: optim.lr is too high"
    assert any("lr-0.001_seed-2 failed after step 8: error: optim.lr is too high" in line for line in stage.said)
    assert stage.run(spec) == 1
    assert len(stage.started) == 6


def test_trials_that_need_others_begin_after_them(stage: Stage, spec: Path) -> None:
    changed_file(spec, lambda values: values.update(axes={"variant": NEEDING}))
    assert stage.run(spec, workers=2) == 0
    assert stage.started == [
        "variant-learned_seed-1", "variant-learned_seed-2", "variant-given_seed-1", "variant-given_seed-2",
    ]  # fmt: skip


def test_a_trial_whose_source_has_failed_never_begins_and_the_code_says_so(stage: Stage, spec: Path) -> None:
    changed_file(spec, lambda values: values.update(axes={"variant": NEEDING}))

    def play(folder: Path) -> Played:
        return Played(folder, DONE, 2 if folder.name == "variant-learned_seed-1" else 0)

    assert stage.run(spec, play) == 1
    assert states(spec) == ["waiting", "done", "failed", "done"]
    text = "variant-given_seed-1 cannot begin: variant-learned_seed-1, which it needs, is failed"
    assert sum(text in line for line in stage.said) == 1


def test_after_max_failures_no_more_are_begun(stage: Stage, spec: Path) -> None:
    changed_file(spec, lambda values: values.update(max_failures=2))
    assert stage.run(spec, lambda folder: Played(folder, DONE[:1], 1)) == 1
    assert states(spec) == ["failed", "failed", *["waiting"] * 4]
    assert "2 trials have failed (max_failures=2): no more are begun" in stage.said[-2]


def test_a_killed_trial_is_started_again_and_after_three_deaths_without_progress_has_failed(
    stage: Stage, spec: Path
) -> None:
    deaths = iter([-9, -9, 0])
    assert stage.run(spec, lambda folder: Played(folder, DONE, next(deaths, 0))) == 0
    assert stage.started[:4] == ["lr-0.001_seed-1"] * 3 + ["lr-0.001_seed-2"]
    first = Sweep(spec).trials[0]
    assert (first.state, first.record.starts) == ("done", 3)


def test_three_deaths_in_a_row_without_a_checkpoint_are_a_failure(stage: Stage, spec: Path) -> None:
    def play(folder: Path) -> Played:
        return Played(folder, DONE[:1], -9 if folder.name == "lr-0.001_seed-1" else 0)

    assert stage.run(spec, play) == 1
    assert stage.started[:4] == ["lr-0.001_seed-1"] * 3 + ["lr-0.001_seed-2"]
    error = Sweep(spec).trials[0].error
    assert error == "was ended by SIGKILL 3 times in a row without a new checkpoint (no memory left?)"


def test_deaths_with_new_checkpoints_between_them_are_no_failure(stage: Stage, spec: Path) -> None:
    deaths = iter([-9] * 5)

    def play(folder: Path) -> Played:
        (folder / "checkpoints" / f"step-{len(stage.started):08d}").mkdir(parents=True)
        return Played(folder, DONE, next(deaths, 0))

    assert stage.run(spec, play) == 0
    assert stage.started[:6] == ["lr-0.001_seed-1"] * 6


def test_what_is_worse_than_the_median_is_pruned_and_not_resumed(stage: Stage, spec: Path) -> None:
    pruning = {"method": "median", "warmup_steps": 16, "startup_trials": 1}
    changed_file(spec, lambda values: values.update(pruning=pruning, seeds=[1]))
    bad = "lr-0.002_seed-1"

    def play(folder: Path) -> Played:
        return Played(folder, (9.0, 9.0) if folder.name == bad else DONE, None if folder.name == bad else 0)

    assert stage.run(spec, play) == 0
    assert states(spec) == ["done", "pruned", "done"]
    assert stage.played[1].signals == [signal.SIGTERM]
    assert stage.run(spec) == 0
    assert len(stage.started) == 3
    kept = [trial.state.name for trial in Sweep(spec).study().trials]
    assert kept == ["COMPLETE", "PRUNED", "COMPLETE"]


def test_before_the_warm_up_nothing_is_pruned(stage: Stage, spec: Path) -> None:
    pruning = {"method": "median", "warmup_steps": 17, "startup_trials": 1}
    changed_file(spec, lambda values: values.update(pruning=pruning, seeds=[1]))
    looks = iter(range(3))

    def play(folder: Path) -> Played:
        played = Played(folder, (9.0, 9.0) if folder.name == "lr-0.002_seed-1" else DONE)
        if folder.name == "lr-0.002_seed-1":
            played.poll = lambda: None if next(looks, None) is not None else 0  # type: ignore[method-assign]
        return played

    assert stage.run(spec, play) == 0
    assert states(spec) == ["done"] * 3


def test_the_budget_of_trials_ends_the_sweep(stage: Stage, spec: Path) -> None:
    changed_file(spec, lambda values: values.update(budget={"trials": 4}))
    assert stage.run(spec) == 0
    assert states(spec) == [*["done"] * 4, *["waiting"] * 2]
    assert any("budget.trials=4: 4 were begun; no more trials are begun" in line for line in stage.said)
    assert "over: 4 done, 2 waiting" in stage.said[-2]
    assert stage.run(spec) == 0
    assert len(stage.started) == 4


def test_a_trial_of_the_budget_that_was_interrupted_goes_on(stage: Stage, spec: Path) -> None:
    changed_file(spec, lambda values: values.update(budget={"trials": 1}))
    codes = iter([-9, 0])
    assert stage.run(spec, lambda folder: Played(folder, DONE, next(codes))) == 0
    assert states(spec)[:2] == ["done", "waiting"]


def test_the_budget_of_tokens_begins_no_trial_that_would_exceed_it(stage: Stage, spec: Path) -> None:
    tokens = 24 * 4 * 32
    changed_file(spec, lambda values: values.update(budget={"tokens": 2 * tokens + 1}))
    assert stage.run(spec, workers=2) == 0
    assert states(spec) == [*["done"] * 2, *["waiting"] * 4]
    assert any(f"budget.tokens={2 * tokens + 1:,}: {2 * tokens:,} are used" in line for line in stage.said)


def test_the_budget_of_hours_stops_running_trials_which_save(stage: Stage, spec: Path) -> None:
    changed_file(spec, lambda values: values.update(budget={"hours": 1e-9}))
    assert stage.run(spec, lambda folder: Played(folder, DONE[:1], None)) == 0
    assert stage.played[0].signals == [signal.SIGTERM]
    assert states(spec) == ["waiting"] * 6
    assert any("budget.hours=1e-09 is used up: 1 trials save and stop" in line for line in stage.said)


def test_a_wish_to_stop_is_heard_by_runners_that_run_and_not_by_later_ones(stage: Stage, spec: Path) -> None:
    folder = Sweep(spec).folder

    def play(trial: Path) -> Played:
        ask_to_stop(folder)
        return Played(trial, DONE[:1], None)

    assert stage.run(spec, play) == 130
    assert stage.played[0].signals == [signal.SIGTERM]
    assert states(spec) == ["waiting"] * 6
    assert stage.run(spec, lambda trial: Played(trial, DONE)) == 0
    assert states(spec) == ["done"] * 6


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_is_passed_on_and_the_runner_leaves_with_its_code(
    stage: Stage, spec: Path, number: int, code: int
) -> None:
    def play(trial: Path) -> Played:
        os.kill(os.getpid(), number)
        return Played(trial, DONE[:1], None)

    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, and stays so
    try:
        assert stage.run(spec, play) == code
    finally:
        signal.signal(signal.SIGHUP, before)
    assert stage.played[0].signals == [signal.SIGTERM]
    assert states(spec) == ["waiting"] * 6


def test_a_trial_that_another_runner_has_is_left_to_it(stage: Stage, spec: Path) -> None:
    sweep = Sweep(spec)
    claim = Claim.take(sweep.folder / "lr-0.001_seed-2")
    assert claim is not None
    assert stage.run(spec, waits=False) == 0
    assert "lr-0.001_seed-2" not in stage.started
    assert states(spec) == ["done", "running", *["done"] * 4]
    claim.release()
    assert stage.run(spec) == 0
    assert stage.started[-1] == "lr-0.001_seed-2"


def test_a_runner_that_waits_takes_over_what_another_one_leaves(stage: Stage, spec: Path) -> None:
    claim = Claim.take(Sweep(spec).folder / "lr-0.001_seed-2")
    assert claim is not None
    runs = Sweep(spec)

    def say(text: str) -> None:
        stage.said.append(text)
        if "waits for 1 trials that other runners run" in text:
            claim.release()

    assert Runner(runs, Study(runs), Workers(1, 1), write_line=say).run() == 0
    assert stage.started[-1] == "lr-0.001_seed-2"
    assert len(stage.started) == 6


def test_a_run_that_was_begun_by_hand_is_not_disturbed(stage: Stage, spec: Path) -> None:
    from pldr_train.runs.lock import RunLock

    folder = Sweep(spec).folder / "lr-0.001_seed-2"
    folder.mkdir(parents=True)
    lock = RunLock(folder)
    lock.acquire()
    assert Claim.take(folder) is None
    lock.release()
    claim = Claim.take(folder)
    assert claim is not None
    claim.release()


def test_while_the_data_is_prepared_no_other_trial_begins(stage: Stage, spec: Path) -> None:
    order: list[str] = []

    class Preparing(Played):
        """Trains only once the runner has looked for more work several times."""

        looks = 0

        def poll(self) -> int | None:
            self.looks += 1
            if self.looks < 5:
                return None
            if self.looks == 5:
                order.append("trains")
                (self.folder / "metrics.jsonl").write_text('{"step": 24, "val/loss": 1.0}\n')
            return 0 if self.looks > 20 else None

    def play(folder: Path) -> Played:
        order.append("begins")
        if not stage.played:
            folder.mkdir(exist_ok=True)
            played = Preparing(folder, ())
            (folder / "metrics.jsonl").unlink()
            return played
        return Played(folder, DONE)

    assert stage.run(spec, play, workers=2) == 0
    assert order[:3] == ["begins", "trains", "begins"]
    assert states(spec) == ["done"] * 6


def test_a_journal_that_is_lost_is_made_again_of_the_folders(stage: Stage, spec: Path) -> None:
    assert stage.run(spec) == 0
    journal = Sweep(spec).folder / "study.journal"
    before = study_in(journal)
    assert [trial.state.name for trial in before.trials] == ["COMPLETE"] * 6
    assert [trial.value for trial in before.trials] == [1.0] * 6
    assert before.trials[0].intermediate_values == {8: 3.0, 16: 2.0, 24: 1.0}
    journal.unlink()
    assert stage.run(spec) == 0
    assert len(stage.started) == 6
    after = study_in(journal)
    assert [(trial.user_attrs, trial.params) for trial in after.trials] == [
        (trial.user_attrs, trial.params) for trial in before.trials
    ]


def test_a_line_of_the_journal_that_a_kill_has_cut_short_does_no_harm(stage: Stage, spec: Path) -> None:
    changed_file(spec, lambda values: values.update(budget={"trials": 3}))
    assert stage.run(spec) == 0
    journal = Sweep(spec).folder / "study.journal"
    with journal.open("ab") as file:
        file.write(b'{"op_code":4,"work')
    changed_file(spec, lambda values: values.pop("budget"))
    assert stage.run(spec) == 0
    assert len(study_in(journal).trials) == 6


def study_in(journal: Path) -> optuna.Study:
    backend = optuna.storages.journal.JournalFileBackend(str(journal))
    return optuna.load_study(study_name="small", storage=optuna.storages.JournalStorage(backend))


def test_a_storage_of_sqlite_holds_the_study_too(stage: Stage, spec: Path, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/study.db"
    changed_file(spec, lambda values: values.update(storage=url))
    assert stage.run(spec) == 0
    found = optuna.load_study(study_name="small", storage=url)
    assert [trial.user_attrs["name"] for trial in found.trials] == stage.started
    assert not (Sweep(spec).folder / "study.journal").exists()


def test_a_storage_that_cannot_be_reached_is_said_with_its_place(spec: Path, tmp_path: Path) -> None:
    sweep = Sweep(spec)
    with pytest.raises(UserError, match=r"storage sqlite:///.*/none/study\.db: .*check that it can be reached"):
        Study(sweep, f"sqlite:///{tmp_path}/none/study.db")


def test_where_the_storage_is_lost_on_the_way_trials_save_and_the_runner_says_it(
    stage: Stage, spec: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def play(folder: Path) -> Played:
        def lost(*_: object, **__: object) -> None:
            raise OSError("gone")

        monkeypatch.setattr(optuna.Study, "get_trials", lost)
        return Played(folder, DONE[:1], None)

    with pytest.raises(UserError, match=r"storage .*study\.journal: OSError: gone; check that it can be reached"):
        stage.run(spec, play)
    assert stage.played[0].signals == [signal.SIGTERM]
    monkeypatch.undo()
    assert states(spec) == ["waiting"] * 6


def test_a_full_disk_is_said_and_the_same_command_goes_on_later(stage: Stage, spec: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def play(folder: Path) -> Played:
        played = Played(folder, DONE)
        if len(stage.played) == 2:  # from here on no file may grow
            resource.setrlimit(resource.RLIMIT_FSIZE, (1, hard))
        return played

    try:
        with pytest.raises(UserError) as raised:
            stage.run(spec, play)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(Sweep(spec).folder) in str(raised.value)
    assert "File too large" in str(raised.value)
    assert states(spec)[:2] == ["done", "done"]
    assert stage.run(spec, lambda folder: Played(folder, DONE)) == 0
    assert states(spec) == ["done"] * 6
    assert stage.started.count("lr-0.001_seed-1") == stage.started.count("lr-0.001_seed-2") == 1


def test_a_search_draws_its_cells_by_the_results_and_repeats_none_after_a_restart(stage: Stage, spec: Path) -> None:
    axes = {LR: {"low": 1e-4, "high": 1e-1, "log": True}, "dag.A_P": [0.0, 0.1]}
    search = {"axes": axes, "sampler": {"method": "tpe", "trials": 4, "seed": 3}, "seeds": [1, 2]}
    changed_file(spec, lambda values: values.update(search, budget={"trials": 3}))
    assert stage.run(spec) == 0
    assert len(stage.started) == 3
    assert (Sweep(spec).num_trials, Sweep(spec).num_to_draw) == (8, 2)
    assert "over: 3 done, 1 waiting, 2 cells not drawn" in stage.said[-2]
    changed_file(spec, lambda values: values.pop("budget"))
    assert stage.run(spec) == 0
    sweep = Sweep(spec)
    assert stage.started == [trial.name for trial in sweep.trials]
    assert len(set(stage.started)) == 8
    assert [trial.cell for trial in sweep.trials] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert all(cell.trials[0].axes == cell.trials[1].axes for cell in sweep.cells)
    assert len({trial.axes[LR] for trial in sweep.trials}) == 4
    assert stage.run(spec) == 0
    assert len(stage.started) == 8


def test_a_kill_between_the_records_of_a_cell_loses_none_of_its_seeds(stage: Stage, spec: Path) -> None:
    search = {"axes": {LR: {"low": 1e-4, "high": 1e-1}}, "sampler": {"method": "tpe", "trials": 2}, "seeds": [1, 2]}
    changed_file(spec, lambda values: values.update(search, budget={"trials": 1}))
    assert stage.run(spec) == 0
    folder = Sweep(spec).folder
    second = Sweep(spec).trials[1]
    assert second.record.starts == 0
    shutil.rmtree(second.folder)
    (folder / "sweep.json").unlink(missing_ok=True)
    changed_file(spec, lambda values: values.pop("budget"))
    assert stage.run(spec) == 0
    assert len(stage.started) == len(set(stage.started)) == 4
    assert [len(cell.trials) for cell in Sweep(spec).cells] == [2, 2]


def test_a_drawn_cell_that_makes_no_recipe_is_said_and_passed_over(stage: Stage, spec: Path) -> None:
    # Each is right beside the first value of the other; together they are not.
    axes = {"trainer.max_steps": [24, 4], "optim.warmup_steps": [4, 20]}
    search = {"axes": axes, "sampler": {"method": "tpe", "trials": 30}, "seeds": [1]}
    changed_file(spec, lambda values: values.update(search))
    assert stage.run(spec) == 0
    assert sorted(stage.started) == [
        f"max_steps-{steps}_warmup_steps-{warmup}_seed-1" for steps, warmup in ((24, 20), (24, 4), (4, 4))
    ]
    words = "cell max_steps-4_warmup_steps-20 was drawn and makes no recipe: optim.warmup_steps=20: exceeds"
    assert any(words in line for line in stage.said)


def test_a_search_of_few_values_ends_although_cells_are_drawn_again(stage: Stage, spec: Path) -> None:
    search = {"axes": {LR: [1e-3, 2e-3]}, "sampler": {"method": "tpe", "trials": 12}, "seeds": [1]}
    changed_file(spec, lambda values: values.update(search))
    assert stage.run(spec) == 0
    assert sorted(stage.started) == ["lr-0.001_seed-1", "lr-0.002_seed-1"]
    assert (Sweep(spec).num_trials, Sweep(spec).num_drawn) == (2, 12)


def test_a_trials_command_and_variables(stage: Stage, spec: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"):
        monkeypatch.setenv(name, "1")
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(processes, "num_cores", lambda: 12)
    assert stage.run(spec, workers=3) == 0
    assert stage.commands[0][1:4] == ["-m", "pldr_train", "fit"]
    assert Path(stage.commands[0][4]) == stage.played[0].folder / "trial.yaml"
    assert stage.commands[0][5:] == []  # the recipe names its threads
    variables = stage.environments[0]
    assert {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"}.isdisjoint(variables)
    assert (variables["OMP_NUM_THREADS"], variables["PLDR_TRAIN_LAUNCHER_PID"]) == ("4", str(os.getpid()))
    changed_file(spec, lambda values: values.update(set={"trainer.threads": None}, seeds=[3]))
    assert stage.run(spec, workers=3) == 0
    assert stage.commands[-1][5:] == ["trainer.threads=4"]


def test_gpus_are_dealt_out_to_the_trials(spec: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,5,7")
    assert visible_gpus() == ("2", "3", "5", "7")
    changed_file(spec, lambda values: values.update(set={"trainer.accelerator": "auto"}))
    recipe = Sweep(spec).base
    workers = choose_workers(recipe, None, 2)
    assert (workers.number, workers.devices) == (2, 2)
    assert [workers.environment(slot)["CUDA_VISIBLE_DEVICES"] for slot in range(2)] == ["2,3", "5,7"]
    with pytest.raises(UserError, match=r"--workers 3 with 2 devices each: there are 4 GPUs; lower"):
        choose_workers(recipe, 3, 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus() == ()


def test_on_the_cpu_as_many_trials_run_as_their_threads_allow(spec: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "num_cores", lambda: 8)
    recipe = Sweep(spec).base  # one thread
    assert choose_workers(recipe, None, 1).number == 8
    assert choose_workers(recipe.replaced({"trainer.threads": 3}), None, 1).number == 2
    assert choose_workers(recipe.replaced({"trainer.threads": None}), None, 1).number == 1
    assert choose_workers(recipe, 2, 1) == Workers(2, 1)
    assert Workers(2, 1).threads == 4
