"""`pldr-train report` as a user meets it: the file, its page in a real browser, the live page."""

from __future__ import annotations

import http.client
import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pldr_train.cli import main
from pldr_train.report.runs import open_runs
from pldr_train.report.serving import LiveReport, serve
from tests.browser import BROWSERS, find_browser, options
from tests.report_runs import matrices, write_snapshot

EVIL = "</script><script>document.title='pwned'</script><img src=x onerror=\"document.title='pwned'\">"


def write_run(folder: Path, steps: int = 400, scale: float = 1.0, layers: int = 3) -> Path:
    folder.mkdir(parents=True)
    with (folder / "metrics.jsonl").open("w") as handle:
        for step in range(1, steps + 1):
            values: dict[str, Any] = {"step": step, "train/loss": scale * (2 + 8 / step), "tokens": step * 512}
            values |= {
                "train/grad_norm": 3.0,
                "train/grad_norm_clipped": 1.0,
                "train/lr": 1e-3,
                "system/tokens_per_s": 1000.0,
            }
            values |= {f"deductive/layer_{layer}/rank": layer + 1 / step for layer in range(layers)}
            if step % 100 == 0:
                values["val/loss"] = scale * (2.1 + 8 / step)
            handle.write(json.dumps(values) + "\n")
    (folder / "recipe.yaml").write_text(
        f"run:\n  name: {folder.name}\noptim:\n  lr: {scale}\ntrainer:\n  max_steps: {steps}\n"
    )
    (folder / "environment.json").write_text(json.dumps({"python": "3.11", "packages": {"torch": "2.13.0"}}))
    (folder / "samples.jsonl").write_text(json.dumps({"step": steps, "prompt": "A", "text": f"A fox {EVIL}"}) + "\n")
    return folder


# --------------------------------------------------------------------------------------------------------- the command


def test_one_run_is_written_into_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "run")
    assert main(["report", str(folder)]) == 0
    assert f"report  {folder / 'report.html'}" in capsys.readouterr().out
    assert (folder / "report.html").read_text().startswith("<!DOCTYPE html>")


def test_of_several_what_is_no_run_is_said_and_the_rest_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    assert main(["report", "run", "empty", "nope"]) == 0
    said = capsys.readouterr()
    assert "left out: empty: an empty folder" in said.err
    assert "left out: nope: no such folder" in said.err
    page = Path("report.html").read_text()
    assert "empty: an empty folder" in page


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nope"], "nope: no such folder"),
        (["empty"], "empty: an empty folder"),
        (["file"], "file: a file"),
        (["runs"], "no run itself, but it holds 1; name runs/run, or all: runs/*"),
        (["runs/run", "--out", "empty"], "--out empty is a folder"),
        (["runs/run", "--out", "file/x.html"], "file/x.html"),
        (["runs/run", "--live", "--out", "x.html"], "does not go with --live"),
        (["runs/run", "--port", "80"], "goes with --live only"),
    ],
)
def test_when_nothing_can_be_shown_the_exit_code_is_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "runs" / "run", steps=3)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    assert main(["report", *arguments]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert "Traceback" not in said


def test_an_unfinished_run_without_metrics_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "recipe.yaml").write_text("trainer:\n  max_steps: 10\n")
    assert main(["report", str(tmp_path)]) == 0
    assert "there is no metrics.jsonl (yet)" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- in a real browser


@pytest.fixture(scope="module")
def browser() -> str:
    found = find_browser()
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    return found


def dump(browser: str, address: str, profile: Path, *more: str) -> str:
    """The page's elements after its scripts have run."""
    command = [browser, *options(profile), *more, "--dump-dom", address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def asked(browser: str, page: Path, profile: Path, script: str) -> Any:
    """What a script finds in the page; its policy, which would refuse the script, is taken off for it."""
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text())
    answer = (
        "const pre = document.createElement('pre'); pre.textContent = JSON.stringify(found); "
        "document.body.replaceChildren(pre);"
    )
    probe = page.with_name("probe.html")
    probe.write_text(
        text.replace("</body>", f"<script>(() => {{ const found = {{}}; {script}; {answer} }})()</script></body>")
    )
    shown = dump(browser, probe.as_uri(), profile)
    match = re.search(r"<pre>(.*)</pre>", shown, re.DOTALL)
    assert match is not None, shown[-2000:]
    return json.loads(match.group(1).replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    runs = [write_run(folder / "first"), write_run(folder / "second", scale=2.0, layers=0)]
    assert main(["report", *map(str, runs), str(folder / "nope"), "--out", str(folder / "report.html")]) == 0
    return folder / "report.html"


def test_the_page_draws_itself_under_its_own_policy(browser: str, two_runs: Path, tmp_path: Path) -> None:
    shown = dump(browser, two_runs.as_uri(), tmp_path)
    assert 'data-ready="true"' in shown
    assert "<title>first, second - pldr_train report</title>" in shown
    assert shown.count('class="plot"') == 5
    assert "Not shown: " in shown
    assert "2 of 3 keys differ between the runs" in shown
    assert "A</b> fox &lt;/script&gt;&lt;script&gt;" in shown
    assert "pwned'</script>" not in shown.partition('id="tables"')[2].partition('id="data"')[0]


def test_the_browser_refuses_a_script_that_is_not_the_pages_own(browser: str, two_runs: Path, tmp_path: Path) -> None:
    broken_into = tmp_path / "broken.html"
    attack = "<script>document.title = 'pwned'</script><img src=x onerror=\"document.title='pwned'\">"
    broken_into.write_text(two_runs.read_text().replace('<div id="problems">', f'{attack}<div id="problems">'))
    shown = dump(browser, broken_into.as_uri(), tmp_path / "profile")
    assert 'data-ready="true"' in shown
    assert "<title>pwned" not in shown


def test_curves_are_drawn_chosen_zoomed_and_read_out(browser: str, two_runs: Path, tmp_path: Path) -> None:
    script = """
      const charts = [...page.charts.values()], loss = charts[0], plot = loss.plot;
      const tip = document.getElementById("tip");
      for (const chart of charts) { chart.onScreen = true; chart.draw(); }
      const pixels = ({ base }) => base.getContext("2d").getImageData(0, 0, base.width, base.height).data;
      const inked = (chart) => pixels(chart).some((part) => part);
      found.titles = charts.map((chart) => chart.spec.title);
      found.inked = charts.map(inked);
      found.lines = loss.curves.map((curve) => curve.name);
      const box = plot.getBoundingClientRect();
      const at = (x) => ({ clientX: box.left + x, clientY: box.top + 50, button: 0, bubbles: true });
      plot.dispatchEvent(new PointerEvent("pointermove", at(200)));
      found.tip = tip.hidden ? "" : tip.textContent;
      plot.dispatchEvent(new PointerEvent("pointerdown", at(100)));
      plot.dispatchEvent(new PointerEvent("pointermove", at(200)));
      plot.dispatchEvent(new PointerEvent("pointerup", at(200)));
      found.zoom = page.view.zoom;
      const key = (key) => plot.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
      key("0");
      found.unzoomed = page.view.zoom;
      loss.draw();
      key("Home"); key("ArrowRight");
      found.said = document.getElementById("said").textContent;
      const tokens = [...document.getElementsByName("axis")].find((each) => each.value === "tokens");
      tokens.click();
      found.lastX = loss.curves[0].x.at(-1);
      found.between = page.axisOf(page.data.runs[0], [0.5, 10.5, 401]);
      [...document.getElementsByName("axis")].find((each) => each.value === "hours").click();
      found.hours = page.axisOf(page.data.runs[0], [10, 400]);
      tokens.click();
      document.querySelector("#runs input").click();
      found.left = [...new Set(loss.curves.map((curve) => curve.run.name))];
      found.shown = charts.filter((chart) => !chart.figure.hidden).map((chart) => chart.spec.title);
      const filter = document.getElementById("filter");
      filter.value = "lr, grad"; filter.dispatchEvent(new Event("input"));
      found.filtered = charts.filter((chart) => chart.figure.style.display !== "none").map((chart) => chart.spec.title);
      const smooth = document.getElementById("smooth");
      smooth.value = "0.9"; smooth.dispatchEvent(new Event("input"));
      found.smoothed = loss.curves[0].sy.every((y, n, all) => n === 0 || y <= all[n - 1]);
      document.getElementById("log").click();
      loss.draw();
      found.log = [loss.scale.bottom > 0, page.view.log];
      [...document.getElementsByName("theme")].find((each) => each.value === "dark").click();
      found.theme = document.documentElement.dataset.theme;
      const named = (each) => each.labels?.length || each.ariaLabel || each.textContent;
      found.unlabelled = [...document.querySelectorAll("input, button")].filter((each) => !named(each)).length;
      found.title = document.title;
      const panel = document.querySelector(".panel[aria-label='Values of all metrics']");
      panel.style.maxHeight = "60px"; panel.scrollTop = 40; panel.focus();
      document.querySelector("details.panel").open = true;
      document.getElementById("only-recipe").click();
      page.data = { ...page.data, live: true };
      page.show();
      found.focused = document.activeElement.getAttribute("aria-label");
      found.unfolded = document.querySelectorAll("details.panel[open]").length;
      found.all = document.querySelectorAll("#recipes tbody tr").length;
      found.chosen = page.chosen.size;
    """
    found = asked(browser, two_runs, tmp_path, script)
    titles = ["Loss", "deductive/rank", "Learning rate", "Gradient norm", "Throughput"]
    assert found["titles"] == titles
    assert found["inked"] == [True] * 5
    assert found["lines"] == ["first · train", "first · val", "second · train", "second · val"]
    assert re.match(r"step \d+first · train2\.\d+", found["tip"])
    assert found["zoom"][0] < found["zoom"][1]
    assert found["unzoomed"] is None
    assert found["said"].startswith("step 2: first · train 6")
    assert found["lastX"] == 400 * 512
    assert found["between"] == [256, 10.5 * 512, 401 * 512]
    assert found["hours"] == pytest.approx([10 * 512 / 1000 / 3600, 400 * 512 / 1000 / 3600], rel=1e-4)
    assert found["left"] == ["second"]
    assert found["shown"] == [title for title in titles if "deductive" not in title]
    assert found["filtered"] == ["Learning rate", "Gradient norm"]
    assert found["smoothed"] is True
    assert found["log"] == [True, True]
    assert found["theme"] == "dark"
    assert found["unlabelled"] == 0
    assert found["focused"] == "Values of all metrics"
    assert (found["unfolded"], found["all"], found["chosen"]) == (1, 3, 1)
    assert found["title"] == "first, second - pldr_train report"


# ------------------------------------------------------------------------------------------------------------ live page


class GrowingReport(LiveReport):
    """A report whose run takes a step before every request but the first."""

    def __init__(self, folder: Path) -> None:
        super().__init__(*open_runs([folder]))
        self.folder, self.requests = folder, 0

    def newest(self) -> tuple[str, dict[str, Any]]:
        if self.requests:
            with (self.folder / "metrics.jsonl").open("a") as handle:
                handle.write(json.dumps({"step": 400 + self.requests, "train/loss": 0.5, "new/metric": 1.0}) + "\n")
        self.requests += 1
        return super().newest()


@contextmanager
def served(report: LiveReport) -> Iterator[int]:
    server = serve(report.answers(), 0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def get(port: int, path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", path, headers={name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, dict(answer.getheaders()), body


def test_the_live_page_sends_data_only_when_there_is_news(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=5)
    with served(LiveReport(*open_runs([folder]))) as port:
        status, headers, body = get(port, "/")
        assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
        assert b"connect-src 'self'" in body
        status, headers, body = get(port, "/data.json")
        assert (status, json.loads(body)["runs"][0]["step"]) == (200, 5)
        tag = headers["ETag"]
        assert get(port, "/data.json", If_None_Match=tag)[0] == 304
        with (folder / "metrics.jsonl").open("a") as handle:
            handle.write('{"step": 6, "train/loss": 1.0}\n')
        status, _, body = get(port, "/data.json", If_None_Match=tag)
        assert (status, json.loads(body)["runs"][0]["step"]) == (200, 6)


def test_the_live_page_answers_only_those_who_ask_for_this_machine(tmp_path: Path) -> None:
    with served(LiveReport(*open_runs([write_run(tmp_path / "run", steps=5)]))) as port:
        assert get(port, "/data.json", Host="evil.example:80")[0] == 403
        assert get(port, "/../etc/passwd")[0] == 404
        assert get(port, "/data.json", Host=f"localhost:{port}")[0] == 200


def test_a_taken_port_is_said_and_without_a_named_one_another_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_run(tmp_path / "run", steps=5)
    with served(LiveReport(*open_runs([folder]))) as port:
        assert main(["report", str(folder), "--live", "--port", str(port)]) == 2
        assert f"--port {port}: " in capsys.readouterr().err


def test_ctrl_c_ends_the_live_page_with_0(tmp_path: Path) -> None:
    program = "import sys; from pldr_train.cli import main; sys.exit(main())"
    command = [
        sys.executable,
        "-c",
        program,
        "report",
        str(write_run(tmp_path / "run", steps=5)),
        "--live",
        "--port",
        "0",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    address = re.match(r"report  http://127\.0\.0\.1:(\d+)/", process.stdout.readline())
    assert address is not None
    assert get(int(address.group(1)), "/data.json")[0] == 200
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "stopped\n")


def test_an_open_live_page_takes_in_news(browser: str, tmp_path: Path) -> None:
    report = GrowingReport(write_run(tmp_path / "run", steps=400))
    with served(report) as port:
        shown = dump(browser, f"http://127.0.0.1:{port}/", tmp_path / "profile", "--virtual-time-budget=8000")
    assert report.requests >= 2
    assert re.search(r"<dd>40[1-9]<small>of 400</small></dd>", shown)
    assert "new/metric" in shown.partition('id="data"')[0]


def test_the_live_page_sends_snapshots_apart_and_only_when_there_is_a_new_one(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=5)
    tensors = {f"layer_0/{name}": values for name, values in matrices(2, 8, 1.0, seed=1).items()}
    write_snapshot(folder, 2, tensors)
    with served(LiveReport(*open_runs([folder]))) as port:
        status, headers, body = get(port, "/snapshots.json")
        assert (status, [each["step"] for each in json.loads(body)["run"]["steps"]]) == (200, [2])
        assert get(port, "/snapshots.json", If_None_Match=headers["ETag"])[0] == 304
        assert b"codes" not in get(port, "/data.json")[2]
        assert b"codes" in get(port, "/")[2]
        write_snapshot(folder, 4, tensors)
        assert json.loads(get(port, "/data.json")[2])["runs"][0]["snapshots"] == 2
        status, _, body = get(port, "/snapshots.json", If_None_Match=headers["ETag"])
        assert (status, [each["step"] for each in json.loads(body)["run"]["steps"]]) == (200, [2, 4])
