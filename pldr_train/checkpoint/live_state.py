"""What this process holds of the weights and of the optimizer's moments, whatever strategy spread them.

A part is a run of a tensor's flattened elements with access to the live fp32 weights and moments. Checkpoints are
written from parts and restored into them, so a checkpoint does not know the strategy that wrote it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from typing_extensions import override

from pldr_train.checkpoint.shards import OPTIMIZER, WEIGHTS, Piece, ShardReader, check_same_tensors, even_shares
from pldr_train.errors import CheckpointError
from pldr_train.optimizers import kind_of

WEIGHT = "weight"


@dataclass(frozen=True)
class Part:
    """A run of a weight's flattened elements that this process holds in fp32, with its moments."""

    name: str
    shape: tuple[int, ...]
    """Of the whole weight."""
    start: int
    num_elements: int
    read: Callable[[str], Tensor]
    """WEIGHT or one of the optimizer's moments -> its live elements, (num_elements,) fp32; absent ones are made."""
    write: Callable[[str, Tensor], None]
    """WEIGHT or one of the optimizer's moments, and new elements for it, (num_elements,)."""

    @classmethod
    def of_view(
        cls, name: str, shape: tuple[int, ...], start: int, num_elements: int, view: Callable[[str], Tensor]
    ) -> Part:
        """Return a part whose elements lie in memory, as `view` gives them."""

        def write(kind: str, values: Tensor) -> None:
            view(kind).copy_(values)

        return cls(name, shape, start, num_elements, view, write)


class LiveState(Protocol):
    """The weights and the optimizer's state in a strategy's own memory."""

    moments: tuple[str, ...]
    """Names of the optimizer's per-element state."""

    def parts(self) -> Sequence[Part]:
        """Return all that this process holds; together the processes hold everything."""
        ...

    @property
    def replicated(self) -> bool:
        """Whether every process holds everything."""
        ...

    def publish(self) -> None:
        """After parts were written: bring copies of the weights (bf16, of other processes) up to date."""
        ...

    def steps(self) -> list[Tensor]:
        """Return the optimizer's counters of steps, one for each tensor of its state; none if it does not count."""
        ...


def optimizer_state(optimizer: Optimizer, parameter: Tensor) -> dict[str, Any]:
    """Return an optimizer's state of a parameter; made as the optimizer makes it if no step was taken yet."""
    state = optimizer.state[parameter]
    if not state:
        kind = kind_of(optimizer)
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        fused = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
        if kind.counts_steps:
            state["step"] = torch.zeros((), dtype=torch.float32, device=local.device if fused else "cpu")
        for moment in kind.moments:
            state[moment] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    return dict(state)


def counters(optimizer: Optimizer, parameters: Iterable[Tensor]) -> list[Tensor]:
    """Return an optimizer's counters of steps of some parameters; none if it does not count."""
    if not kind_of(optimizer).counts_steps:
        return []
    return [optimizer_state(optimizer, parameter)["step"] for parameter in parameters]


class WholeState(LiveState):
    """Of strategies where every process has whole tensors: one process, DDP."""

    replicated = True

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self._model, self._optimizer = model, optimizer
        self.moments = kind_of(optimizer).moments

    @override
    def parts(self) -> list[Part]:
        return [self._part(name, parameter) for name, parameter in self._model.named_parameters()]

    def publish(self) -> None:
        """Nothing to do."""

    @override
    def steps(self) -> list[Tensor]:
        return counters(self._optimizer, self._model.parameters())

    def _part(self, name: str, parameter: nn.Parameter) -> Part:
        def view(kind: str) -> Tensor:
            tensor = parameter if kind == WEIGHT else optimizer_state(self._optimizer, parameter)[kind]
            return tensor.detach().view(-1)

        return Part.of_view(name, tuple(parameter.shape), 0, parameter.numel(), view)


class RowsState(LiveState):
    """Of FSDP2, where a process has some rows (of the first axis) of each tensor."""

    replicated = False

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self._model, self._optimizer = model, optimizer
        self.moments = kind_of(optimizer).moments

    @override
    def parts(self) -> list[Part]:
        parts = (self._part(name, parameter) for name, parameter in self._model.named_parameters())
        return [part for part in parts if part.num_elements]

    def publish(self) -> None:
        """Nothing to do: weights are gathered anew for each use."""

    @override
    def steps(self) -> list[Tensor]:
        # A kernel may not count the steps of a tensor of which it has nothing.
        held = (parameter for parameter in self._model.parameters() if rows_of(parameter)[1])
        return counters(self._optimizer, held)

    def _part(self, name: str, parameter: nn.Parameter) -> Part:
        def view(kind: str) -> Tensor:
            tensor: Any = parameter if kind == WEIGHT else optimizer_state(self._optimizer, parameter)[kind]
            local: Tensor = tensor.detach().to_local().reshape(-1)
            return local

        start, num_elements = rows_of(parameter)
        return Part.of_view(name, tuple(parameter.shape), start, num_elements, view)


def rows_of(parameter: Any) -> tuple[int, int]:
    """First flattened element and number of elements of a DTensor that this process has of it."""
    assert isinstance(parameter, DTensor), type(parameter)
    mesh = parameter.device_mesh
    rows, row_size = parameter.shape[0], prod(parameter.shape[1:])
    share = -(-rows // mesh.size())
    first = min(share * mesh.get_local_rank(), rows)
    count = min(share, rows - first)
    assert parameter.to_local().numel() == count * row_size, "a DTensor that is not cut by rows as torch.chunk does"
    return first * row_size, count * row_size


def weight_pieces(live: LiveState, buffers: Sequence[tuple[str, Tensor]], rank: int, size: int) -> list[Piece]:
    """Return what this process writes of the weights, and rank 0 of the buffers."""
    return _share(live, WEIGHT, "", rank, size) + [_buffer_piece(*each) for each in buffers if rank == 0]


def optimizer_pieces(live: LiveState, rank: int, size: int) -> list[Piece]:
    """Return what this process writes of the optimizer's moments."""
    return [piece for moment in live.moments for piece in _share(live, moment, f"{moment}/", rank, size)]


def _share(live: LiveState, kind: str, prefix: str, rank: int, size: int) -> list[Piece]:
    pieces = [_piece(part, kind, prefix) for part in live.parts()]
    # Who holds everything writes an equal share: all disks and links are used at once.
    return even_shares(pieces, size)[rank] if live.replicated else pieces


def _piece(part: Part, kind: str, prefix: str) -> Piece:
    def read() -> Tensor:
        return part.read(kind)

    return Piece(prefix + part.name, part.shape, part.start, part.num_elements, torch.float32, read)


def _buffer_piece(name: str, buffer: Tensor) -> Piece:
    def read() -> Tensor:
        return buffer.reshape(-1)

    return Piece(name, tuple(buffer.shape), 0, buffer.numel(), buffer.dtype, read)


@torch.no_grad()
def restore_live_state(
    live: LiveState, model: nn.Module, folder: Path, optimizer_step: int, shapes: Sequence[Any]
) -> None:
    """Fill the live weights, buffers and moments from a checkpoint, whatever strategy and topology wrote it.

    Args:
        live: this process' own state.
        model: for its buffers, whole on every process.
        folder: the checkpoint.
        optimizer_step: the optimizer's count of the steps that it has taken.
        shapes: (name, whole shape) of all the model's parameters.

    Raises:
        CheckpointError: the checkpoint is of another model, or parts of it are missing.
    """
    weights, moments = ShardReader(folder, WEIGHTS), ShardReader(folder, OPTIMIZER)
    buffers = list(model.named_buffers())
    check_same_tensors(dict(shapes) | {name: tuple(buffer.shape) for name, buffer in buffers}, weights, folder)
    for part in live.parts():
        stop = part.start + part.num_elements
        part.write(WEIGHT, weights.read(part.name, part.start, stop))
        for moment in live.moments:
            part.write(moment, moments.read(f"{moment}/{part.name}", part.start, stop))
    for name, buffer in buffers:
        buffer.copy_(weights.whole(name))
    for step in live.steps():
        step.fill_(optimizer_step)
    live.publish()


def optimizer_step_of(live: LiveState) -> int:
    """Return the optimizer's count of steps taken, the same everywhere; 0 before the first, or if it does not count.

    Raises:
        CheckpointError: the counters of this process differ.
    """
    found = {int(step) for step in live.steps()}
    if len(found) > 1:
        raise CheckpointError(
            f"the optimizer counted different numbers of steps for different weights: {sorted(found)}"
        )
    return found.pop() if found else 0
