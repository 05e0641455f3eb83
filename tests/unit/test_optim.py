from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from pldr_train.optim import build_adamw, clip_before_step, lr_at_step


def test_the_schedule_warms_up_from_zero_and_follows_the_cosine_to_its_fraction() -> None:
    rates = [lr_at_step(step, 1e-3, warmup_steps=8, total_steps=100, final_fraction=0.1) for step in range(130)]
    assert rates[0] == 0
    assert rates[4] == pytest.approx(5e-4)
    assert rates[8] == pytest.approx(1e-3)
    assert rates[54] == pytest.approx(1e-3 * (0.1 + 0.9 * 0.5))
    assert rates[100] == rates[129] == pytest.approx(1e-4)
    assert all(later < earlier for earlier, later in pairwise(rates[8:101]))


def test_the_schedule_without_warmup_begins_at_the_peak() -> None:
    assert lr_at_step(0, 3e-4, warmup_steps=0, total_steps=10, final_fraction=0.0) == 3e-4
    assert lr_at_step(10, 3e-4, warmup_steps=10, total_steps=10, final_fraction=0.1) == pytest.approx(3e-5)


def stepped(clip_value: float | None, clip_norm: float | None, gradient: list[float]) -> list[float]:
    """The gradient that plain SGD with rate 1 saw."""
    weight = nn.Parameter(torch.zeros(len(gradient)))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    clip_before_step(optimizer, clip_value, clip_norm)
    weight.grad = torch.tensor(gradient)
    optimizer.step()
    return [-value for value in weight.tolist()]


def test_clipping_by_value_clamps_each_element_and_by_norm_scales_all() -> None:
    assert stepped(1.0, None, [0.5, -3.0, 4.0]) == [0.5, -1.0, 1.0]
    assert stepped(None, 1.0, [3.0, 4.0]) == pytest.approx([0.6, 0.8], rel=1e-5)
    assert stepped(None, 10.0, [3.0, 4.0]) == [3.0, 4.0]
    assert stepped(None, None, [0.5, -3.0]) == [0.5, -3.0]


def test_a_removed_clip_clips_no_more() -> None:
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    remove = clip_before_step(optimizer, clip_value=1.0)
    remove()
    weight.grad = torch.tensor([5.0])
    optimizer.step()
    assert weight.item() == -5.0


def test_clipping_refuses_two_limits_and_limits_that_are_not_positive() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(ValueError, match=r"clip_value=1\.0 or clip_norm=2\.0, not both"):
        clip_before_step(optimizer, 1.0, 2.0)
    with pytest.raises(ValueError, match="clip_norm=0 must be positive"):
        clip_before_step(optimizer, clip_norm=0)


def test_adamw_decays_every_parameter_in_one_group() -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
    optimizer = build_adamw(module.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.1)
    assert len(optimizer.param_groups) == 1
    group = optimizer.param_groups[0]
    assert (len(group["params"]), group["weight_decay"], group["betas"], group["eps"]) == (4, 0.1, (0.9, 0.95), 1e-5)
