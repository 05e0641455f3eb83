"""Modes, tags and groups of W&B runs, and the pictures that they show."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import wandb

from pldr_train.errors import UserError
from pldr_train.wandb_runs.artifacts import artifact_name
from pldr_train.wandb_runs.media import colours, heatmap, robust_scale
from pldr_train.wandb_runs.opening import (
    define_metrics,
    group_of,
    read_environment,
    run_id_of,
    tags_of,
    tokens_per_step_of,
    told_to_the_user,
)
from pldr_train.wandb_switch import key_is_set, own_switch, resolve_mode
from tests.unit.wandb_case import isolate_wandb


@pytest.fixture(autouse=True)
def _isolated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    isolate_wandb(monkeypatch, tmp_path)


def test_a_key_may_be_in_the_environment_or_in_netrc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (key_is_set(), resolve_mode("auto")) == (False, "offline")
    (tmp_path / "home" / ".netrc").touch(mode=0o600)  # one that others may read is not used
    (tmp_path / "home" / ".netrc").write_text("machine api.wandb.ai login user password key\n")
    assert (key_is_set(), resolve_mode("auto"), resolve_mode("disabled")) == (True, "online", "disabled")
    (tmp_path / "home" / ".netrc").write_text("machine\n")
    assert not key_is_set()
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    assert resolve_mode("auto") == "online"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert resolve_mode("auto") == "offline"


@pytest.mark.parametrize(
    ("variable", "own", "users", "mode"),
    [
        (None, None, None, "online"),
        ("WANDB_MODE=dryrun", "online", None, "offline"),
        ("WANDB_MODE=Disabled", None, None, "disabled"),
        ("WANDB_MODE=online", "offline", "disabled", "online"),
        ("WANDB_DISABLED=true", None, None, "disabled"),
        ("WANDB_DISABLED=false", None, None, "online"),
        (None, "offline", "online", "offline"),
        (None, "disabled", None, "disabled"),
        (None, None, "offline", "offline"),
    ],
)
def test_what_switches_wandb_off_counts_although_a_key_is_set(
    variable: str | None, own: str | None, users: str | None, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    if variable:
        monkeypatch.setenv(*variable.split("="))
    for folder, said in ((tmp_path / "wandb", own), (tmp_path / "home", users)):
        if said:
            folder.mkdir(exist_ok=True)
            (folder / "settings").write_text(f"[default]\nmode = {said}\nproject = 100%\n")
    assert resolve_mode("auto") == mode
    assert resolve_mode("online") == "online"


def test_a_damaged_file_of_settings_switches_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wandb").mkdir()
    for content in (b"mode = offline", b"[default\n", b"\xff[default]"):
        (tmp_path / "wandb" / "settings").write_bytes(content)
        assert own_switch() is None


def test_the_settings_are_those_that_wandb_itself_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for word in ("offline", "disabled", "online"):
        files = wandb.Settings(root_dir=str(tmp_path)).read_system_settings()
        files.set("mode", word)
        files.save()
        assert own_switch() == (word, f"mode = {word} in wandb/settings")


def test_a_folder_keeps_its_id(tmp_path: Path) -> None:
    assert run_id_of(tmp_path) == run_id_of(tmp_path)


@pytest.mark.parametrize(
    ("name", "group"),
    [("base-seed7", "base"), ("base_s7", "base"), ("base.seed_007", "base"), ("base-7", None), ("base-seed8", None)],
)
def test_runs_that_differ_in_their_seed_alone_are_a_group(name: str, group: str | None) -> None:
    assert group_of({"run": {"name": name, "seed": 7}}) == group


def test_tags_say_what_a_run_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_TAGS", "mine, dag")
    values = {
        "model": {"num_hidden_layers": 5, "num_attention_heads": 14, "head_dim": 64, "custom_G_type": "identity"},
        "dag": {"A_LM": 0.0, "A_P": 0.1},
        "data": {"source": "hub", "repository": "owner/" + "x" * 100},
        "trainer": {"devices": 8, "num_nodes": 2},
    }
    assert tags_of(values | {"run": {"tags": ["of the recipe", "dag"]}})[:3] == ["mine", "dag", "of the recipe"]
    tags = tags_of(values)
    assert tags[:4] == ["mine", "dag", "5L-14H-64d", "G-identity"]
    assert tags[4:] == ["owner/" + "x" * 58, "16-processes"]
    assert tags_of({}) == ["mine", "dag", "G-learned", "no-dag"]
    assert tokens_per_step_of(values) is None


def test_artifacts_have_names_that_wandb_takes() -> None:
    assert artifact_name("a b/c") == "checkpoint-a-b-c"
    assert len(artifact_name("x" * 500)) == 128


class Defined:
    """Takes what is defined of a W&B run's metrics."""

    def __init__(self) -> None:
        self.over_steps: list[str] = []
        self.summaries: dict[str, str] = {}

    def define_metric(self, name: str, step_metric: str | None = None, summary: str | None = None) -> None:
        if step_metric == "step":
            self.over_steps.append(name)
        if summary is not None:
            self.summaries[name] = summary


def test_best_values_are_of_losses_and_accuracies_of_every_layer() -> None:
    run = Defined()
    define_metrics(run, 2)
    found = run.summaries
    assert found["val/dag/layer_1/A_P"] == found["train/perplexity"] == found["leakage/sequential_nll"] == "min,last"
    assert found["val/accuracy"] == "max,last"
    assert not [name for name in found if name.startswith(("system/", "deductive/", "data/"))]
    groups = ["train", "val", "leakage", "system", "data", "deductive", "eval"]
    assert run.over_steps == ["tokens", *(f"{group}/*" for group in groups), *found]


# ------------------------------------------------------------------------------------------------------------ pictures


def test_outliers_do_not_change_the_colours_of_the_rest() -> None:
    values = np.random.default_rng(0).normal(size=10_000).astype(np.float32)
    scale = robust_scale(values)
    assert scale.signed
    assert scale.low == -scale.high
    values[:10], values[10] = 1e9, np.nan
    assert robust_scale(values).high == pytest.approx(scale.high, rel=0.05)
    positive = robust_scale(np.abs(values))
    assert not positive.signed
    assert robust_scale(np.full(3, np.nan, dtype=np.float32)).high > 0


def test_zero_is_white_and_what_is_not_finite_has_a_colour_of_its_own() -> None:
    values = np.array([[0.0, 9.0, -9.0, np.nan, np.inf]], dtype=np.float32)
    scale = robust_scale(np.array([-1.0, 1.0], dtype=np.float32))
    white, high, low, nan, infinite = colours(values, scale)[0].tolist()
    assert min(white) > 240
    assert high[2] > high[0]  # blue
    assert low[0] > low[2]  # red
    assert nan == infinite
    assert nan not in (white, high, low)
    same = np.full((2, 2), 3.0, dtype=np.float32)
    assert colours(same, robust_scale(same)).shape == (2, 2, 3)


@pytest.mark.parametrize(("layers", "heads", "width"), [(1, 1, 2), (5, 14, 64), (3, 2, 48), (2, 40, 256), (1, 1, 5000)])
def test_pictures_keep_to_a_size_that_can_be_looked_at(layers: int, heads: int, width: int) -> None:
    matrices = [np.zeros((heads, width, width), dtype=np.float32)] * layers
    picture = heatmap(matrices, robust_scale(matrices[0]))
    assert max(picture.size) <= 4096
    assert picture.width >= heads * min(width, 48)


def test_each_matrix_has_its_place() -> None:
    layers = [np.zeros((2, 64, 64), dtype=np.float32), np.zeros((2, 64, 64), dtype=np.float32)]
    layers[1][0] = 1.0
    scale = robust_scale(np.array([-1.0, 1.0], dtype=np.float32))
    picture = heatmap(layers, scale)
    step = 64 + 2
    at = {
        (row, column): picture.getpixel((24 + column * step + 32, 24 + row * step + 32))
        for row in (0, 1)
        for column in (0, 1)
    }
    assert at[0, 0] == at[0, 1] == at[1, 1] != at[1, 0]


def test_a_home_that_cannot_be_written_is_reported_with_the_fix() -> None:
    with pytest.raises(UserError, match=r"cannot write its files: .*read-only.*WANDB_DATA_DIR"), told_to_the_user():
        raise PermissionError("HOME is read-only")


@pytest.mark.parametrize("content", ["", "{", "[]", "7", '{"x": 1}', "[" * 100_000])
def test_a_damaged_id_is_reported_and_a_damaged_environment_left_out(tmp_path: Path, content: str) -> None:
    (tmp_path / "wandb.json").write_text(content)
    (tmp_path / "environment.json").write_text(content)
    with pytest.raises(UserError, match=r"wandb\.json is damaged .*remove it"):
        run_id_of(tmp_path)
    assert read_environment(tmp_path) in (None, {"x": 1})
