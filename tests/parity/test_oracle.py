"""The literal implementation itself agrees with the golden figures, so that it may serve as oracle and baseline."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import Golden
from tests.oracle import Oracle, OracleSizes, cross_entropy, dag_terms, total_loss
from tests.parity.tolerances import assert_gradients_close, assert_losses_close, assert_tensors_close


def build_oracle(golden: Golden, curvature: torch.Tensor | None = None) -> Oracle:
    sizes = golden.sizes()
    del sizes["max_position_embeddings"]
    oracle = Oracle(OracleSizes(**sizes, curvature=curvature))
    weights = golden.group("weights")
    if curvature is not None:
        weights = {key: value for key, value in weights.items() if not is_plga(key)}
    oracle.load_state_dict(weights)
    return oracle


def is_plga(published_name: str) -> bool:
    return any(part in published_name for part in (".mha1.layernorm1.", ".reslayerAs.", ".plgatt_layer."))


def test_oracle_reproduces_every_golden_tensor(golden: Golden) -> None:
    oracle = build_oracle(golden)
    outputs = oracle(golden["input_ids"][:, :-1])
    assert_tensors_close({"logits": outputs.logits}, {"logits": golden["logits"]})
    assert_tensors_close({"decoder_output": outputs.decoder_output}, {"decoder_output": golden["decoder_output"]})
    assert len(outputs.layers) == golden.settings["num_hidden_layers"]
    for index, layer in enumerate(outputs.layers):
        expected = golden.group(f"layer{index}")
        assert sorted(expected) == ["A", "A_LM", "A_P", "G_LM", "attention_scores_before_mask"]
        assert_tensors_close({key: getattr(layer, key) for key in expected}, expected)


def test_oracle_reproduces_golden_losses_and_gradients(golden: Golden) -> None:
    oracle = build_oracle(golden)
    outputs, targets = oracle(golden["input_ids"][:, :-1]), golden["input_ids"][:, 1:]
    total = total_loss(outputs, targets, golden.dag_coefficients)
    losses = {f"dag_{name}": value for name, value in dag_terms(outputs).items()}
    losses |= {"cross_entropy": cross_entropy(outputs.logits, targets), "total": total}
    assert_losses_close(losses, golden.group("loss"))
    total.backward()
    gradients = {name: parameter.grad for name, parameter in oracle.named_parameters()}
    assert_gradients_close(gradients, golden.group("grads"))


@pytest.mark.parametrize("kind", ["identity", "random"])
def test_oracle_reproduces_golden_logits_with_predefined_G(golden: Golden, kind: str) -> None:
    predefined = golden.group(f"predefined_{kind}")
    outputs = build_oracle(golden, predefined["G"])(golden["input_ids"][:, :-1])
    assert_tensors_close({"logits": outputs.logits}, {"logits": predefined["logits"]})
