"""One optimizer step: the whole gradient's norm, clipping with and without other processes, and steps left out."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pldr_train.training.stepping import StepControl, local_gradients, nan_if_not_finite, whole_norm


def doubled(share: Tensor) -> Tensor:
    """A sum over two processes that have the same share."""
    return 2 * share


class Plain:
    """Two weights of zeros under SGD with rate 1, which leaves minus the gradient in them."""

    def __init__(self, **limits: Any) -> None:
        self.weights = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))]
        self.optimizer = torch.optim.SGD(self.weights, lr=1.0)
        self.control = StepControl(self.optimizer, **limits)

    def step(self, gradients: list[list[float]], **options: Any) -> list[float]:
        """The gradient that the optimizer saw."""
        before = self.flat()
        for weight, gradient in zip(self.weights, gradients, strict=True):
            weight.grad = torch.tensor(gradient)
        self.control.step(self.optimizer.step, self.weights, **options)
        return (before - self.flat()).tolist()

    def flat(self) -> Tensor:
        return torch.cat([weight.detach().clone() for weight in self.weights])


GRADIENTS = [[2.0, -3.0], [6.0]]
NORM = 7.0


def test_the_norm_is_over_all_gradients_of_all_processes() -> None:
    gradients = [torch.tensor(each) for each in GRADIENTS]
    assert whole_norm(gradients).item() == pytest.approx(NORM)
    assert whole_norm(gradients, doubled).item() == pytest.approx(NORM * math.sqrt(2))
    assert whole_norm([]).item() == 0
    assert whole_norm([], doubled).item() == 0


def test_parameters_without_a_gradient_or_without_elements_do_not_count() -> None:
    weights = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(0)), nn.Parameter(torch.zeros(3))]
    weights[0].grad, weights[1].grad = torch.tensor([3.0, 4.0]), torch.zeros(0)
    assert [each.tolist() for each in local_gradients(weights)] == [[3.0, 4.0]]


@pytest.mark.parametrize(("reduce", "norm"), [(None, NORM), (doubled, NORM * math.sqrt(2))], ids=["alone", "of two"])
def test_without_limits_the_gradient_is_untouched_and_both_norms_are_the_same(reduce: Any, norm: float) -> None:
    plain = Plain()
    assert plain.step(GRADIENTS, reduce=reduce, measure_clipped=True) == [2, -3, 6]
    assert float(plain.control.norm) == pytest.approx(norm)  # type: ignore[arg-type]
    assert float(plain.control.clipped_norm) == pytest.approx(norm)  # type: ignore[arg-type]


@pytest.mark.parametrize(("reduce", "norm"), [(None, NORM), (doubled, NORM * math.sqrt(2))], ids=["alone", "of two"])
def test_clipping_by_norm_scales_the_whole_gradient_to_the_limit(reduce: Any, norm: float) -> None:
    plain = Plain(clip_norm=1.4)
    seen = plain.step(GRADIENTS, reduce=reduce, measure_clipped=True)
    assert seen == pytest.approx([2 * 1.4 / norm, -3 * 1.4 / norm, 6 * 1.4 / norm], rel=1e-5)
    assert float(plain.control.norm) == pytest.approx(norm)  # type: ignore[arg-type]
    assert float(plain.control.clipped_norm) == pytest.approx(1.4, rel=1e-5)  # type: ignore[arg-type]


def test_clipping_by_norm_leaves_a_gradient_below_the_limit() -> None:
    assert Plain(clip_norm=7.5).step(GRADIENTS) == [2, -3, 6]
    # Another process' share brings the whole above it.
    assert Plain(clip_norm=7.5).step(GRADIENTS, reduce=doubled)[2] == pytest.approx(6 * 7.5 / (NORM * math.sqrt(2)))


@pytest.mark.parametrize(("reduce", "factor"), [(None, 1), (doubled, math.sqrt(2))], ids=["alone", "of two"])
def test_clipping_by_value_clamps_each_element_and_the_norm_after_it_is_measured(reduce: Any, factor: float) -> None:
    plain = Plain(clip_value=2.5)
    assert plain.step(GRADIENTS, reduce=reduce, measure_clipped=True) == [2, -2.5, 2.5]
    assert float(plain.control.norm) == pytest.approx(NORM * factor)  # type: ignore[arg-type]
    clipped = math.sqrt(2**2 + 2.5**2 + 2.5**2) * factor
    assert float(plain.control.clipped_norm) == pytest.approx(clipped)  # type: ignore[arg-type]


def test_the_norm_after_clipping_is_of_the_step_that_asks_for_it() -> None:
    plain = Plain(clip_value=1.0)
    plain.step(GRADIENTS, measure_clipped=True)
    plain.step(GRADIENTS)
    assert plain.control.clipped_norm is None
    plain.step([[0.3, 0.4], [0.0]], measure_clipped=True)
    assert float(plain.control.clipped_norm) == pytest.approx(0.5)  # type: ignore[arg-type]


def test_a_process_without_gradients_steps_along() -> None:
    weight = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    control = StepControl(optimizer, clip_norm=1.0, leave_out_nonfinite=True)
    control.step(optimizer.step, [weight], reduce=lambda own: own + 9.0, measure_clipped=True)
    assert float(control.norm) == 3  # type: ignore[arg-type]
    assert float(control.clipped_norm) == 3  # type: ignore[arg-type]
    assert control.is_finite()


class Engine:
    """As DeepSpeed: knows the norm from within its step on, and clips by it."""

    def __init__(self, plain: Plain, limit: float) -> None:
        self.plain, self.limit = plain, limit
        self.norm: Tensor | None = None

    def step(self) -> None:
        gradients = [weight.grad for weight in self.plain.weights if weight.grad is not None]
        self.norm = torch.nn.utils.get_total_norm(gradients)
        for gradient in gradients:
            gradient.mul_(torch.clamp(self.limit / self.norm, max=1.0))
        self.plain.optimizer.step()


def engine_step(plain: Plain, engine: Engine, gradients: list[list[float]], **options: Any) -> None:
    for weight, gradient in zip(plain.weights, gradients, strict=True):
        weight.grad = torch.tensor(gradient)
    plain.control.step(engine.step, [], engine_norm=lambda: engine.norm, **options)


def test_an_engines_norm_and_clipping_are_taken_as_they_are() -> None:
    plain = Plain()
    engine = Engine(plain, limit=3.5)
    engine_step(plain, engine, GRADIENTS, measure_clipped=True, reduce=doubled)
    assert (-plain.flat()).tolist() == [1, -1.5, 3]
    assert plain.control.norm is engine.norm
    assert float(plain.control.norm) == NORM  # type: ignore[arg-type]
    assert float(plain.control.clipped_norm) == pytest.approx(3.5 * math.sqrt(2))  # type: ignore[arg-type]


def test_a_step_is_left_out_by_the_engines_norm() -> None:
    plain = Plain(leave_out_nonfinite=True)
    engine = Engine(plain, limit=100.0)
    engine_step(plain, engine, GRADIENTS)
    good = plain.flat()
    engine_step(plain, engine, [[math.inf, 1.0], [1.0]])
    assert not plain.control.is_finite()
    assert torch.equal(plain.flat(), good)
    engine_step(plain, engine, GRADIENTS)
    assert plain.control.is_finite()
    assert torch.equal(plain.flat(), 2 * good)


def adamw(**limits: Any) -> tuple[nn.Module, torch.optim.Optimizer, StepControl]:
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, fused=True)
    return model, optimizer, StepControl(optimizer, leave_out_nonfinite=True, **limits)


def take(model: nn.Module, optimizer: torch.optim.Optimizer, control: StepControl, seed: int, bad: float = 0) -> None:
    """A step with a gradient that the seed decides; bad replaces one element of it."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    if bad:
        last = list(model.parameters())[-1].grad
        assert last is not None
        last[2] = bad
    control.step(optimizer.step, model.parameters(), measure_clipped=True)


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    moments = [(f"{name} {index}", value) for index, each in optimizer.state_dict()["state"].items()
               for name, value in each.items()]  # fmt: skip
    return copy.deepcopy(dict(model.state_dict()) | dict(moments))


@pytest.mark.parametrize("limits", [{}, {"clip_value": 0.5}, {"clip_norm": 0.5}], ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_step_left_out_leaves_no_trace(limits: dict[str, float], bad: float) -> None:
    disturbed, straight = adamw(**limits), adamw(**limits)
    for one in (disturbed, straight):
        take(*one, seed=1)
        take(*one, seed=2)
    before = state_of(*disturbed[:2])
    assert len(before) == 4 + 4 * 3
    assert all(value.item() == 2 for name, value in before.items() if name.startswith("step"))
    take(*disturbed, seed=3, bad=bad)
    assert not disturbed[2].is_finite()
    after = state_of(*disturbed[:2])
    assert all(torch.equal(after[name], before[name]) for name in before)
    for one in (disturbed, straight):
        take(*one, seed=4)
    assert disturbed[2].is_finite()
    once_more, expected = state_of(*disturbed[:2]), state_of(*straight[:2])
    assert all(torch.equal(once_more[name], expected[name]) for name in expected)


def test_without_being_asked_no_step_is_left_out() -> None:
    plain = Plain()
    plain.step([[1.0, math.nan], [1.0]])
    assert not plain.control.is_finite()
    assert bool(plain.flat().isnan().any())


def test_a_finite_loss_and_its_gradient_stay_as_they_are() -> None:
    values = torch.tensor([1.5, -2.0, 3e15])
    plain, guarded = values.clone().requires_grad_(), values.clone().requires_grad_()
    expected, loss = (plain**2).sum().log(), nan_if_not_finite((guarded**2).sum().log())
    expected.backward()
    loss.backward()
    assert torch.equal(loss, expected)
    assert plain.grad is not None
    assert guarded.grad is not None
    assert torch.equal(guarded.grad, plain.grad)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_loss_that_is_not_finite_has_nan_gradients(value: float) -> None:
    weight = torch.tensor([1.0, 2.0], requires_grad=True)
    loss = nan_if_not_finite(weight.sum() + value)  # its own gradient would be 1
    loss.backward()
    assert bool(loss.isnan())
    assert weight.grad is not None
    assert bool(weight.grad.isnan().all())
