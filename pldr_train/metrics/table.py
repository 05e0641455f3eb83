"""The metrics that a run writes, in one table: name, unit, and how steps and processes are combined."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MetricInfo:
    """One metric of `metrics.jsonl`."""

    name: str
    unit: str
    reduction: str
    """Over the steps since the last line that has it, and over processes."""
    meaning: str


_DEDUCTIVE = {
    "A_LM": "the positive metric",
    "A_P": "the potential",
    "G_LM": "the energy-curvature tensor",
}


def _scores(prefix: str, over: str) -> tuple[MetricInfo, ...]:
    token_mean, row_mean = f"mean over the tokens of {over}", f"mean over layers, heads and sequences of {over}"
    return (
        MetricInfo(f"{prefix}/loss", "nat/token", token_mean, "cross-entropy plus the weighted DAG losses"),
        MetricInfo(f"{prefix}/cross_entropy", "nat/token", token_mean, "block cross-entropy of the next token"),
        MetricInfo(f"{prefix}/accuracy", "1", token_mean, "share of tokens that were the likeliest"),
        *(
            MetricInfo(f"{prefix}/dag/{name}", "nat", row_mean, f"DAG loss of {meaning}, unweighted")
            for name, meaning in _DEDUCTIVE.items()
        ),
    )


METRICS: tuple[MetricInfo, ...] = (
    MetricInfo("step", "steps", "none", "optimizer steps done"),
    *_scores("train", "the steps since the last such line"),
    MetricInfo("train/grad_norm", "1", "the step's own, of all processes", "2-norm of the gradient before clipping"),
    MetricInfo(
        "train/grad_norm_clipped", "1", "the step's own, of all processes", "2-norm of the gradient after clipping"
    ),
    MetricInfo(
        "train/nonfinite_steps", "steps", "sum", "steps whose loss or gradient was not finite, see trainer.on_nonfinite"
    ),
    *_scores("val", "the validation rows"),
    MetricInfo("lr", "1", "the step's own", "learning rate that the step was taken with"),
    MetricInfo("tokens", "tokens", "sum", "tokens trained on since the run's beginning, all processes"),
    MetricInfo(
        "tokens_per_s", "tokens/s", "over the steps since the last such line", "training throughput, all processes"
    ),
    MetricInfo("data_wait_s", "s", "sum over the steps since the last such line", "time that training waited for data"),
    MetricInfo(
        "data_wait_share", "1", "over the steps since the last such line", "share of the time that training waited"
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
    MetricInfo("data/batch_digest", "hash", "the step's own", "BLAKE2 of the global batch's token ids, on request"),
)
"""Every name that `metrics.jsonl` may hold."""

TIMINGS = frozenset({"tokens_per_s", "data_wait_s", "data_wait_share"})
"""The metrics that differ between two equal runs."""
