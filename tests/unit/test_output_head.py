"""The loss without logits: that of whole logits, in value and gradient, in chunks that are never all there at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pldr_train.dag import DagCoefficients, dag_loss
from pldr_train.model import output_head
from pldr_train.model.output_head import UNSCORED, OutputHead
from pldr_train.training.objective import mark_unscored, token_loss
from tests.unit.model_cases import VOCAB_SIZE, small_model, token_ids

WIDTH, VOCAB = 16, 37


def case(dtype: torch.dtype = torch.float32, bias: bool = True) -> tuple[OutputHead, Tensor, Tensor]:
    torch.manual_seed(0)
    head = OutputHead(WIDTH, VOCAB, bias=bias, dtype=dtype)
    hidden = torch.randn(3, 11, WIDTH, dtype=dtype, requires_grad=True)
    targets = torch.randint(1, VOCAB, (3, 11))
    targets[0, 3:6] = targets[2] = 0
    return head, hidden, targets


FACTOR = torch.tensor(0.37)


def gradients(loss: Tensor, head: OutputHead, hidden: Tensor) -> list[Tensor]:
    return [each.double() for each in torch.autograd.grad(loss, [hidden, *head.parameters()])]


def both(
    head: OutputHead, hidden: Tensor, targets: Tensor, autocast: bool = False
) -> tuple[tuple[Tensor, Tensor, list[Tensor]], tuple[Tensor, Tensor, list[Tensor]]]:
    """Sum, hits and gradients by chunks and of whole logits."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss, total, correct = head(hidden, mark_unscored(targets), FACTOR)
        whole = token_loss(head(hidden), targets)
    assert torch.equal(loss, total * FACTOR)
    assert not total.requires_grad
    return (
        (total, correct, gradients(loss, head, hidden)),
        (whole.cross_entropy_sum.detach(), whole.correct, gradients(whole.cross_entropy_sum * FACTOR, head, hidden)),
    )


@pytest.mark.parametrize("rows", [1, 4, 33, 1000])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_loss_and_gradients_are_those_of_whole_logits(monkeypatch: pytest.MonkeyPatch, rows: int, bias: bool) -> None:
    monkeypatch.setattr(output_head, "MOST_LOGITS", rows * VOCAB)
    ours, whole = both(*case(bias=bias))
    torch.testing.assert_close(ours[0], whole[0], rtol=1e-6, atol=0)
    assert ours[1] == whole[1]
    for left, right in zip(ours[2], whole[2], strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
def test_one_chunk_gives_loss_and_gradients_to_the_last_bit(autocast: bool) -> None:
    ours, whole = both(*case(), autocast=autocast)
    assert ours[0].dtype == torch.float32
    assert torch.equal(ours[0], whole[0])
    assert ours[1] == whole[1]
    assert [torch.equal(left, right) for left, right in zip(ours[2], whole[2], strict=True)] == [True] * 3


@pytest.mark.parametrize("rows", [4, 33])
def test_under_autocast_gradients_are_as_exact_as_those_of_whole_logits(
    monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    """Against fp64: bf16 rounds each product, whole logits round the sum of all chunks once."""
    monkeypatch.setattr(output_head, "MOST_LOGITS", rows * VOCAB)
    head, hidden, targets = case()
    (_, _, ours), (_, _, whole) = both(head, hidden, targets, autocast=True)
    rounded = OutputHead(WIDTH, VOCAB, dtype=torch.float64)
    with torch.no_grad():
        for to, of in zip(rounded.parameters(), head.parameters(), strict=True):
            to.copy_(of.bfloat16())
    states = hidden.detach().bfloat16().double().requires_grad_()
    exact = gradients(token_loss(rounded(states), targets).cross_entropy_sum * FACTOR, rounded, states)
    for left, right, reference in zip(ours, whole, exact, strict=True):
        assert (left - reference).norm() < 1.2 * (right - reference).norm() + 1e-6


def test_bf16_and_fp64_weights_get_gradients_of_their_type() -> None:
    for dtype in (torch.bfloat16, torch.float64):
        head, hidden, targets = case(dtype)
        loss, *_ = head(hidden, mark_unscored(targets))
        found = torch.autograd.grad(loss, [hidden, *head.parameters()])
        assert {each.dtype for each in found} == {dtype}
        whole = torch.autograd.grad(token_loss(head(hidden), targets).cross_entropy_sum, [hidden, *head.parameters()])
        for left, right in zip(found, whole, strict=True):
            torch.testing.assert_close(left, right, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=2e-2)


def test_frozen_weights_get_no_gradient_and_no_targets_no_loss() -> None:
    head, hidden, targets = case()
    head.weight.requires_grad_(False)
    loss, *_ = head(hidden, mark_unscored(targets))
    loss.backward()
    assert head.weight.grad is None
    assert head.bias.grad is not None
    loss, _, correct = head(hidden, torch.full_like(targets, UNSCORED))
    assert (float(loss.detach()), int(correct)) == (0.0, 0)
    assert not any(each.any() for each in torch.autograd.grad(loss, [hidden, head.bias]))
    with torch.no_grad():
        assert not head(hidden, mark_unscored(targets))[0].requires_grad


class LargestTensor(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.elements = max(self.elements, out.numel())
        return out


def test_never_more_logits_than_a_chunk_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_head, "MOST_LOGITS", 20 * VOCAB)  # more than hidden states and weights have elements
    head, hidden, targets = case()
    with LargestTensor() as largest:
        head(hidden, mark_unscored(targets))[0].backward()
    assert largest.elements == 20 * VOCAB < 33 * VOCAB


def test_the_model_scores_targets_in_the_place_of_logits() -> None:
    model, ids = small_model().train(), token_ids(2, 11)
    scored = model(ids[:, :-1], targets=ids[:, 1:], output_deductive_outputs=True)
    logits = model(ids[:, :-1]).logits
    expected = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    assert scored.logits is None
    assert torch.equal(scored.cross_entropy_sum, expected)
    assert scored.correct == (logits.argmax(-1) == ids[:, 1:]).sum()
    assert len(scored.deductive_outputs) == 2
    assert model(ids, labels=ids).logits.shape == (2, 11, VOCAB_SIZE)
    with pytest.raises(ValueError, match="labels"):
        model(ids, labels=ids, targets=ids)


def test_a_replaced_head_scores_targets_too() -> None:
    model, ids = small_model(), token_ids(2, 11)
    model.resize_token_embeddings(VOCAB_SIZE + 3)
    scored = model(ids[:, :-1], targets=ids[:, 1:])
    logits = model(ids[:, :-1]).logits
    assert logits.shape[-1] == VOCAB_SIZE + 3
    assert torch.equal(
        scored.cross_entropy_sum, F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    )


def test_loss_without_logits_compiles_to_one_graph() -> None:
    model, ids = small_model().train(), token_ids(2, 11)

    def loss_of(ids: Tensor) -> Tensor:
        outputs = model(ids[:, :-1], targets=ids[:, 1:], output_deductive_outputs=True)
        return outputs.loss + dag_loss(outputs.deductive_outputs, DagCoefficients(1.0, 1.0, 1.0)).total

    loss_of(ids).backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    torch._dynamo.reset()
    torch.compile(loss_of, fullgraph=True, backend="aot_eager")(ids).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5, msg=name)
