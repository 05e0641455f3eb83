"""The wheel: what it holds, and that the quickstart runs from it without a checkout."""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from pldr_train import __version__
from tests.processes import ROOT
from tests.tiny import metric_lines

BUILD = "import setuptools.build_meta; print(setuptools.build_meta.build_wheel('dist'))"
TINY = (
    "trainer.max_steps=2", "optim.warmup_steps=1", "trainer.batch_size=2", "trainer.validation_rows=2",
    "model.num_hidden_layers=1", "model.num_attention_heads=2", "model.head_dim=8", "model.A_dff=8",
    "model.vocab_size=512", "data.context_length=16", "data.num_lanes=2", "data.num_workers=0", "monitor.rows=2",
    "monitor.prompts=1", "sample.max_new_tokens=2", "logging.wandb=disabled",
)  # fmt: skip


def run(*command: str | Path, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("source")
    for name in ("pldr_train", "recipes"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    (source / "data").mkdir()
    for name in ("data/tokenizer.yaml", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    return source / "dist" / run(sys.executable, "-c", BUILD, cwd=source).splitlines()[-1]


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of commands of an environment with the wheel and, from this environment, what it depends on."""
    environment = tmp_path_factory.mktemp("environment")
    venv.create(environment, symlinks=True)
    python = environment / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=environment)
    # Only now, or pip would take this environment's pldr_train for one to replace.
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "shared.pth").write_text("\n".join(site.getsitepackages()))
    return environment / "bin"


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_its_files_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(f"pldr_train-{__version__}.dist-info/METADATA").decode()
        quickstart = archive.read("pldr_train/recipes/quickstart.yaml")
    package = {path.relative_to(ROOT).as_posix() for path in (ROOT / "pldr_train").rglob("*.*") if path.is_file()}
    recipes = ROOT / "recipes"
    package |= {f"pldr_train/recipes/{path.relative_to(recipes).as_posix()}" for path in recipes.rglob("*.yaml")}
    package = {name for name in package if not name.endswith(".pyc")}
    assert {name for name in names if ".dist-info/" not in name} == package
    assert {"pldr_train/py.typed", "pldr_train/data/tokenizer.yaml", "pldr_train/report/page.html"} <= names
    assert quickstart == (ROOT / "recipes" / "quickstart.yaml").read_bytes()
    for name in ("tqdm", "packaging"):
        assert f"Requires-Dist: {name}>=" in metadata


@pytest.mark.slow
def test_the_quickstart_runs_from_the_wheel_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    where = run(installed / "python", "-c", "import pldr_train; print(pldr_train.__file__)", cwd=tmp_path)
    assert where.startswith(str(installed.parent))
    assert "fit        train what a recipe says" in run(installed / "pldr-train", "--help", cwd=tmp_path)
    assert run(installed / "pldr-train", "schema", cwd=tmp_path).startswith("{")
    said = run(installed / "pldr-train", "fit", "quickstart", *TINY, cwd=tmp_path)
    assert "report      runs/quickstart/report.html" in said
    assert [line["step"] for line in metric_lines(tmp_path / "runs" / "quickstart")][-1] == 2
    page = (tmp_path / "runs" / "quickstart" / "report.html").read_text()
    assert page.startswith("<!DOCTYPE html>")


def test_the_citation_is_of_this_version() -> None:
    citation = YAML(typ="safe").load(ROOT / "CITATION.cff")
    assert citation["version"] == __version__
    assert citation["references"][0]["url"] == "https://arxiv.org/abs/2410.16703"
