"""One optimizer step under any strategy: the norm of the whole gradient, clipping, and leaving a step out.

Every rank computes the same norm, so all of them clip alike and agree, without a further message, on whether the
gradient is finite. Where an engine computes the norm itself (DeepSpeed) and clips by it, that is left to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from pldr_train.optim import LABEL, clip_before_step

Reduce = Callable[[Tensor], Tensor]
"""Sums a scalar over all processes."""


class StepControl:
    """Takes the steps of an optimizer; a hook makes it work where an engine calls the optimizer by itself.

    Args:
        optimizer: the optimizer that changes the weights; inside DeepSpeed's, its own.
        clip_value: limit of each element of the gradient, or None.
        clip_norm: limit of the whole gradient's 2-norm, or None.
        leave_out_nonfinite: whether a step whose gradient is not finite is left out: weights and moments stay as
            they are. This makes the host wait for the norm in each step.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        clip_value: float | None = None,
        clip_norm: float | None = None,
        leave_out_nonfinite: bool = False,
    ) -> None:
        self.norm: Tensor | None = None
        """2-norm of the last step's whole gradient before clipping, a scalar."""
        self.clipped_norm: Tensor | None = None
        """After clipping, where it was asked for."""
        self._clip_norm, self._leave_out = clip_norm, leave_out_nonfinite
        self._engine_norm: Callable[[], Tensor | None] = lambda: None
        self._measures = False
        self.group_norms: dict[str, Tensor] = {}
        """The clipped norm of each of the optimizer's groups, by its label, where it was asked for."""
        self._labels = [group.get(LABEL, "") for group in optimizer.param_groups]
        self._squares: dict[str, list[Tensor]] = {}
        optimizer.register_step_pre_hook(self._perhaps_leave_out)
        clip_before_step(optimizer, clip_value)
        optimizer.register_step_pre_hook(self._measure)

    def step(
        self,
        take: Callable[[], Any],
        parameters: Iterable[nn.Parameter],
        *,
        reduce: Reduce | None = None,
        engine_norm: Callable[[], Tensor | None] | None = None,
        measure_clipped: bool = False,
    ) -> None:
        """Clip and step.

        Args:
            take: calls the optimizer, or the engine that calls it.
            parameters: the model's, with their gradients; unused with an engine's norm.
            reduce: where this process' gradients are a share of the whole.
            engine_norm: gives the engine's norm from within its step on, which then clips by norm as well.
            measure_clipped: also find the norm after clipping.
        """
        self._squares, self._measures = {label: [] for label in self._labels}, measure_clipped
        if engine_norm is None:
            gradients = local_gradients(parameters)
            self.norm = whole_norm(gradients, reduce)
            if self._clip_norm is not None and gradients:
                scale = (self._clip_norm / (self.norm + 1e-6)).clamp(max=1.0)
                torch._foreach_mul_(gradients, scale)
        else:
            self._engine_norm = engine_norm
        take()
        if engine_norm is not None:
            self.norm = engine_norm()
        self.clipped_norm, self.group_norms = None, {}
        if measure_clipped:
            assert self.norm is not None
            none = torch.zeros_like(self.norm)
            own = [torch.stack(squares).sum() if squares else none for squares in self._squares.values()]
            totals = torch.stack(own) if reduce is None else reduce(torch.stack(own))
            self.clipped_norm = totals.sum().sqrt()
            self.group_norms = dict(zip(self._squares, totals.sqrt(), strict=True))

    def is_finite(self) -> bool:
        """Return whether the last step's gradient was; the host waits for it."""
        return self.norm is None or bool(torch.isfinite(self.norm))

    def _perhaps_leave_out(self, optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        if not self._leave_out:
            return
        norm = self._engine_norm()
        norm = self.norm if norm is None else norm
        if norm is not None and not bool(torch.isfinite(norm)):
            # An optimizer passes over parameters without a gradient: neither they nor their moments change.
            for parameter in _parameters_of(optimizer):
                parameter.grad = None

    def _measure(self, optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        if not self._measures:
            return
        for group in optimizer.param_groups:  # an engine may show one at a time
            gradients = local_gradients(group["params"])
            if gradients:
                self._squares[group.get(LABEL, "")].append(torch.nn.utils.get_total_norm(gradients).square())


def _parameters_of(optimizer: Optimizer) -> list[Any]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def local_gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """Return what this process holds of the gradients."""
    gradients: list[Any] = [parameter.grad for parameter in parameters if parameter.grad is not None]
    local = [each.to_local() if isinstance(each, DTensor) else each for each in gradients]
    return [each for each in local if each.numel()]


def whole_norm(gradients: list[Tensor], reduce: Reduce | None = None) -> Tensor:
    """2-norm over all processes' gradients, a scalar; 0 if there are none."""
    own = torch.nn.utils.get_total_norm(gradients)
    return own if reduce is None else reduce(own.square()).sqrt()


def nan_if_not_finite(loss: Tensor) -> Tensor:
    """Return the loss, or NaN with a NaN gradient if it is not finite: then the gradient's norm shows it to every rank
    it.

    A cross-entropy that overflowed can have a finite gradient.
    """
    good = torch.isfinite(loss.detach())
    return loss * torch.where(good, torch.ones_like(loss), torch.full_like(loss, torch.nan))
