"""Generation with K, V and G cached: every way to decode, every cache, and nothing shared between generations."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Cache, CompileConfig, DynamicCache, StaticCache
from transformers.cache_utils import DynamicSlidingWindowLayer
from transformers.generation.streamers import BaseStreamer

from pldr_train.model import (
    PldrllmDynamicCache,
    PldrllmForCausalLM,
    PldrllmStaticCache,
    cached_curvature,
)
from tests.unit.model_cases import small_config, small_model, token_ids

NEW_TOKENS = 10
KINDS = pytest.mark.parametrize("kind", [None, "identity", "random"], ids=["learned", "identity", "random"])


def never_ending(kind: str | None = None, **overrides: Any) -> PldrllmForCausalLM:
    """A model whose generation no token ends."""
    model = small_model(custom_G_type=kind, **overrides)
    model.generation_config.eos_token_id = None
    return model


def padded_prompts() -> tuple[Tensor, Tensor]:
    """Two prompts, 6 and 4 tokens long, padded on the left, and their mask."""
    ids = token_ids(2, 6)
    mask = torch.ones_like(ids)
    ids[1, :2], mask[1, :2] = 0, 0
    return ids, mask


def greedy(model: PldrllmForCausalLM, ids: Tensor, **options: Any) -> Tensor:
    generated: Tensor = model.generate(ids, **({"max_new_tokens": NEW_TOKENS, "do_sample": False} | options))
    return generated


def with_g_of_prompt(model: PldrllmForCausalLM, prompt: Tensor) -> PldrllmForCausalLM:
    """The same weights with the G that the model learns from one prompt, as a constant."""
    outputs = model(prompt, output_deductive_outputs=True)
    constant = never_ending("external")
    constant.load_state_dict(model.state_dict(), strict=False)
    constant.decoder.set_predefined_curvature(torch.cat([layer.curvature for layer in outputs.deductive_outputs]))
    return constant


@torch.no_grad()
def test_generation_uses_the_g_of_the_prompt_throughout() -> None:
    model, prompt = never_ending(), token_ids(1, 6)
    constant = with_g_of_prompt(model, prompt)
    expected = greedy(constant, prompt, use_cache=False)
    assert torch.equal(greedy(model, prompt), expected)
    # Without a cache G is learned anew at each step, which is another computation.
    assert not torch.equal(greedy(model, prompt, use_cache=False), expected)


@torch.no_grad()
def test_beams_are_reordered_with_their_cache() -> None:
    model, prompt = never_ending(), token_ids(1, 6)
    options = {"num_beams": 4, "num_return_sequences": 3, "output_scores": True, "return_dict_in_generate": True}
    expected = greedy(with_g_of_prompt(model, prompt), prompt, use_cache=False, **options)
    cached = greedy(model, prompt, **options)
    assert torch.equal(cached.sequences, expected.sequences)
    torch.testing.assert_close(cached.sequences_scores, expected.sequences_scores, rtol=1e-5, atol=1e-5)


@KINDS
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}])
@pytest.mark.parametrize("implementation", ["dynamic", "static"])
def test_padded_prompts_give_what_they_give_alone(
    kind: str | None, options: dict[str, Any], implementation: str
) -> None:
    model, (ids, mask) = never_ending(kind), padded_prompts()
    batch = greedy(model, ids, attention_mask=mask, cache_implementation=implementation, **options)
    returned = options.get("num_return_sequences", 1)
    for row in range(2):
        prompt = ids[row][mask[row].bool()][None]
        alone = greedy(model, prompt, **options)
        new = batch[row * returned : (row + 1) * returned, ids.shape[1] :]
        assert torch.equal(new, alone[:, prompt.shape[1] :])


@KINDS
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_changes_no_cached_logits(kind: str | None, side: str) -> None:
    model, ids = never_ending(kind), token_ids(2, 9)
    lengths = (9, 6)
    batch, mask = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        columns = slice(9 - length, 9) if side == "left" else slice(0, length)
        batch[row, columns], mask[row, columns] = ids[row, :length], 1
    for cache in (PldrllmDynamicCache(model.config), PldrllmStaticCache(model.config, max_cache_len=12)):
        first = model(batch, attention_mask=mask, past_key_values=cache, use_cache=True)
        longer = torch.cat((mask, torch.ones_like(mask[:, :2])), dim=1)
        more = token_ids(2, 2, seed=5)
        second = model(more, attention_mask=longer, past_key_values=cache, use_cache=True)
        for row, length in enumerate(lengths):
            alone = model(ids[row : row + 1, :length], use_cache=True)
            assert_logits(first.logits[row][mask[row].bool()], alone.logits[0])
            following = model(more[row : row + 1], past_key_values=alone.past_key_values, use_cache=True)
            assert_logits(second.logits[row], following.logits[0])


def assert_logits(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


@KINDS
def test_assisted_generation_gives_the_greedy_tokens(kind: str | None) -> None:
    model, prompt = never_ending(kind), token_ids(1, 6)
    expected = greedy(model, prompt)
    assistant = small_model(seed=4)
    assistant.generation_config.eos_token_id = None
    for options in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": assistant}, {"assistant_model": model}):
        assert torch.equal(greedy(model, prompt, **options), expected)


def test_assisted_generation_with_a_causal_gram_gives_the_greedy_tokens() -> None:
    model, prompt = never_ending(gram_chunk_size=4), token_ids(1, 6)
    assert torch.equal(greedy(model, prompt, prompt_lookup_num_tokens=3), greedy(model, prompt, use_cache=False))


@KINDS
@pytest.mark.slow
def test_compiled_decoding_with_a_static_cache_gives_the_same_tokens(kind: str | None) -> None:
    model, (ids, mask) = never_ending(kind), padded_prompts()
    compile_config = CompileConfig(fullgraph=True, mode="default")
    compile_config._compile_all_devices = True  # without it transformers compiles on accelerators only
    static = {"cache_implementation": "static", "compile_config": compile_config}
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert torch.equal(greedy(model, ids, attention_mask=mask, **static), greedy(model, ids, attention_mask=mask))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    other = token_ids(2, 6, seed=8)
    assert torch.equal(greedy(model, other, **static), greedy(model, other))


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_pass_with_a_causal_gram_gives_the_same_logits() -> None:
    model, ids = never_ending(gram_chunk_size=3).double(), token_ids(2, 10)
    cache = PldrllmStaticCache(model.config, max_cache_len=12)
    logits = [model(ids[:, :4], past_key_values=cache, use_cache=True).logits]
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    for place in range(4, 10):
        logits.append(compiled(ids[:, place : place + 1], past_key_values=cache, use_cache=True).logits)
    # Rotary angles are fp32 in any precision, and compiled code rounds them differently.
    assert_logits(torch.cat(logits, dim=1), model(ids, use_cache=False).logits)


@KINDS
@torch.no_grad()
def test_a_static_cache_serves_another_prompt_after_a_reset(kind: str | None) -> None:
    model = never_ending(kind)
    cache = PldrllmStaticCache(model.config, max_cache_len=20)
    for seed in (1, 2):
        prompt = token_ids(2, 6, seed=seed)
        assert torch.equal(greedy(model, prompt, past_key_values=cache), greedy(model, prompt))
        cache.reset()
        assert cached_curvature(cache) is None


def test_sampling_with_a_seed_repeats_itself_with_every_cache() -> None:
    model, (ids, mask) = never_ending(), padded_prompts()
    options = {"do_sample": True, "top_p": 0.9, "top_k": 0, "temperature": 1.3, "num_return_sequences": 3}
    samples = []
    for implementation in (None, "dynamic", "static"):
        torch.manual_seed(3)
        samples.append(greedy(model, ids, attention_mask=mask, cache_implementation=implementation, **options))
    assert samples[0].shape == (6, 16)
    assert len({tuple(row.tolist()) for row in samples[0]}) == 6
    assert torch.equal(samples[0], samples[1])
    assert torch.equal(samples[0], samples[2])


def test_tokens_are_streamed_as_they_come() -> None:
    class Collector(BaseStreamer):
        def __init__(self) -> None:
            self.pieces: list[Tensor] = []
            self.ended = False

        def put(self, value: Tensor) -> None:
            self.pieces.append(value)

        def end(self) -> None:
            self.ended = True

    model, prompt, streamer = never_ending(), token_ids(1, 6), Collector()
    generated = greedy(model, prompt, streamer=streamer)
    assert streamer.ended
    assert len(streamer.pieces) == 1 + NEW_TOKENS
    assert torch.cat([piece.flatten() for piece in streamer.pieces]).tolist() == generated[0].tolist()


def tokens_step_by_step(model: PldrllmForCausalLM, prompt: Tensor) -> Any:
    """A generator that yields one greedy token at a time."""
    cache, ids = DynamicCache(), prompt
    for _ in range(NEW_TOKENS):
        with torch.no_grad():
            logits = model(ids, past_key_values=cache, use_cache=True).logits[:, -1]
        ids = logits.argmax(-1, keepdim=True)
        yield ids


def test_interleaved_generations_give_what_they_give_alone() -> None:
    model, prompts = never_ending(), [token_ids(1, 6), token_ids(1, 5, seed=2), token_ids(1, 7, seed=3)]
    expected = [greedy(model, prompt)[:, prompt.shape[1] :] for prompt in prompts]
    steps = zip(*(tokens_step_by_step(model, prompt) for prompt in prompts), strict=True)
    interleaved = [torch.cat(tokens, dim=1) for tokens in zip(*steps, strict=True)]
    for tokens, alone in zip(interleaved, expected, strict=True):
        assert torch.equal(tokens, alone)


@KINDS
def test_generations_in_two_threads_give_what_they_give_alone(kind: str | None) -> None:
    model = never_ending(kind)
    prompts = [token_ids(2, length, seed=length) for length in (5, 7, 5, 7)]
    expected = [greedy(model, prompt, max_new_tokens=40) for prompt in prompts]
    results: dict[tuple[int, int], Tensor] = {}
    both = threading.Barrier(2)

    def work(thread: int) -> None:
        both.wait()
        for index in range(thread, 4, 2):
            results[thread, index] = greedy(model, prompts[index], max_new_tokens=40)

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    for (_, index), tokens in results.items():
        assert torch.equal(tokens, expected[index])


@torch.no_grad()
def test_cache_first_g_keeps_the_first_samples_g_for_all() -> None:
    ids, more = token_ids(3, 6), token_ids(3, 1, seed=7)
    model, first_only = never_ending(), never_ending(cache_first_G=True)
    own, shared = model(ids, use_cache=True), first_only(ids, use_cache=True)
    # The first pass itself uses each sample's own G.
    torch.testing.assert_close(shared.logits, own.logits, rtol=0, atol=0)
    curvature = cached_curvature(shared.past_key_values)
    assert curvature.shape == (2, 1, 2, 8, 8)
    torch.testing.assert_close(curvature, cached_curvature(own.past_key_values)[:, :1], rtol=0, atol=0)

    logits = first_only(more, past_key_values=shared.past_key_values, use_cache=True).logits
    for layer in own.past_key_values.layers:
        layer.hold(layer.deductive.map(lambda tensor: tensor[:1].expand(3, -1, -1, -1)))
    expected = model(more, past_key_values=own.past_key_values, use_cache=True).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)
    without = model(more, past_key_values=model(ids, use_cache=True).past_key_values, use_cache=True).logits
    assert float((without[1:] - logits[1:]).abs().max()) > 1e-3

    beams = greedy(first_only, ids, num_beams=3)
    assert torch.equal(beams[:1], greedy(model, ids[:1], num_beams=3))


@torch.no_grad()
def test_cache_first_g_is_an_argument_too() -> None:
    ids = token_ids(3, 6)
    model, configured = never_ending(), never_ending(cache_first_G=True)
    shared = model(ids, use_cache=True, cache_first_G=True).past_key_values
    assert cached_curvature(shared).shape == (2, 1, 2, 8, 8)
    own = configured(ids, use_cache=True, cache_first_G=False).past_key_values
    assert cached_curvature(own).shape == (2, 3, 2, 8, 8)
    # In every way of generating: it decides the cached passes, so the rows after the first change.
    ways: list[dict[str, Any]] = [
        {},
        {"num_beams": 2},
        {"cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 2},
    ]
    for way in ways:
        batch = ids[:1] if "prompt_lookup_num_tokens" in way else ids
        assert torch.equal(greedy(model, batch, cache_first_G=True, **way), greedy(configured, batch, **way)), way
    assert not torch.equal(greedy(model, ids, cache_first_G=True), greedy(model, ids))
    causal = never_ending(gram_chunk_size=4)
    with pytest.raises(ValueError, match="cache_first_G=True contradicts gram_chunk_size=4"):
        causal(ids, use_cache=True, cache_first_G=True)


@torch.no_grad()
def test_repeating_and_selecting_samples_takes_g_along() -> None:
    model, (ids, mask) = never_ending(), padded_prompts()
    cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
    cache.batch_repeat_interleave(3)
    assert cached_curvature(cache).shape[1] == 6
    cache.batch_select_indices(torch.tensor([4, 1]))
    more = token_ids(2, 1, seed=7)
    longer = torch.cat((mask[[1, 0]], torch.ones_like(more)), dim=1)
    logits = model(more, attention_mask=longer, past_key_values=cache, use_cache=True).logits
    for row, sample in enumerate((1, 0)):
        prompt = ids[sample][mask[sample].bool()][None]
        alone = model(prompt, use_cache=True).past_key_values
        assert_logits(logits[row], model(more[row : row + 1], past_key_values=alone, use_cache=True).logits[0])


@torch.no_grad()
def test_cropping_keeps_g_until_nothing_is_left() -> None:
    model, ids = never_ending(), token_ids(2, 6)
    cache = model(ids, use_cache=True).past_key_values
    curvature = cached_curvature(cache)
    expected = model(ids[:, 4:], past_key_values=cropped(model, ids, 2), use_cache=True).logits
    model(token_ids(2, 3, seed=9), past_key_values=cache, use_cache=True)
    cache.crop(-5)
    assert torch.equal(cached_curvature(cache), curvature)
    assert_logits(model(ids[:, 4:], past_key_values=cache, use_cache=True).logits, expected)
    cache.crop(-6)
    assert cache.get_seq_length() == 0
    assert cached_curvature(cache) is None
    other = token_ids(2, 4, seed=3)
    assert_logits(model(other, past_key_values=cache, use_cache=True).logits, model(other).logits)


def cropped(model: PldrllmForCausalLM, ids: Tensor, tokens: int) -> Cache:
    cache: Cache = model(ids, use_cache=True).past_key_values
    cache.crop(-tokens)
    return cache


@torch.no_grad()
def test_predefined_g_is_cached_with_any_cache_and_changes_nothing() -> None:
    for kind in ("identity", "random"):
        model, ids = never_ending(kind), token_ids(2, 6)
        for cache in (DynamicCache(), StaticCache(config=model.config, max_cache_len=9), None):
            first = model(ids[:, :4], past_key_values=cache, use_cache=True)
            second = model(ids[:, 4:], past_key_values=first.past_key_values, use_cache=True)
            expected = model(ids, use_cache=False)
            assert expected.past_key_values is None
            assert_logits(torch.cat((first.logits, second.logits), dim=1), expected.logits)


def test_generation_ends_where_the_context_ends() -> None:
    model = never_ending(max_position_embeddings=12)
    assert greedy(model, token_ids(1, 6), max_new_tokens=50).shape == (1, 12)
    assert greedy(model, token_ids(1, 6), max_length=40).shape == (1, 12)
    embeds = model.get_input_embeddings()(token_ids(1, 6))
    assert model.generate(inputs_embeds=embeds, max_new_tokens=50).shape == (1, 6)
    assert model.generate(inputs_embeds=embeds, max_new_tokens=3).shape == (1, 3)


@torch.no_grad()
def test_bad_input_is_one_clear_error() -> None:
    model, ids = never_ending(max_position_embeddings=12), token_ids(1, 6)
    with pytest.raises(ValueError, match=r"prompt has 14 tokens.*max_position_embeddings=12; shorten it to at most 11"):
        greedy(model, token_ids(1, 14))
    with pytest.raises(ValueError, match=r"14 positions are more than this model's context of .*=12"):
        model(token_ids(1, 14))
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"7 positions after 6 cached ones are more than"):
        model(token_ids(1, 7), past_key_values=cache)
    with pytest.raises(ValueError, match=r"attention_mask covers 1 positions.*6 cached ones and the 1 new"):
        model(ids[:, :1], attention_mask=torch.ones(1, 1), past_key_values=cache)
    with pytest.raises(ValueError, match=r"input_ids hold 40 .*vocabulary has 40 tokens; use the tokenizer that"):
        model(torch.tensor([[5, 40]]))
    with pytest.raises(ValueError, match=r"prefill_chunk_size=2: this model learns G from the whole prompt"):
        greedy(model, ids, prefill_chunk_size=2)

    foreign = DynamicCache()
    small_model(custom_G_type="identity")(ids, past_key_values=foreign, use_cache=True)
    with pytest.raises(ValueError, match=r"holds keys and values but no G"):
        model(ids[:, :1], past_key_values=foreign)
    sliding = Cache(layers=[DynamicSlidingWindowLayer(sliding_window=4) for _ in range(2)])
    with pytest.raises(ValueError, match=r"cache of DynamicSlidingWindowLayer cannot hold G"):
        model(ids, past_key_values=sliding)


def test_long_prompts_in_pieces_are_fine_where_g_does_not_need_them_whole() -> None:
    prompt = token_ids(1, 9)
    for model in (never_ending("random"), never_ending(gram_chunk_size=4)):
        assert torch.equal(greedy(model, prompt, prefill_chunk_size=4), greedy(model, prompt))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@KINDS
@torch.no_grad()
def test_published_attention_tuples(kind: str | None, attention: str) -> None:
    model, (ids, mask) = never_ending(kind, attention=attention), padded_prompts()
    flagged = never_ending(kind, attention=attention, output_pldr_attentions=True)
    outputs = model(
        ids, attention_mask=mask, output_pldr_attentions=True, output_deductive_outputs=True, output_attentions=True
    )
    assert len(outputs.pldr_attentions) == len(outputs.attentions) == 2
    assert model(ids, attention_mask=mask).pldr_attentions is None
    for index, published in enumerate(outputs.pldr_attentions):
        metric, positive_metric, exponent, coupling, coupling_bias, curvature, weights = published
        layer, attention_module = outputs.deductive_outputs[index], model.decoder.layers[index].attention
        if kind is None:
            power = attention_module.power_law
            assert metric is layer.metric
            assert positive_metric is layer.positive_metric
            assert exponent is power.power_exponent
            assert coupling is power.coupling
            assert coupling_bias is power.coupling_bias
            torch.testing.assert_close(
                coupling @ positive_metric**exponent + coupling_bias, curvature, rtol=1e-5, atol=1e-5
            )
        else:
            assert exponent is coupling is coupling_bias is None
            assert metric.shape == curvature.shape == (1, 2, 8, 8)
            assert torch.equal(curvature, layer.curvature)
        assert torch.equal(weights, outputs.attentions[index])
        real = weights[1, :, 2:, 2:]
        torch.testing.assert_close(real.sum(-1), torch.ones_like(real[..., 0]), rtol=0, atol=1e-5)
        assert float(real.triu(1).abs().max()) == 0
        torch.testing.assert_close(flagged(ids, attention_mask=mask).pldr_attentions[index][6], weights)


@torch.no_grad()
def test_attention_tuples_of_a_cached_step_hold_the_cached_g() -> None:
    model, ids = never_ending(), token_ids(2, 6)
    first = model(ids, use_cache=True, output_pldr_attentions=True)
    second = model(ids[:, :1], past_key_values=first.past_key_values, use_cache=True, output_pldr_attentions=True)
    for before, after in zip(first.pldr_attentions, second.pldr_attentions, strict=True):
        for place in (0, 1, 5):
            assert torch.equal(before[place], after[place])
        assert before[6].shape == (2, 2, 6, 6)
        assert after[6].shape == (2, 2, 1, 7)


def test_tuples_come_as_plain_tuples_too() -> None:
    model, ids = never_ending(), token_ids(2, 6)
    as_dict = model(ids, use_cache=False, output_hidden_states=True, output_pldr_attentions=True)
    as_tuple = model(ids, use_cache=False, output_hidden_states=True, output_pldr_attentions=True, return_dict=False)
    assert [type(item) for item in as_tuple] == [type(item) for item in as_dict.to_tuple()]
    assert small_config().use_cache is True
