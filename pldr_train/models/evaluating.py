"""What a trained model is worth: block and sequential likelihood, and how its G behaves."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pldr_train.errors import DataError
from pldr_train.metrics.catalog import MAX_GAP_NAT, gap_verdict
from pldr_train.metrics.deductive import OrderParameter
from pldr_train.metrics.layer_metrics import TENSORS
from pldr_train.metrics.leakage import (
    PAD_ID,
    Leakage,
    LeakageSums,
    TargetScores,
    logits_of,
    sample_positions,
    score_targets,
)
from pldr_train.metrics.tensor_metrics import BoundedDifference, RelativeRmse
from pldr_train.model import PldrllmForCausalLM
from pldr_train.tasks.scoring import is_causal
from pldr_train.training.continuations import (
    TOP_P,
    add_to_order_parameters,
    continue_until_end,
    deductive_after,
    fit_to_chunks,
)
from pldr_train.training.objective import document_positions, token_loss
from pldr_train.untrusted import read_text

_log = logging.getLogger(__name__)

_LONGEST_PROMPT_TOKENS = 256
_FEWEST_TOKENS = 4
_POSITION_BINS = 4
_MOST_TEXT_BYTES = 2**30
_VERDICTS = {
    "none": "no leakage: a block is predicted at most {max_gap} nat/token better than when the model generates",
    "leaks": "the model reads the future: in one pass over a block it is {gap:.3g} nat/token better than when it "
    "generates, so its block loss and perplexity do not say how well it models language",
    "reversed": "the model predicts {size:.3g} nat/token worse in a block than from the tokens before alone: no "
    "leakage shows, but its G differs between the two",
    "undecided": "undecided: the interval of the gap reaches over {max_gap} nat/token; score more --rows",
}


@dataclass(frozen=True)
class EvaluationSettings:
    """How much is measured."""

    positions: int = 16
    """Targets of a row whose sequential NLL is taken."""
    batch_size: int = 8
    prompts: int = 4
    """Rows whose beginnings are continued; 0: nothing is measured but likelihoods."""
    new_tokens: int = 32
    seed: int = 0
    document_mask: bool = False
    """Whether documents of a row are kept apart, as in training; what is said of the G-cache never does."""
    max_gap: float = MAX_GAP_NAT
    """nat/token; the recipe's `monitor.max_gap`."""


@dataclass(frozen=True)
class RowScores:
    """What the likelihoods were taken from, for comparisons with other models on the same rows."""

    block_nll: Tensor
    """(R,) fp64, nats: the sum over all tokens of each row, in one pass."""
    tokens: Tensor
    """(R,) fp64, tokens of that sum."""
    targets: TargetScores


@dataclass(frozen=True)
class Evaluation:
    """What was measured, in plain types below its names but for `scores`."""

    scores: RowScores
    model: dict[str, Any]
    rows: dict[str, Any]
    block_all_tokens: dict[str, Any]
    """Of every token of the rows, comparable with a run's `val/cross_entropy`."""
    block: dict[str, float]
    """Of the sampled targets, as `sequential`."""
    sequential: dict[str, float]
    gap: dict[str, Any]
    order_parameter: dict[str, Any] | None
    """By the protocol that it names: `own`, or the paper's, `published`."""
    g_cache: dict[str, Any] | None
    padding: dict[str, Any] | None

    def as_json(self) -> dict[str, Any]:
        """Return everything but `scores`, for JSON: numbers that are not finite become null."""
        plain: dict[str, Any] = finite(
            {each.name: getattr(self, each.name) for each in fields(self) if each.name != "scores"}
        )
        return plain


def evaluate(
    model: PldrllmForCausalLM,
    rows: Tensor,
    settings: EvaluationSettings,
    published_prompts: Sequence[Tensor] | None = None,
) -> Evaluation:
    """Measure a model on rows.

    Args:
        model: in eval mode.
        rows: (R, S + 1) token ids on the model's device, S within the model's context; id 0 is padding.
        settings: how much.
        published_prompts: ids of prompts for the order parameter by the paper's protocol; None: our own protocol, on
            the rows' first halves.

    Raises:
        DataError: the rows hold nothing to score, no beginning to continue, or ids beyond the vocabulary.
    """
    if int(rows.max()) >= model.config.vocab_size:
        raise DataError(
            f"the rows hold token id {int(rows.max())}, and the model's vocabulary has {model.config.vocab_size}; use "
            "the tokenizer that the model was trained with"
        )
    row_positions = document_positions if settings.document_mask else None
    positions = sample_positions(rows, settings.positions, torch.Generator().manual_seed(settings.seed))
    targets = int((positions > 0).sum())
    if targets == 0:
        raise DataError("the rows hold nothing to score: no token follows another; give other rows")
    prompts = prompts_of(rows, settings.prompts) if settings.prompts else []
    _log.info(
        f"likelihoods: {len(rows):,} rows in one pass each, {targets:,} targets from the tokens before them alone"
    )
    block_all_tokens, row_nll, row_tokens = _block_all_tokens(model, rows, settings.batch_size, row_positions)
    scores = score_targets(model, rows, positions, settings.batch_size, row_positions)
    found = scores.sums().compute()
    new = settings.new_tokens
    if prompts:
        _log.info(f"G: {len(prompts)} prompts, continued by {new} tokens twice without a cache and once with one")
    return Evaluation(
        scores=RowScores(row_nll, row_tokens, scores),
        model=describe_model(model),
        rows={"rows": len(rows), "context_length": rows.shape[1] - 1, "tokens": int((rows != PAD_ID).sum())},
        block_all_tokens=block_all_tokens,
        block=_likelihood(found.block_nll, found.block_accuracy),
        sequential=_likelihood(found.sequential_nll, found.sequential_accuracy),
        gap=_gap(found, scores, rows.shape[1] - 1, settings.max_gap),
        order_parameter=_order(model, prompts, settings, row_positions, published_prompts),
        g_cache=measure_g_cache(model, prompts, new) if prompts else None,
        padding=measure_padding(model, rows, settings.prompts) if prompts else None,
    )


def _order(
    model: PldrllmForCausalLM,
    prompts: Sequence[Tensor],
    settings: EvaluationSettings,
    row_positions: Callable[[Tensor], Tensor] | None,
    published_prompts: Sequence[Tensor] | None,
) -> dict[str, Any] | None:
    if published_prompts is not None:
        end_id = int(model.config.eos_token_id)
        return measure_published_order_parameter(model, published_prompts, settings.seed, end_id)
    if not prompts:
        return None
    return measure_order_parameter(model, prompts, settings.new_tokens, settings.seed, row_positions)


def rows_of_texts(
    tokenizer: Any, texts: Sequence[str], eos_id: int, context_length: int, num_rows: int
) -> tuple[Tensor, int]:
    """Texts packed as in training, EOS after each, and evenly spaced rows of them.

    Returns:
        (R, context_length + 1) ids with R <= num_rows, and how many rows the texts fill.

    Raises:
        DataError: the texts do not fill one row.
    """
    ids: list[int] = []
    for text in texts:
        ids += [*tokenizer(text)["input_ids"], eos_id]
    whole = (len(ids) - 1) // context_length
    if whole < 1:
        raise DataError(
            f"--text: {len(ids)} tokens with EOS do not fill one row of {context_length} + 1; give more text, or "
            f"--context {len(ids) - 1} or less"
        )
    starts = [index * whole // min(num_rows, whole) * context_length for index in range(min(num_rows, whole))]
    return torch.tensor([ids[start : start + context_length + 1] for start in starts]), whole


def read_texts(paths: Sequence[Path], option: str = "--text") -> list[str]:
    """Return the texts of files, which `option` names. Raises DataError."""
    texts = []
    for path in paths:
        try:
            texts.append(read_text(path, _MOST_TEXT_BYTES, regular=False))
        except UnicodeDecodeError as error:
            raise DataError(f"{option} {path}: not a text in UTF-8 ({error.reason} at byte {error.start})") from error
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise DataError(f"{option} {path}: {reason}; name a file that can be read") from error
    return texts


def prompts_of(rows: Tensor, count: int) -> list[Tensor]:
    """Return the first halves of up to `count` rows, padding left out and at most 256 tokens each. Raises DataError."""
    tokens = [row[row != PAD_ID] for row in rows]
    long_enough = [each for each in tokens if len(each) >= _FEWEST_TOKENS][:count]
    if not long_enough:
        raise DataError(f"no row has {_FEWEST_TOKENS} tokens, so there is nothing to continue; set --prompts 0")
    return [each[: min(len(each) // 2, _LONGEST_PROMPT_TOKENS)] for each in long_enough]


@torch.no_grad()
def measure_order_parameter(
    model: PldrllmForCausalLM,
    prompts: Sequence[Tensor],
    new_tokens: int,
    seed: int,
    row_positions: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Any] | None:
    """Return the order parameter of A, A_LM, A_P and G_LM over prompts (n,), pooled over prompts and layers; None
    without any.

    x1 and x2 are the tensors after two stochastic continuations without a cache, xc those of a cached one, which are
    the prompt's; with a causal Gram see `fit_to_chunks`. A predefined G has no A, A_LM and A_P.
    """
    layers = model.config.num_hidden_layers
    found = {"x1_x2": OrderParameter(layers, "x1_x2"), "xc_x1": OrderParameter(layers, "xc_x1")}
    config, used = model.config, 0
    for number, prompt in enumerate(prompts):
        fitting = fit_to_chunks(len(prompt), new_tokens, config.gram_chunk_size, config.max_position_embeddings)
        if fitting is not None:
            used += add_to_order_parameters(
                found["x1_x2"],
                found["xc_x1"],
                model,
                prompt[None, : fitting[0]],
                fitting[1],
                [seed + 2 * number],
                num_pieces=int(config.vocab_size),
                row_positions=row_positions,
            )
    if used == 0:
        return None
    settings = {"protocol": "own", "new_tokens": new_tokens, "top_p": TOP_P, "seed": seed}
    return {"prompts": used, **settings, "tensors": _order_tensors(found)}


PUBLISHED_PROMPTS, PUBLISHED_WORDS, PUBLISHED_TOKENS = 100, 200, 256
"""The SOC paper's: reviews of IMDB's test split, words of each, tokens of a continuation at most."""


@torch.no_grad()
def measure_published_order_parameter(
    model: PldrllmForCausalLM, prompts: Sequence[Tensor], seed: int, end_id: int
) -> dict[str, Any] | None:
    """Return the order parameter by the SOC paper's protocol (arXiv 2603.23539); None if no prompt could be continued.

    Two continuations of each prompt without a cache, at temperature 1, of the tokens whose cumulative probability is at
    most 0.8, until the end of a document or 256 tokens. x1 and x2 are the tensors after their last tokens, xc those
    after the prompt, which a cached run keeps. The relative form is RMSE(x1, x2) / |mean x1| and RMSE(x1, xc) /
    |mean xc| over all prompts, layers and heads.

    Args:
        model: with a learned G over the whole sequence.
        prompts: (n,) ids each.
        seed: of the continuations.
        end_id: of the end of a document.
    """
    layers = model.config.num_hidden_layers
    found = {"x1_x2": OrderParameter(layers, "x1_x2"), "xc_x1": OrderParameter(layers, "xc_x1")}
    used = tokens = 0
    for number, prompt in enumerate(prompts):
        both = [
            continue_until_end(
                model, prompt, PUBLISHED_TOKENS, seed + 2 * number + which,
                top_p=TOP_P, num_pieces=int(model.config.vocab_size), end_id=end_id,
            )
            for which in (0, 1)
        ]  # fmt: skip
        if both[0] is None or both[1] is None:
            continue
        x1, x2, xc = (deductive_after(model, ids[None], next_chunk=False) for ids in (*both, prompt) if ids is not None)
        found["x1_x2"].update(x1, x2)
        found["xc_x1"].update(xc, x1)
        used, tokens = used + 1, tokens + sum(len(each) - len(prompt) for each in both if each is not None)
        _log.info(f"prompt {number + 1} of {len(prompts)}")
    if used == 0:
        return None
    settings = {"protocol": "published", "new_tokens": tokens / (2 * used), "top_p": TOP_P, "seed": seed}
    return {"prompts": used, **settings, "tensors": _order_tensors(found)}


def _order_tensors(found: Mapping[str, OrderParameter]) -> dict[str, Any]:
    """Return the relative and the bounded form of each tensor and pair."""
    tensors: dict[str, Any] = {}
    for pair, metric in found.items():
        values = metric.compute()
        for name in TENSORS:
            own = {form: values.get(f"{pair}/{name}/{form}") for form in (RelativeRmse.name, BoundedDifference.name)}
            if own[BoundedDifference.name] is not None:
                tensors.setdefault(name, {})[pair] = own
    return tensors


def greedy_steps(
    model: PldrllmForCausalLM, prompt: Tensor, new_tokens: int, **options: Any
) -> Iterator[tuple[Tensor, Any]]:
    """Continue a prompt greedily with K, V and G cached, and make a whole pass over it at each step.

    Args:
        model: in eval mode, without gradients.
        prompt: (n,) ids.
        new_tokens: at most; the continuation also ends with the model's context.
        options: of the whole passes.

    Yields:
        The cached next-token logits (V,), and the outputs of the whole pass over the same tokens.
    """
    ids = prompt[None]
    outputs = model(ids, use_cache=True, logits_to_keep=1)
    for _ in range(min(new_tokens, int(model.config.max_position_embeddings) - len(prompt))):
        chosen = outputs.logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat((ids, chosen), dim=1)
        outputs = model(chosen, past_key_values=outputs.past_key_values, use_cache=True, logits_to_keep=1)
        yield outputs.logits[0, -1], model(ids, use_cache=False, logits_to_keep=1, **options)


@torch.no_grad()
def measure_g_cache(model: PldrllmForCausalLM, prompts: Sequence[Tensor], new_tokens: int) -> dict[str, Any]:
    """Next-token logits with K, V and G cached against those of a whole pass, over greedy cached continuations.

    The pass over the prompt is the same with and without a cache and is left out.
    """
    largest, total, entries, same, steps = 0.0, 0.0, 0, 0, 0
    for prompt in prompts:
        for cached, whole in greedy_steps(model, prompt, new_tokens):
            recomputed = whole.logits[0, -1]
            difference = (cached.double() - recomputed.double()).abs()
            largest, total = max(largest, float(difference.max())), total + float(difference.sum())
            entries += difference.numel()
            same += int(cached.argmax() == recomputed.argmax())
            steps += 1
    if steps == 0:
        return {"steps": 0, "largest_logit_difference": None, "mean_logit_difference": None, "same_choice": None}
    return {
        "steps": steps,
        "largest_logit_difference": largest,
        "mean_logit_difference": total / entries,
        "same_choice": same / steps,
    }


@torch.no_grad()
def measure_padding(model: PldrllmForCausalLM, rows: Tensor, count: int) -> dict[str, Any]:
    """Logits of the first halves of rows alone against those beside a whole row, padded on the left to its length."""
    largest, total, entries, compared = 0.0, 0.0, 0, 0
    for row in rows:
        tokens = row[row != PAD_ID][: rows.shape[1] - 1]
        if len(tokens) < _FEWEST_TOKENS or compared == count:
            continue
        short = tokens[: len(tokens) // 2]
        padding = len(tokens) - len(short)
        ids = torch.stack((torch.cat((short.new_full((padding,), PAD_ID), short)), tokens))
        mask = torch.ones_like(ids)
        mask[0, :padding] = 0
        alone = model(short[None], use_cache=False).logits[0]
        padded = model(ids, attention_mask=mask, use_cache=False).logits[0, padding:]
        difference = (alone.double() - padded.double()).abs()
        largest, total = max(largest, float(difference.max())), total + float(difference.sum())
        entries, compared = entries + difference.numel(), compared + 1
    return {
        "rows": compared,
        "largest_logit_difference": largest,
        "mean_logit_difference": total / entries,
    }


def verdict_text(found: Leakage, max_gap: float = MAX_GAP_NAT) -> str:
    """Return the verdict on the gap in words."""
    verdict = gap_verdict(found.gap_low, found.gap_high, max_gap)
    if verdict == "undecided" and found.rows < 2:
        return "undecided: one row gives no interval; score more --rows"
    return _VERDICTS[verdict].format(gap=found.gap, size=-found.gap, max_gap=max_gap)


def _gap(found: Leakage, scores: TargetScores, context_length: int, max_gap: float) -> dict[str, Any]:
    bins = []
    for index in range(_POSITION_BINS):
        first, stop = (1 + each * context_length // _POSITION_BINS for each in (index, index + 1))
        sums: LeakageSums = scores.sums((scores.positions >= first) & (scores.positions < stop))
        if sums.targets:
            part = sums.compute()
            bins.append(
                {
                    "first_position": first,
                    "last_position": stop - 1,
                    "targets": part.targets,
                    "block_nll": part.block_nll,
                    "sequential_nll": part.sequential_nll,
                    "mean": part.gap,
                    "low": part.gap_low,
                    "high": part.gap_high,
                }
            )
    return {
        "mean": found.gap,
        "low": found.gap_low,
        "high": found.gap_high,
        "targets": found.targets,
        "rows": found.rows,
        "tolerance": max_gap,
        "verdict": gap_verdict(found.gap_low, found.gap_high, max_gap),
        "verdict_text": verdict_text(found, max_gap),
        "by_position": bins,
    }


def _likelihood(nll: float, accuracy: float) -> dict[str, float]:
    perplexity = math.exp(nll) if nll < math.log(1e300) else math.inf
    return {"nll": nll, "perplexity": perplexity, "accuracy": accuracy}


@torch.no_grad()
def _block_all_tokens(
    model: PldrllmForCausalLM, rows: Tensor, batch_size: int, row_positions: Callable[[Tensor], Tensor] | None
) -> tuple[dict[str, Any], Tensor, Tensor]:
    """Return the figures over every token, and of each row the NLL's sum and the tokens, (R,) fp64 on the CPU."""
    ask, every = logits_of(model, row_positions), torch.arange(rows.shape[1] - 1, device=rows.device)
    sums = []
    for part in torch.split(rows, batch_size):
        for logits, row in zip(ask(part[:, :-1], every), part, strict=True):
            loss = token_loss(logits[None], row[None, 1:])
            sums.append((float(loss.cross_entropy_sum), int(loss.tokens), int(loss.correct)))
    nll, tokens, correct = torch.tensor(sums, dtype=torch.float64).unbind(-1)
    count = int(tokens.sum())
    means = _likelihood(float(nll.sum()) / count, float(correct.sum()) / count)
    return {"tokens": count, **means}, nll, tokens


def describe_model(model: PldrllmForCausalLM) -> dict[str, Any]:
    """Return a model's size, its kind of G, and whether that reads later tokens, in plain types."""
    config = model.config
    return {
        "parameters": sum(each.numel() for each in model.parameters()),
        "G": config.custom_G_type or "learned",
        "gram_chunk_size": config.gram_chunk_size,
        "context_length": config.max_position_embeddings,
        "is_causal": is_causal(model),
    }


def finite(value: Any) -> Any:
    """Return plain values with null for numbers that are not finite, at any depth."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
