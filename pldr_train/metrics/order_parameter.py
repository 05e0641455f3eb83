"""The order parameter of the SOC papers: how far the deductive outputs of two runs over the same prompts differ.

The paper (arXiv 2603.23539) takes two uncached stochastic continuations x1, x2 and a cached run xc of each prompt, and
RMSE(x1, x2) / |mean x1| and RMSE(x1, xc) / |mean xc| over the whole model: 0 when the outputs do not depend on the
input.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from .catalog import TENSORS
from .deductive import DeductiveLike, named_values, present_tensors

_MEAN_IS_ROUNDING = 1e-6
"""Of the RMS. A's mean is 0 but for the rounding of fp32 before training: LayerNorms without biases made its rows."""
_SUMS = ("elements", "finite", "difference_squares", "first_squares", "second_squares", "first")


def pair_sums(first: Tensor, second: Tensor) -> Tensor:
    """(6,): elements; of those finite in both number, squares of the difference and of each, sum of the first."""
    finite = first.isfinite() & second.isfinite()
    x1, x2 = (torch.where(finite, each.double(), 0.0) for each in (first, second))
    squares = [each.square().sum() for each in (x1 - x2, x1, x2)]
    return torch.stack((x1.new_full((), first.numel()), finite.sum().double(), *squares, x1.sum()))


def relative_rmse(first: Tensor, second: Tensor) -> Tensor:
    """RMSE(x1, x2) / |mean x1|, the paper's form; 0 for equal tensors, NaN where the mean is 0 or its rounding."""
    return _relative_rmse(pair_sums(first, second))


def bounded_difference(first: Tensor, second: Tensor) -> Tensor:
    """RMS(x1 - x2) / ((RMS x1 + RMS x2) / 2), in [0, 2]; 0 for equal tensors."""
    return _bounded_difference(pair_sums(first, second))


def _relative_rmse(sums: Tensor) -> Tensor:
    """(..., 6) -> (...)."""
    _, count, difference, squares, _, first = sums.unbind(-1)
    ratio = (difference * count).sqrt() / first.abs()  # sqrt(d / n) / |s / n|
    ratio = torch.where(first.abs() <= _MEAN_IS_ROUNDING * (squares * count).sqrt(), torch.nan, ratio)
    return torch.where((difference == 0) & (count > 0), 0.0, ratio)


def _bounded_difference(sums: Tensor) -> Tensor:
    """(..., 6) -> (...)."""
    _, count, difference, first, second, _ = sums.unbind(-1)
    ratio = 2 * difference.sqrt() / (first.sqrt() + second.sqrt())
    return torch.where((difference == 0) & (count > 0), 0.0, ratio)


class OrderParameter(Metric):  # type: ignore[misc]
    """Both forms for A, A_LM, A_P and G_LM, for each layer and over the whole model, pooled over all prompts.

    Kept as sums on the device, so that prompts and processes combine exactly. Two runs of the paper's protocol make two
    of these: (x1, x2) and (xc, x1).

    Args:
        num_layers: of the model.
        prefix: of the names, `<prefix>/G_LM/relative_rmse` and `<prefix>/layer_3/G_LM/bounded`.
    """

    full_state_update = False
    sums: Tensor

    def __init__(self, num_layers: int, prefix: str = "order_parameter") -> None:
        super().__init__(compute_with_cache=False)
        self.num_layers, self.prefix = num_layers, prefix
        shape = (num_layers, len(TENSORS), len(_SUMS))
        self.add_state("sums", torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

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
            one, other = ({name: tensor for _, name, tensor in present_tensors(layer)} for layer in pair)
            for row, name in enumerate(TENSORS):
                if name not in one and name not in other:
                    continue
                shapes = [tuple(each[name].shape) if name in each else None for each in (one, other)]
                if shapes[0] != shapes[1]:
                    raise ValueError(
                        f"{name} of layer {index} is {shapes[0]} in the first run, {shapes[1]} in the second"
                    )
                self.sums[index, row] += pair_sums(one[name], other[name])

    def compute(self) -> dict[str, float]:
        """All values that are defined, as Python numbers (one read from the device)."""
        sums = torch.cat((self.sums, self.sums.sum(0, keepdim=True)))
        columns = {
            "relative_rmse": _relative_rmse(sums),
            "bounded": _bounded_difference(sums),
            "nonfinite_share": 1 - sums[..., 1] / sums[..., 0],
        }
        return named_values(self.prefix, tuple(TENSORS), columns)
