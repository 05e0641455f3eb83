"""Models with a predefined G: no metric learner, a constant in the checkpoint, nothing that runs unset."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from pldr_train.model import PldrllmForCausalLM
from pldr_train.model.published_layout import to_published
from pldr_train.model.rotary import rotary_cos_sin, rotate
from tests.oracle import Oracle, OracleSizes
from tests.unit.model_cases import small_config, small_model, token_ids


@pytest.mark.parametrize("reference_rope", [True, False])
@pytest.mark.parametrize("kind", ["identity", "random"])
def test_predefined_model_equals_the_literal_decoder_with_that_g(kind: str, reference_rope: bool) -> None:
    model, ids = small_model(custom_G_type=kind, reference_rope=reference_rope), token_ids(2, 11)
    curvature = torch.eye(8).expand(2, 2, 8, 8) if kind == "identity" else model.decoder.predefined_curvature
    oracle = Oracle(OracleSizes(2, 2, 8, 40, reference_rope=reference_rope, curvature=curvature))
    weights = {name: tensor for name, tensor in to_published(model.state_dict()).items() if "past_G" not in name}
    oracle.load_state_dict(weights)
    torch.testing.assert_close(model(ids).logits, oracle(ids).logits, rtol=0, atol=1e-5)


def test_multiplying_by_the_identity_is_left_out_without_a_trace() -> None:
    identity, ids = small_model(custom_G_type="identity"), token_ids(2, 11)
    external = PldrllmForCausalLM(small_config(custom_G_type="external")).eval()
    external.load_state_dict(identity.state_dict())
    assert torch.equal(identity(ids).logits, external(ids).logits)


@pytest.mark.parametrize("reference_rope", [True, False])
@torch.no_grad()
def test_identity_is_a_plain_decoder_with_scaled_dot_product_attention(reference_rope: bool) -> None:
    """The decoder without a word of G, on torch's own attention and layers."""
    model, ids = small_model(custom_G_type="identity", reference_rope=reference_rope), token_ids(2, 11)
    decoder = model.decoder
    rotary = rotary_cos_sin(torch.arange(11)[None], 8, 10000.0, reference_rope)
    x = decoder.embed_norm(decoder.embed_tokens(ids) * 16**0.5)
    for layer in decoder.layers:
        projections = (layer.attention.query, layer.attention.key, layer.attention.value)
        query, key, value = (project(x).view(2, 11, 2, 8).transpose(1, 2) for project in projections)
        query, key = (rotate(each, *rotary, interleaved=reference_rope) for each in (query, key))
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = layer.attention_norm(layer.attention.output(mixed.transpose(1, 2).flatten(2)) + x)
        x = layer.feed_forward_norm(layer.feed_forward(x) + x)
    torch.testing.assert_close(model(ids).logits, model.lm_head(x), rtol=0, atol=1e-6)


def test_a_random_g_is_uniform_or_standard_normal() -> None:
    sizes = {"hidden_size": 128, "head_dim": 64, "custom_G_type": "random"}
    uniform = small_model(**sizes).decoder.predefined_curvature
    assert (float(uniform.min()), float(uniform.max())) == pytest.approx((0, 1), abs=0.01)
    assert float(uniform.mean()) == pytest.approx(0.5, abs=0.02)
    normal = small_model(**sizes, random_distribution="normal").decoder.predefined_curvature
    assert float(normal.mean()) == pytest.approx(0, abs=0.05)
    assert float(normal.std()) == pytest.approx(1, abs=0.05)
    assert float(normal.min()) < -3


def test_predefined_model_has_no_metric_learner() -> None:
    names = [name for name, _ in small_model(custom_G_type="random").named_parameters()]
    assert len(names) == 5 + 2 * 18
    assert not [name for name in names if "metric_learner" in name or "power_law" in name]


@pytest.mark.parametrize("kind", ["identity", "random"])
def test_deductive_outputs_hold_the_constant_alone(kind: str) -> None:
    model = small_model(custom_G_type=kind)
    layers = model(token_ids(3, 7), output_deductive_outputs=True).deductive_outputs
    assert len(layers) == 2
    for index, layer in enumerate(layers):
        assert layer.metric is None
        assert layer.positive_metric is None
        assert layer.potential is None
        assert layer.curvature.shape == (1, 2, 8, 8)
        assert torch.equal(layer.curvature[0], model.decoder.predefined_curvature[index])


def test_random_g_is_uniform_differs_by_layer_and_follows_the_seed() -> None:
    curvature = small_model(seed=3, custom_G_type="random").decoder.predefined_curvature
    assert bool(((curvature >= 0) & (curvature < 1)).all())
    assert 0.4 < float(curvature.mean()) < 0.6
    assert not torch.equal(curvature[0], curvature[1])
    assert torch.equal(curvature, small_model(seed=3, custom_G_type="random").decoder.predefined_curvature)
    assert not torch.equal(curvature, small_model(seed=4, custom_G_type="random").decoder.predefined_curvature)


def test_external_g_is_refused_until_set_and_is_kept_by_the_checkpoint(tmp_path: Path) -> None:
    model, ids = small_model(custom_G_type="external"), token_ids(2, 9)
    assert bool(model.decoder.predefined_curvature.isnan().all())
    assert not model.decoder.predefined_is_set.any()
    with pytest.raises(ValueError, match=r"custom_G_type='external'.*set_predefined_curvature"):
        model(ids)

    curvature = torch.randn(2, 2, 8, 8)
    model.decoder.set_predefined_curvature(curvature)
    assert bool(model.decoder.predefined_is_set.all())
    assert bool(model(ids).logits.isfinite().all())
    model.save_pretrained(tmp_path)
    loaded = PldrllmForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.decoder.predefined_curvature, curvature)
    assert bool(loaded.decoder.predefined_is_set.all())
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("kind", "curvature", "message"),
    [
        (None, torch.zeros(2, 2, 8, 8), "learns G"),
        ("external", torch.zeros(2, 8, 8), r"\(2, 8, 8\).*\(2, 2, 8, 8\)"),
        ("external", torch.zeros(1, 2, 8, 8), r"\(1, 2, 8, 8\).*\(2, 2, 8, 8\)"),
        ("external", torch.full((2, 2, 8, 8), torch.inf), "not finite"),
        ("external", torch.full((2, 2, 8, 8), torch.nan), "not finite"),
    ],
)
def test_a_g_that_does_not_fit_is_refused(kind: str | None, curvature: torch.Tensor, message: str) -> None:
    model = small_model(custom_G_type=kind)
    with pytest.raises(ValueError, match=message):
        model.decoder.set_predefined_curvature(curvature)
    if kind == "external":
        assert bool(model.decoder.predefined_curvature.isnan().all())
