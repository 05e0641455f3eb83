"""A small run and its checkpoints for the tests of `pldr-train checkpoint`."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pldr_train.cli import main
from pldr_train.fit import fit
from pldr_train.recipe import recipe_from_dict
from tests.cli.checkpoint_case import Call, Result, values
from tests.tiny import write_corpus, write_tokenizer


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """Run `pldr-train checkpoint ARGUMENTS` in this process."""

    def run(*arguments: object) -> Result:
        capsys.readouterr()
        code = main(["checkpoint", *map(str, arguments)])
        return Result(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, its tokenizer, and in `runs` a run of one process with the checkpoints of steps 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("checkpoint")
    write_tokenizer(folder / "tokenizer.model", write_corpus(folder / "corpus"))
    fit(recipe_from_dict(values(folder, folder / "runs")))
    return folder


@pytest.fixture
def run_folder(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run, to be changed."""
    shutil.copytree(trained / "runs" / "tiny", tmp_path / "runs" / "tiny", symlinks=True)
    return tmp_path / "runs" / "tiny"


@pytest.fixture
def one(run_folder: Path) -> Path:
    """Its checkpoint of step 4."""
    return run_folder / "checkpoints" / "step-00000004"
