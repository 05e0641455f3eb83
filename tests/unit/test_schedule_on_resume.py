"""A run that goes on with another length says what becomes of its learning rate."""

from __future__ import annotations

from typing import Any

import pytest

from pldr_train.recipe import Recipe, recipe_from_dict
from pldr_train.training.start import _report_another_length


def recipe(max_steps: int, **optim: Any) -> Recipe:
    return recipe_from_dict({
        "run": {"name": "unit"},
        "data": {"source": "quickstart"},
        "optim": {"lr": 1e-3, "warmup_steps": 10} | optim,
        "trainer": {"max_steps": max_steps},
    })  # fmt: skip


def test_a_cosine_that_is_stretched_is_reported_with_both_rates(said: list[str]) -> None:
    _report_another_length(recipe(100), recipe(200), 100)
    # Half a cosine of 190 steps, 90 of them done, from 1e-3 to 1e-4.
    assert said == [
        "trainer.max_steps=200, it was 100: the schedule optim.schedule=cosine stretches, so the next step's learning "
        "rate is 0.0005872 instead of 0.0001"
    ]


@pytest.mark.parametrize(
    ("saved", "new", "step"),
    [
        (recipe(100), recipe(100), 50),
        (recipe(100, schedule="constant"), recipe(200, schedule="constant"), 50),
        (recipe(100, schedule="wsd"), recipe(200, schedule="wsd"), 90),  # before its decay
        (recipe(100), recipe(100, lr=2e-3), 50),
        (recipe(100), recipe(50), 100),  # complete
    ],
    ids=["same", "constant", "stable", "rate", "complete"],
)
def test_what_changes_no_rate_is_not_reported(saved: Recipe, new: Recipe, step: int, said: list[str]) -> None:
    _report_another_length(saved, new, step)
    assert said == []
