"""A metric of G is added by one class and its line in a list, as docs/deductive-metrics.md says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed
from torch import Tensor

from pldr_train.metrics.catalog import all_metrics, metrics_as_markdown
from pldr_train.metrics.declaration import DEDUCTIVE_OUTPUTS, Panel
from pldr_train.metrics.deductive import DeductiveMetrics, Matrices
from pldr_train.metrics.tensor_metrics import TENSOR_METRICS, TensorMetric
from pldr_train.report.charts import charts_of
from pldr_train.wandb_runs.workspace import Plot, View, dashboard, workspace_values
from tests.processes import run_ranks
from tests.unit.test_deductive_metrics import Outputs

LAYERS, HEADS, D = 2, 3, 4


class Trace(TensorMetric):
    """The mean trace."""

    name, meaning = "trace", "trace"
    reduction = "mean over the finite matrices of batches, heads and processes"
    formula, bounds, good = "mean over the N matrices of the trace", "any", "steady"
    rows = ("G_LM",)
    panel = Panel(DEDUCTIVE_OUTPUTS, "Trace of G_LM")

    def sums(self, matrices: Matrices) -> Sequence[Tensor]:
        """Sum over the finite matrices, and their number."""
        traces = matrices.clean.diagonal(dim1=-2, dim2=-1).sum(-1)
        return traces.where(matrices.whole, 0.0).sum(), matrices.whole.sum()


@pytest.fixture
def trace() -> Iterator[None]:
    TENSOR_METRICS.append(Trace())
    yield
    TENSOR_METRICS.pop()


def batch(rows: int, start: int) -> list[Outputs]:
    """Deductive outputs whose sums are exact: small whole numbers."""
    whole = torch.arange(start, start + rows * HEADS * D * D, dtype=torch.float32).view(rows, HEADS, D, D)
    return [Outputs(whole, whole, whole, (layer + 1) * whole) for layer in range(LAYERS)]


def mean_trace(batches: Sequence[Sequence[Outputs]], layers: Sequence[int]) -> float:
    traces = [
        float(matrix.trace()) for each in batches for layer in layers for matrix in each[layer].curvature.flatten(0, 1)
    ]
    return sum(traces) / len(traces)


def measure(*batches: Sequence[Outputs]) -> DeductiveMetrics:
    metrics = DeductiveMetrics(LAYERS, HEADS, D)
    for each in batches:
        metrics.update(each)
    return metrics


def expected(batches: Sequence[Sequence[Outputs]]) -> dict[str, float]:
    values = {f"deductive/layer_{layer}/G_LM/trace": mean_trace(batches, [layer]) for layer in range(LAYERS)}
    return values | {"deductive/G_LM/trace": mean_trace(batches, range(LAYERS))}


def traces_of(values: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if name.endswith("/trace")}


@pytest.mark.usefixtures("trace")
def test_batches_and_processes_combine_to_its_value_and_change_no_other() -> None:
    batches = batch(2, 1), batch(5, 100)
    values = measure(*batches).compute()
    assert traces_of(values) == expected(batches)
    first, second = measure(batches[0]), measure(batches[1])
    for state, reduce in first._reductions.items():  # what torchmetrics does with the states of two processes
        setattr(first, state, reduce(torch.stack((getattr(first, state), getattr(second, state)))))
    assert traces_of(first.compute()) == expected(batches)
    TENSOR_METRICS.pop()
    without = measure(*batches).compute()
    TENSOR_METRICS.append(Trace())
    assert {name: value for name, value in values.items() if name in without} == without
    assert values.keys() - without.keys() == expected(batches).keys()


def process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    TENSOR_METRICS.append(Trace())
    torch.save(measure((batch(2, 1), batch(5, 100))[rank]).compute(), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_real_processes_both_have_its_value_over_both(tmp_path: Path) -> None:
    run_ranks(process, str(tmp_path))
    for rank in range(2):
        assert traces_of(torch.load(tmp_path / f"{rank}.pt")) == expected((batch(2, 1), batch(5, 100)))


@pytest.mark.usefixtures("trace")
def test_it_has_its_row_chart_panel_and_line_of_documentation() -> None:
    infos = {info.name: info for info in all_metrics(LAYERS)}
    info = infos["deductive/layer_1/G_LM/trace"]
    assert (info.meaning, info.unit, info.cadence) == ("G_LM of layer 1: trace", "1", "log steps")
    assert info.reduction == Trace.reduction
    assert not [name for name in infos if name.endswith("/trace") and "G_LM" not in name]

    (chart,) = [chart for chart in charts_of(infos) if chart["title"] == "G_LM: trace"]
    assert (chart["section"], chart["meaning"]) == (
        "Deductive outputs",
        "deductive/G_LM/trace: G_LM of all layers: trace",
    )
    assert [line["label"] for line in chart["lines"]] == ["all layers", "layer_0", "layer_1"]

    plots = [panel for part in dashboard(LAYERS) for panel in part.panels if isinstance(panel, Plot)]
    assert Plot("Trace of G_LM", ("deductive/G_LM/trace",)) in plots
    assert '"deductive/G_LM/trace"' in str(workspace_values(View(LAYERS, "demo"))).replace("'", '"')

    line = "| `trace` (G_LM only) | 1 | log steps | mean over the finite matrices of batches, heads and processes | "
    assert f"{line}mean over the N matrices of the trace | any | steady |\n" in metrics_as_markdown()
