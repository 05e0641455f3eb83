"""Initial weights follow the papers' distributions, and depend on the seed and a module's name alone."""

from __future__ import annotations

import math
import weakref
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pldr_train.building import empty_model, fill_model, put_whole
from pldr_train.model import PldrllmForCausalLM
from pldr_train.parameter_sets import matches
from tests.unit.model_cases import small_config, small_model, token_ids

LAWS = ("native", "legacy", "hf_port", "width_scaled")


def built(seed: int = 5, put: Any = put_whole, law: str = "native", **sizes: Any) -> PldrllmForCausalLM:
    model = empty_model(small_config(**sizes))
    fill_model(model, seed, put, law=law)
    return model


@pytest.fixture(scope="module")
def large() -> PldrllmForCausalLM:
    """Large enough that a standard deviation is known to about a per cent."""
    return built(vocab_size=400, hidden_size=192, num_attention_heads=6, head_dim=32, num_hidden_layers=1)


def test_an_empty_model_takes_no_memory() -> None:
    model = empty_model(small_config(custom_G_type="random"))
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}


def test_every_parameter_and_buffer_is_filled_and_the_model_computes() -> None:
    model, usual = built(), small_model()
    assert model.state_dict().keys() == usual.state_dict().keys()
    everything = dict(model.named_parameters()) | dict(model.named_buffers())
    assert {tensor.device.type for tensor in everything.values()} == {"cpu"}
    for name, parameter in model.named_parameters():
        expected = usual.get_parameter(name)
        described = (parameter.shape, parameter.dtype, parameter.requires_grad, parameter.is_leaf)
        assert described == (expected.shape, expected.dtype, expected.requires_grad, True), name
    model.eval().load_state_dict(usual.state_dict())
    # Buffers that no checkpoint holds are right as well.
    assert torch.equal(model(token_ids(2, 7)).logits, usual(token_ids(2, 7)).logits)


@pytest.mark.parametrize("law", LAWS)
def test_a_tensor_is_the_same_whatever_else_is_built_or_drawn(law: str) -> None:
    expected = dict(built(law=law).named_parameters())

    def put_and_draw(module: nn.Module, values: dict[str, Tensor]) -> None:
        put_whole(module, values)
        torch.rand(17)

    torch.manual_seed(99)
    drawing, deeper = built(put=put_and_draw, law=law), built(num_hidden_layers=5, law=law)
    wider = dict(built(vocab_size=70, law=law).named_parameters())
    names = dict(deeper.named_parameters())
    assert len(names) > len(expected)
    for name, tensor in expected.items():
        assert torch.equal(tensor, drawing.get_parameter(name)), name
        assert torch.equal(tensor, names[name]), name
        if wider[name].shape == tensor.shape:
            assert torch.equal(tensor, wider[name]), name


@pytest.mark.parametrize("law", LAWS)
def test_building_leaves_the_random_generator_where_it_was(law: str) -> None:
    before = torch.get_rng_state()
    built(law=law)
    assert torch.equal(torch.get_rng_state(), before)


def test_modules_and_seeds_differ() -> None:
    model, other = built(num_hidden_layers=3), built(seed=6, num_hidden_layers=3)
    random = {name: value for name, value in model.named_parameters() if value.unique().numel() > 1}
    assert len(random) == 2 + 3 * 22
    for name, value in random.items():
        assert not torch.equal(value, other.get_parameter(name)), name
    same_shape = [pair for pair in combinations(random.items(), 2) if pair[0][1].shape == pair[1][1].shape]
    assert len(same_shape) > 100
    for (one, value), (two, another) in same_shape:
        assert not torch.equal(value, another), (one, two)


def test_linear_weights_are_xavier_uniform(large: PldrllmForCausalLM) -> None:
    linears = {name: module for name, module in large.named_modules() if isinstance(module, nn.Linear)}
    assert len(linears) == 4 + 3 + 2 * 2 * 3 + 1
    for name, linear in linears.items():
        bound = math.sqrt(6 / (linear.in_features + linear.out_features))
        assert 0.99 * bound < float(linear.weight.detach().abs().max()) <= bound, name
        assert float(linear.weight.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.05), name


def test_biases_are_zero_and_norms_are_one(large: PldrllmForCausalLM) -> None:
    biases = [p for name, p in large.named_parameters() if name.endswith(("bias", "metric_bias", "coupling_bias"))]
    norms = [module for module in large.modules() if isinstance(module, nn.LayerNorm)]
    assert (len(biases), len(norms)) == (20 + 6 + 2, 6)
    assert all(not bias.any() for bias in biases)
    assert all(bool((norm.weight == 1).all()) for norm in norms)


def test_power_law_weights_and_the_embedding_are_normal(large: PldrllmForCausalLM) -> None:
    heads, width = 6, 32
    expected = math.sqrt(2 / (width * width + heads * width))
    power_law = large.decoder.layers[0].attention.power_law
    for tensor in (power_law.metric_weight, power_law.power_exponent, power_law.coupling):
        assert float(tensor.detach().std()) == pytest.approx(expected, rel=0.03)
        assert abs(float(tensor.detach().mean())) < 0.05 * expected
    embedding = large.decoder.embed_tokens.weight.detach()
    assert float(embedding.std()) == pytest.approx(1.0, rel=0.02)
    assert abs(float(embedding.mean())) < 0.02


def test_a_predefined_g_is_the_identity() -> None:
    decoder = built(custom_G_type="identity").decoder
    assert torch.equal(decoder.predefined_curvature, torch.eye(8).expand(2, 2, 8, 8))
    assert decoder.predefined_is_set.tolist() == [True, True]


def test_a_predefined_g_is_random_by_the_seed() -> None:
    curvature = built(custom_G_type="random").decoder.predefined_curvature
    assert bool(((curvature >= 0) & (curvature < 1)).all())
    assert 0.4 < float(curvature.mean()) < 0.6
    assert not torch.equal(curvature[0], curvature[1])
    assert torch.equal(curvature, built(custom_G_type="random").decoder.predefined_curvature)
    assert not torch.equal(curvature, built(seed=6, custom_G_type="random").decoder.predefined_curvature)


def test_a_predefined_g_from_outside_is_refused_until_it_is_set() -> None:
    model = built(custom_G_type="external").eval()
    assert bool(model.decoder.predefined_curvature.isnan().all())
    assert model.decoder.predefined_is_set.tolist() == [False, False]
    with pytest.raises(ValueError, match="set_predefined_curvature"):
        model(token_ids(1, 4))


@pytest.mark.parametrize("kind", [None, "random"])
def test_given_values_take_the_place_of_random_ones(kind: str | None) -> None:
    source = small_model(seed=8, custom_G_type=kind)
    model = empty_model(source.config)
    fill_model(model, 5, put_whole, {name: tensor.double() for name, tensor in source.state_dict().items()})
    assert model.state_dict().keys() == source.state_dict().keys()
    for name, tensor in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
        assert model.state_dict()[name].dtype == tensor.dtype


def test_given_values_of_some_parameters_leave_the_others_random() -> None:
    source, expected = small_model(seed=8).state_dict(), built(law="legacy").state_dict()
    taken = [name for name in source if matches(name, ["power_law", "*.layers.1.attention.value.bias"])]
    model = empty_model(small_config())
    fill_model(model, 5, put_whole, {name: source[name] for name in taken}, "legacy")
    assert len(taken) == 2 * 5 + 1
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, source[name] if name in taken else expected[name]), name


def test_no_module_s_values_outlive_those_of_the_next_one_if_they_are_dropped() -> None:
    """So a sharded model's peak is one module, however many there are."""
    alive: list[weakref.ref[Tensor]] = []
    put: list[str] = []

    def drop(module: nn.Module, values: dict[str, Tensor]) -> None:
        assert [reference() for reference in alive] == [None] * len(alive), put[-1]
        alive.extend(weakref.ref(value) for value in values.values())
        put.append(type(module).__name__)

    model = built(put=drop, num_hidden_layers=3)
    assert len(alive) == len(list(model.parameters())) + len(list(model.buffers()))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
