"""Confidence intervals of means. Free of torch."""

from __future__ import annotations

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
