"""The work of `pldr-train evaluate --compare`: several models on the same rows, and the tables of several models."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from torch import Tensor

from pldr_train.commands.evaluation import (
    EvaluationRows,
    evaluation_settings,
    interval_text,
    model_line,
    move_model,
    open_rows,
    rows_line,
    show,
    source_values,
)
from pldr_train.errors import DataError
from pldr_train.metrics.intervals import clustered_95
from pldr_train.models.evaluating import RowScores, evaluate, finite
from pldr_train.models.extract_g import load_tokenizer_of
from pldr_train.models.loading import find_checkpoint, load_model
from pldr_train.printing import log_to_terminal
from pldr_train.recipe import Recipe
from pldr_train.training.quiet import quiet_libraries


def compare_rows(options: argparse.Namespace, recipe: Recipe | None) -> None:
    """Measure the likelihoods of several models on the first one's rows, print a table, and write JSON.

    Args:
        options: of the command; `compare` names the models beside the first.
        recipe: whose validation rows to take, None for those of texts or of the first model's run.

    Raises:
        DataError: the models have different tokenizers, or the rows do not fit a model.
    """
    quiet_libraries()
    log_to_terminal(stream="stderr")
    options.prompts = 0
    sources = [options.source, *options.compare]
    _check_tokenizers(sources)
    rows: EvaluationRows | None = None
    models, scores = [], []
    # One after the other, so that memory holds one model.
    for source in sources:
        checkpoint = find_checkpoint(source)
        model = load_model(source) if checkpoint is None else checkpoint.load_model()
        if rows is None:
            rows = open_rows(options, recipe, checkpoint, model)
            if options.text is None and recipe is None and checkpoint is not None:
                recipe = checkpoint.recipe
        context, length = int(model.config.max_position_embeddings), rows.ids.shape[1] - 1
        if length > context:
            raise DataError(
                f"--compare {source}: its context is {context} tokens, and the rows have {length}; give "
                f"--context {context}"
            )
        device = move_model(model, options.device)
        settings = evaluation_settings(options, recipe if checkpoint is None else checkpoint.recipe)
        found = evaluate(model, rows.ids.to(device), settings)
        described = source_values(options, source, checkpoint, rows.described, device)
        models.append(found.as_json() | {"source": described})
        scores.append(found.scores)
        del model
    comparisons = [
        {"path": str(source), "differences": row_differences(scores[0], each)}
        for source, each in zip(sources[1:], scores[1:], strict=True)
    ]
    show({"source": models[0]["source"], "models": models, "comparisons": comparisons}, _rows_text, options.json)


def _check_tokenizers(sources: Sequence[Path]) -> None:
    """Check that all models have the same pieces by the same ids; raises CheckpointError and DataError."""
    first: list[str] | None = None
    for source in sources:
        tokenizer = load_tokenizer_of(source)
        pieces = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
        if first is None:
            first = pieces
        elif pieces != first:
            raise DataError(
                f"--compare {source}: its tokenizer is not that of {sources[0]}, so likelihoods of their tokens "
                "cannot be compared; leave it out, or compare the models on --tasks"
            )


def row_differences(first: RowScores, second: RowScores) -> dict[str, dict[str, float | None]]:
    """Return second - first with 95 % intervals paired over rows (`clustered_95`), by figure, in nat/token.

    Both are of the same rows and targets. An interval of one row has no ends.
    """
    ours, theirs = second.targets, first.targets
    block, sequential = ours.block_nll - theirs.block_nll, ours.sequential_nll - theirs.sequential_nll
    scored = theirs.is_scored
    counts = scored.sum(-1).double()
    return {
        "block_all_tokens": _paired(second.block_nll - first.block_nll, first.tokens),
        "block": _paired(block.where(scored, 0).sum(-1), counts),
        "sequential": _paired(sequential.where(scored, 0).sum(-1), counts),
        "gap": _paired((sequential - block).where(scored, 0).sum(-1), counts),
    }


def _paired(totals: Tensor, counts: Tensor) -> dict[str, float | None]:
    """Return the mean over targets and its interval, of (R,) sums of differences and numbers of targets."""
    products = (totals**2, totals * counts, counts**2)
    found = clustered_95(
        float((counts > 0).sum()), float(counts.sum()), float(totals.sum()), *(float(each.sum()) for each in products)
    )
    plain: dict[str, float | None] = finite(dict(zip(("mean", "low", "high"), found, strict=True)))
    return plain


# -------------------------------------------------------------------------------------------------------------- shown


def side_by_side(
    labels: Sequence[str], figures: Sequence[Sequence[str]], differences: Sequence[Sequence[str]]
) -> list[str]:
    """Return the lines of a table: the figures of each model, then the differences from the first model.

    Args:
        labels: of the rows, the head's first.
        figures: of each row below the head, one cell for each model.
        differences: of each row below the head, one cell for each model but the first.
    """
    letters = ascii_uppercase[: len(figures[0])]
    heads = [f"{letter} - A, 95 % interval" for letter in letters[1:]]
    width = max(map(len, labels))
    lines = [
        " ".join([f"{labels[0]:<{width}}", *(f"{each:>10}" for each in letters), *(f"{each:>31}" for each in heads)])
    ]
    for label, own, others in zip(labels[1:], figures, differences, strict=True):
        cells = [f"{label:<{width}}", *(f"{each:>10}" for each in own), *(f"{each:>31}" for each in others)]
        lines.append(" ".join(cells))
    return lines


def model_lines(models: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a line for each model, with the letter that stands for it."""
    return [model_line(each, letter) for letter, each in zip(ascii_uppercase, models, strict=False)]


_FIGURES = (
    ("block_all_tokens", "block NLL, all tokens"),
    ("block", "block NLL, sampled"),
    ("sequential", "sequential NLL, sampled"),
    ("gap", "gap, sequential - block"),
)


def _rows_text(found: Mapping[str, Any]) -> str:
    """Return a comparison on rows, for people."""
    models = found["models"]
    table = side_by_side(
        ["nat/token", *(label for _, label in _FIGURES)],
        [[f"{each[name]['mean' if name == 'gap' else 'nll']:.4f}" for each in models] for name, _ in _FIGURES],
        [[interval_text(each["differences"][name]) for each in found["comparisons"]] for name, _ in _FIGURES],
    )
    lines = [
        *model_lines(models),
        rows_line(models[0]),
        "",
        *table,
        "",
        "intervals are paired over rows; below 0 the model predicts better than A, and in the last line has less gap",
    ]
    return "\n".join(lines)
