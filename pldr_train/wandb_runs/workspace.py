"""The dashboard of a run as a workspace of W&B: as plain values, or saved there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws

from pldr_train.metrics import declaration as sections
from pldr_train.metrics.catalog import GAP, STEP, TASK_PATTERNS, TOKENS, VAL_CROSS_ENTROPY, VAL_LOSS, all_metrics
from pldr_train.metrics.declaration import MetricInfo
from pldr_train.metrics.layer_metrics import TENSORS
from pldr_train.wandb_runs.media import SAMPLES_KEY, heatmap_key, histogram_key
from pldr_train.wandb_runs.opening import told_to_the_user

SECTIONS = (
    sections.HEALTH, sections.LOSS, sections.DAG_LOSSES, sections.DEDUCTIVE_OUTPUTS, sections.LEAKAGE,
    sections.OPTIMISATION, sections.SYSTEM, sections.DATA,
)  # fmt: skip
"""The more the metrics say of a run's health, the further up."""
_OPEN = (sections.HEALTH, sections.LOSS)
AXES = {STEP: "Step", TOKENS: "tokens"}
"""What the charts may be drawn over, and what W&B calls it."""
_WIDTH, _HEIGHT = 24, 8
_MOST_RUNS = 20


@dataclass(frozen=True)
class Plot:
    """One panel of curves."""

    title: str
    metrics: tuple[str, ...]
    unit: str = ""
    logarithmic: bool = False
    pattern: str = ""
    """A regular expression of metrics' names, instead of `metrics`."""


@dataclass(frozen=True)
class Gallery:
    """One browser of pictures or histograms."""

    title: str
    keys: tuple[str, ...]


@dataclass(frozen=True)
class Part:
    """One section."""

    name: str
    panels: Sequence[Plot | Gallery]
    is_open: bool = False
    columns: int = 3


def dashboard(num_layers: int, groups: Sequence[str] = ()) -> list[Part]:
    """Return all sections, for a model of so many layers and a recipe with these groups of parameters: the panels that
    the metrics' declarations name, the scores of whatever tasks a run has, and the media.
    """
    infos = all_metrics(num_layers, groups)
    parts = [Part(name, _plots(name, infos), name in _OPEN) for name in SECTIONS]
    tasks = [Plot(f"Scores of tasks, {scoring}", (), pattern=f"^{name}$") for scoring, name in TASK_PATTERNS.items()]
    return [*parts, Part(sections.TASKS, tasks, columns=2), Part("Media", _media(num_layers), columns=2)]


def _plots(section: str, infos: Sequence[MetricInfo]) -> list[Plot]:
    lines = [(panel, info) for info in infos for panel in info.panels if panel.section == section]
    plots = []
    for panel in sorted(dict.fromkeys(panel for panel, _ in lines), key=lambda each: each.place):
        drawn = [info for each, info in lines if each == panel]
        unit = drawn[0].unit
        names = tuple(info.name for info in drawn)
        plots.append(Plot(panel.title, names, "" if unit == "1" else unit, panel.logarithmic))
    return plots


def _media(num_layers: int) -> list[Gallery]:
    return [
        *(Gallery(f"{tensor}, layers down and heads across", (heatmap_key(tensor),)) for tensor in TENSORS),
        Gallery("Samples", (SAMPLES_KEY,)),
        *(
            Gallery(f"Values of {tensor}", tuple(histogram_key(tensor, layer) for layer in range(num_layers)))
            for tensor in TENSORS
            if num_layers
        ),
    ]


@dataclass(frozen=True)
class View:
    """What the workspace shows.

    Args:
        num_layers: of the models.
        project: whose runs.
        entity: user or team that owns the project; empty: the one that is logged in.
        runs: names of the runs to show; empty: all.
        axis: `step` or `tokens`.
        name: of the workspace.
        groups: labels of the recipe's groups of parameters.
    """

    num_layers: int
    project: str
    entity: str = ""
    runs: Sequence[str] = ()
    axis: str = "step"
    name: str = "PLDR-LLM training"
    groups: Sequence[str] = ()


def build_workspace(view: View) -> Any:
    """Return the workspace; nothing is asked of the network."""
    return ws.Workspace(
        entity=view.entity,
        project=view.project,
        name=view.name,
        sections=[_section(part, AXES[view.axis]) for part in dashboard(view.num_layers, view.groups)],
        settings=ws.WorkspaceSettings(x_axis=AXES[view.axis], max_runs=_MOST_RUNS),
        runset_settings=ws.RunsetSettings(
            filters=_only(view.runs),
            pinned_columns=[
                "run:displayName",
                f"summary:{VAL_LOSS}.min",
                f"summary:{VAL_CROSS_ENTROPY}.last",
                f"summary:{GAP}",
                f"summary:{TOKENS}",
            ],
        ),
    )


def workspace_values(view: View) -> dict[str, Any]:
    """Return the workspace as W&B keeps it: its owner, its name and its `spec`."""
    found: dict[str, Any] = build_workspace(view)._to_model().model_dump(mode="json", by_alias=True, exclude_none=True)
    return found


def save_workspace(view: View) -> str:
    """Save it as a new view of the project and return its address.

    Raises:
        UserError: W&B refuses.
    """
    with told_to_the_user():
        workspace = build_workspace(view).save()
    return str(workspace.url)


def _only(runs: Sequence[str]) -> str:
    if not runs:
        return ""
    names = ", ".join(repr(name) for name in runs)
    return f"Metric('displayName') in [{names}]"


def _section(part: Part, axis: str) -> Any:
    return ws.Section(
        name=part.name,
        panels=[_panel(each, axis, part.columns, place) for place, each in enumerate(part.panels)],
        is_open=part.is_open,
        layout_settings=ws.SectionLayoutSettings(columns=part.columns, rows=-(-len(part.panels) // part.columns)),
        panel_settings=ws.SectionPanelSettings(x_axis=axis),
    )


def _panel(panel: Plot | Gallery, axis: str, columns: int, place: int) -> Any:
    width = _WIDTH // columns
    layout = wr.Layout(x=place % columns * width, y=place // columns * _HEIGHT, w=width, h=_HEIGHT)
    if isinstance(panel, Plot):
        return wr.LinePlot(
            title=panel.title,
            x=axis,
            y=list(panel.metrics),
            metric_regex=panel.pattern or None,
            log_y=panel.logarithmic or None,
            title_y=panel.unit or None,
            layout=layout,
        )
    if panel.keys == (SAMPLES_KEY,):
        return wr.WeavePanelSummaryTable(table_name=SAMPLES_KEY, layout=layout)
    return wr.MediaBrowser(title=panel.title, media_keys=list(panel.keys), num_columns=1, layout=layout)
