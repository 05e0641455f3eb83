"""What transformers' common tests ask of generation: from embeddings, from a returned cache, without a prompt."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pldr_train.model import PldrllmForCausalLM
from tests.unit.every_model import AS_RECOMPUTED, EVERY_GRAM, greedy, make, run
from tests.unit.model_cases import VOCAB_SIZE, token_ids


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}, {"cache_implementation": "static"}])
@EVERY_GRAM
def test_generation_from_embeddings_gives_the_tokens_of_the_ids(gram: dict[str, Any], options: dict[str, Any]) -> None:
    model, ids = make(PldrllmForCausalLM, **gram), token_ids(2, 6)
    mask = torch.ones_like(ids)
    ids[1, :2], mask[1, :2] = 0, 0
    embeds = model.get_input_embeddings()(ids).detach()
    expected = greedy(model, ids, attention_mask=mask, **options)
    new = greedy(model, inputs_embeds=embeds, attention_mask=mask, **options)
    assert torch.equal(new, expected[:, 6:])
    both = greedy(model, ids, inputs_embeds=embeds, attention_mask=mask, **options)
    assert torch.equal(both, expected)


@EVERY_GRAM
def test_generation_goes_on_from_the_cache_it_returned(gram: dict[str, Any]) -> None:
    model, ids = make(PldrllmForCausalLM, **gram), token_ids(2, 6)
    mask = torch.ones_like(ids)
    ids[1, :2], mask[1, :2] = 0, 0
    expected = greedy(model, ids, attention_mask=mask)
    first = greedy(model, ids, attention_mask=mask, max_new_tokens=3, return_dict_in_generate=True)
    longer = torch.cat((mask, torch.ones_like(ids[:, :3])), dim=1)
    rest = greedy(
        model, first.sequences, attention_mask=longer, max_new_tokens=5, past_key_values=first.past_key_values
    )
    assert torch.equal(rest, expected)


@AS_RECOMPUTED
def test_a_cropped_cache_goes_on_as_if_the_dropped_tokens_had_never_been(gram: dict[str, Any]) -> None:
    model, ids, other = make(PldrllmForCausalLM, **gram), token_ids(2, 9), token_ids(2, 5, seed=4)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        cache.crop(-4)
        following = model(other, past_key_values=cache, use_cache=True).logits
    expected = run(model, torch.cat((ids[:, :5], other), dim=1))
    torch.testing.assert_close(following, expected[:, 5:], rtol=0, atol=1e-5)


@EVERY_GRAM
def test_generation_returns_what_each_pass_returns(gram: dict[str, Any]) -> None:
    model, ids = make(PldrllmForCausalLM, **gram), token_ids(2, 6)
    wanted = {f"output_{name}": True for name in ("scores", "logits", "hidden_states", "attentions")}
    outputs = greedy(model, ids, max_new_tokens=3, return_dict_in_generate=True, **wanted)
    assert [tuple(logits.shape) for logits in outputs.logits] == [(2, VOCAB_SIZE)] * 3
    assert [tuple(states[-1].shape) for states in outputs.hidden_states] == [(2, 6, 16), (2, 1, 16), (2, 1, 16)]
    assert [tuple(weights[1].shape) for weights in outputs.attentions] == [(2, 2, 6, 6), (2, 2, 1, 7), (2, 2, 1, 8)]
    assert torch.equal(torch.stack([scores.argmax(-1) for scores in outputs.scores], 1), outputs.sequences[:, 6:])
    assert outputs.past_key_values.get_seq_length() == 8


@EVERY_GRAM
def test_generation_without_a_prompt_starts_at_the_start_token(gram: dict[str, Any]) -> None:
    model = make(PldrllmForCausalLM, **gram)
    assert torch.equal(greedy(model), greedy(model, torch.full((1, 1), model.config.bos_token_id)))
