"""The literal implementation itself agrees with the golden figures, so that it may serve as oracle and baseline."""

from __future__ import annotations

import pytest

from tests.conftest import Golden
from tests.oracle import cross_entropy, dag_terms, total_loss
from tests.parity.golden_model import exact_gradients, load_oracle
from tests.parity.tolerances import assert_gradients_close, assert_losses_close, assert_tensors_close


def test_oracle_reproduces_every_golden_tensor(golden: Golden) -> None:
    outputs = load_oracle(golden)(golden["input_ids"][:, :-1])
    assert_tensors_close({"logits": outputs.logits}, {"logits": golden["logits"]})
    assert_tensors_close({"decoder_output": outputs.decoder_output}, {"decoder_output": golden["decoder_output"]})
    assert len(outputs.layers) == golden.settings["num_hidden_layers"]
    for index, layer in enumerate(outputs.layers):
        expected = golden.group(f"layer{index}")
        assert len(expected) == 5
        assert_tensors_close({name: getattr(layer, name) for name in expected}, expected)


def test_oracle_reproduces_golden_losses_and_gradients(golden: Golden) -> None:
    oracle = load_oracle(golden)
    outputs, targets = oracle(golden["input_ids"][:, :-1]), golden["input_ids"][:, 1:]
    total = total_loss(outputs, targets, golden.dag_coefficients)
    losses = {f"dag_{name}": value for name, value in dag_terms(outputs).items()}
    losses |= {"cross_entropy": cross_entropy(outputs.logits, targets), "total": total}
    assert_losses_close(losses, golden.group("loss"))

    total.backward()
    gradients = {name: parameter.grad for name, parameter in oracle.named_parameters()}
    assert_gradients_close(gradients, golden.group("grads"), exact_gradients(golden))


@pytest.mark.parametrize("kind", ["identity", "random"])
def test_oracle_reproduces_golden_logits_with_predefined_g(golden: Golden, kind: str) -> None:
    predefined = golden.group(f"predefined_{kind}")
    outputs = load_oracle(golden, predefined["G"])(golden["input_ids"][:, :-1])
    assert_tensors_close({"logits": outputs.logits}, {"logits": predefined["logits"]})
