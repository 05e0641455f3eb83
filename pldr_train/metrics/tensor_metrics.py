"""The metrics of A, A_LM, A_P and G_LM, and of two runs' (the order parameter): one class each, and two lists.

Formulas, ranges and costs: docs/deductive-metrics.md. Free of torch, see `layer_metrics.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from .declaration import AT_LOG_STEPS, AT_VALIDATIONS, CRITICALITY, DEDUCTIVE_OUTPUTS, HEALTH, Chart, MetricInfo, Panel
from .layer_metrics import CACHED, CONTINUATIONS, TENSORS, LayerMetric, ShareOfOthers

if TYPE_CHECKING:
    from torch import Tensor

    from .deductive import Matrices, Pair

CHEAP, COSTLY = "cheap", "costly"
SETS = {CHEAP: AT_LOG_STEPS, COSTLY: AT_VALIDATIONS}
"""The metrics of every logged step, and those of validations, which need a singular value decomposition."""

_FINITE = "over the finite elements of batches and processes"
_MATRICES = "mean over the finite matrices of batches, heads and processes"
_SAMPLES = "pooled over finite samples"
_ROUNDING_OF_MEAN = 1e-15
"""Deviations below this share of the mean are the rounding of an fp64 mean."""
_LEAST_MEAN_SQUARE = 1e-30
"""Of the author's row study: a matrix of zeros has no contrast."""


# ---------------------------------------------------------------------------------- of the elements of A to G_LM, cheap


class TensorMetric(LayerMetric):
    """A metric of A, A_LM, A_P and G_LM: `sums` is given `Matrices` (N, H, d, d)."""

    rows: ClassVar[Sequence[str]] = tuple(TENSORS)
    cadence: ClassVar[str] = AT_LOG_STEPS
    critical: ClassVar[str] = ""
    """The title of its chart among those that tell near-critical models, if it is one of them."""
    place: ClassVar[int] = 0
    """Of that chart."""
    by_layer: ClassVar[bool] = False
    """Whether that chart has the layers of its only tensor as lines, instead of the tensors."""

    def charts(self, row: str, prefix: str) -> Sequence[Chart]:
        """Return what tells near-critical models has a chart of all tensors, in sight at once."""
        if not self.critical:
            return super().charts(row, prefix)
        if self.by_layer:
            return (Chart(CRITICALITY, self.name, self.critical, place=self.place, layered=True),)
        of_tensors = Chart(CRITICALITY, self.name, self.critical, row, place=self.place)
        return of_tensors, self.chart_of_layers(row, prefix, CRITICALITY)


class Mean(TensorMetric):
    """The mean."""

    name, reduction, meaning = "mean", _FINITE, "mean"
    formula, bounds = "mean of the finite elements", "any"
    panel = Panel(DEDUCTIVE_OUTPUTS, "Mean", 1)

    def sums(self, matrices: Matrices) -> Sequence[Tensor]:
        """Return the sum and number of the finite elements."""
        return matrices.clean.sum(), matrices.finite_count


class Spread(TensorMetric):
    """The standard deviation."""

    name, reduction, meaning = "spread", _FINITE, "standard deviation"
    formula = "standard deviation of the finite elements"
    good = "steady; A_P and G_LM that grow without end come before an overflow"
    panel = Panel(DEDUCTIVE_OUTPUTS, "Spread", 2, logarithmic=True)
    parts = ("finite", "sum", "squares")

    def sums(self, matrices: Matrices) -> Sequence[Tensor]:
        """Return the number, sum and sum of squares of the finite elements."""
        return matrices.finite_count, matrices.clean.sum(), matrices.clean.square().sum()

    def value(self, finite: Tensor, total: Tensor, squares: Tensor) -> Tensor:
        """sqrt(mean of squares - square of the mean)."""
        return (squares / finite - (total / finite).square()).clamp(min=0).sqrt()


class Min(TensorMetric):
    """The least element."""

    name, reduction, meaning = "min", _FINITE, "least element"
    formula, bounds, good = "least finite element", "any", "A_LM is never below 0"
    panel = Panel(DEDUCTIVE_OUTPUTS, "Least element", 4)
    parts, operation = ("least",), "min"

    def sums(self, matrices: Matrices) -> Sequence[Tensor]:
        """Return the least finite element, inf if there is none."""
        return (matrices.values.where(matrices.finite, math.inf).min(),)


class Max(TensorMetric):
    """The greatest element."""

    name, reduction, meaning = "max", _FINITE, "greatest element"
    formula, bounds = "greatest finite element", "any"
    panel = Panel(DEDUCTIVE_OUTPUTS, "Greatest element", 5)
    parts, operation = ("greatest",), "max"

    def sums(self, matrices: Matrices) -> Sequence[Tensor]:
        """Return the greatest finite element, -inf if there is none."""
        return (matrices.values.where(matrices.finite, -math.inf).max(),)


class AbsMean(TensorMetric):
    """The mean of the absolute values."""

    name, reduction, meaning = "abs_mean", _FINITE, "mean of the absolute values"
    formula = "mean of |x| over the finite elements"
    panel = Panel(DEDUCTIVE_OUTPUTS, "Mean of the absolute values", 3, logarithmic=True)
    layer_panel = Panel(DEDUCTIVE_OUTPUTS, "{row}: abs_mean by layer", 2004, logarithmic=True)

    def sums(self, matrices: Matrices) -> Sequence[Tensor]:
        """Return the sum of absolute values and number of the finite elements."""
        return matrices.clean.abs().sum(), matrices.finite_count


class NonfiniteShare(ShareOfOthers, TensorMetric):
    """The share of elements that are no numbers."""

    name, meaning = "nonfinite_share", "share of elements that are NaN or infinite"
    reduction = "over all elements of batches and processes"
    formula = "elements that are NaN or infinite / all"
    panel = Panel(DEDUCTIVE_OUTPUTS, "Not finite", 6)

    def sums(self, matrices: Matrices) -> Sequence[Tensor]:
        """Return the number of all and of the finite elements."""
        return matrices.element_count, matrices.finite_count


class RowMapCollapse(TensorMetric):
    """How much of a matrix's variation lies between its rows."""

    name, reduction, meaning = "row_map_collapse", _MATRICES, "share of a matrix's variance that lies between its rows"
    formula = "mean over the N matrices of mean((A - mean row)^2) / mean((A - mean)^2)"
    bounds, good = "0 to 1", "towards 0"
    critical, place = "Row-map collapse", 5
    panel = Panel(HEALTH, "Variance between the rows of a matrix (0: all alike)", 5)
    layer_panel = Panel(DEDUCTIVE_OUTPUTS, "{row}: row_map_collapse by layer", 2001)

    def sums(self, matrices: Matrices) -> Sequence[Tensor]:
        """Return the sum over the finite matrices, and their number."""
        return row_map_collapse(matrices.values).where(matrices.whole, 0.0).sum(), matrices.whole.sum()


def row_map_collapse(matrices: Tensor) -> Tensor:
    """Return how much of a matrix's variation lies between its rows: fp64 (..., d, d) -> (...), in [0, 1].

    mean((A - mean row)^2) / mean((A - mean)^2), the mean row being taken over the row index: 0 when all rows are alike.
    A constant matrix gives 0, one with entries that are not finite NaN.
    """
    between_rows = (matrices - matrices.mean(-2, keepdim=True)).square().mean((-2, -1))
    mean = matrices.mean((-2, -1), keepdim=True)
    variance = (matrices - mean).square().mean((-2, -1))
    constant = variance <= (_ROUNDING_OF_MEAN * mean[..., 0, 0]).square()
    return (between_rows / variance).where(~constant, 0.0)


class RowContrast(TensorMetric):
    """How far the rows of A are from their mean, over all of A."""

    name, reduction, cadence = "row_contrast", _MATRICES, AT_VALIDATIONS
    meaning = "mean square of the rows' deviation from the mean row, over the mean square"
    formula, bounds = "mean over the N matrices of mean((A - mean row)^2) / max(mean(A^2), 1e-30)", "0 to 1"
    good = "towards 0"
    rows = ("A",)
    panel = Panel(DEDUCTIVE_OUTPUTS, "A: contrast of its rows", 11, logarithmic=True)

    def sums(self, matrices: Matrices) -> Sequence[Tensor]:
        """Return the sum over the finite matrices, and their number."""
        values = matrices.values
        between_rows = (values - values.mean(-2, keepdim=True)).square().mean((-2, -1))
        contrast = between_rows / values.square().mean((-2, -1)).clamp(min=_LEAST_MEAN_SQUARE)
        return contrast.where(matrices.whole, 0.0).sum(), matrices.whole.sum()


class CrossHeadRms(TensorMetric):
    """How much the heads differ."""

    name, reduction = "cross_head_rms", _SAMPLES
    meaning = "RMS of the deviation from the heads' mean, over the RMS"
    formula, bounds, good = "RMS(A - mean over heads) / RMS(A)", "0 to 1", "A towards 0"
    critical, place = "Cross-head RMS", 7
    panel = Panel(DEDUCTIVE_OUTPUTS, "Heads unlike each other", 7, logarithmic=True)
    parts = ("deviation", "squares")

    def sums(self, matrices: Matrices) -> Sequence[Tensor]:
        """Return the squares of the deviation and of the values over the finite samples; nothing of a single head."""
        values = matrices.values
        deviation = values - values.mean(-3, keepdim=True)
        comparable = matrices.whole.all(-1) & (values.shape[-3] > 1)
        squares = [each.square().sum((-3, -2, -1)) for each in (deviation, values)]
        return [each.where(comparable, 0.0).sum() for each in squares]

    def value(self, deviation: Tensor, squares: Tensor) -> Tensor:
        """Return the ratio of the two RMS."""
        return (deviation / squares).sqrt()


class InputSensitivity(TensorMetric):
    """How much G_LM depends on the input."""

    name, reduction = "input_sensitivity", _SAMPLES
    meaning = "RMS of the deviation from the inputs' mean, over the RMS"
    formula, bounds, good = "RMS(G - mean over inputs) / RMS(G)", "0 to 1", "towards 0"
    rows, learned_only = ("G_LM",), True
    critical, place, by_layer = "Input sensitivity", 6, True
    panel = Panel(HEALTH, "G_LM: sensitivity to the input", 7, logarithmic=True)
    parts, matrix_parts = ("inputs", "squares"), ("total",)

    def sums(self, matrices: Matrices) -> Sequence[Tensor]:
        """Return the number, squares and sum (H, d, d) of the finite samples."""
        whole = matrices.whole.all(-1)
        clean = matrices.values.where(whole[:, None, None, None], 0.0)
        return whole.sum(), clean.square().sum(), clean.sum(0)

    def of_layers(self, inputs: Tensor, squares: Tensor, total: Tensor) -> Sequence[Tensor]:
        """Return the squares of the deviation from the layer's mean and of the values; nothing of a single input."""
        of_mean = total.square().sum((-3, -2, -1)) / inputs.clamp(min=1)
        several = inputs > 1
        return (squares - of_mean).where(several, 0.0).clamp(min=0), squares.where(several, 0.0)

    def value(self, deviation: Tensor, squares: Tensor) -> Tensor:
        """Return the ratio of the two RMS."""
        return (deviation / squares).sqrt()


# ------------------------------------------------------------------------------------------------- of A to G_LM, costly


class SpectralNorm(TensorMetric):
    """The largest singular value."""

    name, reduction, meaning = "spectral_norm", _MATRICES, "largest singular value"
    cadence = AT_VALIDATIONS
    formula = "mean over the N matrices of the largest singular value"
    panel = Panel(DEDUCTIVE_OUTPUTS, "Spectral norm", 8, logarithmic=True)
    layer_panel = Panel(DEDUCTIVE_OUTPUTS, "{row}: spectral_norm by layer", 2003, logarithmic=True)

    def sums(self, matrices: Matrices) -> Sequence[Tensor]:
        """Return the sum over the finite matrices, and their number."""
        return matrices.spectra.spectral_norm.where(matrices.whole, 0.0).sum(), matrices.whole.sum()


class LogAbsDet(TensorMetric):
    """The logarithm of the determinant."""

    name, unit, meaning, cadence = "log_abs_det", "nat", "ln |det|", AT_VALIDATIONS
    reduction = f"{_MATRICES}, without determinants of exactly 0"
    formula, bounds = "mean of ln |det| over those with a determinant other than 0", "any"
    good = "A: the lower, the more collapsed; equal with and without a cache"
    panel = Panel(DEDUCTIVE_OUTPUTS, "ln |det|", 9)

    def sums(self, matrices: Matrices) -> Sequence[Tensor]:
        """Return the sum over the matrices with a determinant, and their number."""
        regular = matrices.spectra.log_abs_det.isfinite()
        return matrices.spectra.log_abs_det.where(regular, 0.0).sum(), regular.sum()


class SingularShare(ShareOfOthers, TensorMetric):
    """The share of matrices without a determinant."""

    name, reduction, cadence = "singular_share", _MATRICES, AT_VALIDATIONS
    meaning = "share of matrices whose determinant is exactly 0"
    formula = "matrices whose determinant is exactly 0 / finite matrices"
    good = "no judgement: it says what `log_abs_det` leaves out"
    panel = Panel(DEDUCTIVE_OUTPUTS, "Singular matrices", 10)

    def sums(self, matrices: Matrices) -> Sequence[Tensor]:
        """Return the number of the finite matrices, and of those with a determinant."""
        return matrices.whole.sum(), matrices.spectra.log_abs_det.isfinite().sum()


class Rank(TensorMetric):
    """The numerical rank."""

    name, reduction, cadence = "rank", _MATRICES, AT_VALIDATIONS
    meaning = "singular values above d * 1.2e-7 of the largest"
    formula, bounds = "mean number of singular values above d * 1.19e-7 of the largest", "0 to d"
    good = "A towards 1"
    critical, place = "Rank", 8
    panel = Panel(HEALTH, "Rank", 6)
    layer_panel = Panel(DEDUCTIVE_OUTPUTS, "{row}: rank by layer", 2002)

    def sums(self, matrices: Matrices) -> Sequence[Tensor]:
        """Return the sum over the finite matrices, and their number."""
        return matrices.spectra.rank.where(matrices.whole, 0.0).sum(), matrices.whole.sum()


class CommutantResidual(TensorMetric):
    """How much of G_LM does not commute with the rotary embedding's rotations."""

    name, reduction, cadence = "commutant_residual", f"{_MATRICES} that are not 0", AT_VALIDATIONS
    meaning = "share of the Frobenius norm that does not commute with the rotary embedding's rotations"
    formula, bounds = "mean of ||G - its part that commutes with all rotations|| / ||G||", "0 to 1"
    good = "no judgement: 0 of a G by which attention depends on distances alone, sqrt(1 - 1/d) of a random one"
    rows = ("G_LM",)
    panel = Panel(DEDUCTIVE_OUTPUTS, "G_LM: share outside of the rotations' commutant", 12)
    layer_panel = Panel(DEDUCTIVE_OUTPUTS, "{row}: commutant_residual by layer", 2006)

    def sums(self, matrices: Matrices) -> Sequence[Tensor]:
        """Return the sum over the finite matrices other than 0, and their number."""
        residual = matrices.commutant_residual
        known = residual.isfinite()
        return residual.where(known, 0.0).sum(), known.sum()


TENSOR_METRICS: list[TensorMetric] = [
    Mean(), Spread(), Min(), Max(), AbsMean(), NonfiniteShare(), RowMapCollapse(), CrossHeadRms(), InputSensitivity(),
    SpectralNorm(), LogAbsDet(), SingularShare(), Rank(), RowContrast(), CommutantResidual(),
]  # fmt: skip
"""In the order in which they are written."""


class RowMapJacobian(LayerMetric):
    """How much the row map, from rows of the normed Gram to rows of A, still depends on its input."""

    name, cadence = "row_map_jacobian", AT_VALIDATIONS
    reduction = "median over rows of the Gram of prompts and processes; over all layers the least of the layers'"
    meaning = "spectral norm of the row map's Jacobian"
    formula = "median over rows of the largest singular value of the residual units' Jacobian"
    good = "below 0.1 over a run's last quarter the row map has collapsed, as in near-critical models"
    rows = ("A",)
    parts, operation, learned_only = ("median",), "min", True
    panel = Panel(DEDUCTIVE_OUTPUTS, "A: row map's Jacobian", 13, logarithmic=True)
    layer_panel = Panel(DEDUCTIVE_OUTPUTS, "{row}: row_map_jacobian by layer", 2007, logarithmic=True)
    logarithmic = True

    def sums(self, norms: Tensor) -> Sequence[Tensor]:
        """Return the median of the norms (n,); infinity, which counts for nothing, without any."""
        return (norms.quantile(0.5) if len(norms) else norms.new_full((), math.inf),)

    def charts(self, row: str, prefix: str) -> Sequence[Chart]:
        """Return a chart with a line for each layer, in sight at once."""
        return (Chart(CRITICALITY, self.name, "Row map's Jacobian", place=9, layered=True, logarithmic=True),)


ROW_MAP_METRICS: list[RowMapJacobian] = [RowMapJacobian()]


# -------------------------------------------------------------------------------------------------- the order parameter


class PairMetric(LayerMetric):
    """A metric of two runs over the same prompts: `sums` is given a `Pair`."""

    rows: ClassVar[Sequence[str]] = tuple(TENSORS)
    cached_panel: ClassVar[Panel | None] = None
    """Of the pair (xc, x1)."""
    critical: ClassVar[str] = ""
    """What its charts among those that tell near-critical models are called."""
    place: ClassVar[int] = 0

    def info(self, row: str, layer: int | None = None, prefix: str = CONTINUATIONS) -> MetricInfo:
        """Return the declaration under the prefix of one of the two pairs."""
        info = super().info(row, layer, prefix)
        if prefix != CACHED:
            return info
        panels = () if layer is not None or self.cached_panel is None else (self.cached_panel,)
        return replace(info, meaning=f"{info.meaning}, the first cached", panels=panels)

    def charts(self, row: str, prefix: str) -> Sequence[Chart]:
        """Return a chart of all tensors, in sight at once, and the folded one of the layers."""
        cached = "cached " * (prefix == CACHED)
        of_layers = self.chart_of_layers(row, prefix, CRITICALITY, f"{cached}order parameter, ")
        title = f"{cached}order parameter, {self.critical}".capitalize()
        place, log = self.place + 2 * bool(cached), self.logarithmic
        of_tensors = Chart(CRITICALITY, cached + self.name, title, row, place=place, logarithmic=log)
        return (of_tensors, of_layers) if self.critical else (of_layers,)


_PAIRS = "over the elements of prompts and processes that are finite in both runs"
_MEAN_IS_ROUNDING = 1e-6
"""Of the RMS. A's mean is 0 but for the rounding of fp32 before training: LayerNorms without biases made its rows."""


class RelativeRmse(PairMetric):
    """RMSE(x1, x2) / |mean x1|, the paper's form; 0 for equal tensors, absent where the mean is 0 or its rounding."""

    name, reduction = "relative_rmse", _PAIRS
    meaning = "RMSE of two runs over the absolute mean of the first"
    formula, good = "RMSE(x1, x2) / |mean x1|", "0; the source's form"
    critical, place, logarithmic = "relative", 2, True
    panel = Panel(DEDUCTIVE_OUTPUTS, "Order parameter, RMSE over the mean", 1001, logarithmic=True)
    parts = ("finite", "difference_squares", "first_squares", "first")

    def sums(self, pair: Pair) -> Sequence[Tensor]:
        """Of the elements that are finite in both."""
        return pair.finite_count, pair.difference_squares, pair.first_squares, pair.first.sum()

    def value(self, finite: Tensor, difference: Tensor, squares: Tensor, first: Tensor) -> Tensor:
        """sqrt(d / n) / |s / n|."""
        ratio = (difference * finite).sqrt() / first.abs()
        is_rounding = first.abs() <= _MEAN_IS_ROUNDING * (squares * finite).sqrt()
        return _zero_if_equal(ratio.where(~is_rounding, math.nan), difference, finite)


class BoundedDifference(PairMetric):
    """RMS(x1 - x2) / ((RMS x1 + RMS x2) / 2); 0 for equal tensors."""

    name, reduction = "bounded", _PAIRS
    meaning = "RMS of the difference of two runs over the mean of their RMS"
    formula, bounds, good = "RMS(x1 - x2) / ((RMS x1 + RMS x2) / 2)", "0 to 2", "0"
    critical, place = "bounded", 1
    panel = Panel(HEALTH, "Order parameter", 4, logarithmic=True)
    cached_panel = Panel(DEDUCTIVE_OUTPUTS, "Order parameter of a cached run", 1001, logarithmic=True)
    parts = ("finite", "difference_squares", "first_squares", "second_squares")

    def sums(self, pair: Pair) -> Sequence[Tensor]:
        """Of the elements that are finite in both."""
        return pair.finite_count, pair.difference_squares, pair.first_squares, pair.second.square().sum()

    def value(self, finite: Tensor, difference: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """As the class says."""
        return _zero_if_equal(2 * difference.sqrt() / (first.sqrt() + second.sqrt()), difference, finite)


class PairNonfiniteShare(ShareOfOthers, PairMetric):
    """The share of elements that cannot be compared."""

    name, meaning = "nonfinite_share", "share that is not finite in one of the runs"
    reduction = "over the elements of prompts and processes"
    formula = "elements not finite in one of the runs / all"

    def sums(self, pair: Pair) -> Sequence[Tensor]:
        """Return the number of all elements, and of those finite in both."""
        return pair.element_count, pair.finite_count


def _zero_if_equal(ratio: Tensor, difference: Tensor, count: Tensor) -> Tensor:
    return ratio.where((difference != 0) | (count == 0), 0.0)


ORDER_METRICS: list[PairMetric] = [RelativeRmse(), BoundedDifference(), PairNonfiniteShare()]
