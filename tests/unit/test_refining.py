"""A metric learner's residual units as one operation: what the units give one by one, and their gradients."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.bench_launches import counted_launches
from benchmarks.scheduled_kernels import counting_backend
from pldr_train.model import PldrllmForCausalLM, refining
from pldr_train.model.casting import weights_cast_together
from pldr_train.model.power_law_attention import MetricLearner
from pldr_train.model.refining import Kernels, Sizes, backward_written_out, example, written_out
from pldr_train.training.weights import compile_layers, recompute
from tests.unit.model_cases import small_model, token_ids
from tests.unit.test_model_training import training_loss

WRITTEN_OUT = Kernels(written_out, backward_written_out)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take residual units at once on this device, too."""
    monkeypatch.setattr(refining, "kernels_for", lambda *_: WRITTEN_OUT)


def learner(**overrides: Any) -> MetricLearner:
    """A metric learner none of whose parameters is as it was initialised."""
    found = small_model(**overrides).decoder.layers[0].attention.metric_learner
    assert isinstance(found, MetricLearner)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    return found


@pytest.mark.parametrize(("depth", "units", "bias"), [(2, 2, True), (1, 3, True), (3, 1, False)])
def test_values_and_gradients_are_those_of_the_units_one_by_one(
    at_once: None, depth: int, units: int, bias: bool
) -> None:
    found = learner(num_denseA=depth, num_reslayerA=units, A_dff=13, glu_bias=bias)
    groups = found.groups()
    assert groups is not None
    found.double()
    metric, direction = torch.randn(2, 3, 2, 8, 8, dtype=torch.float64)
    wanted = [metric.requires_grad_(), *found.residual_units.parameters()]
    expected = found._refine(metric, None)
    gradients = torch.autograd.grad(expected, wanted, direction)
    refined = found._refine(metric, tuple(None if group[0] is None else torch.cat(group) for group in groups))
    torch.testing.assert_close(refined, expected, rtol=1e-12, atol=1e-12)
    for one, other in zip(torch.autograd.grad(refined, wanted, direction), gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_no_rows_are_refined_to_none(at_once: None) -> None:
    metric, _, weights = example(torch.device("cpu"), torch.float32, Sizes(8, 13, 2, 2, True), 0)
    leaves = [None if each is None else each.requires_grad_() for each in weights]
    refined = refining.refine(metric.view(0, 8, 8), *leaves, eps=1e-6)  # type: ignore[arg-type]
    assert refined.shape == (0, 8, 8)
    refined.sum().backward()  # type: ignore[no-untyped-call]
    assert all(each is not None and each.grad is not None and not each.grad.any() for each in leaves)


# In a training step.


def passed(found: MetricLearner, gram: Tensor, precision: torch.dtype | None) -> list[Tensor]:
    """A and the gradients of the learner's parameters and of what it takes."""
    wanted = [gram.requires_grad_(), *found.parameters()]
    with torch.autocast("cpu", precision, enabled=precision is not None), weights_cast_together(found, "cpu"):
        metric = found(gram)
    return [metric.detach(), *torch.autograd.grad(metric, wanted, gram.detach().cos())]


def error(found: list[Tensor], exact: list[Tensor]) -> float:
    """The mean relative error of tensors."""
    pairs = zip(found, exact, strict=True)
    return sum(((one - other).norm() / (other.norm() + 1e-6)).item() for one, other in pairs) / len(exact)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_at_once_the_learner_is_as_near_to_fp32_as_unit_by_unit(
    monkeypatch: pytest.MonkeyPatch, bias: bool, compiled: bool
) -> None:
    found, gram = learner(glu_bias=bias, A_dff=21), torch.randn(2, 3, 2, 8, 8)
    exact, singly = passed(found, gram, None), passed(found, gram, torch.bfloat16)
    monkeypatch.setattr(refining, "kernels_for", lambda *_: WRITTEN_OUT)
    if compiled:
        torch._dynamo.reset()
        found.compile(backend="aot_eager", fullgraph=True)
    together = passed(found, gram, torch.bfloat16)
    assert [each.dtype for each in together] == [each.dtype for each in exact]
    assert not torch.equal(together[0], singly[0])
    assert error(together, exact) < 1.1 * error(singly, exact) < 0.06


def gradients_of(model: PldrllmForCausalLM, ids: Tensor) -> tuple[dict[str, Tensor], Counter[str]]:
    """Gradients of a bf16 step by name, and the operations that reached torch's dispatcher."""
    model.zero_grad()
    with counted_launches() as launches:
        with torch.autocast("cpu", torch.bfloat16):
            loss = training_loss(model, ids)
        loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return found, launches.operations


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name, gradient in expected.items() if not torch.equal(found[name], gradient)] == []


@pytest.mark.parametrize("overrides", [{}, {"gram_chunk_size": 4}, {"glu_bias": False}], ids=["", "causal", "no bias"])
def test_a_step_takes_the_units_of_a_layer_at_once(monkeypatch: pytest.MonkeyPatch, overrides: dict[str, Any]) -> None:
    model, ids = small_model(**overrides).train(), token_ids(2, 10)
    expected, one_by_one = gradients_of(model, ids)
    monkeypatch.setattr(refining, "kernels_for", lambda *_: WRITTEN_OUT)
    found, launches = gradients_of(model, ids)
    assert (launches["refine"], launches["refine_backward"], one_by_one["refine"]) == (2, 2, 0)
    products = [sum(each[name] for name in ("addmm", "mm", "bmm")) for each in (one_by_one, launches)]
    assert products[0] - products[1] == 2 * (2 * 2 * 3 * 3 - 2)  # layers x (units x GLUs x weights x passes - 2)
    assert launches.total() < one_by_one.total() - 100
    assert {name: each.dtype for name, each in found.items()} == {name: each.dtype for name, each in expected.items()}


def test_weights_in_bf16_are_joined_without_a_cast(monkeypatch: pytest.MonkeyPatch) -> None:
    found, gram = learner(A_dff=21).bfloat16(), torch.randn(2, 3, 2, 8, 8)
    singly = passed(found, gram, torch.bfloat16)
    exact = passed(copy.deepcopy(found).float(), gram, None)
    monkeypatch.setattr(refining, "kernels_for", lambda *_: WRITTEN_OUT)
    with counted_launches() as launches:
        together = passed(found, gram, torch.bfloat16)
    assert launches.operations["refine_backward"] == 1
    assert [each.dtype for each in together] == [each.dtype for each in singly]
    assert error(together, exact) < 1.1 * error(singly, exact) < 0.06


@pytest.mark.parametrize("what", ["layers", "metric_learner"])
def test_what_is_computed_again_is_taken_at_once_too(at_once: None, what: Any) -> None:
    model, ids = small_model().train(), token_ids(2, 10)
    expected, _ = gradients_of(model, ids)
    recompute(model, what)
    found, launches = gradients_of(model, ids)
    assert (launches["refine"], launches["refine_backward"]) == (4, 2)
    assert_equal(found, expected)


def test_frozen_weights_get_no_gradient_and_the_others_theirs(at_once: None) -> None:
    model, ids = small_model().train(), token_ids(2, 10)
    expected, _ = gradients_of(model, ids)
    frozen = [name for name in expected if "residual_units.0.gated_units.1" in name]
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    found, launches = gradients_of(model, ids)
    assert launches["refine"] == 2
    assert_equal(found, {name: gradient for name, gradient in expected.items() if name not in frozen})


def test_units_with_a_hook_or_a_replaced_part_are_called_one_by_one(at_once: None) -> None:
    model, ids = small_model().train(), token_ids(2, 10)
    first, second = (layer.attention.metric_learner for layer in model.decoder.layers)
    calls: list[str] = []
    hook = first.residual_units[1].register_forward_hook(lambda *_: calls.append("unit"))
    assert gradients_of(model, ids)[1]["refine"] == 1
    assert calls == ["unit"]
    adapter = torch.nn.Linear(8, second.sizes.inner)
    second.residual_units[0].gated_units[0].up = adapter
    assert gradients_of(model, ids)[1]["refine"] == 0
    assert adapter.weight.grad is not None
    hook.remove()
    assert gradients_of(model, ids)[1]["refine"] == 1


def test_passes_without_gradient_or_autocast_call_units_one_by_one(at_once: None) -> None:
    model, ids = small_model().train(), token_ids(2, 10)
    with counted_launches() as launches:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            training_loss(model, ids)
        training_loss(model, ids)
        with torch.autocast("cpu", torch.bfloat16), weights_cast_together(model.double(), "cpu"):
            pass
    assert launches.operations["refine"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("what", [None, "metric_learner"])
def test_a_compiled_layer_holds_the_units_as_a_launch_a_pass(at_once: None, what: Any) -> None:
    ran: dict[str, Counter[str]] = {}

    @contextmanager
    def note(part: str, launches: Counter[str]) -> Iterator[None]:
        ran[part] = launches
        yield

    model, ids = small_model(num_hidden_layers=1).train(), token_ids(2, 10)
    recompute(model, what or "nothing")
    torch._dynamo.reset()
    compile_layers(model, counting_backend(note))
    with torch.autocast("cpu", torch.bfloat16):
        loss = training_loss(model, ids)
    loss.backward()
    kernels = [
        {name: each[f"torch.ops.pldr_train.{name}.default"] for name in ("refine", "refine_backward")}
        for each in ran.values()
    ]
    assert kernels == [{"refine": 1, "refine_backward": 0}, {"refine": what is not None, "refine_backward": 1}]
    # Query, key and value; the output; gate and up, and down, of the feed-forward. None of the learner's is by itself.
    assert (ran["forward"]["extern_kernels.addmm"], ran["backward"]["extern_kernels.mm"]) == (4, 2 * 4)


# Which kernels are taken.


def test_the_comparison_knows_no_autocast() -> None:
    def exact(*tensors: Any) -> Any:
        with torch.autocast("cpu", enabled=False):
            return written_out(*tensors)

    with torch.autocast("cpu", torch.bfloat16):
        sizes = Sizes(16, 24, 2, 2, True)
        kernels = Kernels(exact, backward_written_out)
        assert refining._compute_the_same(kernels, torch.device("cpu"), torch.float32, sizes)


def test_kernels_that_compute_something_else_are_not_taken(caplog: pytest.LogCaptureFixture) -> None:
    sizes, place = Sizes(16, 24, 2, 2, True), (torch.device("cpu"), torch.float32)
    assert refining._compute_the_same(WRITTEN_OUT, *place, sizes)

    def without_bias(*tensors: Any) -> Any:
        rows, inner_weight, inner_bias, *others = tensors
        return written_out(rows, inner_weight, torch.zeros_like(inner_bias), *others)

    def forgetful(*tensors: Any) -> Any:
        *found, vectors = backward_written_out(*tensors)
        return *found, vectors * 1.01

    with caplog.at_level(logging.WARNING):
        assert not refining._compute_the_same(Kernels(without_bias, backward_written_out), *place, sizes)
        assert not refining._compute_the_same(Kernels(written_out, forgetful), *place, sizes)
    assert "the metric learner does without its Triton kernels: refined: differs by" in caplog.text
    assert "the metric learner does without its Triton kernels: of vectors: differs by" in caplog.text


def test_a_device_without_kernels_another_type_or_a_switch_leave_torch_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(refining, "_kernels_of_capability", lambda *_: WRITTEN_OUT)
    monkeypatch.setattr(refining, "_compute_the_same", lambda *_: True)
    find, sizes = refining.kernels_for.__wrapped__, Sizes(64, 170, 2, 8, True)
    assert find(torch.device("cuda"), torch.bfloat16, sizes) is WRITTEN_OUT
    assert find(torch.device("cuda"), torch.float32, sizes) is None
    assert find(torch.device("cpu"), torch.bfloat16, sizes) is None
    monkeypatch.setenv(refining.TRITON_SWITCH, "0")
    assert find(torch.device("cuda"), torch.bfloat16, sizes) is None
