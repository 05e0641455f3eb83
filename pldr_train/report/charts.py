"""Which metrics share a chart, and the charts' order."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from pldr_train.metrics.catalog import CACHED, CONTINUATIONS, PARAMETERS, TENSORS, all_metrics

SECTIONS = (
    "Loss", "Leakage", "Criticality", "DAG losses", "Deductive outputs", "Optimisation", "System", "Data",
    "Other metrics",
)  # fmt: skip
_LOSS, _LEAKAGE, _CRITICALITY, _DAG, _DEDUCTIVE, _OPTIMISATION, _SYSTEM, _DATA, _OTHER = SECTIONS
_HIDDEN = frozenset({"tokens", "leakage/targets"})
_INFO = {each.name: each for each in all_metrics(0)}
_PLACE = {name: place for place, name in enumerate(_INFO)}
_GROUPS = {
    "A": "A, the metric",
    "A_LM": "A_LM, the positive metric",
    "A_P": "A_P, the potential",
    "G_LM": "G_LM, the energy-curvature tensor",
    "power law": "W, P and a, the power law's parameters",
    "attention": "Attention",
}
"""Folded up until they are asked for, for there are very many charts of them."""
_CRITICAL = {
    "bounded": "Order parameter, bounded",
    "relative_rmse": "Order parameter, relative",
    "cached bounded": "Cached order parameter, bounded",
    "cached relative_rmse": "Cached order parameter, relative",
    "row_map_collapse": "Row-map collapse",
    "input_sensitivity": "Input sensitivity",
    "cross_head_rms": "Cross-head RMS",
    "rank": "Rank",
}
_TITLES = {
    "loss": "Loss",
    "cross_entropy": "Cross-entropy",
    "perplexity": "Perplexity",
    "accuracy": "Accuracy",
    "leakage/gap": "Leakage gap",
    "leakage/nll": "NLL, both ways",
    "leakage/accuracy": "Accuracy, both ways",
    "dag/A_LM": "DAG loss of A_LM",
    "dag/A_P": "DAG loss of A_P",
    "dag/G_LM": "DAG loss of G_LM",
    "lr": "Learning rate",
    "grad_norm": "Gradient norm",
    "update_ratio": "Update over weight",
    "nonfinite_steps": "Steps not finite",
    "system/tokens_per_s": "Throughput",
    "system/tflops_per_s": "Model FLOPs",
    "system/mfu": "Model FLOPs over peak (MFU)",
    "system/step_s": "Time of a step",
    "system/data_wait_s": "Data wait",
    "system/data_wait_share": "Share waiting for data",
    "system/monitor_share": "Share monitoring",
    "system/memory": "Memory",
    "data/documents": "Documents",
    "data/odd": "Documents left out or mended",
}
_SHARED = {
    "train/grad_norm": ("grad_norm", "before clipping"),
    "train/grad_norm_clipped": ("grad_norm", "after clipping"),
    "leakage/gap": ("leakage/gap", "gap"),
    "leakage/gap_low": ("leakage/gap", "interval's lower end"),
    "leakage/gap_high": ("leakage/gap", "interval's upper end"),
    "leakage/block_nll": ("leakage/nll", "block"),
    "leakage/sequential_nll": ("leakage/nll", "sequential"),
    "leakage/block_accuracy": ("leakage/accuracy", "block"),
    "leakage/sequential_accuracy": ("leakage/accuracy", "sequential"),
    "system/step_s_p50": ("system/step_s", "median"),
    "system/step_s_p95": ("system/step_s", "95 %"),
    "system/step_s_max": ("system/step_s", "slowest"),
    "system/host_memory_gib": ("system/memory", "host"),
    "system/gpu_memory_gib": ("system/memory", "GPU"),
    **{
        f"data/{name}": ("data/odd", name)
        for name in ("null", "empty", "invalid_utf8", "too_short", "too_long", "unreadable")
    },
}
"""Metrics that share a chart with others: its family, and what the line is called."""
_BAND = {"leakage/gap_low": "low", "leakage/gap_high": "high"}
"""Lines that are the ends of an interval around the family's other line."""
_OVERLAPPING = frozenset({"grad_norm", "leakage/nll", "leakage/accuracy", "system/step_s"})
"""Families whose lines often lie on one another, and are told apart by dashes as well."""
_OVER_DECADES = ("relative_rmse", "update_ratio")
"""Endings of families that are shown on a logarithmic axis from the first."""
_LOSSES = ("loss", "cross_entropy", "perplexity", "accuracy")
_ORDER = {family: place for place, family in enumerate([*_TITLES, *_CRITICAL])}
# A part that numbers layers or heads: "layer_3", "layers.3", "h3", "3".
_NUMBERED = re.compile(r"(?<![A-Za-z0-9])((?:layers?|heads?|blocks?|[lh])?[_.-]?)(\d+)(?![A-Za-z0-9])")


@dataclass(frozen=True)
class _Place:
    """Where a line stands."""

    section: str
    group: str
    family: str
    title: str
    label: str | None = None
    """None: told from the others' names."""
    layered: bool = False
    """Whether the family's lines are layers."""

    @property
    def chart(self) -> tuple[str, str, str]:
        """The same for all lines of a chart."""
        return self.section, self.group, self.family


def charts_of(names: Iterable[str]) -> list[dict[str, Any]]:
    """The charts in their order.

    Each has `section`, `group` (empty: in sight at once), `title`, `unit`, `meaning`, `layers`, `log`, `overlap` and
    `lines` with `metric`, `label`, `index` and `role` (low or high: an end of an interval). A metric may stand in two
    charts.
    """
    charts: dict[tuple[str, str, str], list[tuple[_Place, str]]] = {}
    for name in names:
        if name not in _HIDDEN:
            for place in _places(name):
                charts.setdefault(place.chart, []).append((place, name))
    groups = ["", *_GROUPS.values()]
    ordered = sorted(charts.items(), key=lambda each: (
        SECTIONS.index(each[0][0]),
        groups.index(each[0][1]),
        _ORDER.get(each[0][2], len(_ORDER)),
        min(_PLACE.get(without_numbers(name), len(_PLACE)) for _, name in each[1]),
        each[0][2],
    ))  # fmt: skip
    return [_chart(lines) for _, lines in ordered]


def without_numbers(name: str) -> str:
    """A metric's name over all layers."""
    return "/".join(filter(None, _NUMBERED.sub("", name).split("/")))


def _places(name: str) -> Iterator[_Place]:
    base = without_numbers(name) or name
    parts = base.split("/")
    plain = re.sub(r"^(train|val)/", "", name)
    if "dag" in parts:
        family = re.sub(r"^(train|val)/", "", base)
        yield _Place(_DAG, "", family, _TITLES.get(family, family), layered=True)
    elif parts[0] == "deductive":
        yield from _deductive_places(name, base)
    elif name in _SHARED:
        family, label = _SHARED[name]
        yield _Place(_section_of(name, family), "", family, _TITLES[family], label)
    elif plain.startswith("update_ratio/"):
        yield _Place(_OPTIMISATION, "", "update_ratio", _TITLES["update_ratio"], plain.removeprefix("update_ratio/"))
    elif (section := _section_of(name, plain)) in (_LEAKAGE, _OTHER):
        yield _Place(section, "", base, base, layered=True)
    else:
        yield _Place(section, "", plain, _TITLES.get(plain, plain))


def _section_of(name: str, family: str) -> str:
    first = {"leakage": _LEAKAGE, "system": _SYSTEM, "data": _DATA}.get(name.split("/", maxsplit=1)[0])
    if first is not None:
        return first
    if family in _LOSSES:
        return _LOSS
    return _OPTIMISATION if family in ("lr", "grad_norm", "nonfinite_steps") else _OTHER


def _deductive_places(name: str, base: str) -> Iterator[_Place]:
    """What tells criticality has a chart of all tensors, and one of each tensor's layers."""
    parts = base.split("/")
    tensor = next((part for part in parts if part in TENSORS), "")
    group = _GROUPS.get(tensor or ("power law" if parts[1:2] and parts[1] in PARAMETERS else parts[-2]), "")
    kind = parts[-1]
    if base.startswith((f"{CONTINUATIONS}/", f"{CACHED}/")):
        kind = f"cached {kind}" if base.startswith(CACHED) else kind
        title = f"{tensor}: {'cached ' * base.startswith(CACHED)}order parameter, {parts[-1]}"
        section = _CRITICALITY
    else:
        title = f"{parts[-2]}: {kind}"
        section = _CRITICALITY if tensor and kind in _CRITICAL else _DEDUCTIVE
    if section == _CRITICALITY and kind in _CRITICAL:
        layered = kind == "input_sensitivity"
        if layered or name == base:
            yield _Place(section, "", kind, _CRITICAL[kind], None if layered else tensor, layered)
        if layered:
            return
    title = title.replace("rmse", "RMSE").replace("rms", "RMS").replace("_share", " share").replace("_", " ")
    title = title if not tensor else f"{tensor}:{title.partition(':')[2]}"
    yield _Place(section, group, base, title if base in _INFO else base, layered=True)


def _chart(placed: list[tuple[_Place, str]]) -> dict[str, Any]:
    place = placed[0][0]
    metrics = [name for _, name in placed]
    numbers = {name: _numbers(name) for name in metrics if place.layered}
    numbered = any(numbers.values())
    order = {name: n for n, name in enumerate((*TENSORS, *_SHARED))}
    placed = sorted(
        placed,
        key=lambda each: (
            numbers.get(each[1], ()),
            order.get(each[0].label or "", order.get(each[1], len(order))),
            each[1].startswith("val/"),
            _PLACE.get(each[1], 0),
            each[1],
        ),
    )
    metrics = [name for _, name in placed]
    labels = _layer_labels(metrics) if numbered else _labels(placed)
    infos = {base: _INFO[base] for base in map(without_numbers, metrics) if base in _INFO}
    unit = next((info.unit for info in infos.values()), "")
    return {
        "section": place.section,
        "group": place.group,
        "family": place.family,
        "title": place.title,
        "unit": "" if unit == "1" else unit,
        "meaning": "\n".join(f"{base}: {info.meaning}" for base, info in infos.items()),
        "layers": numbered,
        "log": place.family.endswith(_OVER_DECADES),
        "overlap": place.family in _OVERLAPPING,
        "lines": [
            {
                "metric": name,
                "label": label,
                "index": numbers[name][0] if numbered and numbers[name] else None,
                "role": _BAND.get(name),
            }
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


def _labels(placed: list[tuple[_Place, str]]) -> list[str]:
    """What tells a chart's lines apart."""
    metrics = [name for _, name in placed]
    if len(metrics) > 1 and all(place.label for place, _ in placed):
        return [place.label or name for place, name in placed]
    if len(metrics) > 1 and len({re.sub("^(train|val)/", "", name) for name in metrics}) == 1:
        return [name.partition("/")[0] for name in metrics]
    return metrics
