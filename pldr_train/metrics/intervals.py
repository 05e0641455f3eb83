"""Confidence intervals of means. Free of torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import stdev

NORMAL_95 = 1.959963984540054
_STUDENT_95 = (12.706204736, 4.302652730, 3.182446305, 2.776445105, 2.570581836)
"""97.5 % quantiles of Student's t with 1 to 5 degrees of freedom."""


def student_95(degrees: int) -> float:
    """97.5 % quantile of Student's t, to 2e-3 (Cornish and Fisher's expansion about the normal one)."""
    if degrees <= len(_STUDENT_95):
        return _STUDENT_95[degrees - 1]
    z = NORMAL_95
    return (
        z
        + (z**3 + z) / (4 * degrees)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * degrees**3)
    )


def half_width_95(values: Sequence[float]) -> float | None:
    """Half of Student's 95 % interval about the mean of independent values; None of fewer than two."""
    if len(values) < 2:
        return None
    return student_95(len(values) - 1) * stdev(values) / math.sqrt(len(values))


def clustered_95(
    rows: float, targets: float, total: float, squares: float, by_targets: float, targets_squares: float
) -> tuple[float, float, float]:
    """Return a mean over targets and the ends of its 95 % interval with rows as units; infinite for one row.

    The mean m is the sum of values over the number of targets. Targets of a row depend on each other, so rows are the
    units: with T_r the sum of row r, n_r its targets and N all targets of R rows,
    var(m) = R / (R - 1) * sum_r (T_r - m n_r)^2 / N^2, and the interval is m +- t sqrt(var(m)) with Student's t of
    R - 1 degrees of freedom. Where all rows have equally many targets that is the interval of the mean of row means.

    Args:
        rows: R, those with at least one target.
        targets: N, at least 1.
        total: sum of all T_r.
        squares: sum of all T_r^2.
        by_targets: sum of all T_r n_r.
        targets_squares: sum of all n_r^2.
    """
    mean, half = total / targets, math.inf
    if rows > 1:
        spread = squares - 2 * mean * by_targets + mean**2 * targets_squares
        half = student_95(round(rows) - 1) * math.sqrt(rows / (rows - 1) * max(spread, 0.0) / targets**2)
    return mean, mean - half, mean + half
