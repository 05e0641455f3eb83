"""Weights and optimizer state on disk, the same whatever strategy wrote them.

    weights-00000-of-00002.safetensors      the weights of the language model, fp32, by their names in our code
    optimizer-00000-of-00002.safetensors    AdamW's moments: exp_avg/NAME and exp_avg_sq/NAME

Each process writes what it holds, in two files of its own. A tensor that a file holds whole has its name and shape; of
one that is spread over processes a file holds 1-D fragments of its flattened elements, named NAME@START, and the
file's metadata its shape. So nothing is gathered to save, and a reader takes just the elements that it needs, however
many processes wrote and however many read. The files are plain safetensors.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pldr_train.errors import CheckpointError
from pldr_train.untrusted import parse_json

WEIGHTS, OPTIMIZER = "weights", "optimizer"
_CHUNK_BYTES = 1 << 24
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class Piece:
    """A run of a tensor's flattened elements, to be written."""

    name: str
    shape: tuple[int, ...]
    """Of the whole tensor."""
    start: int
    num_elements: int
    dtype: torch.dtype
    read: Callable[[], Tensor]
    """Gives the elements, (num_elements,), on any device; called once, when they are written."""

    @property
    def is_whole(self) -> bool:
        """Whether it is all of its tensor."""
        return self.num_elements == prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """On disk."""
        return self.num_elements * self.dtype.itemsize


def file_name(kind: str, rank: int, world_size: int) -> str:
    """Return the name of a process' file; `kind` is WEIGHTS or OPTIMIZER."""
    return f"{kind}-{rank:05d}-of-{world_size:05d}.safetensors"


def write_pieces(path: Path, pieces: Sequence[Piece], metadata: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Write a file and sync it; one piece at a time is brought to the host.

    Args:
        path: the file.
        pieces: what it is to hold.
        metadata: texts for the file's header.

    Returns:
        `bytes` and `sha256` of the file, for the manifest; the sum is taken of what is written, not read back.

    Raises:
        OSError: it cannot be written.
    """
    # Wide elements first, so that every tensor lies at a multiple of its element's size.
    ordered = sorted(pieces, key=lambda piece: -piece.dtype.itemsize)
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as handle, ThreadPoolExecutor(1) as beside:

        def write(content: memoryview) -> None:
            nonlocal size
            for begin in range(0, len(content), _CHUNK_BYTES):
                chunk = content[begin : begin + _CHUNK_BYTES]
                hashed = beside.submit(digest.update, chunk)
                handle.write(chunk)
                hashed.result()
            size += len(content)

        write(memoryview(_header(ordered, metadata or {})))
        for piece in ordered:
            write(_as_bytes(piece))
        handle.flush()
        os.fsync(handle.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def _header(pieces: Sequence[Piece], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, Any] = {}
    shapes = {piece.name: list(piece.shape) for piece in pieces if not piece.is_whole}
    texts = dict(metadata) | ({"shapes": json.dumps(shapes)} if shapes else {})
    if texts:
        entries["__metadata__"] = texts
    offset = 0
    for piece in pieces:
        name = piece.name if piece.is_whole else f"{piece.name}@{piece.start}"
        shape = piece.shape if piece.is_whole else (piece.num_elements,)
        entries[name] = {
            "dtype": _CODES[piece.dtype],
            "shape": list(shape),
            "data_offsets": [offset, offset + piece.num_bytes],
        }
        offset += piece.num_bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def copied_to_host(pieces: Sequence[Piece]) -> list[Piece]:
    """Return the pieces with copies of their elements, as they are now, in the host's memory.

    Copies from a GPU go into pinned memory, one after the other without a wait between them; all are there on return.
    """
    copies, from_gpu = [], False
    for piece in pieces:
        source = piece.read().detach().reshape(-1)
        copy = torch.empty(source.shape, dtype=piece.dtype, pin_memory=source.is_cuda)
        copy.copy_(source, non_blocking=True)
        copies.append(replace(piece, read=copy.detach))
        from_gpu |= source.is_cuda
    if from_gpu:
        torch.cuda.current_stream().synchronize()
    return copies


def _as_bytes(piece: Piece) -> memoryview:
    tensor = piece.read().detach().reshape(-1)
    assert tensor.numel() == piece.num_elements, (piece.name, tensor.numel(), piece.num_elements)
    content: Any = tensor.to("cpu", piece.dtype).contiguous().view(torch.uint8).numpy()
    return memoryview(content)


@dataclass(frozen=True)
class _Stored:
    start: int
    num_elements: int
    dtype: torch.dtype
    content: np.memmap[Any, Any]
    offset: int


class ShardReader:
    """Reads any part of the tensors in a checkpoint's files of one kind.

    Args:
        folder: the checkpoint.
        kind: WEIGHTS or OPTIMIZER.

    Raises:
        CheckpointError: there are no such files, or one is no safetensors file.
    """

    def __init__(self, folder: Path, kind: str) -> None:
        self._folder, self._kind = folder, kind
        self._pieces: dict[str, list[_Stored]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        paths = sorted(folder.glob(f"{kind}-*-of-*.safetensors"))
        if not paths:
            raise CheckpointError(f"{folder} has no {kind}-*.safetensors; it is no checkpoint of this version")
        for path in paths:
            self._add(path)
        for pieces in self._pieces.values():
            pieces.sort(key=lambda piece: piece.start)

    @property
    def names(self) -> tuple[str, ...]:
        """All tensors, in the order of their names."""
        return tuple(sorted(self._pieces))

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor."""
        return self._shapes[name]

    def runs(self, name: str) -> list[tuple[int, int]]:
        """(first element, one after the last) of each run of a flattened tensor that the files hold, in order."""
        return [(piece.start, piece.start + piece.num_elements) for piece in self._pieces[name]]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Return the elements [start, stop) of a flattened tensor, on the CPU.

        Raises:
            CheckpointError: the files do not hold all of them.
        """
        if name not in self._pieces:
            raise CheckpointError(
                f"{self._folder}: {name} is missing in its {self._kind} files; use another checkpoint"
            )
        pieces = self._pieces[name]
        stop = prod(self._shapes[name]) if stop is None else stop
        result = torch.empty(stop - start, dtype=pieces[0].dtype)
        at = start
        first = max(0, bisect_right(pieces, start, key=lambda piece: piece.start) - 1)
        for piece in pieces[first:]:
            if at >= stop or piece.start > at:
                break
            end = min(stop, piece.start + piece.num_elements)
            if end > at:
                result[at - start : end - start] = _elements(piece, at - piece.start, end - piece.start)
                at = end
        if at < stop:
            raise CheckpointError(
                f"{self._folder}: elements [{at:,}, {stop:,}) of {name} are missing in its {self._kind} files; use "
                "another checkpoint"
            )
        return result

    def whole(self, name: str) -> Tensor:
        """Return a whole tensor in its shape; raises as `read`."""
        return self.read(name).view(self._shapes.get(name, ()))

    def _add(self, path: Path) -> None:
        try:
            if not path.is_file():
                raise ValueError("it is no regular file")
            content = np.memmap(path, dtype=np.uint8, mode="r")
            (length,) = struct.unpack("<Q", content[:8].tobytes())
            if 8 + length > len(content):
                raise ValueError("its header is cut off")
            entries = parse_json(content[8 : 8 + length].tobytes())
            shapes = parse_json(entries.pop("__metadata__", {}).get("shapes", "{}"))
            for entry_name, entry in entries.items():
                name, _, start = entry_name.partition("@")
                shape = tuple(shapes[name]) if start else tuple(entry["shape"])
                if self._shapes.setdefault(name, shape) != shape:
                    raise ValueError(f"{name} has two shapes")
                begin, end = entry["data_offsets"]
                num_elements = prod(entry["shape"])
                dtype = _DTYPES[entry["dtype"]]
                if begin < 0 or end - begin != num_elements * dtype.itemsize or 8 + length + end > len(content):
                    raise ValueError(f"{name} has the wrong size")
                stored = _Stored(int(start or 0), num_elements, dtype, content, 8 + length + begin)
                self._pieces.setdefault(name, []).append(stored)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, struct.error) as error:
            raise CheckpointError(
                f"{path} cannot be read as a part of a checkpoint ({error}); use another one"
            ) from error


def _elements(piece: _Stored, start: int, stop: int) -> Tensor:
    width = piece.dtype.itemsize
    part = np.array(piece.content[piece.offset + start * width : piece.offset + stop * width])
    return torch.from_numpy(part).view(piece.dtype)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Return all weights of a checkpoint, whole, by name, on the CPU.

    Raises:
        CheckpointError: they are not all there.
    """
    reader = ShardReader(folder, WEIGHTS)
    return {name: reader.whole(name) for name in reader.names}


def even_shares(pieces: Sequence[Piece], num_shares: int) -> list[list[Piece]]:
    """Cut a sequence of pieces into `num_shares` of equally many elements, for processes that all hold all of them."""
    total = sum(piece.num_elements for piece in pieces)
    bounds = [total * share // num_shares for share in range(num_shares + 1)]
    shares: list[list[Piece]] = []
    for low, high in pairwise(bounds):
        share, at = [], 0
        for piece in pieces:
            begin, end = max(low - at, 0), min(high - at, piece.num_elements)
            if begin < end:
                share.append(_cut(piece, begin, end))
            at += piece.num_elements
        shares.append(share)
    return shares


def _cut(piece: Piece, begin: int, end: int) -> Piece:
    if (begin, end) == (0, piece.num_elements):
        return piece
    return Piece(
        piece.name,
        piece.shape,
        piece.start + begin,
        end - begin,
        piece.dtype,
        lambda: piece.read().reshape(-1)[begin:end],
    )


def check_same_tensors(found: Mapping[str, tuple[int, ...]], reader: ShardReader, folder: Path) -> None:
    """Refuse a checkpoint of another model.

    Args:
        found: name -> shape of the model to be filled.
        reader: of the checkpoint's weights.
        folder: named in the error.

    Raises:
        CheckpointError: names or shapes differ.
    """
    theirs = {name: reader.shape(name) for name in reader.names}
    wrong = sorted(name for name in found.keys() | theirs.keys() if found.get(name) != theirs.get(name))
    if wrong:
        raise CheckpointError(
            f"{folder}: its weights do not fit its own recipe: {len(wrong)} tensors differ, the first is {wrong[0]} "
            f"({_shape_text(theirs.get(wrong[0]))} there, {_shape_text(found.get(wrong[0]))} in this model)"
        )


def _shape_text(shape: tuple[int, ...] | None) -> str:
    return "none" if shape is None else str(list(shape))
