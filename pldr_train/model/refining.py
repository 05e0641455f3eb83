"""The residual units of a metric learner as one operation, for devices on which launches decide the time.

Unit by unit, the metric learner of a layer is more than two hundred launches on a GPU, each of little work. Rows of a
metric do not depend on each other, so one Triton kernel (`refining_kernel.py`) takes them through all units, and one
back; the gradients of the weights are two batched products. Between the products everything is in fp32, where autocast
rounds to the weights' type.

The operations are written out in torch, too: for tensors that no kernel takes, and as what the kernels are compared
with.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_log = logging.getLogger(__name__)

TRITON_SWITCH = "PLDR_TRAIN_TRITON"
"""Environment variable; `0` rules out the Triton kernels. `dag/log_trace_exp.py` reads it too."""

_ALIGNED = 8
"""Numbers of 16 bits: fast products need rows of multiples of these."""


@dataclass(frozen=True)
class Sizes:
    """Of a metric learner: columns of a metric, inner columns of a GLU, GLUs of a unit, units; and its biases."""

    d: int
    inner: int
    depth: int
    units: int
    has_bias: bool

    @property
    def num_vectors(self) -> int:
        """All elements of biases and LayerNorms."""
        biases = self.units * self.depth * (2 * self.inner + self.d)
        return biases + 2 * self.units * self.d

    @property
    def part(self) -> int:
        """Rows whose gradients of biases and LayerNorms a program of the kernel sums; torch sums those of parts."""
        return 64 if self.d <= 64 else 32

    @property
    def stride(self) -> int:
        """The inner columns, with those that align rows."""
        return -(-self.inner // _ALIGNED) * _ALIGNED


_Forward = Callable[..., tuple[Tensor, Tensor, Tensor]]
_Backward = Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class Kernels:
    """What computes `_refine` and `_refine_backward` for contiguous tensors of at least one row."""

    forward: _Forward
    backward: _Backward


def refine(
    metric: Tensor,
    inner_weight: Tensor,
    inner_bias: Tensor | None,
    outer_weight: Tensor,
    outer_bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
) -> Tensor:
    """Refine the rows of metrics by U residual units of n GLUs each: A <- LayerNorm(GLU_n(... GLU_1(A)) + A).

    Args:
        metric: A, (..., d), fp32 or fp64.
        inner_weight: gate and up of each GLU, (U n, 2, inner, d). Products take factors of its type.
        inner_bias: (U n, 2, inner) of that type, or None.
        outer_weight: down of each GLU, (U n, d, inner), of that type.
        outer_bias: (U n, d) of that type, or None.
        norm_weight: of the LayerNorms, (U, d), of the type of A.
        norm_bias: likewise.
        eps: of the LayerNorms.

    Returns:
        (..., d). It has no second derivative.
    """
    rows = metric.reshape(-1, metric.shape[-1])
    weights = inner_weight, inner_bias, outer_weight, outer_bias, norm_weight, norm_bias
    refined: Tensor = _Refine.apply(eps, rows, *weights)  # type: ignore[no-untyped-call]
    return refined.view_as(metric)


def is_at_once(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> bool:
    """Return whether `refine` is worth its name for weights of a type and size: there are kernels for them."""
    return kernels_for(device, dtype, sizes) is not None


class _Refine(torch.autograd.Function):
    """Rows (n, d) and weights, as `refine` takes them -> refined rows."""

    @staticmethod
    def forward(
        ctx: Any,
        eps: float,
        metric: Tensor,
        inner_weight: Tensor,
        inner_bias: Tensor | None,
        outer_weight: Tensor,
        outer_bias: Tensor | None,
        norm_weight: Tensor,
        norm_bias: Tensor,
    ) -> Tensor:
        refined: Tensor
        refined, inputs, sums = _refine(
            metric, inner_weight, inner_bias, outer_weight, outer_bias, norm_weight, norm_bias, eps
        )
        ctx.save_for_backward(inputs, sums, inner_weight, inner_bias, outer_weight, norm_weight)
        ctx.eps = eps
        return refined

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, sums, inner_weight, inner_bias, outer_weight, norm_weight = ctx.saved_tensors
        sizes = sizes_of(inner_weight, inner_bias, norm_weight)
        of_metric, hidden, of_hidden, of_outputs, of_vectors = _refine_backward(
            gradient, inputs, sums, inner_weight, inner_bias, outer_weight, norm_weight, ctx.eps
        )
        of_inner_weight = torch.bmm(of_hidden.flatten(2).mT, inputs).view(-1, 2, sizes.stride, sizes.d)
        of_outer_weight = torch.bmm(of_outputs.mT, hidden)
        glus = sizes.units * sizes.depth
        of_inner_bias, of_outer_bias, of_norm_weight, of_norm_bias = torch.split(
            of_vectors.sum(0),
            [glus * 2 * sizes.inner, glus * sizes.d, sizes.units * sizes.d, sizes.units * sizes.d],
        )
        return (
            None,
            of_metric,
            of_inner_weight[:, :, : sizes.inner],
            None if inner_bias is None else of_inner_bias.to(inner_bias.dtype).view(glus, 2, sizes.inner),
            of_outer_weight[:, :, : sizes.inner],
            None if inner_bias is None else of_outer_bias.to(inner_bias.dtype).view(glus, sizes.d),
            of_norm_weight.view(sizes.units, sizes.d),
            of_norm_bias.view(sizes.units, sizes.d),
        )


def sizes_of(inner_weight: Tensor, inner_bias: Tensor | None, norm_weight: Tensor) -> Sizes:
    """Return the sizes of weights as `refine` takes them."""
    units, d = norm_weight.shape
    return Sizes(d, inner_weight.shape[2], len(inner_weight) // units, units, inner_bias is not None)


@torch.library.custom_op("pldr_train::refine", mutates_args=())
def _refine(
    metric: Tensor,
    inner_weight: Tensor,
    inner_bias: Tensor | None,
    outer_weight: Tensor,
    outer_bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the rows (n, d) refined, the inputs of the GLUs (U n, n, d) and the units' sums before their LayerNorm
    (U, n, d).
    """
    kernels = kernels_for(metric.device, inner_weight.dtype, sizes_of(inner_weight, inner_bias, norm_weight))
    forward: _Forward = written_out if kernels is None or not len(metric) else kernels.forward
    tensors = metric, inner_weight, inner_bias, outer_weight, outer_bias, norm_weight, norm_bias
    with torch.autocast(metric.device.type, enabled=False):
        return forward(*(None if each is None else each.contiguous() for each in tensors), eps)


@_refine.register_fake
def _(metric: Tensor, inner_weight: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, norm_weight, _, _ = others
    return empty_refined(metric, inner_weight, norm_weight)


def empty_refined(metric: Tensor, inner_weight: Tensor, norm_weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return tensors of the shapes that `_refine` returns."""
    rows, d = metric.shape
    inputs = inner_weight.new_empty((len(inner_weight), rows, d))
    return metric.new_empty((rows, d)), inputs, metric.new_empty((len(norm_weight), rows, d))


@torch.library.custom_op("pldr_train::refine_backward", mutates_args=())
def _refine_backward(
    gradient: Tensor,
    inputs: Tensor,
    sums: Tensor,
    inner_weight: Tensor,
    inner_bias: Tensor | None,
    outer_weight: Tensor,
    norm_weight: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradient of the rows (n, d), and what those of the weights are made of.

    Of each GLU: what down takes (U n, n, stride), the gradients of what gate and up give (U n, n, 2, stride), zero
    beyond the inner columns, and of what down gives (U n, n, d). Of each part of rows: the gradients of inner biases,
    outer ones, and weights and biases of the LayerNorms, one after another (parts, num_vectors).
    """
    sizes = sizes_of(inner_weight, inner_bias, norm_weight)
    kernels = kernels_for(gradient.device, inner_weight.dtype, sizes)
    backward: _Backward = backward_written_out if kernels is None or not len(gradient) else kernels.backward
    tensors = gradient, inputs, sums, inner_weight, inner_bias, outer_weight, norm_weight
    with torch.autocast(gradient.device.type, enabled=False):
        return backward(*(None if each is None else each.contiguous() for each in tensors), eps)


@_refine_backward.register_fake
def _(gradient: Tensor, inputs: Tensor, _sums: Tensor, *weights: Any) -> tuple[Tensor, ...]:
    inner_weight, inner_bias, _, norm_weight, _ = weights
    return empty_results(gradient, inputs, sizes_of(inner_weight, inner_bias, norm_weight))


def empty_results(gradient: Tensor, inputs: Tensor, sizes: Sizes) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return tensors of the shapes that `_refine_backward` returns."""
    glus, rows, d = inputs.shape
    return (
        gradient.new_empty((rows, d)),
        inputs.new_empty((glus, rows, sizes.stride)),
        inputs.new_empty((glus, rows, 2, sizes.stride)),
        inputs.new_empty((glus, rows, d)),
        gradient.new_empty((-(-rows // sizes.part), sizes.num_vectors)),
    )


# Written out.


def written_out(
    metric: Tensor,
    inner_weight: Tensor,
    inner_bias: Tensor | None,
    outer_weight: Tensor,
    outer_bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `_refine` in torch."""
    sizes = sizes_of(inner_weight, inner_bias, norm_weight)
    inputs: list[Tensor] = []
    sums: list[Tensor] = []
    for unit in range(sizes.units):
        update = metric
        for glu in range(unit * sizes.depth, (unit + 1) * sizes.depth):
            inputs.append(update.to(inner_weight.dtype))
            gate, up = _gate_and_up(inputs[-1], inner_weight[glu], None if inner_bias is None else inner_bias[glu])
            hidden = (F.silu(gate) * up).to(inner_weight.dtype)
            update = hidden.to(metric.dtype) @ outer_weight[glu].to(metric.dtype).mT
            if outer_bias is not None:
                update = update + outer_bias[glu]
        sums.append(update + metric)
        metric = F.layer_norm(sums[-1], (sizes.d,), norm_weight[unit], norm_bias[unit], eps)
    return metric, torch.stack(inputs), torch.stack(sums)


def backward_written_out(
    gradient: Tensor,
    inputs: Tensor,
    sums: Tensor,
    inner_weight: Tensor,
    inner_bias: Tensor | None,
    outer_weight: Tensor,
    norm_weight: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute `_refine_backward` in torch."""
    sizes = sizes_of(inner_weight, inner_bias, norm_weight)
    _, hidden, of_hidden, of_outputs, _ = results = empty_results(gradient, inputs, sizes)
    hidden.zero_()
    of_hidden.zero_()
    glus = range(sizes.units * sizes.depth)
    vectors: dict[tuple[str, int], Tensor] = {}
    slope = gradient
    for unit in reversed(range(sizes.units)):
        centred = sums[unit] - sums[unit].mean(-1, keepdim=True)
        scale = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
        normal = centred * scale
        vectors["norm weight", unit], vectors["norm bias", unit] = slope * normal, slope
        slope = slope * norm_weight[unit]
        along = (slope * normal).mean(-1, keepdim=True)
        slope = (slope - slope.mean(-1, keepdim=True) - normal * along) * scale
        of_update = slope
        for glu in reversed(glus[unit * sizes.depth : (unit + 1) * sizes.depth]):
            vectors["outer bias", glu] = of_update
            of_outputs[glu] = of_update
            gate, up = _gate_and_up(inputs[glu], inner_weight[glu], None if inner_bias is None else inner_bias[glu])
            share = gate.sigmoid()
            of_product = of_outputs[glu].to(gate.dtype) @ outer_weight[glu].to(gate.dtype)
            of_up = of_product * gate * share
            of_gate = of_product * up * share * (1 + gate * (1 - share))
            vectors["inner bias", glu] = torch.cat([of_gate, of_up], -1)
            hidden[glu, :, : sizes.inner] = gate * share * up
            of_hidden[glu, :, 0, : sizes.inner], of_hidden[glu, :, 1, : sizes.inner] = of_gate, of_up
            both = of_hidden[glu, :, :, : sizes.inner].flatten(1).to(gate.dtype)
            of_update = both @ inner_weight[glu].flatten(0, 1).to(gate.dtype)
        slope = slope + of_update
    order = [("inner bias", glu) for glu in glus] + [("outer bias", glu) for glu in glus]
    order += [(name, unit) for name in ("norm weight", "norm bias") for unit in range(sizes.units)]
    rows = torch.cat([vectors[each] for each in order], -1)
    parts = F.pad(rows, (0, 0, 0, -len(rows) % sizes.part)).view(-1, sizes.part, rows.shape[1]).sum(1)
    return slope.contiguous(), *results[1:4], parts


def _gate_and_up(given: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """(n, d), (2, inner, d) and (2, inner) -> twice (n, inner), at least fp32."""
    wide = torch.promote_types(given.dtype, torch.float32)
    both = given.to(wide) @ weight.flatten(0, 1).to(wide).mT
    gate, up = (both if bias is None else both + bias.flatten()).chunk(2, -1)
    return gate, up


# The kernels.


@functools.cache
def kernels_for(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Kernels | None:
    """Return the Triton kernels for weights of a type and size; None: there is no Triton, or they do not take these.

    Kernels that cannot be built here, or do not compute what is written out above, are not taken, with a warning. The
    host waits for the device, once.
    """
    if device.type != "cuda" or torch.version.hip is not None or os.environ.get(TRITON_SWITCH) == "0":
        return None
    if dtype != torch.bfloat16:
        return None
    kernels = _kernels_of_capability(torch.cuda.get_device_capability(device), sizes.d)
    return kernels if kernels is not None and _compute_the_same(kernels, device, dtype, sizes) else None


def _kernels_of_capability(capability: tuple[int, int], d: int) -> Kernels | None:
    try:
        from . import refining_kernel  # noqa: PLC0415
    except ImportError:
        return None
    shapes = refining_kernel.shapes_of(d, capability)
    if shapes is None:
        return None
    return Kernels(
        functools.partial(refining_kernel.evaluate, shape=shapes.forward),
        functools.partial(refining_kernel.evaluate_backward, shape=shapes.backward),
    )


def example(
    device: torch.device, dtype: torch.dtype, sizes: Sizes, rows: int
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """Return rows of metrics and a gradient of what becomes of them, (rows, d), and weights as `refine` takes them."""
    made = 0

    def waves(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
        nonlocal made
        made += 1
        places = torch.arange(torch.Size(shape).numel(), device=device, dtype=torch.float64)
        return (scale * (places * (0.7 + 0.1 * made) + made).sin()).view(shape).to(dtype)

    glus, d, inner = sizes.units * sizes.depth, sizes.d, sizes.inner
    wide = torch.promote_types(dtype, torch.float32)
    inner_weight = waves(glus, 2, inner, d, scale=2 * d**-0.5, dtype=dtype)
    outer_weight = waves(glus, d, inner, scale=2 * inner**-0.5, dtype=dtype)
    inner_bias, outer_bias = waves(glus, 2, inner, dtype=dtype), waves(glus, d, dtype=dtype)
    norm_weight, norm_bias = 1.0 + waves(sizes.units, d, scale=0.1, dtype=wide), waves(sizes.units, d, dtype=wide)
    weights: list[Tensor | None] = [inner_weight, inner_bias, outer_weight, outer_bias, norm_weight, norm_bias]
    if not sizes.has_bias:
        weights[1] = weights[3] = None
    return waves(rows, d, dtype=wide), waves(rows, d, dtype=wide), weights


def _compute_the_same(kernels: Kernels, device: torch.device, dtype: torch.dtype, sizes: Sizes) -> bool:
    """Return whether kernels can be built here and give what is written out; warn if not."""
    rows, gradient, weights = example(device, dtype, sizes, sizes.part + 8)
    try:
        with torch.autocast(device.type, enabled=False):  # a training step's, which has asked
            compare(kernels, rows, gradient, weights)
    except Exception as error:  # whatever a compiler or a driver raises
        _log.warning(f"the metric learner does without its Triton kernels: {error}")
        return False
    return True


def compare(kernels: Kernels, rows: Tensor, gradient: Tensor, weights: list[Tensor | None], eps: float = 1e-6) -> None:
    """Raise AssertionError where kernels do not give what is written out; what `example` gives, contiguous.

    The bound is on the norm of the difference: sums of another order may round a factor of a product to its neighbour.
    """
    inner_weight, inner_bias, outer_weight, _, norm_weight, _ = weights
    assert inner_weight is not None
    written: tuple[_Forward, _Backward] = written_out, backward_written_out
    forward = written[0](rows, *weights, eps)
    saved = (gradient, *forward[1:], inner_weight, inner_bias, outer_weight, norm_weight, eps)
    bound = 2.0**14 * torch.finfo(torch.promote_types(rows.dtype, torch.float32)).eps
    if inner_weight.dtype in (torch.float16, torch.bfloat16):
        bound = 8 * torch.finfo(inner_weight.dtype).eps
    names = ["refined", "inputs", "sums", "of metric", "hidden", "of hidden", "of outputs", "of vectors"]
    found = (*kernels.forward(rows, *weights, eps), *kernels.backward(*saved))
    for name, one, other in zip(names, found, (*forward, *written[1](*saved)), strict=True):
        assert one.shape == other.shape, name
        error = (one.double() - other.double()).norm().item()
        assert error <= bound * other.double().norm().item(), f"{name}: differs by {error:g}"
