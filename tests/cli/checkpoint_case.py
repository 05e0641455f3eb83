"""A run's checkpoints, whole, spread over processes and tampered with, for the tests of `pldr-train checkpoint`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pldr_train.checkpoint.converting import whole_pieces
from pldr_train.checkpoint.manifest import describe_file
from pldr_train.checkpoint.shards import OPTIMIZER, WEIGHTS, Piece, even_shares, file_name, write_pieces
from pldr_train.checkpoint.verifying import open_checkpoint
from tests.tiny import tiny_values


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


Call = Callable[..., Result]


def values(folder: Path, runs: Path, name: str = "tiny") -> dict[str, Any]:
    checkpoint = {"every_steps": 2, "keep_last": 2, "also_keep_steps": [2]}
    return tiny_values(folder, runs, name, trainer={"max_steps": 6}, checkpoint=checkpoint)


def spread(checkpoint: Path, size: int = 3) -> Path:
    """Make a checkpoint of one process one of several, each with a share that ends amid a tensor."""
    opened = open_checkpoint(checkpoint)
    for kind in (WEIGHTS, OPTIMIZER):
        for rank, share in enumerate(even_shares(whole_pieces(opened, kind, lambda _: None), size)):
            write_pieces(checkpoint / file_name(kind, rank, size), share)
        (checkpoint / file_name(kind, 0, 1)).unlink()
    seal(checkpoint)
    return checkpoint


def seal(checkpoint: Path, **changes: Any) -> None:
    """Make the manifest fit what the folder holds."""
    path = checkpoint / "manifest.json"
    files = {each.name: describe_file(each) for each in checkpoint.iterdir() if each != path}
    manifest = json.loads(path.read_text())
    manifest.pop("sha256", None)  # as earlier versions wrote it, which is checked by its schema alone
    path.write_text(json.dumps(manifest | {"files": files} | changes))


def in_memory(piece: Piece) -> Piece:
    tensor = piece.read()
    return Piece(piece.name, piece.shape, 0, piece.num_elements, piece.dtype, lambda: tensor)


def rewrite(checkpoint: Path, change: Callable[[list[Piece]], list[Piece]], kind: str = WEIGHTS) -> None:
    """Write the file of one process anew with other pieces; the manifest fits it."""
    pieces = whole_pieces(open_checkpoint(checkpoint), kind, lambda _: None)
    held = [in_memory(piece) for piece in pieces]  # the file that they are read from is written over
    write_pieces(checkpoint / file_name(kind, 0, 1), change(held))
    seal(checkpoint)
