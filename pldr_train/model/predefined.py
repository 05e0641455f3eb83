"""A predefined G at the start: constants of every layer in the published buffer."""

from __future__ import annotations

import torch
from torch import Tensor

from .configuration_pldrllm import PldrllmConfig

# Where G_LM lies along the second axis of the published (L, 3, 1, H, d, d) buffer of predefined outputs.
CURVATURE_SLOT = 2


def initial_predefined(config: PldrllmConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """Predefined outputs (L, 3, 1, H, d, d) and which layers are set (L,), before any are loaded.

    An external G that was never set is NaN; the forward pass refuses it.
    """
    layers, heads, width = config.num_hidden_layers, config.num_attention_heads, config.head_dim
    outputs = torch.zeros(layers, 3, 1, heads, width, width, device=device)
    curvature = outputs[:, CURVATURE_SLOT, 0]
    if config.custom_G_type == "identity":
        curvature.copy_(torch.eye(width, device=device).expand_as(curvature))
    elif config.custom_G_type == "random" and config.random_distribution == "normal":
        curvature.normal_()
    elif config.custom_G_type == "random":
        curvature.uniform_()
    else:
        curvature.fill_(torch.nan)
    is_set = torch.full((layers,), config.custom_G_type != "external", device=device)
    return outputs, is_set
