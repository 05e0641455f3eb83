"""The order parameter against NumPy's fp64, on degenerate pairs, and from two runs of a real model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pldr_train.metrics.deductive import OrderParameter
from pldr_train.metrics.layer_metrics import TENSORS, layer_infos
from pldr_train.metrics.tensor_metrics import ORDER_METRICS
from tests.unit.model_cases import small_model, token_ids

LAYERS, SHAPE = 2, (3, 2, 5, 5)
Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Outputs:
    metric: Tensor | None
    positive_metric: Tensor | None
    potential: Tensor | None
    curvature: Tensor

    def rows(self, start: int, end: int) -> Outputs:
        return Outputs(*[None if each is None else each[start:end] for each in vars(self).values()])  # type: ignore[arg-type]


def run(seed: int) -> list[Outputs]:
    generator = torch.Generator().manual_seed(seed)
    return [Outputs(*(torch.randn(SHAPE, generator=generator) + 1 for _ in TENSORS)) for _ in range(LAYERS)]


def compare(*pairs: tuple[Sequence[Any], Sequence[Any]]) -> dict[str, float]:
    parameter = OrderParameter(len(pairs[0][0]))
    for first, second in pairs:
        parameter.update(first, second)
    return parameter.compute()


def of_two(first: Tensor, second: Tensor) -> tuple[float, float]:
    """The relative and the bounded form of two tensors, NaN where there is none."""
    values = compare(([Outputs(None, None, None, first)], [Outputs(None, None, None, second)]))
    relative, bounded = (values.get(f"order_parameter/G_LM/{form}", math.nan) for form in ("relative_rmse", "bounded"))
    return relative, bounded


def in_numpy(first: Array, second: Array) -> dict[str, float]:
    rmse = np.sqrt(np.mean((first - second) ** 2))
    rms = [np.sqrt(np.mean(each**2)) for each in (first, second)]
    return {"relative_rmse": rmse / abs(first.mean()), "bounded": rmse / np.mean(rms), "nonfinite_share": 0.0}


def flat(layers: Sequence[Outputs], attribute: str) -> Array:
    array: Array = np.concatenate([getattr(layer, attribute).double().numpy().ravel() for layer in layers])
    return array


def test_both_forms_are_what_numpy_finds() -> None:
    first, second = run(0), run(1)
    groups = {"": slice(None)} | {f"/layer_{index}": slice(index, index + 1) for index in range(LAYERS)}
    expected = {
        f"order_parameter{group}/{name}/{form}": value
        for group, part in groups.items()
        for name, attribute in TENSORS.items()
        for form, value in in_numpy(flat(first[part], attribute), flat(second[part], attribute)).items()
    }
    values = compare((first, second))
    assert values == pytest.approx(expected, rel=1e-12)
    assert values.keys() == {info.name for info in layer_infos(ORDER_METRICS, LAYERS, "order_parameter")}


def test_a_negative_mean_gives_no_negative_order() -> None:
    first, second = run(0)[0].curvature - 3, run(1)[0].curvature
    expected = in_numpy(first.double().numpy(), second.double().numpy())["relative_rmse"]
    assert expected > 0
    assert of_two(first, second)[0] == pytest.approx(expected, rel=1e-12)


def test_prompts_and_processes_combine_to_the_whole() -> None:
    first, second = run(0), run(1)
    whole = compare((first, second))
    parts = [
        ([layer.rows(*cut) for layer in first], [layer.rows(*cut) for layer in second]) for cut in ((0, 1), (1, 3))
    ]
    assert compare(*parts) == pytest.approx(whole, rel=1e-12)
    apart = [OrderParameter(LAYERS) for _ in parts]
    for parameter, part in zip(apart, parts, strict=True):
        parameter.update(*part)
    apart[0].sums = apart[0]._reductions["sums"](torch.stack([parameter.sums for parameter in apart]))
    assert apart[0].compute() == pytest.approx(whole, rel=1e-12)


def test_equal_tensors_have_order_zero() -> None:
    for tensor in (torch.randn(2, 3), torch.zeros(2, 3), torch.full((2, 3), 1e-30)):
        assert of_two(tensor, tensor.clone()) == (0, 0)
    assert set(compare((run(0), run(0))).values()) == {0.0}


def test_the_bounded_form_reaches_its_bounds_and_no_further() -> None:
    tensor = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    assert of_two(tensor, -tensor)[1] == pytest.approx(2)
    assert of_two(tensor, torch.zeros(3, 4))[1] == pytest.approx(2)
    independent = torch.randn(2, 10_000, generator=torch.Generator().manual_seed(1))
    assert of_two(*independent)[1] == pytest.approx(math.sqrt(2), rel=0.03)
    assert of_two(*(1e-25 * independent.double()))[1] == pytest.approx(math.sqrt(2), rel=0.03)


def test_small_differences_of_large_tensors_are_not_lost() -> None:
    first = torch.full((1000,), 1e4, dtype=torch.float64)
    assert of_two(first, first + 1e-6) == pytest.approx((1e-10, 1e-10), rel=1e-4)


def test_a_mean_of_zero_leaves_the_papers_form_out() -> None:
    first, second = torch.tensor([1.0, -1.0]), torch.tensor([1.0, 2.0])
    assert math.isnan(of_two(first, second)[0])
    pair = [[Outputs(None, None, None, each.expand(1, 1, 2, 2))] for each in (first, second)]
    names = {name.rpartition("/")[2] for name in compare((pair[0], pair[1]))}
    assert names == {"bounded", "nonfinite_share"}


def test_entries_that_are_not_finite_in_one_run_are_counted_and_left_out() -> None:
    first, second = run(0), run(1)
    first[0].curvature[0, 0, 0, 0] = math.nan
    second[0].curvature[1, 1, 1, 1] = math.inf
    values = compare((first, second))
    size = math.prod(SHAPE)
    assert values["order_parameter/layer_0/G_LM/nonfinite_share"] == pytest.approx(2 / size)
    keep = torch.isfinite(first[0].curvature + second[0].curvature)
    kept = [side[0].curvature[keep].double().numpy() for side in (first, second)]
    assert len(kept[0]) == size - 2
    expected = in_numpy(kept[0], kept[1])
    for form in ("relative_rmse", "bounded"):
        assert values[f"order_parameter/layer_0/G_LM/{form}"] == pytest.approx(expected[form], rel=1e-12)
    nothing = [Outputs(None, None, None, torch.full((1, 1, 2, 2), math.nan))]
    assert set(compare((nothing, nothing)).values()) == {1.0}


def test_pairs_that_do_not_match_are_refused() -> None:
    first, second = run(0), run(1)
    parameter = OrderParameter(LAYERS)
    with pytest.raises(ValueError, match="num_layers=2"):
        parameter.update(first[:1], second)
    with pytest.raises(ValueError, match=r"A of layer 0 is \(3, 2, 5, 5\) in the first run, \(1, 2, 5, 5\)"):
        parameter.update(first, [layer.rows(0, 1) for layer in second])
    with pytest.raises(ValueError, match=r"A of layer 0 is \(3, 2, 5, 5\) in the first run, None"):
        parameter.update(first, [Outputs(None, None, None, layer.curvature) for layer in second])


def test_two_runs_of_a_model_differ_in_g_only_if_it_is_learned() -> None:
    for kind, largest in ((None, 2.0), ("identity", 0.0)):
        model = small_model(custom_G_type=kind)
        with torch.no_grad():
            runs = [
                model(token_ids(2, 9, seed), use_cache=False, output_deductive_outputs=True).deductive_outputs
                for seed in (1, 2)
            ]
        bounded = compare((runs[0], runs[1]))["order_parameter/G_LM/bounded"]
        assert bounded == largest == 0 or 0 < bounded < largest
