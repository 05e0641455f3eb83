"""The dashboard: it draws metrics that exist, all of them that matter, and is built without a network."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from pldr_train.metrics.catalog import METRICS, all_metrics, task_metric
from pldr_train.metrics.layer_metrics import TENSORS
from pldr_train.wandb_runs.workspace import Gallery, Plot, View, dashboard, workspace_values

LAYERS = 3
SECTIONS = [
    "Health", "Loss", "DAG losses", "Deductive outputs", "Leakage", "Optimisation", "System", "Data", "Tasks",
    "Media",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def panels(values: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for section in values["spec"]["section"]["panelBankConfig"]["sections"]:
        yield from section["panels"]


def test_every_metric_of_a_panel_is_in_the_catalogue() -> None:
    known = {info.name for info in all_metrics(LAYERS)}
    values = workspace_values(View(LAYERS, "demo"))
    drawn = [name for panel in panels(values) for name in panel["config"].get("metrics", [])]
    assert len(drawn) > 100
    assert [name for name in drawn if name not in known] == []
    shown = [key for panel in panels(values) for key in panel["config"].get("mediaKeys", [])]
    of_tensors = [f"heatmaps/{tensor}" for tensor in TENSORS]
    of_layers = [f"histograms/layer_{layer}/{tensor}" for layer in range(LAYERS) for tensor in TENSORS]
    assert sorted(shown) == sorted([*of_tensors, *of_layers])


def test_every_metric_of_a_run_that_has_no_layers_is_drawn_somewhere() -> None:
    drawn = {
        name for part in dashboard(0) for panel in part.panels if isinstance(panel, Plot) for name in panel.metrics
    }
    assert {info.name for info in METRICS} - drawn == {"step", "data/batch_digest"}


def test_sections_stand_in_their_order_and_no_panel_is_empty() -> None:
    values = workspace_values(View(LAYERS, "demo"))
    sections = values["spec"]["section"]["panelBankConfig"]["sections"]
    assert [section["name"] for section in sections] == SECTIONS
    assert [section["isOpen"] for section in sections] == [True, True] + [False] * 8
    for layers in (0, 1, LAYERS):
        for part in dashboard(layers):
            assert all(
                each.keys if isinstance(each, Gallery) else each.metrics or each.pattern for each in part.panels
            ), part.name
    for section in sections:
        places = [(panel["layout"]["x"], panel["layout"]["y"]) for panel in section["panels"]]
        assert len(set(places)) == len(places)


def test_scores_of_tasks_are_drawn_by_their_kind_of_scoring_whatever_the_tasks() -> None:
    values = workspace_values(View(LAYERS, "demo"))
    patterns = [panel["config"]["metricRegex"] for panel in panels(values) if panel["config"].get("useMetricRegex")]
    names = [task_metric("a_task", "acc"), task_metric("a_task", "acc", in_block=True), task_metric("b", "x, none")]
    assert [[name for name in names if re.search(each, name)] for each in patterns] == [
        [names[0], names[2]],
        [names[1]],
    ]
    known = [info.name for info in all_metrics(LAYERS)]
    assert not [name for name in known for each in patterns if re.search(each, name)]


def test_health_shows_what_tells_a_run_that_goes_wrong() -> None:
    (health, *_) = dashboard(LAYERS)
    names = {name for panel in health.panels if isinstance(panel, Plot) for name in panel.metrics}
    assert {
        "train/cross_entropy", "val/cross_entropy", "leakage/gap", "leakage/gap_low", "leakage/gap_high",
        "leakage/block_nll", "leakage/sequential_nll", "deductive/order_parameter/G_LM/bounded",
        "deductive/G_LM/row_map_collapse", "deductive/G_LM/rank", "deductive/G_LM/input_sensitivity",
    } <= names  # fmt: skip


def test_charts_are_drawn_over_steps_or_tokens() -> None:
    for axis, theirs in (("step", "_step"), ("tokens", "tokens")):
        values = workspace_values(View(LAYERS, "demo", axis=axis))
        axes = {panel["config"]["xAxis"] for panel in panels(values) if "metrics" in panel["config"]}
        assert axes == {theirs}
        assert values["spec"]["section"]["settings"]["xAxis"] == theirs


def test_runs_are_picked_by_their_names() -> None:
    values = workspace_values(View(LAYERS, "demo", "team", runs=("base-seed1", "base-seed2")))
    (run_set,) = values["spec"]["section"]["runSets"]
    (only,) = run_set["filters"]["filters"]
    assert (only["key"]["name"], only["op"], only["value"]) == ("displayName", "IN", ["base-seed1", "base-seed2"])
    assert (values["entity"], values["project"]) == ("team", "demo")
    assert workspace_values(View(LAYERS, "demo"))["spec"]["section"]["runSets"][0]["filters"]["filters"] == []
    assert json.loads(json.dumps(values)) == values
