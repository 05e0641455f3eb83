"""What a run's last values say in words: whether it trains, whether it reads the future, how critical it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pldr_train.metrics import catalog
from pldr_train.metrics.catalog import MAX_GAP_NAT, gap_verdict
from pldr_train.metrics.layer_metrics import CACHED, CONTINUATIONS, DEDUCTIVE
from pldr_train.metrics.tensor_metrics import BoundedDifference, InputSensitivity, RowMapCollapse
from pldr_train.report.series import Series

GOOD, LOOK, BAD, PLAIN = "good", "look", "bad", "plain"
"""How a verdict is coloured; the last is no judgement."""

NOT_MEASURED = "not measured"
"""The words where there is nothing to judge."""

ROWS_ALIKE, ROWS_DIFFER = 0.01, 0.1
"""Row-map collapse of A: up to the first the rows are alike, from the second on they are not."""
INDEPENDENT, DEPENDENT = 0.02, 0.1
"""How much G_LM changes with the input, over its size: hardly, and clearly."""
_RISEN = 1.05
"""Of the validation cross-entropy over its lowest."""
_ON_INPUT = {
    "input sensitivity": f"{DEDUCTIVE}/G_LM/{InputSensitivity.name}",
    "order parameter": f"{CONTINUATIONS}/G_LM/{BoundedDifference.name}",
    "cached order parameter": f"{CACHED}/G_LM/{BoundedDifference.name}",
}
_COLLAPSE = f"{DEDUCTIVE}/A/{RowMapCollapse.name}"
_FACTS = {
    "training": (catalog.TRAIN_CROSS_ENTROPY, catalog.TRAIN_LOSS),
    "validation": (catalog.VAL_CROSS_ENTROPY, catalog.VAL_LOSS),
    "gap": (catalog.GAP,),
    "gap_low": (catalog.GAP_LOW,),
    "gap_high": (catalog.GAP_HIGH,),
    "tokens_per_s": (catalog.TOKENS_PER_S,),
    "mfu": (catalog.MFU,),
    "nonfinite_steps": (catalog.NONFINITE_STEPS,),
    "tokens": (catalog.TOKENS,),
}
"""The numbers of the card, and the metrics that give them: the first that the run has, else the last."""
_AT_VALIDATIONS = ("validation", "gap")
"""Those whose change since the validation before is said."""


@dataclass(frozen=True)
class Verdict:
    """One judgement: `state` is GOOD, LOOK, BAD or PLAIN."""

    name: str
    state: str
    words: str
    detail: str = ""


def health_of(series: Mapping[str, Series], recipe: Mapping[str, str]) -> dict[str, Any]:
    """Return the health card: `state`, the worst of all, the `verdicts`, and the `metrics` of its numbers."""
    verdicts = [training_verdict(series), leakage_verdict(series, recipe), criticality_verdict(series, recipe)]
    states = {each.state for each in verdicts}
    worst = next((state for state in (BAD, LOOK, GOOD) if state in states), PLAIN)
    metrics = {fact: next((name for name in names if name in series), names[-1]) for fact, names in _FACTS.items()}
    changes = {fact: change_of(series, metrics[fact]) for fact in _AT_VALIDATIONS}
    return {
        "state": worst,
        "verdicts": [asdict(each) for each in verdicts],
        "metrics": metrics,
        "changes": {fact: change for fact, change in changes.items() if change is not None},
    }


def change_of(series: Mapping[str, Series], name: str) -> dict[str, Any] | None:
    """Return how a metric differs from its value at the validation before; None where there are not two.

    `difference`, `since` the step of the earlier, and `is_good` by the metric's declaration (None: no direction is).
    """
    found = series.get(name)
    last, before = (None, None) if found is None else (found.last, found.before_last)
    if last is None or before is None:
        return None
    difference = last[1] - before[1]
    best = next((info.best for info in catalog.all_metrics(0) if info.name == name), None)
    is_good = None if best is None or difference == 0 else (difference < 0) == (best == "min")
    return {"difference": difference, "since": int(before[0]), "is_good": is_good}


def training_verdict(series: Mapping[str, Series]) -> Verdict:
    """Return whether the loss is finite, and whether the validation gets better."""
    name = "Training"
    loss = series.get(catalog.TRAIN_LOSS)
    if loss is None or (loss.last is None and not loss.nonfinite_count):
        return Verdict(name, PLAIN, "no loss yet")
    if loss.last is None or (loss.nonfinite_steps and loss.nonfinite_steps[-1] > loss.last[0]):
        return Verdict(name, BAD, "the last loss is not finite")
    skipped = _last(series, catalog.NONFINITE_STEPS)
    if skipped:
        return Verdict(name, LOOK, f"{skipped:,.0f} {'step was' if skipped == 1 else 'steps were'} not finite")
    validation = series.get(catalog.VAL_CROSS_ENTROPY) or series.get(catalog.VAL_LOSS)
    last = None if validation is None else validation.last
    if validation is None or last is None:
        return Verdict(name, GOOD, "the loss is finite, no validation yet")
    return _validation_verdict(name, series, validation, last)


def _validation_verdict(
    name: str, series: Mapping[str, Series], validation: Series, last: tuple[float, float]
) -> Verdict:
    """Return whether the validation has risen, else its change since the one before."""
    lowest = float(validation.buckets().low.min())
    if lowest > 0 and last[1] > _RISEN * lowest:
        return Verdict(
            name, LOOK, f"validation has risen by {last[1] / lowest - 1:.0%}", f"from its lowest, {_figure(lowest)}"
        )
    where = "at its lowest" if last[1] <= lowest else f"within {_RISEN - 1:.0%} of its lowest"
    measured = catalog.VAL_CROSS_ENTROPY if catalog.VAL_CROSS_ENTROPY in series else catalog.VAL_LOSS
    change = change_of(series, measured)
    if change is None or change["is_good"] is None:
        return Verdict(name, GOOD, f"the loss is finite, validation {where}")
    how = "better" if change["is_good"] else "worse"
    words = f"validation {how} by {_figure(abs(change['difference']))} since step {change['since']:,}"
    return Verdict(name, GOOD, words, where)


def leakage_verdict(series: Mapping[str, Series], recipe: Mapping[str, str]) -> Verdict:
    """Return whether the model reads the future, by the ends of the gap's interval."""
    name = "Leakage"
    gap = series.get(catalog.GAP)
    if gap is None or gap.last is None:
        unusable = gap is not None and gap.nonfinite_count
        return Verdict(name, LOOK if unusable else PLAIN, "the gap is not finite" if unusable else NOT_MEASURED)
    if gap.nonfinite_steps and gap.nonfinite_steps[-1] > gap.last[0]:
        return Verdict(name, LOOK, "undecided: the last gap is not finite")
    most = _most_gap(recipe)
    low, high = (_last_at(series, end, gap.last[0]) for end in (catalog.GAP_LOW, catalog.GAP_HIGH))
    if low is None or high is None:
        return Verdict(name, LOOK, f"undecided: gap {_figure(gap.last[1])} nat/token without an interval")
    interval = f"gap {_figure(gap.last[1])} [{_figure(low)}, {_figure(high)}] nat/token"
    targets = _last(series, catalog.LEAKAGE_TARGETS)
    interval += "" if targets is None else f", {targets:,.0f} targets"
    verdict = gap_verdict(low, high, most)
    if verdict == "leaks":
        block, sequential = (_last(series, name) for name in (catalog.BLOCK_NLL, catalog.SEQUENTIAL_NLL))
        values = "" if block is None or sequential is None else f": block {_figure(block)}, "
        values += "" if block is None or sequential is None else f"sequential {_figure(sequential)} nat/token"
        return Verdict(name, BAD, f"reads the future{values}", interval)
    if verdict != "undecided":
        return Verdict(name, GOOD, "no leakage", interval)
    return Verdict(name, LOOK, "undecided", f"{interval}, limit {_figure(most)}")


def criticality_verdict(series: Mapping[str, Series], recipe: Mapping[str, str]) -> Verdict:
    """Return whether the operator depends on the input: the rows of A, and how much G_LM changes."""
    name = "Operator"
    if recipe.get("model.custom_G_type", "learned") not in ("learned", "null"):
        return Verdict(name, PLAIN, "predefined G: the same for every input")
    rows = _last(series, _COLLAPSE)
    changes = {words: value for words, metric in _ON_INPUT.items() if (value := _last(series, metric)) is not None}
    if rows is None and not changes:
        return Verdict(name, PLAIN, NOT_MEASURED)
    # The largest of them: continuations of one prompt share most of their text, rows of a batch nothing.
    word, change = max(changes.items(), key=lambda each: each[1], default=("", 0.0))
    found = [] if rows is None else [f"row-map collapse of A {_figure(rows)}"]
    found += [f"G_LM changes by {_figure(change)} of its size ({word})"] if changes else []
    detail = "; ".join(found)
    if (rows is not None and rows >= ROWS_DIFFER) or change >= DEPENDENT:
        return Verdict(name, PLAIN, "depends on the input", detail)
    if rows is not None and rows <= ROWS_ALIKE and changes and change <= INDEPENDENT:
        return Verdict(name, GOOD, "near-critical: hardly depends on the input", detail)
    return Verdict(name, PLAIN, "between near-critical and depending on the input", detail)


def _most_gap(recipe: Mapping[str, str]) -> float:
    try:
        return float(recipe["monitor.max_gap"])
    except (KeyError, ValueError):
        return MAX_GAP_NAT


def _last(series: Mapping[str, Series], name: str) -> float | None:
    found = series.get(name)
    return None if found is None or found.last is None else found.last[1]


def _last_at(series: Mapping[str, Series], name: str, step: float) -> float | None:
    """Return the last value, unless it belongs to another step."""
    found = series.get(name)
    return found.last[1] if found is not None and found.last is not None and found.last[0] == step else None


def _figure(value: float) -> str:
    return f"{value:.3g}"
