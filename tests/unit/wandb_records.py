"""Reads what an offline run of W&B has written, from its `.wandb` file: W&B's own records, as plain values."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2 as pb

_BLOCK, _HEADER, _IDENT = 32768, 7, b":W&B"


@dataclass
class Recorded:
    """One offline run."""

    folder: Path
    run: Any = None
    history: list[dict[str, Any]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    """What `define_metric` has defined, by its name or pattern."""
    artifacts: list[Any] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    exit_code: int | None = None

    @property
    def run_files(self) -> Path:
        return self.folder / "files"

    def column(self, name: str) -> list[tuple[int, Any]]:
        """(step, value) of every row that has it."""
        return [(row["_step"], row[name]) for row in self.history if name in row]


def only_record(run_folder: Path) -> Recorded:
    """The one offline run in a run's folder."""
    (found,) = records(run_folder)
    return found


def records(run_folder: Path) -> list[Recorded]:
    """All offline runs in a run's folder, the first written first."""
    return [read_record(folder) for folder in record_folders(run_folder)]


def record_folders(run_folder: Path) -> list[Path]:
    """Their folders, which begin with the second that they were begun in."""
    found = [*run_folder.glob("wandb/offline-run-*"), *run_folder.glob("wandb-*/wandb/offline-run-*")]
    return sorted(found, key=lambda each: each.name)


def read_record(folder: Path, finished: bool = True) -> Recorded:
    """One offline run; of one that was killed, `finished` being false, a half-written end is left out."""
    deadline = time.monotonic() + 30
    # W&B's own process writes the last of it shortly after the run was finished.
    while (found := _read(folder)).exit_code is None and finished:
        assert time.monotonic() < deadline, f"{folder} was not finished"
        time.sleep(0.02)
    return found


def _read(folder: Path) -> Recorded:
    (path,) = folder.glob("run-*.wandb")
    found = Recorded(folder)
    for content in _contents(path.read_bytes()):
        _take(pb.Record.FromString(content), found)
    return found


def _contents(data: bytes) -> Iterator[bytes]:
    if not data:
        return  # nothing was written yet
    assert data[: len(_IDENT)] == _IDENT
    offset, whole = _HEADER, b""
    while offset + _HEADER <= len(data):
        if _BLOCK - offset % _BLOCK < _HEADER:
            offset += _BLOCK - offset % _BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, offset)
        part = data[offset + _HEADER : offset + _HEADER + length]
        offset += _HEADER + length
        if kind == 0 or len(part) < length:
            return
        whole = part if kind in (1, 2) else whole + part
        if kind in (1, 4):
            yield whole


def _values(items: Any) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for item in items:
        name = item.key or "/".join(item.nested_key)
        values[name] = json.loads(item.value_json)
    return values


def _take(record: Any, found: Recorded) -> None:
    match record.WhichOneof("record_type"):
        case "run":
            found.run = record.run
            found.config |= _values(record.run.config.update)
        case "config":
            found.config |= _values(record.config.update)
        case "history":
            row = _values(record.history.item)
            row.setdefault("_step", record.history.step.num)
            found.history.append(row)
        case "summary":
            found.summary |= _values(record.summary.update)
        case "metric":
            found.metrics[record.metric.name or record.metric.glob_name] = record.metric
        case "artifact":
            found.artifacts.append(record.artifact)
        case "files":
            found.files += [each.path for each in record.files.files]
        case "exit":
            found.exit_code = record.exit.exit_code
