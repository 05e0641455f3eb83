"""Weights that autocast would cast one by one, cast together and, where that saves products, into one matrix."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Groups = list[list[Any]]
"""Of tensors, or of None where there is no bias."""


class CastsWeights(nn.Module):
    """A module that computes with cast weights inside `weights_cast_together`."""

    _cast: tuple[Tensor | None, ...] | None = None
    """Of each of its `groups` one tensor, None of a group of None."""
    is_for_compiled = False
    """Whether it takes them in compiled layers only."""

    def groups(self) -> Groups | None:
        """Return its weights by those that become one tensor, along their first axis; None: they do not fit that."""
        raise NotImplementedError


class Linear(nn.Linear, CastsWeights):
    """nn.Linear, which computes with cast weights inside `weights_cast_together`."""

    def groups(self) -> Groups | None:
        """Return the weight and the bias."""
        return [[self.weight], [self.bias]]

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        weight, bias = (self.weight, self.bias) if self._cast is None else self._cast
        return F.linear(input, weight, bias)  # type: ignore[arg-type]


class LinearStack(CastsWeights):
    """Holds `Linear`s of one input, named in `stack`, which compiled layers compute in one product.

    The gradient of the input is rounded once then, instead of once for each.
    """

    stack: tuple[str, ...]
    is_for_compiled = True

    def groups(self) -> Groups | None:
        """Return the weights and the biases; None where a part was replaced by something else."""
        return groups_of([getattr(self, name) for name in self.stack])

    def project(self, input: Tensor) -> Sequence[Tensor]:
        """(..., in) -> the output of each, (..., out)."""
        if self._cast is None:
            return [getattr(self, name)(input) for name in self.stack]
        weight, bias = self._cast
        return F.linear(input, weight, bias).chunk(len(self.stack), dim=-1)  # type: ignore[arg-type]


def groups_of(parts: Sequence[nn.Module]) -> Groups | None:
    """Return the weights and the biases of modules; None if one is no `Linear`, or some alone have a bias."""
    if not all(isinstance(part, Linear) for part in parts) or len({part.bias is None for part in parts}) != 1:
        return None
    return [[part.weight for part in parts], [part.bias for part in parts]]


@contextmanager
def weights_cast_together(module: nn.Module, device_type: str, compiled: bool = False) -> Iterator[None]:
    """Under autocast, give what is in a module its cast weights at once instead of one by one.

    A layer has more than a hundred weights and biases. On a GPU each cast is a launch, and so is that of each gradient;
    together they are a few. The values are the same. Without autocast nothing changes, nor without a gradient: autocast
    itself then keeps a cast from one pass to the next. Weights that are of autocast's type already are only joined.

    Args:
        module: to look in; an inner module whose weights an outer one takes gets none.
        device_type: of autocast.
        compiled: whether the module's code is compiled.
    """
    if not (torch.is_grad_enabled() and torch.is_autocast_enabled(device_type)):
        yield
        return
    dtype = torch.get_autocast_dtype(device_type)
    users: list[tuple[CastsWeights, Groups]] = []
    taken: set[int] = set()
    given: set[torch.dtype] = set()
    for part in module.modules():  # the outer before the inner
        if not isinstance(part, CastsWeights) or (part.is_for_compiled and not compiled):
            continue
        groups = part.groups()
        tensors = [tensor for group in groups or () for tensor in group if tensor is not None]
        dtypes = {tensor.dtype for tensor in tensors}
        is_gain = dtypes == {torch.float32} or (dtypes == {dtype} and len(tensors) > len(groups or ()))
        if groups and is_gain and given <= dtypes and taken.isdisjoint(map(id, tensors)):
            given = dtypes
            taken.update(map(id, tensors))
            users.append((part, groups))
    whole = [group for _, groups in users for group in groups if group[0] is not None]
    sizes, tensors = [len(group) for group in whole], [tensor for group in whole for tensor in group]
    cast = iter(_CastTogether.apply(dtype, sizes, *tensors) if tensors else ())  # type: ignore[no-untyped-call]
    for user, groups in users:
        user._cast = tuple(None if group[0] is None else next(cast) for group in groups)
    try:
        yield
    finally:
        for user, _ in users:
            user._cast = None


class _CastTogether(torch.autograd.Function):
    """Tensors of one type -> the same in another, `sizes` of them at a time along their first axis."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, sizes: Sequence[int], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.dtype, ctx.sizes, ctx.rows = tensors[0].dtype, sizes, [len(each) for each in tensors]
        stacks: list[Tensor] = []
        places: list[Tensor] = []
        unneeded: list[Tensor] = []
        first = 0
        for size in sizes:
            group, needed = tensors[first : first + size], ctx.needs_input_grad[2 + first : 2 + first + size]
            rows = ctx.rows[first : first + size]
            stacks.append(group[0].new_empty((sum(rows), *group[0].shape[1:]), dtype=dtype))
            places += torch.split(stacks[-1], rows)
            unneeded += [] if any(needed) else [stacks[-1]]
            first += size
        torch._foreach_copy_(places, list(tensors))
        ctx.mark_non_differentiable(*unneeded)
        return tuple(stacks)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        found: list[Tensor | None] = [None] * len(ctx.rows)
        there: list[int] = []
        parts: list[Tensor] = []
        first = 0
        for size, gradient in zip(ctx.sizes, gradients, strict=True):
            if gradient is not None:
                there += range(first, first + size)
                parts += torch.split(gradient, ctx.rows[first : first + size])
            first += size
        for index, cast in zip(there, _cast_all(parts, ctx.dtype), strict=True):
            found[index] = cast
        return None, None, *found


def _cast_all(tensors: Sequence[Any], dtype: torch.dtype) -> list[Tensor]:
    cast = [torch.empty_like(each, dtype=dtype) for each in tensors]
    if cast:
        torch._foreach_copy_(cast, list(tensors))
    return cast
