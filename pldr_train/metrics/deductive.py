"""Metrics of the layers over batches and processes: of the deductive outputs, of two runs', and of attention.

What is measured is declared in `tensor_metrics.py` and `layer_metrics.py`; here it is kept as sums. All arithmetic is
fp64: what is measured lies many digits below the values (the rows of a near-critical A differ by 1e-6 of their size),
and fp32 would measure its own rounding.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric

from .layer_metrics import ATTENTION, ATTENTION_METRICS, DEDUCTIVE, TENSORS, LayerMetric, rows_of
from .tensor_metrics import CHEAP, COSTLY, ORDER_METRICS, ROW_MAP_METRICS, SETS, TENSOR_METRICS

RANK_TOLERANCE = torch.finfo(torch.float32).eps
"""Times d: singular values up to this share of the largest count as 0. fp32's, for that is what models compute in."""

_MOST_ELEMENTS = 2**22
"""Elements that are computed with at once, 32 MiB in fp64."""


class DeductiveLike(Protocol):
    """The deductive outputs of one layer, each (B, ..., H, d, d); only the curvature exists with a predefined G."""

    @property
    def metric(self) -> Tensor | None:
        """A."""

    @property
    def positive_metric(self) -> Tensor | None:
        """A_LM."""

    @property
    def potential(self) -> Tensor | None:
        """A_P."""

    @property
    def curvature(self) -> Tensor:
        """G_LM."""


def present_tensors(layer: DeductiveLike) -> dict[str, Tensor]:
    """Return the tensors of a layer that are there, by name, without their graphs."""
    tensors: dict[str, Tensor | None] = {name: getattr(layer, attribute) for name, attribute in TENSORS.items()}
    return {name: tensor.detach() for name, tensor in tensors.items() if tensor is not None}


# ----------------------------------------------------------------------------------------------- what metrics are given


@dataclass(frozen=True)
class Spectra:
    """Of each matrix, (...)."""

    spectral_norm: Tensor
    """Largest singular value."""
    log_abs_det: Tensor
    """ln |det|, -inf where the determinant is exactly 0."""
    rank: Tensor
    """Singular values above d * `RANK_TOLERANCE` times the largest."""


def spectra(matrices: Tensor) -> Spectra:
    """Decompose finite matrices (..., d, d) in fp64; waits for the device (torch checks that the SVD converged)."""
    full = matrices.double()
    singular_values = torch.linalg.svdvals(full)
    rank = numerical_rank(singular_values).double()
    return Spectra(singular_values[..., 0], torch.linalg.slogdet(full).logabsdet, rank)


def numerical_rank(singular_values: Tensor) -> Tensor:
    """Return how many of (..., d) singular values, the largest first, are above d * `RANK_TOLERANCE` of it."""
    tolerance = singular_values.shape[-1] * RANK_TOLERANCE * singular_values[..., :1]
    return (singular_values > tolerance).sum(-1)


def commutant_residual(curvature: Tensor, interleaved: bool) -> Tensor:
    """Return the share of G that does not commute with the rotary embedding's rotations, (..., d, d) -> (...), fp64.

    The rotations of all planes are diagonal in one complex basis, with a frequency of its own for each of its d
    vectors. What commutes with them is diagonal there; the residual is the Frobenius norm of the rest over that of G:
    0 for the identity and for rotations, sqrt(1 - 1/d) in the mean square for independent normal entries, 1 for
    diag(1, -1, 1, -1, ...).

    Args:
        curvature: G.
        interleaved: whether planes are (0, 1), (2, 3), ... (`reference_rope`) or (i, i + d/2).
    """
    full = curvature.double()
    d = full.shape[-1]
    first = torch.arange(0, d, 2) if interleaved else torch.arange(d // 2)
    second = first + 1 if interleaved else first + d // 2
    a, b, c, e = (full[..., i, j] for i, j in ((first, first), (first, second), (second, first), (second, second)))
    # Of a plane's block ((a, b), (c, e)) the two diagonal entries in the basis are ((a + e) -+ i (b - c)) / 2.
    kept = ((a + e).square() + (b - c).square()).sum(-1) / 2
    total = full.square().sum((-2, -1))
    return (1 - kept / total).clamp(min=0).sqrt()


class Matrices:
    """Some of a tensor's matrices, and what several metrics take of them; each is computed when it is first asked for.

    Args:
        values: (N, H, d, d) in fp64.
        interleaved: how the model's rotary embedding pairs columns, see `commutant_residual`.
    """

    def __init__(self, values: Tensor, interleaved: bool = True) -> None:
        self.values = values
        self._interleaved = interleaved

    @cached_property
    def finite(self) -> Tensor:
        """Whether each element is a number, (N, H, d, d)."""
        return self.values.isfinite()

    @cached_property
    def clean(self) -> Tensor:
        """The values, with 0 for what is not finite, (N, H, d, d)."""
        return self.values.where(self.finite, 0.0)

    @cached_property
    def element_count(self) -> Tensor:
        """Number of elements, a scalar."""
        return self.values.new_full((), self.values.numel())

    @cached_property
    def finite_count(self) -> Tensor:
        """Number of finite elements, a scalar."""
        return self.finite.sum()

    @cached_property
    def whole(self) -> Tensor:
        """Whether all elements of a matrix are finite, (N, H)."""
        return self.finite.flatten(-2).all(-1)

    @cached_property
    def commutant_residual(self) -> Tensor:
        """Of the matrices, (N, H); NaN of one that is 0 or not finite."""
        return commutant_residual(self.values, self._interleaved)

    @cached_property
    def spectra(self) -> Spectra:
        """Of the matrices, (N, H) each; those that are not finite count as 0, for a decomposition of NaN raises."""
        return spectra(self.values.where(self.whole[..., None, None], 0.0))


class Pair:
    """Two tensors of one shape, of two runs over the same prompts; elements that one of them lacks are 0 in both."""

    def __init__(self, first: Tensor, second: Tensor) -> None:
        finite = first.isfinite() & second.isfinite()
        self.first, self.second = (each.double().where(finite, 0.0) for each in (first, second))
        self.element_count = self.first.new_full((), first.numel())
        self.finite_count = finite.sum()
        self.difference_squares = (self.first - self.second).square().sum()
        self.first_squares = self.first.square().sum()


class AttentionRows:
    """The rows of attention weights.

    Args:
        weights: (B, H, S, T).
        visible: (1 or B, S), how many positions each row sees, 0 for one of padding.
    """

    def __init__(self, weights: Tensor, visible: Tensor) -> None:
        self.entropy = attention_entropy(weights)
        """(B, H, S), nats."""
        self.visible = visible[:, None].expand_as(self.entropy)
        self.seen = self.visible > 0
        self.finite = self.seen & self.entropy.isfinite()


def attention_entropy(weights: Tensor) -> Tensor:
    """-sum p ln p of each row, with 0 ln 0 = 0 for masked positions: (..., S, T) -> (..., S), nats."""
    full = weights if weights.dtype == torch.float64 else weights.float()
    entropy: Tensor = torch.special.entr(full).sum(-1, dtype=torch.float64)
    return entropy


def causal_visible_positions(weights: Tensor, token_mask: Tensor | None = None) -> Tensor:
    """Return how many positions each row of weights (B, H, S, T) sees: (1 or B, S), 0 for rows of padding.

    The S queries are the last of the T positions; `token_mask` (B, T) is nonzero for real tokens.
    """
    queries, keys = weights.shape[-2:]
    if token_mask is None:
        return torch.arange(keys - queries + 1, keys + 1, device=weights.device)[None]
    real = token_mask != 0
    return (real.cumsum(-1) * real)[:, keys - queries :]


# ----------------------------------------------------------------------------------------------------------------- sums


_COMBINE: Mapping[str, Callable[[Any, Any], Any]] = {"sum": operator.add, "min": torch.minimum, "max": torch.maximum}
_NEUTRAL = {"sum": 0.0, "min": math.inf, "max": -math.inf}
_REDUCE = {"sum": dist.ReduceOp.SUM, "min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX}
"""How what two batches, layers or processes have given becomes one."""


class LayerSums(Metric):  # type: ignore[misc]
    """Metrics of each layer and over all of them, kept on the device so that batches and processes combine exactly.

    Args:
        metrics: what is measured; all the sums of one operation stand in one vector, in the order of the metrics.
        num_layers: of the model.
        prefix: of the names, `<prefix>/G_LM/spread` over all layers and `<prefix>/layer_3/G_LM/spread`, counted from 0.
        matrix_shape: (H, d, d), of what is kept for the `matrix_parts`.
    """

    full_state_update = False

    def __init__(
        self, metrics: Sequence[LayerMetric], num_layers: int, prefix: str, matrix_shape: Sequence[int] = ()
    ) -> None:
        super().__init__(compute_with_cache=False)
        self.metrics, self.num_layers, self.prefix = tuple(metrics), num_layers, prefix
        self.rows = rows_of(metrics)
        self._operations: dict[str, str] = {}
        for operation in dict.fromkeys(metric.operation for metric in metrics):
            width = sum(len(metric.parts) for metric in metrics if metric.operation == operation)
            self._add_sums(operation, operation, (num_layers, len(self.rows), width))
        for metric in metrics:
            for part in metric.matrix_parts:
                shape = (num_layers, len(metric.rows), *matrix_shape)
                self._add_sums(f"{metric.name}_{part}", metric.operation, shape)

    def _add_sums(self, state: str, operation: str, shape: Sequence[int]) -> None:
        start = torch.full(tuple(shape), _NEUTRAL[operation], dtype=torch.float64)
        self.add_state(f"{state}s", start, dist_reduce_fx=operation)
        self._operations[f"{state}s"] = operation

    def add(self, layer: int, row: str, subject: Any, learned: bool = True) -> None:
        """Add a batch of one of `rows` in a layer; what means nothing for a predefined G is left out of one."""
        gathered: dict[str, list[Tensor]] = {metric.operation: [] for metric in self.metrics}
        for metric in self.metrics:
            count = len(metric.parts)
            if row not in metric.rows or (metric.learned_only and not learned):
                neutral = getattr(self, f"{metric.operation}s").new_full((), _NEUTRAL[metric.operation])
                gathered[metric.operation] += [neutral] * count
                continue
            found = metric.sums(subject)
            gathered[metric.operation] += [each.double() for each in found[:count]]
            for part, matrix in zip(metric.matrix_parts, found[count:], strict=True):
                state = getattr(self, f"{metric.name}_{part}s")[layer, metric.rows.index(row)]
                state.copy_(_COMBINE[metric.operation](state, matrix))
        for operation, scalars in gathered.items():
            state = getattr(self, f"{operation}s")[layer, self.rows.index(row)]
            state.copy_(_COMBINE[operation](state, torch.stack(scalars)))

    def _sync_dist(self, dist_sync_fn: Any = None, process_group: Any = None) -> None:
        """Reduce each state in place, where torchmetrics would first gather every process' own on each."""
        for name, operation in self._operations.items():
            state = getattr(self, name).clone()  # torchmetrics goes on with the process' own afterwards
            dist.all_reduce(state, _REDUCE[operation], group=process_group or self.process_group)
            setattr(self, name, state)

    def compute(self) -> dict[str, float]:
        """Return all values that are defined, as Python numbers (one read from the device)."""
        columns: dict[str, Tensor] = {}
        begun = dict.fromkeys(_COMBINE, 0)
        for metric in self.metrics:
            operation, count = metric.operation, len(metric.parts)
            places = [self.rows.index(row) for row in metric.rows]
            vectors = getattr(self, f"{operation}s")[:, :, begun[operation] : begun[operation] + count]
            begun[operation] += count
            scalars = torch.stack([vectors[:, place] for place in places], dim=1).unbind(-1)
            matrices = [getattr(self, f"{metric.name}_{part}s") for part in metric.matrix_parts]
            parts = metric.of_layers(*scalars, *matrices)
            values = metric.value(*(_with_total(part, _COMBINE[operation]) for part in parts))
            columns[metric.name] = values.new_full((self.num_layers + 1, len(self.rows)), math.nan)
            for column, place in zip(values.unbind(1), places, strict=True):
                columns[metric.name][:, place] = column
        return _named_values(self.prefix, self.rows, columns)


def _with_total(per_layer: Tensor, combine: Callable[[Any, Any], Any]) -> Tensor:
    """(L, rows) -> (L + 1, rows), all layers combined last, in their order: the same bits whatever else is measured."""
    return torch.cat((per_layer, functools.reduce(combine, per_layer.unbind(0))[None]))


def _named_values(prefix: str, rows: Sequence[str], columns: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the finite entries of columns (L + 1, len(rows)) by name; the last layer stands for all. One read."""
    table = torch.stack(tuple(columns.values()), -1).tolist()
    values: dict[str, float] = {}
    for layer, by_row in enumerate(table):
        group = prefix if layer == len(table) - 1 else f"{prefix}/layer_{layer}"
        for row, entries in zip(rows, by_row, strict=True):
            named = zip(columns, entries, strict=True)
            values |= {f"{group}/{row}/{name}": value for name, value in named if math.isfinite(value)}
    return values


class DeductiveMetrics(LayerSums):
    """`TENSOR_METRICS` of A, A_LM, A_P and G_LM.

    The cheap set reads nothing back before `compute`.

    Args:
        num_layers, num_heads, head_dim: of the model.
        sets: `CHEAP` for every logged step, `COSTLY` (a singular value decomposition) for validations.
        prefix: see `LayerSums`.
        interleaved: how the model's rotary embedding pairs columns (`reference_rope`).
    """

    def __init__(
        self,
        num_layers: int,
        num_heads: int,
        head_dim: int,
        *,
        sets: Collection[str] = (CHEAP,),
        prefix: str = DEDUCTIVE,
        interleaved: bool = True,
    ) -> None:
        if not sets or set(sets) - SETS.keys():
            raise ValueError(f"sets={sorted(sets)} must be {CHEAP!r}, {COSTLY!r} or both")
        self.matrix_shape, self._interleaved = (num_heads, head_dim, head_dim), interleaved
        metrics = [metric for metric in TENSOR_METRICS if metric.cadence in {SETS[each] for each in sets}]
        super().__init__(metrics, num_layers, prefix, self.matrix_shape)

    def update(self, layers: Sequence[DeductiveLike]) -> None:
        """Add the deductive outputs of a batch, one for each layer.

        Raises:
            ValueError: another number of layers, or a tensor that is not (B, ..., H, d, d).
        """
        if len(layers) != self.num_layers:
            raise ValueError(f"deductive outputs of {len(layers)} layers, but num_layers={self.num_layers}")
        for index, layer in enumerate(layers):
            for name, tensor in present_tensors(layer).items():
                if tensor.dim() < 4 or tuple(tensor.shape[-3:]) != self.matrix_shape:
                    raise ValueError(
                        f"{name} of layer {index} is {tuple(tensor.shape)}, not (B, ..., H, d, d) with "
                        f"(H, d, d) = {self.matrix_shape}"
                    )
                for part in _in_fp64(tensor.flatten(0, -4)):
                    self.add(index, name, Matrices(part, self._interleaved), learned=layer.metric is not None)


def _in_fp64(tensor: Tensor) -> Iterator[Tensor]:
    """(N, H, d, d) in pieces of N, so that what is computed of them needs little memory beside a model's own."""
    at_once = max(1, _MOST_ELEMENTS // max(1, tensor[:1].numel()))
    for start in range(0, len(tensor), at_once):
        yield tensor[start : start + at_once].double()


class OrderParameter(LayerSums):
    """The order parameter of the SOC papers: how far the deductive outputs of two runs over the same prompts differ.

    The paper (arXiv 2603.23539) takes two uncached stochastic continuations x1, x2 and a cached run xc of each prompt,
    and RMSE(x1, x2) / |mean x1| and RMSE(x1, xc) / |mean xc| over the whole model: 0 when the outputs do not depend on
    the input. So its protocol makes two of these, of (x1, x2) and of (xc, x1). Prompts are pooled.

    Args:
        num_layers: of the model.
        prefix: see `LayerSums`.
    """

    def __init__(self, num_layers: int, prefix: str = "order_parameter") -> None:
        super().__init__(ORDER_METRICS, num_layers, prefix)

    def update(self, first: Sequence[DeductiveLike], second: Sequence[DeductiveLike]) -> None:
        """Add the deductive outputs of two runs over the same prompts; the mean in the paper's form is the first's.

        Raises:
            ValueError: another number of layers, or two tensors of different shapes or of which only one is there.
        """
        if len(first) != self.num_layers or len(second) != self.num_layers:
            raise ValueError(
                f"deductive outputs of {len(first)} and {len(second)} layers, but num_layers={self.num_layers}"
            )
        for index, pair in enumerate(zip(first, second, strict=True)):
            one, other = map(present_tensors, pair)
            for name in (each for each in TENSORS if each in one or each in other):
                shapes = [tuple(each[name].shape) if name in each else None for each in (one, other)]
                if shapes[0] != shapes[1]:
                    raise ValueError(
                        f"{name} of layer {index} is {shapes[0]} in the first run, {shapes[1]} in the second"
                    )
                self.add(index, name, Pair(one[name], other[name]))


class AttentionEntropy(LayerSums):
    """`ATTENTION_METRICS` of the attention weights; rows that see no position (padding) do not count.

    Args:
        num_layers: of the model.
        prefix: see `LayerSums`.
    """

    def __init__(self, num_layers: int, prefix: str = DEDUCTIVE) -> None:
        super().__init__(ATTENTION_METRICS, num_layers, prefix)

    def update(self, layers: Sequence[Tensor], visible: Tensor | None = None) -> None:
        """Add the attention weights of a batch, (B, H, S, T) for each layer, without dropout.

        Args:
            layers: the weights.
            visible: (1 or B, S), how many positions each row sees; by default causal without padding.

        Raises:
            ValueError: another number of layers.
        """
        if len(layers) != self.num_layers:
            raise ValueError(f"attention weights of {len(layers)} layers, but num_layers={self.num_layers}")
        for index, weights in enumerate(layers):
            seen = causal_visible_positions(weights) if visible is None else visible
            self.add(index, ATTENTION, AttentionRows(weights.detach(), seen))


class RowMapJacobians(LayerSums):
    """`ROW_MAP_METRICS`, of the Jacobians at all rows of the processes.

    Args:
        num_layers: of the model.
        prefix: see `LayerSums`.
    """

    def __init__(self, num_layers: int, prefix: str = DEDUCTIVE) -> None:
        super().__init__(ROW_MAP_METRICS, num_layers, prefix)

    def update(self, norms: Tensor) -> None:
        """Add the spectral norms (num_layers, rows) of all processes, the same on each; NaN where there is none."""
        for index, of_layer in enumerate(norms):
            self.add(index, "A", of_layer[of_layer.isfinite()])
