"""What commands write takes the place of nothing that they have not written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pldr_train.cli import main
from pldr_train.errors import DataError
from pldr_train.models.exporting import export_run
from pldr_train.outputs import check_output, is_json_with
from pldr_train.runs.layout import RUN_FILES

WORKSPACE = ("wandb", "workspace", "--out")
OUTPUTS: dict[str, Callable[[Path, str], list[str]]] = {
    "report": lambda run, out: ["report", str(run), "--out", out],
    "evaluate": lambda run, out: ["evaluate", str(run), "--json", out],
    "workspace": lambda run, out: [*WORKSPACE, out],
    "init": lambda run, out: ["init", str(run), "--overwrite", "--out", out],
    "extract-g": lambda run, out: ["extract-g", str(run), out, "--ids", "1", "--overwrite"],
    "import": lambda run, out: ["import", str(run / "checkpoints/last/state.pt"), out, "--overwrite"],
    "export": lambda run, out: ["export", str(run), out, "--overwrite"],
    "convert": lambda run, out: ["checkpoint", "convert", str(run), out, "--to", "weights", "--force"],
    "consolidate": lambda run, out: ["checkpoint", "consolidate", str(run), out, "--force"],
    "data": lambda run, out: ["data", "tokenize", str(run / "recipe.yaml"), "--output", out],
    "tokenizer": lambda run, out: ["tokenizer", "train", str(run / "recipe.yaml"), "--overwrite", "--output", out],
}


def tree(folder: Path) -> dict[str, bytes]:
    return {str(each.relative_to(folder)): each.read_bytes() for each in folder.rglob("*") if each.is_file()}


@pytest.mark.parametrize("command", OUTPUTS)
def test_no_output_takes_the_place_of_what_a_run_keeps(
    command: str, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tree(run_folder)
    for name in ("metrics.jsonl", "recipe.yaml", "tokenizer.model", "wandb.json", "checkpoints/new.safetensors"):
        assert main(OUTPUTS[command](run_folder, str(run_folder / name))) == 2
        assert capsys.readouterr().err.count("error:") == 1
    assert tree(run_folder) == before


@pytest.mark.parametrize("command", OUTPUTS)
def test_no_output_takes_the_place_of_another_file(
    command: str, run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, content in (("notes.txt", "mine"), ("mine.json", '{"mine": 1}'), ("mine.safetensors", "mine")):
        path = tmp_path / name
        path.write_text(content)
        assert main(OUTPUTS[command](run_folder, str(path))) == 2
        assert capsys.readouterr().err.count("error:") == 1
        assert path.read_text() == content


def test_what_a_command_wrote_is_replaced(run_folder: Path, tmp_path: Path) -> None:
    for command in ("report", "workspace", "extract-g", "convert"):
        out = tmp_path / ("x.html" if command == "report" else "x.json" if command == "workspace" else "x.safetensors")
        for _ in range(2):
            assert main(OUTPUTS[command](run_folder, str(out))) == 0
        out.unlink()
    (tmp_path / "empty.html").touch()
    assert main(OUTPUTS["report"](run_folder, str(tmp_path / "empty.html"))) == 0
    assert main(OUTPUTS["report"](run_folder, str(run_folder / "report.html"))) == 0


def test_an_exported_folder_with_foreign_code_or_weights_stays(run_folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "export"
    export_run(run_folder, target)
    export_run(run_folder, target, overwrite=True)
    for name in ("train.py", "lora.safetensors", "model-00001-of-00002.safetensors.bak"):
        (target / name).write_text("mine")
        with pytest.raises(DataError, match=f"holds {name} beside the model, so it is not replaced"):
            export_run(run_folder, target, overwrite=True)
        (target / name).unlink()
    project = tmp_path / "project"
    project.mkdir()
    for name, content in (("config.json", json.dumps({"model_type": "pldrllm"})), ("cache.py", "mine")):
        (project / name).write_text(content)
    with pytest.raises(DataError, match="not exported from here"):
        export_run(run_folder, project, overwrite=True)
    (target / "README.md").write_text("# My model\n")
    with pytest.raises(DataError, match="not exported from here"):
        export_run(run_folder, target, overwrite=True)
    shutil.rmtree(target)


def test_links_are_replaced_and_not_followed_into_a_run(run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "metrics").symlink_to(run_folder / "metrics.jsonl")
    with pytest.raises(DataError, match="is not a thing"):
        check_output(tmp_path / "metrics", "--out", is_json_with("a"), "a thing")
    (tmp_path / "run").symlink_to(run_folder)
    for name in RUN_FILES:
        with pytest.raises(DataError, match="belongs to the run in"):
            check_output(tmp_path / "run" / name, "--out", is_json_with("a"), "a thing")
    check_output(run_folder / "figures.json", "--out", is_json_with("a"), "a thing")
    (tmp_path / "thing.json").write_text('{"a": 1, "b": 2}')
    check_output(tmp_path / "thing.json", "--out", is_json_with("a"), "a thing")
