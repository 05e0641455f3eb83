"""Every metric that a run may write; those without layers are declared here, by the modules that compute them.

Free of torch, so that reports can name and explain metrics without it. `python -m pldr_train.metrics.catalog` prints
docs/metrics.md.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from . import declaration as sections
from .declaration import AT_LOG_STEPS, AT_VALIDATIONS, EACH_LINE, ON_REQUEST, Chart, MetricInfo, Panel
from .layer_metrics import ATTENTION_METRICS, CACHED, CONTINUATIONS, PARAMETER_METRICS, LayerMetric, layer_infos
from .tensor_metrics import ORDER_METRICS, ROW_MAP_METRICS, TENSOR_METRICS

STEP, TOKENS = "step", "tokens"
_OWN, _OWN_OF_ALL = "the step's own", "the step's own, of all processes"
_SINCE = "over the steps since the last such line"
_OF_RANK_0 = f"{_SINCE}, of rank 0"


def _metric(
    name: str, unit: str, reduction: str, meaning: str, chart: Chart | None, *panels: Panel, **more: Any
) -> MetricInfo:
    charts = () if chart is None else (chart,)
    return MetricInfo(name, unit, reduction, meaning, charts=charts, panels=panels, **more)


# ------------------------------------------------------------------- scores: training/module.py and training/monitor.py

TRAIN, VAL = "train", "val"
"""The groups of the scores."""
LOSS, CROSS_ENTROPY, PERPLEXITY, ACCURACY = "loss", "cross_entropy", "perplexity", "accuracy"
TRAIN_LOSS, VAL_LOSS = f"{TRAIN}/{LOSS}", f"{VAL}/{LOSS}"
TRAIN_CROSS_ENTROPY, VAL_CROSS_ENTROPY = f"{TRAIN}/{CROSS_ENTROPY}", f"{VAL}/{CROSS_ENTROPY}"
VAL_PERPLEXITY, VAL_ACCURACY = f"{VAL}/{PERPLEXITY}", f"{VAL}/{ACCURACY}"

DAG_TENSORS: Mapping[str, str] = {
    "A_LM": "the positive metric",
    "A_P": "the potential",
    "G_LM": "the energy-curvature tensor",
}
"""What the DAG loss is taken of."""


def dag_name(tensor: str, layer: int | None = None) -> str:
    """Return the name of a DAG loss below the group, in a layer or over all of them."""
    return f"dag/{tensor}" if layer is None else f"dag/layer_{layer}/{tensor}"


DAG_COEFFICIENT = f"{TRAIN}/dag/coefficient"
WEIGHTED_DAG = "dag/weighted"
"""The DAG losses times the coefficients in force when they arose: what the loss holds beside the cross-entropy."""
QUANTITIES = (CROSS_ENTROPY, ACCURACY, *map(dag_name, DAG_TENSORS), WEIGHTED_DAG)
"""The scores that are means, in their order in a checkpoint's windows; the others follow from them."""
_WORDS = {TRAIN: "training", VAL: "validation"}
_CADENCES = {TRAIN: AT_LOG_STEPS, VAL: AT_VALIDATIONS}


def _scores(group: str, over: str) -> Iterator[MetricInfo]:
    tokens, rows = f"mean over the tokens of {over}", f"mean over layers, heads and sequences of {over}"
    lower = partial(_metric, cadence=_CADENCES[group], best="min")
    yield lower(
        f"{group}/{LOSS}", "nat/token", tokens, "cross-entropy plus the weighted DAG losses",
        Chart(sections.LOSS, LOSS, "Loss"), Panel(sections.LOSS, "Loss with the DAG losses", 1),
    )  # fmt: skip
    yield lower(
        f"{group}/{CROSS_ENTROPY}", "nat/token", tokens, "block cross-entropy of the next token",
        Chart(sections.LOSS, CROSS_ENTROPY, "Cross-entropy"), Panel(sections.HEALTH, "Cross-entropy", 1),
        Panel(sections.LOSS, "Cross-entropy", 2),
        Panel(sections.LOSS, f"Cross-entropy in {_WORDS[group]}", 5, logarithmic=True),
    )  # fmt: skip
    yield lower(
        f"{group}/{PERPLEXITY}", "1", tokens, "exp of the block cross-entropy",
        Chart(sections.LOSS, PERPLEXITY, "Perplexity"), Panel(sections.LOSS, "Perplexity", 3, logarithmic=True),
    )  # fmt: skip
    yield _metric(
        f"{group}/{ACCURACY}", "1", tokens, "share of tokens that were the likeliest",
        Chart(sections.LOSS, ACCURACY, "Accuracy"), Panel(sections.LOSS, "Accuracy", 4),
        cadence=_CADENCES[group], best="max",
    )  # fmt: skip
    for tensor, meaning in DAG_TENSORS.items():
        title = f"DAG loss of {tensor}"
        yield lower(
            f"{group}/{dag_name(tensor)}", "nat", rows, f"DAG loss of {meaning}, unweighted",
            Chart(sections.DAG_LOSSES, dag_name(tensor), title, layered=True),
            Panel(sections.DAG_LOSSES, title, logarithmic=True),
        )  # fmt: skip


def _coefficients() -> Iterator[MetricInfo]:
    for tensor in DAG_TENSORS:
        yield _metric(
            f"{DAG_COEFFICIENT}/{tensor}", "1", _OWN, f"coefficient of the DAG loss of {tensor}, if it has a schedule",
            Chart(sections.DAG_LOSSES, "dag_coefficient", "Coefficient of the DAG loss", tensor),
            Panel(sections.DAG_LOSSES, "Coefficient of the DAG loss"),
        )  # fmt: skip


def dag_layer_infos(num_layers: int) -> Iterator[MetricInfo]:
    """Yield the DAG losses of single layers."""
    for group, over in ((TRAIN, "the step"), (VAL, "the validation rows")):
        for layer in range(num_layers):
            for tensor, meaning in DAG_TENSORS.items():
                title = f"DAG loss of {tensor} by layer, {_WORDS[group]}"
                yield _metric(
                    f"{group}/{dag_name(tensor, layer)}", "nat", f"mean over heads and sequences of {over}",
                    f"DAG loss of {meaning} in layer {layer}", None,
                    Panel(sections.DAG_LOSSES, title, logarithmic=True), cadence=_CADENCES[group], best="min",
                )  # fmt: skip


# ---------------------------------------------------------- the step: training/module.py and training/observing.py

GRAD_NORM, GRAD_NORM_CLIPPED, LR = f"{TRAIN}/grad_norm", f"{TRAIN}/grad_norm_clipped", f"{TRAIN}/lr"
_GROUP = f"{TRAIN}/group"
_NAME_OF_GROUP = re.compile(rf"{_GROUP}/([^/]+)/")
NONFINITE_STEPS, UPDATE_RATIO = f"{TRAIN}/nonfinite_steps", f"{TRAIN}/update_ratio"

WEIGHT_GROUPS: Mapping[str, str] = {
    "embedding": "the token embedding",
    "attention": "the projections of query, key, value and output",
    "metric_learner": "the network that turns the Gram matrix into A",
    "power_law": "W, b, P, a and b_a",
    "feed_forward": "the feed-forward GLUs",
    "norms": "the norms outside of the metric learner",
    "output_head": "the output head",
}
"""The groups of weights whose updates are measured."""


def _steps() -> Iterator[MetricInfo]:
    chart, panel = partial(Chart, sections.OPTIMISATION), partial(Panel, sections.OPTIMISATION)
    for name, when in ((GRAD_NORM, "before clipping"), (GRAD_NORM_CLIPPED, "after clipping")):
        yield _metric(
            name, "1", _OWN_OF_ALL, f"2-norm of the gradient {when}",
            chart("grad_norm", "Gradient norm", when, place=2, overlap=True),
            Panel(sections.HEALTH, "Gradient", 8, logarithmic=True), panel("Gradient norm", 2, logarithmic=True),
            good="steady",
        )  # fmt: skip
    for group, meaning in WEIGHT_GROUPS.items():
        yield _metric(
            f"{UPDATE_RATIO}/{group}", "1", _OWN_OF_ALL, f"2-norm of the update over that of {meaning}",
            chart("update_ratio", "Update over weight", group, place=3, logarithmic=True),
            panel("Update over weights", 3, logarithmic=True), good="steady",
        )  # fmt: skip
    yield _metric(
        LR, "1", _OWN, "learning rate that the step was taken with",
        chart("lr", "Learning rate", place=1), panel("Learning rate", 1),
    )  # fmt: skip
    yield _metric(
        NONFINITE_STEPS, "steps", "sum", "steps whose loss or gradient was not finite, see trainer.on_nonfinite",
        chart("nonfinite_steps", "Steps not finite", place=4),
        Panel(sections.HEALTH, "Steps that were not finite", 9), good="0",
    )  # fmt: skip


def group_name(label: str, what: str) -> str:
    """Return the name of a metric of a group of parameters: `lr`, `grad_norm` or `update_ratio`."""
    return f"{_GROUP}/{label}/{what}"


def group_labels_in(names: Iterable[str]) -> tuple[str, ...]:
    """Return the labels of the groups of parameters that have metrics among `names`."""
    found = (_NAME_OF_GROUP.match(name) for name in names)
    return tuple(dict.fromkeys(each[1] for each in found if each))


def group_infos(label: str) -> Iterator[MetricInfo]:
    """Yield the metrics of a group of parameters of a recipe that has such (`optim.groups`)."""
    for what, title, place, meaning in (
        ("lr", "Learning rate by group", 5, "learning rate of its parameters"),
        ("grad_norm", "Gradient norm by group", 6, "2-norm of their gradient after clipping"),
        ("update_ratio", "Update over weight by group", 7, "2-norm of their update over that of themselves"),
    ):
        logarithmic = what != "lr"
        yield _metric(
            group_name(label, what), "1", _OWN if what == "lr" else _OWN_OF_ALL, f"group {label}: {meaning}",
            Chart(sections.OPTIMISATION, f"group/{what}", title, label, place=place, logarithmic=logarithmic),
            Panel(sections.OPTIMISATION, title, place, logarithmic=logarithmic),
        )  # fmt: skip


# ------------------------------------------------------------------ leakage: metrics/leakage.py and training/monitor.py

LEAKAGE_GROUP = "leakage"
GAP, GAP_LOW, GAP_HIGH = f"{LEAKAGE_GROUP}/gap", f"{LEAKAGE_GROUP}/gap_low", f"{LEAKAGE_GROUP}/gap_high"
BLOCK_NLL, SEQUENTIAL_NLL = f"{LEAKAGE_GROUP}/block_nll", f"{LEAKAGE_GROUP}/sequential_nll"
LEAKAGE_TARGETS = f"{LEAKAGE_GROUP}/targets"

MAX_GAP_NAT = 0.05
"""nat/token: what the gap between sequential and block NLL may be where a recipe does not say."""


def gap_verdict(low: float, high: float, max_gap: float = MAX_GAP_NAT) -> str:
    """Return what the 95 % interval of the gap between sequential and block NLL says, all in nat/token.

    The only judgement of a gap: training, reports, `watch` and `evaluate` ask it.

    Returns:
        "leaks": the interval lies above `max_gap`; "reversed": it lies below -`max_gap`, so a block is predicted worse
        than its prefixes are; "none": its upper end is at most `max_gap`; "undecided": it reaches over `max_gap`.
    """
    if low > max_gap:
        return "leaks"
    if high < -max_gap:
        return "reversed"
    return "none" if high <= max_gap else "undecided"


def _leakage() -> Iterator[MetricInfo]:
    targets, rows = "mean over the targets of the monitored rows", "over the monitored rows"
    chart, panel = partial(Chart, sections.LEAKAGE), partial(Panel, sections.LEAKAGE)
    measure = partial(_metric, cadence=AT_VALIDATIONS)
    title = "NLL in one pass and token by token"
    nll = Panel(sections.HEALTH, title, 3), panel(title, 2)
    gap = Panel(sections.HEALTH, "Leakage: what reading the future is worth", 2), panel("Gap with its 95 % interval", 1)
    for name, label, meaning in (
        (BLOCK_NLL, "block", "NLL in one pass over the row"),
        (SEQUENTIAL_NLL, "sequential", "NLL of the same targets from the tokens before them alone"),
    ):
        line = chart("leakage/nll", "NLL, both ways", label, place=2, overlap=True)
        yield measure(name, "nat/token", targets, meaning, line, *nll, best="min")
    end = partial(chart, GAP, "Leakage gap", place=1)
    meaning = "sequential less block NLL: what reading the future is worth"
    yield measure(GAP, "nat/token", targets, meaning, end("gap"), *gap, good="0")
    yield measure(
        GAP_LOW, "nat/token", rows, "lower end of the gap's 95 % interval", end("interval's lower end", role="low"),
        *gap, good="not above `monitor.max_gap`: then the future is read",
    )  # fmt: skip
    yield measure(
        GAP_HIGH, "nat/token", rows, "upper end of the gap's 95 % interval", end("interval's upper end", role="high"),
        *gap, good="at most `monitor.max_gap`: then there is no leakage",
    )  # fmt: skip
    for label, meaning in (
        ("block", "share that was the likeliest in one pass over the row"),
        ("sequential", "share that was the likeliest from the tokens before alone"),
    ):
        line = chart("leakage/accuracy", "Accuracy, both ways", label, place=3, overlap=True)
        name = f"{LEAKAGE_GROUP}/{label}_accuracy"
        yield measure(name, "1", targets, meaning, line, panel("Accuracy both ways", 3), best="max")
    title = "Targets scored both ways"
    yield measure(LEAKAGE_TARGETS, "tokens", "sum", "targets scored both ways", None, panel(title))


# ------------------------------------------------------------------------ tasks: training/task_evaluation.py

TASKS_GROUP = "eval"
TASK_PATTERNS = {"sequential": rf"{TASKS_GROUP}/[^/]+/[^/]+", "block": rf"{TASKS_GROUP}/[^/]+/block/[^/]+"}
"""Kind of scoring -> a regular expression of its metrics."""
_NAME_OF_TASK_METRIC = re.compile(rf"{TASKS_GROUP}/(?P<task>[^/]+)/(?P<block>block/)?(?P<metric>[^/]+)")


def task_metric(task: str, metric: str, in_block: bool = False) -> str:
    """Return the name of a task's score, in sequential or in block scoring."""
    parts = (TASKS_GROUP, task, *(("block",) if in_block else ()), metric)
    return "/".join(part.replace("/", "_").replace(", ", "_") for part in parts)


def task_metrics_in(names: Iterable[str]) -> tuple[str, ...]:
    """Return the scores of tasks among the names of metrics."""
    return tuple(name for name in names if _NAME_OF_TASK_METRIC.fullmatch(name))


def task_infos(names: Iterable[str]) -> Iterator[MetricInfo]:
    """Yield the scores of tasks that a recipe's `evaluate` names; arguments as `task_metrics_in` returns them."""
    for name in names:
        found = _NAME_OF_TASK_METRIC.fullmatch(name)
        assert found is not None, name
        metric, scoring = found["metric"], "block" if found["block"] else "sequential"
        label = f"{found['task']}, block" if found["block"] else found["task"]
        yield _metric(
            name, "1", "over the task's items", f"{metric} of {found['task']} in {scoring} scoring",
            Chart(sections.TASKS, f"{TASKS_GROUP}/{metric}", f"{metric} of tasks", label, overlap=True),
            cadence=AT_VALIDATIONS,
        )  # fmt: skip


# --------------------------------------------------- the machine: training/step_line.py and training/observing.py

TOKENS_PER_S, TFLOPS_PER_S, MFU = "system/tokens_per_s", "system/tflops_per_s", "system/mfu"
STEP_S_P50, STEP_S_P95, STEP_S_MAX = "system/step_s_p50", "system/step_s_p95", "system/step_s_max"
DATA_WAIT_S, DATA_WAIT_SHARE, MONITOR_SHARE = "system/data_wait_s", "system/data_wait_share", "system/monitor_share"
HOST_MEMORY_GIB, GPU_MEMORY_GIB = "system/host_memory_gib", "system/gpu_memory_gib"


def _system() -> Iterator[MetricInfo]:
    chart, panel = partial(Chart, sections.SYSTEM), partial(Panel, sections.SYSTEM)
    yield _metric(
        TOKENS_PER_S, "tokens/s", _SINCE, "training throughput, all processes",
        chart(TOKENS_PER_S, "Throughput"), panel("Throughput"),
    )  # fmt: skip
    yield _metric(
        TFLOPS_PER_S, "TFLOP/s", _SINCE, "the model's own FLOPs, all processes, PaLM's convention",
        chart(TFLOPS_PER_S, "Model FLOPs"), panel("Model FLOP/s"),
    )  # fmt: skip
    yield _metric(
        MFU, "1", _SINCE, "share of the devices' peak that these are, where the peak is known",
        chart(MFU, "Model FLOPs over peak (MFU)"), panel("MFU"),
    )  # fmt: skip
    title = "Time of a step"
    for name, label, meaning in (
        (STEP_S_P50, "median", "median time of a step, waiting for data included"),
        (STEP_S_P95, "95 %", "time that 95 % of the steps stayed within"),
        (STEP_S_MAX, "slowest", "time of the slowest step"),
    ):
        line = chart("system/step_s", title, label, overlap=True)
        yield _metric(name, "s", _OF_RANK_0, meaning, line, panel(title))
    yield _metric(
        DATA_WAIT_S, "s", f"sum {_SINCE}", "time that training waited for data",
        chart(DATA_WAIT_S, "Data wait"), Panel(sections.DATA, "Time waited for data", 5),
    )  # fmt: skip
    yield _metric(
        DATA_WAIT_SHARE, "1", _SINCE, "share of the time that training waited",
        chart(DATA_WAIT_SHARE, "Share waiting for data"), Panel(sections.DATA, "Waiting for data", 4),
    )  # fmt: skip
    yield _metric(
        MONITOR_SHARE, "1", _OF_RANK_0, "time spent on deductive metrics and leakage, over that of training",
        chart(MONITOR_SHARE, "Share monitoring"), panel("Time spent on monitoring", 2000),
    )  # fmt: skip
    for name, label, meaning in (
        (HOST_MEMORY_GIB, "host", "resident memory of a process"),
        (GPU_MEMORY_GIB, "GPU", f"peak of allocated GPU memory {_SINCE}"),
    ):
        line = chart("system/memory", "Memory", label)
        yield _metric(name, "GiB", "the largest of all processes", meaning, line, panel("Memory"))


# ---------------------------------------------------------------- the data: training/step_line.py, data/rows/lanes.py

DATA_GROUP = "data"
BATCH_DIGEST = f"{DATA_GROUP}/batch_digest"


def _data() -> Iterator[MetricInfo]:
    chart, panel = partial(Chart, sections.DATA), partial(Panel, sections.DATA)
    name, meaning = f"{DATA_GROUP}/documents", "documents begun since the run's beginning, all lanes and epochs"
    yield _metric(name, "documents", "sum", meaning, chart(name, "Documents"), panel("Documents", 2))
    title = "Documents left out or mended"
    for kind, meaning in (
        ("null", "without any text"),
        ("empty", "with an empty text"),
        ("invalid_utf8", "with bytes that are no UTF-8, replaced by U+FFFD"),
        ("too_short", "left out by data.min_document_tokens"),
        ("too_long", "left out by data.max_document_tokens"),
        ("unreadable", "in parts that were skipped (data.on_bad_shard)"),
    ):
        line = chart("data/odd", title, kind)
        yield _metric(f"{DATA_GROUP}/{kind}", "documents", "sum", f"of these, {meaning}", line, panel(title, 3))
    meaning, line = "BLAKE2 of the global batch's token ids", chart(BATCH_DIGEST, BATCH_DIGEST)
    yield _metric(BATCH_DIGEST, "hash", _OWN, meaning, line, cadence=ON_REQUEST)


# ---------------------------------------------------------------------------------------------------------- all of them

METRICS: tuple[MetricInfo, ...] = (
    _metric(STEP, "steps", "none", "optimizer steps done", Chart(sections.OTHER, STEP, STEP), cadence=EACH_LINE),
    *_scores(TRAIN, "the steps since the last such line"),
    *_coefficients(),
    *_steps(),
    *_scores(VAL, "the validation rows"),
    *_leakage(),
    _metric(
        TOKENS, "tokens", "sum", "tokens trained on since the run's beginning, all processes", None,
        Panel(sections.DATA, "Tokens", 1),
    ),
    *_system(),
    *_data(),
)  # fmt: skip
"""Every name without a layer's number that `metrics.jsonl` may hold, the deductive ones left out."""

TIMINGS = frozenset(info.name for info in METRICS if info.name.startswith("system/"))
"""The metrics that differ between two equal runs."""

GPU_ONLY = frozenset({MFU, GPU_MEMORY_GIB})
"""Absent where there is no GPU (the first also where logging.peak_tflops is null and the GPU's peak is not known)."""


def all_metrics(num_layers: int, groups: Iterable[str] = (), tasks: Iterable[str] = ()) -> tuple[MetricInfo, ...]:
    """Return every metric that a run of a model with a learned G may write.

    Args:
        num_layers: of the model.
        groups: labels of the recipe's groups of parameters, see `optimizers.group_parameters`.
        tasks: names of tasks' scores, see `task_metric`.
    """
    return (
        *METRICS,
        *task_infos(tasks),
        *(info for label in groups for info in group_infos(label)),
        *dag_layer_infos(num_layers),
        *layer_infos((*TENSOR_METRICS, *ROW_MAP_METRICS), num_layers),
        *layer_infos(PARAMETER_METRICS, num_layers),
        *layer_infos(ATTENTION_METRICS, num_layers),
        *layer_infos(ORDER_METRICS, num_layers, CONTINUATIONS),
        *layer_infos(ORDER_METRICS, num_layers, CACHED),
    )


def why_unknown(name: str) -> str | None:
    """Return what is wrong with a metric's name, and the nearest known one; None if a run may write it."""
    known = {info.name for info in all_metrics(1)}
    is_patterned = "layer_" in name or bool(task_metrics_in((name,)))
    return None if name in known or is_patterned else _unknown_text(name, known)


def why_not_of_validations(
    name: str, num_layers: int, groups: Iterable[str] = (), tasks: Sequence[str] = ()
) -> str | None:
    """Return why no validation of a run measures a metric; None if one may.

    Args:
        name: of the metric.
        num_layers: as that of `all_metrics`.
        groups: as those of `all_metrics`.
        tasks: that the recipe's `evaluate` names; which tasks these are is known when they are loaded.
    """
    if task_metrics_in((name,)):
        return None if tasks else "the score of a task, and evaluate.tasks names none; name it there"
    known = {info.name: info for info in all_metrics(num_layers, groups)}
    if name not in known:
        return _unknown_text(name, known)
    if known[name].cadence != AT_VALIDATIONS:
        return f"is written at {known[name].cadence}, not at validations; name another, such as {VAL_CROSS_ENTROPY}"
    return None


def _unknown_text(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f"no such metric; {f'did you mean {near[0]}?' if near else 'docs/metrics.md has all'}"


# -------------------------------------------------------------------------------------------------------- documentation

_INTRODUCTION = """# Metrics

Every metric that a run writes to `metrics.jsonl`, as `pldr_train/metrics` declares it; the charts of the report and the
panels on W&B come from the same declarations. This page is written by
`python -m pldr_train.metrics.catalog > docs/metrics.md`.

[training.md](training.md) says how a run writes metrics, [deductive-metrics.md](deductive-metrics.md) and
[leakage.md](leakage.md) what they mean. Layers count from 0. "steady" means that no value is known to be good, only
that a drift deserves a look. A value that is not defined is absent.
"""
_GROUPS_TEXT = """With `optim.groups` in the recipe, of each of its groups and of `default`, which has all other
parameters. Frozen groups have none."""
_TASKS_TEXT = """With `evaluate.tasks` in the recipe, of each of these tasks and of its metrics (acc, acc_norm, ...),
`eval/TASK/block/METRIC` in block scoring."""
_TENSORS_TEXT = """`deductive/TENSOR/NAME` over all layers, `deductive/layer_N/TENSOR/NAME` of one. The N matrices of a
tensor are those of all batches, samples, chunks (of a causal Gram) and heads. A predefined G has only G_LM."""
_ORDER_TEXT = f"""`{CONTINUATIONS}/TENSOR/NAME` of two continuations (x1, x2), `{CACHED}/TENSOR/NAME`
of a cached run and a continuation (xc, x1); of one layer with `layer_N/` before the tensor."""


def metrics_as_markdown() -> str:
    """Return the tables of all metrics as a page of documentation."""
    parts = (
        ("Of every run", "", _table(METRICS)),
        ("Groups of parameters", _GROUPS_TEXT, _table(tuple(group_infos("NAME")))),
        ("Tasks", _TASKS_TEXT, _table(tuple(task_infos([task_metric("TASK", "METRIC")])))),
        ("DAG losses of single layers", "", _table(tuple(dag_layer_infos(1)))),
        ("A, A_LM, A_P and G_LM", _TENSORS_TEXT, _layer_table((*TENSOR_METRICS, *ROW_MAP_METRICS))),
        ("The order parameter", _ORDER_TEXT, _layer_table(ORDER_METRICS)),
        ("The power law's parameters", "`deductive/PARAMETER/NAME` of W, P and a.", _layer_table(PARAMETER_METRICS)),
        ("Attention", "`deductive/attention/NAME`.", _layer_table(ATTENTION_METRICS)),
    )
    return _INTRODUCTION + "".join(
        f"\n## {title}\n\n{text}{text and chr(10) * 2}{table}" for title, text, table in parts
    )


def _table(infos: Sequence[MetricInfo]) -> str:
    rows = ((f"`{each.name}`", each.unit, each.cadence, each.reduction, each.meaning, _good(each)) for each in infos)
    return _lines(("metric", "unit", "written at", "reduction", "meaning", "good"), rows)


def _layer_table(metrics: Sequence[LayerMetric]) -> str:
    rows = []
    for metric in metrics:
        only = "" if metric.rows == metrics[0].rows else f" ({', '.join(metric.rows)} only)"
        info = metric.info(metric.rows[0])
        cells = (info.unit, info.cadence, info.reduction, info.formula, info.bounds, _good(info))
        rows.append((f"`{metric.name}`{only}", *cells))
    return _lines(("name", "unit", "written at", "reduction", "formula", "range", "good"), rows)


def _good(info: MetricInfo) -> str:
    return info.good or {"min": "lower", "max": "higher", None: ""}[info.best]


def _lines(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    escaped = ([cell.replace("|", r"\|") for cell in cells] for cells in rows)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, ["---"] * len(head), *escaped))


if __name__ == "__main__":
    print(metrics_as_markdown(), end="")
