"""The metrics that every run writes, in one table: name, unit, cadence, and how steps and processes are combined.

Those of the deductive outputs have a name for each layer; `catalog.py` adds them.
"""

from __future__ import annotations

from dataclasses import dataclass

AT_LOG_STEPS, AT_VALIDATIONS, ON_REQUEST = "log steps", "validations", "each step, on request"


@dataclass(frozen=True)
class MetricInfo:
    """One metric of `metrics.jsonl`."""

    name: str
    unit: str
    reduction: str
    """Over the steps since the last line that has it, and over processes."""
    meaning: str
    cadence: str = AT_LOG_STEPS
    """When it is written."""


DAG_TENSORS = {
    "A_LM": "the positive metric",
    "A_P": "the potential",
    "G_LM": "the energy-curvature tensor",
}
WEIGHT_GROUPS = {
    "embedding": "the token embedding",
    "attention": "the projections of query, key, value and output",
    "metric_learner": "the network that turns the Gram matrix into A",
    "power_law": "W, b, P, a and b_a",
    "feed_forward": "the feed-forward GLUs",
    "norms": "the norms outside of the metric learner",
    "output_head": "the output head",
}
"""The groups of weights whose updates are measured."""


def _scores(prefix: str, over: str, cadence: str) -> tuple[MetricInfo, ...]:
    token_mean, row_mean = f"mean over the tokens of {over}", f"mean over layers, heads and sequences of {over}"
    rows = (
        ("loss", "nat/token", token_mean, "cross-entropy plus the weighted DAG losses"),
        ("cross_entropy", "nat/token", token_mean, "block cross-entropy of the next token"),
        ("perplexity", "1", token_mean, "exp of the block cross-entropy"),
        ("accuracy", "1", token_mean, "share of tokens that were the likeliest"),
        *(
            (f"dag/{name}", "nat", row_mean, f"DAG loss of {meaning}, unweighted")
            for name, meaning in DAG_TENSORS.items()
        ),
    )
    return tuple(
        MetricInfo(f"{prefix}/{name}", unit, reduction, meaning, cadence) for name, unit, reduction, meaning in rows
    )


_OWN, _OWN_OF_ALL = "the step's own", "the step's own, of all processes"
_SINCE = "over the steps since the last such line"
_TARGETS = "mean over the targets of the monitored rows"
_OF_RANK_0 = f"{_SINCE}, of rank 0"

METRICS: tuple[MetricInfo, ...] = (
    MetricInfo("step", "steps", "none", "optimizer steps done", "each line"),
    *_scores("train", "the steps since the last such line", AT_LOG_STEPS),
    MetricInfo("train/grad_norm", "1", _OWN_OF_ALL, "2-norm of the gradient before clipping"),
    MetricInfo("train/grad_norm_clipped", "1", _OWN_OF_ALL, "2-norm of the gradient after clipping"),
    *(
        MetricInfo(f"train/update_ratio/{group}", "1", _OWN_OF_ALL, f"2-norm of the update over that of {meaning}")
        for group, meaning in WEIGHT_GROUPS.items()
    ),
    MetricInfo("train/lr", "1", _OWN, "learning rate that the step was taken with"),
    MetricInfo(
        "train/nonfinite_steps", "steps", "sum", "steps whose loss or gradient was not finite, see trainer.on_nonfinite"
    ),
    *_scores("val", "the validation rows", AT_VALIDATIONS),
    *(
        MetricInfo(f"leakage/{name}", unit, reduction, meaning, AT_VALIDATIONS)
        for name, unit, reduction, meaning in (
            ("block_nll", "nat/token", _TARGETS, "NLL in one pass over the row"),
            ("sequential_nll", "nat/token", _TARGETS, "NLL of the same targets from the tokens before them alone"),
            ("gap", "nat/token", _TARGETS, "sequential less block NLL: what reading the future is worth"),
            ("gap_low", "nat/token", "over the monitored rows", "lower end of the gap's 95 % interval"),
            ("gap_high", "nat/token", "over the monitored rows", "upper end of the gap's 95 % interval"),
            ("block_accuracy", "1", _TARGETS, "share that was the likeliest in one pass over the row"),
            ("sequential_accuracy", "1", _TARGETS, "share that was the likeliest from the tokens before alone"),
            ("targets", "tokens", "sum", "targets scored both ways"),
        )
    ),
    MetricInfo("tokens", "tokens", "sum", "tokens trained on since the run's beginning, all processes"),
    MetricInfo("system/tokens_per_s", "tokens/s", _SINCE, "training throughput, all processes"),
    MetricInfo("system/tflops_per_s", "TFLOP/s", _SINCE, "the model's own FLOPs, all processes, PaLM's convention"),
    MetricInfo("system/mfu", "1", _SINCE, "share of the devices' peak that these are, where the peak is known"),
    MetricInfo("system/step_s_p50", "s", _OF_RANK_0, "median time of a step, waiting for data included"),
    MetricInfo("system/step_s_p95", "s", _OF_RANK_0, "time that 95 % of the steps stayed within"),
    MetricInfo("system/step_s_max", "s", _OF_RANK_0, "time of the slowest step"),
    MetricInfo("system/data_wait_s", "s", f"sum {_SINCE}", "time that training waited for data"),
    MetricInfo("system/data_wait_share", "1", _SINCE, "share of the time that training waited"),
    MetricInfo(
        "system/monitor_share", "1", _OF_RANK_0, "time spent on deductive metrics and leakage, over that of training"
    ),
    MetricInfo("system/host_memory_gib", "GiB", "the largest of all processes", "resident memory of a process"),
    MetricInfo(
        "system/gpu_memory_gib", "GiB", "the largest of all processes", f"peak of allocated GPU memory {_SINCE}"
    ),
    MetricInfo("data/documents", "documents", "sum", "documents begun since the run's beginning, all lanes and epochs"),
    *(
        MetricInfo(f"data/{name}", "documents", "sum", f"of these, {meaning}")
        for name, meaning in (
            ("null", "without any text"),
            ("empty", "with an empty text"),
            ("invalid_utf8", "with bytes that are no UTF-8, replaced by U+FFFD"),
            ("too_short", "left out by data.min_document_tokens"),
            ("too_long", "left out by data.max_document_tokens"),
            ("unreadable", "in parts that were skipped (data.on_bad_shard)"),
        )
    ),
    MetricInfo("data/batch_digest", "hash", _OWN, "BLAKE2 of the global batch's token ids", ON_REQUEST),
)
"""Every name without a layer's number that `metrics.jsonl` may hold, the deductive ones left out."""

TIMINGS = frozenset(info.name for info in METRICS if info.name.startswith("system/"))
"""The metrics that differ between two equal runs."""

GPU_ONLY = frozenset({"system/mfu", "system/gpu_memory_gib"})
"""Absent where there is no GPU (the first also where logging.peak_tflops is null and the GPU's peak is not known)."""
