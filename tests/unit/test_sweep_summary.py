"""What a sweep's report says, against figures recomputed from the trials' folders."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats

from pldr_train.cli import main
from pldr_train.sweeps import Sweep
from pldr_train.sweeps.page import render_sweep
from pldr_train.sweeps.records import Record, write_record
from pldr_train.sweeps.summary import Summary
from pldr_train.sweeps.tables import as_csv, as_latex, as_markdown
from tests.browser import find_browser, opened_tab

STEPS = (0, 10, 20)
SPEC = """
name: study
recipe: quickstart
set: {{run.dir: {folder}, trainer.max_steps: 20, optim.warmup_steps: 2, trainer.validate_every_steps: 10}}
axes:
  optim.lr: [1.0e-3, 3.0e-3]
  variant:
    learned: {{model.custom_G_type: learned}}
    causal: {{model.gram_chunk_size: 32}}
seeds: [1, 2, 3]
baseline: {{variant: learned}}
"""
FAILED, PRUNED, WAITING = 3, 7, 11
"""Numbers of trials that are not done."""
METRICS = ("val/cross_entropy", "leakage/sequential_nll", "leakage/gap", "val/dag/G_LM", "deductive/A/rank")


def lines_of(number: int) -> list[dict[str, Any]]:
    generator = np.random.default_rng(number)
    last = 10 if number in (FAILED, PRUNED) else 20
    lines = []
    for step in STEPS:
        if step <= last:
            values = {name: float(generator.normal(5 - step / 10, 0.2)) for name in METRICS}
            lines.append({"step": step, "system/tokens_per_s": float(generator.uniform(1e3, 2e3)), **values})
    return lines


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    """Twelve trials with made-up metrics: one failed, one pruned, one not begun."""
    spec = tmp_path / "study.yaml"
    spec.write_text(SPEC.format(folder=tmp_path / "runs"))
    made = Sweep(spec)
    for number, planned in enumerate(made.planned()):
        if number == WAITING:
            continue
        folder = made.folder / planned.name
        folder.mkdir(parents=True)
        lines = lines_of(number)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        state = {FAILED: "failed", PRUNED: "pruned"}.get(number, "done")
        error = "error: <b>disk</b> full" if state == "failed" else None
        record = Record(
            planned.name, dict(planned.axes), planned.seed, planned.cell, state, error, steps=lines[-1]["step"]
        )
        write_record(folder, record)
    return Sweep(spec)


def figures_of_cells(sweep: Sweep, metric: str) -> list[list[float]]:
    """The last values of the trials that are done, read from the files by other means."""
    cells: dict[int, list[float]] = {}
    for number, planned in enumerate(sweep.planned()):
        cells.setdefault(planned.cell, [])
        if number not in (FAILED, PRUNED, WAITING):
            text = (sweep.folder / planned.name / "metrics.jsonl").read_text().splitlines()[-1]
            cells[planned.cell].append(json.loads(text)[metric])
    return list(cells.values())


def test_every_mean_and_interval_is_that_of_the_folders(sweep: Sweep) -> None:
    content = Summary(sweep).as_plain()
    assert [column["metric"] for column in content["columns"]] == [*METRICS, "system/tokens_per_s"]
    for metric in METRICS:
        for cell, values in zip(content["cells"], figures_of_cells(sweep, metric), strict=True):
            figure = cell["figures"][metric]
            assert figure["n"] == len(values) in (2, 3)
            assert figure["mean"] == pytest.approx(np.mean(values))
            assert figure["sd"] == pytest.approx(np.std(values, ddof=1))
            half = scipy.stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
            assert figure["half"] == pytest.approx(half, rel=1e-6)
    assert content["counts"] == {"done": 9, "failed": 1, "pruned": 1, "waiting": 1}


def test_a_rate_is_the_median_over_the_run(sweep: Sweep) -> None:
    content = Summary(sweep).as_plain()
    expected = float(np.median([line["system/tokens_per_s"] for line in lines_of(0)]))
    assert content["trials"][0]["figures"]["system/tokens_per_s"] == pytest.approx(expected)


def test_cells_are_compared_with_the_baseline_of_the_same_rate_over_common_seeds(sweep: Sweep) -> None:
    content = Summary(sweep).as_plain()
    names = [cell["name"] for cell in content["cells"]]
    assert [cell["baseline"] for cell in content["cells"]] == [True, False, True, False]
    assert [cell["against"] for cell in content["cells"]] == [None, names[0], None, names[2]]
    # Cell 1 lacks its first trial (number 3), so seeds 2 and 3 are paired with those of cell 0.
    last = {number: lines_of(number)[-1] for number in range(12)}
    for metric in METRICS:
        differences = [last[4][metric] - last[1][metric], last[5][metric] - last[2][metric]]
        paired = content["cells"][1]["paired"][metric]
        assert paired["n"] == 2
        assert paired["mean"] == pytest.approx(np.mean(differences))
        assert paired["effect"] == pytest.approx(np.mean(differences) / np.std(differences, ddof=1))


def test_effects_of_an_axis_are_means_over_all_trials_with_its_values(sweep: Sweep) -> None:
    summary = Summary(sweep)
    column = next(each for each in summary.columns if each.metric == "leakage/sequential_nll")
    done = [number for number in range(12) if number not in (FAILED, PRUNED, WAITING)]
    found = summary.effect("variant", column)
    for variant, cells in (("learned", (0, 2)), ("causal", (1, 3))):
        values = [lines_of(number)[-1][column.metric] for number in done if number // 3 in cells]
        assert found[variant].values == tuple(values)
    assert set(summary.effect("optim.lr", column)) == {1e-3, 3e-3}


def test_curves_are_thinned_out_and_keep_their_end(sweep: Sweep) -> None:
    folder = sweep.folder / sweep.planned()[0].name
    lines = [{"step": step, "val/cross_entropy": 10 - step / 1000} for step in range(1001)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    points = Summary(sweep).as_plain()["trials"][0]["curves"]["val/cross_entropy"]
    assert len(points) <= 121
    assert points[0] == (0, 10.0)
    assert points[-1] == (1000, 9.0)


def test_importances_name_every_axis_and_need_some_trials(sweep: Sweep) -> None:
    found = Summary(sweep).importances()
    assert found is not None
    assert found.keys() == {"optim.lr", "variant"}
    for planned in sweep.planned()[2:]:
        (sweep.folder / planned.name / "trial.json").unlink(missing_ok=True)
    assert Summary(Sweep(sweep.path)).importances() is None


def test_the_tables_hold_the_same_figures(sweep: Sweep) -> None:
    summary = Summary(sweep)
    rows = list(csv.DictReader(io.StringIO(as_csv(summary))))
    assert [(row["optim.lr"], row["variant"], row["trials"]) for row in rows] == [
        ("0.001", "learned", "3"), ("0.001", "causal", "2"), ("0.003", "learned", "2"), ("0.003", "causal", "2"),
    ]  # fmt: skip
    for row, values in zip(rows, figures_of_cells(sweep, "leakage/gap"), strict=True):
        assert float(row["leakage/gap mean"]) == pytest.approx(np.mean(values))
        assert float(row["leakage/gap sd"]) == pytest.approx(np.std(values, ddof=1))
    assert rows[0]["leakage/gap difference"] == ""
    markdown = as_markdown(summary)
    first = figures_of_cells(sweep, "val/cross_entropy")[0]
    assert f"| 0.001 (baseline) | learned | 3 of 3 | {np.mean(first):.4g} ± " in markdown
    assert "## Difference from the baseline" in markdown
    latex = as_latex(summary)
    assert latex.count(r"\\") == 1 + 4
    assert f"${np.mean(first):.4g} \\pm " in latex
    assert r"DAG loss of G\_LM" in latex


def test_the_page_carries_the_content_and_shows_no_text_as_markup(sweep: Sweep) -> None:
    page = render_sweep(Summary(sweep))
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    content = json.loads(found[1])
    assert content["trials"][FAILED]["error"] == "error: <b>disk</b> full"
    assert "<b>disk" not in page
    assert "connect-src 'none'" in page


@pytest.mark.skipif(find_browser() is None, reason="needs a Chromium")
def test_a_browser_draws_every_part_in_any_theme_and_width(sweep: Sweep, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(render_sweep(Summary(sweep)))
    browser = find_browser()
    assert browser is not None
    with opened_tab(browser, tmp_path / "profile") as tab:
        for width, theme in ((1400, "light"), (420, "light"), (1400, "dark")):
            tab.size(width, 1000, theme)
            tab.open((tmp_path / "page.html").as_uri())
            assert tab.ask("document.documentElement.scrollWidth") <= width
            titles = tab.ask("[...document.querySelectorAll('h2')].map((each) => each.textContent)")
            assert titles == [
                "Cells", "Difference from the baseline", "Heatmap", "Effect of each axis", "Importance of the axes",
                "Two figures against each other", "Parallel coordinates", "Curves", "Trials",
            ]  # fmt: skip
        # The heatmap's numbers are the cells' means, also of another figure.
        means = [float(np.mean(values)) for values in figures_of_cells(sweep, "leakage/sequential_nll")]
        shown = "[...document.querySelectorAll('text.value')].map((each) => Number(each.textContent))"
        assert tab.ask(shown) == pytest.approx(means, rel=1e-3)
        tab.ask("""(() => {
          const select = [...document.querySelectorAll("select")][2];
          select.value = "val/cross_entropy";
          select.dispatchEvent(new Event("change"));
        })()""")
        means = [float(np.mean(values)) for values in figures_of_cells(sweep, "val/cross_entropy")]
        assert tab.ask(shown) == pytest.approx(means, rel=1e-3)
        # A head sorts the table, a row marks its cell in the curves.
        tab.click("section.block th:nth-child(2) button")
        table = "document.querySelectorAll('section.block table')[0]"
        rows = tab.ask(f"{table}.querySelectorAll('tbody tr').length")
        assert rows == 4
        first = tab.ask("document.querySelector('section.block tbody td:nth-child(2)').textContent")
        assert float(first.split()[0]) == pytest.approx(min(means), rel=1e-3)
        assert tab.ask("document.querySelectorAll('polyline.faint').length") == 0
        tab.click("section.block tbody tr td")
        assert tab.ask("document.querySelectorAll('polyline.faint').length") > 0
        assert tab.ask("document.querySelectorAll('td.error').length") == 1
        assert tab.complaints == []


def test_the_command_writes_page_and_tables(sweep: Sweep, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["sweep", "report", str(sweep.path)]) == 0
    said = capsys.readouterr().out
    assert "9 done, 1 failed, 1 pruned, 1 waiting" in said
    assert {path.name for path in sweep.folder.iterdir() if path.is_file()} >= {
        "report.html", "cells.csv", "cells.md", "cells.tex",
    }  # fmt: skip
    assert main(["sweep", "report", str(sweep.path)]) == 0  # again
    (sweep.folder / "report.html").write_text("mine")
    capsys.readouterr()
    assert main(["sweep", "report", str(sweep.path)]) == 2
    assert "exists and is not a report that this command wrote" in capsys.readouterr().err
    assert main(["sweep", "report", str(sweep.path), "--out", str(tmp_path / "no")]) == 2
    assert "no such folder" in capsys.readouterr().err
    (tmp_path / "empty.yaml").write_text(SPEC.format(folder=tmp_path / "none"))
    assert main(["sweep", "report", str(tmp_path / "empty.yaml")]) == 2
    assert "no trial has been run yet" in capsys.readouterr().err
