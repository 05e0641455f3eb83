"""The causal Gram: no token's logits depend on a later one, and a cache changes nothing.

Exactness is judged against a recomputation without a cache in fp32 at 1e-5 and in fp64 at 1e-10, and against the
definition written out.
"""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, StaticCache

from pldr_train.dag import DagCoefficients, dag_loss
from pldr_train.model import PldrllmForCausalLM
from pldr_train.model.causal_gram import plan_chunks
from pldr_train.model.rotary import rotary_cos_sin, rotate
from tests.unit.model_cases import small_config, small_model, token_ids

LENGTH = 13
CHUNKS = pytest.mark.parametrize("chunk", [1, 3, 4, 13, 20])


PRECISIONS = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


@torch.no_grad()
def causal_model(chunk: int, dtype: torch.dtype = torch.float32) -> PldrllmForCausalLM:
    """A model whose exponents are as small as a model of 64 wide heads initialises them.

    In a freshly initialised model the zero Gram of the first chunk makes A_LM 1e-9, and 1e-9 ** P with the exponents of
    heads 8 wide is in the thousands: rounding in fp32 would drown what is tested here.
    """
    model = small_model(gram_chunk_size=chunk).to(dtype)
    for layer in model.decoder.layers:
        layer.attention.power_law.power_exponent.mul_(0.1)
    return model


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE[expected.dtype])


def steps_with_cache(model: PldrllmForCausalLM, ids: Tensor, pieces: list[int], cache: object, mask: Tensor) -> Tensor:
    """Logits (B, S, V) of ids fed in pieces through a cache."""
    logits, start = [], 0
    for length in pieces:
        stop = start + length
        outputs = model(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache, use_cache=True)
        logits.append(outputs.logits)
        start = stop
    assert start == ids.shape[1]
    return torch.cat(logits, dim=1)


@CHUNKS
@torch.no_grad()
def test_g_follows_the_definition(chunk: int) -> None:
    model, ids = causal_model(chunk, torch.float64), token_ids(2, LENGTH)
    outputs = model(ids, output_deductive_outputs=True, output_hidden_states=True)
    rotary = rotary_cos_sin(torch.arange(LENGTH)[None], 8, 10000.0, True)
    for index, layer in enumerate(outputs.deductive_outputs):
        attention = model.decoder.layers[index].attention
        query = attention.query(outputs.hidden_states[index]).view(2, LENGTH, 2, 8).transpose(1, 2)
        query = rotate(query, *rotary, interleaved=True)
        for number in range(-(-LENGTH // chunk)):
            before = query[:, :, : number * chunk]
            gram = torch.zeros(2, 2, 8, 8, dtype=torch.double) + before.transpose(-1, -2) @ before
            expected = attention.power_law(attention.metric_learner(gram))
            torch.testing.assert_close(layer.curvature[:, number], expected.curvature, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(layer.metric[:, number], expected.metric, rtol=1e-9, atol=1e-12)


@PRECISIONS
@CHUNKS
@torch.no_grad()
def test_changing_every_suffix_changes_no_earlier_logits(chunk: int, dtype: torch.dtype) -> None:
    model, ids = causal_model(chunk, dtype), token_ids(2, LENGTH)
    reference = model(ids).logits
    for start in range(1, LENGTH):
        changed = ids.clone()
        changed[:, start:] = token_ids(2, LENGTH - start, seed=start + 7)
        assert not torch.equal(changed, ids)
        logits = model(changed).logits
        assert_same(logits[:, :start], reference[:, :start])
        prefix = model(ids[:, :start]).logits
        assert_same(prefix, reference[:, :start])


@torch.no_grad()
def test_with_the_whole_sequence_gram_earlier_logits_do_change() -> None:
    model, ids = small_model(), token_ids(2, LENGTH)
    changed = torch.cat((ids[:, :-1], (ids[:, -1:] + 1) % 40), dim=1)
    difference = (model(ids).logits - model(changed).logits)[:, :-1].abs().max()
    assert float(difference) > 1e-3


@PRECISIONS
@CHUNKS
@pytest.mark.parametrize("pieces", [[LENGTH], [1] * LENGTH, [5] + [1] * 8, [2, 7, 1, 3], [4, 4, 4, 1]])
@pytest.mark.parametrize("kind", ["dynamic", "lazy", "static"])
@torch.no_grad()
def test_a_cache_gives_what_recomputation_gives(chunk: int, pieces: list[int], kind: str, dtype: torch.dtype) -> None:
    model, ids = causal_model(chunk, dtype), token_ids(2, LENGTH)
    caches = {
        "dynamic": lambda: DynamicCache(config=model.config),
        "lazy": DynamicCache,
        "static": lambda: StaticCache(config=model.config, max_cache_len=LENGTH + 4),
    }
    logits = steps_with_cache(model, ids, pieces, caches[kind](), torch.ones_like(ids))
    assert_same(logits, model(ids).logits)


@PRECISIONS
@CHUNKS
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_changes_nothing_with_or_without_a_cache(chunk: int, side: str, dtype: torch.dtype) -> None:
    model, ids = causal_model(chunk, dtype), token_ids(3, LENGTH)
    lengths = [LENGTH, 6, 9]
    batch, mask = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        columns = slice(LENGTH - length, LENGTH) if side == "left" else slice(0, length)
        batch[row, columns], mask[row, columns] = ids[row, :length], 1
    for pieces in ([LENGTH], [4, 1, 1, 5, 1, 1], [1] * LENGTH):
        for cache in (DynamicCache(), StaticCache(config=model.config, max_cache_len=LENGTH + 2)):
            logits = steps_with_cache(model, batch, pieces, cache, mask)
            for row, length in enumerate(lengths):
                alone = model(ids[row : row + 1, :length]).logits[0]
                assert_same(logits[row][mask[row].bool()], alone)


@PRECISIONS
@CHUNKS
@torch.no_grad()
def test_cropping_and_reordering_keep_the_gram_right(chunk: int, dtype: torch.dtype) -> None:
    model, ids = causal_model(chunk, dtype), token_ids(3, LENGTH)
    other = token_ids(3, LENGTH, seed=9)
    order = torch.tensor([2, 0, 0])
    for kept in range(LENGTH):
        cache = DynamicCache(config=model.config)
        model(ids, past_key_values=cache, use_cache=True)
        if kept < LENGTH:
            cache.crop(kept - LENGTH)
        if kept > 0:
            cache.reorder_cache(order)
        expected_ids = torch.cat((ids[order, :kept] if kept else ids[:, :0], other[:, kept:]), dim=1)
        logits = [
            model(expected_ids[:, place : place + 1], past_key_values=cache, use_cache=True).logits
            for place in range(kept, LENGTH)
        ]
        expected = model(expected_ids).logits[:, kept:]
        assert_same(torch.cat(logits, dim=1), expected)


@pytest.mark.parametrize("chunk", [3, 4])
def test_generation_with_and_without_a_cache_agrees(chunk: int) -> None:
    model, ids = causal_model(chunk), token_ids(2, 6)
    mask = torch.ones_like(ids)
    ids[1, :2], mask[1, :2] = 0, 0
    options = {"attention_mask": mask, "max_new_tokens": 12, "eos_token_id": -1, "output_logits": True}
    reference = model.generate(ids, use_cache=False, do_sample=False, return_dict_in_generate=True, **options)
    for implementation in ("dynamic", "static"):
        cached = model.generate(
            ids, do_sample=False, return_dict_in_generate=True, cache_implementation=implementation, **options
        )
        assert torch.equal(cached.sequences, reference.sequences)
        assert_same(torch.stack(cached.logits), torch.stack(reference.logits))
    beams = {"num_beams": 3, "do_sample": False} | options
    beams.pop("output_logits")
    assert torch.equal(model.generate(ids, **beams), model.generate(ids, use_cache=False, **beams))


@PRECISIONS
def test_block_and_sequential_likelihoods_are_equal(dtype: torch.dtype) -> None:
    model, ids = causal_model(4, dtype), token_ids(2, LENGTH)
    with torch.no_grad():
        block = model(ids).logits.log_softmax(-1)
        for place in range(LENGTH):
            sequential = model(ids[:, : place + 1]).logits[:, -1].log_softmax(-1)
            assert_same(block[:, place], sequential)


@pytest.mark.parametrize("padded", [False, True])
def test_gradients_agree_with_finite_differences_of_the_loss(padded: bool) -> None:
    model, ids = causal_model(4, torch.float64), token_ids(2, 10)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :3] = 0

    def loss() -> Tensor:
        outputs = model(ids, attention_mask=mask, output_deductive_outputs=True)
        # Not the model's own loss, which is taken in fp32.
        cross_entropy = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        return cross_entropy + dag_loss(outputs.deductive_outputs, DagCoefficients(0.01, 0.01, 0.01)).total

    loss().backward()
    weight = model.decoder.layers[0].attention.query.weight
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(3), dtype=torch.double)
    expected = float((weight.grad * direction).sum())
    step = 1e-6
    with torch.no_grad():
        weight.add_(step * direction)
        above = loss()
        weight.sub_(2 * step * direction)
        below = loss()
    assert float(above - below) / (2 * step) == pytest.approx(expected, rel=1e-5)


def test_deductive_outputs_have_a_chunk_axis() -> None:
    outputs = causal_model(4)(token_ids(2, LENGTH), output_deductive_outputs=True, output_pldr_attentions=True)
    for layer, published in zip(outputs.deductive_outputs, outputs.pldr_attentions, strict=True):
        assert all(tensor.shape == (2, 4, 2, 8, 8) for tensor in layer.tensors())
        assert published[5] is layer.curvature


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"gram_chunk_size": 0}, r"gram_chunk_size=0 must be a positive integer"),
        ({"gram_chunk_size": 2.5}, r"gram_chunk_size=2.5 must be a positive integer"),
        ({"gram_chunk_size": 4, "custom_G_type": "identity"}, r"gram_chunk_size=4 has no effect with custom_G_type"),
        ({"gram_chunk_size": 4, "cache_first_G": True}, r"cache_first_G=True contradicts gram_chunk_size=4"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_config(**values)


def test_a_plan_moves_to_a_layers_device_with_all_its_tensors() -> None:
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    plan = plan_chunks(2, 2, 5, 0, mask, None, None, torch.device("cpu"))
    moved = plan.to(torch.device("meta"))
    for field in fields(plan):
        before, after = getattr(plan, field.name), getattr(moved, field.name)
        if isinstance(before, Tensor):
            assert after.is_meta
            assert after.shape == before.shape
        else:
            assert after == before
    assert plan.to(torch.device("cpu")) is plan
