"""Every metric that a run may write: the table of the deductive ones, by layer, and all tables together.

Free of torch, so that reports can name and explain metrics without it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from .table import AT_LOG_STEPS, AT_VALIDATIONS, DAG_TENSORS, METRICS, MetricInfo

TENSORS: Mapping[str, str] = {"A": "metric", "A_LM": "positive_metric", "A_P": "potential", "G_LM": "curvature"}
"""The field's names of the deductive outputs, and the attributes that hold them."""

PARAMETERS: Mapping[str, str] = {"W": "metric_weight", "P": "power_exponent", "a": "coupling"}
"""The field's names of the power law's parameters, and the attributes that hold them."""

MAX_GAP_NAT = 0.05
"""nat/token: what the gap between sequential and block NLL may be where a recipe does not say."""


def gap_verdict(low: float, high: float, max_gap: float = MAX_GAP_NAT) -> str:
    """Return what the 95 % interval of the gap between sequential and block NLL says, all in nat/token.

    The only judgement of a gap: training, reports, `watch` and `evaluate` ask it.

    Returns:
        "leaks": the interval lies above `max_gap`; "reversed": it lies below -`max_gap`, so a block is predicted worse
        than its prefixes are; "none": its upper end is at most `max_gap`; "undecided": it reaches over `max_gap`.
    """
    if low > max_gap:
        return "leaks"
    if high < -max_gap:
        return "reversed"
    return "none" if high <= max_gap else "undecided"


CHEAP, COSTLY = "cheap", "costly"
DEDUCTIVE = "deductive"
"""The group that all names of these metrics begin with."""

_POOLED = "over all elements of batches and processes"
_FINITE = "over the finite elements of batches and processes"
_MATRICES = "mean over the finite matrices of batches, heads and processes"
_ROWS: Mapping[str, tuple[tuple[str, str, str, str], ...]] = {
    CHEAP: (
        ("mean", "1", _FINITE, "mean"),
        ("spread", "1", _FINITE, "standard deviation"),
        ("min", "1", _FINITE, "least element"),
        ("max", "1", _FINITE, "greatest element"),
        ("abs_mean", "1", _FINITE, "mean of the absolute values"),
        ("nonfinite_share", "1", _POOLED, "share of elements that are NaN or infinite"),
        ("row_map_collapse", "1", _MATRICES, "share of a matrix's variance that lies between its rows"),
        (
            "cross_head_rms",
            "1",
            "pooled over finite samples",
            "RMS of the deviation from the heads' mean, over the RMS",
        ),
        (
            "input_sensitivity",
            "1",
            "pooled over finite samples",
            "RMS of the deviation from the inputs' mean, over the RMS",
        ),
    ),
    COSTLY: (
        ("spectral_norm", "1", _MATRICES, "largest singular value"),
        ("log_abs_det", "nat", _MATRICES + ", without determinants of exactly 0", "ln |det|"),
        ("singular_share", "1", _MATRICES, "share of matrices whose determinant is exactly 0"),
        ("rank", "1", _MATRICES, "singular values above d * 1.2e-7 of the largest"),
    ),
}
_CADENCES = {CHEAP: AT_LOG_STEPS, COSTLY: AT_VALIDATIONS}
_NORMS = (("rms", "RMS of all elements"), ("norm", "2-norm of all elements"))


def deductive_metric_infos(
    num_layers: int = 0, sets: Collection[str] = (CHEAP, COSTLY), prefix: str = DEDUCTIVE
) -> tuple[MetricInfo, ...]:
    """Rows for the table of metrics: over all layers, and for each of `num_layers`."""
    return tuple(
        MetricInfo(f"{group}/{tensor}/{name}", unit, reduction, f"{tensor}{where}: {meaning}", _CADENCES[each])
        for group, where in metric_groups(prefix, num_layers)
        for tensor in TENSORS
        for each in (CHEAP, COSTLY)
        if each in sets
        for name, unit, reduction, meaning in _ROWS[each]
        if name != "input_sensitivity" or tensor == "G_LM"
    )


def parameter_metric_infos(num_layers: int = 0, prefix: str = DEDUCTIVE) -> tuple[MetricInfo, ...]:
    """Rows for the table of metrics: over all layers, and for each of `num_layers`."""
    return tuple(
        MetricInfo(f"{group}/{parameter}/{name}", "1", "the step's own", f"{parameter}{where}: {meaning}")
        for group, where in metric_groups(prefix, num_layers)
        for parameter in PARAMETERS
        for name, meaning in _NORMS
    )


def metric_groups(prefix: str, num_layers: int) -> list[tuple[str, str]]:
    """Beginnings of names with words for them: over all layers, then each one."""
    layers = [(f"{prefix}/layer_{layer}", f" of layer {layer}") for layer in range(num_layers)]
    return [(prefix, " of all layers"), *layers]


def order_parameter_infos(num_layers: int = 0, prefix: str = "order_parameter") -> tuple[MetricInfo, ...]:
    """Rows for the table of metrics: over the whole model, and for each of `num_layers`."""
    pooled = "over the elements of prompts and processes that are finite in both runs"
    rows = (
        ("relative_rmse", pooled, "RMSE of two runs over the absolute mean of the first"),
        ("bounded", pooled, "RMS of the difference of two runs over the mean of their RMS"),
        (
            "nonfinite_share",
            "over the elements of prompts and processes",
            "share that is not finite in one of the runs",
        ),
    )
    return tuple(
        MetricInfo(f"{group}/{tensor}/{name}", "1", reduction, f"{tensor}{where}: {meaning}", AT_VALIDATIONS)
        for group, where in metric_groups(prefix, num_layers)
        for tensor in TENSORS
        for name, reduction, meaning in rows
    )


def attention_metric_infos(num_layers: int = 0, prefix: str = DEDUCTIVE) -> tuple[MetricInfo, ...]:
    """Rows for the table of metrics: over all layers, and for each of `num_layers`."""
    mean = "mean over the finite rows of batches, heads and processes"
    rows = (
        ("entropy", "nat", mean, "entropy of a row's weights"),
        ("relative_entropy", "1", mean + " that see two positions or more", "entropy over ln of the positions seen"),
        ("nonfinite_share", "1", "over the rows of batches, heads and processes", "share of rows with NaN"),
    )
    return tuple(
        MetricInfo(f"{group}/attention/{name}", unit, reduction, f"attention{where}: {meaning}", AT_VALIDATIONS)
        for group, where in metric_groups(prefix, num_layers)
        for name, unit, reduction, meaning in rows
    )


CONTINUATIONS, CACHED = f"{DEDUCTIVE}/order_parameter", f"{DEDUCTIVE}/cached_order_parameter"
"""Of two continuations (x1, x2) and of a cached run and a continuation (xc, x1), as the papers' source calls them."""


def dag_layer_infos(num_layers: int) -> tuple[MetricInfo, ...]:
    """Rows for the DAG losses of single layers."""
    return tuple(
        MetricInfo(
            f"{prefix}/dag/layer_{layer}/{name}", "nat", reduction, f"DAG loss of {meaning} in layer {layer}", cadence
        )
        for prefix, reduction, cadence in (
            ("train", "mean over heads and sequences of the step", AT_LOG_STEPS),
            ("val", "mean over heads and sequences of the validation rows", AT_VALIDATIONS),
        )
        for layer in range(num_layers)
        for name, meaning in DAG_TENSORS.items()
    )


def all_metrics(num_layers: int) -> tuple[MetricInfo, ...]:
    """Every metric that a run of a model with a learned G may write."""
    cached = order_parameter_infos(num_layers, CACHED)
    return (
        *METRICS,
        *dag_layer_infos(num_layers),
        *deductive_metric_infos(num_layers),
        *parameter_metric_infos(num_layers),
        *attention_metric_infos(num_layers),
        *order_parameter_infos(num_layers, CONTINUATIONS),
        *(replace(info, meaning=f"{info.meaning}, the first cached") for info in cached),
    )
