"""A run of six steps with the checkpoints of 2, 4 and 6."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pldr_train.fit import fit
from pldr_train.recipe import recipe_from_dict
from tests.tiny import tiny_values


@pytest.fixture(scope="session")
def six_steps(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run; it is not to be changed."""
    checkpoint = {"every_steps": 2, "keep_last": 3}
    runs = tmp_path_factory.mktemp("six")
    values = tiny_values(tiny_data, runs, trainer={"max_steps": 6}, checkpoint=checkpoint)
    fit(recipe_from_dict(values))
    (runs / "tiny" / "recipe.json").write_text(json.dumps(values))
    return runs / "tiny"


@pytest.fixture
def run(six_steps: Path, tmp_path: Path) -> Path:
    """A copy, to be changed."""
    shutil.copytree(six_steps, tmp_path / "tiny", symlinks=True)
    return tmp_path / "tiny"
