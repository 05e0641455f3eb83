"""The live state inside DeepSpeed's ZeRO optimizers, see `live_state.py`.

ZeRO keeps the fp32 weights and the moments in flat partitions. Where a weight lies in them is read from the maps that
DeepSpeed keeps for its own universal checkpoints (stages 1 and 2) and for its local API of partitioned weights (stage
3). Nothing is imported from DeepSpeed here; tests compare all of it with what the engine itself gives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from pldr_train.checkpoint.live_state import WEIGHT, LiveState, Part, counters, optimizer_state
from pldr_train.optimizers import kind_of


class ZeroFlatState(LiveState):
    """Of stages 1 and 2: one flat partition of all weights a process."""

    replicated = False

    def __init__(self, model: nn.Module, zero: Any) -> None:
        self._model, self._zero = model, zero
        self.kind = kind_of(zero.optimizer)

    @override
    def parts(self) -> list[Part]:
        parts = []
        weight: Any
        for name, weight in self._model.named_parameters():
            if not weight.requires_grad:
                parts.append(_frozen_part(name, weight))
            elif weight._hp_mapping is not None:
                parts.append(self._part(name, weight, weight._hp_mapping))
        return parts

    def publish(self) -> None:
        """Copy the partitions into the weights that the model computes with, of all processes."""
        self._zero.update_lp_params()

    @override
    def steps(self) -> list[Tensor]:
        flats = self._zero.single_partition_of_fp32_groups
        return counters(self._zero.optimizer, [(flat, self.kind.state) for flat in flats])

    def _part(self, name: str, weight: Any, mapping: Any) -> Part:
        in_weight, in_partition = mapping.lp_fragment_address, mapping.hp_fragment_address

        def view(kind: str) -> Tensor:
            flat = self._zero.single_partition_of_fp32_groups[mapping.param_group_index]
            tensor = flat if kind == WEIGHT else optimizer_state(self._zero.optimizer, flat, self.kind.state)[kind]
            part: Tensor = tensor.detach().narrow(0, in_partition.start, in_partition.numel)
            return part

        moments = self.kind.state.moments
        return Part.of_view(name, tuple(weight.shape), in_weight.start, in_weight.numel, view, moments)


def _frozen_part(name: str, weight: nn.Parameter) -> Part:
    """Return a weight that the engine leaves alone: every process has it whole."""

    def view(kind: str) -> Tensor:
        assert kind == WEIGHT, kind
        return weight.detach().view(-1)

    return Part.of_view(name, tuple(weight.shape), 0, weight.numel(), view, (), replicated=True)


class ZeroPartitionedState(LiveState):
    """Of stage 3: every weight is cut into equal runs, the last one padded."""

    replicated = False

    def __init__(self, model: nn.Module, zero: Any, rank: int) -> None:
        self._model, self._zero, self._rank = model, zero, rank
        self.kind = kind_of(zero.optimizer)

    @override
    def parts(self) -> list[Part]:
        parts = (self._part(name, weight) for name, weight in self._model.named_parameters())
        return [part for part in parts if part.num_elements > 0]

    def publish(self) -> None:
        """Copy the fp32 partitions into those that the model computes with, and gather what is always kept whole."""
        zero = self._zero
        zero._partition_all_parameters()
        for group in range(len(zero.fp16_groups)):
            self._swap_in(group)
            zero._reassign_or_swap_out_partitioned_parameters(group)
            self._swap_out(group)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)

    @override
    def steps(self) -> list[Tensor]:
        flats = self._zero.fp32_partitioned_groups_flat
        return counters(self._zero.optimizer, [(flat, self.kind.state) for flat in flats])

    def _part(self, name: str, weight: Any) -> Part:
        if not weight.requires_grad:
            return self._frozen_part(name, weight)
        zero = self._zero
        group, offset, padded = zero.grad_position[zero.get_param_id(weight)]
        start = self._rank * padded
        num_elements = min(padded, weight.ds_numel - start)

        def view(kind: str) -> Tensor:
            flat = zero.fp32_partitioned_groups_flat[group]
            tensor = flat if kind == WEIGHT else self._state(group)[kind]
            part: Tensor = tensor.detach().narrow(0, offset, num_elements)
            return part

        def read(kind: str) -> Tensor:
            self._swap_in(group)
            values = view(kind)
            if self._is_on_disk(group):
                values = values.clone()
                zero._release_swap_buffers(group)
            return values

        def write(kind: str, values: Tensor) -> None:
            self._swap_in(group)
            view(kind).copy_(values)
            self._swap_out(group)

        return Part(name, tuple(weight.ds_shape), start, num_elements, read, write, self.kind.state.moments)

    def _frozen_part(self, name: str, weight: Any) -> Part:
        """Return this process' run of a weight that is cut as the others are, and that the optimizer has nothing of."""
        padded = weight.ds_tensor.ds_numel
        start = self._rank * padded
        num_elements = max(0, min(padded, weight.ds_numel - start))

        def view(kind: str) -> Tensor:
            assert kind == WEIGHT, kind
            part: Tensor = weight.ds_tensor.detach().view(-1).narrow(0, 0, num_elements)
            return part

        return Part.of_view(name, tuple(weight.ds_shape), start, num_elements, view, ())

    def _state(self, group: int) -> dict[str, Any]:
        flat = self._zero.fp32_partitioned_groups_flat[group]
        state = optimizer_state(self._zero.optimizer, flat, self.kind.state)
        assert all(torch.is_tensor(state[moment]) for moment in self.kind.state.moments)
        return state

    # With the optimizer on NVMe a group's fp32 weights and moments are in memory only between these two.

    def _is_on_disk(self, group: int) -> bool:
        return bool(self._zero._swappable_optimizer_subgroup(group))

    def _swap_in(self, group: int) -> None:
        if self._is_on_disk(group):
            self._zero._optimizer_states_and_gradient_swap_in(group)

    def _swap_out(self, group: int) -> None:
        if self._is_on_disk(group):
            self._zero._optimizer_states_and_gradient_swap_out(group)
