"""The report as a reader uses it in a real browser: health, the gap's interval, heatmaps, folded charts, samples."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pldr_train.cli import main
from pldr_train.metrics.catalog import all_metrics
from pldr_train.report.runs import open_runs
from pldr_train.report.serving import LiveReport
from tests.browser import BROWSERS, Tab, find_browser, opened_tab
from tests.cli.test_report_command import served
from tests.report_runs import SIGNED_AND_NOT, matrices, validation, write_metrics, write_snapshot, write_snapshots

CANVAS = "#heatmaps canvas.matrix"


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    browser = find_browser()
    if browser is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    with opened_tab(browser, tmp_path_factory.mktemp("profile")) as made:
        made.size(1400, 1000)
        yield made


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two runs: one reads the future, the other becomes near-critical."""
    folder = tmp_path_factory.mktemp("report")
    steps = range(0, 501, 100)
    leaking = folder / "leaking"
    write_metrics(leaking, *[validation(step, (step / 100, step / 200, step / 50)) for step in steps])
    critical = folder / "critical"
    write_metrics(critical, *[validation(step, collapse=1 - step / 500) for step in steps])
    write_snapshots(critical, steps)
    for run in (leaking, critical):
        (run / "recipe.yaml").write_text("trainer: {max_steps: 500}\nmonitor: {max_gap: 0.05}\n")
        (run / "environment.json").write_text("{}")
        samples = [
            {"step": step, "prompt": prompt, "text": f"{prompt} {run.name} {step}"}
            for step in (200, 0, 400)
            for prompt in ("The", "If a")
        ]
        (run / "samples.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in samples))
    assert main(["report", str(leaking), str(critical), "--out", str(folder / "report.html")]) == 0
    return folder / "report.html"


@pytest.fixture
def opened(tab: Tab, page: Path) -> Iterator[Tab]:
    tab.complaints.clear()
    tab.open(page.as_uri())
    yield tab
    assert tab.complaints == []


def texts(tab: Tab, selector: str) -> list[str]:
    found: list[str] = tab.ask(f"[...document.querySelectorAll({json.dumps(selector)})].map((each) => each.innerText)")
    return found


def pixels(tab: Tab, selector: str = CANVAS) -> str:
    found: str = tab.ask(f"document.querySelector({json.dumps(selector)}).toDataURL()")
    return found


def radio(name: str, value: str) -> str:
    return f"#heatmaps label:has(> input[name='heat-{name}'][value='{value}'])"


def choose(tab: Tab, selector: str, value: str) -> None:
    tab.ask(f"""(() => {{
      const box = document.querySelector({json.dumps(selector)});
      box.value = {json.dumps(value)};
      box.dispatchEvent(new Event("change"));
    }})()""")


# ------------------------------------------------------------------------------------------------------ health, leakage


def test_one_look_tells_whether_a_run_is_healthy(opened: Tab) -> None:
    leaking, critical = texts(opened, ".health")
    assert "in trouble" in leaking
    assert "reads the future: block 3, sequential 8 nat/token" in leaking
    assert "depends on the input" in leaking
    assert "healthy" in critical
    assert "no leakage" in critical
    assert "near-critical: hardly depends on the input" in critical
    in_sight = opened.ask("document.querySelectorAll('.health')[1].getBoundingClientRect().bottom < innerHeight")
    assert in_sight is True


def test_the_gaps_interval_is_a_band_in_its_curves_colour(opened: Tab) -> None:
    found = opened.ask("""(() => {
      const chart = [...page.charts.values()].find((each) => each.spec.title === "Leakage gap");
      chart.figure.scrollIntoView({ block: "center" });
      chart.onScreen = true;
      chart.draw();
      const ratio = devicePixelRatio;
      const at = (step, value) => [...chart.base.getContext("2d").getImageData(
        Math.round(chart.scale.toX(step) * ratio), Math.round(chart.scale.toY(value) * ratio), 1, 1).data];
      return { inside: at(350, 4.6), outside: at(350, 9.3), keys: chart.legend.innerText, lines: chart.curves.length };
    })()""")
    red, _, blue, alpha = found["inside"]
    assert 20 < alpha < 90
    assert blue > red
    assert found["outside"][3] == 0
    assert "95 % interval" in found["keys"]
    assert "lower end" not in found["keys"]
    assert found["lines"] == 6


def test_criticality_and_leakage_come_before_the_heatmaps_and_the_rest(opened: Tab) -> None:
    names = opened.ask("[...document.querySelectorAll('#charts .section')].map((each) => each.dataset.name)")
    assert names[:4] == ["Loss", "Leakage", "Criticality", "Heatmaps"]


def test_above_the_charts_stands_in_words_what_they_say_of_each_chosen_run(opened: Tab) -> None:
    words = texts(opened, ".words p")
    assert words[0].startswith("leaking: reads the future: block 3, sequential 8 nat/token; gap 5 [2.5, 10]")
    assert words[1].startswith("critical: no leakage; ")
    assert words[3].startswith("critical: near-critical: hardly depends on the input; row-map collapse of A 0")
    opened.click("#runs label:first-child input")
    assert all(each.startswith("critical: ") for each in texts(opened, ".words p"))


def test_samples_stand_by_prompt_in_the_order_of_their_steps(opened: Tab) -> None:
    assert texts(opened, ".prompt h3") == ["“The”", "“If a”"]
    rows = opened.ask("""[...document.querySelectorAll(".prompt:first-of-type tbody tr")].map((row) =>
      [...row.children].map((cell) => cell.innerText))""")
    assert rows == [[str(step), f"The leaking {step}", f"The critical {step}"] for step in (0, 200, 400)]


# ------------------------------------------------------------------------------------------------------------- heatmaps


def test_the_sliders_keys_change_the_heatmap(opened: Tab) -> None:
    opened.click(radio("scale", "all"))
    assert texts(opened, ".slide output") == ["500 (6 of 6)"]
    assert "The rows are alike: the map has collapsed." in texts(opened, ".collapse")[0]
    last = pixels(opened)
    opened.ask("document.getElementById('heat-step').focus()")
    opened.press("ArrowLeft")
    assert texts(opened, ".slide output") == ["400 (5 of 6)"]
    assert pixels(opened) != last
    opened.press("Home")
    assert texts(opened, ".slide output") == ["0 (1 of 6)"]
    assert "The rows differ." in texts(opened, ".collapse")[0]
    assert opened.ask("document.getElementById('heat-step').getAttribute('aria-valuetext')") == "step 0"
    opened.press("End")
    assert pixels(opened) == last


def test_tensor_layer_head_and_scale_change_the_heatmap(opened: Tab) -> None:
    opened.place("#heatmaps")
    seen = [pixels(opened)]
    for tensor in SIGNED_AND_NOT[1:]:
        opened.click(radio("tensor", tensor))
        seen.append(pixels(opened))
    choose(opened, "#heat-layer", "1")
    seen.append(pixels(opened))
    choose(opened, "#heat-head", "2")
    seen.append(pixels(opened))
    ends = texts(opened, "#heatmaps .ends")
    opened.click(radio("scale", "all"))
    assert texts(opened, "#heatmaps .ends") != ends
    seen.append(pixels(opened))
    assert len(set(seen)) == len(seen)
    assert opened.ask("document.querySelector('#heatmaps canvas.matrix').ariaLabel").startswith(
        "G_LM of critical, layer 1, head 2, step 500"
    )


def test_signed_tensors_are_coloured_around_0_and_a_positive_one_over_its_range(opened: Tab) -> None:
    opened.place("#heatmaps")
    low, middle, high = texts(opened, "#heatmaps .ends span")
    assert (middle, low) == ("0", f"-{high}")
    opened.click(radio("tensor", "A_LM"))
    low, middle, high = texts(opened, "#heatmaps .ends span")
    assert 0 < float(low) < float(middle) < float(high)


def test_less_the_mean_row_a_collapsed_map_has_one_colour(opened: Tab) -> None:
    opened.click(radio("values", "rows"))
    colours = """(() => {
      const canvas = document.querySelector("#heatmaps canvas.matrix");
      const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
      return new Set(new Uint32Array(data.buffer)).size;
    })()"""
    assert opened.ask(colours) == 1
    opened.ask("document.getElementById('heat-step').focus()")
    opened.press("Home")
    assert opened.ask(colours) > 20


def test_pointer_and_arrow_keys_read_values_out(opened: Tab, page: Path) -> None:
    opened.point(CANVAS, across=3.5 / 16, down=2.5 / 16)
    (said,) = texts(opened, "#heatmaps .reading")
    assert said.startswith("layer 0, head 0, row 2, column 3: ")
    values = matrices(3, 16, 0.0, seed=0)["A"]
    assert float(said.split(": ")[1].split(" ")[0]) == pytest.approx(float(values[0, 2, 3]), abs=0.05)
    opened.click(CANVAS, across=0.5 / 16, down=0.5 / 16)
    for key in ("ArrowRight", "ArrowDown", "ArrowDown", "ArrowUp"):
        opened.press(key)
    assert texts(opened, "#heatmaps .reading")[0].startswith("layer 0, head 0, row 1, column 1: ")


def test_all_heads_and_layers_are_a_grid_that_leads_to_one_matrix(opened: Tab) -> None:
    opened.click(radio("view", "all"))
    found = opened.ask("""(() => {
      const { tiles, rows, columns, edge, zoom } = page.heatmaps.panels[0].shown;
      const box = document.querySelector("#heatmaps canvas.matrix").getBoundingClientRect();
      const tile = tiles.find((each) => each.layer === 1 && each.head === 2);
      return { count: tiles.length, across: (edge.left + (tile.column * columns + 4.5) * zoom) / box.width,
        down: (edge.top + (tile.row * rows + 4.5) * zoom) / box.height };
    })()""")
    assert found["count"] == 6
    opened.point(CANVAS, found["across"], found["down"])
    assert texts(opened, "#heatmaps .reading")[0].startswith("layer 1, head 2, row 4, column 4: ")
    opened.click(CANVAS, found["across"], found["down"])
    chosen = opened.ask("page.heatmaps.panels[0].chosen")
    assert (chosen["view"], chosen["layer"], chosen["head"]) == ("one", 1, 2)
    assert opened.ask("document.getElementById('heat-head').value") == "2"


def test_play_runs_through_the_steps_and_stops_at_the_last(opened: Tab) -> None:
    opened.click(".slide button")
    assert "Pause" in texts(opened, ".slide button")[0]
    opened.ask("new Promise((done) => setTimeout(done, 3200))")
    assert texts(opened, ".slide output") == ["500 (6 of 6)"]
    assert "Play" in texts(opened, ".slide button")[0]


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [420, 1000, 1900])
def test_nothing_is_wider_than_the_window(opened: Tab, width: int, theme: str) -> None:
    try:
        opened.size(width, 900, theme)
        opened.settle()
        opened.place("#heatmaps")
        opened.click(radio("view", "all"))
        assert opened.ask("document.documentElement.scrollWidth <= innerWidth")
        assert opened.ask("document.documentElement.dataset.theme") == theme
    finally:
        opened.size(1400, 1000)


# ---------------------------------------------------------------------------------------------- many metrics, bad files


def test_very_many_charts_are_folded_up_and_drawn_when_unfolded_or_searched_for(tab: Tab, tmp_path: Path) -> None:
    names = [info.name for info in all_metrics(4) if info.name not in ("step", "data/batch_digest")]
    write_metrics(tmp_path, *[{"step": step} | dict.fromkeys(names, 1.0 + step) for step in range(1, 20)])
    assert main(["report", str(tmp_path)]) == 0
    tab.complaints.clear()
    tab.open((tmp_path / "report.html").as_uri())
    groups = "[...document.querySelectorAll('details.group')]"
    inked = (
        "[...document.querySelectorAll('.chart canvas:first-child')].filter((each) => each.width > 0 && each.dataset)"
    )
    assert tab.ask(f"{groups}.every((each) => !each.open)")
    drawn = "[...page.charts.values()].filter((chart) => chart.scale).length"
    at_first = tab.ask(drawn)
    assert 0 < at_first < tab.ask("page.charts.size") / 2
    assert tab.ask(f"{inked}.length") > 0
    tab.click("details.group[data-key='Deductive outputs|G_LM, the energy-curvature tensor'] summary")
    assert tab.ask(drawn) > at_first
    tab.ask("""(() => {
      const filter = document.getElementById("filter");
      filter.value = "A_P spectral";
      filter.dispatchEvent(new Event("input"));
    })()""")
    tab.settle()
    shown = tab.ask("""[...document.querySelectorAll(".chart")].filter((each) => each.checkVisibility()).map((each) =>
      each.querySelector("h3").innerText)""")
    assert shown == ["A_P: spectral norm"]
    tab.ask("""(() => {
      const filter = document.getElementById("filter");
      filter.value = "";
      filter.dispatchEvent(new Event("input"));
    })()""")
    assert tab.ask(f"{groups}.filter((each) => each.open).length") == 1
    assert tab.complaints == []


def test_bad_values_and_damaged_snapshots_leave_a_page_that_works(tab: Tab, tmp_path: Path) -> None:
    bad = [{**validation(100), "leakage/gap": None, "deductive/A/rank": "many"}, '{"step": 200, "train/loss": NaN', "{"]
    write_metrics(tmp_path, validation(50), *bad)
    heads = matrices(2, 8, 1.0, seed=1)
    write_snapshot(tmp_path, 50, {"layer_0/A": heads["A"], "layer_1/A": np.full((2, 8, 8), np.nan, np.float32)})
    partly: Any = heads["G_LM"].copy()
    partly[0, 0, 0] = np.inf
    write_snapshot(tmp_path, 100, {"layer_0/G_LM": partly})
    (tmp_path / "snapshots" / "step-00000150.safetensors").write_bytes(b"cut off")
    assert main(["report", str(tmp_path)]) == 0
    tab.complaints.clear()
    tab.open((tmp_path / "report.html").as_uri())
    assert "step-00000150.safetensors" in tab.ask("document.getElementById('cards').textContent")
    assert "undecided: the last gap is not finite" in texts(tab, ".health")[0]
    tab.place("#heatmaps")
    assert tab.ask("page.heatmaps.panels[0].chosen.tensor") == "G_LM"
    tab.point(CANVAS, 0.02, 0.02)
    assert "not finite" in texts(tab, "#heatmaps .reading")[0]
    tab.ask("document.getElementById('heat-step').focus()")
    tab.press("ArrowLeft")
    choose(tab, "#heat-layer", "1")
    tab.point(CANVAS, 0.5, 0.5)
    assert "not finite" in texts(tab, "#heatmaps .reading")[0]
    tab.click(radio("view", "all"))
    tab.click(radio("values", "rows"))
    assert tab.complaints == []


def test_of_several_runs_with_snapshots_one_is_chosen(tab: Tab, tmp_path: Path) -> None:
    for name, steps, heads in (("few", [10], 1), ("many", [0, 5, 20], 3)):
        write_metrics(tmp_path / name, validation(20))
        write_snapshots(tmp_path / name, steps, heads=heads)
    assert main(["report", str(tmp_path / "few"), str(tmp_path / "many"), "--out", str(tmp_path / "x.html")]) == 0
    tab.complaints.clear()
    tab.open((tmp_path / "x.html").as_uri())
    tab.place("#heatmaps")
    assert texts(tab, ".slide output") == ["10 (1 of 1)"]
    assert tab.ask("document.getElementById('heat-step').disabled") is True
    choose(tab, "#heat-run", "many")
    assert texts(tab, ".slide output") == ["20 (3 of 3)"]
    choose(tab, "#heat-head", "2")
    choose(tab, "#heat-run", "few")
    assert tab.ask("page.heatmaps.panels[0].chosen.head") == 0
    assert "of few, layer 0, head 0, step 10" in tab.ask("document.querySelector('#heatmaps canvas.matrix').ariaLabel")
    assert tab.complaints == []


def test_two_heatmaps_stand_side_by_side_in_the_same_colours(tab: Tab, tmp_path: Path) -> None:
    for name, steps in (("one", [0, 10]), ("two", [0, 5, 12])):
        write_metrics(tmp_path / name, validation(20))
        write_snapshots(tmp_path / name, steps, heads=2)
    assert main(["report", str(tmp_path / "one"), str(tmp_path / "two"), "--out", str(tmp_path / "x.html")]) == 0
    tab.complaints.clear()
    tab.open((tmp_path / "x.html").as_uri())
    tab.place("#heatmaps")
    alone = texts(tab, "#heatmaps .ends")
    tab.click("#heat-beside")
    labels = "[...document.querySelectorAll('#heatmaps canvas.matrix')].map((each) => each.ariaLabel.split('. ')[0])"
    assert tab.ask(labels) == ["A of one, layer 0, head 0, step 10", "A of two, layer 0, head 0, step 12"]
    tops = "[...document.querySelectorAll('#heatmaps .card')].map((each) => each.getBoundingClientRect().top)"
    first, second = tab.ask(tops)
    assert first == second
    # Each panel has controls of its own; the ends of the colours hold for both.
    choose(tab, "#heat2-head", "1")
    choose(tab, "#heat-run", "two")
    choose(tab, "#heat-run", "one")
    assert tab.ask(labels) == ["A of one, layer 0, head 0, step 10", "A of two, layer 0, head 1, step 12"]
    first_ends, second_ends = texts(tab, "#heatmaps .ends")
    assert first_ends == second_ends
    low, high = tab.ask("page.heatmaps.ends(page.heatmaps.panels[0])")
    singles = tab.ask(
        "(page.heatmaps.sameColors = false, page.heatmaps.panels.map((each) => page.heatmaps.ends(each)))"
    )
    assert (low, high) == (min(each[0] for each in singles), max(each[1] for each in singles))
    tab.ask("(page.heatmaps.sameColors = true, 0)")
    tab.click("#heat-same")
    first_ends, second_ends = texts(tab, "#heatmaps .ends")
    assert first_ends == alone[0]
    # A tensor without signs shares no colours with one with signs.
    tab.click("#heat-same")
    tab.click("#heatmaps label:has(> input[name='heat2-tensor'][value='A_LM'])")
    assert texts(tab, "#heatmaps .ends")[0] == alone[0]
    tab.size(390, 900, "light")
    first, second = tab.ask(tops)
    assert second > first
    assert tab.ask("document.documentElement.scrollWidth") <= 390
    tab.size(1400, 1000, "light")
    tab.click("#heat-beside")
    assert tab.ask("document.querySelectorAll('#heatmaps canvas.matrix').length") == 1
    assert tab.complaints == []


def test_an_open_live_page_takes_in_a_new_snapshot(tab: Tab, tmp_path: Path) -> None:
    write_metrics(tmp_path, validation(0))
    write_snapshots(tmp_path, [0, 100])
    with served(LiveReport(*open_runs([tmp_path]))) as port:
        tab.complaints.clear()
        tab.open(f"http://127.0.0.1:{port}/")
        tab.place("#heatmaps")
        choose(tab, "#heat-head", "1")
        assert texts(tab, ".slide output") == ["100 (2 of 2)"]
        write_snapshots(tmp_path, [0, 100, 200])
        tab.ask("new Promise((done) => setTimeout(done, 7000))")
        assert texts(tab, ".slide output") == ["200 (3 of 3)"]
        assert tab.ask("document.getElementById('heat-head').value") == "1"
        tab.open("about:blank")
    assert tab.complaints == []


# ------------------------------------------------------------------------------------------------------------- reading


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of ten runs with long names and everything that a run measures."""
    folder = tmp_path_factory.mktemp("many")
    names = [info.name for info in all_metrics(2) if not info.name.startswith(("data/", "step"))]
    for number in range(10):
        run = folder / f"a-run-with-quite-a-long-name-{number}"
        write_metrics(run, *[{"step": step} | dict.fromkeys(names, step + number / 10) for step in range(0, 500, 50)])
        (run / "recipe.yaml").write_text("trainer: {max_steps: 500}\n")
        (run / "environment.json").write_text("{}")
    assert main(["report", *map(str, sorted(folder.iterdir())), "--out", str(folder / "report.html")]) == 0
    return folder / "report.html"


def test_a_link_to_a_section_leads_to_its_beginning(tab: Tab, many: Path) -> None:
    for name in ("Optimisation", "System", "Values"):
        tab.open("about:blank")
        tab.open(many.as_uri())
        found = tab.ask(f"""(async () => {{
          const link = [...document.querySelectorAll("#contents a")].find((each) => each.innerText.includes("{name}"));
          const ended = new Promise((done) => addEventListener("scrollend", done, {{ once: true }}));
          link.click();
          await ended;
          const target = document.querySelector(link.getAttribute("href"));
          const left = document.documentElement.scrollHeight - innerHeight - scrollY;
          return [target.getBoundingClientRect().top, left <= 1];
        }})()""")
        top, at_the_end = found
        assert abs(top - 12) <= 1 or (at_the_end and 0 < top < 1000), (name, found)


def test_the_table_of_runs_is_the_legend_and_charts_name_their_lines_alone(tab: Tab, many: Path) -> None:
    tab.open(many.as_uri())
    found = tab.ask("""(() => {
      page.look(true);
      const style = (each) => [getComputedStyle(each).borderTopColor, getComputedStyle(each).borderTopStyle];
      const keys = (row) => [...document.querySelectorAll(row)].map((each) => style(each));
      const charts = [...page.charts.values()];
      return {
        table: keys("#ranking .dash"), cards: keys(".health header .dash"),
        legends: charts.map((chart) => chart.legend.innerText).join(" "),
        cut: charts.filter((chart) => chart.legend.scrollHeight > chart.legend.clientHeight + 1).length,
        dashes: charts.find((chart) => chart.spec.lines.length === 1).curves.map((curve) => curve.dash),
      };
    })()""")
    assert found["table"] == found["cards"]
    assert len({tuple(each) for each in found["table"]}) == 10
    assert found["dashes"] == [number % 4 for number in range(10)]
    assert "train" in found["legends"]
    assert "a-run-with" not in found["legends"]
    assert found["cut"] == 0


def test_of_several_runs_a_table_ranks_them_and_hides_one_in_all_charts(tab: Tab, tmp_path: Path) -> None:
    for name, loss in (("worse", 3.5), ("none", None), ("better", 2.5)):
        line = validation(100) | {"val/cross_entropy": loss, "tokens": 51_200}
        write_metrics(tmp_path / name, {key: value for key, value in line.items() if value is not None})
    runs = [str(tmp_path / name) for name in ("worse", "none", "better")]
    assert main(["report", *runs, "--out", str(tmp_path / "x.html")]) == 0
    tab.complaints.clear()
    tab.open((tmp_path / "x.html").as_uri())
    assert texts(tab, "#ranking button") == ["better", "worse", "none"]
    assert texts(tab, "#ranking thead th")[:5] == ["Run", "Steps", "Tokens", "Block loss", "Sequential NLL"]
    assert texts(tab, "#ranking tbody tr:first-child td")[:4] == ["100", "51.2k", "2.5", "3"]
    assert texts(tab, "#ranking tbody tr:last-child td")[2] == "not measured"
    shown = "[...new Set([...page.charts.values()].flatMap((chart) => chart.curves.map((each) => each.run.name)))]"
    assert tab.ask(shown) == ["worse", "none", "better"]
    tab.click("#ranking tbody tr:nth-child(2) button")
    assert tab.ask(shown) == ["none", "better"]
    assert tab.ask("document.querySelector('#runs input').checked") is False
    tab.size(390, 800)
    try:
        tab.settle()
        assert tab.ask("document.documentElement.scrollWidth <= innerWidth")
    finally:
        tab.size(1400, 1000)
    assert tab.complaints == []


def test_runs_that_differ_in_the_seed_alone_are_folded_into_mean_and_band(tab: Tab, tmp_path: Path) -> None:
    for name, seed, rate, losses in (("a-s1", 1, 0.1, (4, 2)), ("b", 1, 0.2, (9, 9)), ("a-s2", 2, 0.1, (6, 3))):
        write_metrics(tmp_path / name, *[{"step": 100 * n, "val/cross_entropy": loss} for n, loss in enumerate(losses)])
        recipe = f"run: {{name: {name}, seed: {seed}}}\noptim: {{lr: {rate}}}\n"
        (tmp_path / name / "recipe.yaml").write_text(recipe)
    runs = [str(tmp_path / name) for name in ("a-s1", "b", "a-s2")]
    assert main(["report", *runs, "--out", str(tmp_path / "x.html")]) == 0
    tab.complaints.clear()
    tab.open((tmp_path / "x.html").as_uri())
    tab.click("label:has(#fold)")
    values = """[...page.charts.values()].find((each) => each.spec.title === "Cross-entropy")
      .curves.map((each) => [each.name, each.line.role, each.y])"""
    mean = "a: mean of 2 seeds"
    assert tab.ask(values) == [
        [mean, None, [5, 2.5]],
        [f"{mean}, lowest", "low", [4, 2]],
        [f"{mean}, highest", "high", [6, 3]],
        ["b", None, [9, 9]],
    ]
    assert texts(tab, "#ranking tbody th") == [mean, "a-s1", "a-s2", "b"]
    assert texts(tab, "#ranking .fold td")[2] == "2.5 2 to 3"
    tab.click("#ranking button[data-run='a-s2']")
    assert [name for name, *_ in tab.ask(values)] == ["a-s1", "b"]
    assert tab.complaints == []


def test_on_a_phone_the_table_of_values_shows_numbers(tab: Tab, page: Path) -> None:
    tab.size(375, 800)
    try:
        tab.open(page.as_uri())
        shown = tab.ask("""(() => {
          document.documentElement.style.scrollBehavior = "auto";
          page.look(true);
          const cell = document.querySelector("#values td.number");
          cell.scrollIntoView({ block: "center", inline: "nearest" });
          document.querySelector("#values .panel").scrollLeft = 0;
          const box = cell.getBoundingClientRect();
          const at = document.elementFromPoint(box.left + box.width / 2, box.top + 8);
          return { inside: box.left >= 0 && box.right <= innerWidth, seen: cell.contains(at), text: cell.innerText };
        })()""")
    finally:
        tab.size(1400, 1000)
    assert shown["inside"] is True
    assert shown["seen"] is True
    assert any(letter.isdigit() for letter in shown["text"])
