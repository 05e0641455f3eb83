"""ln(tr(exp(M o M))/d), the quantity behind the DAG loss, without overflow, underflow or a second matrix exponential.

N = M o M (the elementwise square) has no negative entry, so every sum below has terms of one sign and nothing cancels:

1. A = N / 2^s per matrix, with s from a norm of N, so that a Taylor polynomial of degree 8 gives X = exp(A) - I to
   rounding. Keeping exp - I instead of exp preserves traces far below the rounding unit of 1.
2. s squarings in the same form: exp(2A) - I = X^2 + 2X. Where entries may outgrow the type, exp - I = 2^e S Y S^-1 with
   one exponent e per matrix and a diagonal S of powers of two; the squaring reads Y <- Y^2 + 2^(1-e) Y, e <- 2e.
   S evens out the row sums of a matrix that is nearly triangular, whose largest entries would drown its trace.
3. The value is log1p(tr(X)/d), and the gradient 2 M o exp(N)^T / tr(exp(N)) comes from the same X.

Each matrix gets its own s: its value does not depend on the rest of the batch. On the CPU the matrices are grouped by s
and go through in pieces that stay in the cache. Elsewhere all of them go through one fixed sequence of launches, in
which a finished matrix is multiplied by the identity, so that the host never waits for the device; or, where Triton is
there and knows the device and the size, through one kernel (`one_kernel.py`).
"""

from __future__ import annotations

import functools
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

_log = logging.getLogger(__name__)

TRITON_SWITCH = "PLDR_TRAIN_TRITON"
"""Environment variable; `0` rules out the Triton kernel. `model/refining.py` reads it too."""

# Degree 8 of exp in three products: P. Bader, S. Blanes, F. Casas, "Computing the matrix exponential with an optimized
# Taylor polynomial approximation", Mathematics 7 (2019) 1174:
#   A4 = A2 (x1 A + x2 A2),  A8 = (x3 A2 + A4)(x4 I + x5 A + x6 A2 + x7 A4),  T8 = I + A + y2 A2 + A8.
# All of its coefficients are positive, which keeps the evaluation free of cancellation.
_ROOT = math.sqrt(177.0)
_X3 = 2.0 / 3.0
_X1 = _X3 * (1.0 + _ROOT) / 88.0
_X2 = _X3 * (1.0 + _ROOT) / 352.0
_X4 = (-271.0 + 29.0 * _ROOT) / (315.0 * _X3)
_X5 = 11.0 * (-1.0 + _ROOT) / (1260.0 * _X3)
_X6 = 11.0 * (-9.0 + _ROOT) / (5040.0 * _X3)
_X7 = (89.0 - _ROOT) / (5040.0 * _X3**2)
_Y2 = (857.0 - 58.0 * _ROOT) / 630.0

_CHUNK_BYTES = 2**21  # one temporary of a CPU chunk: four of them fit the L3 cache, and calls stay few
_LOG_2 = math.log(2.0)
# Powers of two that rescaling may use: all of them, and their products, lie inside fp32's range of 2^(+-126).
_LOWEST_EXPONENT = -100
_TOLERATED_SPREAD = 20  # of row sums, before a similarity evens them out: dense matrices never pay for one
_HIGHEST_RATIO = 120


@dataclass(frozen=True)
class _Precision:
    """`theta`: largest norm of A at which degree 8 is exact to rounding (error theta^8/9! relative to ln exp(theta)).

    `unscaled_squarings`: how many squarings from there cannot leave the square root of the type's range.
    `fixed_squarings`: how many the launch sequence off the CPU has; in fp32 enough for norms of N up to 7e11.
    """

    theta: float
    unscaled_squarings: int
    fixed_squarings: int


_PRECISIONS = {torch.float32: _Precision(0.68, 6, 40), torch.float64: _Precision(0.0625, 12, 48)}


def log_trace_exp(matrix: Tensor) -> Tensor:
    """ln(tr(exp(M o M))/d) of every matrix M, with o the elementwise product.

    This is DL(M) of the DAG loss without its absolute value, which is redundant: tr(exp(M o M)) >= d.

    Args:
        matrix: (..., d, d), any leading dimensions, possibly empty. fp32 and fp64 are computed as they are; fp16 and
            bf16 are computed in fp32. Autocast has no effect, nor has a lowered fp32 matmul precision (TF32).

    Returns:
        (...): fp64 for fp64 input, else fp32; no value is negative. It is finite for finite input wherever the result
        is representable; NaN in a matrix gives NaN, infinity gives infinity or NaN. The relative error is a few
        rounding units, with two limits. In an M whose M o M has a norm below 1, a trace that comes from cycles longer
        than 8 alone may count as d. Entries of M o M below some 1e-28 (fp64: 1e-298) of its norm lose digits.

    The gradient is 2 M o exp(M o M)^T / tr(exp(M o M)), found in the forward pass if a gradient is due. The same
    input gives the same bits, whatever else is in the batch if d is a multiple of 16 (else: the same to rounding).
    There is no second derivative: asking for one raises RuntimeError.

    Raises:
        ValueError: if the matrices are not square, have d = 0 or are not of a floating-point type.
    """
    if matrix.ndim < 2 or matrix.shape[-1] != matrix.shape[-2]:
        raise ValueError(f"log_trace_exp needs square matrices (..., d, d), got shape {tuple(matrix.shape)}")
    if matrix.shape[-1] == 0:
        raise ValueError(f"log_trace_exp needs d >= 1, got shape {tuple(matrix.shape)}")
    if matrix.dtype in (torch.float16, torch.bfloat16):
        matrix = matrix.float()
    if matrix.dtype not in _PRECISIONS:
        raise ValueError(f"log_trace_exp needs fp16, bf16, fp32 or fp64, got {matrix.dtype}; convert the matrix first")
    flat = matrix.reshape(-1, *matrix.shape[-2:])
    if torch.is_grad_enabled() and flat.requires_grad:
        value: Tensor = _LogTraceExp.apply(flat)  # type: ignore[no-untyped-call]
    else:
        value, _ = _log_trace_exp(flat, False)
    return value.reshape(matrix.shape[:-2])


class _LogTraceExp(torch.autograd.Function):
    """Values (n,) of matrices (n, d, d); keeps the gradient of each value, which the backward pass only scales."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor) -> Tensor:
        value: Tensor
        value, unit_gradient = _log_trace_exp(matrix, True)
        ctx.save_for_backward(matrix, unit_gradient)
        return value

    @staticmethod
    def backward(ctx: Any, grad_value: Tensor) -> Tensor:
        matrix, unit_gradient = ctx.saved_tensors
        gradient = torch.mul(unit_gradient, grad_value[:, None, None])
        if torch.is_grad_enabled():  # create_graph=True: unit_gradient depends on the matrix, but carries no graph
            return cast(Tensor, _RefuseSecondDerivative.apply(gradient, matrix))  # type: ignore[no-untyped-call]
        return gradient


class _RefuseSecondDerivative(torch.autograd.Function):
    """The gradient unchanged, but tied to the matrix, so that differentiating it raises instead of giving 0."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, matrix: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[None, None]:
        raise RuntimeError("log_trace_exp has no second derivative; keep it out of what create_graph differentiates")


@torch.library.custom_op("pldr_train::log_trace_exp", mutates_args=())
def _log_trace_exp(matrix: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor]:
    """Return the values (n,) and, if asked for, their gradients (n, d, d), else (0,). Opaque to compilers: one path for
    all.
    """
    with torch.autocast(matrix.device.type, enabled=False), _full_matmul_precision():
        matrix = matrix.contiguous()
        if matrix.device.type == "cpu":
            return _grouped(matrix, with_gradient)
        kernel = kernel_for(matrix.device, matrix.shape[-1]) if matrix.dtype == torch.float32 and len(matrix) else None
        return _fixed_sequence(matrix, with_gradient) if kernel is None else kernel(matrix, with_gradient)


@_log_trace_exp.register_fake
def _(matrix: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor]:
    unit_gradient = matrix.new_empty(matrix.shape if with_gradient else (0,))
    return matrix.new_empty(matrix.shape[0]), unit_gradient


def _grouped(matrix: Tensor, with_gradient: bool, chunk_bytes: int = _CHUNK_BYTES) -> tuple[Tensor, Tensor]:
    """Host path: matrices that need equally many squarings together, in chunks that fit the cache."""
    n, d, _ = matrix.shape
    value = matrix.new_empty(n)
    unit_gradient = torch.empty_like(matrix) if with_gradient else matrix.new_empty(0)
    if n == 0:
        return value, unit_gradient
    chunk = min(n, max(1, chunk_bytes // (d * d * matrix.element_size())))
    buffers = [matrix.new_empty(chunk, d, d) for _ in range(4)]
    scalings = [_scaling(part, buffers[0][: len(part)]) for part in torch.split(matrix, chunk)]
    halvings, squarings = (torch.cat(parts) for parts in zip(*scalings, strict=True))
    for count in torch.unique(squarings).tolist():
        for indices in torch.split((squarings == count).nonzero().flatten(), chunk):
            rows = _as_slice(indices)
            part, gradient = _evaluate(
                matrix[rows],
                halvings[rows],
                squarings[rows],
                int(count),
                freeze=False,
                with_gradient=with_gradient,
                buffers=[buffer[: len(indices)] for buffer in buffers],
            )
            value[rows] = part
            if with_gradient:
                unit_gradient[rows] = gradient
    return value, unit_gradient


def _as_slice(indices: Tensor) -> Tensor | slice:
    """Return the same rows as a slice where ascending `indices` (k,), k >= 1, have no gap: a view instead of a copy."""
    first, last = int(indices[0]), int(indices[-1])
    return slice(first, last + 1) if last - first + 1 == len(indices) else indices


@functools.cache
def kernel_for(device: torch.device, d: int) -> Callable[[Tensor, bool], tuple[Tensor, Tensor]] | None:
    """Return the Triton kernel for fp32 matrices (n, d, d), n >= 1; None: there is no Triton, or the device or d are
    none for it.

    A kernel that cannot be built here, or does not compute what `_fixed_sequence` does, is not taken, with a warning.
    The host waits for the device, once.
    """
    if device.type != "cuda" or torch.version.hip is not None or os.environ.get(TRITON_SWITCH) == "0":
        return None
    kernel = _kernel_of_capability(torch.cuda.get_device_capability(device), d)
    return kernel if kernel is not None and _computes_the_same(kernel, _examples(d, device)) else None


def _examples(d: int, device: torch.device) -> Tensor:
    """Return positive matrices (4, d, d) that need from no squaring to some twenty."""
    scales = torch.tensor([1e-3, 0.5, 1.0, 30.0], device=device)[:, None, None]
    return scales * (1.0 + 0.5 * torch.arange(d * d, device=device).view(d, d).sin())


def _computes_the_same(kernel: Callable[[Tensor, bool], tuple[Tensor, Tensor]], matrix: Tensor) -> bool:
    """Return whether a kernel can be built here and gives what `_fixed_sequence` does; warn if not."""
    try:
        for found, expected in zip(kernel(matrix, True), _fixed_sequence(matrix, True), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-30)
    except Exception as error:  # whatever a compiler or a driver raises
        d = matrix.shape[-1]
        _log.warning(f"the DAG loss does without its Triton kernel for {d} x {d} matrices: {error}")
        return False
    return True


def _kernel_of_capability(
    capability: tuple[int, int], d: int
) -> Callable[[Tensor, bool], tuple[Tensor, Tensor]] | None:
    try:
        from . import one_kernel  # noqa: PLC0415
    except ImportError:
        return None
    shape, precision = one_kernel.shape_of(d, capability), _PRECISIONS[torch.float32]
    if shape is None:
        return None
    return functools.partial(one_kernel.evaluate, shape=shape, theta=precision.theta, limits=kernel_limits())


def kernel_limits() -> dict[str, int]:
    """Return the limits that the Triton kernel is compiled with."""
    precision = _PRECISIONS[torch.float32]
    return {
        "STEPS": precision.fixed_squarings,
        "UNSCALED": precision.unscaled_squarings,
        "LOWEST": _LOWEST_EXPONENT,
        "SPREAD": _TOLERATED_SPREAD,
        "RATIO": _HIGHEST_RATIO,
    }


def _fixed_sequence(matrix: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor]:
    """Device path: the same launches whatever the values, so nothing is read back to the host."""
    if matrix.shape[0] == 0:
        return matrix.new_empty(0), torch.empty_like(matrix) if with_gradient else matrix.new_empty(0)
    halvings, squarings = _scaling(matrix, None)
    return _evaluate(
        matrix,
        halvings,
        squarings,
        _PRECISIONS[matrix.dtype].fixed_squarings,
        freeze=True,
        with_gradient=with_gradient,
        buffers=[None] * 4,
    )


def _scaling(matrix: Tensor, buffer: Tensor | None) -> tuple[Tensor, Tensor]:
    """Per matrix (n,), fp64: h with (M/2^h)^2 in range, 0 unless N overflows; and the number of squarings s."""
    norm = _norm(torch.mul(matrix, matrix, out=buffer))
    halvings = torch.zeros_like(norm)
    if matrix.device.type != "cpu" or not norm.isfinite().all():
        largest = matrix.abs().amax((-2, -1))
        _, exponent = torch.frexp(largest)
        halvings = torch.where(norm.isfinite() | ~largest.isfinite(), 0, exponent - 32).double()
        norm = _norm((matrix * _power_of_two(-halvings, matrix)[:, None, None]).square())
    _, exponent = torch.frexp(norm / _PRECISIONS[matrix.dtype].theta)
    return halvings, torch.where(norm.isfinite(), (exponent + 2 * halvings).clamp_min(0), 0)


def _norm(n: Tensor) -> Tensor:
    """Return the smaller of 1-norm and infinity-norm of N (n, d, d) without negative entries: (n,), fp64."""
    return torch.minimum(n.sum(-1).amax(-1), n.sum(-2).amax(-1)).double()


def _evaluate(
    matrix: Tensor,
    halvings: Tensor,
    squarings: Tensor,
    steps: int,
    *,
    freeze: bool,
    with_gradient: bool,
    buffers: Sequence[Tensor | None],
) -> tuple[Tensor, Tensor]:
    """Return the values (n,) and gradients (n, d, d) or (0,) after `steps` squarings; four `buffers` (n, d, d), or None
    for each.

    With `freeze`, matrix i stops after `squarings[i]` of them; without, all of `squarings` equal `steps`. A matrix that
    needs more than `steps` is evaluated as phi(t) = ln(tr(exp(t N))/d) at t = 2^(steps - s), and phi(1) = phi(t)/t.
    At norms of N that large phi is linear to rounding, unless the spectral radius is far below the norm.
    """
    d = matrix.shape[-1]
    scaled = torch.mul(matrix, _power_of_two(-halvings, matrix)[:, None, None], out=buffers[0])
    scaled.mul_(scaled).mul_(_power_of_two(2 * halvings - squarings, matrix)[:, None, None])
    result = _square_repeatedly(_expm1(scaled, buffers[1:]), squarings if freeze else None, steps, buffers[1:3])
    trace = result.y.diagonal(dim1=-2, dim2=-1).double().sum(-1)
    log_ratio = result.exponent * _LOG_2 + (trace / d).log()
    large = torch.logaddexp(torch.zeros_like(log_ratio), log_ratio)
    value = torch.where(result.exponent > 0, large, (trace / d).log1p())
    if freeze:
        value = value * (squarings - steps).clamp_min(0).exp2()
    value = value.to(matrix.dtype)
    if not with_gradient:
        return value, matrix.new_empty(0)
    return value, _unit_gradient(matrix, result, trace)


@dataclass
class _Exponential:
    """exp(.) = I + 2^e S Y S^-1, S = diag(2^similarity): y (n, d, d), exponent e (n,) and similarity (n, d) in fp64."""

    y: Tensor
    exponent: Tensor
    similarity: Tensor


def _expm1(a: Tensor, buffers: Sequence[Tensor | None]) -> Tensor:
    """exp(A) - I to degree 8, in the place of A (n, d, d) without negative entries, of norm <= theta."""
    a2 = torch.bmm(a, a, out=buffers[0])
    a4 = torch.bmm(a2, torch.add(a, a2, alpha=_X2 / _X1, out=buffers[1]), out=buffers[2])  # without its factor x1
    right = torch.add(a, a2, alpha=_X6 / _X5, out=buffers[1]).add_(a4, alpha=_X7 * _X1 / _X5)
    right.diagonal(dim1=-2, dim2=-1).add_(_X4 / _X5)
    left = torch.add(a2, a4, alpha=_X1 / _X3, out=buffers[2])
    return a.add_(a2, alpha=_Y2).baddbmm_(left, right, alpha=_X3 * _X5)


def _square_repeatedly(
    y: Tensor, squarings: Tensor | None, steps: int, buffers: Sequence[Tensor | None]
) -> _Exponential:
    """exp(2^k A) from Y = exp(A) - I, with k = `steps`, or min(`squarings`, `steps`) per matrix."""
    state = _Exponential(y, y.new_zeros(len(y), dtype=torch.float64), y.new_zeros(y.shape[:2], dtype=torch.float64))
    left_buffer, spare = buffers
    for step in range(steps):
        active = None if squarings is None else squarings > step
        if step >= _PRECISIONS[y.dtype].unscaled_squarings:
            _rescale(state, active)
        # Y^2 + 2^(1-e) Y = (2^(1-e) I + Y) Y. A finished matrix is multiplied by I instead, which keeps every bit.
        left = torch.mul(state.y, 1.0 if active is None else active[:, None, None], out=left_buffer)
        identity, doubled = _power_of_two(1 - state.exponent, y), 2 * state.exponent
        if active is not None:
            identity, doubled = torch.where(active, identity, 1.0), torch.where(active, doubled, state.exponent)
        left.diagonal(dim1=-2, dim2=-1).add_(identity[:, None])
        product = torch.bmm(left, state.y, out=spare)
        spare = None if spare is None else state.y
        state.y, state.exponent = product, doubled
    return state


def _rescale(state: _Exponential, active: Tensor | None) -> None:
    """Bring the row sums of Y to at most 2, and the very small ones near 1 by a similarity; both by powers of two.

    A similarity by the row sums r leaves (Y r)_i / r_i <= max r as the row sums, so it cannot make Y outgrow its type.
    The row sums of Y + 2^-e I are used, so that e stays positive.
    """
    y = state.y
    _, rows = torch.frexp(y.sum(-1).double() + (-state.exponent).exp2()[:, None])
    rows = rows.clamp_min(_LOWEST_EXPONENT)
    shift = rows.amax(-1)
    offset = (rows - shift[:, None]).clamp_min(_LOWEST_EXPONENT)
    offset = torch.where(offset < -_TOLERATED_SPREAD, offset, 0)
    if active is not None:
        shift, offset = shift * active, offset * active[:, None]
    if y.device.type == "cpu" and not offset.any():
        y.mul_(_power_of_two(-shift, y)[:, None, None])
    else:
        row_exponent = (shift[:, None] + offset).clamp_min(_LOWEST_EXPONENT)
        offset = row_exponent - shift[:, None]
        y.mul_(_power_of_two(-row_exponent, y)[:, :, None]).mul_(_power_of_two(offset, y)[:, None, :])
    state.exponent = state.exponent + shift
    state.similarity = state.similarity + offset


def _unit_gradient(matrix: Tensor, result: _Exponential, trace: Tensor) -> Tensor:
    """2 M o exp(N)^T / tr(exp(N)): (n, d, d), from exp(N) and `trace` = tr(Y) (n,)."""
    d = matrix.shape[-1]
    identity_share = (-result.exponent).exp2()
    # With e in the hundreds and a zero trace the factor exceeds the type. Bounded, it keeps 0 * factor = 0.
    factor = (2 / (d * identity_share + trace)).clamp_max(torch.finfo(matrix.dtype).max / 4)
    gradient = torch.mul(matrix, result.y.mT).mul_(factor.to(matrix.dtype)[:, None, None])
    if matrix.device.type != "cpu" or result.similarity.any():
        ratio = result.similarity[:, None, :] - result.similarity[:, :, None]
        gradient.mul_(ratio.clamp(-_HIGHEST_RATIO, _HIGHEST_RATIO).to(matrix.dtype).exp2())
    diagonal = matrix.diagonal(dim1=-2, dim2=-1) * (factor * identity_share).to(matrix.dtype)[:, None]
    gradient.diagonal(dim1=-2, dim2=-1).add_(diagonal)
    return gradient


def _power_of_two(exponent: Tensor, like: Tensor) -> Tensor:
    """2^exponent in the type of `like`; taken in fp64, so that fp32 gets the exact power."""
    return exponent.double().exp2().to(like.dtype)


@contextmanager
def _full_matmul_precision() -> Iterator[None]:
    """Products in full fp32: s squarings multiply the relative error of TF32 or bf16 products by 2^s."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    lowered = [backend.fp32_precision for backend in backends]
    if all(precision in ("none", "ieee") for precision in lowered):
        yield
        return
    try:
        previous = torch.get_float32_matmul_precision()
    except RuntimeError:  # lowered through the backends alone; torch then refuses to name one precision
        previous = "highest"
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(previous)
        for backend, precision in zip(backends, lowered, strict=True):
            backend.fp32_precision = precision
