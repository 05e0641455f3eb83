"""Stochastic continuations without a cache, the same whatever batch a row stands in, and what the model learns of them.

The order parameter compares the deductive outputs after two such continuations of a prompt (arXiv 2603.23539).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pldr_train.data.tokenizer.pieces import PAD_ID
from pldr_train.metrics.deductive import OrderParameter
from pldr_train.model.power_law_attention import DeductiveOutputs

TOP_P = 0.8
"""Of the order parameter's continuations, the papers' value."""

RowPositions = Callable[[Tensor], Tensor]
"""(B, S) ids -> (B, S) position ids."""


def fit_to_chunks(prompt: int, new_tokens: int, chunk: int | None, context: int) -> tuple[int, int] | None:
    """Lengths of prompt and continuation that the order parameter can compare, or None if there are none.

    With a causal Gram a token enters G only when its chunk ends. So the continuation is made to end with a chunk, one
    more token than it must fit into the context, and the prompt holds at least one whole chunk.

    Args:
        prompt: tokens that there are to begin with.
        new_tokens: wanted, at most so many come out.
        chunk: of a causal Gram; None: no chunks.
        context: of the model.
    """
    if chunk is None:
        fitting = prompt, min(new_tokens, context - prompt)
    else:
        total = min(prompt + new_tokens, context - 1) // chunk * chunk
        new_tokens = min(new_tokens, total - chunk)
        fitting = total - new_tokens, new_tokens
    return fitting if 1 <= fitting[0] <= prompt and fitting[1] >= 1 else None


@torch.no_grad()
def continue_rows(
    model: Any,
    prompts: Tensor,
    new_tokens: int,
    seeds: Sequence[int],
    *,
    top_p: float,
    num_pieces: int,
    row_positions: RowPositions | None = None,
) -> tuple[Tensor, Tensor]:
    """Continue every row by exactly `new_tokens` sampled tokens; G is learned anew at each of them.

    Every row draws from a generator of its own, so its text depends neither on its neighbours nor on the number of
    processes. The end of a document ends nothing: in packed rows another one follows.

    Args:
        model: a causal language model in transformers' form.
        prompts: (B, n) ids without padding.
        new_tokens: of each continuation.
        seeds: one for each row.
        top_p: share of the probability mass to sample from, of the likeliest tokens.
        num_pieces: ids below this may be drawn.
        row_positions: position ids to hand to the model.

    Returns:
        (B, n + new_tokens), and (B,) bool on the host: False for a row whose logits were not finite at some place,
        from where on its text means nothing.
    """
    ids, good = prompts, torch.ones(len(prompts), dtype=torch.bool)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    for _ in range(new_tokens):
        positions = None if row_positions is None else row_positions(ids)
        output = model(input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=1)
        logits = output.logits[:, -1, :num_pieces].cpu().double()
        finite = logits.isfinite().all(-1)
        good &= finite
        # Such a row goes on with anything: all processes must make the same passes.
        probabilities = torch.where(finite[:, None], logits, 0.0).softmax(-1)
        draws = torch.stack([torch.rand((), generator=each, dtype=torch.float64) for each in generators])
        ids = torch.cat((ids, draw_top_p(probabilities, draws, top_p)[:, None].to(ids.device)), dim=1)
    return ids, good


def draw_top_p(probabilities: Tensor, draws: Tensor, top_p: float, within: bool = False) -> Tensor:
    """Sample from the fewest likeliest tokens whose probabilities reach `top_p`.

    Args:
        probabilities: (B, V) fp64.
        draws: (B,) in [0, 1), the quantiles to take.
        top_p: in (0, 1].
        within: leave out the token that crosses `top_p`, as the original code does; the likeliest one always stays.

    Returns:
        (B,) int64 ids.
    """
    ordered, ids = probabilities.sort(dim=-1, descending=True, stable=True)
    total = ordered.cumsum(-1)
    is_kept = total <= top_p if within else total - ordered < top_p
    is_kept[:, 0] = True
    kept = torch.where(is_kept, ordered, 0.0)
    mass = kept.cumsum(-1)
    places = torch.searchsorted(mass, (draws * mass[:, -1])[:, None], right=True)
    # Rounding could step onto a token that was cut off.
    last = (kept > 0).sum(-1, keepdim=True) - 1
    chosen: Tensor = ids.gather(-1, places.minimum(last))[:, 0]
    return chosen


@torch.no_grad()
def continue_until_end(
    model: Any, prompt: Tensor, most_tokens: int, seed: int, *, top_p: float, num_pieces: int, end_id: int
) -> Tensor | None:
    """Continue a prompt as the SOC paper does, without a cache: until `end_id`, which is kept, or `most_tokens`.

    Args:
        model: a causal language model in transformers' form.
        prompt: (n,) ids.
        most_tokens: of the continuation; it also ends with the model's context.
        seed: of the sampling.
        top_p: of the likeliest tokens those are drawn whose probabilities sum to at most this, one at least.
        num_pieces: ids below this may be drawn.
        end_id: of the end of a document.

    Returns:
        (n + m,) with m >= 1; None where logits were not finite, or the context has no room.
    """
    ids, generator = prompt, torch.Generator().manual_seed(seed)
    for _ in range(min(most_tokens, int(model.config.max_position_embeddings) - len(prompt))):
        logits = model(input_ids=ids[None], use_cache=False, logits_to_keep=1).logits[:, -1, :num_pieces].cpu().double()
        if not bool(logits.isfinite().all()):
            return None
        draw = torch.rand((1,), generator=generator, dtype=torch.float64)
        chosen = draw_top_p(logits.softmax(-1), draw, top_p, within=True)
        ids = torch.cat((ids, chosen.to(ids.device)))
        if int(chosen) == end_id:
            break
    return ids if len(ids) > len(prompt) else None


def deductive_after(
    model: Any, ids: Tensor, *, next_chunk: bool, row_positions: RowPositions | None = None
) -> list[DeductiveOutputs]:
    """Return each layer's deductive outputs, (B, H, d, d), that the last token of sequences (B, n) is attended with.

    Args:
        model: a PLDR-LLM.
        ids: without padding.
        next_chunk: with a causal Gram those of the token after them, which are the first to know of the last chunk.
        row_positions: position ids to hand to the model.
    """
    if next_chunk and model.config.gram_chunk_size is not None:
        ids = torch.cat((ids, ids[:, -1:]), dim=1)  # which token it is decides nothing of its own G
    positions = None if row_positions is None else row_positions(ids)
    output = model.decoder(input_ids=ids, position_ids=positions, use_cache=False, output_deductive_outputs=True)
    return last_chunk(output.deductive_outputs)


def last_chunk(layers: Sequence[DeductiveOutputs]) -> list[DeductiveOutputs]:
    """Return the last chunk's deductive outputs, without the others' memory; without a causal Gram there is one."""
    return [layer.map(lambda each: each if each.dim() == 4 else each.flatten(1, -4)[:, -1].clone()) for layer in layers]


def samples_of(layers: Sequence[DeductiveOutputs], chosen: Tensor) -> list[DeductiveOutputs]:
    """Return the deductive outputs of the samples where `chosen` (B,) is true; a predefined G is one for all."""
    return [layer.map(lambda each: each[chosen] if len(each) == len(chosen) else each) for layer in layers]


@torch.no_grad()
def add_to_order_parameters(
    continuations: OrderParameter,
    cached: OrderParameter,
    model: Any,
    prompts: Tensor,
    new_tokens: int,
    seeds: Sequence[int],
    *,
    num_pieces: int,
    wanted: Tensor | None = None,
    row_positions: RowPositions | None = None,
) -> int:
    """Continue prompts twice, and add what is learned of x1 and x2, and of xc and x1.

    Args:
        continuations: of (x1, x2), what the model knows after the two continuations.
        cached: of (xc, x1), xc being what it knows after the prompt, which is what a cache keeps.
        model: a PLDR-LLM.
        prompts: (B, n) ids; lengths as from `fit_to_chunks`.
        new_tokens: of each continuation.
        seeds: one for each prompt; the second continuation takes the next one.
        num_pieces, row_positions: see `continue_rows`.
        wanted: (B,) bool on the host, the prompts that count; None: all of them.

    Returns:
        How many prompts were added. Those that hold padding, or had logits that were not finite, are left out.
    """
    both, good = continue_rows(
        model,
        prompts.repeat(2, 1),
        new_tokens,
        [seed + which for which in (0, 1) for seed in seeds],
        top_p=TOP_P,
        num_pieces=num_pieces,
        row_positions=row_positions,
    )
    after_both = deductive_after(model, both, next_chunk=True, row_positions=row_positions)
    after_prompts = deductive_after(model, prompts, next_chunk=False, row_positions=row_positions)
    counted = (prompts != PAD_ID).all(-1).cpu() & good.view(2, -1).all(0)
    counted = counted if wanted is None else counted & wanted
    if bool(counted.any()):
        none = torch.zeros_like(counted)
        firsts, seconds = (torch.cat(pair).to(prompts.device) for pair in ((counted, none), (none, counted)))
        x1, x2 = samples_of(after_both, firsts), samples_of(after_both, seconds)
        continuations.update(x1, x2)
        cached.update(samples_of(after_prompts, counted.to(prompts.device)), x1)
    return int(counted.sum())
