"""Files of `torch.save` that anyone may have written: read by torch's restricted unpickler, within limits.

That unpickler runs nothing, but hashes and keeps whatever a file says. So the pickle's nesting is measured first, and
the tensors are measured against their storages after.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import struct
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from pldr_train.errors import first_line

_NAME_LENGTHS = 26
"""Where an entry's header has the lengths of its name and its extra field, which end it."""
_ZIP = b"PK\x03\x04"
_MOST_PICKLE_BYTES = 2**28
_MOST_DEPTH, _MOST_VALUES = 500, 10**8
_LEGACY_PICKLES = 5
"""Magic number, version, machine, object and storages' keys, one after the other."""


class DamagedFileError(Exception):
    """Why a file cannot be read."""


class ForbiddenContentError(Exception):
    """What a file holds beside tensors and plain types."""


def read_torch_file(path: Path, map_location: Any = "cpu") -> Any:
    """Return what `torch.save` wrote; nothing in it is executed.

    Raises:
        OSError: there is no such file.
        ForbiddenContentError: it holds more than tensors and plain types.
        DamagedFileError: it is no whole file of torch.save, or is made to take far more than it holds.
    """
    with path.open("rb") as file:
        return read_torch_stream(file, map_location)


def read_torch_stream(file: BinaryIO, map_location: Any = "cpu") -> Any:
    """Return the same of an open file; raises as `read_torch_file`."""
    try:
        _check_pickles(file)
        file.seek(0)
        loaded = torch.load(file, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ForbiddenContentError(first_line(error)) from error
    except (
        OSError, RuntimeError, EOFError, ValueError, LookupError, AssertionError, TypeError, AttributeError,
        OverflowError, MemoryError, NotImplementedError, struct.error, zipfile.BadZipFile,
    ) as error:  # fmt: skip
        # What torch and zipfile raise on bytes that make no sense, each in its place.
        raise DamagedFileError(f"{type(error).__name__}: {first_line(error)}") from error
    _check_tensors(loaded)
    return loaded


def _check_pickles(file: BinaryIO) -> None:
    """Measure the pickles in a file. Raises ValueError."""
    start = file.read(len(_ZIP))
    file.seek(0)
    if start != _ZIP:
        for _ in range(_LEGACY_PICKLES):
            check_nesting(file)
        return
    size = file.seek(0, io.SEEK_END)
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if len({entry.filename for entry in entries}) < len(entries) or sum(each.file_size for each in entries) > size:
            raise ValueError("its entries take more than the file has")
        for entry in entries:
            if entry.filename.endswith(".pkl"):
                if entry.file_size > _MOST_PICKLE_BYTES:
                    raise ValueError(f"its {entry.filename} has {entry.file_size:,} bytes")
                check_nesting(io.BytesIO(_stored(file, entry)))


def _stored(file: BinaryIO, entry: zipfile.ZipInfo) -> bytes:
    """Return what an entry holds, whatever its checksum says: torch does not look at that either. Raises ValueError."""
    if entry.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"its {entry.filename[:100]} is compressed")
    file.seek(entry.header_offset + _NAME_LENGTHS)
    lengths = struct.unpack("<HH", file.read(4))
    file.seek(entry.header_offset + _NAME_LENGTHS + 4 + sum(lengths))
    return file.read(entry.file_size)


def check_nesting(stream: Any) -> None:
    """Measure one pickle without building it: how deep its values lie in each other, and how many they are together.

    A value that stands in several places counts in each, as it does when it is hashed or printed.

    Raises:
        ValueError: beyond the limits, or no whole pickle.
    """
    stack: list[tuple[int, int]] = []
    memo: dict[int, tuple[int, int]] = {}
    for opcode, argument, _ in pickletools.genops(stream):
        name = opcode.name
        if name in ("MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT"):
            memo[len(memo) if argument is None else int(str(argument))] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[int(str(argument))])
        elif name == "MARK":
            stack.append(_MARK)
        elif name == "DUP":
            stack.append(stack[-1])
        else:
            taken = _taken(stack, opcode)
            depth = 1 + max((each[0] for each in taken), default=0)
            values = 1 + sum(each[1] for each in taken)
            if depth > _MOST_DEPTH or values > _MOST_VALUES:
                raise ValueError("its values lie too deep in each other, or are too many")
            if opcode.stack_after:
                own = taken[-1][0] if name in _KEEPS and taken else depth
                inner = 1 + max((each[0] for each in taken[:-1]), default=0)
                stack.append((max(own, inner) if name in _KEEPS else depth, values))


def _taken(stack: list[tuple[int, int]], opcode: pickletools.OpcodeInfo) -> list[tuple[int, int]]:
    """Return what an opcode takes off the stack, the uppermost first; without the mark."""
    taken = []
    for kind in reversed(opcode.stack_before):
        if kind is pickletools.stackslice:
            while stack[-1] is not _MARK:
                taken.append(stack.pop())
        elif kind is pickletools.markobject:
            stack.pop()
        else:
            taken.append(stack.pop())
    return taken


_MARK = (-1, 0)
_KEEPS = frozenset({"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"})
"""What changes the value below and lays it into nothing."""


def _check_tensors(loaded: Any) -> None:
    """Refuse tensors that are larger than their storages, as one of stride 0 is. Raises DamagedFileError."""
    seen: set[int] = set()
    rest = [("", loaded)]
    while rest:
        name, value = rest.pop()
        if id(value) in seen:
            continue
        if isinstance(value, dict):
            rest += [(str(key) if isinstance(key, str | int) else name, each) for key, each in value.items()]
        elif isinstance(value, list | tuple | set):
            rest += [(name, each) for each in value]
        elif isinstance(value, Tensor) and value.layout == torch.strided:
            if math.prod(value.shape) * value.element_size() > value.untyped_storage().nbytes():
                raise DamagedFileError(f"{name[:200]} of shape {tuple(value.shape)} takes more than the file holds")
        elif isinstance(value, Tensor):
            raise DamagedFileError(f"{name[:200]} is a tensor of layout {value.layout}")
        if isinstance(value, dict | list | tuple | set):
            seen.add(id(value))
