"""Snapshots: the deductive outputs of one row at a validation, for heatmaps; plain safetensors beside the metrics.

snapshots/step-00000400.safetensors holds `layer_0/A`, `layer_0/A_LM`, ..., each (H, d, d) in fp32.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from pldr_train.data.files import write_file_atomically
from pldr_train.errors import DataError
from pldr_train.metrics.deductive import DeductiveLike
from pldr_train.metrics.layer_metrics import TENSORS
from pldr_train.run_layout import SNAPSHOTS_FOLDER

_NAME = re.compile(r"step-(\d{8,})\.safetensors")


def snapshot_tensors(layers: Sequence[DeductiveLike]) -> dict[str, Tensor]:
    """What a snapshot keeps of the deductive outputs of a batch: those of its first sample, the last chunk's."""
    found = {}
    for index, layer in enumerate(layers):
        for name, attribute in TENSORS.items():
            tensor: Tensor | None = getattr(layer, attribute)
            if tensor is not None:
                matrices = tensor[0].reshape(-1, *tensor.shape[-3:])[-1]
                found[f"layer_{index}/{name}"] = matrices.detach().float().cpu().contiguous()
    return found


def write_snapshot(run: Path, step: int, tensors: Mapping[str, Tensor], keep: int) -> None:
    """Write a snapshot whole or not at all, and thin the older ones out to at most `keep`.

    Raises:
        DataError: the disk is full or the folder cannot be written.
    """
    folder = run / SNAPSHOTS_FOLDER
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot make the folder {folder}: {error.strerror}; move away what is there") from error
    content = save(dict(tensors), metadata={"format": "1", "step": str(step)})
    write_file_atomically(folder / f"step-{step:08d}.safetensors", content, fix="free some space")
    for path in _surplus(_snapshots(folder), keep):
        with contextlib.suppress(OSError):  # one too many does no harm
            path.unlink()


def cut_snapshots(run: Path, last_step: int) -> None:
    """Remove the snapshots after `last_step`; a resumed run writes them anew."""
    for step, path in _snapshots(run / SNAPSHOTS_FOLDER):
        if step > last_step:
            path.unlink(missing_ok=True)


def _snapshots(folder: Path) -> list[tuple[int, Path]]:
    found = ((_NAME.fullmatch(path.name), path) for path in folder.glob("step-*"))
    return sorted((int(match[1]), path) for match, path in found if match is not None)


def _surplus(snapshots: Sequence[tuple[int, Path]], keep: int) -> list[Path]:
    """Those to remove: while there are too many, the one whose neighbours are closest, never the first or the last.

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
