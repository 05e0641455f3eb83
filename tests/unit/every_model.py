"""Every class with every kind of G, as small models for the tests that all of them must pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pldr_train.model import (
    PldrllmForCausalLM,
    PldrllmForQuestionAnswering,
    PldrllmForSequenceClassification,
    PldrllmForTokenClassification,
    PldrllmModel,
)
from tests.unit.model_cases import small_config

CLASSES = {
    "decoder": PldrllmModel,
    "language": PldrllmForCausalLM,
    "sequence": PldrllmForSequenceClassification,
    "token": PldrllmForTokenClassification,
    "answer": PldrllmForQuestionAnswering,
}
GRAMS: dict[str, dict[str, Any]] = {
    "learned": {},
    "causal": {"gram_chunk_size": 4},
    "identity": {"custom_G_type": "identity"},
    "random": {"custom_G_type": "random"},
}
EVERY_CLASS = pytest.mark.parametrize("model_class", CLASSES.values(), ids=CLASSES)
EVERY_GRAM = pytest.mark.parametrize("gram", GRAMS.values(), ids=GRAMS)
# Of a learned G, the G of a cache is that of its first pass, so going on differs from computing all anew.
AS_RECOMPUTED = pytest.mark.parametrize("gram", [GRAMS[name] for name in ("causal", "identity", "random")])


def make(model_class: type, **overrides: Any) -> Any:
    """A small model in eval mode, the same at every call."""
    torch.manual_seed(0)
    model = model_class(small_config(num_labels=3, **overrides)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("power_exponent"):
                parameter.mul_(0.1)  # as small as in wide heads: narrow ones let rounding grow with a causal Gram
    return model


def main_output(outputs: Any) -> Tensor:
    """Hidden states, logits or scores, whichever the model is there for."""
    for name in ("logits", "start_logits", "last_hidden_state"):
        if name in outputs:
            tensor: Tensor = outputs[name]
            return tensor
    raise AssertionError(f"none among {list(outputs)}")


def run(model: Any, ids: Tensor, **options: Any) -> Tensor:
    with torch.no_grad():
        return main_output(model(ids, **options)).clone()


def greedy(model: PldrllmForCausalLM, ids: Tensor | None = None, **options: Any) -> Tensor:
    generated: Tensor = model.generate(ids, **({"max_new_tokens": 8, "do_sample": False, "eos_token_id": -1} | options))
    return generated
