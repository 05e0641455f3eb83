"""The laws of initial weights, tensor by tensor: moments, bounds and kind of distribution."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch
from torch import Tensor

from pldr_train.building import empty_model, fill_model, model_config, put_whole
from pldr_train.model import PldrllmConfig
from pldr_train.parameter_sets import matches
from pldr_train.recipe import recipe_from_dict
from tests.unit.model_cases import small_config

ATTENTION = [f"attention.{part}.weight" for part in ("query", "key", "value", "output")]
UNITS = "attention.metric_learner.residual_units.0.gated_units.0"
POWER = [f"attention.power_law.{part}" for part in ("metric_weight", "power_exponent", "coupling")]

NATIVE: dict[str, tuple[str, float]] = {
    **dict.fromkeys(ATTENTION, ("uniform", 0.0334077)),  # sqrt(2 / (896 + 896))
    "feed_forward.gate.weight": ("uniform", 0.0246744),  # sqrt(2 / (896 + 2389))
    "feed_forward.up.weight": ("uniform", 0.0246744),
    "feed_forward.down.weight": ("uniform", 0.0246744),
    f"{UNITS}.gate.weight": ("uniform", 0.0924500),  # sqrt(2 / (64 + 170))
    f"{UNITS}.up.weight": ("uniform", 0.0924500),
    f"{UNITS}.down.weight": ("uniform", 0.0924500),
    **dict.fromkeys(POWER, ("normal", 0.0200160)),  # sqrt(2 / (64 * (64 + 14)))
    "lm_head.weight": ("uniform", 0.0324785),  # sqrt(2 / (896 + 1000))
    "decoder.embed_tokens.weight": ("normal", 1.0),
}
"""Kind and standard deviation at 14 heads of 64, A_dff 170 and 1,000 pieces. All others are 0, or 1 (LayerNorms)."""

LAWS: dict[str, dict[str, tuple[str, float]]] = {
    "native": NATIVE,
    "legacy": NATIVE
    | {
        "attention.value.weight": ("uniform", 0.0192880),  # 1 / sqrt(3 * 896)
        "attention.value.bias": ("uniform", 0.0192880),
    },
    "hf_port": NATIVE | dict.fromkeys(POWER, ("uniform", 0.0200160)),
    "width_scaled": NATIVE
    | dict.fromkeys(POWER, ("uniform", 0.0217597))  # sqrt(2 / (64 * 66))
    | {
        "feed_forward.gate.weight": ("uniform", 0.0246818),  # sqrt(2 * 128 / (896 * (128 + 341)))
        "feed_forward.up.weight": ("uniform", 0.0246818),
        "feed_forward.down.weight": ("uniform", 0.0246714),  # sqrt(2 * 341 / (2389 * (128 + 341)))
        "lm_head.weight": ("uniform", 0.0159151),  # sqrt(2 * 128 / (896 * (128 + 1000)))
    },
}
SIGMAS = 5.0
"""How many standard errors a moment of a sample may be off."""


def drawn(law: str, heads: int = 14, width: int = 64, seed: int = 5) -> dict[str, Tensor]:
    """The parameters of a model of one layer; those of the layer by their name within it."""
    config = PldrllmConfig(
        num_attention_heads=heads, head_dim=width, hidden_size=heads * width, num_hidden_layers=1,
        num_reslayerA=1, num_denseA=1, A_dff=170, vocab_size=1000,
    )  # fmt: skip
    model = empty_model(config)
    fill_model(model, seed, put_whole, law=law)
    return {name.removeprefix("decoder.layers.0."): value.detach() for name, value in model.named_parameters()}


def assert_distributed(values: Tensor, kind: str, std: float, name: str) -> None:
    """Mean, standard deviation and kurtosis within their standard errors; a uniform law also within its bound."""
    values = values.double().flatten()
    count, kurtosis = len(values), {"uniform": 1.8, "normal": 3.0}[kind]
    assert abs(float(values.mean())) < SIGMAS * std / math.sqrt(count), name
    # The square of a deviation has the variance (kurtosis - 1) std^4.
    error = math.sqrt((kurtosis - 1) / count)
    assert float(values.square().mean()) == pytest.approx(std**2, rel=SIGMAS * error), name
    if kind == "uniform":
        bound = math.sqrt(3) * std
        assert bound * (1 - 20 / count) < float(values.abs().max()) <= bound * (1 + 1e-5), name
    if count > 10_000:
        fourth = float((values / std).pow(4).mean())
        assert fourth == pytest.approx(kurtosis, abs=SIGMAS * math.sqrt(96 / count)), name


@pytest.mark.parametrize("law", LAWS)
def test_every_tensor_has_the_moments_and_the_kind_of_its_law(law: str) -> None:
    tensors = drawn(law)
    assert LAWS[law].keys() <= tensors.keys()
    for name, tensor in tensors.items():
        if name in LAWS[law]:
            assert_distributed(tensor, *LAWS[law][name], name)
        else:
            is_scale = matches(name, ["norms"]) and name.endswith(".weight")
            assert torch.equal(tensor, torch.full_like(tensor, float(is_scale))), name


def test_the_golden_figures_are_those_of_the_papers() -> None:
    """Against the formulas as the papers state them."""
    power = POWER[0]
    assert LAWS["native"][power][1] == LAWS["hf_port"][power][1] == pytest.approx(0.0200, abs=5e-5)
    assert LAWS["width_scaled"][power][1] ** 2 == pytest.approx(2 / (64 * 66), rel=1e-5)
    for fan_in, fan_out, ref_in, ref_out, name in (
        (896, 896, 128, 128, "attention.query.weight"),
        (896, 2389, 128, 341, "feed_forward.up.weight"),
        (2389, 896, 341, 128, "feed_forward.down.weight"),
        (896, 1000, 128, 1000, "lm_head.weight"),
    ):
        factor = math.sqrt(ref_in * (fan_in + fan_out) / (fan_in * (ref_in + ref_out)))
        assert LAWS["width_scaled"][name][1] == pytest.approx(factor * math.sqrt(2 / (fan_in + fan_out)), rel=1e-5)


@pytest.mark.parametrize("heads", [3, 8])
def test_scaling_at_another_width_of_heads_refers_to_two_heads_of_that_width(heads: int) -> None:
    width, hidden = 32, heads * 32
    tensors = drawn("width_scaled", heads, width)
    for name in POWER:
        assert_distributed(tensors[name], "uniform", math.sqrt(2 / (32 * 34)), name)
    for name, fan_in, ref_in, ref_out in (
        ("attention.value.weight", hidden, 64, 64),
        ("feed_forward.gate.weight", hidden, 64, 170),
        ("feed_forward.down.weight", 8 * hidden // 3, 170, 64),
        ("lm_head.weight", hidden, 64, 1000),
    ):
        assert_distributed(tensors[name], "uniform", math.sqrt(2 * ref_in / (fan_in * (ref_in + ref_out))), name)


def test_a_model_of_two_heads_is_that_of_the_port() -> None:
    scaled, port = drawn("width_scaled", heads=2), drawn("hf_port", heads=2)
    assert all(torch.equal(tensor, port[name]) for name, tensor in scaled.items())


@pytest.mark.parametrize("law", LAWS)
def test_the_metric_learner_is_that_of_a_two_head_model_at_any_number_of_heads(law: str) -> None:
    """So lineages of different width share it by sharing a seed."""
    reference, wide = drawn(law, heads=2), drawn(law, heads=5)
    learner = [name for name in reference if matches(f"decoder.layers.0.{name}", ["metric_learner"])]
    assert len(learner) == 3 * 2 + 2
    assert all(torch.equal(reference[name], wide[name]) for name in learner)
    other = drawn(law, heads=2, seed=6)
    assert not any(torch.equal(reference[name], other[name]) for name in learner if name.endswith("e.weight"))


@pytest.mark.parametrize("law", LAWS)
def test_a_law_changes_what_it_names_and_no_other_tensor(law: str) -> None:
    native, tensors = drawn("native", heads=5), drawn(law, heads=5)
    changed = {name for name in native if not torch.equal(native[name], tensors[name])}
    expected = {
        "native": set(),
        "legacy": {"attention.value.weight", "attention.value.bias"},
        "hf_port": set(POWER),
        "width_scaled": {*POWER, *(f"feed_forward.{part}.weight" for part in ("gate", "up", "down")), "lm_head.weight"},
    }
    assert changed == expected[law]


@pytest.mark.parametrize("law", LAWS)
def test_the_law_is_no_part_of_the_model_s_configuration(law: str) -> None:
    """Exported models keep the published keys."""
    values = {"run": {"name": "x"}, "data": {"source": "quickstart"}}
    config = model_config(recipe_from_dict({**values, "model": {"init": law}}))
    assert config.to_dict() == model_config(recipe_from_dict(values)).to_dict()


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="torch draws other normal numbers there"
)
@pytest.mark.parametrize(
    ("kind", "digest"),
    [(None, "658eadc9bbff30aa98142f47a6d2c3c1"), ("random", "6754cd61289fb14210518bed0a7fc277")],
)
def test_native_weights_are_what_they_were_before_there_were_other_laws(kind: str | None, digest: str) -> None:
    model = empty_model(small_config(custom_G_type=kind))
    fill_model(model, 5, put_whole, law="native")
    found = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        found.update(name.encode() + tensor.contiguous().numpy().tobytes())
    assert found.hexdigest() == digest


@pytest.mark.parametrize("law", LAWS)
def test_a_predefined_g_is_the_same_under_every_law(law: str) -> None:
    model, native = (empty_model(small_config(custom_G_type="random")) for _ in range(2))
    fill_model(model, 5, put_whole, law=law)
    fill_model(native, 5, put_whole)
    assert torch.equal(model.decoder.predefined_curvature, native.decoder.predefined_curvature)
