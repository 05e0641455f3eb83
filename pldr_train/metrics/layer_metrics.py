"""What a metric of the layers is, and those of attention and of the power law's parameters.

One class is all that a metric consists of: its name, unit and meaning, where it is drawn, what is summed of a batch,
and the value that follows from the sums. It counts once it stands in a list: `ATTENTION_METRICS` and
`PARAMETER_METRICS` here, `TENSOR_METRICS` and `ORDER_METRICS` in `tensor_metrics.py`. `deductive.py` keeps the sums.

No import of torch: the report reads the declarations without it. The formulas need the tensors' own methods only.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from .declaration import AT_LOG_STEPS, AT_VALIDATIONS, DEDUCTIVE_OUTPUTS, OPTIMISATION, Chart, MetricInfo, Panel

if TYPE_CHECKING:
    from torch import Tensor

    from .deductive import AttentionRows

TENSORS: Mapping[str, str] = {"A": "metric", "A_LM": "positive_metric", "A_P": "potential", "G_LM": "curvature"}
"""The field's names of the deductive outputs, and the attributes that hold them."""

PARAMETERS: Mapping[str, str] = {"W": "metric_weight", "P": "power_exponent", "a": "coupling"}
"""The field's names of the power law's parameters, and the attributes that hold them."""

ATTENTION = "attention"
DEDUCTIVE = "deductive"
"""The group that the names of all these metrics begin with."""
CONTINUATIONS, CACHED = f"{DEDUCTIVE}/order_parameter", f"{DEDUCTIVE}/cached_order_parameter"
"""Of two continuations (x1, x2) and of a cached run and a continuation (xc, x1), as the papers' source calls them."""

CHART_GROUPS: Mapping[str, str] = {
    "A": "A, the metric",
    "A_LM": "A_LM, the positive metric",
    "A_P": "A_P, the potential",
    "G_LM": "G_LM, the energy-curvature tensor",
    **dict.fromkeys(PARAMETERS, "W, P and a, the power law's parameters"),
    ATTENTION: "Attention",
}
"""The folded charts of the report, by what is measured."""


class LayerMetric(ABC):
    """A metric of every layer and over all of them.

    `sums` gives what is kept of a batch. Batches and processes are combined by `operation`, then layers, and `value`
    is taken of the result.
    """

    name: ClassVar[str]
    """The last part of the metric's name."""
    unit: ClassVar[str] = "1"
    cadence: ClassVar[str] = AT_VALIDATIONS
    reduction: ClassVar[str]
    meaning: ClassVar[str]
    formula: ClassVar[str]
    bounds: ClassVar[str] = "0 and more"
    good: ClassVar[str] = "steady"
    rows: ClassVar[Sequence[str]]
    """What it is measured of: names of tensors or of parameters, or attention."""
    parts: ClassVar[Sequence[str]] = ("total", "count")
    """What is summed, a scalar each."""
    matrix_parts: ClassVar[Sequence[str]] = ()
    """What is summed beside them, a tensor (H, d, d) each."""
    operation: ClassVar[Literal["sum", "min", "max"]] = "sum"
    learned_only: ClassVar[bool] = False
    """Whether it means nothing for a predefined G."""
    panel: ClassVar[Panel | None] = None
    """Of the values over all layers."""
    layer_panel: ClassVar[Panel | None] = None
    """Of the single layers; its title may name the `{row}`."""
    logarithmic: ClassVar[bool] = False

    @abstractmethod
    def sums(self, *args: Any, **kwargs: Any) -> Sequence[Any]:
        """Return what is kept of a batch of one layer, in the order of `parts` and `matrix_parts`."""

    def of_layers(self, *parts: Any) -> Sequence[Any]:
        """From what batches and processes gave, (L, rows, ...), to what layers are combined from, each (L, rows)."""
        return parts

    def value(self, *args: Any, **kwargs: Any) -> Any:
        """Return the values of what `of_layers` gave, combined over layers as well: (L + 1, rows) each.

        One part is the value itself, of two the first is the sum and the second the count of a mean.
        """
        return args[0] if len(args) == 1 else args[0] / args[1]

    def charts(self, row: str, prefix: str) -> Sequence[Chart]:
        """Return the charts of the report: one of all layers, folded up."""
        return (self.chart_of_layers(row, prefix, DEDUCTIVE_OUTPUTS),)

    def chart_of_layers(self, row: str, prefix: str, section: str, before: str = "") -> Chart:
        """Return the folded chart with a line for each layer."""
        words = self.name.replace("rmse", "RMSE").replace("rms", "RMS").replace("_share", " share").replace("_", " ")
        title, group = f"{row}: {before}{words}", CHART_GROUPS[row]
        family = f"{prefix}/{row}/{self.name}"
        return Chart(section, family, title, group=group, layered=True, logarithmic=self.logarithmic)

    def info(self, row: str, layer: int | None = None, prefix: str = DEDUCTIVE) -> MetricInfo:
        """Return the declaration for one of `rows`, in a layer or (None) over all of them."""
        group, where = (prefix, "of all layers") if layer is None else (f"{prefix}/layer_{layer}", f"of layer {layer}")
        panel = self.panel if layer is None else self.layer_panel
        return MetricInfo(
            f"{group}/{row}/{self.name}",
            self.unit,
            self.reduction,
            f"{row} {where}: {self.meaning}",
            self.cadence,
            self.good,
            formula=self.formula,
            bounds=self.bounds,
            charts=tuple(self.charts(row, prefix)) if layer is None else (),
            panels=() if panel is None else (replace(panel, title=panel.title.format(row=row)),),
        )


class ShareOfOthers(LayerMetric):
    """The share of those that are not of the kind that is counted: `sums` gives the number of all, and of the kind."""

    bounds, good, parts = "0 to 1", "0", ("all", "kind")

    def value(self, everything: Any, kind: Any) -> Any:
        """1 - the share of the kind."""
        return 1 - kind / everything


def layer_infos(metrics: Sequence[LayerMetric], num_layers: int = 0, prefix: str = DEDUCTIVE) -> tuple[MetricInfo, ...]:
    """Return the declarations of metrics: over all layers, and for each of `num_layers`."""
    return tuple(
        metric.info(row, layer, prefix)
        for layer in (None, *range(num_layers))
        for row in rows_of(metrics)
        for metric in metrics
        if row in metric.rows
    )


def rows_of(metrics: Sequence[LayerMetric]) -> tuple[str, ...]:
    """Return all rows of metrics, each once."""
    return tuple(dict.fromkeys(row for metric in metrics for row in metric.rows))


# ------------------------------------------------------------------------------------------------------------ attention


class AttentionMetric(LayerMetric):
    """A metric of the attention weights: `sums` is given `AttentionRows`."""

    rows: ClassVar[Sequence[str]] = (ATTENTION,)


class Entropy(AttentionMetric):
    """The mean entropy of a row."""

    name, unit, meaning = "entropy", "nat", "entropy of a row's weights"
    reduction = "mean over the finite rows of batches, heads and processes"
    formula, bounds = "mean over rows of -sum p ln p", "0 to ln S"
    good = "falls from its first value, not to 0"
    panel = Panel(DEDUCTIVE_OUTPUTS, "Entropy of attention")

    def sums(self, rows: AttentionRows) -> Sequence[Tensor]:
        """Return the sum over the finite rows, and their number."""
        return rows.entropy.where(rows.finite, 0.0).sum(), rows.finite.sum()


class RelativeEntropy(AttentionMetric):
    """The mean entropy of a row, over the largest that it may have."""

    name, meaning = "relative_entropy", "entropy over ln of the positions seen"
    reduction = f"{Entropy.reduction} that see two positions or more"
    formula, bounds = "mean over rows of entropy / ln(visible positions)", "0 to 1"
    good = "falls from its first value, not to 0; 0.86 at initialisation (110M, 256 tokens)"
    panel = Panel(DEDUCTIVE_OUTPUTS, "Entropy of attention, over its largest")
    layer_panel = Panel(DEDUCTIVE_OUTPUTS, "Entropy of attention by layer, over its largest", 2005)

    def sums(self, rows: AttentionRows) -> Sequence[Tensor]:
        """Return the sum over the finite rows that see two positions or more, and their number."""
        comparable = rows.finite & (rows.visible > 1)
        relative = rows.entropy / rows.visible.double().log()
        return relative.where(comparable, 0.0).sum(), comparable.sum()


class RowNonfiniteShare(ShareOfOthers, AttentionMetric):
    """The share of rows with NaN."""

    name, meaning = "nonfinite_share", "share of rows with NaN"
    reduction = "over the rows of batches, heads and processes"
    formula = "rows with NaN / rows"

    def sums(self, rows: AttentionRows) -> Sequence[Tensor]:
        """Return the number of the rows that see something, and of the finite ones."""
        return rows.seen.sum(), rows.finite.sum()


ATTENTION_METRICS: list[AttentionMetric] = [Entropy(), RelativeEntropy(), RowNonfiniteShare()]


# ------------------------------------------------------------------------------------------- the power law's parameters


class ParameterMetric(LayerMetric):
    """A metric of W, P and a, of their squares' sum and their number of elements; the weights' shares add up."""

    rows: ClassVar[Sequence[str]] = tuple(PARAMETERS)
    cadence: ClassVar[str] = AT_LOG_STEPS
    reduction: ClassVar[str] = "the step's own"
    parts: ClassVar[Sequence[str]] = ("squares", "elements")

    def sums(self, squares: float, elements: float) -> Sequence[float]:
        """As they are."""
        return squares, elements


class ParameterRms(ParameterMetric):
    """The RMS."""

    name, meaning, formula = "rms", "RMS of all elements", "RMS of the elements"
    good = "steady; 0.020 at initialisation (110M)"
    panel = Panel(OPTIMISATION, "Power law: RMS")
    layer_panel = Panel(OPTIMISATION, "Power law: RMS of {row} by layer")

    def value(self, squares: float, elements: float) -> float:
        """Return the RMS."""
        return math.sqrt(squares / elements)


class ParameterNorm(ParameterMetric):
    """The 2-norm."""

    name, meaning, formula = "norm", "2-norm of all elements", "2-norm of all elements"
    good = "steady; 10.7 at initialisation (110M)"

    def value(self, squares: float, elements: float) -> float:
        """Return the norm."""
        return math.sqrt(squares)


PARAMETER_METRICS: list[ParameterMetric] = [ParameterRms(), ParameterNorm()]
