"""log_trace_exp in one Triton kernel: a program holds one matrix on the chip from load to value and gradient.

The formulas and constants are those of `log_trace_exp.py`, which imports this file where Triton is there, and differ
in three things. Each matrix is squared as often as it needs. The polynomial of degree 8 is taken by Horner's scheme, so
that one loop has the only product of matrices. A squaring is Y Y + 2^(1-e) Y, for the second term costs nothing here.

Products are in fp32: TF32 takes the 11 leading bits of its factors, so each factor is split in two of those, and the
product of the two rests, below 2^-22, left out. No run on a GPU is behind this file yet: the tests run it in Triton's
interpreter and compile it for sm_80 and sm_90.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

HORNER = tl.constexpr(7)
"""Products that Horner's scheme takes to degree 8."""


@dataclass(frozen=True)
class Shape:
    """How matrices of one size are laid out; what is no power of two is padded with zeros on the chip."""

    block: int
    num_warps: int


def shape_of(d: int, capability: tuple[int, int]) -> Shape | None:
    """Return the layout of (d, d) matrices on a device of that compute capability; None: the kernel does not take them.

    Beyond these sizes a program spills registers.
    """
    if capability[0] not in (8, 9) or not 16 <= d <= 64:
        return None
    block = 1 << (d - 1).bit_length()
    return Shape(block, num_warps={16: 1, 32: 4, 64: 8}[block])


def constants(d: int, shape: Shape, with_gradient: bool, limits: dict[str, int]) -> dict[str, object]:
    """Return what the kernel is compiled for; `limits` are STEPS, UNSCALED, LOWEST, SPREAD and RATIO."""
    return {"D": d, "BLOCK": shape.block, "WITH_GRADIENT": with_gradient, "PRECISION": "split", **limits}


def options(shape: Shape) -> dict[str, object]:
    """Return how the kernel is compiled."""
    return {"num_warps": shape.num_warps, "enable_fp_fusion": True}


def evaluate(
    matrix: Tensor, with_gradient: bool, shape: Shape, theta: float, limits: dict[str, int]
) -> tuple[Tensor, Tensor]:
    """Return the values (n,) and gradients (n, d, d), or (0,), of contiguous fp32 matrices (n, d, d), n >= 1."""
    value = matrix.new_empty(len(matrix))
    gradient = torch.empty_like(matrix) if with_gradient else matrix.new_empty(0)
    compiled_for = constants(matrix.shape[-1], shape, with_gradient, limits)
    log_trace_exp_kernel[(len(matrix),)](matrix, value, gradient, theta, **compiled_for, **options(shape))
    return value, gradient


@triton.jit
def _power_of_two(exponent):
    """2^exponent in fp32, exactly; 0 below the normal numbers."""
    bits = (tl.minimum(tl.maximum(exponent, -126), 127).to(tl.int32) + 127) << 23
    return tl.where(exponent < -126, 0.0, bits.to(tl.float32, bitcast=True))


@triton.jit
def _exponent_of(x):
    """The r of x = m 2^r with 1/2 <= m < 1, for normal x > 0; at most that of x otherwise."""
    return ((x.to(tl.int32, bitcast=True) >> 23) & 255) - 126


@triton.jit
def _norm(n):
    return tl.minimum(tl.max(tl.sum(n, 1), 0), tl.max(tl.sum(n, 0), 0))


@triton.jit
def _squares(places, wanted, down, scale):
    """scale (down M) o (down M); volatile, so that none is kept in registers."""
    m = tl.load(places, mask=wanted, other=0.0, volatile=True) * down
    return m * m * scale


@triton.jit
def _log1p(x):
    """ln(1 + x) in fp64 for x >= 0, also where 1 + x rounds."""
    u = 1.0 + x
    exact = tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0))
    return tl.where(u == 1.0, x, exact)


@triton.jit
def _rounded_to_tf32(x):
    """x to the 11 leading bits that TF32 products take, to nearest."""
    return ((x.to(tl.int32, bitcast=True) + 4096) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def _product(a, b, PRECISION: tl.constexpr):
    """a b in fp32. `split`: as three products in TF32, of the leading bits and of what these leave."""
    if PRECISION == "split":
        a_high, b_high = _rounded_to_tf32(a), _rounded_to_tf32(b)
        a_low, b_low = _rounded_to_tf32(a - a_high), _rounded_to_tf32(b - b_high)
        product = tl.dot(a_low, b_high, input_precision="tf32")
        product = tl.dot(a_high, b_low, product, input_precision="tf32")
        product = tl.dot(a_high, b_high, product, input_precision="tf32")
    else:
        product = tl.dot(a, b, input_precision=PRECISION)
    return product


@triton.jit
def log_trace_exp_kernel(
    matrix,
    value,
    gradient,
    theta,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
    PRECISION: tl.constexpr,
    STEPS: tl.constexpr,
    UNSCALED: tl.constexpr,
    LOWEST: tl.constexpr,
    SPREAD: tl.constexpr,
    RATIO: tl.constexpr,
):
    """One matrix (D, D) a program: its value, and the gradient of that.

    The constants have the names that they have in `log_trace_exp.py`, shortened.
    """
    i = tl.arange(0, BLOCK)
    inside = None if D == BLOCK else (i[:, None] < D) & (i[None, :] < D)
    beyond = None if D == BLOCK else 0.0
    on_diagonal = i[:, None] == i[None, :]
    start = tl.program_id(0).to(tl.int64) * (D * D)
    places = i[:, None] * D + i[None, :]

    # A = M o M / 2^s, with s from the norm of M o M; h keeps the square of huge entries in range.
    m = tl.load(matrix + start + places, mask=inside, other=beyond)
    largest = tl.max(tl.max(tl.abs(m), 1), 0)
    overflows = ~(_norm(m * m) <= 3.4028234e38) & (largest <= 3.4028234e38)
    h = tl.where(overflows, _exponent_of(largest) - 32, 0)
    m *= _power_of_two(-h)
    norm = _norm(m * m)
    s = tl.where(norm <= 3.4028234e38, tl.maximum(_exponent_of(norm / theta) + 2 * h, 0), 0)
    down, scale = _power_of_two(-h), _power_of_two(2 * h - s)

    # First Horner's scheme to degree 8 for Y = exp(A) - I, then the squarings, exp(2^k A) - I = 2^e S Y S^-1 with
    # S = diag(2^similarity). One loop: a second place with products would double their share of registers. They decide
    # what fits. So A is made anew from M for each step that takes it, twice, and what s is needed for after the loop
    # waits in the place of the value.
    y = m * m * scale * 0.125
    e = tl.full((), 0, tl.int64)
    similarity = tl.zeros((BLOCK,), tl.int32)
    tl.store(value + tl.program_id(0), tl.maximum(s - STEPS, 0).to(tl.float32))
    for step in range(tl.minimum(s, STEPS) + HORNER):
        if step >= HORNER + UNSCALED:
            rows = tl.maximum(_exponent_of(tl.sum(y, 1) + _power_of_two(-e)), LOWEST)
            shift = tl.max(rows, 0)
            offset = tl.maximum(rows - shift, LOWEST)
            offset = tl.where(offset < -SPREAD, offset, 0)
            row_exponent = tl.maximum(shift + offset, LOWEST)
            offset = row_exponent - shift
            y = y * _power_of_two(-row_exponent)[:, None] * _power_of_two(offset)[None, :]
            e += shift
            similarity += offset
        is_horner = step < HORNER
        wanted = is_horner if inside is None else inside & is_horner
        a = _squares(matrix + start + places, wanted, down, scale)
        y = _product(tl.where(is_horner, a, y), y, PRECISION) + tl.where(
            is_horner, _squares(matrix + start + places, wanted, down, scale), y * _power_of_two(1 - e)
        )
        y = tl.where(is_horner, y / tl.maximum(HORNER - step, 1).to(tl.float32), y)
        e *= 2

    trace = tl.sum(tl.sum(tl.where(on_diagonal, y, 0.0), 1).to(tl.float64), 0)
    mean = trace / D
    log_ratio = e.to(tl.float64) * 0.6931471805599453 + tl.log(mean)
    large = tl.maximum(log_ratio, 0.0) + _log1p(tl.exp(-tl.abs(log_ratio)))
    left = tl.load(value + tl.program_id(0), volatile=True)  # by the thread that stored it and stores the value now
    found = tl.where(e > 0, large, _log1p(mean)) * tl.exp2(left.to(tl.float64))
    tl.store(value + tl.program_id(0), found.to(tl.float32))

    if WITH_GRADIENT:  # 2 M o exp(N)^T / tr(exp(N))
        share = tl.exp2(-(e.to(tl.float64)))
        factor = tl.minimum(2.0 / (D * share + trace), 8.5e37)
        ratio = tl.minimum(tl.maximum(similarity[None, :] - similarity[:, None], -RATIO), RATIO)
        m = tl.load(matrix + start + places, mask=inside, other=beyond)
        slope = m * tl.trans(y) * factor.to(tl.float32) * _power_of_two(ratio)  # zeros first: the factor may be huge
        slope += tl.where(on_diagonal, m * (factor * share).to(tl.float32), 0.0)
        tl.store(gradient + start + places, slope, mask=inside)
