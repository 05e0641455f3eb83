"""Log-likelihoods of continuations, each token in one pass over the whole (block) or from what stands before it alone.

A row is a sequence of token ids and the number of its last tokens that are scored; at least one token stands before
them. *Block* takes one pass over the row, so that a learned G sums over the scored tokens, too. *Sequential* takes a
pass over the tokens before each scored token, without a cache, as `metrics.leakage.score_targets` does. Where G cannot
depend on later tokens (predefined, or of a causal Gram) both are the same, and one pass gives both.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from pldr_train.metrics.leakage import PAD_ID, score_logits
from pldr_train.model import PldrllmForCausalLM

Scoring = Literal["block", "sequential"]
SCORINGS: tuple[Scoring, ...] = ("block", "sequential")

_MOST_LOGITS = 2**26
"""Of one pass: 256 MiB in fp32."""
_CPU_PASS_BYTES = 2**22
"""Of the widest tensor of a pass on a CPU: larger ones leave its caches, and passes become slower than single ones."""
_MOST_QUERY_IDS = 2**22
"""Of the prefixes that are held at once, to find equal ones."""


class Row(NamedTuple):
    """Token ids, of which the last `scored` are a continuation."""

    ids: tuple[int, ...]
    scored: int

    @property
    def context(self) -> tuple[int, ...]:
        """The ids before the continuation."""
        return self.ids[: -self.scored]

    @property
    def targets(self) -> tuple[int, ...]:
        """The continuation."""
        return self.ids[-self.scored :]


class RowScore(NamedTuple):
    """Of a row's continuation."""

    log_likelihood: float
    """Nats, a sum over its tokens."""
    is_greedy: bool
    """Whether each token was the likeliest one."""


class _Query(NamedTuple):
    """A pass over ids, whose last logits are scored against as many targets."""

    ids: tuple[int, ...]
    targets: tuple[int, ...]


def is_causal(model: PldrllmForCausalLM) -> bool:
    """Return whether no token's logits can depend on later tokens."""
    return model.config.custom_G_type is not None or model.config.gram_chunk_size is not None


@torch.no_grad()
def score_rows(
    model: PldrllmForCausalLM, rows: Sequence[Row], scoring: Scoring, batch_size: int = 32
) -> list[RowScore]:
    """Score rows; those of unequal lengths share passes, padded on the left and masked, and equal passes are made once.

    Args:
        model: in eval mode.
        rows: each with a context of at least one token, and no longer than the model's context and one.
        scoring: see above.
        batch_size: sequences in a pass at most; on a CPU fewer of a wide model, which is faster.

    Returns:
        A score for each row, in their order.
    """
    if is_causal(model):
        return _score_by_context(model, rows, batch_size)
    if scoring == "block":
        queries = [_Query(row.ids[:-1], row.targets) for row in rows]
        return _score_queries(model, queries, batch_size)
    scores: list[RowScore] = []
    for part in _parts(rows):
        singles = [_Query(row.ids[:end], (row.ids[end],)) for row in part for end in _ends(row)]
        found = iter(_score_queries(model, singles, batch_size))
        scores += [_joined([next(found) for _ in range(row.scored)]) for row in part]
    return scores


def _ends(row: Row) -> range:
    return range(len(row.ids) - row.scored, len(row.ids))


def _joined(scores: Iterable[RowScore]) -> RowScore:
    found = list(scores)
    return RowScore(sum(each.log_likelihood for each in found), all(each.is_greedy for each in found))


def _parts(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Cut rows into parts whose prefixes fit into memory; candidates of a question stay together, but for the cuts."""
    part: list[Row] = []
    held = 0
    for row in rows:
        part.append(row)
        held += row.scored * len(row.ids)
        if held >= _MOST_QUERY_IDS:
            yield part
            part, held = [], 0
    if part:
        yield part


def _score_queries(model: PldrllmForCausalLM, queries: Sequence[_Query], batch_size: int) -> list[RowScore]:
    by_ids: dict[tuple[int, ...], list[int]] = {}
    for number, query in enumerate(queries):
        by_ids.setdefault(query.ids, []).append(number)
    kept = {ids: max(len(queries[number].targets) for number in numbers) for ids, numbers in by_ids.items()}
    # The longest come first: what does not fit into memory fails at once, and those of similar lengths go together.
    order = sorted(by_ids, key=lambda ids: (-len(ids), -kept[ids]))
    scores: dict[int, RowScore] = {}
    for batch in _batches(model, order, kept, batch_size):
        ids, mask = padded_left(batch, model.device)
        logits = model(
            ids, attention_mask=mask, use_cache=False, logits_to_keep=max(kept[each] for each in batch)
        ).logits
        numbers = [(place, number) for place, each in enumerate(batch) for number in by_ids[each]]
        found = _score_last(logits, [(place, queries[number].targets) for place, number in numbers])
        scores |= {number: score for (_, number), score in zip(numbers, found, strict=True)}
    return [scores[number] for number in range(len(queries))]


def _batches(
    model: PldrllmForCausalLM, order: Sequence[tuple[int, ...]], kept: dict[tuple[int, ...], int], batch_size: int
) -> Iterator[list[tuple[int, ...]]]:
    """Cut sequences, the longest first, into batches of at most `batch_size`, and of few enough logits."""
    batch: list[tuple[int, ...]] = []
    most_kept = most = 0
    for ids in order:
        most_kept = max(most_kept, kept[ids])
        if batch and (len(batch) >= most or (len(batch) + 1) * most_kept * model.config.vocab_size > _MOST_LOGITS):
            yield batch
            batch, most_kept = [], kept[ids]
        if not batch:
            most = _most_sequences(model, len(ids), batch_size)
        batch.append(ids)
    if batch:
        yield batch


def _most_sequences(model: PldrllmForCausalLM, length: int, batch_size: int) -> int:
    """Return how many sequences go into a pass: on a CPU fewer of a wide model."""
    if model.device.type != "cpu":
        return batch_size
    config = model.config
    widest = max(length * config.intermediate_size, config.hidden_size * config.A_dff)
    return max(1, min(batch_size, int(_CPU_PASS_BYTES // (4 * widest))))


def padded_left(sequences: Sequence[Sequence[int]], device: Any) -> tuple[Tensor, Tensor | None]:
    """Return ids (B, S) of sequences that end together, and the mask (B, S) of their tokens; None where all are as
    long, for a mask of ones changes nothing but the kernel.
    """
    longest = max(map(len, sequences))
    ids = torch.tensor([[PAD_ID] * (longest - len(each)) + list(each) for each in sequences], device=device)
    lengths = torch.tensor([len(each) for each in sequences], device=device)
    if int(lengths.min()) == longest:
        return ids, None
    return ids, (torch.arange(longest, device=device) >= longest - lengths[:, None]).long()


def _score_last(logits: Tensor, wanted: Sequence[tuple[int, tuple[int, ...]]]) -> list[RowScore]:
    """Score targets against the last logits of their sequences.

    Args:
        logits: (B, K, V).
        wanted: sequences by their place in the batch, and the targets of their last positions, K at most.
    """
    places = [place for place, targets in wanted for _ in targets]
    columns = [logits.shape[1] - len(targets) + index for _, targets in wanted for index in range(len(targets))]
    flat = torch.tensor([target for _, targets in wanted for target in targets], device=logits.device)
    nll, correct = score_logits(logits[places, columns], flat)
    sizes = [len(targets) for _, targets in wanted]
    return [
        RowScore(-float(own.sum()), bool(greedy.all()))
        for own, greedy in zip(torch.split(nll, sizes), torch.split(correct, sizes), strict=True)
    ]


# ------------------------------------------------------------------------------------------------------ causal models


def _score_by_context(model: PldrllmForCausalLM, rows: Sequence[Row], batch_size: int) -> list[RowScore]:
    """Score rows of a model whose G reads no later token; rows of the same context share its K, V and G."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, row in enumerate(rows):
        groups.setdefault(row.context, []).append(number)
    alone = [numbers[0] for numbers in groups.values() if len(numbers) == 1]
    queries = [_Query(rows[number].ids[:-1], rows[number].targets) for number in alone]
    scores = dict(zip(alone, _score_queries(model, queries, batch_size), strict=True))
    shared = sorted((context for context, numbers in groups.items() if len(numbers) > 1), key=len, reverse=True)
    for contexts in _context_batches(shared, groups, batch_size):
        numbers = [number for context in contexts for number in groups[context]]
        owners = [place for place, context in enumerate(contexts) for _ in groups[context]]
        found = _score_candidates(model, contexts, owners, [rows[number].targets for number in numbers])
        scores |= dict(zip(numbers, found, strict=True))
    return [scores[number] for number in range(len(rows))]


def _context_batches(
    contexts: Sequence[tuple[int, ...]], groups: dict[tuple[int, ...], list[int]], batch_size: int
) -> Iterator[list[tuple[int, ...]]]:
    batch: list[tuple[int, ...]] = []
    candidates = 0
    for context in contexts:
        if batch and candidates + len(groups[context]) > batch_size:
            yield batch
            batch, candidates = [], 0
        batch.append(context)
        candidates += len(groups[context])
    if batch:
        yield batch


def _score_candidates(
    model: PldrllmForCausalLM,
    contexts: Sequence[tuple[int, ...]],
    owners: Sequence[int],
    candidates: Sequence[tuple[int, ...]],
) -> list[RowScore]:
    """Score candidates after contexts (`owners` says after which), in one pass over the contexts and one over the
    candidates.
    """
    ids, mask = padded_left(contexts, model.device)
    outputs = model(ids, attention_mask=mask, use_cache=True, logits_to_keep=1)
    first = _score_last(outputs.logits, [(place, own[:1]) for place, own in zip(owners, candidates, strict=True)])
    longer = [number for number, own in enumerate(candidates) if len(own) > 1]
    if not longer:
        return first
    places = torch.tensor([owners[number] for number in longer], device=model.device)
    outputs.past_key_values.batch_select_indices(places)
    # Padding comes first here, too: with logits and targets that end together.
    later, later_mask = padded_left([candidates[number][:-1] for number in longer], model.device)
    before = torch.ones_like(ids) if mask is None else mask
    whole = torch.cat((before[places], torch.ones_like(later) if later_mask is None else later_mask), dim=1)
    all_tokens = mask is None and later_mask is None
    logits = model(
        later, attention_mask=None if all_tokens else whole, past_key_values=outputs.past_key_values, use_cache=True
    ).logits
    rest = _score_last(logits, [(place, candidates[number][1:]) for place, number in enumerate(longer)])
    found = list(first)
    for number, score in zip(longer, rest, strict=True):
        found[number] = _joined((first[number], score))
    return found
