"""The published runs that recipes repeat, and what their papers report; free of torch.

Sources: arXiv 2410.16703 (v5), 2502.13502 (v51), 2603.23539 (SOC: hyper-parameters table 1, losses, zero-shot scores
table 7, order parameters table 13), the author's scripts and model cards.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean

ZERO_SHOT_TASKS = (
    "arc_easy", "hellaswag", "openbookqa", "piqa", "social_iqa", "winogrande", "arc_challenge", "truthfulqa_mc2",
)  # fmt: skip
"""In the order of the SOC paper's table: the mean of the first six is Avg0, of seven Avg1, of all Avg2."""

PAPER_METRICS: Mapping[str, str] = dict.fromkeys(ZERO_SHOT_TASKS, "acc_norm") | {"truthfulqa_mc2": "acc"}
"""The metric of lm-evaluation-harness that the SOC paper's table gives; `acc` of truthfulqa_mc2 is mc2."""

V5, V51, SOC = "arXiv 2410.16703", "arXiv 2502.13502", "arXiv 2603.23539"


@dataclass(frozen=True)
class Results:
    """What a paper reports of a run at its end."""

    block_loss: float
    """nat/token, in one pass over a block."""
    accuracy: float
    """Share of tokens that were the likeliest."""
    order_parameter: float
    """Of G_LM, a cached against an uncached run: RMSE over |mean|."""
    zero_shot: tuple[float, ...]
    """acc_norm in per cent of ZERO_SHOT_TASKS; mc2 of the last."""

    def average(self, number: int) -> float:
        """Return Avg0, Avg1 or Avg2, in per cent; the paper's own, of unrounded scores, differ by 0.01 at most."""
        return fmean(self.zero_shot[: 6 + number])


@dataclass(frozen=True)
class PublishedRun:
    """A run of a paper, a script or a model card, by the name of the recipe that repeats it."""

    title: str
    source: str
    regime: str = ""
    results: Results | None = None
    assumed: str = ""
    """What of the recipe is not published."""
    before: str = ""
    """A command that makes a file which the recipe needs."""


def _soc(title: str, regime: str, results: Results, assumed: str = "") -> PublishedRun:
    return PublishedRun(title, f"{SOC}, tables 1, 7 and 13", regime, results, assumed)


_NEAR, _SUB = "near-critical", "sub-critical"
_G_SCRIPT = f"the author's v51G script ({V51})"
_RANKS = "the number of ranks (two are assumed); precision"

PUBLISHED_RUNS: Mapping[str, PublishedRun] = {
    "soc-110m-1": _soc("PLDR-LLM-SOC-110M-1", _NEAR, Results(
        3.606, 0.356, 2.19e-2, (36.15, 28.65, 27.00, 61.43, 41.66, 50.83, 22.95, 44.59))),
    "soc-110m-2": _soc("PLDR-LLM-SOC-110M-2", _NEAR, Results(
        3.505, 0.365, 1.25e-5, (36.87, 29.27, 26.20, 62.79, 41.91, 52.41, 20.99, 44.33))),
    "soc-110m-3": _soc("PLDR-LLM-SOC-110M-3", _NEAR, Results(
        3.546, 0.362, 5.13e-4, (36.99, 28.99, 27.20, 62.08, 42.17, 49.80, 21.76, 44.17))),
    "soc-110m-4": _soc("PLDR-LLM-SOC-110M-4", _NEAR, Results(
        3.498, 0.366, 9.20e-6, (36.83, 29.13, 29.20, 61.37, 41.66, 50.59, 21.50, 44.33))),
    "soc-110m-5": _soc("PLDR-LLM-SOC-110M-5", _NEAR, Results(
        3.453, 0.372, 0.0, (38.55, 30.55, 29.80, 63.98, 43.09, 49.72, 22.95, 43.00)),
        assumed="the number of steps: 41 billion tokens are published"),
    "sub-110m-1": _soc("SUB-1", _SUB, Results(
        1.266, 0.697, 15.8, (24.07, 26.03, 26.00, 51.63, 36.80, 48.38, 26.79, 48.91))),
    "sub-110m-2": _soc("SUB-2", _SUB, Results(
        0.200, 0.946, 46.9, (25.38, 25.93, 25.20, 51.25, 35.57, 49.49, 25.26, 48.07))),
    "abl-110m-1": _soc("ABL-1", f"{_NEAR}, with a spike of the loss", Results(
        3.41, 0.385, 184.0, (33.00, 26.88, 27.60, 55.50, 40.79, 51.30, 22.44, 44.66))),
    "abl-110m-2": _soc("ABL-2", f"{_SUB}, with a spike of the loss", Results(
        0.347, 0.907, 44.4, (24.87, 26.03, 26.60, 51.85, 36.80, 50.04, 24.91, 50.41))),
    "abl-110m-3": _soc("ABL-3", f"{_SUB}, with a spike of the loss", Results(
        2.164, 0.549, 18.2, (25.46, 25.45, 28.20, 52.45, 36.54, 49.80, 28.16, 48.42))),
    "v51-110m": PublishedRun("PLDR-LLM-v51-110M", f"the author's sample script ({V51})"),
    "v51-dag-110m": PublishedRun("PLDR-LLM-v51-DAG-110M", f"the author's DAG script ({V51})"),
    "v51g-identity": PublishedRun("PLDR-LLM-v51G with the identity", _G_SCRIPT),
    "v51g-random": PublishedRun("PLDR-LLM-v51G with a random normal G", _G_SCRIPT),
    "v51g-transferred": PublishedRun(
        "PLDR-LLM-v51G with the G of a trained v51-110M-1", _G_SCRIPT, assumed="the text that G is taken on",
        before="pldr-train extract-g runs/v51-110m runs/v51-110m/g.safetensors --text-file TEXT"),
    "v52-110m-1": PublishedRun(
        "PLDR-LLM-v52-110M-1", "the model's card on the Hub",
        assumed="the interval of documents; the schedule's length"),
    "v5-104m": PublishedRun("PLDR-LLM-v5-1-104M", f"the author's scripts ({V5})", assumed=_RANKS),
    "v5-260m": PublishedRun("PLDR-LLM-v5-4-260M", f"the author's scripts ({V5})", assumed=_RANKS),
    "v5-dag-110m": PublishedRun("PLDR-LLM-v5-DAG-110M", f"the author's DAG script ({V5})", assumed=_RANKS),
    "row-study": PublishedRun(
        "The row study", "the author's training-dynamics code", "lr 1e-3: the row map collapses",
        assumed="the intervals of documents"),
    "controlled": PublishedRun(
        "The controlled study of the generator's rate", "the author's training-dynamics code",
        assumed="the intervals of documents; the study cuts each document of 512 tokens into 8 blocks of 65, the "
        "recipe packs rows of 64 and their target"),
}  # fmt: skip
"""By the recipe's name."""

PUBLISHED_AUDITS: Mapping[str, Mapping[str, str]] = {
    "soc-110m-5": {
        "A_rank": "1 everywhere", "A_second": "median 9e-17, at most 1.3e-8", "A_LM_rank": "1 to 64, median 62.5",
        "commutant": "0.421 / 0.807 / 0.993", "row_map": "median 4.9e-12, at most 3.6e-7",
        "unit": "median 0.47, at most 20.8", "dag_A_LM": "0 / 3.6e-10 / 6.1e-5", "dag_A_P": "63 / 1,120 / 41,461",
        "dag_G_LM": "4.9 / 1,268 / 28,174",
        "decoding": "G 0, logits at most 3.6e-5, every choice the same, margin 0.006",
        "suffix": "G 0", "candidates": "at most 3.3e-6",
        "gap": "sequential NLL 3.479446 on wikitext-2, at most 2.4e-5 per token",
    },
    "soc-110m-1": {
        "suffix": "G at most 0.0305, logits 1e-4 to 9e-4", "candidates": "at most 2.2e-4",
        "gap": "sequential NLL 3.684879 on wikitext-2, at most 2.8e-3 per token",
    },
}  # fmt: skip
"""What the author's audits of published models found, by recipe and by the names of `models/auditing.py`: of eight
prompts of 32 to 43 tokens, in fp32; three figures are least / median / largest."""


ORDER_TENSORS = ("A", "A_LM", "A_P", "G_LM")
ORDER_PARAMETERS: Mapping[str, tuple[tuple[float, float], ...]] = {
    "soc-110m-1": ((8.5e-3, 8.3e-3), (7.5e-4, 6.9e-4), (6.6e-4, 9.5e-4), (1.82e-2, 2.19e-2)),
    "soc-110m-2": ((4.2e-6, 4.4e-6), (7.8e-7, 8.6e-7), (1.0e-7, 1.0e-7), (1.27e-5, 1.25e-5)),
    "soc-110m-3": ((1.4e-4, 1.8e-4), (6.4e-7, 8.2e-7), (2.9e-6, 3.2e-6), (4.6e-4, 5.1e-4)),
    "soc-110m-4": ((1.3e-6, 1.3e-6), (1.8e-7, 1.9e-7), (3.7e-8, 3.6e-8), (9.4e-6, 9.2e-6)),
    "soc-110m-5": ((3.5e-11, 4.2e-11), (1.1e-12, 1.3e-12), (0.0, 0.0), (0.0, 0.0)),
    "sub-110m-1": ((2.89, 3.03), (3.63, 3.66), (0.179, 0.335), (8.74, 15.8)),
    "sub-110m-2": ((7.15, 14.7), (3.28, 7.78), (1.40, 1.98), (35.0, 46.9)),
    "abl-110m-1": ((7.84, 10.0), (12.4, 14.9), (6.08, 8.57), (133.0, 184.0)),
    "abl-110m-2": ((4.54, 5.04), (2.87, 3.24), (0.357, 1.09), (12.4, 44.4)),
    "abl-110m-3": ((256.0, 3794.0), (3.94, 7.79), (0.262, 0.675), (6.83, 18.2)),
}
"""RMSE(x1, x2) / |mean x1| and RMSE(x1, xc) / |mean xc| of ORDER_TENSORS, the SOC paper's table 13."""


def published_as(name: str) -> str | None:
    """Return the recipe of the published run that a model's name or folder names; None if it names none."""
    plain = name.lower()

    def names(text: str) -> bool:
        return re.search(rf"(?<![a-z0-9]){re.escape(text.lower())}(?![a-z0-9])", plain) is not None

    found = [recipe for recipe, run in PUBLISHED_RUNS.items() if names(recipe) or names(run.title)]
    return max(found, key=len, default=None)
