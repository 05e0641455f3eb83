"""The hidden-class task: rows whose one uncertain token no causal model can predict, and a leaking model can.

A row is four fixed tokens and then one of `num_classes` class tokens, repeated to the end. The first class token is
uniform given what comes before it, so its NLL is at least ln(num_classes); a model that sees later tokens reads it off.
"""

from __future__ import annotations

import torch
from torch import Tensor

FIXED_IDS = (6, 7, 8, 9)
FIRST_CLASS_ID = 10
CLASS_POSITION = len(FIXED_IDS)
"""Position of the first class token in a row."""


def hidden_class_rows(num_rows: int, context_length: int, generator: torch.Generator, num_classes: int = 8) -> Tensor:
    """Rows (num_rows, context_length + 1) int64 of the task; the vocabulary needs FIRST_CLASS_ID + num_classes ids.

    Args:
        num_rows: how many.
        context_length: at least 5, so that the class comes again after its first token.
        generator: of the classes, on the CPU.
        num_classes: how many there are, equally likely.
    """
    assert context_length > CLASS_POSITION
    classes = FIRST_CLASS_ID + torch.randint(num_classes, (num_rows, 1), generator=generator)
    fixed = torch.tensor(FIXED_IDS).expand(num_rows, -1)
    return torch.cat((fixed, classes.expand(-1, context_length + 1 - CLASS_POSITION)), dim=1)
