"""The list of a source's files: made once, kept with the run, compared when the run is resumed.

Documents are numbered through the files in the list's order. Rows are counted from the front, only up to the end of the
run's intervals: of a data set of thousands of files, only those in use are opened.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pldr_train.data.files import write_file_atomically
from pldr_train.errors import CheckpointError
from pldr_train.untrusted import parse_json, read_text

_FORMAT = 1
_MOST_BYTES = 2**30


class Place(NamedTuple):
    """The place of a document."""

    file: int
    group: int
    group_start: int
    """Number of the row group's first document."""
    group_stop: int
    """Number after the row group's last document."""


@dataclass(frozen=True)
class SourceFile:
    """One file of a source."""

    name: str
    """Relative to the source's folder or repository, with forward slashes."""
    size_bytes: int
    row_groups: tuple[tuple[int, int], ...] | None = None
    """Rows of the row groups in order, run-length coded as (rows, how many groups); `None`: not counted yet."""
    digest: str | None = None
    """SHA-256 of its content, if the repository lists it."""
    problem: str | None = None
    """Why the whole file is left out; it has no rows then."""

    @property
    def rows(self) -> int:
        """Number of documents. The file must be counted."""
        assert self.row_groups is not None, self.name
        return sum(rows * times for rows, times in self.row_groups)

    def group_stops(self) -> list[int]:
        """Return the number in the file after the last row of each row group, empty groups included."""
        assert self.row_groups is not None, self.name
        return [int(stop) for stop in np.cumsum([rows for rows, times in self.row_groups for _ in range(times)])]


def run_lengths(rows_of_groups: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """Return row counts of consecutive row groups as `SourceFile.row_groups` has them."""
    return tuple((rows, len(list(same))) for rows, same in groupby(rows_of_groups))


@dataclass(frozen=True)
class Manifest:
    """A source's files in order; the first `num_counted` of them are counted."""

    origin: dict[str, Any]
    """The source in plain types: kind, and path or repository, revision, config and split."""
    text_column: str
    files: tuple[SourceFile, ...]
    identity: dict[str, Any] = field(default_factory=dict)
    """The part of `origin` that must stay the same when the run is resumed: a commit, but not a path."""

    @cached_property
    def stops(self) -> list[int]:
        """Number after the last document of each counted file."""
        counted = self.files[: self.num_counted]
        return list(accumulate(file.rows for file in counted))

    @cached_property
    def num_counted(self) -> int:
        """Number of leading files whose rows are known."""
        return next((i for i, file in enumerate(self.files) if file.row_groups is None), len(self.files))

    @property
    def num_documents(self) -> int:
        """Number of documents of the counted files."""
        return self.stops[-1] if self.stops else 0

    def locate(self, ordinal: int) -> Place:
        """Return file and row group of a document of a counted file."""
        file = bisect_right(self.stops, ordinal)
        stops = self.files[file].group_stops()
        first = self.stops[file] - self.files[file].rows
        group = bisect_right(stops, ordinal - first)
        return Place(file, group, first + (stops[group - 1] if group else 0), first + stops[group])

    def fingerprint(self, start: int, stop: int) -> dict[str, Any]:
        """Return the text column and the files that hold the documents [start, stop), in plain types."""
        holding = []
        for file, file_stop in zip(self.files, self.stops, strict=False):
            if file.rows and file_stop > start and file_stop - file.rows < stop:
                holding.append({"name": file.name, "size_bytes": file.size_bytes, "rows": file.rows})
                if len(holding) == 1:
                    holding[0]["first_document"] = file_stop - file.rows
        return {"text_column": self.text_column, "files": holding, **self.identity}

    def to_json(self) -> str:
        """Return the list as text."""
        content = {"format": _FORMAT, "origin": self.origin, "identity": self.identity, "text_column": self.text_column}
        files = [{key: value for key, value in asdict(file).items() if value is not None} for file in self.files]
        lines = ",\n".join(json.dumps(file, ensure_ascii=False) for file in files)
        return json.dumps(content, ensure_ascii=False)[:-1] + f', "files": [\n{lines}\n]}}\n'

    @classmethod
    def from_json(cls, text: str, where: str) -> Manifest:
        """Read what `to_json` wrote; raises CheckpointError naming `where` for anything else."""
        try:
            content = parse_json(text)
            if content["format"] != _FORMAT:
                raise CheckpointError(f"{where}: its format is {content['format']}, this version reads {_FORMAT}")
            files = []
            for values in content["files"]:
                groups = values.pop("row_groups", None)
                coded = None if groups is None else tuple((int(rows), int(times)) for rows, times in groups)
                files.append(SourceFile(**values, row_groups=coded))
            return cls(dict(content["origin"]), str(content["text_column"]), tuple(files), dict(content["identity"]))
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(
                f"{where}: not a list of a source's files ({error}); restore it or remove it"
            ) from error

    def save(self, path: Path) -> None:
        """Write the list to a file, whole or not at all."""
        write_file_atomically(path, self.to_json().encode())

    @classmethod
    def load(cls, path: Path) -> Manifest:
        """Read a file that `save` wrote; raises CheckpointError."""
        try:
            text = read_text(path, _MOST_BYTES)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        return cls.from_json(text, str(path))
