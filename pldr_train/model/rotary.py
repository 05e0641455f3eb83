"""Rotary position embeddings in both pairings that PLDR-LLMs use, always in fp32."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_fp32(x: Tensor) -> Tensor:
    """x in fp32, or as it is where it is fp64: a model in fp64 computes in fp64 throughout."""
    return x if x.dtype == torch.float64 else x.float()


def rotary_cos_sin(position_ids: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotary angles.

    Nothing is kept in a buffer: a buffer would be cast with the model (to bf16 by FSDP or `.to()`) and would come back
    uninitialised from meta-device loading, while these few multiplications cost nothing.

    Args:
        position_ids: (B, S) or (1, S) integer positions.
        head_dim: width d of a head, even.
        theta: base of the frequencies theta^(-2i/d).

    Returns:
        cos and sin, each (B, 1, S, d/2) in fp32, ready to broadcast over heads.
    """
    exponents = torch.arange(0, head_dim, 2, device=position_ids.device, dtype=torch.float32) / head_dim
    # Written as the published models compute it: the last bit of a frequency is amplified by the power law stage.
    frequencies = 1.0 / torch.pow(theta, exponents)
    angles = position_ids[:, None, :, None].to(torch.float32) * frequencies
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotate the pairs of the last axis of x by the given angles.

    Args:
        x: (B, H, S, d) in any floating dtype; the rotation is computed in fp32 (fp64 for fp64) and returned in it.
        cos, sin: (B, 1, S, d/2) fp32, from `rotary_cos_sin`.
        interleaved: `True` pairs (0,1), (2,3), ... (`reference_rope`); `False` pairs (i, i + d/2).
    """
    if interleaved:
        first, second = x[..., 0::2], x[..., 1::2]
    else:
        first, second = x.chunk(2, dim=-1)
    rotated = (first * cos - second * sin, first * sin + second * cos)
    joined = torch.stack(rotated, dim=-1).flatten(-2) if interleaved else torch.cat(rotated, dim=-1)
    return joined.to(x.dtype)
