"""Samples of a model in training: what the recipe's section `sample` decides of a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sentencepiece import SentencePieceProcessor

from pldr_train.model import PldrllmForCausalLM
from pldr_train.recipe import SampleSection
from pldr_train.training.sampling import sample_texts
from tests.tiny import VOCAB_SIZE
from tests.unit.model_cases import small_model

PROMPT, CONTEXT = "the metric", 32


@pytest.fixture(scope="module")
def tokenizer(tiny_data: Path) -> Any:
    return SentencePieceProcessor(model_file=str(tiny_data / "tokenizer.model"))


@pytest.fixture(scope="module")
def model() -> PldrllmForCausalLM:
    """Untrained, but sure enough of its next token that sampling is not uniform; what is cached changes no token."""
    made = small_model(vocab_size=VOCAB_SIZE + 50, max_position_embeddings=CONTEXT, custom_G_type="identity")
    with torch.no_grad():
        made.lm_head.weight.mul_(8.0)
    return made.train()


def sampled(model: PldrllmForCausalLM, tokenizer: Any, seed: int = 1, **section: Any) -> str:
    (text,) = sample_texts(model, tokenizer, SampleSection(prompts=(PROMPT,), **section), seed)
    return text


@torch.no_grad()
def greedy(model: PldrllmForCausalLM, tokenizer: Any, steps: int) -> str:
    """The likeliest token that stands for a text, step by step; up to the end of the document."""
    ids = tokenizer.encode(PROMPT)
    for _ in range(steps):
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1, : tokenizer.get_piece_size()]
        ids.append(int(logits.argmax()))
        if ids[-1] == tokenizer.eos_id():
            break
    return tokenizer.decode(ids)


@pytest.mark.parametrize("steps", [1, 6])
def test_temperature_0_takes_the_likeliest_token_so_many_times(
    model: PldrllmForCausalLM, tokenizer: Any, steps: int
) -> None:
    assert sampled(model, tokenizer, temperature=0, max_new_tokens=steps) == greedy(model, tokenizer, steps)


def test_a_text_ends_with_the_context(model: PldrllmForCausalLM, tokenizer: Any) -> None:
    room = CONTEXT - len(tokenizer.encode(PROMPT))
    assert sampled(model, tokenizer, temperature=0, max_new_tokens=500) == greedy(model, tokenizer, room)


def test_the_smallest_top_p_leaves_the_likeliest_token_and_the_largest_all(
    model: PldrllmForCausalLM, tokenizer: Any
) -> None:
    likeliest = greedy(model, tokenizer, 6)
    assert sampled(model, tokenizer, temperature=1.0, top_p=1e-6, max_new_tokens=6) == likeliest
    assert sampled(model, tokenizer, temperature=1.0, top_p=1.0, max_new_tokens=6) != likeliest


def test_a_low_temperature_comes_near_the_likeliest_token(model: PldrllmForCausalLM, tokenizer: Any) -> None:
    assert sampled(model, tokenizer, temperature=1e-4, top_p=1.0, max_new_tokens=6) == greedy(model, tokenizer, 6)


def test_the_seed_decides_the_text_and_nothing_else_is_touched(model: PldrllmForCausalLM, tokenizer: Any) -> None:
    before = torch.get_rng_state()
    first, again, other = (sampled(model, tokenizer, seed, top_p=1.0, max_new_tokens=8) for seed in (1, 1, 2))
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training


def test_an_empty_prompt_begins_as_a_document_does(model: PldrllmForCausalLM, tokenizer: Any) -> None:
    """After the END of the one before: rows hold no START."""
    given: list[list[int]] = []

    class Watched:
        config = model.config

        def __getattr__(self, name: str) -> Any:
            return getattr(model, name)

        def generate(self, ids: torch.Tensor, **options: Any) -> Any:
            given.extend(ids.tolist())
            return model.generate(ids, **options)

    (text,) = sample_texts(Watched(), tokenizer, SampleSection(prompts=("",), max_new_tokens=3), 1)  # type: ignore[arg-type]
    assert given == [[3]]
    assert isinstance(text, str)
