"""The figures that tables of runs and of sweeps show: which metrics, under which names."""

from __future__ import annotations

from dataclasses import dataclass

from pldr_train.metrics.catalog import GAP, SEQUENTIAL_NLL, TOKENS_PER_S, VAL, VAL_CROSS_ENTROPY, dag_name
from pldr_train.metrics.layer_metrics import CACHED, CONTINUATIONS, DEDUCTIVE


@dataclass(frozen=True)
class Column:
    """A figure of a trial: what a metric is at its end."""

    metric: str
    label: str
    unit: str = ""
    best: str | None = "min"
    """min, max, or None where neither is good."""
    is_rate: bool = False
    """The median over the run, instead of the last value."""


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
    Column(f"{DEDUCTIVE}/A/rank", "Rank of A", "", None),
    Column(TOKENS_PER_S, "Throughput", "tokens/s", "max", is_rate=True),
)
"""In the order of the tables; those that no trial has are left out."""
