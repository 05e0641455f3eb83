"""The DAG loss: its mean over layer x batch x head, its weights, and that measuring leaves no graph."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from pldr_train.dag import TENSOR_NAMES, DagCoefficients, DagLoss, dag_loss, schedule_factor

ALL = DagCoefficients(A_LM=0.001, A_P=0.005, G_LM=0.05)


@dataclass
class Layer:
    positive_metric: Tensor | None
    potential: Tensor | None
    curvature: Tensor | None


def deductive_tensors(*leading: int, layers: int = 3, d: int = 8) -> dict[str, list[Tensor]]:
    return {name: [torch.randn(*leading, d, d).requires_grad_() for _ in range(layers)] for name in TENSOR_NAMES}


def literal(layers: list[Tensor]) -> Tensor:
    """|ln(tr(exp(M o M))/d)| per layer, batch and head in fp64: (L, ...)."""
    matrix = torch.stack(layers).double()
    trace = torch.linalg.matrix_exp(matrix * matrix).diagonal(dim1=-2, dim2=-1).sum(-1)
    return (trace / matrix.shape[-1]).log().abs()


def nodes_below(tensor: Tensor) -> set[Any]:
    found: set[Any] = set()
    waiting = [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting.extend(parent for parent, _ in node.next_functions)
    return found


def leaves_below(tensor: Tensor) -> set[int]:
    return {id(node.variable) for node in nodes_below(tensor) if hasattr(node, "variable")}


@pytest.mark.parametrize("leading", [(2, 3), (2, 4, 3)], ids=["B x H", "B x C x H"])
def test_the_loss_is_the_weighted_mean_over_layer_batch_and_head(leading: tuple[int, ...]) -> None:
    tensors = deductive_tensors(*leading)
    loss = dag_loss(tensors, ALL)
    loss.total.backward()
    expected = torch.zeros((), dtype=torch.float64)
    for name in TENSOR_NAMES:
        values = literal(tensors[name])
        expected = expected + getattr(ALL, name) * values.mean()
        torch.testing.assert_close(loss.per_tensor[name].double(), values.mean().detach(), rtol=1e-5, atol=0)
        torch.testing.assert_close(loss.per_layer[name].double(), values.flatten(1).mean(1).detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(loss.total.double(), expected, rtol=1e-5, atol=0)
    assert loss.total.dtype == torch.float32
    gradients = {name: [layer.grad for layer in tensors[name]] for name in TENSOR_NAMES}
    for name in TENSOR_NAMES:
        for layer, gradient in zip(tensors[name], gradients[name], strict=True):
            (reference,) = torch.autograd.grad(expected, layer, retain_graph=True)
            torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-10)


@pytest.mark.parametrize("leading", [(2, 3), (2, 4, 3)], ids=["B x H", "B x C x H"])
def test_the_largest_head_of_each_layer_and_sequence_is_trained(leading: tuple[int, ...]) -> None:
    tensors = deductive_tensors(*leading)
    loss = dag_loss(tensors, ALL, reduce="max")
    loss.total.backward()
    expected = torch.zeros((), dtype=torch.float64)
    for name in TENSOR_NAMES:
        expected = expected + getattr(ALL, name) * literal(tensors[name]).max(-1).values.mean()
    torch.testing.assert_close(loss.total.double(), expected, rtol=1e-5, atol=0)
    for name in TENSOR_NAMES:
        largest = literal(tensors[name]).argmax(-1)
        for layer, heads in zip(tensors[name], largest, strict=True):
            is_trained = layer.grad.flatten(-2).any(-1)  # type: ignore[union-attr]
            assert torch.equal(is_trained, torch.nn.functional.one_hot(heads, 3).bool())
            (reference,) = torch.autograd.grad(expected, layer, retain_graph=True)
            torch.testing.assert_close(layer.grad, reference, rtol=1e-4, atol=1e-10)


def test_a_factor_of_each_layer_weighs_its_loss() -> None:
    tensors, factors = deductive_tensors(2, 3), (0.5, 0.0, 4.0)
    for reduce in ("mean", "max"):
        loss = dag_loss(tensors, ALL, reduce=reduce, layer_factors=factors)
        expected = 0.0
        for name in TENSOR_NAMES:
            values = literal(tensors[name])
            of_layers = (values.max(-1).values if reduce == "max" else values.mean(-1)).mean(1).detach()
            expected += getattr(ALL, name) * float(0.5 * of_layers[0] + 4.0 * of_layers[2]) / 3
        assert loss.total.item() == pytest.approx(expected, rel=1e-5)
    loss.total.backward()
    for name in TENSOR_NAMES:
        gradients = [layer.grad is not None and bool(layer.grad.any()) for layer in tensors[name]]
        assert gradients == [True, False, True]
    ones = dag_loss(tensors, ALL, layer_factors=(1, 1, 1)).total
    torch.testing.assert_close(ones, dag_loss(tensors, ALL).total, rtol=1e-6, atol=0)


def test_the_logged_values_are_the_same_means_however_the_loss_is_reduced_and_weighed() -> None:
    tensors = deductive_tensors(2, 3)
    plain = dag_loss(tensors, ALL)
    weighed = dag_loss(tensors, ALL, reduce="max", layer_factors=(0.5, 0.0, 4.0))
    for name in TENSOR_NAMES:
        assert torch.equal(plain.per_tensor[name], weighed.per_tensor[name])
        assert torch.equal(plain.per_layer[name], weighed.per_layer[name])


def test_another_reduction_or_number_of_factors_is_refused() -> None:
    with pytest.raises(ValueError, match="the mean or the max of the heads, not 'sum'"):
        dag_loss(deductive_tensors(1, 2), ALL, reduce="sum")
    with pytest.raises(ValueError, match="got 2 layer_factors for 3 layers"):
        dag_loss(deductive_tensors(1, 2), ALL, layer_factors=(1.0, 1.0))


def test_named_tensors_and_layers_outputs_give_the_same() -> None:
    tensors = deductive_tensors(2, 2)
    layers = [Layer(*columns) for columns in zip(*(tensors[name] for name in TENSOR_NAMES), strict=True)]
    by_name, by_layer = dag_loss(tensors, ALL), dag_loss(layers, ALL)
    assert torch.equal(by_name.total, by_layer.total)
    for name in TENSOR_NAMES:
        assert torch.equal(by_name.per_layer[name], by_layer.per_layer[name])


def test_tensors_of_unequal_shape_and_type_are_measured_apart() -> None:
    tensors = deductive_tensors(2, 2)
    tensors["G_LM"] = [torch.randn(1, 2, 5, 5, dtype=torch.float64) for _ in range(3)]
    loss = dag_loss(tensors, ALL)
    for name in TENSOR_NAMES:
        reference = literal(tensors[name]).mean().to(loss.per_tensor[name].dtype)
        torch.testing.assert_close(loss.per_tensor[name], reference.detach(), rtol=1e-5, atol=0)


def test_a_coefficient_of_zero_measures_without_a_graph() -> None:
    tensors = deductive_tensors(2, 2)
    everything = dag_loss(tensors, ALL)
    loss = dag_loss(tensors, DagCoefficients(A_P=0.05))
    assert leaves_below(loss.total) == {id(layer) for layer in tensors["A_P"]}
    loss.total.backward()
    for name in TENSOR_NAMES:
        assert all((layer.grad is not None) == (name == "A_P") for layer in tensors[name])
        assert not loss.per_tensor[name].requires_grad
        assert not loss.per_layer[name].requires_grad
        assert torch.equal(loss.per_layer[name], everything.per_layer[name])


def test_measuring_keeps_no_tensor_for_the_backward_pass() -> None:
    tensors = deductive_tensors(2, 2)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = dag_loss(tensors, DagCoefficients())
    assert not saved
    assert torch.equal(loss.total, torch.zeros(()))
    assert loss.total.dtype == torch.float32
    assert not loss.total.requires_grad
    assert set(loss.per_tensor) == set(loss.per_layer) == set(TENSOR_NAMES)


def test_without_measuring_only_trained_tensors_are_evaluated() -> None:
    tensors = deductive_tensors(2, 2)
    loss = dag_loss(tensors, DagCoefficients(G_LM=0.05), measure=False)
    assert set(loss.per_tensor) == set(loss.per_layer) == {"G_LM"}
    torch.testing.assert_close(loss.total.detach(), 0.05 * loss.per_tensor["G_LM"])
    silent = dag_loss(tensors, DagCoefficients(), measure=False)
    assert silent.per_tensor == silent.per_layer == {}
    assert silent.total.item() == 0.0


def test_a_model_with_a_predefined_g_is_measured_by_its_curvature_alone() -> None:
    layers = [Layer(None, None, torch.eye(6).expand(1, 2, 6, 6)) for _ in range(2)]
    loss = dag_loss(layers, DagCoefficients())
    assert set(loss.per_tensor) == {"G_LM"}
    assert loss.per_tensor["G_LM"].item() == pytest.approx(1.0)
    with pytest.raises(ValueError, match=r"A_P=0\.005, but the model has no A_P .* set the coefficient to 0"):
        dag_loss(layers, DagCoefficients(A_P=0.005))


def test_nothing_hangs_on_a_graph_under_no_grad() -> None:
    with torch.no_grad():
        assert not dag_loss(deductive_tensors(2, 2), ALL).total.requires_grad


def test_the_loss_compiles_without_a_graph_break() -> None:
    def losses(a_p: list[Tensor], g_lm: list[Tensor]) -> DagLoss:
        return dag_loss({"A_P": a_p, "G_LM": g_lm}, DagCoefficients(A_P=0.05))

    tensors = deductive_tensors(2, 2)
    eager = losses(tensors["A_P"], tensors["G_LM"])
    compiled = torch.compile(losses, backend="aot_eager", fullgraph=True)(tensors["A_P"], tensors["G_LM"])
    assert torch.equal(eager.total, compiled.total)
    assert torch.equal(eager.per_layer["G_LM"], compiled.per_layer["G_LM"])
    compiled.total.backward()
    assert tensors["A_P"][0].grad is not None
    assert tensors["G_LM"][0].grad is None


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"A": [torch.eye(2)]}, "knows A_LM, A_P, G_LM, not A"),
        ({}, "no layers"),
        ([], "no layers"),
        ({"A_P": []}, "no layers of A_P"),
        ({"A_P": [torch.eye(2), torch.eye(3)]}, "A_P has layers of unequal shape"),
        ([Layer(None, torch.eye(2), torch.eye(2)), Layer(None, None, torch.eye(2))], r"A_P .* missing in layers \[1\]"),
    ],
)
def test_inputs_that_make_no_loss_are_refused(tensors: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dag_loss(tensors, DagCoefficients())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_coefficient_must_be_finite(value: float) -> None:
    with pytest.raises(ValueError, match="DAG coefficient A_P="):
        DagCoefficients(A_P=value)


@pytest.mark.parametrize(
    ("kind", "shape", "expected"),
    [
        ("constant", "linear", [1.0] * 8),
        ("warmup", "linear", [0.0, 0.0, 0.0, 0.25, 0.5, 0.75, 1.0, 1.0]),
        ("decay", "linear", [1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]),
        ("warmup", "cosine", [0.0, 0.0, 0.0, (1 - math.sqrt(0.5)) / 2, 0.5, (1 + math.sqrt(0.5)) / 2, 1.0, 1.0]),
        ("window", "linear", [0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0]),
    ],
)
def test_a_schedule_is_a_function_of_the_step(kind: str, shape: str, expected: list[float]) -> None:
    factors = [schedule_factor(step, kind, 2, 6, shape) for step in range(8)]
    assert factors == pytest.approx(expected, abs=1e-15)


def test_a_schedule_that_there_is_not_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no schedule 'rise' with shape 'linear'"):
        schedule_factor(0, "rise", 0, 1)
    with pytest.raises(ValueError, match=r"no schedule 'decay' with shape 'round'"):
        schedule_factor(0, "decay", 0, 1, "round")
