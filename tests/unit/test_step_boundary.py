"""What is due after a step, as the recipe says; the order in which it is done is tested by real runs (tests/resume)."""

from __future__ import annotations

import pytest

from pldr_train.recipe import recipe_from_dict
from pldr_train.training.step_boundary import Due

RECIPE = recipe_from_dict({
    "run": {"name": "unit"},
    "data": {"source": "quickstart"},
    "trainer": {"max_steps": 20, "validate_every_steps": 6},
    "checkpoint": {"every_steps": 8, "also_keep_steps": [3]},
    "logging": {"every_steps": 4},
}).resolved()  # fmt: skip


@pytest.mark.parametrize(
    ("step", "due"),
    [
        (1, Due(is_last=False, logs=False, saves=False, validates=False)),
        (3, Due(is_last=False, logs=False, saves=True, validates=False)),
        (4, Due(is_last=False, logs=True, saves=False, validates=False)),
        (6, Due(is_last=False, logs=False, saves=False, validates=True)),
        (8, Due(is_last=False, logs=True, saves=True, validates=False)),
        (12, Due(is_last=False, logs=True, saves=False, validates=True)),
        (19, Due(is_last=False, logs=False, saves=False, validates=False)),
        (20, Due(is_last=True, logs=True, saves=False, validates=True)),
    ],
)
def test_what_is_due_follows_the_recipe(step: int, due: Due) -> None:
    assert Due.after(step, RECIPE) == due
