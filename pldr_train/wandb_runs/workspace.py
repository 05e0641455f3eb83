"""The dashboard as a workspace of W&B: as plain values, or saved there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws

from pldr_train.wandb_runs.dashboard import Gallery, Panel, Part, dashboard
from pldr_train.wandb_runs.media import SAMPLES_KEY
from pldr_train.wandb_runs.opening import told_to_the_user

AXES = {"step": "Step", "tokens": "tokens"}
"""What the charts may be drawn over, and what W&B calls it."""
_WIDTH, _HEIGHT = 24, 8
_MOST_RUNS = 20


@dataclass(frozen=True)
class View:
    """What the workspace shows.

    Args:
        num_layers: of the models.
        project: whose runs.
        entity: user or team that owns the project; empty: whoever is logged in.
        runs: names of the runs to show; empty: all.
        axis: `step` or `tokens`.
        name: of the workspace.
    """

    num_layers: int
    project: str
    entity: str = ""
    runs: Sequence[str] = ()
    axis: str = "step"
    name: str = "PLDR-LLM training"


def build_workspace(view: View) -> Any:
    """The workspace; nothing is asked of the network."""
    return ws.Workspace(
        entity=view.entity,
        project=view.project,
        name=view.name,
        sections=[_section(part, AXES[view.axis]) for part in dashboard(view.num_layers)],
        settings=ws.WorkspaceSettings(x_axis=AXES[view.axis], max_runs=_MOST_RUNS),
        runset_settings=ws.RunsetSettings(
            filters=_only(view.runs),
            pinned_columns=[
                "run:displayName",
                "summary:val/loss.min",
                "summary:val/cross_entropy.last",
                "summary:leakage/gap",
                "summary:tokens",
            ],
        ),
    )


def workspace_values(view: View) -> dict[str, Any]:
    """The workspace as W&B keeps it: its owner, its name and its `spec`."""
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


def _panel(panel: Panel | Gallery, axis: str, columns: int, place: int) -> Any:
    width = _WIDTH // columns
    layout = wr.Layout(x=place % columns * width, y=place // columns * _HEIGHT, w=width, h=_HEIGHT)
    if isinstance(panel, Panel):
        return wr.LinePlot(
            title=panel.title,
            x=axis,
            y=list(panel.metrics),
            log_y=panel.logarithmic or None,
            title_y=panel.unit or None,
            layout=layout,
        )
    if panel.keys == (SAMPLES_KEY,):
        return wr.WeavePanelSummaryTable(table_name=SAMPLES_KEY, layout=layout)
    return wr.MediaBrowser(title=panel.title, media_keys=list(panel.keys), num_columns=1, layout=layout)
