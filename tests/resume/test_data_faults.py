"""Runs whose files fail on the way: what the user is told, what is saved, and what a resumed run trains on."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.processes import SERVER, run_cli
from tests.resume.test_kill_and_resume import assert_same_run, run_fit
from tests.tiny import damage_row_group, metric_lines, tiny_values


@pytest.fixture
def data(tiny_data: Path, tmp_path: Path) -> Path:
    """A copy of the tiny corpus, to be damaged."""
    shutil.copytree(tiny_data, tmp_path / "data")
    return tmp_path / "data"


def recipe(data: Path, tmp_path: Path, name: str, **changes: Any) -> Path:
    """A recipe that reads the documents in their order: row group 2 of part-0 is reached in the midst of the run."""
    data_changes = {"shuffle": False, **changes}
    path = tmp_path / f"{name}.json"  # JSON is YAML
    path.write_text(json.dumps(tiny_values(data, tmp_path / "runs", name, data=data_changes)))
    return path


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_damaged_row_group_stops_the_run_with_its_steps_saved_and_mended_it_goes_on_exactly(
    data: Path, tmp_path: Path, num_workers: int
) -> None:
    reference = run_cli("fit", recipe(data, tmp_path, "straight", num_workers=num_workers, num_lanes=8))
    assert reference.returncode == 0, reference.stderr
    file = data / "corpus" / "part-0.parquet"
    whole = file.read_bytes()
    damage_row_group(file, 2)
    broken = recipe(data, tmp_path, "broken", num_workers=num_workers)
    result = run_cli("fit", broken)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert f"{file}, row group 2: not a readable Parquet file" in result.stderr
    assert "data.on_bad_shard=skip" in result.stderr
    saved = int(result.stderr.split("saved after step ")[1].split(";")[0])
    assert 3 <= saved < 24
    assert (tmp_path / "runs" / "broken" / "checkpoints" / f"step-{saved:08d}" / "manifest.json").is_file()
    assert run_cli("fit", broken).returncode == 2  # nothing is lost by trying again
    file.write_bytes(whole)
    assert run_cli("fit", broken).returncode == 0
    assert_same_run(tmp_path / "runs" / "straight", tmp_path / "runs" / "broken")


@pytest.mark.parametrize("fault", ["damaged", "vanished"])
def test_what_is_skipped_is_said_counted_listed_and_stays_skipped_after_a_resume(
    data: Path, tmp_path: Path, fault: str
) -> None:
    file = data / "corpus" / "part-0.parquet"
    whole = file.read_bytes()
    damage_row_group(file, 2)
    straight = recipe(data, tmp_path, "straight", on_bad_shard="skip", num_workers=1)
    result = run_cli("fit", straight)
    assert result.returncode == 0, result.stderr
    assert "skipped documents [32, 48), part-0.parquet, row group 2: " in result.stdout
    run = tmp_path / "runs" / "straight"
    (listed,) = json.loads((run / "unreadable.json").read_text())
    assert (listed["start"], listed["stop"], listed["place"]) == (32, 48, "part-0.parquet, row group 2")
    assert metric_lines(run)[-1]["data/unreadable"] == 16
    assert metric_lines(run)[-1]["data/documents"] > 48

    # The same run, left once the part was skipped, with the file whole again (or gone altogether) before it goes on.
    broken = recipe(data, tmp_path, "broken", on_bad_shard="skip", num_workers=1)
    stopped = run_cli("fit", broken, "trainer.max_steps=18")
    assert stopped.returncode == 0, stopped.stderr
    stop_at(tmp_path / "runs" / "broken", tmp_path / "runs" / "straight", 15)
    if fault == "damaged":
        file.write_bytes(whole)
    else:
        file.unlink()
    result = run_cli("fit", broken)
    assert result.returncode == 0, result.stderr
    digests = {line["step"]: line["data/batch_digest"] for line in metric_lines(run) if line["step"]}
    again = {
        line["step"]: line["data/batch_digest"] for line in metric_lines(tmp_path / "runs" / "broken") if line["step"]
    }
    if fault == "damaged":
        assert again == digests
        assert json.loads((tmp_path / "runs" / "broken" / "unreadable.json").read_text()) == [listed]
    else:  # more is unreadable now, and listed
        listed_now = json.loads((tmp_path / "runs" / "broken" / "unreadable.json").read_text())
        assert listed in listed_now
        assert len(listed_now) > 1


def stop_at(run: Path, straight: Path, step: int) -> None:
    """Make a run end with the checkpoint of `step`, as if it had been killed after it."""
    for folder in (run / "checkpoints").glob("step-*"):
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)
    assert (run / "checkpoints" / f"step-{step:08d}").is_dir()


def test_a_changed_list_of_files_is_refused_by_name_before_anything_is_read(data: Path, tmp_path: Path) -> None:
    path = recipe(data, tmp_path, "run")
    assert run_cli("fit", path, "trainer.max_steps=6").returncode == 0
    kept = json.loads((tmp_path / "runs" / "run" / "data.json").read_text())
    assert [file["name"] for file in kept["files"]] == ["part-0.parquet", "part-1.parquet"]
    assert [file["row_groups"] for file in kept["files"]] == [[[16, 3], [12, 1]]] * 2
    corpus = data / "corpus"
    pq.write_table(pa.table({"content": ["new"]}), corpus / "part-00.parquet")
    whole = (corpus / "part-1.parquet").read_bytes()
    (corpus / "part-1.parquet").write_bytes(whole + b"tail")
    (corpus / "part-0.parquet").rename(corpus / "moved-away")
    result = run_cli("fit", path)
    assert result.returncode == 2
    assert "part-00.parquet is new; part-0.parquet is gone; part-1.parquet has" in result.stderr
    assert "Put them back" in result.stderr
    (corpus / "part-00.parquet").unlink()
    (corpus / "moved-away").rename(corpus / "part-0.parquet")
    (corpus / "part-1.parquet").write_bytes(whole)
    assert run_cli("fit", path).returncode == 0
    corpus.rename(data / "elsewhere")  # the same files at another place are the same documents
    result = run_cli("fit", path, f"data.path={data / 'elsewhere'}", "trainer.max_steps=30")
    assert result.returncode == 0, result.stderr
    assert metric_lines(tmp_path / "runs" / "run")[-1]["step"] == 30


def _fit_slowly(values: dict[str, Any], messages: str) -> None:
    """Train with a disk that takes its time."""
    from pldr_train.data.documents import LiveReader

    fast = LiveReader.open

    def slow(reader: LiveReader, ordinals: Any) -> Any:
        time.sleep(0.05)
        return fast(reader, ordinals)

    LiveReader.open = slow  # type: ignore[method-assign]
    run_fit(values, messages)


def test_a_starved_run_is_reported_once_what_helps(tiny_data: Path, tmp_path: Path) -> None:
    values = tiny_values(tiny_data, tmp_path, trainer={"max_steps": 10})
    child = SERVER.Process(target=_fit_slowly, args=(values, str(tmp_path / "messages")))
    child.start()
    child.join(120)
    assert child.exitcode == 0
    advice = [line for line in (tmp_path / "messages").read_text().splitlines() if "training waits for data" in line]
    assert len(advice) == 1
    assert "raise data.num_workers (now 0)" in advice[0]
    lines = [json.loads(line) for line in (tmp_path / "tiny" / "metrics.jsonl").read_text().splitlines()]
    assert max(line["system/data_wait_share"] for line in lines[2:]) > 0.1


@pytest.mark.parametrize("changes", [{"packing": "pad"}, {"document_mask": True}, {"min_document_tokens": 40}])
def test_other_ways_to_make_rows_train_validate_and_resume_exactly(
    data: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    straight = recipe(data, tmp_path, "straight", shuffle=True, **changes)
    assert run_cli("fit", straight).returncode == 0
    broken = recipe(data, tmp_path, "broken", shuffle=True, **changes)
    assert run_cli("fit", broken).returncode == 0
    stop_at(tmp_path / "runs" / "broken", tmp_path / "runs" / "straight", 20)
    assert run_cli("fit", broken).returncode == 0
    assert_same_run(tmp_path / "runs" / "straight", tmp_path / "runs" / "broken")
    last = metric_lines(tmp_path / "runs" / "straight")[-1]
    assert last["val/cross_entropy"] < 8
    if "min_document_tokens" in changes:
        assert 0 < last["data/too_short"] < last["data/documents"]
