"""How W&B is to treat each metric: over what it is drawn, and what of it stands in the table of runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pldr_train.metrics.catalog import all_metrics

STEP, TOKENS = "step", "tokens"
"""The two axes; each line of a run has both."""

_LOWEST = frozenset({"loss", "cross_entropy", "perplexity", "block_nll", "sequential_nll"})
_HIGHEST = frozenset({"accuracy", "block_accuracy", "sequential_accuracy"})


def define_metrics(run: Any, num_layers: int) -> None:
    """Define every metric of a run: drawn over the step, for W&B knows one axis a metric; tokens can be chosen there.

    The step is W&B's own step as well, so that media have it, too.
    """
    run.define_metric(STEP)
    run.define_metric(TOKENS, step_metric=STEP)
    for group in metric_groups(num_layers):
        run.define_metric(f"{group}/*", step_metric=STEP)
    for name, summary in summaries(num_layers):
        run.define_metric(name, step_metric=STEP, summary=f"{summary},last")


def metric_groups(num_layers: int) -> list[str]:
    """The first parts of the metrics' names: train, val and so on."""
    return list(dict.fromkeys(info.name.partition("/")[0] for info in all_metrics(num_layers) if "/" in info.name))


def summaries(num_layers: int) -> Iterator[tuple[str, str]]:
    """Yield (metric, min or max) for those whose best value is kept beside the last one: losses and accuracies."""
    for info in all_metrics(num_layers):
        last_part = info.name.rpartition("/")[2]
        if last_part in _LOWEST or info.name.partition("/")[2].startswith("dag/"):
            yield info.name, "min"
        elif last_part in _HIGHEST:
            yield info.name, "max"
