from __future__ import annotations

import pytest
import torch

from pldr_train.metrics.means import WeightedMeans


def test_means_weigh_each_step_by_its_size() -> None:
    means = WeightedMeans(["loss", "other"])
    means.update({"loss": (torch.tensor(10.0), torch.tensor(2))})
    means.update({"loss": (torch.tensor(2.0), 4.0)})
    assert means.compute() == {"loss": 2.0}


def test_a_window_of_many_steps_loses_no_small_summand() -> None:
    means = WeightedMeans(["loss"])
    means.update({"loss": (torch.tensor(2.0**24), 1.0)})
    for _ in range(8):
        means.update({"loss": (torch.tensor(0.5), 0.0)})
    assert means.compute() == {"loss": 2.0**24 + 4}


def test_a_window_goes_on_from_its_saved_state() -> None:
    first, second = WeightedMeans(["a", "b"]), WeightedMeans(["a", "b"])
    first.update({"a": (torch.tensor(1.0), 1.0), "b": (torch.tensor(5.0), 2.0)})
    second.restore(first.sums, first.weights)
    for means in (first, second):
        means.update({"a": (torch.tensor(2.0), 1.0)})
    assert first.compute() == second.compute() == {"a": 1.5, "b": 2.5}


def test_an_undeclared_quantity_is_refused() -> None:
    with pytest.raises(KeyError, match="lose"):
        WeightedMeans(["loss"]).update({"lose": (torch.tensor(1.0), 1.0)})
