"""Which metrics share a chart, and the charts' order."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from pldr_train.metrics.table import METRICS

SECTIONS = (
    "Loss", "DAG losses", "Deductive outputs", "Leakage", "Optimisation", "Speed", "Data", "Other metrics",
)  # fmt: skip
_ODD_DOCUMENTS = frozenset(
    f"data/{name}" for name in ("null", "empty", "invalid_utf8", "too_short", "too_long", "unreadable")
)
_WITH_LAYERS = ("Deductive outputs", "Leakage", "Other metrics")
_HIDDEN = frozenset({"tokens"})
_INFO = {each.name: each for each in METRICS}
_TITLES = {
    "loss": "Loss",
    "cross_entropy": "Cross-entropy",
    "accuracy": "Accuracy",
    "dag/A_LM": "DAG loss of A_LM",
    "dag/A_P": "DAG loss of A_P",
    "dag/G_LM": "DAG loss of G_LM",
    "lr": "Learning rate",
    "grad_norm": "Gradient norm before and after clipping",
    "nonfinite_steps": "Steps that were not finite",
    "system/tokens_per_s": "Throughput",
    "system/data_wait_s": "Data wait",
    "system/data_wait_share": "Share of time waiting for data",
    "data/documents": "Documents",
    "data/odd": "Documents left out or mended",
}
_SECTION_OF_PART = {"deductive": "Deductive outputs", "leakage": "Leakage", "dag": "DAG losses"}
_SECTION_FAMILIES = {
    "Loss": {"loss", "cross_entropy", "accuracy"},
    "Optimisation": {"lr", "grad_norm", "grad_norm_clipped", "nonfinite_steps"},
    "Speed": {"system/tokens_per_s", "system/data_wait_s", "system/data_wait_share"},
}
_ORDER = {family: place for place, family in enumerate(_TITLES)}
# A part that numbers layers or heads: "layer_3", "layers.3", "h3", "3".
_NUMBERED = re.compile(r"(?<![A-Za-z0-9])((?:layers?|heads?|blocks?|[lh])?[_.-]?)(\d+)(?![A-Za-z0-9])")


def family_of(name: str) -> str:
    """The metrics of one family share a chart: train and val, before and after clipping, all layers."""
    family = re.sub(r"^(train|val)/", "", name)
    family = "grad_norm" if family == "grad_norm_clipped" else family
    if family in _ODD_DOCUMENTS:
        return "data/odd"
    if section_of(name) not in _WITH_LAYERS:
        return family
    return "/".join(filter(None, _NUMBERED.sub("", family).split("/"))) or family


def section_of(name: str) -> str:
    """The heading that a metric stands under."""
    parts = name.split("/")
    special = next((_SECTION_OF_PART[part] for part in parts if part in _SECTION_OF_PART), None)
    if special is not None:
        return special
    family = re.sub(r"^(train|val)/", "", name)
    known = next((section for section, families in _SECTION_FAMILIES.items() if family in families), "Other metrics")
    return "Data" if parts[0] == "data" else known


def charts_of(names: Iterable[str]) -> list[dict[str, Any]]:
    """The charts in their order: `section`, `title`, `unit`, `meaning`, and `lines` with `metric`, `label`, `index`."""
    families: dict[tuple[str, str], list[str]] = {}
    for name in names:
        if name not in _HIDDEN:
            families.setdefault((section_of(name), family_of(name)), []).append(name)
    ordered = sorted(families.items(), key=lambda each: (
        SECTIONS.index(each[0][0]), _ORDER.get(each[0][1], len(_ORDER)), each[0][1],
    ))  # fmt: skip
    return [_chart(section, family, metrics) for (section, family), metrics in ordered]


def _chart(section: str, family: str, metrics: list[str]) -> dict[str, Any]:
    known = next((_INFO[name] for name in sorted(metrics) if name in _INFO), None)
    numbers = {name: _numbers(name) for name in metrics if section in _WITH_LAYERS}
    numbered = any(numbers.values())
    metrics = sorted(metrics, key=lambda name: (*numbers.get(name, ()), name.startswith("val/"), name))
    labels = _layer_labels(metrics) if numbered else _labels(metrics)
    return {
        "section": section,
        "family": family,
        "title": _TITLES.get(family, family),
        "unit": "" if known is None or known.unit == "1" else known.unit,
        "meaning": "\n".join(f"{name}: {_INFO[name].meaning}" for name in metrics if name in _INFO),
        "layers": numbered,
        "lines": [
            {"metric": name, "label": label, "index": numbers[name][0] if numbered and numbers[name] else None}
            for name, label in zip(metrics, labels, strict=True)
        ],
    }


def _numbers(name: str) -> tuple[int, ...]:
    return tuple(int(number) for _, number in _NUMBERED.findall(name))


def _layer_labels(metrics: list[str]) -> list[str]:
    """The numbered parts of the names, or that there are none."""
    labels = []
    for name in metrics:
        parts = " ".join("".join(part) for part in _NUMBERED.findall(name)) or "all layers"
        labels.append(f"val {parts}" if name.startswith("val/") else parts)
    return labels if len(set(labels)) == len(labels) else metrics


def _labels(metrics: list[str]) -> list[str]:
    """What tells a chart's lines apart."""
    if metrics == ["train/grad_norm", "train/grad_norm_clipped"]:
        return ["before clipping", "after clipping"]
    if len(metrics) > 1 and len({re.sub("^(train|val)/", "", name) for name in metrics}) == 1:
        return [name.partition("/")[0] for name in metrics]
    return metrics
