"""One tiny trained run and its export, shared by the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from pldr_train.cli import main
from pldr_train.fit import fit
from pldr_train.models.exporting import export_run
from pldr_train.recipe import recipe_from_dict
from tests.tiny import tiny_values, write_corpus, write_tokenizer

PROMPT = "the metric tensor"


@dataclass(frozen=True)
class Trained:
    folder: Path
    run: Path
    export: Path


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("hub")
    write_tokenizer(folder / "tokenizer.model", write_corpus(folder / "corpus"))
    values = tiny_values(folder, folder / "runs", trainer={"max_steps": 12}, checkpoint={"every_steps": 6})
    outcome = fit(recipe_from_dict(values))
    export_run(outcome.folder, folder / "export")
    return Trained(folder, outcome.folder, folder / "export")


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command line here: words -> exit code, standard output, standard error."""

    def call(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(word) for word in words])
        return code, *capsys.readouterr()

    return call
