"""The configuration: the published sizes, derived sizes, and errors that name the key."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pldr_train.model import PldrllmConfig, PldrllmForCausalLM
from tests.unit.model_cases import small_config


@pytest.mark.parametrize(
    ("overrides", "parameters"),
    [
        ({}, 109_689_362),
        ({"A_dff": 180}, 109_844_562),
        ({"custom_G_type": "identity"}, 105_606_482),
        ({"custom_G_type": "random"}, 105_606_482),
        ({"custom_G_type": "external"}, 105_606_482),
        ({"num_hidden_layers": 7, "num_attention_heads": 12, "hidden_size": 768}, 104_237_120),
        ({"num_hidden_layers": 1, "num_attention_heads": 42, "hidden_size": 2688}, 260_202_048),
    ],
)
def test_published_models_have_the_published_parameter_counts(overrides: dict[str, Any], parameters: int) -> None:
    with torch.device("meta"):
        model = PldrllmForCausalLM(PldrllmConfig(**overrides))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_sizes_left_out_are_derived_as_the_papers_do() -> None:
    config = PldrllmConfig(hidden_size=120, num_attention_heads=5)
    assert (config.head_dim, config.A_dff, config.intermediate_size) == (24, 64, 320)
    defaults = PldrllmConfig()
    assert (defaults.head_dim, defaults.A_dff, defaults.intermediate_size) == (64, 170, 2389)


def test_rotary_base_is_read_from_the_published_key() -> None:
    assert PldrllmConfig().rope_theta_value == 10_000.0
    assert PldrllmConfig(rope_theta=500.0, rope_scaling=None).rope_theta_value == 500.0
    assert PldrllmConfig.from_dict(PldrllmConfig(rope_theta=500.0).to_dict()).rope_theta_value == 500.0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"hidden_size": 100, "head_dim": None}, r"hidden_size=100 .*num_attention_heads=14"),
        ({"hidden_size": 100, "head_dim": 64}, r"hidden_size=100 .*num_attention_heads \* head_dim.*896"),
        ({"hidden_size": 14 * 63}, r"head_dim=63 must be even"),
        ({"custom_G_type": "learned"}, r"custom_G_type='learned'.*identity.*random.*external"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, r"rope_type='linear'"),
        ({"hidden_act": "gelu"}, r"hidden_act='gelu'.*silu"),
        ({"tie_word_embeddings": True}, r"tie_word_embeddings=True"),
        ({"num_hidden_layers": 0}, r"num_hidden_layers=0"),
        ({"num_reslayerA": -1}, r"num_reslayerA=-1"),
        ({"vocab_size": 0}, r"vocab_size=0"),
    ],
)
def test_sizes_and_choices_that_cannot_work_are_refused_by_name(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PldrllmConfig(**overrides)


def test_without_biases_the_model_has_none() -> None:
    model = PldrllmForCausalLM(small_config(attention_bias=False, glu_bias=False, final_bias=False))
    with_bias = [name for name, module in model.named_modules() if getattr(module, "bias", None) is not None]
    assert with_bias
    assert all(name.endswith("norm") for name in with_bias)
