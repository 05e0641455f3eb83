"""Checkpoints of torch.distributed.checkpoint (DCP), read without its unpickling of `.metadata`.

A folder holds `.metadata`, a pickle that says where each tensor's chunks lie, and files of chunks, each chunk a
`torch.save` of its own. torch reads the first with `pickle.load`, which would run whatever stands there.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pldr_train.checkpoint.torch_files import DamagedFileError, ForbiddenContentError, read_torch_stream
from pldr_train.curvature.restricted_pickle import Inert, Name, load_inert
from pldr_train.errors import CheckpointError, DataError, first_line

METADATA_FILE = ".metadata"
_MAX_AXES = 64
_FIX = "copy the folder anew, or name another checkpoint"


@dataclass(frozen=True)
class _Chunk:
    """Where a part of a tensor lies."""

    file: str
    start: int
    length: int


def read_distributed_checkpoint(folder: Path, marker: str) -> dict[str, Tensor]:
    """Read one model's tensors out of a DCP folder.

    Args:
        folder: holds `.metadata`.
        marker: the name of a tensor that the model has. What stands before it in the folder's names, such as
            `app.model.`, is the model's; it is taken off, and the optimizer's tensors stay unread.

    Returns:
        The tensors by their names in the model.

    Raises:
        CheckpointError: the folder is damaged or holds no such model. Nothing in it is executed.
    """
    try:
        tensors, chunks = _layout(load_inert(folder / METADATA_FILE))
    except DataError as error:
        raise CheckpointError(str(error)) from error
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / METADATA_FILE} describes no checkpoint of tensors; {_FIX}") from error
    found = [name for name in tensors if name == marker or name.endswith("." + marker)]
    if not found:
        raise CheckpointError(
            f"{folder}: no tensor {marker!r} among its {len(tensors)}, such as {sorted(tensors)[:3]}; give a "
            "checkpoint of a PLDR-LLM"
        )
    prefix = min(found, key=len).removesuffix(marker)
    wanted = {name: kind for name, kind in tensors.items() if name.startswith(prefix)}
    stored = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    asked = sum(math.prod(size) * dtype.itemsize for size, dtype in wanted.values())
    if asked > stored:
        raise CheckpointError(f"{folder}: its tensors take {asked:,} bytes, and its files have {stored:,}; {_FIX}")
    return {
        name.removeprefix(prefix): _assemble(folder, name, *kind, chunks.get(name, {})) for name, kind in wanted.items()
    }


def _layout(
    metadata: Any,
) -> tuple[dict[str, tuple[tuple[int, ...], torch.dtype]], dict[str, dict[tuple[int, ...], _Chunk]]]:
    """Return the size and type of each tensor, and its chunks by their offsets."""
    described: Mapping[str, Inert] = metadata.state["state_dict_metadata"]
    if not all(isinstance(name, str) for name in described):
        raise ValueError("a name that is no text")
    tensors = {
        name: (_size(entry.state["size"]), _dtype(entry.state["properties"]))
        for name, entry in described.items()
        if entry.name.endswith(".TensorStorageMetadata")
    }
    chunks: dict[str, dict[tuple[int, ...], _Chunk]] = {}
    for index, place in metadata.state["storage_data"].items():
        # A name that is something else is not looked up: hashing it might never end.
        if isinstance(index.state["fqn"], str) and index.state["fqn"] in tensors:
            if place.state.get("transform_descriptors"):
                raise ValueError("compressed by an extension")
            if not all(type(place.state[each]) is int and place.state[each] >= 0 for each in ("offset", "length")):
                raise ValueError("a place that is no number")
            chunk = _Chunk(Path(place.state["relative_path"]).name, place.state["offset"], place.state["length"])
            chunks.setdefault(index.state["fqn"], {})[_size(index.state["offset"])] = chunk
    return tensors, chunks


def _size(value: Any) -> tuple[int, ...]:
    """Return the numbers of a torch.Size."""
    size = tuple(value.arguments[0][:_MAX_AXES])
    if value.name != "torch.Size" or not all(type(each) is int and 0 <= each < 2**48 for each in size):
        raise ValueError("no size")
    return size


def _dtype(properties: Inert) -> torch.dtype:
    state = properties.state
    name = state[0] if isinstance(state, tuple) else state["dtype"]
    dtype = getattr(torch, name.path.removeprefix("torch.")) if isinstance(name, Name) else None
    if not isinstance(dtype, torch.dtype):
        raise ValueError("no type of numbers")
    return dtype


def _assemble(
    folder: Path, name: str, size: tuple[int, ...], dtype: torch.dtype, chunks: Mapping[tuple[int, ...], _Chunk]
) -> Tensor:
    whole, filled = torch.empty(size, dtype=dtype), 0
    for offsets, chunk in chunks.items():
        part = _read_chunk(folder, name, chunk)
        ends = [start + length for start, length in zip(offsets, part.shape, strict=False)]
        if len(offsets) != len(size) or part.dim() != len(size) or any(a > b for a, b in zip(ends, size, strict=True)):
            raise CheckpointError(f"{folder / chunk.file}: a part of {name} does not lie within it; {_FIX}")
        whole[tuple(slice(a, b) for a, b in zip(offsets, ends, strict=True))] = part
        filled += part.numel()
    if filled != whole.numel():
        raise CheckpointError(f"{folder}: {filled:,} of the {whole.numel():,} numbers of {name} are there; {_FIX}")
    return whole


def _read_chunk(folder: Path, name: str, chunk: _Chunk) -> Tensor:
    path = folder / chunk.file
    try:
        with path.open("rb") as file:
            file.seek(chunk.start)
            part = read_torch_stream(io.BytesIO(file.read(chunk.length)))
    except ForbiddenContentError as error:
        raise CheckpointError(f"{path} is refused: {name} is no tensor in it. Nothing was executed; {_FIX}") from error
    except (OSError, ValueError, OverflowError, DamagedFileError) as error:
        raise CheckpointError(f"{path}: {name} cannot be read ({first_line(error)}); {_FIX}") from error
    if not isinstance(part, Tensor):
        raise CheckpointError(f"{path}: {name} is a {type(part).__name__} in it, no tensor; {_FIX}")
    return part
