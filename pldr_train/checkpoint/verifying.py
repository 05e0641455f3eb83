"""A checkpoint looked over in full: its files, its state, and every element of its tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from pldr_train.building import empty_model, model_config
from pldr_train.checkpoint.listing import folder_bytes
from pldr_train.checkpoint.manifest import STATE_FILE, Defect, file_defect, read_manifest
from pldr_train.checkpoint.shards import OPTIMIZER, WEIGHTS, ShardReader
from pldr_train.checkpoint.state import UnsafeStateError, load_state
from pldr_train.checkpoint.state_check import state_problems
from pldr_train.errors import CheckpointError, UserError
from pldr_train.optimizers import OPTIMIZERS, stored_moments
from pldr_train.recipe import Recipe, recipe_from_dict
from pldr_train.runs.layout import MANIFEST_FILE

Advance = Callable[[int], None]
"""Called with the number of bytes that were read or written."""

_CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Tensors:
    """The tensors of a model by name, in the order in which one process writes them: name -> shape."""

    parameters: Mapping[str, tuple[int, ...]]
    buffers: Mapping[str, tuple[int, ...]]
    moments: Mapping[str, Mapping[str, tuple[int, ...]]]
    """The optimizer's per-element state: its name -> the parameters that have it."""

    @classmethod
    def of(cls, recipe: Recipe) -> Tensors:
        """Of the model that a recipe describes; nothing is allocated."""
        model = empty_model(model_config(recipe))
        parameters = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        stored = stored_moments(recipe.optim, parameters)
        return cls(
            parameters,
            {name: tuple(buffer.shape) for name, buffer in model.named_buffers()},
            {
                moment: {name: shape for name, shape in parameters.items() if moment in stored[name]}
                for moment in OPTIMIZERS[recipe.optim.name].moments
            },
        )

    def on_disk(self, kind: str) -> dict[str, tuple[int, ...]]:
        """Return what files of a kind (WEIGHTS or OPTIMIZER) hold: name there -> shape."""
        if kind == WEIGHTS:
            return {**self.parameters, **self.buffers}
        return {
            f"{moment}/{name}": shape
            for moment, parameters in self.moments.items()
            for name, shape in parameters.items()
        }


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files are whole and hold every element of its own recipe's model."""

    folder: Path
    manifest: dict[str, Any]
    recipe: Recipe
    tensors: Tensors
    weights: ShardReader
    moments: ShardReader

    @property
    def step(self) -> int:
        """Steps done."""
        return int(self.manifest["step"])

    def reader(self, kind: str) -> ShardReader:
        """Of its files of a kind, WEIGHTS or OPTIMIZER."""
        return self.weights if kind == WEIGHTS else self.moments

    def state(self) -> dict[str, Any]:
        """Return all else; see `state.py`."""
        return load_state(self.folder / STATE_FILE)

    def num_bytes(self, *kinds: str) -> int:
        """Return the size of the tensors of these kinds."""
        return sum(
            self.reader(kind).read(name, 0, 0).dtype.itemsize * prod(shape)
            for kind in kinds
            for name, shape in self.tensors.on_disk(kind).items()
        )


def open_checkpoint(folder: Path, advance: Advance = lambda _: None) -> Checkpoint:
    """Check a checkpoint's files and what tensors they hold, values aside, and open it.

    Raises:
        CheckpointError: it is damaged or incomplete.
    """
    try:
        manifest = _manifest(folder)
        problems = _file_problems(folder, manifest, advance)
        if not problems:
            recipe = _recipe(folder, manifest)
            tensors = Tensors.of(recipe)
            readers = {kind: ShardReader(folder, kind) for kind in (WEIGHTS, OPTIMIZER)}
            problems = [each for kind, reader in readers.items() for each in _coverage(reader, tensors, kind)]
            if not problems:
                return Checkpoint(folder, manifest, recipe, tensors, readers[WEIGHTS], readers[OPTIMIZER])
    except UserError as error:
        problems = [str(error)]
    raise CheckpointError(f"{folder}: the checkpoint is damaged: {problems[0]}; name another one")


def find_problems(folder: Path, advance: Advance = lambda _: None) -> list[str]:
    """Return everything that is wrong with a checkpoint; none if it is whole.

    Looks at sizes and checksums, the state file (read without running anything), the names, shapes and elements that
    weights and optimizer files hold against the model that the checkpoint's own recipe describes, and every value.
    """
    try:
        manifest = _manifest(folder)
    except CheckpointError as error:
        return [str(error)]
    problems = _file_problems(folder, manifest, advance)
    try:
        problems += _state_problems(folder, manifest)
    except UnsafeStateError as error:
        problems.append(str(error))
    try:
        tensors = Tensors.of(_recipe(folder, manifest))
    except UserError as error:
        return [*problems, str(error)]
    for kind in (WEIGHTS, OPTIMIZER):
        try:
            reader = ShardReader(folder, kind)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        found = list(_coverage(reader, tensors, kind))
        problems += found or _value_problems(reader, tensors.on_disk(kind), kind, advance)
    return problems


def bytes_to_read(folder: Path) -> int:
    """Return how much `find_problems` reads: every file for its checksum, tensors once more."""
    return 2 * folder_bytes(folder)


def _manifest(folder: Path) -> dict[str, Any]:
    manifest = read_manifest(folder)
    if isinstance(manifest, Defect):
        raise CheckpointError(manifest.reason)
    return manifest


def _recipe(folder: Path, manifest: Mapping[str, Any]) -> Recipe:
    try:
        return recipe_from_dict(manifest["info"]["recipe"], str(folder)).resolved()
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{MANIFEST_FILE} holds no recipe") from error


def _file_problems(folder: Path, manifest: Mapping[str, Any], advance: Advance) -> list[str]:
    files: Mapping[str, Any] = manifest["files"]
    problems = [
        each for name in files if (each := file_defect(folder / name, files[name], advance=advance)) is not None
    ]
    strangers = sorted(
        path.name
        for kind in (WEIGHTS, OPTIMIZER)
        for path in folder.glob(f"{kind}-*.safetensors")
        if path.name not in files
    )
    return problems + [f"{name} is there, but {MANIFEST_FILE} does not list it" for name in strangers]


def state_defect(folder: Path) -> str | None:
    """Return why a run cannot go on from a checkpoint whose files are whole; None if it can.

    Raises:
        UnsafeStateError: its state file holds code: a file of somebody else's, not a damaged one.
    """
    manifest = _manifest(folder)
    try:
        _recipe(folder, manifest)
    except UserError as error:
        return str(error)
    return next(_state_problems(folder, manifest), None)


def _state_problems(folder: Path, manifest: Mapping[str, Any]) -> Iterator[str]:
    path = folder / STATE_FILE
    if not path.is_file():
        return  # said already
    try:
        whole = load_state(path)
    except UnsafeStateError:
        raise
    except CheckpointError as error:
        yield str(error)
        return
    yield from state_problems(whole, manifest)


def _coverage(reader: ShardReader, tensors: Tensors, kind: str) -> Iterator[str]:
    """Yield the names, shapes, types and elements that files of a kind lack, or have beside those of the model."""
    expected, there = tensors.on_disk(kind), set(reader.names)
    yield from _first_of(sorted(there - expected.keys()), f"the {kind} files hold", "that the recipe's model lacks")
    yield from _first_of(sorted(expected.keys() - there), f"the {kind} files lack", "of the recipe's model")
    for name in sorted(there & expected.keys()):
        shape = expected[name]
        if reader.shape(name) != shape:
            found = list(reader.shape(name))
            yield f"{name} has shape {found} in the {kind} files, {list(shape)} in the recipe's model"
        elif name not in tensors.buffers and (dtype := reader.read(name, 0, 0).dtype) != torch.float32:
            yield f"{name} is {str(dtype).removeprefix('torch.')} in the {kind} files, not float32"
        else:
            yield from _run_problems(name, reader.runs(name), prod(shape), kind)


def _first_of(names: list[str], before: str, after: str) -> Iterator[str]:
    if names:
        yield f"{before} {len(names)} tensors {after}, the first is {names[0]}"


def _run_problems(name: str, runs: list[tuple[int, int]], num_elements: int, kind: str) -> Iterator[str]:
    at = 0
    for start, stop in [*runs, (num_elements, num_elements)]:
        if start > at:
            yield f"the {kind} files lack elements [{at:,}, {start:,}) of {name}"
        elif start < at and stop > start:
            yield f"the {kind} files hold elements [{start:,}, {min(stop, at):,}) of {name} twice"
        at = max(at, stop)
    if at > num_elements:
        yield f"the {kind} files hold {at:,} elements of {name}, which has {num_elements:,}"


def _value_problems(
    reader: ShardReader, expected: Mapping[str, tuple[int, ...]], kind: str, advance: Advance
) -> list[str]:
    """Return the tensors with NaN or infinity among their values, summed up in a line."""
    bad: list[str] = []
    count = first = 0
    for name, shape in expected.items():
        for start in range(0, prod(shape), _CHUNK_ELEMENTS):
            part = reader.read(name, start, min(start + _CHUNK_ELEMENTS, prod(shape)))
            infinite = torch.isfinite(part).logical_not_()
            if bool(infinite.any()):
                if not bad:
                    first = start + int(infinite.nonzero()[0])
                bad += [name] if name not in bad else []
                count += int(infinite.sum())
            advance(part.numel() * part.dtype.itemsize)
    if not bad:
        return []
    return [
        f"{count:,} values in {len(bad)} tensors of the {kind} files are not finite, the first is element {first:,} of "
        f"{bad[0]}"
    ]
