"""The charts of the report in their order, as the metrics' declarations say; metrics of other programs stand below."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from pldr_train.metrics.catalog import TRAIN, VAL, all_metrics, group_labels_in, task_metrics_in
from pldr_train.metrics.declaration import (
    CRITICALITY,
    DAG_LOSSES,
    DATA,
    DEDUCTIVE_OUTPUTS,
    LEAKAGE,
    LOSS,
    OPTIMISATION,
    OTHER,
    SYSTEM,
    TASKS,
    Chart,
    MetricInfo,
)
from pldr_train.metrics.layer_metrics import CHART_GROUPS, DEDUCTIVE

SECTIONS = (LOSS, LEAKAGE, CRITICALITY, TASKS, DAG_LOSSES, DEDUCTIVE_OUTPUTS, OPTIMISATION, SYSTEM, DATA, OTHER)
_GROUPS = ("", *dict.fromkeys(CHART_GROUPS.values()))
_SECTION_OF_GROUP = {"leakage": LEAKAGE, "system": SYSTEM, "data": DATA, DEDUCTIVE: DEDUCTIVE_OUTPUTS}
"""Where metrics that are not declared stand, by the first part of their names."""
_SCORE_GROUP = re.compile(f"^({TRAIN}|{VAL})/")
# A part that numbers layers or heads: "layer_3", "layers.3", "h3", "3".
_NUMBERED = re.compile(r"(?<![A-Za-z0-9])((?:layers?|heads?|blocks?|[lh])?[_.-]?)(\d+)(?![A-Za-z0-9])")


class _Catalogue:
    """What is declared, by name."""

    def __init__(self, names: Iterable[str]) -> None:
        names = tuple(names)
        infos = all_metrics(0, group_labels_in(names), task_metrics_in(names))
        self.infos: dict[str, MetricInfo] = {info.name: info for info in infos}
        self._places: dict[str | Chart, int] = {}
        for place, info in enumerate(infos):
            self._places[info.name] = place
            for chart in info.charts:
                self._places.setdefault(_unlabelled(chart), place)

    def place(self, what: str | Chart) -> int:
        """Return a metric's or chart's place among all, whatever its layer; what is not declared stands last."""
        key = self.base(what) if isinstance(what, str) else what
        return self._places.get(key, len(self._places))

    def base(self, name: str) -> str:
        """Return the name over all layers; that of a declared metric may have numbers of its own."""
        return name if name in self.infos else without_numbers(name)

    def charts(self, name: str) -> Iterator[Chart]:
        """Yield the charts that a metric is a line of."""
        base = self.base(name) or name
        if base in self.infos:
            of_base = self.infos[base].charts
            found = [chart for chart in of_base if chart.layered or name == base]
            yield from found or ([] if name == base else [_undeclared(base)])
        else:
            yield _undeclared(base)


def _undeclared(base: str) -> Chart:
    """Return the chart of a metric that is not declared: one of its layers."""
    first, *parts = base.split("/")
    if "dag" in parts:
        family = _SCORE_GROUP.sub("", base)
        return Chart(DAG_LOSSES, family, family, layered=True)
    group = next((CHART_GROUPS[part] for part in parts if part in CHART_GROUPS), "") if first == DEDUCTIVE else ""
    return Chart(_SECTION_OF_GROUP.get(first, OTHER), base, base, group=group, layered=True)


def _unlabelled(chart: Chart) -> Chart:
    """Return what all lines of a chart share."""
    return replace(chart, label=None, role=None)


def charts_of(names: Iterable[str]) -> list[dict[str, Any]]:
    """Return the charts in their order.

    Each has `section`, `group` (empty: in sight at once), `title`, `unit`, `meaning`, `layers`, `log`, `overlap` and
    `lines` with `metric`, `label`, `index` and `role` (low or high: an end of an interval). A metric may stand in two
    charts.
    """
    names = list(names)
    catalogue = _Catalogue(names)
    charts: dict[Chart, list[tuple[Chart, str]]] = {}
    for name in names:
        for chart in catalogue.charts(name):
            charts.setdefault(_unlabelled(chart), []).append((chart, name))
    ordered = sorted(charts.items(), key=lambda each: (
        SECTIONS.index(each[0].section),
        _GROUPS.index(each[0].group),
        each[0].place,
        catalogue.place(each[0]),
        each[0].family,
    ))  # fmt: skip
    return [_plain(chart, lines, catalogue) for chart, lines in ordered]


def without_numbers(name: str) -> str:
    """Return a metric's name over all layers."""
    return "/".join(filter(None, _NUMBERED.sub("", name).split("/")))


def _plain(chart: Chart, lines: list[tuple[Chart, str]], catalogue: _Catalogue) -> dict[str, Any]:
    numbers = {name: _numbers(name) for _, name in lines if chart.layered}
    lines = sorted(
        lines,
        key=lambda each: (numbers.get(each[1], ()), _is_validation(each[1]), catalogue.place(each[1]), each[1]),
    )
    names = [name for _, name in lines]
    numbered = any(numbers.values())
    labels = _layer_labels(names) if numbered else _labels(lines)
    infos = {base: catalogue.infos[base] for base in map(catalogue.base, names) if base in catalogue.infos}
    unit = next((info.unit for info in infos.values()), "")
    return {
        "section": chart.section,
        "group": chart.group,
        "family": chart.family,
        "title": chart.title,
        "unit": "" if unit == "1" else unit,
        "meaning": "\n".join(f"{base}: {info.meaning}" for base, info in infos.items()),
        "layers": numbered,
        "log": chart.logarithmic,
        "overlap": chart.overlap,
        "lines": [
            {
                "metric": name,
                "label": label,
                "index": numbers[name][0] if numbered and numbers[name] else None,
                "role": line.role,
            }
            for (line, name), label in zip(lines, labels, strict=True)
        ],
    }


def _numbers(name: str) -> tuple[int, ...]:
    return tuple(int(number) for _, number in _NUMBERED.findall(name))


def _is_validation(name: str) -> bool:
    return name.startswith(f"{VAL}/")


def _layer_labels(metrics: list[str]) -> list[str]:
    """Return the numbered parts of the names, or that there are none."""
    labels = []
    for name in metrics:
        parts = " ".join("".join(part) for part in _NUMBERED.findall(name)) or "all layers"
        labels.append(f"{VAL} {parts}" if _is_validation(name) else parts)
    return labels if len(set(labels)) == len(labels) else metrics


def _labels(lines: list[tuple[Chart, str]]) -> list[str]:
    """Return what tells a chart's lines apart."""
    names = [name for _, name in lines]
    if len(names) > 1 and all(chart.label for chart, _ in lines):
        return [chart.label or name for chart, name in lines]
    if len(names) > 1 and len({_SCORE_GROUP.sub("", name) for name in names}) == 1:
        return [name.partition("/")[0] for name in names]
    return names
