"""Comparisons with the golden figures at their tolerances; each checks that both sides have the very same names."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

TENSOR_RTOL = 2e-4
LOSS_RTOL = 1e-5
GRADIENT_NORM_RTOL = 1e-4


def assert_tensors_close(actual: Mapping[str, Tensor | None], expected: Mapping[str, Tensor]) -> None:
    """Elementwise at rtol 2e-4; elements far below a tensor's own scale are rounding of its larger ones."""
    assert sorted(actual) == sorted(expected)
    for name, reference in expected.items():
        value = actual[name]
        assert value is not None, name
        atol = TENSOR_RTOL * 0.1 * float(reference.abs().max())
        torch.testing.assert_close(
            value.detach(), reference, rtol=TENSOR_RTOL, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


def assert_losses_close(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert sorted(actual) == sorted(expected)
    for name, reference in expected.items():
        relative = abs(float(actual[name]) / float(reference) - 1.0)
        assert relative <= LOSS_RTOL, f"{name}: {float(actual[name])} against {float(reference)}"


def assert_gradients_close(actual: Mapping[str, Tensor | None], expected: Mapping[str, Tensor]) -> None:
    """||a - b|| / ||b|| <= 1e-4 for every gradient; one that is zero in the goldens must vanish here too."""
    assert sorted(actual) == sorted(expected)
    largest = max(float(reference.norm()) for reference in expected.values())
    for name, reference in expected.items():
        value = actual[name]
        assert value is not None, f"{name} has no gradient"
        distance = float((value - reference).norm())
        # A gradient that is zero by construction holds rounding alone, so its own norm is no scale.
        scale = max(float(reference.norm()), 1e-4 * largest)
        assert distance <= GRADIENT_NORM_RTOL * scale, f"{name}: {distance / scale:.2e} off"
