"""The DAG loss of a model's deductive outputs, and its values for the log (see `dag_loss`)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .log_trace_exp import log_trace_exp

TENSOR_NAMES = ("A_LM", "A_P", "G_LM")


class LayerOutputs(Protocol):
    """Deductive outputs of one layer, each (..., d, d), or None where the model has none (predefined G)."""

    @property
    def positive_metric(self) -> Tensor | None:
        """A_LM."""

    @property
    def potential(self) -> Tensor | None:
        """A_P."""

    @property
    def curvature(self) -> Tensor | None:
        """G_LM."""


@dataclass(frozen=True)
class DagCoefficients:
    """Weights of DL(A_LM), DL(A_P) and DL(G_LM) in the loss; 0 means: measure, do not train on it."""

    A_LM: float = 0.0
    A_P: float = 0.0
    G_LM: float = 0.0

    def __post_init__(self) -> None:
        for name in TENSOR_NAMES:
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"DAG coefficient {name}={getattr(self, name)} must be a finite number")


def schedule_factor(step: int, kind: str, start: int, stop: int, shape: str = "linear") -> float:
    """Return the factor in [0, 1] of a coefficient at optimizer step `step`, counted from 0.

    Args:
        step: about to be taken.
        kind: `constant`: 1 always. `warmup`: 0 until `start`, rising to 1 at `stop`. `decay`: 1 until `start`, falling
            to 0 at `stop`. `window`: 1 in the steps [start, stop), else 0.
        start: first step of the change.
        stop: behind it.
        shape: `linear`, or `cosine` for half a cosine.

    Raises:
        ValueError: another kind or shape.
    """
    if kind == "constant":
        return 1.0
    if kind == "window":
        return float(start <= step < stop)
    if kind not in ("warmup", "decay") or shape not in ("linear", "cosine"):
        raise ValueError(f"no schedule {kind!r} with shape {shape!r}")
    risen = min(1.0, max(0.0, (step - start) / (stop - start)))
    if shape == "cosine":
        risen = 0.5 * (1.0 - math.cos(math.pi * risen))
    return risen if kind == "warmup" else 1.0 - risen


@dataclass(frozen=True)
class DagLoss:
    """`total`: scalar with graph, the sum of coefficient * DL; by tensor name the mean DL () and its (L,) layer values.

    `per_tensor` and `per_layer` are detached. A tensor that the model does not have, or that was not measured, is in
    neither of them.
    """

    total: Tensor
    per_tensor: dict[str, Tensor]
    per_layer: dict[str, Tensor]


def dag_loss(
    tensors: Mapping[str, Sequence[Tensor]] | Sequence[LayerOutputs],
    coefficients: DagCoefficients,
    *,
    measure: bool = True,
    reduce: str = "mean",
    layer_factors: Sequence[float] | None = None,
) -> DagLoss:
    """DL(M) = ln(tr(exp(M o M))/d), averaged over layer x batch x head, of A_LM, A_P and G_LM, and their weighted sum.

    `reduce` and `layer_factors` change `total` alone: the values to log are the same means under all of them.

    Args:
        tensors: by name ("A_LM", "A_P", "G_LM") one tensor (..., d, d) per layer, leading axes batch, optionally
            chunk, and head; or the layers' outputs, in which None leaves a tensor out.
        coefficients: weights in the total. Tensors with coefficient 0 are measured without a graph.
        measure: False leaves tensors with coefficient 0 out altogether.
        reduce: what the total has of the heads, the last of the leading axes: their `mean`, or the `max`, whose
            gradient goes through the largest head of each layer and sequence alone.
        layer_factors: one for each layer; its loss is multiplied by it in the total. The sum is still divided by the
            number of layers.

    Raises:
        ValueError: for a name other than the three, a tensor that only some layers have, layers of unequal shape, no
            tensor at all, a coefficient other than 0 on a tensor that the model does not have, another `reduce`, or
            another number of factors than of layers.
    """
    by_name = dict(tensors) if isinstance(tensors, Mapping) else _by_name(tensors)
    _check(by_name, coefficients)
    if reduce not in ("mean", "max"):
        raise ValueError(f"the DAG loss has the mean or the max of the heads, not {reduce!r}")
    names = [name for name in TENSOR_NAMES if name in by_name]
    trained = [name for name in names if getattr(coefficients, name) != 0.0]
    means, losses = _layer_losses(by_name, trained, reduce)
    if measure:
        with torch.no_grad():
            means |= _layer_losses(by_name, [name for name in names if name not in trained], "mean")[0]
    total = by_name[names[0]][0].new_zeros((), dtype=torch.float32)
    for name in trained:
        total = total + getattr(coefficients, name) * _mean_over_layers(losses[name], layer_factors)
    per_layer = {name: means[name].detach() for name in names if name in means}
    return DagLoss(total, {name: values.mean() for name, values in per_layer.items()}, per_layer)


def _layer_losses(
    by_name: Mapping[str, Sequence[Tensor]], names: Sequence[str], reduce: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return by name, each (L,), the mean DL of each layer and its loss, which has the mean or the max of the heads.

    Tensors of one shape and type share a batched call.
    """
    groups: dict[tuple[object, ...], list[str]] = {}
    for name in names:
        first = by_name[name][0]
        groups.setdefault((len(by_name[name]), first.shape, first.dtype), []).append(name)
    means: dict[str, Tensor] = {}
    losses: dict[str, Tensor] = {}
    for group in groups.values():
        values = log_trace_exp(torch.stack([layer for name in group for layer in by_name[name]]))
        layer_means = layer_losses = values.flatten(1).mean(1)
        if reduce == "max":
            layer_losses = values.amax(-1, keepdim=True).flatten(1).mean(1)
        means |= dict(zip(group, layer_means.reshape(len(group), -1), strict=True))
        losses |= dict(zip(group, layer_losses.reshape(len(group), -1), strict=True))
    return means, losses


def _mean_over_layers(losses: Tensor, factors: Sequence[float] | None) -> Tensor:
    """(L,) -> (); the sum of factor * loss over the number of layers. A layer of factor 0 gets no gradient."""
    if factors is None:
        return losses.mean()
    if len(factors) != len(losses):
        raise ValueError(f"the DAG loss got {len(factors)} layer_factors for {len(losses)} layers")
    weighted = [factor * loss for factor, loss in zip(factors, losses.unbind(), strict=True) if factor != 0.0]
    return torch.stack([losses.new_zeros(()), *weighted]).sum() / len(losses)


def _by_name(layers: Sequence[LayerOutputs]) -> dict[str, list[Tensor]]:
    """Return the tensors by name from the layers' outputs; a name that is None in every layer is left out."""
    fields = {
        "A_LM": [layer.positive_metric for layer in layers],
        "A_P": [layer.potential for layer in layers],
        "G_LM": [layer.curvature for layer in layers],
    }
    by_name = {}
    for name, column in fields.items():
        present = [tensor for tensor in column if tensor is not None]
        if present and len(present) < len(column):
            missing = [layer for layer, tensor in enumerate(column) if tensor is None]
            raise ValueError(f"the DAG loss needs {name} of every layer or of none; missing in layers {missing}")
        if present:
            by_name[name] = present
    return by_name


def _check(by_name: Mapping[str, Sequence[Tensor]], coefficients: DagCoefficients) -> None:
    unknown = sorted(set(by_name) - set(TENSOR_NAMES))
    if unknown:
        raise ValueError(f"the DAG loss knows {', '.join(TENSOR_NAMES)}, not {', '.join(unknown)}")
    empty = [name for name, layers in by_name.items() if len(layers) == 0]
    if empty or not by_name:
        raise ValueError(f"the DAG loss got no layers{' of ' + ', '.join(empty) if empty else ''}")
    for name, layers in by_name.items():
        shapes = {tuple(layer.shape) for layer in layers}
        if len(shapes) > 1:
            raise ValueError(f"{name} has layers of unequal shape: {sorted(shapes)}")
    absent = [name for name in TENSOR_NAMES if getattr(coefficients, name) != 0.0 and name not in by_name]
    if absent:
        raise ValueError(
            f"DAG coefficient {absent[0]}={getattr(coefficients, absent[0])}, but the model has no {absent[0]} "
            f"(with a predefined G it has G_LM only); set the coefficient to 0"
        )
