"""Initial weights are distributed as the papers state, and a seed determines them."""

from __future__ import annotations

import math

import pytest
import torch

from pldr_train.model import PldrllmForCausalLM
from tests.unit.model_cases import small_config, small_model


@pytest.fixture(scope="module")
def model() -> PldrllmForCausalLM:
    """Large enough that a standard deviation is known to about a per cent."""
    torch.manual_seed(0)
    return PldrllmForCausalLM(
        small_config(vocab_size=400, hidden_size=192, num_attention_heads=6, head_dim=32, num_hidden_layers=1)
    )


def test_linear_weights_are_xavier_uniform_the_value_projection_too(model: PldrllmForCausalLM) -> None:
    linears = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert len(linears) == 4 + 3 + 2 * 2 * 3 + 1
    assert "decoder.layers.0.attention.value" in linears
    for name, linear in linears.items():
        bound = math.sqrt(6 / (linear.in_features + linear.out_features))
        largest = float(linear.weight.detach().abs().max())
        assert 0.99 * bound < largest <= bound, name
        assert float(linear.weight.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.05), name


def test_biases_are_zero_and_norms_are_one(model: PldrllmForCausalLM) -> None:
    biases = [p for name, p in model.named_parameters() if name.endswith(("bias", "metric_bias", "coupling_bias"))]
    norms = [module for module in model.modules() if isinstance(module, torch.nn.LayerNorm)]
    assert len(biases) == 20 + 6 + 2
    assert len(norms) == 6
    assert all(not bias.any() for bias in biases)
    assert all(bool((norm.weight == 1).all()) for norm in norms)


def test_power_law_weights_are_xavier_normal_over_the_whole_tensor(model: PldrllmForCausalLM) -> None:
    heads, width = 6, 32
    expected = math.sqrt(2 / (width * width + heads * width))
    power_law = model.decoder.layers[0].attention.power_law
    for tensor in (power_law.metric_weight, power_law.power_exponent, power_law.coupling):
        values = tensor.detach()
        assert values.shape == (heads, width, width)
        assert float(values.std()) == pytest.approx(expected, rel=0.03)
        assert abs(float(values.mean())) < 0.05 * expected


def test_embedding_is_standard_normal(model: PldrllmForCausalLM) -> None:
    embedding = model.decoder.embed_tokens.weight.detach()
    assert float(embedding.std()) == pytest.approx(1.0, rel=0.02)
    assert abs(float(embedding.mean())) < 0.02


def test_the_seed_determines_every_weight() -> None:
    first, again, other = small_model(seed=5), small_model(seed=5), small_model(seed=6)
    pairs = list(zip(first.parameters(), again.parameters(), other.parameters(), strict=True))
    assert len(pairs) == 5 + 2 * 53
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert not any(torch.equal(a, c) for a, _, c in pairs if a.unique().numel() > 1)
