"""The Triton kernel of log_trace_exp: in Triton's interpreter against exact figures, and compiled without a GPU."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pldr_train.dag import log_trace_exp
from pldr_train.dag.log_trace_exp import (
    TRITON_SWITCH,
    _computes_the_same,
    _examples,
    _fixed_sequence,
    _grouped,
    _kernel_of_capability,
    kernel_for,
    kernel_limits,
)
from pldr_train.model import refining
from tests.unit.test_log_trace_exp import CASES, GOLDENS, random_cases
from tests.unit.triton_case import compiled_without_spills, interpret

pytest.importorskip("triton", reason="Triton is not installed")

from pldr_train.dag import one_kernel

pytestmark = pytest.mark.slow

TOLERANCE = 2e-6

IN_THE_INTERPRETER = """
import sys
import torch
from pldr_train.dag import one_kernel
from pldr_train.dag.log_trace_exp import _PRECISIONS, kernel_limits

cases, found = torch.load(sys.argv[1]), {}
for name, matrix in cases.items():
    block = max(16, 1 << (matrix.shape[-1] - 1).bit_length())
    shape, theta = one_kernel.Shape(block, 1), _PRECISIONS[torch.float32].theta
    found[name] = one_kernel.evaluate(matrix, True, shape, theta, kernel_limits())
    if name.startswith(("golden", "one")):
        value, gradient = one_kernel.evaluate(matrix, False, shape, theta, kernel_limits())
        assert gradient.shape == (0,)
        assert torch.equal(value, found[name][0]) or bool(value.isnan().any()), name
torch.save(found, sys.argv[2])
"""


def cases() -> dict[str, Tensor]:
    torch.manual_seed(0)
    found = {f"golden {case}": GOLDENS[f"{case}/matrix"][None].contiguous() for case in CASES}
    for d in (8, 16, 20):
        found |= {f"{name}, d {d}": matrix[None].contiguous() for name, matrix in random_cases(d).items()}
    scales = torch.tensor([1e-9, 0.1, 0.3, 1.0, 2.0, 30.0, 1e4, 3e5, 1e10])[:, None, None]
    found["scales"] = scales * torch.randn(9, 32, 32)
    found["examples"] = _examples(24, torch.device("cpu"))
    found["potential"] = 1.0 + 0.01 * torch.randn(2, 64, 64)
    for scale in (1e4, 1e9, 1e18):
        found[f"all {scale:g}"] = torch.full((1, 16, 16), scale)
        found[f"no cycle {scale:g}"] = torch.full((1, 32, 32), scale).triu(1)
    for bad in (math.nan, math.inf):
        found[f"one {bad}"] = torch.rand(3, 16, 16)
        found[f"one {bad}"][1, 2, 3] = bad
    return found


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tensor, tuple[Tensor, Tensor]]]:
    """Each case's matrices with what the kernel makes of them."""
    folder = tmp_path_factory.mktemp("interpreted")
    given = cases()
    torch.save(given, folder / "cases.pt")
    interpret(IN_THE_INTERPRETER, folder / "cases.pt", folder / "found.pt")
    found = torch.load(folder / "found.pt")
    return {name: (matrix, found[name]) for name, matrix in given.items()}


def test_values_are_the_exact_figures(interpreted: Any) -> None:
    for case in CASES:
        reference = GOLDENS[f"{case}/log_trace_ratio"].item()
        value = interpreted[f"golden {case}"][1][0].item()
        assert abs(value - reference) <= TOLERANCE * reference, case


def test_values_and_gradients_are_those_in_fp64(interpreted: Any) -> None:
    for name, (matrix, (value, gradient)) in interpreted.items():
        if name.startswith(("one", "all 1e+18", "scales")):
            continue
        expected, expected_gradient = _grouped(matrix.double(), True)
        assert ((value - expected).abs() <= TOLERANCE * expected).all(), name
        error = (gradient - expected_gradient).flatten(1).norm(dim=1)
        assert (error <= 3 * TOLERANCE * expected_gradient.flatten(1).norm(dim=1)).all(), name


def test_it_computes_what_the_launch_sequence_does_at_any_scale(interpreted: Any) -> None:
    matrix, (value, gradient) = interpreted["scales"]
    fixed, fixed_gradient = _fixed_sequence(matrix, True)
    torch.testing.assert_close(value, fixed, rtol=TOLERANCE, atol=0)
    for got, expected in zip(gradient, fixed_gradient, strict=True):
        assert (got - expected).norm() <= 10 * TOLERANCE * expected.norm()


def test_it_passes_the_comparison_of_its_first_use(interpreted: Any) -> None:
    matrix, found = interpreted["examples"]
    assert _computes_the_same(lambda *_: found, matrix)


def test_huge_dense_matrices_give_the_spectral_radius_and_graphs_without_cycles_zero(interpreted: Any) -> None:
    for scale in (1e4, 1e9, 1e18):
        matrix, (value, gradient) = interpreted[f"all {scale:g}"]
        assert value.item() == pytest.approx(16 * scale**2, rel=3e-6)
        torch.testing.assert_close(gradient, 2 * matrix / 16, rtol=1e-5, atol=0)
        _, (value, gradient) = interpreted[f"no cycle {scale:g}"]
        assert value.item() == 0.0
        assert not gradient.any()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_matrix_that_is_not_finite_shows_it_and_leaves_its_neighbours_alone(interpreted: Any, bad: float) -> None:
    matrix, (value, _) = interpreted[f"one {bad}"]
    expected = _grouped(matrix.double(), False)[0]
    torch.testing.assert_close(value[[0, 2]].double(), expected[[0, 2]], rtol=TOLERANCE, atol=0)
    assert not value[1].isfinite()


# Compilation.


@pytest.mark.parametrize(
    ("d", "capability"),
    [(16, 80), (24, 80), (32, 80), (48, 80), (64, 80), (16, 90), (32, 90), (64, 90)],
)
def test_it_compiles_within_shared_memory_and_without_spills(d: int, capability: int) -> None:
    shape = one_kernel.shape_of(d, divmod(capability, 10))
    assert shape is not None
    constants = one_kernel.constants(d, shape, True, kernel_limits())
    types = dict.fromkeys(("matrix", "value", "gradient"), "*fp32") | {"theta": "fp32"}
    options = one_kernel.options(shape)
    assert compiled_without_spills(one_kernel.log_trace_exp_kernel, types, constants, options, capability)


def test_sizes_and_devices_that_it_does_not_know_are_left_to_the_launch_sequence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken = {
        cap: [d for d in (8, 16, 32, 33, 64, 65, 128) if _kernel_of_capability((cap, 0), d)] for cap in (7, 8, 9, 10)
    }
    assert taken == {7: [], 8: [16, 32, 33, 64], 9: [16, 32, 33, 64], 10: []}
    assert kernel_for(torch.device("meta"), 64) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    for name in ("_examples", "_computes_the_same"):
        monkeypatch.setitem(kernel_for.__wrapped__.__globals__, name, lambda *_: True)
    assert kernel_for.__wrapped__(torch.device("cuda"), 64) is not None
    assert TRITON_SWITCH == refining.TRITON_SWITCH
    monkeypatch.setenv(TRITON_SWITCH, "0")
    assert kernel_for.__wrapped__(torch.device("cuda"), 64) is None
    assert log_trace_exp(torch.empty(2, 64, 64, device="meta")).shape == (2,)


@pytest.mark.gpu
@pytest.mark.parametrize("d", [16, 24, 32, 64])
def test_on_a_gpu_it_gives_the_values_and_gradients_of_fp64(d: int) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    device = torch.device("cuda")
    if one_kernel.shape_of(d, torch.cuda.get_device_capability(device)) is None:
        pytest.skip("the kernel does not take this size on this device")
    kernel = kernel_for(device, d)
    assert kernel is not None
    for name, matrix in random_cases(d).items():
        value, gradient = kernel(matrix[None].to(device).contiguous(), True)
        expected, expected_gradient = _grouped(matrix[None].double(), True)
        assert abs(value.item() - expected.item()) <= TOLERANCE * expected.item(), name
        assert (gradient.cpu() - expected_gradient).norm() <= 3 * TOLERANCE * expected_gradient.norm(), name
