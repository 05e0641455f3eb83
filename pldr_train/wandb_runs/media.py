"""Heatmaps and histograms of a run's snapshots, and its samples as a table, on an open W&B run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import wandb
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from pldr_train.runs import lines
from pldr_train.runs.layout import SAMPLES_FILE
from pldr_train.runs.snapshots import Matrices, read_snapshot

SAMPLES_KEY = "samples"
_BINS = 64
_MOST_SAMPLES = 1000

Snapshot = Mapping[str, Mapping[int, Matrices]]
"""Tensor -> layer -> (H, d, d)."""


def heatmap_key(tensor: str) -> str:
    """Return the key of a tensor's heatmaps."""
    return f"heatmaps/{tensor}"


def histogram_key(tensor: str, layer: int) -> str:
    """Return the key of the histograms of a tensor in a layer."""
    return f"histograms/layer_{layer}/{tensor}"


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
    """Return the samples of a run, those of later steps last; lines that are not whole are left out."""
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


# ----------------------------------------------------------------------------------------------------------- pictures

_LEAST_CELL, _MOST_SIDE = 48, 4096
"""Pixels: small matrices are enlarged to the first, matrices are thinned out until the picture keeps to the second."""
_GAP, _MARGIN = 2, 24
_BACKGROUND, _INK, _NONFINITE = (255, 255, 255), (60, 60, 60), (255, 0, 255)
_TAIL_PERCENT = 1.0
"""The colours span all but so many percent of the values at either end, which single outliers cannot stretch."""
# From red over white to blue, and from dark to light: distinguishable with any colour vision, and printed in grey.
_SIGNED = ((178, 24, 43), (244, 165, 130), (247, 247, 247), (146, 197, 222), (33, 102, 172))
_UNSIGNED = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))


@dataclass(frozen=True)
class Scale:
    """From values to colours."""

    low: float
    high: float
    signed: bool
    """Zero is white, red below and blue above."""


def robust_scale(values: Matrices) -> Scale:
    """Return a scale that a few outliers do not change; around zero where there are values on both sides of it."""
    finite = values[np.isfinite(values)].astype(np.float64)
    if finite.size == 0:
        return Scale(0.0, 1.0, signed=False)
    low, high = (float(each) for each in np.percentile(finite, (_TAIL_PERCENT, 100 - _TAIL_PERCENT)))
    if low < 0 < high:
        largest = max(-low, high)
        return Scale(-largest, largest, signed=True)
    return Scale(low, high, signed=False)


def heatmap(layers: Sequence[Matrices], scale: Scale) -> Image.Image:
    """Return one picture of a tensor.

    Args:
        layers: of each layer (H, d, d).
        scale: of all of them.
    """
    heads, width = max(len(each) for each in layers), layers[0].shape[-1]
    times = max(1, -(-_LEAST_CELL // width))
    room = (_MOST_SIDE - _MARGIN) // max(heads, len(layers)) - _GAP
    thin = max(1, -(-width // max(room, 1)))
    times = min(times, max(1, room // width))
    cell = -(-width // thin) * times
    size = (_MARGIN + heads * (cell + _GAP), _MARGIN + len(layers) * (cell + _GAP))
    picture = Image.new("RGB", size, _BACKGROUND)
    draw: Any = ImageDraw.Draw(picture)
    for row, matrices in enumerate(layers):
        y = _MARGIN + row * (cell + _GAP)
        draw.text((2, y + cell // 2 - 5), f"L{row}", fill=_INK)
        for column, matrix in enumerate(matrices):
            x = _MARGIN + column * (cell + _GAP)
            if row == 0:
                draw.text((x + cell // 2 - 5, _MARGIN // 2 - 6), f"H{column}", fill=_INK)
            pixels = colours(matrix[::thin, ::thin], scale).repeat(times, axis=0).repeat(times, axis=1)
            picture.paste(Image.fromarray(pixels), (x, y))
    return picture


def colours(values: Matrices, scale: Scale) -> NDArray[np.uint8]:
    """RGB of each value, (..., 3); outside of the scale its end colours, not finite one of their own."""
    anchors = np.asarray(_SIGNED if scale.signed else _UNSIGNED, dtype=np.float64)
    span = scale.high - scale.low
    finite = np.isfinite(values)
    filled = np.where(finite, values, 0.0).astype(np.float64)
    place = np.clip((filled - scale.low) / span, 0, 1) if span > 0 else np.full(values.shape, 0.5)
    at = place * (len(anchors) - 1)
    parts = [np.interp(at, np.arange(len(anchors)), anchors[:, channel]) for channel in range(3)]
    rgb = np.stack(parts, axis=-1).round().astype(np.uint8)
    rgb[~finite] = _NONFINITE
    return rgb
