"""Comparisons with the golden figures at their tolerances; each checks that both sides have the very same names."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

TENSOR_RTOL = 2e-4
LOSS_RTOL = 1e-5
GRADIENT_NORM_RTOL = 1e-4


def assert_tensors_close(
    actual: Mapping[str, Tensor | None], expected: Mapping[str, Tensor], atol: float | None = None
) -> None:
    """Elementwise at rtol 2e-4; `atol` is by default that part of a tensor's largest element."""
    assert sorted(actual) == sorted(expected)
    for name, reference in expected.items():
        value = actual[name]
        assert value is not None, name
        torch.testing.assert_close(
            value.detach(),
            reference,
            rtol=TENSOR_RTOL,
            atol=TENSOR_RTOL * float(reference.abs().max()) if atol is None else atol,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def assert_losses_close(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert sorted(actual) == sorted(expected)
    for name, reference in expected.items():
        value = actual[name].detach()
        assert abs(float(value) / float(reference) - 1.0) <= LOSS_RTOL, f"{name}: {value} against {reference}"


def assert_gradients_close(
    actual: Mapping[str, Tensor | None], expected: Mapping[str, Tensor], exact: Mapping[str, Tensor]
) -> None:
    """||a - b|| / ||b|| <= 1e-4 for every gradient, or it is no further from the exact one than the goldens are.

    The power law amplifies last bits: the fp32 goldens themselves are up to 2e-4 (tiny) and 3e-4 (wide) away from the
    `exact` gradients (fp64), so a CPU with other matrix kernels may be closer to the truth and further from them.
    """
    assert sorted(actual) == sorted(expected) == sorted(exact)
    own_rounding = max(_relative_distance(expected[name], exact[name]) for name in expected)
    assert own_rounding < 4e-4
    for name, reference in expected.items():
        value = actual[name]
        assert value is not None, f"{name} has no gradient"
        distance, error = _relative_distance(value, reference), _relative_distance(value, exact[name])
        assert distance <= GRADIENT_NORM_RTOL or error <= own_rounding, f"{name}: {distance:.2e} off, {error:.2e} wrong"


def _relative_distance(value: Tensor, reference: Tensor) -> float:
    norm = float(reference.norm())
    assert norm > 0
    return float((value - reference).norm()) / norm
