"""An audit of a trained model: what its operator is like, layer by layer, and whether it reads the future.

The measures are those of the author's mathematical audits: rank of A, share of G that the rotary embedding's rotations
do not commute with, Jacobian of the row map, DAG losses, what caching G changes, what a suffix changes before it, and
how far scores in one pass over a block lie from those that generation can reach. Single values are computed in fp64
from the model's own fp32 tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pldr_train.dag.log_trace_exp import log_trace_exp
from pldr_train.errors import DataError
from pldr_train.metrics.deductive import commutant_residual, numerical_rank
from pldr_train.metrics.leakage import PAD_ID, sample_positions, score_targets
from pldr_train.metrics.row_map import COLLAPSED, captured_row_maps, jacobian_norms, spread_rows
from pldr_train.model import PldrllmForCausalLM
from pldr_train.model.power_law_attention import DeductiveOutputs
from pldr_train.models.evaluating import greedy_steps
from pldr_train.training.continuations import deductive_after, last_chunk


@dataclass(frozen=True)
class AuditSettings:
    """How much is measured."""

    prompts: int = 8
    """Rows whose first halves are read and continued."""
    new_tokens: int = 16
    """Of the greedy continuation."""
    jacobian_rows: int = 16
    """Rows of the Gram, for each prompt and layer, at which the row map's Jacobian is taken."""
    positions: int = 16
    """Targets of a row that are scored both ways."""
    candidate_tokens: int = 8
    """Of a candidate that is scored after each prompt."""
    batch_size: int = 8
    seed: int = 0


@torch.no_grad()
def audit(model: PldrllmForCausalLM, rows: Tensor, settings: AuditSettings) -> dict[str, Any]:
    """Measure a model on rows.

    Args:
        model: in eval mode and fp32.
        rows: (R, S + 1) token ids on the model's device, S within the model's context; id 0 is padding.
        settings: how much.

    Returns:
        Plain values: `spreads` with min, median and max over layers, heads and prompts and for each layer, `decoding`,
        `suffix`, `gap`, `candidates`, and the `row_map` criterion. What a predefined G does not have is None.

    Raises:
        DataError: no row is long enough, or holds ids beyond the vocabulary.
    """
    if int(rows.max()) >= model.config.vocab_size:
        raise DataError(
            f"the rows hold token id {int(rows.max())}, and the model's vocabulary has {model.config.vocab_size}; use "
            "the tokenizer that the model was trained with"
        )
    texts = _texts(rows, settings)
    prompts = [text[: len(text) // 2] for text in texts]
    gathered = _Gathered(model.config.num_hidden_layers)
    with captured_row_maps(model, lambda gram: spread_rows(gram, settings.jacobian_rows)) as row_maps:
        for prompt in prompts:
            for index, layer in enumerate(deductive_after(model, prompt[None], next_chunk=False)):
                _measure_layer(gathered, index, layer, model)
    for index, row_map in enumerate(row_maps):
        for picked in row_map.rows:
            whole, singles = jacobian_norms(row_map.units, picked)
            gathered.add("row_map", index, whole)
            gathered.add("unit", index, singles)
    return {
        "prompts": len(prompts),
        "prompt_tokens": [len(prompt) for prompt in prompts],
        "spreads": gathered.spreads(),
        "row_map": _row_map(gathered),
        "decoding": _decoding(model, prompts, settings.new_tokens),
        "suffix": _suffix(model, texts),
        "gap": _gap(model, rows, settings),
        "candidates": _candidates(model, texts, settings),
    }


# -------------------------------------------------------------------------------------------------- layers and heads

MEASURES = {
    "A_rank": "rank of A",
    "A_second": "second over first singular value of A",
    "A_LM_rank": "rank of A_LM",
    "commutant": "share of G outside of the rotations' commutant",
    "row_map": "spectral norm of the row map's Jacobian",
    "unit": "spectral norm of one unit's Jacobian",
    "dag_A_LM": "DAG loss of A_LM",
    "dag_A_P": "DAG loss of A_P",
    "dag_G_LM": "DAG loss of G_LM",
}
"""What is measured in each layer, of each head or row, and what it is."""


class _Gathered:
    """Values of each measure and layer, of all prompts."""

    def __init__(self, num_layers: int) -> None:
        self._values: dict[str, list[list[Tensor]]] = {name: [[] for _ in range(num_layers)] for name in MEASURES}

    def add(self, name: str, layer: int, values: Tensor) -> None:
        self._values[name][layer].append(values.detach().double().flatten().cpu())

    def of(self, name: str) -> list[Tensor]:
        """All values of each layer; empty without any."""
        layers = [torch.cat(parts) for parts in self._values[name] if parts]
        return layers if len(layers) == len(self._values[name]) else []

    def spreads(self) -> dict[str, dict[str, Any] | None]:
        """Least, median and largest of each measure, over everything and in each layer."""
        spreads: dict[str, dict[str, Any] | None] = {}
        for name in MEASURES:
            layers = self.of(name)
            spreads[name] = None
            if layers:
                spreads[name] = _spread(torch.cat(layers)) | {"layers": [_spread(each) for each in layers]}
        return spreads


def _spread(values: Tensor) -> dict[str, Any]:
    finite = values[values.isfinite()]
    found: dict[str, Any] = {"count": len(values), "not_finite": len(values) - len(finite)}
    if len(finite) == 0:
        return found | {"min": None, "median": None, "max": None}
    return found | {"min": float(finite.min()), "median": float(finite.quantile(0.5)), "max": float(finite.max())}


def _measure_layer(gathered: _Gathered, index: int, layer: DeductiveOutputs, model: PldrllmForCausalLM) -> None:
    gathered.add("commutant", index, commutant_residual(layer.curvature, model.config.reference_rope))
    if layer.metric is None:
        return
    assert layer.positive_metric is not None
    assert layer.potential is not None
    for name, tensor in (("A", layer.metric), ("A_LM", layer.positive_metric)):
        singular = torch.linalg.svdvals(tensor.double())
        gathered.add(f"{name}_rank", index, numerical_rank(singular))
        if name == "A":
            gathered.add("A_second", index, singular[..., 1] / singular[..., 0])
    for name, tensor in (("A_LM", layer.positive_metric), ("A_P", layer.potential), ("G_LM", layer.curvature)):
        gathered.add(f"dag_{name}", index, log_trace_exp(tensor.double()))


def _row_map(gathered: _Gathered) -> dict[str, Any] | None:
    layers = gathered.of("row_map")
    if not layers:
        return None
    least = min(float(each.quantile(0.5)) for each in layers)
    return {"least_median": least, "threshold": COLLAPSED, "collapsed": least < COLLAPSED}


# ------------------------------------------------------------------------------------------------ cache and causality


def _decoding(model: PldrllmForCausalLM, prompts: Sequence[Tensor], new_tokens: int) -> dict[str, Any]:
    """Greedy decoding with K, V and G cached against whole passes: G, logits and choices."""
    g_moved, logits_moved, margin, same, safe, steps = 0.0, 0.0, math.inf, 0, 0, 0
    for prompt in prompts:
        before = deductive_after(model, prompt[None], next_chunk=False)
        for cached, whole in greedy_steps(model, prompt, new_tokens, output_deductive_outputs=True):
            for kept, now in zip(before, last_chunk(whole.deductive_outputs), strict=True):
                g_moved = max(g_moved, _relative_difference(now.curvature, kept.curvature))
            recomputed = whole.logits[0, -1].double()
            moved = float((cached.double() - recomputed).abs().max())
            first, second = recomputed.topk(2).values.tolist()
            logits_moved, margin = max(logits_moved, moved), min(margin, first - second)
            same += int(cached.argmax() == recomputed.argmax())
            safe += int(2 * moved < first - second)
            steps += 1
    if steps == 0:
        return {"steps": 0, "g_moved": None, "logits_moved": None, "same_choice": None, "safe": None, "margin": None}
    return {
        "steps": steps,
        "g_moved": g_moved,
        "logits_moved": logits_moved,
        "same_choice": same / steps,
        "safe": safe / steps,
        "margin": margin,
    }


def _suffix(model: PldrllmForCausalLM, texts: Sequence[Tensor]) -> dict[str, Any]:
    """What another second half of a text changes in G, and in the logits of its first half."""
    g_moved, logits_moved = 0.0, 0.0
    for text in texts:
        half = len(text) // 2
        # The same tokens in the reverse order: as likely a piece of the vocabulary as any.
        other = torch.cat((text[:half], text[half:].flip(0)))
        found = [model(each[None], use_cache=False, output_deductive_outputs=True) for each in (text, other)]
        for one, two in zip(*(last_chunk(each.deductive_outputs) for each in found), strict=True):
            g_moved = max(g_moved, _relative_difference(two.curvature, one.curvature))
        before, after = (each.logits[0, :half].double() for each in found)
        logits_moved = max(logits_moved, float((before - after).abs().max()))
    return {"texts": len(texts), "g_moved": g_moved, "logits_moved": logits_moved}


def _gap(model: PldrllmForCausalLM, rows: Tensor, settings: AuditSettings) -> dict[str, Any] | None:
    """Block and sequential NLL of sampled targets, and the largest difference of one."""
    positions = sample_positions(rows, settings.positions, torch.Generator().manual_seed(settings.seed))
    if int((positions > 0).sum()) == 0:
        return None
    scores = score_targets(model, rows, positions, settings.batch_size)
    found = scores.sums().compute()
    difference = (scores.sequential_nll - scores.block_nll)[scores.is_scored].abs()
    return {
        "targets": found.targets,
        "block_nll": found.block_nll,
        "sequential_nll": found.sequential_nll,
        "mean": found.gap,
        "low": found.gap_low,
        "high": found.gap_high,
        "largest": float(difference.max()),
    }


def _candidates(model: PldrllmForCausalLM, texts: Sequence[Tensor], settings: AuditSettings) -> dict[str, Any] | None:
    """Score a candidate after a prompt in one pass over both, and token by token from what stands before."""
    largest, total, tokens = 0.0, 0.0, 0
    for text in texts:
        half = len(text) // 2
        candidate = text[half : half + settings.candidate_tokens]
        row = torch.cat((text[:half], candidate))
        block = model(row[None, :-1], use_cache=False).logits[0, half - 1 :].double().log_softmax(-1)
        for index, token in enumerate(candidate.tolist()):
            prefix = row[None, : half + index]
            alone = model(prefix, use_cache=False, logits_to_keep=1).logits[0, -1].double().log_softmax(-1)
            difference = float(block[index, token] - alone[token])
            largest, total, tokens = max(largest, abs(difference)), total + difference, tokens + 1
    return {"candidates": len(texts), "tokens": tokens, "mean_per_token": total / tokens, "largest_per_token": largest}


# ----------------------------------------------------------------------------------------------------------- helpers


def _texts(rows: Tensor, settings: AuditSettings) -> list[Tensor]:
    """Return rows without padding, of 4 tokens and more; at most as many as prompts are wanted."""
    tokens = [row[row != PAD_ID][: rows.shape[1] - 1] for row in rows]
    long_enough = [each for each in tokens if len(each) >= 4][: settings.prompts]
    if not long_enough:
        raise DataError("no row has 4 tokens, so there is nothing to read; give longer texts")
    return long_enough


def _relative_difference(one: Tensor, other: Tensor) -> float:
    """RMS of the difference over that of the second, both (1, H, d, d)."""
    difference, size = (one.double() - other.double()).norm(), other.double().norm()
    return float(difference / size) if float(size) > 0 else float(difference)
