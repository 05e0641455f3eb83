"""Versions of Python and of the packages, against the ranges that the project declares."""

from __future__ import annotations

import platform
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from pldr_train.doctor.finding import Finding

DISTRIBUTION = "pldr_train"
CHECKOUT = Path(__file__).parents[2]
_SHOWN = ("torch", "lightning", "transformers", "deepspeed", "datasets", "wandb")
_NCCL = ("nvidia-nccl-cu13", "nvidia-nccl-cu12", "nvidia-nccl-cu11")
_LOWER_BOUNDS = (">=", ">", "~=", "==", "===")


def installed_version(name: str) -> str | None:
    """Return the version of an installed distribution; None if it is not installed. Nothing is imported."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


@dataclass(frozen=True)
class Declared:
    """What the project asks for."""

    python: str
    """Range of Python's version; empty: any."""
    requirements: tuple[str, ...]


def read_declared(checkout: Path = CHECKOUT) -> Declared:
    """Return the ranges of the checkout's pyproject.toml, or those that the package was installed with.

    The file comes first: an editable install keeps the ranges of the day it was made.
    """
    try:
        project = tomllib.loads((checkout / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        if project["name"] == DISTRIBUTION:
            return Declared(project.get("requires-python", ""), tuple(project["dependencies"]))
    except FileNotFoundError:
        pass
    python = metadata.metadata(DISTRIBUTION).json.get("requires_python", "")
    return Declared(str(python), tuple(metadata.requires(DISTRIBUTION) or ()))


def check_python(wanted: str, version: str | None = None) -> Iterator[Finding]:
    """Python's version (None: this one's) against the range that is wanted."""
    version = version or platform.python_version()
    if SpecifierSet(wanted).contains(version, prereleases=True):
        yield Finding("ok", "python", f"{version} (needs {wanted or 'any'})", figures={"version": version})
    else:
        advice = f"make an environment of Python {wanted}"
        yield Finding("fail", "python", f"{version}, but {wanted} is needed", advice, {"version": version})


def check_packages(
    requirements: Sequence[str], version_of: Callable[[str], str | None] = installed_version
) -> Iterator[Finding]:
    """Yield what is missing or out of its range, and the versions of the packages that matter most.

    Missing or too old fails; newer than the range only warns, for it may work.

    Args:
        requirements: as in pyproject.
        version_of: a distribution's version, or None.
    """
    # A marker like `extra == "dev"` names what only developers need.
    wanted = [each for each in map(Requirement, requirements) if each.marker is None or each.marker.evaluate()]
    for requirement in wanted:
        yield from _problem(requirement, version_of(requirement.name))
    versions = {name: version_of(name) for name in _SHOWN}
    versions["nccl"] = next((version for name in _NCCL if (version := version_of(name))), None)
    shown = ", ".join(f"{name} {version or 'none'}" for name, version in versions.items())
    yield Finding("ok", "packages", shown, figures=versions)


def _problem(requirement: Requirement, version: str | None) -> Iterator[Finding]:
    install = f'pip install "{requirement.name}{requirement.specifier}"'
    if version is None:
        yield Finding("fail", "packages", f"{requirement.name} is not installed", install)
    elif not requirement.specifier.contains(version, prereleases=True):
        broken = [each for each in requirement.specifier if not each.contains(version, prereleases=True)]
        too_old = any(each.operator in _LOWER_BOUNDS for each in broken)
        text = f"{requirement.name} {version}, but {requirement.specifier} is {'needed' if too_old else 'tested'}"
        yield Finding("fail" if too_old else "warn", "packages", text, install)
