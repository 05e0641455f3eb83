"""Snapshots: the deductive outputs of one row at a validation, for heatmaps; plain safetensors beside the metrics.

snapshots/step-00000400.safetensors holds `layer_0/A`, `layer_0/A_LM`, ..., each (H, d, d) in fp32.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from pldr_train.data.files import write_file_atomically
from pldr_train.errors import DataError
from pldr_train.metrics.layer_metrics import TENSORS
from pldr_train.runs.layout import SNAPSHOTS_FOLDER, snapshot_file, snapshot_files

Matrices = NDArray[np.float32]
"""(H, d, d): a deductive output of a layer, for each head."""

_NAME = re.compile(rf"layer_(\d{{1,4}})/({'|'.join(TENSORS)})")


def tensor_name(layer: int, tensor: str) -> str:
    """Return the name of a layer's tensor ("A", "A_LM", "A_P" or "G_LM") in a file."""
    return f"layer_{layer}/{tensor}"


def parse_tensor_name(name: str) -> tuple[int, str] | None:
    """Return the layer and the tensor of a name in a file; None for any other name."""
    match = _NAME.fullmatch(name)
    return None if match is None else (int(match[1]), match[2])


def read_snapshot(path: Path) -> dict[str, dict[int, Matrices]]:
    """Return the matrices of a snapshot: tensor -> layer -> (H, d, d).

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged.
    """
    found: dict[str, dict[int, Matrices]] = {}
    try:
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118, it is no mapping
                parsed = parse_tensor_name(name)
                if parsed is not None:
                    found.setdefault(parsed[1], {})[parsed[0]] = file.get_tensor(name)
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    return found


def write_snapshot(run: Path, step: int, tensors: Mapping[str, Any], keep: int) -> None:
    """Write a snapshot whole or not at all, and thin the older ones out to at most `keep`.

    Args:
        run: the run's folder.
        step: of the validation.
        tensors: `tensor_name` -> (H, d, d) in fp32, as an array or a tensor on the CPU.
        keep: number of snapshots to keep.

    Raises:
        DataError: the disk is full or the folder cannot be written.
    """
    folder = run / SNAPSHOTS_FOLDER
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot make the folder {folder}: {error.strerror}; move away what is there") from error
    content = save(
        {name: np.asarray(each) for name, each in tensors.items()}, metadata={"format": "1", "step": str(step)}
    )
    write_file_atomically(snapshot_file(run, step), content, fix="free some space")
    for path in _surplus(snapshot_files(run), keep):
        with contextlib.suppress(OSError):  # one too many does no harm
            path.unlink()


def cut_snapshots(run: Path, last_step: int) -> None:
    """Remove the snapshots after `last_step`; a resumed run writes them anew."""
    for step, path in snapshot_files(run):
        if step > last_step:
            path.unlink(missing_ok=True)


def _surplus(snapshots: Sequence[tuple[int, Path]], keep: int) -> list[Path]:
    """Return those to remove: while there are too many, the one whose neighbours are closest, never the first or the
    last.

    Where only one is kept, it is the last.
    """
    left = list(snapshots)
    if keep < 2:
        return [path for _, path in left[:-1]]
    removed = []
    while len(left) > keep:
        gaps = [left[place + 1][0] - left[place - 1][0] for place in range(1, len(left) - 1)]
        removed.append(left.pop(1 + gaps.index(min(gaps)))[1])
    return removed
