"""Heatmaps and histograms of a run's snapshots, and its samples as a table, on an open W&B run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import wandb

from pldr_train.metrics.catalog import TENSORS
from pldr_train.runs import lines
from pldr_train.runs.layout import SAMPLES_FILE
from pldr_train.runs.snapshots import Matrices, read_snapshot
from pldr_train.wandb_runs.heatmaps import heatmap, robust_scale

SAMPLES_KEY = "samples"
_BINS = 64
_MOST_SAMPLES = 1000

Snapshot = Mapping[str, Mapping[int, Matrices]]
"""Tensor -> layer -> (H, d, d)."""


def heatmap_key(tensor: str) -> str:
    """The key of a tensor's heatmaps."""
    return f"heatmaps/{tensor}"


def histogram_key(tensor: str, layer: int) -> str:
    """The key of the histograms of a tensor in a layer."""
    return f"histograms/layer_{layer}/{tensor}"


def media_keys(num_layers: int) -> list[str]:
    """Every key that is no metric."""
    pictures = [heatmap_key(tensor) for tensor in TENSORS]
    return [*pictures, *(histogram_key(each, layer) for layer in range(num_layers) for each in TENSORS), SAMPLES_KEY]


def log_snapshot(run: Any, path: Path, step: int) -> None:
    """Log a snapshot's heatmaps, one for each tensor, and histograms, one for each tensor and layer.

    Args:
        run: an open W&B run.
        path: the snapshot's file.
        step: what it is logged at; W&B leaves out what comes before a step that it has.

    Raises:
        OSError: there is no such file (any more), or nothing can be written.
        ValueError: the file is damaged.
    """
    log_matrices(run, read_snapshot(path), step)


def log_matrices(run: Any, snapshot: Snapshot, step: int) -> None:
    """Log the heatmaps and histograms of a snapshot that was read."""
    media: dict[str, Any] = {}
    for tensor, layers in snapshot.items():
        numbers = sorted(layers)
        media[heatmap_key(tensor)] = _picture(tensor, [layers[number] for number in numbers], step)
        for number in numbers:
            finite = layers[number][np.isfinite(layers[number])]
            if finite.size:
                histogram = np.histogram(finite.astype(np.float64), bins=_BINS)
                media[histogram_key(tensor, number)] = wandb.Histogram(np_histogram=histogram)
    if media:
        run.log(media, step=step)


def _picture(tensor: str, layers: Sequence[Matrices], step: int) -> Any:
    values = np.concatenate([each.ravel() for each in layers])
    finite = values[np.isfinite(values)]
    scale = robust_scale(values)
    whole = f"{finite.min():.4g} to {finite.max():.4g}" if finite.size else "none finite"
    missing = f"; {values.size - finite.size:,} not finite" if 0 < finite.size < values.size else ""
    caption = (
        f"{tensor}, step {step:,}: layers down, heads across; colours from {scale.low:.4g} to {scale.high:.4g}; "
        f"values {whole}{missing}"
    )
    return wandb.Image(heatmap(layers, scale), caption=caption)


# ------------------------------------------------------------------------------------------------------------ samples


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """The samples of a run, those of later steps last; lines that are not whole are left out."""
    try:
        found, _ = lines.read_samples(folder / SAMPLES_FILE)
    except OSError:
        return []
    return [asdict(each) for each in sorted(found, key=lambda each: each.step)]


def log_samples(run: Any, samples: Sequence[Mapping[str, Any]], step: int) -> None:
    """Log the table of all samples up to a step; the newest table is the one that is shown, so it holds the earlier."""
    rows = [[each["step"], each["prompt"], each["text"]] for each in samples if each["step"] <= step]
    if rows:
        table = wandb.Table(columns=["step", "prompt", "text"], data=rows[-_MOST_SAMPLES:])
        run.log({SAMPLES_KEY: table}, step=step)
