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


def rates_of(schedule: str, decay_fraction: float = 0.25) -> list[float]:
    return [lr_at_step(step, 1.0, 10, 100, 0.2, schedule, decay_fraction) for step in range(120)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
def test_every_schedule_has_the_same_warm_up(schedule: str) -> None:
    assert rates_of(schedule)[:10] == [step / 10 for step in range(10)]
    assert rates_of(schedule)[10] == 1.0


def test_the_linear_schedule_is_a_straight_line_to_its_fraction() -> None:
    rates = rates_of("linear")
    assert rates[55] == pytest.approx(1.0 - 0.8 * 0.5)
    assert rates[100] == rates[119] == 0.2
    steps = [later - earlier for earlier, later in pairwise(rates[10:101])]
    assert steps == pytest.approx([-0.8 / 90] * 90)


def test_wsd_stays_at_the_peak_and_decays_at_the_end() -> None:
    rates = rates_of("wsd")
    assert rates[10:76] == [1.0] * 66
    assert rates[80] == pytest.approx(1.0 - 0.8 * 5 / 25)
    assert rates[100] == rates[119] == 0.2
    late = lr_at_step(20, 1.0, 50, 100, 0.2, "wsd", 0.9)
    assert (late, lr_at_step(50, 1.0, 50, 100, 0.2, "wsd", 0.9)) == (0.4, 1.0)  # the decay waits for the warm-up
    assert lr_at_step(75, 1.0, 50, 100, 0.2, "wsd", 0.9) == pytest.approx(0.6)


def test_a_constant_rate_stays() -> None:
    assert set(rates_of("constant")[10:]) == {1.0}


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
