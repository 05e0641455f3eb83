"""What a fresh clone relies on: pinned dependencies, runnable scripts."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[2]


def test_every_direct_dependency_is_pinned_within_its_range_and_nothing_else_is() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [text for group in project.get("optional-dependencies", {}).values() for text in group]
    direct = {each.name: each for each in map(Requirement, [*project["dependencies"], *extras])}
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {each.name: each for each in map(Requirement, (line for line in lines if line and line[0] != "#"))}
    assert pins.keys() == direct.keys()
    for name, pin in pins.items():
        (exact,) = pin.specifier
        assert exact.operator == "=="
        assert Version(exact.version) in direct[name].specifier, name


@pytest.mark.parametrize("script", ["launch/test", "launch/quickstart", ".ci/run"])
def test_scripts_are_executable_bash_that_stops_at_errors(script: str) -> None:
    path = ROOT / script
    assert os.access(path, os.X_OK)
    text = path.read_text()
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in text
    for each in (path, ROOT / "launch/_setup.sh"):
        subprocess.run(["bash", "-n", str(each)], check=True)


def test_the_licence_is_apache_2() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_the_architecture_names_what_there_is() -> None:
    package = ROOT / "pldr_train"
    text = (ROOT / "docs" / "architecture.md").read_text()
    named = re.findall(r"`([\w/]+\.py)`\s+`([\w.]+)`", text)
    assert len(named) > 25
    for file, name in named:
        body = ast.parse((package / file).read_text()).body
        for part in name.split("."):
            found = [node for node in body if part in _names_of(node)]
            assert found, f"{file} has no {name}"
            body = getattr(found[0], "body", [])


def _names_of(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {target.id for target in targets if isinstance(target, ast.Name)}
