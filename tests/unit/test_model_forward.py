"""The forward pass: attention backends, padding, what a position sees, precision, and the outputs asked for."""

from __future__ import annotations

import copy
from dataclasses import fields

import pytest
import torch
import torch.nn.functional as F

from pldr_train.model import DeductiveOutputs, PldrllmForCausalLM
from tests.unit.model_cases import small_model, token_ids

KINDS = pytest.mark.parametrize("kind", [None, "identity", "random"])
BACKENDS = pytest.mark.parametrize("attention", ["sdpa", "eager"])


def with_attention(model: PldrllmForCausalLM, attention: str) -> PldrllmForCausalLM:
    clone = copy.deepcopy(model)
    clone.set_attn_implementation(attention)
    return clone


@KINDS
def test_sdpa_and_eager_attention_agree(kind: str | None) -> None:
    # In fp64, where the power law has no last bits of the backends to amplify.
    model, ids = small_model(custom_G_type=kind).double(), token_ids(2, 11)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    for attention_mask in (None, mask):
        sdpa = with_attention(model, "sdpa")(ids, attention_mask=attention_mask).logits
        eager = with_attention(model, "eager")(ids, attention_mask=attention_mask).logits
        real = slice(None) if attention_mask is None else mask.bool()
        torch.testing.assert_close(sdpa[real], eager[real], rtol=0, atol=1e-10)


@KINDS
def test_sdpa_and_eager_attention_agree_in_fp32(kind: str | None) -> None:
    model, ids = small_model(custom_G_type=kind), token_ids(2, 11)
    sdpa, eager = (with_attention(model, attention)(ids).logits for attention in ("sdpa", "eager"))
    torch.testing.assert_close(sdpa, eager, rtol=0, atol=1e-5 if kind is not None else 1e-4)


def test_eager_attention_returns_causal_weights_that_sum_to_one() -> None:
    attentions = small_model(attention="eager")(token_ids(2, 6), output_attentions=True).attentions
    assert [tuple(weights.shape) for weights in attentions] == [(2, 2, 6, 6)] * 2
    for weights in attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 6))
        assert not weights.triu(1).any()


@KINDS
@BACKENDS
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_gives_each_sample_what_it_gives_alone(kind: str | None, attention: str, side: str) -> None:
    model = small_model(custom_G_type=kind, attention=attention)
    samples = [token_ids(1, length, seed=length) for length in (5, 9, 12)]
    pad = [(12 - ids.shape[1], 0) if side == "left" else (0, 12 - ids.shape[1]) for ids in samples]
    batch = torch.cat([F.pad(ids, amount) for ids, amount in zip(samples, pad, strict=True)])
    mask = torch.cat([F.pad(torch.ones_like(ids), amount) for ids, amount in zip(samples, pad, strict=True)])
    outputs = model(batch, attention_mask=mask, output_deductive_outputs=True)
    assert bool(outputs.logits.isfinite().all())
    for row, ids in enumerate(samples):
        alone = model(ids, output_deductive_outputs=True)
        torch.testing.assert_close(outputs.logits[row][mask[row].bool()], alone.logits[0], rtol=0, atol=1e-5)
        for together, single in zip(outputs.deductive_outputs, alone.deductive_outputs, strict=True):
            sample = row if kind is None else 0
            torch.testing.assert_close(together.curvature[sample], single.curvature[0], rtol=1e-4, atol=1e-5)


def test_learned_g_lets_earlier_positions_see_later_tokens() -> None:
    # The leakage of the architecture: the Gram matrix of the queries sums over the whole sequence.
    model, ids = small_model(), token_ids(1, 10)
    changed = ids.clone()
    changed[0, -1] = (ids[0, -1] - 4 + 1) % 30 + 4
    before, after = model(ids).logits[0], model(changed).logits[0]
    assert torch.equal(before[0], after[0])  # the first position attends to itself alone, whatever G is
    assert bool(((before[1:-1] - after[1:-1]).abs().amax(-1) > 1e-4).all())


@pytest.mark.parametrize("kind", ["identity", "random"])
def test_predefined_g_is_causal(kind: str) -> None:
    model, ids = small_model(custom_G_type=kind), token_ids(1, 10)
    changed = ids.clone()
    changed[0, -1] = (ids[0, -1] - 4 + 1) % 30 + 4
    before, after = model(ids).logits[0], model(changed).logits[0]
    torch.testing.assert_close(before[:-1], after[:-1], rtol=0, atol=1e-6)
    assert float((before[-1] - after[-1]).detach().abs().max()) > 1e-2


def test_deductive_outputs_are_returned_only_when_asked_for() -> None:
    model, ids = small_model(), token_ids(3, 7)
    assert model(ids).deductive_outputs is None
    layers = model(ids, output_deductive_outputs=True).deductive_outputs
    assert len(layers) == 2
    for layer in layers:
        assert isinstance(layer, DeductiveOutputs)
        assert {tuple(getattr(layer, field.name).shape) for field in fields(layer)} == {(3, 2, 8, 8)}


def test_hidden_states_run_from_the_embedding_to_the_last_layer() -> None:
    model, ids = small_model(), token_ids(2, 7)
    outputs = model(ids, output_hidden_states=True)
    assert len(outputs.hidden_states) == 1 + 2
    assert {tuple(states.shape) for states in outputs.hidden_states} == {(2, 7, 16)}
    assert torch.equal(model.lm_head(outputs.hidden_states[-1]), outputs.logits)
    embedded = model.decoder.embed_norm(model.decoder.embed_tokens(ids) * 16**0.5)
    assert torch.equal(outputs.hidden_states[0], embedded)


def test_labels_are_shifted_and_masked_ones_do_not_count() -> None:
    model, ids = small_model(), token_ids(2, 9)
    labels = ids.clone()
    labels[0, 4:6] = -100
    outputs = model(ids, labels=labels)
    predictions, targets = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    counted = targets != -100
    assert int(counted.sum()) == 14
    nll = -predictions.log_softmax(-1)[counted].gather(-1, targets[counted, None])
    torch.testing.assert_close(outputs.loss, nll.mean())
    torch.testing.assert_close(model(ids, labels=labels, num_items_in_batch=28).loss, nll.sum() / 28)


def test_logits_to_keep_gives_the_last_positions_alone() -> None:
    model, ids = small_model(), token_ids(2, 9)
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, model(ids).logits[:, -2:])


def test_embeddings_may_be_given_instead_of_ids() -> None:
    model, ids = small_model(), token_ids(2, 9)
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embeds).logits, model(ids).logits)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(ids, inputs_embeds=embeds)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()


def test_power_stage_stays_in_fp32_under_bf16_autocast() -> None:
    model, ids = small_model(), token_ids(2, 9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(ids, output_deductive_outputs=True)
    assert outputs.logits.dtype == torch.bfloat16
    for layer in outputs.deductive_outputs:
        assert layer.positive_metric.dtype == layer.potential.dtype == layer.curvature.dtype == torch.float32
        # Not merely a cast: the power of the fp32 metric is the fp32 potential.
    for layer, module in zip(outputs.deductive_outputs, model.decoder.layers, strict=True):
        expected = layer.positive_metric**module.attention.power_law.power_exponent
        torch.testing.assert_close(layer.potential, expected, rtol=1e-6, atol=0)
        assert not torch.equal(layer.potential, layer.potential.bfloat16().float())


def test_power_stage_stays_in_fp32_in_a_bf16_model() -> None:
    model = small_model().to(torch.bfloat16)
    outputs = model(token_ids(2, 9), output_deductive_outputs=True)
    assert outputs.logits.dtype == torch.bfloat16
    assert bool(outputs.logits.isfinite().all())
    for layer in outputs.deductive_outputs:
        assert layer.potential.dtype == layer.curvature.dtype == torch.float32
        assert not torch.equal(layer.potential, layer.potential.bfloat16().float())
