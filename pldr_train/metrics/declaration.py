"""How a metric is declared: its name and meaning, and where the report and W&B draw it. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

EACH_LINE, AT_LOG_STEPS, AT_VALIDATIONS, ON_REQUEST = "each line", "log steps", "validations", "each step, on request"
"""When a metric is written."""

HEALTH, LOSS, LEAKAGE, CRITICALITY, DAG_LOSSES = "Health", "Loss", "Leakage", "Criticality", "DAG losses"
DEDUCTIVE_OUTPUTS, OPTIMISATION, SYSTEM, DATA = "Deductive outputs", "Optimisation", "System", "Data"
TASKS, OTHER = "Tasks", "Other metrics"
"""Sections of the report and of the W&B dashboard; each of them has an order of its own."""

_LAST = 1000


@dataclass(frozen=True)
class Chart:
    """A line in a chart of the report. Lines with the same section, group and family share the chart."""

    section: str
    family: str
    title: str
    label: str | None = None
    """What the line is called; None: what its name does not share with the others'."""
    group: str = ""
    """Charts with a group are folded up until they are asked for."""
    place: int = _LAST
    """Of the chart in its section, the lowest first; equal ones stand in the order of their metrics."""
    layered: bool = False
    """Whether the lines are layers; otherwise the chart has the value over all layers only."""
    logarithmic: bool = False
    overlap: bool = False
    """Whether the lines often lie on one another, so that dashes tell them apart as well."""
    role: Literal["low", "high"] | None = None
    """An end of an interval around the chart's other line."""


@dataclass(frozen=True)
class Panel:
    """A line in a panel of the W&B dashboard. Lines with the same section and title share the panel."""

    section: str
    title: str
    place: int = _LAST
    """Of the panel in its section, the lowest first; equal ones stand in the order of their metrics."""
    logarithmic: bool = False


@dataclass(frozen=True)
class MetricInfo:
    """The declaration of one metric of `metrics.jsonl`."""

    name: str
    unit: str
    reduction: str
    """Over the steps since the last line that has it, and over processes."""
    meaning: str
    cadence: str = AT_LOG_STEPS
    """When it is written."""
    good: str = ""
    """What a good value is, in words; "steady" means that only a drift deserves a look."""
    best: Literal["min", "max"] | None = None
    """Which value of a run W&B's table of runs keeps beside the last one."""
    formula: str = ""
    bounds: str = ""
    charts: tuple[Chart, ...] = ()
    """Of the report; without any the metric is shown by other means, as `tokens` on the health card."""
    panels: tuple[Panel, ...] = ()
