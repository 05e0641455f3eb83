"""Rotary embeddings against a rotation of complex numbers."""

from __future__ import annotations

import pytest
import torch

from pldr_train.model.rotary import rotary_cos_sin, rotate
from tests.unit.model_cases import small_model, token_ids


@pytest.mark.parametrize("interleaved", [True, False])
def test_rotation_multiplies_pairs_by_a_complex_phase(interleaved: bool) -> None:
    head_dim, theta = 16, 10_000.0
    x = torch.randn(2, 3, 50, head_dim)
    positions = torch.stack([torch.arange(50), torch.arange(950, 1000)])
    rotated = rotate(x, *rotary_cos_sin(positions, head_dim, theta, interleaved), interleaved=interleaved)

    pairs = x.double().unflatten(-1, (-1, 2)) if interleaved else x.double().unflatten(-1, (2, -1)).transpose(-1, -2)
    frequencies = torch.tensor([theta ** (-2 * i / head_dim) for i in range(head_dim // 2)], dtype=torch.float64)
    angles = positions[:, None, :, None] * frequencies
    product = torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angles), angles)
    expected = torch.view_as_real(product)
    expected = expected.flatten(-2) if interleaved else expected.transpose(-1, -2).flatten(-2)
    torch.testing.assert_close(rotated.double(), expected, rtol=0, atol=5e-4)
    torch.testing.assert_close(rotated[0, :, 0], x[0, :, 0])


def test_the_two_pairings_differ_by_a_permutation_of_the_axis() -> None:
    x = torch.randn(1, 2, 7, 8)
    even_odd = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    positions = torch.arange(7)[None]
    interleaved = rotate(x, *rotary_cos_sin(positions, 8, 10_000.0, True), interleaved=True)
    halves = rotate(x[..., even_odd], *rotary_cos_sin(positions, 8, 10_000.0, False), interleaved=False)
    assert torch.equal(interleaved[..., even_odd], halves)


def test_models_of_either_pairing_differ() -> None:
    ids = token_ids(1, 9)
    interleaved, halves = small_model(reference_rope=True), small_model(reference_rope=False)
    assert not torch.allclose(interleaved(ids).logits, halves(ids).logits, atol=1e-3)


@pytest.mark.parametrize("reference_rope", [True, False])
def test_positions_stay_exact_in_a_bf16_model(reference_rope: bool) -> None:
    # Attention depends on distances alone (G is the identity), so far positions give what near ones give; bf16
    # tables would round position 4,001 to 4,000.
    model = small_model(custom_G_type="identity", reference_rope=reference_rope).to(torch.bfloat16)
    ids, positions = token_ids(2, 12), torch.arange(12)[None]
    near = model(ids, position_ids=positions).logits.float()
    far = model(ids, position_ids=positions + 4_000).logits.float()
    torch.testing.assert_close(near, far, rtol=0, atol=0.06)
    shuffled = model(ids, position_ids=positions.flip(-1)).logits.float()
    assert float((near - shuffled).detach().abs().max()) > 0.2
