"""The configuration: the published sizes, derived sizes, and errors that name the key."""

from __future__ import annotations

import json
from pathlib import Path
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
    assert PldrllmConfig().rope_theta == 10_000.0
    assert PldrllmConfig(rope_theta=500.0, rope_scaling=None).rope_theta == 500.0
    assert PldrllmConfig.from_dict(PldrllmConfig(rope_theta=500.0).to_dict()).rope_theta == 500.0
    assert PldrllmConfig(rope_scaling={"rope_type": "default", "rope_theta": 500.0}).rope_theta == 500.0


def test_config_json_holds_every_published_key(tmp_path: Path) -> None:
    config = PldrllmConfig(rope_theta=500.0)
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    published = {
        "vocab_size": 32000, "hidden_size": 896, "intermediate_size": 2389, "num_hidden_layers": 5,
        "num_attention_heads": 14, "head_dim": 64, "hidden_act": "silu", "max_position_embeddings": 1024,
        "layer_norm_eps": 1e-6, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "tie_word_embeddings": False,
        "rope_theta": 500.0, "rope_scaling": None, "attention_bias": True, "glu_bias": True, "final_bias": True,
        "attention_dropout": 0.0, "reference_rope": True, "num_reslayerA": 8, "num_denseA": 2, "A_dff": 170,
        "custom_G_type": None, "cache_first_G": False, "output_pldr_attentions": False, "use_cache": True,
        "initializer_range": 0.02, "model_type": "pldrllm",
    }  # fmt: skip
    assert {key: written.get(key, "missing") for key in published} == published
    assert PldrllmConfig.from_pretrained(tmp_path).rope_theta == 500.0
    assert PldrllmConfig.from_pretrained(tmp_path, rope_theta=700.0).rope_theta == 700.0
    # As transformers 4 wrote it: no rope_parameters.
    del written["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps(written))
    assert PldrllmConfig.from_pretrained(tmp_path).rope_theta == 500.0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"hidden_size": 100, "head_dim": None}, r"hidden_size=100 .*num_attention_heads=14"),
        ({"hidden_size": 100, "head_dim": 64}, r"hidden_size=100 .*num_attention_heads \* head_dim.*896"),
        ({"hidden_size": 14 * 63}, r"head_dim=63 must be even"),
        ({"custom_G_type": "learned"}, r"custom_G_type='learned'.*identity.*random.*external"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, r"rope_scaling.rope_type='linear'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, r"rope_scaling.rope_type='dynamic' is not supported"),
        ({"rope_parameters": {"rope_type": "yarn"}}, r"rope_parameters.rope_type='yarn' is not supported"),
        ({"rope_scaling": {"factor": 2.0}}, r"rope_scaling.factor=2.0 is not supported: .* remove it"),
        ({"rope_scaling": "linear"}, r"rope_scaling='linear' is not supported: .* set it to None"),
        ({"rope_theta": 5.0, "rope_parameters": {"rope_theta": 6.0}}, r"rope_theta=5.0 contradicts .*rope_theta=6.0"),
        ({"random_distribution": "cauchy"}, r"random_distribution='cauchy'.*uniform.*normal"),
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
