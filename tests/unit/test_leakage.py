"""The measure of future-token leakage: 0 for causal models, the known gap of one that reads ahead, and its interval."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from torch import Tensor

from pldr_train.metrics.catalog import gap_verdict
from pldr_train.metrics.intervals import student_95
from pldr_train.metrics.leakage import (
    NO_POSITION,
    Leakage,
    LeakageSums,
    TargetScores,
    sample_positions,
    score_targets,
    spread_positions,
)
from pldr_train.model import PldrllmConfig, PldrllmForCausalLM
from pldr_train.training.objective import document_positions
from tests.unit.every_model import GRAMS, make
from tests.unit.model_cases import token_ids

CAUSAL = pytest.mark.parametrize("gram", [GRAMS[name] for name in ("causal", "identity", "random")])
CONTEXT = 14


def model_of(**gram: Any) -> PldrllmForCausalLM:
    model: PldrllmForCausalLM = make(PldrllmForCausalLM, **gram).double()
    return model


def every_position(rows: Tensor) -> Tensor:
    return torch.arange(1, rows.shape[1]).expand(len(rows), -1)


CLASS_POSITION = 4
"""Of the first class token in `hidden_class_rows`."""


def hidden_class_rows(num_rows: int, context_length: int, generator: torch.Generator) -> Tensor:
    """Rows (num_rows, context_length + 1): four fixed ids, then one of eight class ids to the end."""
    classes = torch.randint(10, 18, (num_rows, 1), generator=generator)
    return torch.cat((torch.tensor([6, 7, 8, 9]).expand(num_rows, -1), classes.expand(-1, context_length - 3)), dim=1)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def expected_nll(model: Any, row: Tensor, position: int) -> tuple[float, float]:
    """Block and sequential NLL of one target, written out: one row, one pass each, no padding mask."""
    block = model(row[None, :-1], use_cache=False).logits[0, position - 1]
    sequential = model(row[None, :position], use_cache=False).logits[0, -1]
    return float(F.cross_entropy(block, row[position])), float(F.cross_entropy(sequential, row[position]))


@CAUSAL
def test_a_causal_model_has_no_gap_at_any_position(gram: dict[str, Any]) -> None:
    model, rows = model_of(**gram), token_ids(3, CONTEXT + 1)
    scores = score_targets(model, rows, every_position(rows))
    gap = scores.sequential_nll - scores.block_nll
    assert float(gap.abs().max()) < 1e-9
    # What would hide a gap: targets that are all alike, or none scored.
    assert float(scores.block_nll.std()) > 0.1
    assert verdict_of(scores.sums().compute()) == "none"
    assert torch.equal(scores.block_correct, scores.sequential_correct)


@pytest.mark.parametrize("gram", GRAMS.values(), ids=GRAMS)
def test_both_likelihoods_are_those_of_the_definition(gram: dict[str, Any]) -> None:
    model, rows = model_of(**gram), token_ids(3, CONTEXT + 1)
    positions = torch.tensor([[1, 2, CONTEXT], [3, 9, NO_POSITION], [NO_POSITION, 1, 7]])
    scores = score_targets(model, rows, positions, batch_size=2)
    for row in range(3):
        for column in range(3):
            position = int(positions[row, column])
            if position != NO_POSITION:
                found = float(scores.block_nll[row, column]), float(scores.sequential_nll[row, column])
                assert found == pytest.approx(expected_nll(model, rows[row], position), abs=1e-9)
    found_all = scores.sums().compute()
    assert (found_all.targets, found_all.rows) == (7, 3)
    leaks = gram == {}
    assert (float((scores.sequential_nll - scores.block_nll)[scores.is_scored].abs().max()) > 1e-3) == leaks


def reads_ahead(vocab_size: int, weight: float) -> Callable[[Tensor], Tensor]:
    """A toy that puts `weight` on the token that follows, where it sees one, and else is uniform."""

    def logits(input_ids: Tensor) -> Tensor:
        out = torch.zeros(*input_ids.shape, vocab_size, dtype=torch.float64)
        out[:, :-1].scatter_(-1, input_ids[:, 1:, None], weight)
        return out

    return logits


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_a_model_that_reads_ahead_has_the_known_gap(batch_size: int) -> None:
    vocab_size, weight, rows = 16, 5.0, torch.randint(1, 16, (5, 9), generator=generator())
    scores = score_targets(reads_ahead(vocab_size, weight), rows, every_position(rows), batch_size)
    seen = math.log(math.exp(weight) + vocab_size - 1) - weight
    # The last target follows the last token of the block, too: nothing is to be read ahead there.
    expected = torch.full((5, 8), seen, dtype=torch.float64)
    expected[:, -1] = math.log(vocab_size)
    torch.testing.assert_close(scores.block_nll, expected)
    torch.testing.assert_close(scores.sequential_nll, torch.full_like(expected, math.log(vocab_size)))
    found = scores.sums().compute()
    assert found.gap == pytest.approx((math.log(vocab_size) - seen) * 7 / 8)
    assert (found.block_accuracy, found.sequential_accuracy) == (7 / 8, 0)
    assert found.gap == pytest.approx(found.sequential_nll - found.block_nll)
    assert verdict_of(found) == "leaks"


@pytest.mark.parametrize("gram", GRAMS.values(), ids=GRAMS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_never_scored_and_changes_nothing(gram: dict[str, Any], side: str) -> None:
    model, rows = model_of(**gram), token_ids(3, 10)
    lengths, width = [10, 6, 3], 12
    padded, shifts = torch.zeros(3, width, dtype=torch.long), []
    for row, length in enumerate(lengths):
        shifts.append(width - length if side == "left" else 0)
        padded[row, shifts[row] : shifts[row] + length] = rows[row, :length]
    positions = sample_positions(padded, 99, generator())
    scores = score_targets(model, padded, positions)
    assert scores.is_scored.sum(-1).tolist() == [9, 5, 2]
    for row, (length, shift) in enumerate(zip(lengths, shifts, strict=True)):
        alone = rows[row : row + 1, :length]
        expected = score_targets(model, alone, every_position(alone))
        own = scores.is_scored[row]
        assert (positions[row, own] - shift).tolist() == list(range(1, length))
        # Right-padded, the block ends with padding, where that of the row alone has no last token.
        inputs = slice(0, length - 1) if side == "left" or length == width else slice(0, length)
        block = [whole_block_nll(model, alone[0], position, inputs) for position in range(1, length)]
        torch.testing.assert_close(scores.sequential_nll[row, own], expected.sequential_nll[0])
        assert scores.block_nll[row, own].tolist() == pytest.approx(block, abs=1e-9)


@torch.no_grad()
def whole_block_nll(model: Any, tokens: Tensor, position: int, inputs: slice) -> float:
    return float(
        F.cross_entropy(model(tokens[None, inputs], use_cache=False).logits[0, position - 1], tokens[position])
    )


def test_what_cannot_be_scored_is_refused() -> None:
    model, rows = model_of(), token_ids(2, 8)
    rows[1, 5:] = 0
    for position in (0, 8, -2):
        with pytest.raises(ValueError, match="outside the row"):
            score_targets(model, rows, torch.tensor([[position], [1]]))
    with pytest.raises(ValueError, match="padding"):
        score_targets(model, rows, torch.tensor([[1], [5]]))
    left = torch.tensor([[0, 0, 7, 8]])
    with pytest.raises(ValueError, match="nothing before them"):
        score_targets(model, left, torch.tensor([[2]]))
    nothing = score_targets(model, rows, torch.full((2, 3), NO_POSITION)).sums()
    assert not nothing.as_tensor().any()
    with pytest.raises(ValueError, match="no target was scored"):
        nothing.compute()


def test_documents_kept_apart_reach_the_model() -> None:
    model, rows = model_of(custom_G_type="identity"), token_ids(2, 12)
    rows[:, 5] = 3
    positions = every_position(rows)
    apart = score_targets(model, rows, positions, row_positions=document_positions)
    together = score_targets(model, rows, positions)
    assert float((apart.sequential_nll - apart.block_nll).abs().max()) < 1e-9
    torch.testing.assert_close(apart.block_nll[:, :5], together.block_nll[:, :5])
    assert float((apart.block_nll - together.block_nll)[:, 7:].abs().max()) > 1e-3
    # The second document has in the row the likelihood that it has alone.
    alone = score_targets(model, rows[:, 6:], every_position(rows[:, 6:]))
    torch.testing.assert_close(apart.block_nll[:, 6:], alone.block_nll)


def test_results_do_not_depend_on_the_batch_size() -> None:
    model, rows = model_of(), token_ids(7, CONTEXT + 1)
    rows[2, 9:] = 0
    positions = sample_positions(rows, 5, generator())
    first, *others = (score_targets(model, rows, positions, batch_size) for batch_size in (1, 3, 100))
    for other in others:
        torch.testing.assert_close(other.block_nll, first.block_nll, rtol=0, atol=1e-10)
        torch.testing.assert_close(other.sequential_nll, first.sequential_nll, rtol=0, atol=1e-10)


def test_the_models_mode_is_put_back() -> None:
    model, rows = model_of(attention_dropout=0.5), token_ids(2, 8)
    expected = score_targets(model, rows, every_position(rows)).sums()
    model.train()
    assert score_targets(model, rows, every_position(rows)).sums() == expected
    assert model.training


def test_the_same_positions_of_every_row_take_as_many_passes_whatever_the_rows_hold() -> None:
    model, rows = model_of(), token_ids(5, CONTEXT + 1)
    positions = torch.tensor([2, 7, CONTEXT])
    passes: list[int] = []
    handle = model.decoder.register_forward_pre_hook(lambda *_: passes.append(1))
    whole = score_targets(model, rows, positions, batch_size=2)
    assert len(passes) == 3 * (1 + 3)
    each = score_targets(model, rows, positions.expand(5, -1), batch_size=2)
    torch.testing.assert_close(whole.block_nll, each.block_nll, rtol=0, atol=1e-10)
    torch.testing.assert_close(whole.sequential_nll, each.sequential_nll, rtol=0, atol=1e-10)
    passes.clear()
    rows[1:, 6:] = 0
    some = score_targets(model, rows, positions, batch_size=2)
    handle.remove()
    assert len(passes) == 3 * (1 + 3)
    assert some.is_scored.tolist() == [[True, True, True]] + 4 * [[True, False, False]]
    assert some.positions[0].tolist() == positions.tolist()
    torch.testing.assert_close(some.sequential_nll[0], whole.sequential_nll[0], rtol=0, atol=1e-10)


def test_positions_are_one_of_each_stratum_and_all_equally_likely() -> None:
    context, per_row = 11, 4
    rows = torch.ones(4000, context + 1, dtype=torch.long)
    positions = sample_positions(rows, per_row, generator())
    assert positions.shape == (4000, per_row)
    strata = ((positions - 1) * per_row).div(context, rounding_mode="floor")
    assert bool((positions.diff(dim=-1) > 0).all())
    # A target on a boundary of real-valued strata may come from either; the others lie in their own.
    assert int((strata - torch.arange(per_row)).abs().max()) <= 1
    frequency = torch.bincount(positions.flatten(), minlength=context + 1)[1:] / 4000
    assert positions.min() == 1
    assert positions.max() == context
    torch.testing.assert_close(frequency, torch.full((context,), per_row / context), rtol=0, atol=0.04)
    assert len({tuple(each) for each in positions.tolist()}) > 5
    assert torch.equal(positions, sample_positions(rows, per_row, generator()))
    assert not torch.equal(positions, sample_positions(rows, per_row, generator(1)))


def test_short_rows_give_all_their_targets_and_padding_none() -> None:
    rows = torch.tensor([[5, 5, 5, 0, 0, 0], [0, 0, 5, 5, 5, 5], [0, 0, 0, 0, 0, 5], [5, 5, 5, 5, 5, 5]])
    positions = sample_positions(rows, 3, generator())
    assert positions[:3].tolist() == [[1, 2, NO_POSITION], [3, 4, 5], [NO_POSITION] * 3]
    assert len(set(positions[3].tolist())) == 3


def scores_of(gaps: Tensor, scored: Tensor) -> TargetScores:
    positions = torch.arange(1, gaps.shape[1] + 1).expand_as(gaps).where(scored, NO_POSITION)
    block = torch.rand(gaps.shape, generator=generator(7), dtype=torch.float64)
    correct = gaps > 0
    return TargetScores(positions, block, block + gaps, correct, ~correct)


def test_the_interval_is_that_of_row_means() -> None:
    gaps = torch.randn(20, 6, generator=generator(), dtype=torch.float64) + torch.arange(20)[:, None] / 10
    found = scores_of(gaps, torch.ones(20, 6, dtype=torch.bool)).sums().compute()
    means = gaps.numpy().mean(1)
    half = scipy.stats.t.ppf(0.975, 19) * means.std(ddof=1) / np.sqrt(20)
    assert found.gap == pytest.approx(means.mean())
    assert (found.gap_low, found.gap_high) == pytest.approx((means.mean() - half, means.mean() + half), rel=1e-4)


def test_the_interval_of_rows_of_different_length_weighs_targets() -> None:
    gaps = torch.randn(20, 6, generator=generator(), dtype=torch.float64) + 3
    scored = torch.rand(20, 6, generator=generator(1)) < 0.5
    scored[4] = False
    found = scores_of(gaps, scored).sums().compute()
    values = [gaps[row][scored[row]].numpy() for row in range(20) if bool(scored[row].any())]
    counts, mean = np.array([len(each) for each in values]), np.concatenate(values).mean()
    residuals = np.array([each.sum() for each in values]) - mean * counts
    half = (
        scipy.stats.t.ppf(0.975, len(values) - 1)
        * np.sqrt(len(values) / (len(values) - 1) * (residuals**2).sum())
        / counts.sum()
    )
    assert (found.rows, found.targets) == (len(values), counts.sum())
    assert found.gap == pytest.approx(mean)
    assert (found.gap_low, found.gap_high) == pytest.approx((mean - half, mean + half), rel=1e-4)


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 6, 9, 15, 63, 10_000])
def test_the_quantiles_are_students(degrees: int) -> None:
    assert student_95(degrees) == pytest.approx(scipy.stats.t.ppf(0.975, degrees), abs=2e-3)


@pytest.mark.parametrize("rows", [3, 40])
def test_the_interval_covers_the_truth_as_often_as_it_says(rows: int) -> None:
    truth, covered, trials = 0.3, 0, 400
    for trial in range(trials):
        noise = torch.randn(rows, 5, generator=generator(trial), dtype=torch.float64)
        shared = torch.randn(rows, 1, generator=generator(trial + trials), dtype=torch.float64)
        found = scores_of(truth + noise + 2 * shared, torch.ones(rows, 5, dtype=torch.bool)).sums().compute()
        covered += found.gap_low < truth < found.gap_high
    assert 0.92 < covered / trials < 0.98


def test_positions_are_one_of_each_stratum() -> None:
    for seed in range(20):
        positions = spread_positions(100, 4, seed)
        assert [(position - 1) // 25 for position in positions] == [0, 1, 2, 3]
    assert len({spread_positions(100, 4, seed) for seed in range(20)}) > 5
    assert spread_positions(7, 30, 0) == tuple(range(1, 8))
    assert spread_positions(7, 0, 0) == ()


def test_sums_of_processes_add_up() -> None:
    gaps, scored = torch.randn(9, 4, generator=generator()).double(), torch.rand(9, 4, generator=generator(1)) < 0.7
    whole = scores_of(gaps, scored)

    def part(rows: slice) -> LeakageSums:
        fields = (getattr(whole, name)[rows] for name in whole.__dataclass_fields__)
        return TargetScores(*fields).sums()

    added = LeakageSums.from_tensor(part(slice(0, 4)).as_tensor() + part(slice(4, 9)).as_tensor())
    torch.testing.assert_close(added.as_tensor(), whole.sums().as_tensor())
    early, late = whole.sums(whole.positions <= 2), whole.sums(whole.positions > 2)
    assert early.targets + late.targets == whole.sums().targets
    assert early.gap + late.gap == pytest.approx(whole.sums().gap)


def verdict_of(found: Leakage) -> str:
    return gap_verdict(found.gap_low, found.gap_high)


def test_one_row_gives_no_interval() -> None:
    found = scores_of(torch.ones(1, 4, dtype=torch.float64), torch.ones(1, 4, dtype=torch.bool)).sums().compute()
    assert (found.gap, found.gap_low, found.gap_high) == (1, -math.inf, math.inf)
    assert verdict_of(found) == "undecided"


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.06, 0.5, "leaks"),
        (0.05, 0.5, "undecided"),
        (-0.5, 0.06, "undecided"),
        (-math.inf, math.inf, "undecided"),
        (-0.04, 0.05, "none"),
        (-0.5, 0.0, "none"),
        (-0.5, -0.05, "none"),
        (-0.5, -0.06, "reversed"),
    ],
)
def test_the_verdict_follows_the_interval(low: float, high: float, verdict: str) -> None:
    assert gap_verdict(low, high) == verdict
    assert gap_verdict(low * 10, high * 10, max_gap=0.5) == verdict


def train_on_hidden_class(steps: int, **gram: Any) -> list[Leakage]:
    """2 layers x 2 heads x d 32 on the hidden-class task, scored on the first class token of fresh rows.

    Three times, 20 steps apart, the last after `steps` steps: the loss of a learned G jumps up now and then.
    """
    context = 12
    sizes = {"A_dff": 85, "num_reslayerA": 2, "num_denseA": 2, "max_position_embeddings": context}
    torch.manual_seed(0)
    model = PldrllmForCausalLM(
        PldrllmConfig(
            vocab_size=18, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, head_dim=32, **sizes, **gram
        )
    )
    optimizer, classes = torch.optim.AdamW(model.parameters(), lr=7e-4, betas=(0.9, 0.95), eps=1e-5), generator(1)
    before_class, fresh, found = torch.tensor([CLASS_POSITION - 1]), hidden_class_rows(256, context, generator(2)), []
    for step in range(1, steps + 1):
        rows = hidden_class_rows(64, context, classes)
        logits = model(rows[:, :-1], use_cache=False, logits_to_keep=before_class).logits[:, 0]
        optimizer.zero_grad()
        F.cross_entropy(logits, rows[:, CLASS_POSITION]).backward()
        optimizer.step()
        if step in (steps - 40, steps - 20, steps):
            scores = score_targets(model, fresh, torch.full((256, 1), CLASS_POSITION), batch_size=64)
            found.append(scores.sums().compute())
    return found


@pytest.mark.slow
def test_training_with_a_learned_g_leaks_and_the_measure_tells() -> None:
    """PAPER_FACTS' task: block NLL goes below ln 8, which no causal model can, and sequential NLL above it."""
    bound = math.log(8)
    learned = min(train_on_hidden_class(120), key=lambda found: found.block_nll)
    assert learned.block_nll < 0.7
    assert learned.block_accuracy > 0.8
    assert learned.sequential_nll > bound + 0.5
    assert learned.gap_low > 2
    assert verdict_of(learned) == "leaks"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gram", "steps"), [({"custom_G_type": "identity"}, 60), ({"gram_chunk_size": 4}, 40)], ids=["identity", "causal"]
)
def test_training_with_a_causal_g_stays_at_the_bound(gram: dict[str, Any], steps: int) -> None:
    found = train_on_hidden_class(steps, **gram)[-1]
    assert found.block_nll == pytest.approx(math.log(8), abs=0.1)
    assert found.sequential_nll == pytest.approx(found.block_nll, abs=1e-4)
    assert verdict_of(found) == "none"
    assert abs(found.gap) < 1e-4
