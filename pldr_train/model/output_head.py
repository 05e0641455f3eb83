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

    def forward(self, input: Tensor, targets: Tensor | None = None) -> Any:
        """Return logits (..., V) of hidden states (..., D), or, with targets (...), what `chunked_cross_entropy` does.

        Strategies that shard weights make them whole around this call, so both happen in it.
        """
        if targets is None:
            return F.linear(input, self.weight, self.bias)
        return chunked_cross_entropy(input, self.weight, self.bias, targets)


def chunked_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the summed cross-entropy, (), nats in fp32, and how many targets are the likeliest token, ().

    The gradients are found in the forward pass, up to the factor of the sum's own gradient. Products are in autocast's
    type where that is on. The loss is that of whole logits but for the order of its sum.

    Args:
        hidden: (..., D).
        weight: (V, D).
        bias: (V,), or None.
        targets: (...) token ids, or `UNSCORED`.
    """
    device_type, dtype = hidden.device.type, hidden.dtype
    if torch.is_autocast_enabled(device_type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
    with torch.autocast(device_type, enabled=False):
        loss, correct = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
            hidden.flatten(0, -2), weight, bias, targets.flatten(), dtype, torch.is_grad_enabled()
        )
    return loss, correct


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        dtype: torch.dtype,
        with_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        wanted = [with_gradient and needed for needed in ctx.needs_input_grad[:3]]
        accumulated = torch.promote_types(weight.dtype, torch.float32)
        states, matrix, offset = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        of_hidden = torch.empty_like(states) if wanted[0] else None
        of_weight = torch.zeros_like(weight, dtype=accumulated) if wanted[1] else None
        of_bias = torch.zeros_like(bias, dtype=accumulated) if bias is not None and wanted[2] else None
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
        size = max(1, MOST_LOGITS // len(weight))
        for start in range(0, len(states), size):
            rows = slice(start, start + size)
            part_loss, part_correct, slope = _score(states[rows], matrix, offset, targets[rows], any(wanted))
            loss, correct = loss + part_loss, correct + part_correct
            if of_hidden is not None:
                torch.mm(slope, matrix, out=of_hidden[rows])
            if of_weight is not None and of_weight.dtype == dtype:
                of_weight.addmm_(slope.T, states[rows])
            elif of_weight is not None:
                of_weight.add_(slope.T @ states[rows])
            if of_bias is not None:
                of_bias.add_(slope.sum(0, dtype=of_bias.dtype))
            del slope  # before the next chunk needs its place
        ctx.save_for_backward(of_hidden, of_weight, of_bias)
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _grad_correct: Any) -> tuple[Tensor | None, ...]:
        scaled = [
            None if each is None else (each.to(torch.promote_types(each.dtype, dtype)) * grad_loss).to(dtype)
            for each, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *scaled, None, None, None


def _score(
    states: Tensor, matrix: Tensor, offset: Tensor | None, targets: Tensor, with_slope: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a chunk's loss (), likeliest targets (), and the loss's slope in the logits, (N, V) in their type."""
    logits = F.linear(states, matrix, offset)
    correct = (logits.argmax(-1) == targets).sum()  # no index is UNSCORED
    dtype, logits = logits.dtype, logits.float()
    log_probabilities = F.log_softmax(logits, -1)
    del logits
    loss = F.nll_loss(log_probabilities, targets, ignore_index=UNSCORED, reduction="sum")
    if not with_slope:
        return loss, correct, log_probabilities
    slope, scored = log_probabilities.exp_(), (targets != UNSCORED)[:, None]
    slope.scatter_add_(1, targets[:, None].clamp_min(0), torch.full_like(slope[:, :1], -1.0))
    return loss, correct, slope.mul_(scored).to(dtype)
