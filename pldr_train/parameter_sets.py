"""Sets of a PLDR-LLM's parameters that recipes can name, and patterns over parameter names.

A name is one of `model.named_parameters()` of `PldrllmForCausalLM`, such as
`decoder.layers.0.attention.power_law.coupling`. A pattern is the name of a set, or a shell pattern over names, in which
`*` also matches dots. Sets overlap: the bias of a LayerNorm of the metric learner is in `generator`, `metric_learner`,
`norms` and `biases`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

_UNITS = "*.metric_learner.residual_units.*"
_POWER_LAW = "*.power_law.*"
_GENERATOR = (_UNITS, _POWER_LAW)

_PATTERNS: Mapping[str, tuple[str, ...]] = {
    "generator": _GENERATOR,
    "metric_learner": (_UNITS,),
    "power_law": (_POWER_LAW,),
    "embedding": ("*.embed_tokens.*",),
    "norms": ("*_norm.weight", "*_norm.bias"),
    "biases": ("*.bias",),
    "attention": tuple(f"*.attention.{part}.*" for part in ("query", "key", "value", "output")),
    "feed_forward": ("*.feed_forward.*",),
    "output_head": ("lm_head.*",),
}

SETS: Mapping[str, str] = {
    "generator": "the metric learner's residual units and the power law: what the monograph calls the generator",
    "body": "everything that is not in generator, the LayerNorm of the Gram included: the monograph's body",
    "metric_learner": "the residual units with their LayerNorms, without the LayerNorm of the Gram",
    "power_law": "W, b, P, a and b_a",
    "embedding": "the token embedding, without the LayerNorm after it",
    "norms": "weight and bias of every LayerNorm, those of the metric learner included",
    "biases": "the bias of every Linear and LayerNorm; not b and b_a of the power law, which are matrices",
    "attention": "the projections of queries, keys, values and output, with their biases",
    "feed_forward": "the decoder's feed-forward GLUs, without their LayerNorms",
    "output_head": "weight and bias of the head that gives the logits",
}
"""What is in each set, by its name."""


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Return whether a parameter is in one of the sets, or fits one of the patterns over names."""
    return any(_matches_one(name, pattern) for pattern in patterns)


def unmatched(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """Return the patterns that no name matches, in their order."""
    known = list(names)
    return [pattern for pattern in patterns if not any(_matches_one(name, pattern) for name in known)]


def _matches_one(name: str, pattern: str) -> bool:
    if pattern == "body":
        return not _matches_one(name, "generator")
    return any(fnmatchcase(name, each) for each in _PATTERNS.get(pattern, (pattern,)))
