"""Models in and out of other formats: export, import, G of a trained model."""

from __future__ import annotations

from pathlib import Path

HUB_MARK = "hub:"


def is_hub_name(source: str | Path) -> bool:
    """Return whether a path as users give it names a model of the Hub; nothing is imported to tell."""
    return str(source).startswith(HUB_MARK)
