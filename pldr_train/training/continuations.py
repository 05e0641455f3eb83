"""Stochastic continuations without a cache, the same whatever batch a row stands in, and what the model learns of them.

The order parameter compares the deductive outputs after two such continuations of a prompt (arXiv 2603.23539).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pldr_train.model.power_law_attention import DeductiveOutputs

TOP_P = 0.8
"""Of the order parameter's continuations, the papers' value."""


@torch.no_grad()
def continue_rows(
    model: Any, prompts: Tensor, new_tokens: int, seeds: Sequence[int], *, top_p: float, num_pieces: int
) -> Tensor:
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

    Returns:
        (B, n + new_tokens).
    """
    ids = prompts
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    for _ in range(new_tokens):
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1, :num_pieces]
        draws = torch.stack([torch.rand((), generator=each, dtype=torch.float64) for each in generators])
        chosen = draw_top_p(logits.cpu().double().softmax(-1), draws, top_p)
        ids = torch.cat((ids, chosen[:, None].to(ids.device)), dim=1)
    return ids


def draw_top_p(probabilities: Tensor, draws: Tensor, top_p: float) -> Tensor:
    """Sample from the fewest likeliest tokens whose probabilities reach `top_p`.

    Args:
        probabilities: (B, V) fp64.
        draws: (B,) in [0, 1), the quantiles to take.
        top_p: in (0, 1].

    Returns:
        (B,) int64 ids.
    """
    ordered, ids = probabilities.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    kept = torch.where(before < top_p, ordered, 0.0)
    mass = kept.cumsum(-1)
    places = torch.searchsorted(mass, (draws * mass[:, -1])[:, None], right=True)
    # Rounding could step onto a token that was cut off.
    last = (kept > 0).sum(-1, keepdim=True) - 1
    chosen: Tensor = ids.gather(-1, places.minimum(last))[:, 0]
    return chosen


def deductive_after(model: Any, ids: Tensor) -> list[DeductiveOutputs]:
    """Each layer's deductive outputs, (B, H, d, d), on whole sequences (B, n); of a causal Gram the last chunk's."""
    layers = model.decoder(input_ids=ids, use_cache=False, output_deductive_outputs=True).deductive_outputs
    return [layer.map(lambda each: each.reshape(len(each), -1, *each.shape[-3:])[:, -1]) for layer in layers]
