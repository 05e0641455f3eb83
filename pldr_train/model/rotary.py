"""Rotary position embeddings in both pairings that PLDR-LLMs use, always in fp32."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_fp32(x: Tensor) -> Tensor:
    """x in fp32, or as it is where it is fp64: a model in fp64 computes in fp64 throughout."""
    return x if x.dtype == torch.float64 else x.float()


def rotary_cos_sin(position_ids: Tensor, head_dim: int, theta: float, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Cosine and signed sine of the rotary angles, laid out for `rotate` with the same pairing.

    Nothing is kept in a buffer: a buffer would be cast with the model (to bf16 by FSDP or `.to()`) and would come back
    uninitialised from meta-device loading, while these few multiplications cost nothing.

    Args:
        position_ids: (B, S) or (1, S) integer positions.
        head_dim: width d of a head, even.
        theta: base of the frequencies theta^(-2i/d).
        interleaved: `True` pairs (0,1), (2,3), ... (`reference_rope`); `False` pairs (i, i + d/2).

    Returns:
        cos and sin, each (B, 1, S, d) in fp32, ready to broadcast over heads; the sine is negative where an element
        is the first of its pair.
    """
    exponents = torch.arange(0, head_dim, 2, device=position_ids.device, dtype=torch.float32) / head_dim
    # Written as the published models compute it: the last bit of a frequency is amplified by the power law stage.
    frequencies = 1.0 / torch.pow(theta, exponents)
    angles = position_ids[:, None, :, None].to(torch.float32) * frequencies
    cos, sin = angles.cos(), angles.sin()
    pair_axis = -1 if interleaved else -2
    return torch.stack((cos, cos), pair_axis).flatten(-2), torch.stack((-sin, sin), pair_axis).flatten(-2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotate the pairs of the last axis of x: (a, b) -> (a cos - b sin, b cos + a sin).

    Args:
        x: (B, H, S, d) in any floating dtype; the rotation is computed in fp32 (fp64 for fp64) and returned in it.
        cos, sin: (B, 1, S, d) fp32, from `rotary_cos_sin`.
        interleaved: the pairing, as given to `rotary_cos_sin`.
    """
    # Each element's partner; a roll costs a fraction of slicing the pairs apart and stacking them again.
    partner = x.view(*x.shape[:-1], -1, 2).roll(1, -1).flatten(-2) if interleaved else x.roll(x.shape[-1] // 2, -1)
    return (x * cos + partner * sin).to(x.dtype)
