"""The figures that tables of runs and of sweeps show: which metrics, under which names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Literal

from pldr_train.metrics.catalog import GAP, SEQUENTIAL_NLL, TOKENS_PER_S, VAL, VAL_CROSS_ENTROPY, dag_name
from pldr_train.metrics.layer_metrics import CACHED, CONTINUATIONS, DEDUCTIVE

_LAST_PART = 0.25
"""Of a run: over it the author's row study takes the mean of the row map's Jacobian."""


@dataclass(frozen=True)
class Column:
    """A figure of a trial: what is taken of a metric."""

    metric: str
    label: str
    unit: str = ""
    best: str | None = "min"
    """min, max, or None where neither is good."""
    take: Literal["last", "median", "last quarter"] = "last"
    """The last value, the median over the run, or the mean over its last quarter."""

    def of(self, points: Sequence[tuple[int, float]]) -> float | None:
        """Return the figure from a metric's finite values after steps, in their order; None without any."""
        if not points:
            return None
        if self.take == "median":
            return median(value for _, value in points)
        since = points[-1][0] * (1 - _LAST_PART) if self.take == "last quarter" else points[-1][0]
        return fmean(value for step, value in points if step >= since)


COLUMNS = (
    Column(VAL_CROSS_ENTROPY, "Block loss", "nat/token"),
    Column(SEQUENTIAL_NLL, "Sequential NLL", "nat/token"),
    Column(GAP, "Gap", "nat/token", None),
    Column(f"{VAL}/{dag_name('A_LM')}", "DAG loss of A_LM", "nat"),
    Column(f"{VAL}/{dag_name('A_P')}", "DAG loss of A_P", "nat"),
    Column(f"{VAL}/{dag_name('G_LM')}", "DAG loss of G_LM", "nat"),
    Column(f"{CONTINUATIONS}/G_LM/bounded", "Order parameter, bounded", "", None),
    Column(f"{CACHED}/G_LM/relative_rmse", "Order parameter, published form", "", None),
    Column(f"{DEDUCTIVE}/A/row_map_collapse", "Variance between rows of A", "", None),
    Column(f"{DEDUCTIVE}/A/row_contrast", "Row contrast of A", "", None),
    Column(f"{DEDUCTIVE}/A/row_map_jacobian", "Row map's Jacobian", "", None, take="last quarter"),
    Column(f"{DEDUCTIVE}/A/rank", "Rank of A", "", None),
    Column(f"{DEDUCTIVE}/G_LM/commutant_residual", "G outside of the rotations' commutant", "", None),
    Column(TOKENS_PER_S, "Throughput", "tokens/s", "max", take="median"),
)
"""In the order of the tables; those that no trial has are left out."""
