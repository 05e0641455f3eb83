"""The residual units of a metric learner in one Triton kernel for the forward and one for the backward.

The formulas are those of `refining.py`, which imports this file where Triton is there. A row of a metric depends on no
other row, so a program takes a few rows through all units, and only what the backward needs goes to memory. Products
take factors of the weights' type and are summed in fp32; everything between them is in fp32.

Sizes that are no power of two are padded with zeros on the chip. No run on a GPU is behind this file yet: the tests run
it in Triton's interpreter and compile it for sm_80 and sm_90.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from .refining import Sizes, empty_refined, empty_results, sizes_of


@dataclass(frozen=True)
class Shape:
    """What a program takes: rows, and inner columns at a time; and how it is compiled."""

    rows: int
    columns: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Shapes:
    """Of the two kernels on a device."""

    forward: Shape
    backward: Shape


_SHAPES = {
    8: Shapes(Shape(64, 32, num_warps=4, num_stages=2), Shape(64, 32, num_warps=8, num_stages=1)),
    9: Shapes(Shape(64, 32, num_warps=4, num_stages=2), Shape(64, 32, num_warps=8, num_stages=2)),
}
"""Of rows of up to 64 columns, by the first part of the compute capability. None spills registers."""
_OF_LONG_ROWS = Shapes(Shape(32, 32, num_warps=8, num_stages=1), Shape(32, 32, num_warps=8, num_stages=1))
"""Of up to 128 columns."""


def shapes_of(d: int, capability: tuple[int, int]) -> Shapes | None:
    """Return what programs take of rows of d columns on a device of that compute capability; None: they do not fit."""
    if capability[0] not in _SHAPES or not 16 <= d <= 128:
        return None
    return _SHAPES[capability[0]] if d <= 64 else _OF_LONG_ROWS


def forward_constants(sizes: Sizes, shape: Shape) -> dict[str, object]:
    """Return what the kernel of the forward is compiled for."""
    return {
        "D": sizes.d, "INNER": sizes.inner, "DEPTH": sizes.depth, "UNITS": sizes.units, "HAS_BIAS": sizes.has_bias,
        "ROWS": shape.rows, "BLOCK": max(16, 1 << (sizes.d - 1).bit_length()), "COLUMNS": shape.columns,
    }  # fmt: skip


def backward_constants(sizes: Sizes, shape: Shape) -> dict[str, object]:
    """Return what the kernel of the backward is compiled for."""
    return forward_constants(sizes, shape) | {"STRIDE": sizes.stride}


def options(shape: Shape) -> dict[str, object]:
    """Return how a kernel is compiled."""
    return {"num_warps": shape.num_warps, "num_stages": shape.num_stages, "enable_fp_fusion": True}


def evaluate(
    metric: Tensor,
    inner_weight: Tensor,
    inner_bias: Tensor | None,
    outer_weight: Tensor,
    outer_bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    shape: Shape,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `refining.refine` for contiguous tensors of at least one row."""
    sizes = sizes_of(inner_weight, inner_bias, norm_weight)
    results = empty_refined(metric, inner_weight, norm_weight)
    refine_kernel[(triton.cdiv(len(metric), shape.rows),)](
        metric, inner_weight, inner_bias, outer_weight, outer_bias, norm_weight, norm_bias, *results,
        len(metric), eps, **forward_constants(sizes, shape), **options(shape),
    )  # fmt: skip
    return results


def evaluate_backward(
    gradient: Tensor,
    inputs: Tensor,
    sums: Tensor,
    inner_weight: Tensor,
    inner_bias: Tensor | None,
    outer_weight: Tensor,
    norm_weight: Tensor,
    eps: float,
    shape: Shape,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute `refining.refine_backward` for contiguous tensors of at least one row."""
    sizes = sizes_of(inner_weight, inner_bias, norm_weight)
    results = empty_results(gradient, inputs, sizes)
    refine_backward_kernel[(triton.cdiv(len(gradient), shape.rows),)](
        gradient, inputs, sums, inner_weight, inner_bias, outer_weight, norm_weight, *results, len(gradient), eps,
        **backward_constants(sizes, shape), **options(shape),
    )  # fmt: skip
    return results


@triton.jit
def _places(rows, D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """A program's first row; its rows from there and its columns; and which of its elements there are, and where."""
    start = tl.program_id(0).to(tl.int64) * ROWS
    row, column = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    is_place = (row < rows - start)[:, None] & (column < D)[None, :]
    return start, row, column, is_place, row[:, None] * D + column[None, :]


@triton.jit
def _normal(total, is_column, eps, D: tl.constexpr):
    """Rows with mean 0 and variance 1, 0 beyond the last column; and what the deviations were multiplied by."""
    mean = tl.sum(total, 1) / D
    centred = tl.where(is_column[None, :], total - mean[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, 1) / D + eps)
    return centred * scale[:, None], scale


@triton.jit
def _through_norm(slope, total, weights, of_weights, of_biases, column, eps, D: tl.constexpr):
    """Gradient of a LayerNorm's rows -> that of its input `total`; stores those of its weights and biases."""
    is_column = column < D
    normal, scale = _normal(total, is_column, eps, D)
    tl.store(of_weights + column, tl.sum(slope * normal, 0), mask=is_column)
    tl.store(of_biases + column, tl.sum(slope, 0), mask=is_column)
    slope *= tl.load(weights + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
    along = tl.sum(slope * normal, 1) / D
    slope = (slope - (tl.sum(slope, 1) / D)[:, None] - normal * along[:, None]) * scale[:, None]
    return tl.where(is_column[None, :], slope, 0.0)


@triton.jit
def _through_product(of_product, gate, up):
    """silu(gate) up, and from its gradient those of gate and up."""
    share = tl.sigmoid(gate)
    activated = gate * share
    return activated * up, of_product * up * (share + activated * (1.0 - share)), of_product * activated


@triton.jit
def _gate_and_up(given, gate_weight, up_weight, inner_bias, places, is_inner, INNER: tl.constexpr, BIAS: tl.constexpr):
    """What gate and up give, of the inner columns whose biases lie at `places`, and INNER behind them."""
    gate = tl.dot(given, tl.trans(gate_weight), input_precision="ieee")
    up = tl.dot(given, tl.trans(up_weight), input_precision="ieee")
    if BIAS:
        gate += tl.load(inner_bias + places, mask=is_inner, other=0.0).to(tl.float32)[None, :]
        up += tl.load(inner_bias + places + INNER, mask=is_inner, other=0.0).to(tl.float32)[None, :]
    return gate, up


@triton.jit
def refine_kernel(
    metric,
    inner_weight,
    inner_bias,
    outer_weight,
    outer_bias,
    norm_weight,
    norm_bias,
    refined,
    inputs,
    sums,
    rows,
    eps,
    D: tl.constexpr,
    INNER: tl.constexpr,
    DEPTH: tl.constexpr,
    UNITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """ROWS rows a program: the metric (rows, D) refined, each GLU's input, and each unit's sum before its LayerNorm."""
    dtype = inner_weight.dtype.element_ty
    start, _row, column, is_place, places = _places(rows, D, ROWS, BLOCK)
    is_column = column < D
    count = tl.cast(rows, tl.int64)

    x = tl.load(metric + start * D + places, mask=is_place, other=0.0).to(tl.float32)
    for unit in range(UNITS):
        update = x
        for place in range(DEPTH):
            glu = unit * DEPTH + place
            given = update.to(dtype)
            tl.store(inputs + (glu * count + start) * D + places, given, mask=is_place)
            update = tl.zeros((ROWS, BLOCK), tl.float32)
            for first in range(0, INNER, COLUMNS):
                inner = first + tl.arange(0, COLUMNS)
                is_inner = inner < INNER
                is_weight = is_inner[:, None] & is_column[None, :]
                weights = inner_weight + glu * (2 * INNER * D) + inner[:, None] * D + column[None, :]
                gate_weight = tl.load(weights, mask=is_weight, other=0.0)
                up_weight = tl.load(weights + INNER * D, mask=is_weight, other=0.0)
                biases = glu * (2 * INNER) + inner
                gate, up = _gate_and_up(given, gate_weight, up_weight, inner_bias, biases, is_inner, INNER, HAS_BIAS)
                hidden = (gate * tl.sigmoid(gate) * up).to(dtype)
                weights = outer_weight + glu * (INNER * D) + column[None, :] * INNER + inner[:, None]
                update = tl.dot(hidden, tl.load(weights, mask=is_weight, other=0.0), update, input_precision="ieee")
            if HAS_BIAS:
                update += tl.load(outer_bias + glu * D + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
        total = update + x
        tl.store(sums + (unit * count + start) * D + places, total, mask=is_place)
        normal, _ = _normal(total, is_column, eps, D)
        weight = tl.load(norm_weight + unit * D + column, mask=is_column, other=0.0).to(tl.float32)
        bias = tl.load(norm_bias + unit * D + column, mask=is_column, other=0.0).to(tl.float32)
        x = normal * weight[None, :] + bias[None, :]
    tl.store(refined + start * D + places, x, mask=is_place)


@triton.jit
def refine_backward_kernel(
    gradient,
    inputs,
    sums,
    inner_weight,
    inner_bias,
    outer_weight,
    norm_weight,
    of_metric,
    hidden,
    of_hidden,
    of_outputs,
    of_vectors,
    rows,
    eps,
    D: tl.constexpr,
    INNER: tl.constexpr,
    DEPTH: tl.constexpr,
    UNITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    STRIDE: tl.constexpr,
):
    """ROWS rows a program, from the last unit to the first: the gradient of the metric, and what those of the weights
    are made of.

    What is inside a GLU is computed again. The vectors' gradients are sums over the rows of a program.
    """
    dtype = inner_weight.dtype.element_ty
    start, row, column, is_place, places = _places(rows, D, ROWS, BLOCK)
    is_row = row < rows - start
    is_column = column < D
    count = tl.cast(rows, tl.int64)
    of_inner_bias = of_vectors + tl.program_id(0).to(tl.int64) * (UNITS * DEPTH * (2 * INNER + D) + 2 * UNITS * D)
    of_outer_bias = of_inner_bias + UNITS * DEPTH * 2 * INNER
    of_norm_weight = of_outer_bias + UNITS * DEPTH * D
    of_norm_bias = of_norm_weight + UNITS * D

    slope = tl.load(gradient + start * D + places, mask=is_place, other=0.0).to(tl.float32)
    for unit_behind in range(UNITS):
        unit = UNITS - 1 - unit_behind
        # Rows beyond the last have no slope, and so add nothing.
        total = tl.load(sums + (unit * count + start) * D + places, mask=is_place, other=0.0)
        slope = _through_norm(
            slope, total, norm_weight + unit * D, of_norm_weight + unit * D, of_norm_bias + unit * D, column, eps, D
        )

        of_update = slope
        for place_behind in range(DEPTH):
            glu = unit * DEPTH + (DEPTH - 1 - place_behind)
            given = tl.load(inputs + (glu * count + start) * D + places, mask=is_place, other=0.0)
            of_output = of_update.to(dtype)
            tl.store(of_outputs + (glu * count + start) * D + places, of_output, mask=is_place)
            tl.store(of_outer_bias + glu * D + column, tl.sum(of_update, 0), mask=is_column)
            of_update = tl.zeros((ROWS, BLOCK), tl.float32)
            for first in range(0, STRIDE, COLUMNS):
                inner = first + tl.arange(0, COLUMNS)
                is_inner = inner < INNER
                is_weight = is_inner[:, None] & is_column[None, :]
                weights = inner_weight + glu * (2 * INNER * D) + inner[:, None] * D + column[None, :]
                gate_weight = tl.load(weights, mask=is_weight, other=0.0)
                up_weight = tl.load(weights + INNER * D, mask=is_weight, other=0.0)
                biases = glu * (2 * INNER) + inner
                gate, up = _gate_and_up(given, gate_weight, up_weight, inner_bias, biases, is_inner, INNER, HAS_BIAS)
                weights = outer_weight + glu * (INNER * D) + column[:, None] * INNER + inner[None, :]
                outer = tl.load(weights, mask=is_column[:, None] & is_inner[None, :], other=0.0)
                of_product = tl.dot(of_output, outer, input_precision="ieee")
                taken, of_gate, of_up = _through_product(of_product, gate, up)
                tl.store(of_inner_bias + biases, tl.sum(of_gate, 0), mask=is_inner)
                tl.store(of_inner_bias + biases + INNER, tl.sum(of_up, 0), mask=is_inner)
                stored = is_row[:, None] & (inner < STRIDE)[None, :]
                first_row = (glu * count + start) * STRIDE
                at = row[:, None] * STRIDE + inner[None, :]
                tl.store(hidden + first_row + at, taken.to(dtype), mask=stored)
                at = row[:, None] * (2 * STRIDE) + inner[None, :]
                tl.store(of_hidden + 2 * first_row + at, of_gate.to(dtype), mask=stored)
                tl.store(of_hidden + (2 * first_row + STRIDE) + at, of_up.to(dtype), mask=stored)
                of_update = tl.dot(of_gate.to(dtype), gate_weight, of_update, input_precision="ieee")
                of_update = tl.dot(of_up.to(dtype), up_weight, of_update, input_precision="ieee")
        slope += of_update
    tl.store(of_metric + start * D + places, slope, mask=is_place)
