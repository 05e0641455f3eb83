"""Damaged files in a run's folder, through the commands that read them: a message or a result, never a traceback."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pldr_train.cli import main

FILES = (
    "metrics.jsonl", "samples.jsonl", "environment.json", "nonfinite.json", "unreadable.json", "recipe.yaml",
    "tokenizer.model", "checkpoints/step-00000006/manifest.json", "checkpoints/step-00000006/state.pt",
    "checkpoints/step-00000006/weights-00000-of-00001.safetensors",
)  # fmt: skip
DAMAGE = {
    "NUL bytes": b"\0" * 100 + b"\n",
    "no text": b"\xff\xfe{",
    "other types": b'[{"step": {}, "rows": 3, "files": 1e999}]\n',
    "nested without end": b'{"files": ' + b"[" * 100_000 + b"\n",
    "a pipe": None,
}
MAY_BE_REFUSED = {"recipe.yaml", "tokenizer.model"}
"""Without them some commands can do nothing."""


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_ends_no_command_with_a_traceback(
    run_folder: Path, tmp_path: Path, name: str, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if (name, damage) == ("recipe.yaml", "a pipe"):
        pytest.skip("a recipe may be read from a pipe")
    path = run_folder / name
    path.unlink(missing_ok=True)
    content = DAMAGE[damage]
    if content is None:
        os.mkfifo(path)
    else:
        path.write_bytes(content)
    allowed = {0, 2} if name in MAY_BE_REFUSED else {0}
    assert main(["checkpoint", "list", str(run_folder)]) == 0
    assert main(["report", str(run_folder), "--out", str(tmp_path / "page.html")]) == 0
    assert main(["watch", str(run_folder), "--once"]) == 0
    assert main(["export", str(run_folder), str(tmp_path / "exported")]) in allowed
    verified = main(["checkpoint", "verify", str(run_folder)])
    assert verified == (1 if name.startswith("checkpoints/") else 0)
    assert "Traceback" not in capsys.readouterr().err
