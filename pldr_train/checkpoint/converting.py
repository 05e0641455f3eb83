"""A checkpoint in other forms: of one process, weights alone, torch's, DeepSpeed's universal layout.

One tensor at a time is in memory, whatever the checkpoint's size.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pldr_train import __version__
from pldr_train.checkpoint.manifest import STATE_FILE, describe_file, manifest_text
from pldr_train.checkpoint.places import FILE_NAMES
from pldr_train.checkpoint.shards import OPTIMIZER, WEIGHTS, Piece, ShardReader, file_name, write_pieces
from pldr_train.checkpoint.state import STATE_KEY, save_state
from pldr_train.checkpoint.universal_layout import LATEST_FILE, write_universal
from pldr_train.checkpoint.verifying import Advance, Checkpoint
from pldr_train.checkpoint.whole_target import check_target, whole_target
from pldr_train.errors import CheckpointError
from pldr_train.outputs import begins_with, is_safetensors
from pldr_train.recipe import dump_recipe
from pldr_train.runs.folder import write_atomically
from pldr_train.runs.layout import MANIFEST_FILE

_ALIGNMENT = 64
_ZIP = b"PK\x03\x04"
"""What torch.save writes."""
_SLACK_BYTES = 1 << 20
"""For headers and small files."""


def check_consolidated_target(target: Path, source: Path, replace: bool) -> None:
    """See `check_target`; what may be replaced is a checkpoint."""
    names = [path.name for path in target.iterdir()] if target.is_dir() else [""]
    is_ours = all(FILE_NAMES.fullmatch(name) for name in names) and (MANIFEST_FILE in names or not names)
    check_target(target, source, replace, is_ours and not target.is_symlink(), "a checkpoint")


def check_converted_target(target: Path, source: Path, form: str, replace: bool) -> None:
    """See `check_target`; what may be replaced is a file, or for `universal` such a folder."""
    if form == "universal":
        names = [path.name for path in target.iterdir()] if target.is_dir() else [""]
        is_ours = all(name == LATEST_FILE or name.endswith("_universal") for name in names)
        check_target(target, source, replace, is_ours and not target.is_symlink(), "a universal checkpoint")
    else:
        is_form = is_safetensors if form == "weights" else begins_with(_ZIP)
        is_ours = target.is_file() and not target.is_symlink() and is_form(target)
        check_target(target, source, replace, is_ours, f"a file that `convert --to {form}` writes")


def bytes_to_write(checkpoint: Checkpoint, form: str | None = None) -> int:
    """About how much a form (None: consolidated) takes on the disk while it is written."""
    if form == "weights":
        return checkpoint.num_bytes(WEIGHTS) + _SLACK_BYTES
    files: int = sum(entry["bytes"] for entry in checkpoint.manifest["files"].values())
    return (2 if form == "torch" else 1) * files + _SLACK_BYTES


def consolidate(checkpoint: Checkpoint, target: Path, replace: bool, advance: Advance = lambda _: None) -> None:
    """Write a checkpoint as one process would have written it; the state file is copied as it is.

    Args:
        checkpoint: to be written.
        target: its new folder; written whole or not at all.
        replace: take the place of a checkpoint that is there.
        advance: is called with the number of bytes written.

    Raises:
        CheckpointError: it cannot be written.
    """
    with whole_target(target, bytes_to_write(checkpoint), replace) as folder:
        folder.mkdir()
        try:
            shutil.copyfile(checkpoint.folder / STATE_FILE, folder / STATE_FILE)
        except FileNotFoundError as error:
            raise CheckpointError(f"{checkpoint.folder} was removed meanwhile by its run; name a newer one") from error
        written = {STATE_FILE: describe_file(folder / STATE_FILE)}
        for kind in (WEIGHTS, OPTIMIZER):
            name = file_name(kind, 0, 1)
            written[name] = write_pieces(folder / name, whole_pieces(checkpoint, kind, advance))
        manifest = manifest_text(checkpoint.step, dict(sorted(written.items())), checkpoint.manifest["info"])
        write_atomically(folder / MANIFEST_FILE, manifest)


def convert(checkpoint: Checkpoint, target: Path, form: str, replace: bool, advance: Advance = lambda _: None) -> None:
    """Write a checkpoint in another form.

    Args:
        checkpoint: to be written.
        target: a file, for `universal` a folder; written whole or not at all.
        form: weights, torch or universal.
        replace: take the place of what is there.
        advance: is called with the number of bytes written.

    Raises:
        CheckpointError: it cannot be written.
    """
    write: dict[str, Callable[[Path], None]] = {
        "weights": lambda new: _write_weights(checkpoint, new, advance),
        "torch": lambda new: _write_torch(checkpoint, new, advance),
        "universal": lambda new: write_universal(checkpoint, new, advance),
    }
    with whole_target(target, bytes_to_write(checkpoint, form), replace) as new:
        write[form](new)


def whole_pieces(checkpoint: Checkpoint, kind: str, advance: Advance) -> list[Piece]:
    """The tensors of a kind, WEIGHTS or OPTIMIZER, each whole and read when it is written."""
    reader, tensors = checkpoint.reader(kind), checkpoint.tensors.on_disk(kind)
    return [_piece(reader, name, shape, advance) for name, shape in tensors.items()]


def _piece(reader: ShardReader, name: str, shape: tuple[int, ...], advance: Advance) -> Piece:
    dtype = reader.read(name, 0, 0).dtype

    def read() -> Tensor:
        advance(prod(shape) * dtype.itemsize)
        return reader.read(name)

    return Piece(name, shape, 0, prod(shape), dtype, read)


def _write_weights(checkpoint: Checkpoint, path: Path, advance: Advance) -> None:
    metadata = {
        "format": "pt",
        "step": str(checkpoint.step),
        "recipe": dump_recipe(checkpoint.recipe),
        "written_by": f"pldr_train {__version__}",
    }
    write_pieces(path, whole_pieces(checkpoint, WEIGHTS, advance), metadata)


def _write_torch(checkpoint: Checkpoint, path: Path, advance: Advance) -> None:
    """torch.save wants all tensors at once: they are laid out in a file first, and mapped into memory from there."""
    tensors = checkpoint.tensors
    pages = path.with_name("mapped")
    pieces = [piece for kind in (WEIGHTS, OPTIMIZER) for piece in whole_pieces(checkpoint, kind, advance)]
    mapped = {piece.name: tensor for piece, tensor in zip(pieces, _map(pages, pieces), strict=True)}
    moments = {moment: {name: mapped[f"{moment}/{name}"] for name in tensors.parameters} for moment in tensors.moments}
    content = {
        "model": {name: mapped[name] for name in tensors.on_disk(WEIGHTS)},
        "optimizer": {**moments, "step": int(checkpoint.state()[STATE_KEY]["optimizer_step"])},
    }
    save_state(path, content, sync=False)
    pages.unlink()


def _map(path: Path, pieces: Sequence[Piece]) -> Iterator[Tensor]:
    """Write the pieces into a file and give them as tensors in its pages, which the system drops when it likes."""
    offsets = []
    with path.open("wb") as file:
        for piece in pieces:
            file.write(bytes(-file.tell() % _ALIGNMENT))
            offsets.append(file.tell())
            content: Any = piece.read().contiguous().view(torch.uint8).numpy()
            file.write(memoryview(content))
        file.write(bytes(_ALIGNMENT))  # a file of no bytes cannot be mapped
    pages = np.memmap(path, dtype=np.uint8, mode="c")
    for piece, offset in zip(pieces, offsets, strict=True):
        part = torch.from_numpy(pages[offset : offset + piece.num_bytes])
        yield part.view(piece.dtype).view(piece.shape)
