"""log_trace_exp against exact figures, its gradient, its range, and what it promises about batches and compilers."""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path
from typing import Any

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from pldr_train.dag import log_trace_exp
from pldr_train.dag.log_trace_exp import (
    _computes_the_same,
    _examples,
    _fixed_sequence,
    _full_matmul_precision,
    _grouped,
)
from pldr_train.model import PldrllmConfig
from pldr_train.model.power_law_attention import METRIC_FLOOR, PowerLaw

GOLDENS = load_file(Path(__file__).parents[1] / "goldens" / "dag_matrices.safetensors")
CASES = sorted(key.removesuffix("/matrix") for key in GOLDENS if key.endswith("/matrix"))
TOLERANCES = {torch.float32: 2e-6, torch.float64: 1e-12}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCES, ids=["fp32", "fp64"])


def exact(matrix: Tensor) -> tuple[float, Tensor]:
    """Value and gradient in 300-digit arithmetic."""
    d = matrix.shape[0]
    with mpmath.workdps(300):
        rows = [[mpmath.mpf(entry) for entry in row] for row in matrix.double().tolist()]
        n = mpmath.matrix([[entry**2 for entry in row] for row in rows])
        halvings = 4 + max(0, int(mpmath.ceil(mpmath.log(mpmath.mnorm(n, 1) + 1, 2))))
        a, exponential, term = n / mpmath.mpf(2) ** halvings, mpmath.eye(d), mpmath.eye(d)
        for k in range(1, 100):
            term = term * a / k
            exponential += term
        for _ in range(halvings):
            exponential = exponential * exponential
        trace = sum(exponential[i, i] for i in range(d))
        gradient = [[float(2 * rows[i][j] * exponential[j, i] / trace) for j in range(d)] for i in range(d)]
        return float(mpmath.log(trace / d)), torch.tensor(gradient, dtype=torch.float64)


def value_and_gradient(matrix: Tensor) -> tuple[Tensor, Tensor]:
    leaf = matrix.clone().requires_grad_()
    value = log_trace_exp(leaf)
    value.sum().backward()
    assert leaf.grad is not None
    return value.detach(), leaf.grad


def by_matrix_exp(matrix: Tensor) -> Tensor:
    exponential = torch.linalg.matrix_exp(matrix * matrix)
    return (exponential.diagonal(dim1=-2, dim2=-1).sum(-1) / matrix.shape[-1]).log()


def random_cases(d: int = 8) -> dict[str, Tensor]:
    noise = torch.randn(d, d)
    upper, order = noise.triu(1), torch.randperm(d)
    return {
        "normal": noise,
        "entries 1e-10": 1e-10 * torch.rand(d, d),
        "entries 1e-9": 1e-9 * torch.rand(d, d),
        "entries 1e4": 1e4 * noise,
        "triangular 30 and diagonal": 30 * upper + torch.diag(noise.diagonal()),
        "triangular 1e4 and diagonal": 1e4 * upper + torch.eye(d),
        "transposed triangular 1e3 and diagonal": 1e3 * upper.T + 3 * torch.diag(noise.diagonal()),
        "permuted triangular 1e3 and diagonal": (1e3 * upper + 3 * torch.diag(noise.diagonal()))[order][:, order],
        "nearly triangular 1e4 over 1e-3": 1e4 * upper + 1e-3 * torch.rand(d, d).tril(),
    }


@DTYPES
def test_value_matches_the_exact_figures(dtype: torch.dtype) -> None:
    assert len(CASES) == 9
    for case in CASES:
        reference = GOLDENS[f"{case}/log_trace_ratio"].item()
        value = log_trace_exp(GOLDENS[f"{case}/matrix"].to(dtype)).item()
        if reference == 0.0:
            assert value == 0.0, case
        else:
            assert abs(value - reference) <= TOLERANCES[dtype] * reference, case


@DTYPES
@pytest.mark.parametrize("path", [_grouped, _fixed_sequence], ids=["grouped", "fixed"])
def test_value_and_gradient_match_multiprecision_arithmetic(dtype: torch.dtype, path: Any) -> None:
    for case, matrix in random_cases().items():
        reference, reference_gradient = exact(matrix)
        value, gradient = path(matrix.to(dtype)[None], True)
        assert abs(value.item() - reference) <= TOLERANCES[dtype] * reference, case
        error = (gradient[0].double() - reference_gradient).norm()
        assert error <= 3 * TOLERANCES[dtype] * reference_gradient.norm(), case


@DTYPES
def test_a_graph_without_cycles_has_value_and_gradient_zero_however_large_its_entries(dtype: torch.dtype) -> None:
    for scale in (1.0, 1e4, 1e9, 1e18, 1e30):
        value, gradient = value_and_gradient(torch.full((32, 32), scale, dtype=dtype).triu(1))
        assert value.item() == 0.0
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_a_cycle_longer_than_the_polynomial_degree_is_seen_at_a_norm_above_one() -> None:
    d = 12
    cycle = torch.eye(d, dtype=torch.float64).roll(1, 0) * 1.5
    expected = math.log(sum(1.5 ** (2 * d * k) / math.factorial(d * k) for k in range(12)))
    assert log_trace_exp(cycle).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("scale", [1e4, 1e9, 1e18])
@pytest.mark.parametrize("path", [_grouped, _fixed_sequence], ids=["grouped", "fixed"])
def test_huge_dense_matrices_give_the_spectral_radius(scale: float, path: Any) -> None:
    d = 16
    matrix = torch.full((1, d, d), scale)
    value, gradient = path(matrix, True)
    assert value.item() == pytest.approx(d * scale**2, rel=3e-6)  # all ones has spectral radius d
    torch.testing.assert_close(gradient, 2 * matrix / d, rtol=1e-5, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("path", [_grouped, _fixed_sequence], ids=["grouped", "fixed"])
def test_a_matrix_that_is_not_finite_shows_it_and_leaves_its_neighbours_alone(bad: float, path: Any) -> None:
    matrix = torch.rand(3, 16, 16)
    clean, _ = path(matrix, False)
    matrix[1, 2, 3] = bad
    value, _ = path(matrix, True)
    assert not value[1].isfinite()
    assert value[1].isnan() or not math.isnan(bad)
    assert torch.equal(value[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("d", [64, 96, 128])
def test_initial_potentials_stay_finite_where_matrix_exp_overflows(d: int) -> None:
    matrix = 1 + 0.01 * torch.randn(2, d, d)
    value, gradient = value_and_gradient(matrix)
    assert torch.isfinite(gradient).all()
    torch.testing.assert_close(value, by_matrix_exp(matrix.double()).float(), rtol=2e-6, atol=0)
    assert torch.isinf(by_matrix_exp(matrix)).all() == (d > 64)


def test_gradient_matches_finite_differences() -> None:
    for scale in (1e-3, 0.3, 1.5, 4.0):
        matrix = (scale * torch.randn(2, 3, 5, 5, dtype=torch.float64)).requires_grad_()
        assert torch.autograd.gradcheck(log_trace_exp, (matrix,), eps=1e-6 * scale, atol=1e-7, rtol=1e-5)


@DTYPES
def test_gradient_matches_autograd_through_matrix_exp(dtype: torch.dtype) -> None:
    matrix = torch.randn(4, 24, 24, dtype=dtype)
    reference = matrix.double().clone().requires_grad_()
    by_matrix_exp(reference).sum().backward()
    _, gradient = value_and_gradient(matrix)
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient.double(), reference.grad, rtol=10 * TOLERANCES[dtype], atol=1e-14)


@pytest.mark.parametrize("d", [32, 64])
def test_a_matrix_gives_the_same_bits_alone_and_in_any_batch(d: int) -> None:
    scales = torch.tensor([1e-9, 0.1, 0.3, 1.0, 2.0, 30.0, 1e4]).repeat(3)[:, None, None]
    matrix = scales * torch.randn(21, d, d)
    value, gradient = _grouped(matrix, True)
    for chunk_bytes in (1, 3 * 4 * d * d):
        for got, expected in zip(_grouped(matrix, True, chunk_bytes), (value, gradient), strict=True):
            assert torch.equal(got, expected)
    for i in range(7):
        alone, gradient_alone = _grouped(matrix[i : i + 1], True)
        assert torch.equal(alone[0], value[i])
        assert torch.equal(gradient_alone[0], gradient[i])
    assert torch.equal(_grouped(matrix.flip(0), False)[0].flip(0), value)


@DTYPES
def test_the_fixed_launch_sequence_equals_the_grouped_path(dtype: torch.dtype) -> None:
    scales = torch.tensor([1e-9, 0.1, 0.3, 1.0, 2.0, 30.0, 1e4, 3e5, 1e10], dtype=dtype)[:, None, None]
    matrix = scales * torch.randn(9, 32, 32, dtype=dtype)
    value, gradient = _grouped(matrix, True)
    fixed, fixed_gradient = _fixed_sequence(matrix, True)
    torch.testing.assert_close(fixed, value, rtol=TOLERANCES[dtype], atol=0)
    for got, expected in zip(fixed_gradient, gradient, strict=True):
        assert (got - expected).norm() <= 10 * TOLERANCES[dtype] * expected.norm()
    assert torch.equal(_fixed_sequence(matrix, False)[0], fixed)


def test_the_fixed_launch_sequence_never_reads_a_value_back() -> None:
    matrix = torch.empty(3, 16, 16, device="meta")  # without data, any read raises
    with pytest.raises(RuntimeError, match="meta"):
        bool(matrix.any())
    value, gradient = _fixed_sequence(matrix, True)
    assert value.shape == (3,)
    assert gradient.shape == (3, 16, 16)
    assert gradient.is_contiguous()


def test_a_kernel_that_fails_or_computes_something_else_is_left_alone_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fails(matrix: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor]:
        raise RuntimeError("no compiler")

    def differs(matrix: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor]:
        value, gradient = _fixed_sequence(matrix, with_gradient)
        return value, gradient.mT

    examples = _examples(16, torch.device("cpu"))
    assert _computes_the_same(_grouped, examples)
    assert not caplog.records
    for kernel, why in ((fails, "no compiler"), (differs, "not close")):
        assert not _computes_the_same(kernel, examples)
        assert why in caplog.text
        assert "does without its Triton kernel for 16 x 16 matrices" in caplog.text


def test_repeated_calls_give_the_same_bits_with_and_without_a_gradient() -> None:
    matrix = torch.randn(40, 64, 64)
    value, gradient = value_and_gradient(matrix)
    again, gradient_again = value_and_gradient(matrix)
    assert torch.equal(value, again)
    assert torch.equal(gradient, gradient_again)
    assert torch.equal(value, log_trace_exp(matrix))


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 4, 3), (0,), (2, 0)])
def test_leading_axes_are_kept(leading: tuple[int, ...]) -> None:
    matrix = torch.randn(*leading, 6, 6)
    value, gradient = value_and_gradient(matrix)
    assert value.shape == leading
    assert gradient.shape == matrix.shape
    for index in product(*map(range, leading)):
        single, single_gradient = value_and_gradient(matrix[index])
        torch.testing.assert_close(value[index], single)
        torch.testing.assert_close(gradient[index], single_gradient)


def test_a_matrix_that_is_not_contiguous_gives_the_same() -> None:
    matrix = torch.randn(4, 8, 3, 8).transpose(1, 2)
    value, gradient = value_and_gradient(matrix)
    dense, dense_gradient = value_and_gradient(matrix.contiguous())
    assert torch.equal(value, dense)
    assert torch.equal(gradient, dense_gradient)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_compiles_without_a_graph_break_and_computes_the_same(requires_grad: bool) -> None:
    def scaled(matrix: Tensor) -> Tensor:
        return (log_trace_exp(matrix * 0.5) * 3).sum()

    compiled = torch.compile(scaled, backend="aot_eager", fullgraph=True)
    leaves = [torch.randn(2, 3, 16, 16).requires_grad_(requires_grad)]
    leaves.append(leaves[0].detach().clone().requires_grad_(requires_grad))
    values = [function(leaf) for function, leaf in zip((scaled, compiled), leaves, strict=True)]
    assert torch.equal(*values)
    assert values[1].requires_grad == requires_grad
    if requires_grad:
        for value in values:
            value.backward()
        assert torch.equal(leaves[0].grad, leaves[1].grad)


def test_the_operator_passes_torch_library_checks() -> None:
    for with_gradient in (False, True):
        arguments = (torch.randn(3, 8, 8), with_gradient)
        torch.library.opcheck(torch.ops.pldr_train.log_trace_exp.default, arguments)
    value = log_trace_exp(torch.empty(2, 4, 8, 8, device="meta"))
    assert value.shape == (2, 4)
    assert value.device.type == "meta"


def test_autocast_and_a_lowered_matmul_precision_change_nothing() -> None:
    matrix = torch.randn(2, 64, 64)
    value, gradient = value_and_gradient(matrix)
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16):
            lowered, lowered_gradient = value_and_gradient(matrix)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(value, lowered)
    assert torch.equal(gradient, lowered_gradient)


@pytest.mark.parametrize("lower", ["everywhere", "cuda alone"])
def test_a_lowered_matmul_precision_is_lifted_inside_and_restored_after_an_error(lower: str) -> None:
    cuda = torch.backends.cuda.matmul

    def fail_in_full_precision() -> None:
        with _full_matmul_precision():
            assert cuda.fp32_precision == "ieee"
            assert not cuda.allow_tf32  # the older setting agrees: torch refuses to multiply if the two differ
            raise KeyError

    try:
        if lower == "everywhere":
            torch.set_float32_matmul_precision("high")
        else:
            cuda.fp32_precision = "tf32"
        with pytest.raises(KeyError):
            fail_in_full_precision()
        assert cuda.fp32_precision == "tf32"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_fp32(dtype: torch.dtype) -> None:
    matrix = torch.randn(3, 16, 16).to(dtype)
    value, gradient = value_and_gradient(matrix)
    assert value.dtype == torch.float32
    assert gradient.dtype == dtype
    assert torch.equal(value, log_trace_exp(matrix.float()))


def test_nothing_is_saved_without_a_gradient_to_compute() -> None:
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    leaf = torch.randn(2, 8, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.no_grad():
            assert log_trace_exp(leaf).grad_fn is None
        assert log_trace_exp(leaf.detach()).grad_fn is None
        assert not saved
        log_trace_exp(leaf)
        assert saved


def test_a_second_derivative_is_refused() -> None:
    leaf = torch.randn(3, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(log_trace_exp(leaf), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        (gradient.square().sum() + leaf.sum()).backward()


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (torch.zeros(3, 4), r"square matrices \(\.\.\., d, d\), got shape \(3, 4\)"),
        (torch.zeros(4), r"got shape \(4,\)"),
        (torch.zeros(2, 0, 0), r"d >= 1, got shape \(2, 0, 0\)"),
        (torch.zeros(4, 4, dtype=torch.int64), "got torch.int64"),
        (torch.zeros(4, 4, dtype=torch.complex64), "got torch.complex64"),
    ],
)
def test_what_is_no_square_real_matrix_is_refused(matrix: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        log_trace_exp(matrix)


def drawn_matrix(d: int, log_scale: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 10**log_scale * torch.randn(d, d, generator=generator)


matrices = st.builds(drawn_matrix, st.integers(1, 12), st.floats(-9, 4), st.integers(0, 2**31))


@settings(max_examples=40, deadline=None)
@given(matrices, st.randoms(use_true_random=False))
def test_renumbering_the_nodes_or_flipping_signs_keeps_the_value(matrix: Tensor, random: Any) -> None:
    order = random.sample(range(len(matrix)), len(matrix))
    value = log_trace_exp(matrix)
    assert value >= 0
    torch.testing.assert_close(log_trace_exp(matrix[order][:, order]), value, rtol=3e-6, atol=0)
    torch.testing.assert_close(log_trace_exp(matrix.T), value, rtol=3e-6, atol=0)
    assert torch.equal(log_trace_exp(-matrix), value)


@DTYPES
@pytest.mark.parametrize("d", [1, 2, 7, 64])
def test_the_identity_has_the_value_one(dtype: torch.dtype, d: int) -> None:
    assert log_trace_exp(torch.eye(d, dtype=dtype)).item() == pytest.approx(1.0, rel=TOLERANCES[dtype])


@DTYPES
def test_forty_everywhere_has_the_exponential_of_its_spectral_radius(dtype: torch.dtype) -> None:
    value = log_trace_exp(torch.full((4, 4), 40.0, dtype=dtype)).item()
    assert value == pytest.approx(6400 - math.log(4), rel=TOLERANCES[dtype])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 64), st.floats(-9, 4))
def test_equal_entries_have_a_closed_form(d: int, log_entry: float) -> None:
    """ln((e^(d c^2) + d - 1) / d): of the matrix c 1 1^T, whose square by entries has the one eigenvalue d c^2."""
    entry = 10**log_entry
    with mpmath.workdps(60):
        radius = d * mpmath.mpf(entry) ** 2
        expected = float(mpmath.log1p(mpmath.expm1(radius) / d))
    value = log_trace_exp(torch.full((d, d), entry, dtype=torch.float64)).item()
    assert value == pytest.approx(expected, rel=1e-11, abs=0)


@settings(max_examples=40, deadline=None)
@given(matrices)
def test_the_value_is_at_least_that_of_the_diagonal_s_mean_square(matrix: Tensor) -> None:
    """For N without negative entries tr(e^N) >= d + tr(N)."""
    bound = torch.log1p(matrix.double().diagonal().square().mean()).item()
    assert log_trace_exp(matrix).item() >= bound * (1 - 3e-6)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.floats(-30, 8), st.integers(0, 2**31))
def test_a_strictly_triangular_matrix_has_the_value_zero(d: int, log_scale: float, seed: int) -> None:
    matrix = drawn_matrix(d, log_scale, seed)
    assert log_trace_exp(matrix.triu(1)).item() == log_trace_exp(matrix.tril(-1)).item() == 0.0


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.floats(-12, 1))
def test_a_positive_metric_has_the_floor_of_its_constant(seed: int, log_scale: float) -> None:
    """A_LM >= 1e-9 in every entry, so its value is at least ln(1 + 1e-18)."""
    torch.manual_seed(seed)
    power_law = PowerLaw(PldrllmConfig(hidden_size=16, num_attention_heads=2, head_dim=8))
    for parameter in power_law.parameters():
        torch.nn.init.normal_(parameter, std=10**log_scale)
    with torch.no_grad():
        positive = power_law(torch.randn(1, 2, 8, 8)).positive_metric
    assert bool((log_trace_exp(positive) >= math.log1p(1e-18) * (1 - 3e-6)).all())


def test_the_floor_is_reached_where_the_metric_is_nothing_but_its_constant() -> None:
    value = log_trace_exp(torch.full((8, 8), METRIC_FLOOR)).item()
    assert value == pytest.approx(1e-18, rel=3e-6, abs=0)


@settings(max_examples=40, deadline=None)
@given(matrices, st.randoms(use_true_random=False), st.floats(1.01, 10))
def test_the_value_grows_with_the_size_of_an_entry(matrix: Tensor, random: Any, factor: float) -> None:
    larger = matrix.clone()
    larger[random.randrange(len(matrix)), random.randrange(len(matrix))] *= factor
    assert log_trace_exp(larger) >= log_trace_exp(matrix) * (1 - 3e-6)
