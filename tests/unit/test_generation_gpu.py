"""Generation on a CUDA device: the same tokens as on the CPU, compiled decoding, flash attention where installed."""

from __future__ import annotations

import pytest
import torch
from transformers.utils import is_flash_attn_2_available

from tests.unit.model_cases import small_model, token_ids

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
KINDS = pytest.mark.parametrize("kind", [None, "identity", "random"], ids=["learned", "identity", "random"])
GREEDY = {"do_sample": False, "max_new_tokens": 12}


@KINDS
def test_the_device_gives_the_tokens_of_the_cpu(kind: str | None) -> None:
    model, ids = small_model(custom_G_type=kind).double(), token_ids(2, 6)
    model.generation_config.eos_token_id = None
    expected = model.generate(ids, **GREEDY)
    assert torch.equal(model.cuda().generate(ids.cuda(), **GREEDY).cpu(), expected)


@KINDS
@pytest.mark.slow
def test_compiled_decoding_with_a_static_cache_gives_the_same_tokens(kind: str | None) -> None:
    model, ids = small_model(custom_G_type=kind).cuda(), token_ids(2, 6).cuda()
    model.generation_config.eos_token_id = None
    expected = model.generate(ids, **GREEDY)
    for prompt in (ids, ids):
        # On a GPU transformers compiles by itself where the cache allows it.
        assert torch.equal(model.generate(prompt, cache_implementation="static", **GREEDY), expected)


@KINDS
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.skipif(not is_flash_attn_2_available(), reason="needs flash-attn")
@torch.no_grad()
def test_flash_attention_agrees_with_sdpa_under_padding(kind: str | None, side: str) -> None:
    overrides = {"custom_G_type": kind, "hidden_size": 128, "head_dim": 64}
    model = small_model(**overrides).to("cuda", torch.bfloat16)
    ids = token_ids(2, 16).cuda()
    mask = torch.ones_like(ids)
    mask[1, slice(0, 6) if side == "left" else slice(10, 16)] = 0
    expected = model(ids, attention_mask=mask, use_cache=False).logits
    model.set_attn_implementation("flash_attention_2")
    logits = model(ids, attention_mask=mask, use_cache=False).logits
    real = mask.bool()
    torch.testing.assert_close(logits[real], expected[real], rtol=0.05, atol=0.05)
