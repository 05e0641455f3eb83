"""`snapshots/`: the deductive outputs at validations, as small pictures that a page can hold.

A matrix becomes 8-bit codes of asinh((x - centre) / scale), which tell apart both the many values near the centre and
the rare ones far out that A_P and G_LM have. Code 255 is a value that is NaN or infinite.
"""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from pldr_train.metrics.layer_metrics import TENSORS
from pldr_train.runs.layout import SNAPSHOTS_FOLDER, named_step, snapshot_files
from pldr_train.runs.snapshots import parse_tensor_name, tensor_name

LARGEST_SIDE = 128
"""Rows and columns of a picture; larger matrices are averaged down."""
SMALLEST_SIDE = 8
_NOT_FINITE, _TOP_CODE = 255, 254
_ROBUST = (1.0, 99.0)
"""Percentiles that colour scales reach to."""
_MOST_NOTES = 5
_BASE64 = 4 / 3
_BYTES_OF_STATISTICS = 100
"""Of one matrix, about."""

Floats = NDArray[np.float32]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class _Header:
    """What a file holds, known without reading its tensors."""

    path: Path
    step: int
    stamp: tuple[int, int]
    shapes: Mapping[tuple[int, str], Shape]

    def bytes_in_page(self, factor: int) -> float:
        """Of its pictures, averaged down by `factor` beside what LARGEST_SIDE asks for."""
        total = 0.0
        for shape in self.shapes.values():
            rows, columns = (-(-side // (factor * _pooling(shape))) for side in shape[-2:])
            total += (rows * columns * _BASE64 + _BYTES_OF_STATISTICS) * shape[0]
        return total


@dataclass
class Snapshots:
    """The snapshots of one run.

    Args:
        folder: the run's `snapshots` folder; it need not exist.
    """

    folder: Path
    notes: list[str] = field(default_factory=list)
    """What is wrong with the files, a sentence each."""
    version: int = 0
    """Counts the changes of the files."""
    _headers: list[_Header] = field(default_factory=list)
    _stamps: Mapping[Path, tuple[int, int]] = field(default_factory=dict)
    _made: dict[tuple[Path, tuple[int, int], int], dict[str, Any]] = field(default_factory=dict)

    def read_on(self) -> bool:
        """Look at the files' headers; returns whether any file has changed."""
        stamps = {}
        for _, path in snapshot_files(self.folder.parent):
            with contextlib.suppress(OSError):  # thinned out this moment
                status = path.stat()
                stamps[path] = (status.st_mtime_ns, status.st_size)
        if stamps == self._stamps:
            return False
        self._stamps, self.notes, problems = stamps, [], []
        self.version += 1
        known = {(each.path, each.stamp): each for each in self._headers}
        headers = []
        for path, stamp in stamps.items():
            try:
                headers.append(known.get((path, stamp)) or _read_header(path, stamp))
            except (OSError, ValueError) as error:
                problems.append(f"{SNAPSHOTS_FOLDER}/{path.name}: {error}; left out")
        self._headers = sorted(headers, key=lambda each: each.step)
        self._note(problems)
        return True

    @property
    def count(self) -> int:
        """Of the files that can be shown."""
        return len(self._headers)

    def as_plain(self, most_bytes: float) -> dict[str, Any] | None:
        """Return what the page draws, in about `most_bytes`: `steps`, `of` how many there are, `factor` of the
        averaging down.

        Where not all fit, evenly spread ones are taken, the first and the last among them; where not even these two
        do, the matrices are averaged down further.
        """
        if not self._headers:
            return None
        factor = 1
        while _size(self._headers, [0, len(self._headers) - 1], factor) > most_bytes and factor < LARGEST_SIDE:
            factor *= 2
        chosen = [self._headers[place] for place in _fitting(self._headers, most_bytes, factor)]
        made, problems = {}, []
        for header in chosen:
            key = (header.path, header.stamp, factor)
            try:
                made[key] = self._made.get(key) or _read_pictures(header, factor)
            except (OSError, ValueError) as error:
                problems.append(f"{SNAPSHOTS_FOLDER}/{header.path.name}: {error}; left out")
        self._made = made
        self._note(problems)
        return {"steps": list(made.values()), "of": self.count, "factor": factor} if made else None

    def _note(self, problems: Sequence[str]) -> None:
        new = [problem for problem in problems if problem not in self.notes]
        self.notes += new[:_MOST_NOTES]
        if len(new) > _MOST_NOTES:
            self.notes.append(f"{SNAPSHOTS_FOLDER}: {len(new) - _MOST_NOTES:,} more files were left out")


def _pooling(shape: Shape) -> int:
    return -(-max(shape[-2:]) // LARGEST_SIDE)


def _size(headers: Sequence[_Header], places: Sequence[int], factor: int) -> float:
    return sum(headers[place].bytes_in_page(factor) for place in set(places))


def _fitting(headers: Sequence[_Header], most_bytes: float, factor: int) -> list[int]:
    """As many places as fit, by evenly spread steps."""
    steps = np.array([each.step for each in headers], dtype=np.float64)
    for count in range(len(headers), 2, -1):
        targets = np.linspace(steps[0], steps[-1], count)
        places = sorted({int(np.abs(steps - target).argmin()) for target in targets} | {0, len(headers) - 1})
        if _size(headers, places, factor) <= most_bytes:
            return places
    return sorted({0, len(headers) - 1})


def _read_header(path: Path, stamp: tuple[int, int]) -> _Header:
    step = named_step(path.stem)
    assert step is not None
    shapes: dict[tuple[int, str], Shape] = {}
    try:
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                parsed = parse_tensor_name(name)
                shape = tuple(file.get_slice(name).get_shape())
                if parsed is not None and len(shape) == 3 and min(shape) > 0:
                    shapes[parsed] = shape
    except SafetensorError as error:
        raise ValueError(f"no whole safetensors file ({error})") from None
    if not shapes:
        raise ValueError("holds no tensor (heads, d, d) named like layer_0/A")
    return _Header(path, step, stamp, dict(sorted(shapes.items())))


def _read_pictures(header: _Header, factor: int) -> dict[str, Any]:
    pictures: dict[str, dict[str, Any]] = {}
    try:
        with safe_open(header.path, framework="numpy") as file:
            for layer, tensor in header.shapes:
                values = np.asarray(file.get_tensor(tensor_name(layer, tensor))).astype(np.float32)
                pictures.setdefault(tensor, {})[str(layer)] = picture_of(values, factor)
    except (SafetensorError, TypeError) as error:
        raise ValueError(f"no whole safetensors file ({error})") from None
    return {"step": header.step, "tensors": {name: pictures[name] for name in TENSORS if name in pictures}}


def picture_of(values: Floats, factor: int = 1) -> dict[str, Any]:
    """Return one layer's matrices (H, rows, columns): `codes` in base64, and how to read them.

    `heads` has for each matrix: centre, scale, lowest and highest of the codes' asinh; lowest, highest, mean and the
    robust percentiles of the values as they were, the row-map collapse, and the number that is not finite.
    """
    _, rows, columns = values.shape
    statistics = [_statistics(each) for each in values]
    small = _averaged(values, max(1, factor * _pooling(values.shape)))
    coded = [_coded(each) for each in small]
    return {
        "rows": small.shape[1],
        "columns": small.shape[2],
        "of": [rows, columns],
        "codes": base64.b64encode(b"".join(codes.tobytes() for codes, _ in coded)).decode("ascii"),
        "heads": [[*reading, *found] for (_, reading), found in zip(coded, statistics, strict=True)],
    }


def _statistics(matrix: Floats) -> list[float | None]:
    finite = matrix[np.isfinite(matrix)].astype(np.float64)
    missing = matrix.size - finite.size
    if not finite.size:
        return [None, None, None, None, None, None, missing]
    low, high = np.percentile(finite, _ROBUST)
    collapse = None if missing else row_map_collapse(matrix)
    numbers = (float(finite.min()), float(finite.max()), float(finite.mean()), float(low), float(high), collapse)
    return [None if each is None else float(f"{each:.5g}") for each in numbers] + [missing]


def row_map_collapse(matrix: Floats) -> float:
    """Return the share of a matrix's variance that lies between its rows; 0 for a constant one."""
    exact = matrix.astype(np.float64)
    whole = float(((exact - exact.mean()) ** 2).mean())
    between = float(((exact - exact.mean(axis=0, keepdims=True)) ** 2).mean())
    return between / whole if whole > 0 else 0.0


def _coded(matrix: Floats) -> tuple[NDArray[np.uint8], list[float]]:
    exact = matrix.astype(np.float64)
    usable = np.isfinite(exact)
    codes = np.full(exact.shape, _NOT_FINITE, dtype=np.uint8)
    if not usable.any():
        return codes, [0.0, 1.0, 0.0, 0.0]
    finite = exact[usable]
    quarter, centre, three_quarters = (float(f"{each:.6g}") for each in np.percentile(finite, [25, 50, 75]))
    scale = float(f"{(three_quarters - quarter) or np.abs(finite - centre).max() or 1.0:.6g}")
    squeezed = np.arcsinh((finite - centre) / scale)
    low, high = float(f"{squeezed.min():.9g}"), float(f"{squeezed.max():.9g}")
    codes[usable] = np.clip(np.rint((squeezed - low) / ((high - low) or 1.0) * _TOP_CODE), 0, _TOP_CODE)
    return codes, [centre, scale, low, high]


def _averaged(values: Floats, factor: int) -> Floats:
    """Return the means of the finite values of squares of `factor` rows and columns."""
    if factor == 1:
        return values
    usable = np.isfinite(values)
    total, count = np.where(usable, values, 0).astype(np.float64), usable.astype(np.float64)
    for axis in (1, 2):
        starts = np.arange(0, values.shape[axis], factor)
        total, count = np.add.reduceat(total, starts, axis=axis), np.add.reduceat(count, starts, axis=axis)
    with np.errstate(invalid="ignore"):
        return (total / np.where(count == 0, np.nan, count)).astype(np.float32)
