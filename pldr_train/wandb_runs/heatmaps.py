"""Heatmaps of matrices, a picture for each tensor of the deductive outputs: layers down, heads across."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from pldr_train.runs.snapshots import Matrices

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
    """A scale that a few outliers do not change; around zero where there are values on both sides of it."""
    finite = values[np.isfinite(values)].astype(np.float64)
    if finite.size == 0:
        return Scale(0.0, 1.0, signed=False)
    low, high = (float(each) for each in np.percentile(finite, (_TAIL_PERCENT, 100 - _TAIL_PERCENT)))
    if low < 0 < high:
        largest = max(-low, high)
        return Scale(-largest, largest, signed=True)
    return Scale(low, high, signed=False)


def heatmap(layers: Sequence[Matrices], scale: Scale) -> Image.Image:
    """One picture of a tensor.

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
