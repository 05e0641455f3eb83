"""Metrics of the deductive outputs A, A_LM, A_P and G_LM, and of the parameters of the power law.

Formulas, ranges and costs: docs/deductive-metrics.md. The functions are pure; `DeductiveMetrics` gathers their sums
over batches and processes. All arithmetic is fp64: what is measured here lies many digits below the values (the rows of
a near-critical A differ by 1e-6 of their size), and fp32 would measure its own rounding.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchmetrics import Metric

from .catalog import CHEAP, COSTLY, DEDUCTIVE, PARAMETERS, TENSORS

RANK_TOLERANCE = torch.finfo(torch.float32).eps
"""Times d: singular values up to this share of the largest count as 0. fp32's, for that is what models compute in."""

_MOST_ELEMENTS = 2**22
"""Elements that are computed with at once, 32 MiB in fp64."""
_CONSTANT = 1e-15  # deviations below this share of the mean are the rounding of an fp64 mean


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


def present_tensors(layer: DeductiveLike) -> Iterator[tuple[int, str, Tensor]]:
    """Yield (row in `TENSORS`, name, tensor without its graph) of the tensors that are there."""
    for row, (name, attribute) in enumerate(TENSORS.items()):
        tensor: Tensor | None = getattr(layer, attribute)
        if tensor is not None:
            yield row, name, tensor.detach()


def finite_matrices(matrices: Tensor) -> Tensor:
    """Whether all entries of a matrix are numbers: (..., d, d) -> (...), bool."""
    return matrices.isfinite().flatten(-2).all(-1)


def element_sums(tensor: Tensor) -> Tensor:
    """(5,): elements, and of the finite ones number, sum, sum of squares and sum of absolute values."""
    finite = tensor.isfinite()
    clean = torch.where(finite, tensor, 0.0).double()
    squares, absolute = clean.square().sum(), clean.abs().sum()
    return torch.stack((clean.new_full((), tensor.numel()), finite.sum().double(), clean.sum(), squares, absolute))


def finite_extremes(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Least and greatest finite element, inf and -inf if there is none."""
    finite = tensor.isfinite()
    return torch.where(finite, tensor, math.inf).min(), torch.where(finite, tensor, -math.inf).max()


def row_map_collapse(matrices: Tensor) -> Tensor:
    """How much of a matrix's variation lies between its rows: (..., d, d) -> (...), in [0, 1].

    mean((A - mean row)^2) / mean((A - mean)^2), the mean row being taken over the row index: 0 when all rows are alike.
    A constant matrix gives 0, one with entries that are not finite NaN.
    """
    full = matrices.double()
    between_rows = (full - full.mean(-2, keepdim=True)).square().mean((-2, -1))
    mean = full.mean((-2, -1), keepdim=True)
    variance = (full - mean).square().mean((-2, -1))
    constant = variance <= (_CONSTANT * mean[..., 0, 0]).square()
    return torch.where(constant, 0.0, between_rows / variance)


def cross_head_sums(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of squares of A minus its mean over heads, and of A: (..., H, d, d) -> twice (...)."""
    full = tensor.double()
    deviation = full - full.mean(-3, keepdim=True)
    return deviation.square().sum((-3, -2, -1)), full.square().sum((-3, -2, -1))


def cross_head_rms(tensor: Tensor) -> Tensor:
    """RMS of A minus its mean over heads, relative to the RMS of A: (..., H, d, d) -> scalar in [0, 1]."""
    deviation, squares = cross_head_sums(tensor)
    return (deviation.sum() / squares.sum()).sqrt()


def input_sensitivity(tensor: Tensor) -> Tensor:
    """RMS of G minus its mean over the batch, relative to the RMS of G: (B, ...) -> scalar in [0, 1]; NaN for B = 1."""
    full = tensor.double()
    ratio = ((full - full.mean(0, keepdim=True)).square().sum() / full.square().sum()).sqrt()
    return ratio if len(full) > 1 else ratio.new_full((), math.nan)


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
    largest = singular_values[..., 0]
    tolerance = full.shape[-1] * RANK_TOLERANCE * largest
    rank = (singular_values > tolerance[..., None]).sum(-1).double()
    return Spectra(largest, torch.linalg.slogdet(full).logabsdet, rank)


_CHEAP_SUMS = (
    *("elements", "finite", "sum", "squares", "absolute"),
    *("collapse", "collapse_matrices", "head_deviation", "head_squares"),
)
_COSTLY_SUMS = ("spectral_norm", "log_abs_det", "rank", "matrices", "regular_matrices")
_SUMS = _CHEAP_SUMS + _COSTLY_SUMS


def _cheap_sums(tensor: Tensor) -> Tensor:
    """`_CHEAP_SUMS` of (N, H, d, d), fp64."""
    whole = finite_matrices(tensor)
    collapse = torch.where(whole, row_map_collapse(tensor), 0.0).sum()
    deviation, squares = cross_head_sums(tensor)
    comparable = whole.all(-1) if tensor.shape[-3] > 1 else torch.zeros_like(whole[..., 0])
    heads = [torch.where(comparable, each, 0.0).sum() for each in (deviation, squares)]
    return torch.cat((element_sums(tensor), torch.stack((collapse, whole.sum().double(), *heads))))


def _costly_sums(tensor: Tensor) -> Tensor:
    """`_COSTLY_SUMS` of (N, H, d, d), fp64."""
    whole = finite_matrices(tensor)
    # A decomposition of NaN raises; zeros are left out again: by `whole`, and as they have no determinant.
    each = spectra(torch.where(whole[..., None, None], tensor, 0.0))
    regular = each.log_abs_det.isfinite()
    norms, ranks = torch.where(whole, each.spectral_norm, 0.0), torch.where(whole, each.rank, 0.0)
    determinants = torch.where(regular, each.log_abs_det, 0.0)
    return torch.stack([part.sum().double() for part in (norms, determinants, ranks, whole, regular)])


class DeductiveMetrics(Metric):  # type: ignore[misc]
    """Metrics of A, A_LM, A_P and G_LM for each layer and over all of them.

    Everything is kept as sums (least and greatest elements as such) on the device, so that batches and processes
    combine exactly; the cheap set reads nothing back before `compute`.

    Args:
        num_layers, num_heads, head_dim: of the model.
        sets: `CHEAP` for every logged step, `COSTLY` (a singular value decomposition) for validations.
        prefix: of the names, `<prefix>/G_LM/spread` over all layers and `<prefix>/layer_3/G_LM/spread`, counted from 0.
    """

    full_state_update = False
    sums: Tensor
    least: Tensor
    greatest: Tensor
    inputs: Tensor
    input_squares: Tensor
    curvature_sum: Tensor

    def __init__(
        self,
        num_layers: int,
        num_heads: int,
        head_dim: int,
        *,
        sets: Collection[str] = (CHEAP,),
        prefix: str = DEDUCTIVE,
    ) -> None:
        super().__init__(compute_with_cache=False)
        if not sets or set(sets) - {CHEAP, COSTLY}:
            raise ValueError(f"sets={sorted(sets)} must be {CHEAP!r}, {COSTLY!r} or both")
        self.num_layers, self.matrix_shape, self.prefix = num_layers, (num_heads, head_dim, head_dim), prefix
        self.sets = frozenset(sets)
        grid = (num_layers, len(TENSORS))
        self.add_state("sums", torch.zeros(*grid, len(_SUMS), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("least", torch.full(grid, math.inf, dtype=torch.float64), dist_reduce_fx="min")
        self.add_state("greatest", torch.full(grid, -math.inf, dtype=torch.float64), dist_reduce_fx="max")
        self.add_state("inputs", torch.zeros(num_layers, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("input_squares", torch.zeros(num_layers, dtype=torch.float64), dist_reduce_fx="sum")
        shape = (num_layers, *self.matrix_shape) if CHEAP in self.sets else (num_layers, 1, 1, 1)
        self.add_state("curvature_sum", torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, layers: Sequence[DeductiveLike]) -> None:
        """Add the deductive outputs of a batch, one for each layer.

        Raises:
            ValueError: another number of layers, or a tensor that is not (B, ..., H, d, d).
        """
        if len(layers) != self.num_layers:
            raise ValueError(f"deductive outputs of {len(layers)} layers, but num_layers={self.num_layers}")
        for index, layer in enumerate(layers):
            for row, name, tensor in present_tensors(layer):
                if tensor.dim() < 4 or tuple(tensor.shape[-3:]) != self.matrix_shape:
                    raise ValueError(
                        f"{name} of layer {index} is {tuple(tensor.shape)}, not (B, ..., H, d, d) with "
                        f"(H, d, d) = {self.matrix_shape}"
                    )
                self._add(index, row, tensor.flatten(0, -4))
            if CHEAP in self.sets and layer.metric is not None:  # a predefined G has no input
                self._add_inputs(index, layer.curvature.detach().flatten(0, -4))

    def _add(self, layer: int, row: int, tensor: Tensor) -> None:
        split = len(_CHEAP_SUMS)
        for part in _in_fp64(tensor):
            if CHEAP in self.sets:
                self.sums[layer, row, :split] += _cheap_sums(part)
                least, greatest = finite_extremes(part)
                self.least[layer, row] = torch.minimum(self.least[layer, row], least)
                self.greatest[layer, row] = torch.maximum(self.greatest[layer, row], greatest)
            if COSTLY in self.sets:
                self.sums[layer, row, split:] += _costly_sums(part)

    def _add_inputs(self, layer: int, curvature: Tensor) -> None:
        """Add G (N, H, d, d); samples with entries that are not finite are left out."""
        for part in _in_fp64(curvature):
            whole = finite_matrices(part).all(-1)
            clean = torch.where(whole[:, None, None, None], part, 0.0)
            self.inputs[layer] += whole.sum()
            self.input_squares[layer] += clean.square().sum()
            self.curvature_sum[layer] += clean.sum(0)

    def _sync_dist(self, dist_sync_fn: Any = None, process_group: Any = None) -> None:
        """Reduce each state in place, where torchmetrics would first gather every process' `curvature_sum` on each."""
        operations = {"least": dist.ReduceOp.MIN, "greatest": dist.ReduceOp.MAX}
        for name in self._reductions:
            state = getattr(self, name).clone()  # torchmetrics goes on with the process' own afterwards
            dist.all_reduce(state, operations.get(name, dist.ReduceOp.SUM), group=process_group or self.process_group)
            setattr(self, name, state)

    def compute(self) -> dict[str, float]:
        """All values that are defined, as Python numbers (one read from the device)."""
        sums = dict(zip(_SUMS, _with_total(self.sums).unbind(-1), strict=True))
        count = sums["finite"]
        mean = sums["sum"] / count
        columns = {
            "mean": mean,
            "spread": (sums["squares"] / count - mean.square()).clamp(min=0).sqrt(),
            "min": torch.cat((self.least, self.least.amin(0, keepdim=True))),
            "max": torch.cat((self.greatest, self.greatest.amax(0, keepdim=True))),
            "abs_mean": sums["absolute"] / count,
            "nonfinite_share": 1 - count / sums["elements"],
            "row_map_collapse": sums["collapse"] / sums["collapse_matrices"],
            "cross_head_rms": (sums["head_deviation"] / sums["head_squares"]).sqrt(),
            "input_sensitivity": self._input_sensitivity(),
            "spectral_norm": sums["spectral_norm"] / sums["matrices"],
            "log_abs_det": sums["log_abs_det"] / sums["regular_matrices"],
            "singular_share": 1 - sums["regular_matrices"] / sums["matrices"],
            "rank": sums["rank"] / sums["matrices"],
        }
        return named_values(self.prefix, tuple(TENSORS), columns)

    def _input_sensitivity(self) -> Tensor:
        """(L + 1, 4), NaN but for G_LM."""
        squares = torch.where(self.inputs > 1, self.input_squares, 0.0)
        of_mean = self.curvature_sum.square().sum((1, 2, 3)) / self.inputs.clamp(min=1)
        deviation = torch.where(self.inputs > 1, self.input_squares - of_mean, 0.0).clamp(min=0)
        result = self.sums.new_full((self.num_layers + 1, len(TENSORS)), math.nan)
        result[:, -1] = (_with_total(deviation) / _with_total(squares)).sqrt()
        return result


def _in_fp64(tensor: Tensor) -> Iterator[Tensor]:
    """(N, H, d, d) in pieces of N, so that what is computed of them needs little memory beside a model's own."""
    at_once = max(1, _MOST_ELEMENTS // max(1, tensor[:1].numel()))
    for start in range(0, len(tensor), at_once):
        yield tensor[start : start + at_once].double()


def _with_total(per_layer: Tensor) -> Tensor:
    """(L, ...) -> (L + 1, ...), the sum over layers last."""
    return torch.cat((per_layer, per_layer.sum(0, keepdim=True)))


def named_values(prefix: str, rows: Sequence[str], columns: Mapping[str, Tensor]) -> dict[str, float]:
    """Name the finite entries of columns (L + 1, len(rows)), whose last layer stands for all of them; one read."""
    table = torch.stack(tuple(columns.values()), -1).tolist()
    values: dict[str, float] = {}
    for layer, by_row in enumerate(table):
        group = prefix if layer == len(table) - 1 else f"{prefix}/layer_{layer}"
        for row, entries in zip(rows, by_row, strict=True):
            named = zip(columns, entries, strict=True)
            values |= {f"{group}/{row}/{name}": value for name, value in named if math.isfinite(value)}
    return values


def parameter_metrics(model: nn.Module, prefix: str = DEDUCTIVE) -> dict[str, float]:
    """RMS and 2-norm of W, P and a of every module that has them, in order, and over all; empty with a predefined G.

    Raises:
        ValueError: a parameter of which this process holds nothing, as with ZeRO-3; gather the model first.
    """
    holders = [module for module in model.modules() if all(hasattr(module, name) for name in PARAMETERS.values())]
    if not holders:
        return {}
    tensors = [[getattr(holder, name).detach() for name in PARAMETERS.values()] for holder in holders]
    for layer, row in enumerate(tensors):
        for name, tensor in zip(PARAMETERS, row, strict=True):
            if tensor.numel() == 0:
                raise ValueError(f"{name} of layer {layer} is empty on this process; gather the sharded model first")
    squares = torch.stack([torch.stack([each.double().square().sum() for each in row]) for row in tensors])
    counts = squares.new_tensor([[each.numel() for each in row] for row in tensors])
    total = _with_total(squares)
    return named_values(prefix, tuple(PARAMETERS), {"rms": (total / _with_total(counts)).sqrt(), "norm": total.sqrt()})
