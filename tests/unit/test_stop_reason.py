"""What ends a training is kept in the run's folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pldr_train.errors import LeakageError, ReportedElsewhereError
from pldr_train.runs.folder import RunFolder
from pldr_train.runs.notes import keeping_stop_reason


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (LeakageError("step 4: it reads the future"), "step 4: it reads the future"),
        (OSError(28, "No space left on device"), "OSError: [Errno 28] No space left on device"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
        (ReportedElsewhereError("rank 1 has an error"), None),
    ],
)
def test_an_error_is_kept_by_the_process_that_has_it(error: BaseException, text: str | None, tmp_path: Path) -> None:
    path = tmp_path / "stopped.json"
    path.write_text("of the training before")

    def train() -> None:
        with keeping_stop_reason(RunFolder(tmp_path)):
            assert not path.exists()
            raise error

    with pytest.raises(type(error)):
        train()
    assert (json.loads(path.read_text())["text"] if path.exists() else None) == text


def test_a_training_that_ends_well_leaves_no_reason(tmp_path: Path) -> None:
    (tmp_path / "stopped.json").write_text("of the training before")
    with keeping_stop_reason(RunFolder(tmp_path)):
        pass
    assert list(tmp_path.iterdir()) == []
