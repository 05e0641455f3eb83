"""Small models for the unit tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pldr_train.model import PldrllmConfig, PldrllmForCausalLM

VOCAB_SIZE = 40


def small_config(**overrides: Any) -> PldrllmConfig:
    """2 layers x 2 heads x d 8, 2 residual units of 2 GLUs."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "head_dim": 8,
        "num_reslayerA": 2,
        "num_denseA": 2,
    }
    return PldrllmConfig(**(sizes | overrides))


def small_model(seed: int = 0, attention: str = "sdpa", **overrides: Any) -> PldrllmForCausalLM:
    """A model in eval mode; the same seed gives the same weights."""
    torch.manual_seed(seed)
    return PldrllmForCausalLM._from_config(small_config(**overrides), attn_implementation=attention).eval()


def token_ids(batch: int, length: int, seed: int = 1) -> Tensor:
    """Ids (batch, length) without the special ones."""
    return torch.randint(4, VOCAB_SIZE, (batch, length), generator=torch.Generator().manual_seed(seed))
