"""Future-token leakage: how much better a model predicts in one pass over a block than when it generates.

The Gram matrix of a learned G sums over all positions, so in one pass over a row every position may see later tokens
through G. The *block* NLL of a target is that of such a pass, the training loss; the *sequential* NLL is that of a pass
over the tokens before the target alone, which is what generation can reach. The gap, sequential - block, is 0 for a
causal model; a large one says that the block loss measures the reading of the future.

Rows are (R, S + 1) token ids. A target's position p lies in 1..S: row[p] is predicted from row[:p].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pldr_train.metrics.intervals import clustered_95

PAD_ID = 0
NO_POSITION = -1
"""Fills up the positions of a row that has fewer targets than others."""
NextTokenLogits = Callable[[Tensor, Tensor], Tensor]
"""(input ids (B, S), indices (N,)) -> (B, N, V), the next-token logits after the tokens at these indices."""


def logits_of(model: Any, row_positions: Callable[[Tensor], Tensor] | None = None) -> NextTokenLogits:
    """Return how to ask a model for logits.

    Args:
        model: a causal language model in transformers' form (it has a `config`; padding is masked, nothing is cached
            and only the logits that are asked for are made), or any callable from (B, S) ids to (B, S, V) logits.
        row_positions: (B, S) ids -> (B, S) position ids to hand to a model in transformers' form.
    """
    if not hasattr(model, "config"):
        return lambda input_ids, indices: model(input_ids)[:, indices]

    def ask(input_ids: Tensor, indices: Tensor) -> Tensor:
        is_token = input_ids != PAD_ID
        outputs = model(
            input_ids=input_ids,
            # A mask of ones alone would change nothing but the kernel.
            attention_mask=None if bool(is_token.all()) else is_token.long(),
            position_ids=None if row_positions is None else row_positions(input_ids),
            use_cache=False,
            logits_to_keep=indices,
        )
        logits: Tensor = outputs.logits
        return logits

    return ask


def scorable(rows: Tensor) -> Tensor:
    """(R, S + 1) ids -> (R, S) bool, whether row[p] may be scored for p = 1..S: a token, with a token before it."""
    is_token = rows != PAD_ID
    return is_token[:, 1:] & (is_token[:, :-1].cumsum(-1) > 0)


def sample_positions(rows: Tensor, per_row: int, generator: torch.Generator) -> Tensor:
    """Return the positions of targets, spread evenly over the scorable ones of each row from a random start.

    It is systematic sampling: the n scorable targets of a row are cut into `per_row` strata of equal width, and each
    gives the one at the same random depth. All targets are equally likely and none comes twice. A row that has no more
    than `per_row` gives all of them.

    Args:
        rows: (R, S + 1) token ids.
        per_row: targets of a row.
        generator: of the random starts, on the CPU.

    Returns:
        (R, K) int64 with K <= `per_row`, ascending, on the CPU; `NO_POSITION` where a row has fewer.
    """
    allowed = scorable(rows.cpu())
    starts = torch.rand(len(rows), generator=generator, dtype=torch.float64)
    chosen = []
    for own, start in zip(allowed, starts, strict=True):
        targets = own.nonzero()[:, 0] + 1
        if len(targets) > per_row:
            places = ((torch.arange(per_row) + start) * (len(targets) / per_row)).long()
            targets = targets[places.clamp(max=len(targets) - 1)]
        chosen.append(targets)
    width = max((len(each) for each in chosen), default=0)
    positions = torch.full((len(rows), width), NO_POSITION)
    for own, targets in zip(positions, chosen, strict=True):
        own[: len(targets)] = targets
    return positions


@dataclass(frozen=True)
class TargetScores:
    """What was found for each target, all (R, K) on the CPU; without meaning where `positions` has `NO_POSITION`."""

    positions: Tensor
    block_nll: Tensor
    """fp64, nats."""
    sequential_nll: Tensor
    block_correct: Tensor
    """bool: the target was the likeliest token."""
    sequential_correct: Tensor

    @property
    def is_scored(self) -> Tensor:
        """Where there is a target."""
        return self.positions != NO_POSITION

    def sums(self, only: Tensor | None = None) -> LeakageSums:
        """Sums over the targets, or over those where `only` (R, K) is true."""
        scored = self.is_scored if only is None else self.is_scored & only
        nll_gap = (self.sequential_nll - self.block_nll).where(scored, 0)
        row_gap, row_targets = nll_gap.sum(-1), scored.sum(-1).double()
        return LeakageSums(
            targets=float(row_targets.sum()),
            block_nll=float(self.block_nll[scored].sum()),
            sequential_nll=float(self.sequential_nll[scored].sum()),
            block_correct=float((self.block_correct & scored).sum()),
            sequential_correct=float((self.sequential_correct & scored).sum()),
            gap=float(row_gap.sum()),
            rows=float((row_targets > 0).sum()),
            row_gap_squares=float((row_gap**2).sum()),
            row_gap_by_targets=float((row_gap * row_targets).sum()),
            row_targets_squares=float((row_targets**2).sum()),
        )


@dataclass(frozen=True)
class LeakageSums:
    """Sums over targets and over rows; those of several batches or processes are added as tensors."""

    targets: float
    block_nll: float
    sequential_nll: float
    block_correct: float
    sequential_correct: float
    gap: float
    """Sum of sequential - block NLL over the targets."""
    rows: float
    """Rows with at least one target."""
    row_gap_squares: float
    """Sum over rows of the square of the row's sum of gaps."""
    row_gap_by_targets: float
    """Sum over rows of the row's sum of gaps times its number of targets."""
    row_targets_squares: float
    """Sum over rows of the square of the number of targets."""

    def as_tensor(self) -> Tensor:
        """(10,) fp64, to be summed over processes."""
        return torch.tensor(astuple(self), dtype=torch.float64)

    @classmethod
    def from_tensor(cls, values: Tensor) -> LeakageSums:
        """Return what `as_tensor` gave."""
        return cls(*values.tolist())

    def compute(self) -> Leakage:
        """Return the means, and the interval of the gap, see `clustered_95`.

        Raises:
            ValueError: nothing was scored.
        """
        if self.targets == 0:
            raise ValueError("no target was scored: the rows hold no token after a token")
        gap, low, high = clustered_95(
            self.rows,
            self.targets,
            self.gap,
            self.row_gap_squares,
            self.row_gap_by_targets,
            self.row_targets_squares,
        )
        return Leakage(
            block_nll=self.block_nll / self.targets,
            sequential_nll=self.sequential_nll / self.targets,
            block_accuracy=self.block_correct / self.targets,
            sequential_accuracy=self.sequential_correct / self.targets,
            gap=gap,
            gap_low=low,
            gap_high=high,
            targets=round(self.targets),
            rows=round(self.rows),
        )


@dataclass(frozen=True)
class Leakage:
    """Means over the targets, NLL and gap in nat/token."""

    block_nll: float
    sequential_nll: float
    block_accuracy: float
    sequential_accuracy: float
    gap: float
    """sequential - block."""
    gap_low: float
    """Lower end of the 95 % confidence interval, see `LeakageSums.compute`."""
    gap_high: float
    targets: int
    rows: int


@torch.no_grad()
def score_targets(
    model: Any,
    rows: Tensor,
    positions: Tensor,
    batch_size: int = 8,
    row_positions: Callable[[Tensor], Tensor] | None = None,
) -> TargetScores:
    """Block and sequential NLL of targets.

    Args:
        model: see `logits_of`; a module is put in eval mode for the while.
        rows: (R, S + 1) token ids on the model's device.
        positions: of targets, of 1..S. Either (R, K), `NO_POSITION` where there is none, as from `sample_positions`;
            or (K,) ascending, the same of every row: then every row goes through every pass, whether it has a target
            there or not. So processes with equally many rows make equally many passes, as a model whose weights are
            spread over them needs.
        batch_size: rows, or prefixes of equal length, in a pass.
        row_positions: see `logits_of`.

    Raises:
        ValueError: a position of (R, K) names no scorable target.
    """
    positions = positions.cpu()
    in_every_row = positions.dim() == 1
    asked = positions.expand(len(rows), -1) if in_every_row else positions
    inside = asked.clamp(1, rows.shape[1] - 1)
    is_target = (inside == asked) & scorable(rows.cpu()).gather(1, inside - 1)
    if not in_every_row and bool((~is_target & (asked != NO_POSITION)).any()):
        raise ValueError("positions name targets that are padding, have nothing before them, or lie outside the row")
    ask = logits_of(model, row_positions)
    with _in_eval_mode(model):
        block = _block(ask, rows, asked, batch_size)
        sequential = _sequential(ask, rows, asked, batch_size)
    targets = asked.where(is_target, NO_POSITION)
    return TargetScores(targets, *(tensor for pair in zip(block, sequential, strict=True) for tensor in pair))


def spread_positions(context_length: int, count: int, seed: int) -> tuple[int, ...]:
    """Up to `count` of the positions 1..context_length, one of each of as many strata of equal width, by a seed."""
    count = min(count, context_length)
    start = float(torch.rand((), generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    return tuple(1 + int((place + start) * context_length / count) for place in range(count))


def _block(ask: NextTokenLogits, rows: Tensor, positions: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
    """NLL and correctness of the targets in one pass over each row, (R, K) each."""
    nll, correct = _unfilled(positions)
    for start in range(0, len(rows), batch_size):
        part = slice(start, start + batch_size)
        row, column = (positions[part] != NO_POSITION).nonzero(as_tuple=True)
        if len(row) == 0:
            continue
        wanted = positions[part][row, column]
        # The logits after position p - 1 are those for the target at p.
        kept = torch.tensor(sorted(set((wanted - 1).tolist())))
        place = torch.searchsorted(kept, wanted - 1)
        logits = ask(rows[part, :-1], kept.to(rows.device))
        scores = score_logits(logits[row.to(rows.device), place.to(rows.device)], rows[part][row, wanted])
        nll[start + row, column], correct[start + row, column] = scores
    return nll, correct


def _sequential(ask: NextTokenLogits, rows: Tensor, positions: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
    """NLL and correctness of the targets in one pass over each prefix, (R, K) each."""
    nll, correct = _unfilled(positions)
    for length in sorted(set(positions.flatten().tolist()) - {NO_POSITION}):
        row, column = (positions == length).nonzero(as_tuple=True)
        last = torch.tensor([length - 1], device=rows.device)
        for own_row, own_column in zip(row.split(batch_size), column.split(batch_size), strict=True):
            logits = ask(rows[own_row, :length], last)
            nll[own_row, own_column], correct[own_row, own_column] = score_logits(logits[:, 0], rows[own_row, length])
    return nll, correct


def _unfilled(positions: Tensor) -> tuple[Tensor, Tensor]:
    return torch.zeros(positions.shape, dtype=torch.float64), torch.zeros(positions.shape, dtype=torch.bool)


def score_logits(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(N, V) logits, (N,) targets -> NLL (N,) fp64 and whether the target is the likeliest token, on the CPU."""
    full = logits if logits.dtype == torch.float64 else logits.float()
    nll = -full.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    return nll.cpu().double(), (full.argmax(-1) == targets).cpu()


@contextmanager
def _in_eval_mode(model: Any) -> Iterator[None]:
    was_training = isinstance(model, nn.Module) and model.training
    if was_training:
        model.eval()
    try:
        yield
    finally:
        if was_training:
            model.train()
