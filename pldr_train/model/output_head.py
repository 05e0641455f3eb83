"""The output head, and the cross-entropy of its logits without ever holding all of them.

Logits of 16 x 1,024 positions over 32,000 tokens, with what a loss makes of them, are 5 GB. Here a chunk of positions
at a time goes from hidden states to logits, loss and gradients; only the sums and gradients outlive it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

UNSCORED = -100
"""The target of positions that are not scored, as in all of torch."""

MOST_LOGITS = 2**25
"""Logits held at once: 128 MiB in fp32, products large enough for a GPU to be busy with."""


class OutputHead(nn.Linear):
    """nn.Linear to the vocabulary, which can score targets instead of returning logits."""

    def forward(self, input: Tensor, targets: Tensor | None = None, factor: Tensor | float = 1.0) -> Any:
        """Return logits (..., V) of hidden states (..., D), or, with targets (...), what `chunked_cross_entropy` does.

        Strategies that shard weights make them whole around this call, so both happen in it.
        """
        if targets is None:
            return F.linear(input, self.weight, self.bias)
        return chunked_cross_entropy(input, self.weight, self.bias, targets, factor)


def chunked_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, factor: Tensor | float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss, `factor` times the summed cross-entropy, and without a graph that sum and the hits, all ().

    The sum is in nats, fp32; a hit is a target that is the likeliest token. The gradients are found in the forward
    pass, up to the gradient of the loss itself; so what the loss is divided by belongs into `factor`, where it is
    applied as with whole logits. In one chunk everything is what whole logits give, in several but for the order of
    sums. Products are in autocast's type where that is on.

    Args:
        hidden: (..., D).
        weight: (V, D).
        bias: (V,), or None.
        targets: (...) token ids, or `UNSCORED`.
        factor: a number or ().
    """
    device_type, dtype = hidden.device.type, hidden.dtype
    if torch.is_autocast_enabled(device_type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
    with torch.autocast(device_type, enabled=False):
        found: tuple[Tensor, Tensor, Tensor] = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
            hidden.flatten(0, -2), weight, bias, targets.flatten(), factor, dtype, torch.is_grad_enabled()
        )
    return found


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        factor: Tensor | float,
        dtype: torch.dtype,
        with_gradient: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wanted = [with_gradient and needed for needed in ctx.needs_input_grad[:3]]
        accumulated = torch.promote_types(weight.dtype, torch.float32)
        states, matrix, offset = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        of_hidden = torch.empty_like(states) if wanted[0] else None
        # The first chunk fills it: zeros to add to would be a pass over the largest of all weights.
        empty = torch.empty_like if len(states) else torch.zeros_like
        of_weight = empty(weight, dtype=accumulated) if wanted[1] else None
        of_bias = torch.zeros_like(bias, dtype=accumulated) if bias is not None and wanted[2] else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
        size = max(1, MOST_LOGITS // len(weight))
        for start in range(0, len(states), size):
            rows = slice(start, start + size)
            part, hits, slope = _score(states[rows], matrix, offset, targets[rows], factor if any(wanted) else None)
            total, correct = total + part, correct + hits
            if of_hidden is not None:
                torch.mm(slope, matrix, out=of_hidden[rows])
            if of_weight is not None and of_weight.dtype == dtype:
                of_weight.addmm_(slope.T, states[rows], beta=min(start, 1))
            elif of_weight is not None:
                put = of_weight.copy_ if start == 0 else of_weight.add_
                put(slope.T @ states[rows])
            if of_bias is not None:
                of_bias.add_(slope.sum(0))
            del slope  # before the next chunk needs its place
        ctx.save_for_backward(of_hidden, of_weight, of_bias)
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        ctx.mark_non_differentiable(total, correct)
        return total * factor, total, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        # Training has the loss in a sum, whose gradient is 1. A CPU can look without waiting; compiled code cannot.
        looks = grad_loss.device.type == "cpu" and not torch.compiler.is_compiling()
        is_one = looks and float(grad_loss.detach().numpy()) == 1
        scaled = [
            None if each is None else _times(each, grad_loss, dtype, is_one)
            for each, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *scaled, None, None, None, None


def _times(gradient: Tensor, factor: Tensor, dtype: torch.dtype, is_one: bool) -> Tensor:
    if is_one:
        return gradient.to(dtype)
    return (gradient.to(torch.promote_types(gradient.dtype, dtype)) * factor).to(dtype)


def _score(
    states: Tensor, matrix: Tensor, offset: Tensor | None, targets: Tensor, factor: Tensor | float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a chunk's summed cross-entropy (), its hits (), and `factor` times the slope in the logits (N, V)."""
    logits = F.linear(states, matrix, offset)
    dtype, logits = logits.dtype, logits.float()
    correct = (logits.argmax(-1) == targets).sum()  # no index is UNSCORED; a CPU finds it faster in fp32 than in bf16
    log_probabilities = F.log_softmax(logits, -1)
    del logits
    total = F.nll_loss(log_probabilities, targets, ignore_index=UNSCORED, reduction="sum")
    if factor is None:
        return total, correct, log_probabilities
    factors = (targets != UNSCORED).float()[:, None] * factor
    # torch's own backward, of a gradient that is dense: other ways round otherwise, and the power law amplifies that.
    gradient = torch.zeros_like(log_probabilities).scatter_(1, targets[:, None].clamp_min(0), -factors)
    slope = torch._log_softmax_backward_data(gradient, log_probabilities, -1, torch.float32)
    del gradient, log_probabilities
    return total, correct, slope.to(dtype)
