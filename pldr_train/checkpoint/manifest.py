"""A checkpoint's `manifest.json`: what it holds, and how a damaged one is distinguished from a whole one.

It has a checksum of its own: SHA-256 of its other entries as JSON with sorted keys. Manifests of earlier versions have
none, and are checked by their schema alone.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pldr_train.errors import CheckpointError
from pldr_train.runs.layout import MANIFEST_FILE, named_step
from pldr_train.runs.lines import LARGEST_STEP
from pldr_train.untrusted import parse_json, read_bytes

STATE_FILE = "state.pt"
FORMAT = 2
_CHECKSUM = "sha256"
_KEYS = {"format", "step", "files", "info"}
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MOST_BYTES = 2**28
_CHUNK_BYTES = 1 << 24


def manifest_text(step: int, files: Mapping[str, Any], info: Mapping[str, Any]) -> str:
    """Return the text of a manifest.

    Args:
        step: optimizer steps done.
        files: `bytes` and `sha256` of each file, by name.
        info: plain values.
    """
    manifest = {"format": FORMAT, "step": step, "files": dict(files), "info": dict(info)}
    return json.dumps(manifest | {_CHECKSUM: _checksum(manifest)}, indent=1)


def _checksum(manifest: Mapping[str, Any]) -> str:
    content = json.dumps({key: manifest[key] for key in _KEYS}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(content.encode()).hexdigest()


@dataclass(frozen=True)
class Defect:
    """Why a checkpoint cannot be used."""

    folder: Path
    reason: str


def read_manifest(folder: Path) -> dict[str, Any] | Defect:
    """Return a checkpoint's manifest, if it is whole and one of this version's."""
    try:
        manifest = _read(folder)
        _check(manifest)
    except _UnusableError as error:
        return Defect(folder, str(error))
    except OSError as error:
        return Defect(folder, f"{MANIFEST_FILE} cannot be read: {error.strerror}")
    named = named_step(folder.name)
    if named is not None and named != manifest["step"]:
        reason = f"its folder's name says step {named}, its {MANIFEST_FILE} {manifest['step']}"
        return Defect(folder, reason)
    return manifest


def describe_file(path: Path) -> dict[str, Any]:
    """`bytes` and `sha256` of a file, for the manifest."""
    with path.open("rb") as handle:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(handle, "sha256").hexdigest()}


def step_of(folder: Path) -> int:
    """Return the step in a checkpoint folder's name, or of one of another name (a copy) the step in its manifest.

    Raises:
        CheckpointError: it has another name, and its manifest is damaged.
    """
    named = named_step(folder.name)
    if named is not None:
        return named
    manifest = read_manifest(folder)
    if isinstance(manifest, Defect):
        raise CheckpointError(f"{folder}: {manifest.reason}; name another checkpoint")
    return int(manifest["step"])


def find_defect(folder: Path) -> Defect | None:
    """Check a checkpoint's manifest, sizes and checksums; `None` if it is whole."""
    manifest = read_manifest(folder)
    if isinstance(manifest, Defect):
        return manifest
    for name, expected in manifest["files"].items():
        reason = file_defect(folder / name, expected)
        if reason:
            return Defect(folder, reason)
    return None


def read_info(folder: Path) -> dict[str, Any]:
    """Return what `CheckpointWrite` was given as `info`.

    Raises:
        CheckpointError: the manifest is damaged.
    """
    manifest = read_manifest(folder)
    if isinstance(manifest, Defect):
        raise CheckpointError(f"{folder}: {manifest.reason}; name another checkpoint")
    info: dict[str, Any] = manifest["info"]
    return info


def file_defect(
    path: Path, expected: Mapping[str, Any], checksum: bool = True, advance: Callable[[int], None] = lambda _: None
) -> str | None:
    """Return what is wrong with a checkpoint's file; None if it is whole.

    Args:
        path: the file.
        expected: its `bytes` and `sha256`, from the manifest.
        checksum: also read it; otherwise only its size is looked at.
        advance: is called with the number of bytes read.
    """
    digest = hashlib.sha256()
    try:
        if not path.is_file():
            return f"{path.name} is missing"
        size = path.stat().st_size
        if size != expected["bytes"]:
            return f"{path.name} has {size:,} bytes instead of {expected['bytes']:,}"
        if not checksum:
            return None
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
                advance(len(chunk))
    except OSError as error:
        return f"{path.name} cannot be read: {error.strerror}"
    return None if digest.hexdigest() == expected["sha256"] else f"{path.name} does not match its checksum"


def damaged_text(shown: str, reason: str) -> str:
    """Return the message about a checkpoint that was named and is damaged."""
    return f"{shown}: the checkpoint is damaged: {reason}; name another one"


class _UnusableError(Exception):
    """Why a checkpoint cannot be used."""


def _read(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST_FILE
    if folder.is_symlink() and not folder.exists():
        raise _UnusableError(f"it is a link to {folder.readlink()}, which is not there; is its disk mounted?")
    try:
        content = read_bytes(path, _MOST_BYTES)
    except ValueError as error:
        raise _UnusableError(f"{MANIFEST_FILE} is damaged: it has {error}") from None
    try:
        manifest = parse_json(content)
    except ValueError:
        raise _UnusableError(f"{MANIFEST_FILE} is damaged: it is no JSON") from None
    if not isinstance(manifest, dict) or not manifest.keys() >= _KEYS:
        raise _UnusableError(f"{MANIFEST_FILE} is damaged: it lacks entries")
    return manifest


def _check(manifest: Mapping[str, Any]) -> None:
    if manifest["format"] != FORMAT:
        raise _UnusableError(f"its format is {manifest['format']}, this version reads {FORMAT}")
    if _CHECKSUM in manifest and manifest[_CHECKSUM] != _checksum(manifest):
        raise _UnusableError(f"{MANIFEST_FILE} is damaged: it does not match its checksum")
    step, files, info = manifest["step"], manifest["files"], manifest["info"]
    wrong = {
        "it has entries that do not belong there": not manifest.keys() <= {*_KEYS, _CHECKSUM},
        "its step is no step": not _is_count(step) or step >= LARGEST_STEP,
        "its info is no mapping": not isinstance(info, dict),
        "its list of files is none": not isinstance(files, dict)
        or not all(_is_entry(name, entry) for name, entry in files.items()),
    }
    reason = next((reason for reason, is_so in wrong.items() if is_so), None)
    if reason is not None:
        raise _UnusableError(f"{MANIFEST_FILE} is damaged: {reason}")
    if STATE_FILE not in files:
        raise _UnusableError(f"{MANIFEST_FILE} lists no {STATE_FILE}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_entry(name: str, entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and entry.keys() == {"bytes", "sha256"}
        and _is_count(entry["bytes"])
        and isinstance(entry["sha256"], str)
        and _SHA256.fullmatch(entry["sha256"]) is not None
        and Path(name).name == name
        and name != MANIFEST_FILE
    )
