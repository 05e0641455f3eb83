"""Snapshots in the report: what is kept of a matrix, what fits, and what is said of damaged files."""

from __future__ import annotations

import base64
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pldr_train.commands.report import write_page
from pldr_train.report import page as page_module
from pldr_train.report import snapshots as module
from pldr_train.report.page import content_of, page_parts, render_page, snapshots_of
from pldr_train.report.runs import open_runs
from pldr_train.report.snapshots import Snapshots, picture_of, row_map_collapse
from tests.report_runs import matrices, write_metrics, write_snapshot, write_snapshots


def decoded(picture: dict[str, Any], head: int) -> NDArray[np.float64]:
    """As the page's script reads it."""
    rows, columns = picture["rows"], picture["columns"]
    codes = np.frombuffer(base64.b64decode(picture["codes"]), dtype=np.uint8).reshape(-1, rows, columns)[head]
    centre, scale, low, high = picture["heads"][head][:4]
    return np.where(codes == 255, np.nan, centre + scale * np.sinh(low + (high - low) * codes / 254))


def read(run: Path) -> Snapshots:
    found = Snapshots(run / "snapshots")
    found.read_on()
    return found


def steps_of(plain: dict[str, Any] | None) -> list[int]:
    return [] if plain is None else [each["step"] for each in plain["steps"]]


# ------------------------------------------------------------------------------------------------------------ pictures


def test_values_near_the_centre_and_far_out_are_both_told_apart() -> None:
    values = np.random.default_rng(1).normal(size=(2, 32, 32)).astype(np.float32)
    values[0, 3, 4], values[1, 5, 6] = 1e6, -1e9
    picture = picture_of(values)
    for head in (0, 1):
        error = np.abs(decoded(picture, head) - values[head])
        assert float(np.median(error)) < 0.05
        assert float((error / np.maximum(1, np.abs(values[head]))).max()) < 0.1
    assert decoded(picture, 0)[3, 4] == pytest.approx(1e6, rel=0.01)
    assert decoded(picture, 1)[5, 6] == pytest.approx(-1e9, rel=0.01)
    low, high, mean, robust_low, robust_high, collapse, missing = picture["heads"][0][4:]
    assert (high, missing) == (1e6, 0)
    assert low == pytest.approx(values[0].min(), rel=1e-4)
    assert mean == pytest.approx(values[0].astype(np.float64).mean(), rel=1e-4)
    assert -4 < robust_low < robust_high < 4
    assert 0 < collapse <= 1


@pytest.mark.parametrize("value", [0.0, -3.25, 3.4e38, 1e-45])
def test_a_constant_matrix_has_one_colour_and_its_value(value: float) -> None:
    picture = picture_of(np.full((1, 4, 4), value, dtype=np.float32))
    assert decoded(picture, 0) == pytest.approx(np.full((4, 4), np.float32(value), dtype=np.float64), rel=1e-5)
    assert picture["heads"][0][9] == 0
    json.dumps(picture, allow_nan=False)


def test_what_is_not_finite_has_a_code_of_its_own_and_is_counted() -> None:
    values = np.random.default_rng(2).normal(size=(2, 8, 8)).astype(np.float32)
    values[0, 0, :3] = [np.nan, np.inf, -np.inf]
    values[1] = np.nan
    picture = picture_of(values)
    assert np.isnan(decoded(picture, 0)).sum() == 3
    assert np.isnan(decoded(picture, 1)).all()
    assert [head[10] for head in picture["heads"]] == [3, 64]
    assert picture["heads"][0][9] is None
    assert picture["heads"][1][4:10] == [None] * 6
    json.dumps(picture, allow_nan=False)


def test_equal_rows_stay_equal() -> None:
    values = np.tile(np.random.default_rng(3).normal(size=(1, 1, 64)), (1, 64, 1)).astype(np.float32)
    picture = picture_of(values)
    assert (decoded(picture, 0) == decoded(picture, 0)[0]).all()
    assert picture["heads"][0][9] == 0


def test_row_map_collapse_is_the_share_of_the_variance_between_rows() -> None:
    chance = np.random.default_rng(4)
    values = chance.normal(size=(16, 16)).astype(np.float32)
    expected = np.mean((values - values.mean(0)) ** 2) / np.mean((values - values.mean()) ** 2)
    assert row_map_collapse(values) == pytest.approx(expected, rel=1e-5)
    assert row_map_collapse(np.ones((4, 4), dtype=np.float32)) == 0


def test_large_matrices_are_averaged_down_without_losing_a_border() -> None:
    values = np.arange(300 * 300, dtype=np.float32).reshape(1, 300, 300)
    values[0, 0, 0] = np.nan
    picture = picture_of(values)
    assert (picture["rows"], picture["columns"], picture["of"]) == (100, 100, [300, 300])
    expected = values[0, 297:, 297:].mean()
    assert decoded(picture, 0)[-1, -1] == pytest.approx(expected, rel=0.01)
    assert math.isfinite(decoded(picture, 0)[0, 0])
    assert picture["heads"][0][10] == 1


# --------------------------------------------------------------------------------------------------------------- files


def test_steps_come_in_order_with_every_layer_and_tensor(tmp_path: Path) -> None:
    write_snapshots(tmp_path, [0, 100, 123456789], layers=3)
    plain = read(tmp_path).as_plain(1e9)
    assert plain is not None
    assert steps_of(plain) == [0, 100, 123456789]
    assert list(plain["steps"][0]["tensors"]) == ["A", "A_LM", "A_P", "G_LM"]
    assert list(plain["steps"][0]["tensors"]["A"]) == ["0", "1", "2"]
    first, last = (plain["steps"][place]["tensors"]["A"]["1"]["heads"][2][9] for place in (0, -1))
    assert first > 0.8
    assert last < 1e-9


def test_a_predefined_g_has_only_g(tmp_path: Path) -> None:
    write_snapshot(tmp_path, 5, {"layer_0/G_LM": matrices(2, 8, 1.0, seed=1)["G_LM"]})
    plain = read(tmp_path).as_plain(1e9)
    assert plain is not None
    assert list(plain["steps"][0]["tensors"]) == ["G_LM"]


@pytest.mark.parametrize("most_bytes", [30e3, 60e3, 120e3])
def test_where_not_all_fit_evenly_spread_ones_are_taken(tmp_path: Path, most_bytes: float) -> None:
    steps = list(range(0, 5000, 100))
    write_snapshots(tmp_path, steps)
    plain = read(tmp_path).as_plain(most_bytes)
    assert plain is not None
    shown = steps_of(plain)
    assert len(json.dumps(plain)) < 1.15 * most_bytes
    assert (shown[0], shown[-1], plain["of"], plain["factor"]) == (0, 4900, 50, 1)
    gaps = np.diff(shown)
    assert gaps.max() - gaps.min() <= 100
    assert len(json.dumps(plain)) * (len(shown) + 2) / len(shown) > most_bytes * 0.7


def test_where_not_even_two_fit_the_matrices_are_averaged_down(tmp_path: Path) -> None:
    write_snapshots(tmp_path, [1, 2, 3], heads=2, side=64)
    plain = read(tmp_path).as_plain(60e3)
    assert plain is not None
    assert len(json.dumps(plain)) < 60e3
    assert steps_of(plain)[0] == 1
    assert steps_of(plain)[-1] == 3
    picture = plain["steps"][0]["tensors"]["A"]["0"]
    assert picture["rows"] < 64
    assert picture["of"] == [64, 64]


def test_damaged_files_are_named_and_the_others_shown(tmp_path: Path) -> None:
    write_snapshots(tmp_path, [10, 20])
    folder = tmp_path / "snapshots"
    whole = (folder / "step-00000010.safetensors").read_bytes()
    (folder / "step-00000030.safetensors").write_bytes(whole[: len(whole) // 2])
    (folder / "step-00000040.safetensors").write_bytes(b"")
    (folder / "step-00000050.safetensors").write_bytes(b"\xff" * 100)
    (folder / "step-00000060.safetensors").mkdir()
    (folder / "step-7.safetensors").write_text("of another name")
    (folder / "step-00000080.safetensors.tmp").write_text("being written")
    write_snapshot(tmp_path, 70, {"layer_0/A": np.ones((4, 4), dtype=np.float32), "other": np.ones(3)})
    found = read(tmp_path)
    assert steps_of(found.as_plain(1e9)) == [10, 20]
    notes = " ".join(found.notes)
    for step in (30, 40, 50, 60, 70):
        assert f"step-{step:08d}.safetensors" in notes
    assert "step-7" not in notes
    assert "no tensor (heads, d, d)" in notes


def test_odd_shapes_and_values_beside_good_ones_are_shown(tmp_path: Path) -> None:
    good = matrices(2, 8, 1.0, seed=1)["A"]
    odd = {"layer_0/A": good, "layer_1/A": good[:1, :4], "layer_2/A": good.astype(np.float16)}
    write_snapshot(tmp_path, 1, odd | {"layer_3/A": np.full((2, 8, 8), np.nan, dtype=np.float32), "layer_x/A": good})
    plain = read(tmp_path).as_plain(1e9)
    assert plain is not None
    pictures = plain["steps"][0]["tensors"]["A"]
    assert {layer: (each["rows"], each["columns"], len(each["heads"])) for layer, each in pictures.items()} == {
        "0": (8, 8, 2), "1": (4, 8, 1), "2": (8, 8, 2), "3": (8, 8, 2),
    }  # fmt: skip
    json.dumps(plain, allow_nan=False)


def test_a_file_that_vanishes_after_its_header_was_read_is_named(tmp_path: Path) -> None:
    write_snapshots(tmp_path, [10, 20])
    found = read(tmp_path)
    (tmp_path / "snapshots" / "step-00000010.safetensors").unlink()
    assert steps_of(found.as_plain(1e9)) == [20]
    assert "step-00000010" in " ".join(found.notes)


def test_only_news_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_snapshots(tmp_path, [10, 20])
    found = read(tmp_path)
    assert not found.read_on()
    found.as_plain(1e9)
    asked: list[int] = []
    real = module._read_pictures
    monkeypatch.setattr(
        module, "_read_pictures", lambda header, factor: (asked.append(header.step), real(header, factor))[1]
    )
    write_snapshot(tmp_path, 30, {"layer_0/A": matrices(1, 8, 1.0, seed=1)["A"]})
    assert found.read_on()
    assert steps_of(found.as_plain(1e9)) == [10, 20, 30]
    assert asked == [30]


def test_runs_share_the_room_on_a_page_and_their_names_cannot_become_markup(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("a", "<b>", "none")]
    for folder in folders:
        write_metrics(folder, {"step": 1, "train/loss": 1.0})
    for folder in folders[:2]:
        write_snapshots(folder, range(0, 1000, 100))
    runs, problems = open_runs(folders)
    for run in runs:
        run.read_on()
    made = snapshots_of(runs, 80e3)
    assert made.keys() == {"a", "<b>"}
    assert 60e3 < len(json.dumps(made)) < 92e3
    page = render_page(content_of(runs, problems, live=False), made)
    assert "<b>" not in page.partition('id="snapshots"')[2].partition("</script>")[0]


def test_snapshots_fill_what_curves_leave_of_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_module, "MOST_PAGE_BYTES", 400_000)
    monkeypatch.setattr(page_module, "LEAST_SNAPSHOT_BYTES", 50_000)
    shown = []
    for name, metrics in (("few", 1), ("many", 12)):
        names = [f"mine/m{metric}" for metric in range(metrics)]
        lines = [{"step": step} | dict.fromkeys(names, step * 0.1234567) for step in range(800)]
        write_metrics(tmp_path / name, *lines)
        write_snapshots(tmp_path / name, range(0, 5000, 100))
        runs, problems = open_runs([tmp_path / name])
        size = write_page(runs, problems, tmp_path / f"{name}.html", "")
        shown.append((size, len(page_parts(runs, problems)[1][name]["steps"])))
    assert all(330_000 < size <= 420_000 for size, _ in shown), shown
    assert shown[0][1] > shown[1][1] > 2
