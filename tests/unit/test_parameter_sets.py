"""The named sets hold the parameters that the papers and the published names say."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pldr_train.building import empty_model
from pldr_train.model import PldrllmConfig
from pldr_train.model.published_layout import to_published
from pldr_train.parameter_sets import SETS, matches, unmatched
from tests.unit.model_cases import small_config

NAMES = [name for name, _ in empty_model(small_config()).named_parameters()]
NUM_LAYERS, NUM_UNITS, NUM_GLUS = 2, 2, 2


def members(*patterns: str) -> set[str]:
    return {name for name in NAMES if matches(name, patterns)}


def test_generator_and_body_are_the_monograph_s() -> None:
    published = to_published(dict(empty_model(small_config()).named_parameters()))
    assert len(published) == len(NAMES)
    for (theirs, _), name in zip(published.items(), NAMES, strict=True):
        is_generator = any(part in theirs for part in ("reslayerAs", "plgatt_layer", "layernormA"))
        assert matches(name, ["generator"]) == is_generator, name
        assert matches(name, ["body"]) != is_generator, name
        if "mha1.layernorm1" in theirs:
            assert matches(name, ["body"]), name


def test_the_sets_of_the_110m_model_have_their_exact_sizes() -> None:
    """The generator's size is the difference between the released models with learned and with predefined G."""
    sizes = {name: parameter.numel() for name, parameter in empty_model(PldrllmConfig(A_dff=170)).named_parameters()}

    def size(pattern: str) -> int:
        return sum(count for name, count in sizes.items() if matches(name, [pattern]))

    power_law = 5 * 5 * 14 * 64 * 64
    assert size("generator") == 109_689_362 - 105_606_482 - 5 * 2 * 64  # the Gram's LayerNorm is the body's
    assert size("generator") + size("body") == 109_689_362
    assert size("power_law") == power_law
    assert size("metric_learner") == size("generator") - power_law
    assert size("embedding") == 32_000 * 896
    assert size("output_head") == 32_000 * 897
    assert size("attention") == 5 * 4 * 897 * 896
    assert size("feed_forward") == 5 * (2 * 897 * 2389 + 2390 * 896)


def test_norms_and_biases_are_those_of_every_module() -> None:
    norms = members("norms")
    assert len(norms) == 2 * (1 + NUM_LAYERS * (3 + NUM_UNITS))
    assert {name.rpartition(".")[2] for name in norms} == {"weight", "bias"}
    assert "decoder.layers.1.attention.metric_learner.gram_norm.weight" in norms
    assert "decoder.layers.0.attention.metric_learner.residual_units.1.unit_norm.bias" in norms
    biases = members("biases")
    assert len(biases) == len(norms) // 2 + 1 + NUM_LAYERS * (4 + 3 + NUM_UNITS * NUM_GLUS * 3)
    assert not any("power_law" in name for name in biases)


def test_sets_of_modules_and_norms_and_the_head_cover_each_parameter_once() -> None:
    disjoint = ["metric_learner", "power_law", "embedding", "attention", "feed_forward", "output_head"]
    for name in NAMES:
        rest = matches(name, ["norms"]) and not matches(name, ["metric_learner"])
        assert sum(matches(name, [each]) for each in disjoint) + rest == 1, name


def test_patterns_are_over_whole_names_and_match_dots() -> None:
    assert members("*.value.weight") == {f"decoder.layers.{i}.attention.value.weight" for i in range(NUM_LAYERS)}
    assert members("decoder.layers.0.*", "lm_head.bias") == {
        name for name in NAMES if name.startswith("decoder.layers.0.") or name == "lm_head.bias"
    }
    assert members("value") == members() == set()
    assert members("*") == set(NAMES)


def test_patterns_that_match_nothing_are_listed() -> None:
    assert unmatched(NAMES, ["*.values.*", "generator", "Body"]) == ["*.values.*", "Body"]
    predefined = [name for name, _ in empty_model(small_config(custom_G_type="identity")).named_parameters()]
    assert unmatched(predefined, list(SETS)) == ["generator", "metric_learner", "power_law"]


@pytest.mark.parametrize("name", SETS)
def test_each_set_says_what_it_holds_and_holds_something(name: str) -> None:
    assert SETS[name]
    assert members(name)


def test_the_module_imports_no_torch() -> None:
    code = "import sys, pldr_train.parameter_sets; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
