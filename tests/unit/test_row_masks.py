"""Rows that hold padding or several documents: what a document's logits depend on."""

import pytest
import torch

from pldr_train.model import PldrllmConfig, PldrllmForCausalLM
from pldr_train.recipe import recipe_from_dict
from pldr_train.training.module import PldrllmModule
from pldr_train.training.objective import document_positions, padding_mask

END = 3
FIRST, SECOND = [10, 11, 12, 13, END], [20, 21, 22, END]


def module_of(custom_G_type=None, attention="sdpa", **data):
    recipe = recipe_from_dict({"run": {"name": "x"}, "data": {"source": "quickstart", "num_workers": 0, **data}})
    config = PldrllmConfig(
        vocab_size=300, hidden_size=32, num_attention_heads=2, head_dim=16, num_hidden_layers=2, A_dff=20,
        num_reslayerA=1, custom_G_type=custom_G_type, attn_implementation=attention,
    )  # fmt: skip
    torch.manual_seed(1)
    return PldrllmModule(recipe, PldrllmForCausalLM(config)).eval()


@torch.no_grad()
def logits(module, *rows):
    return module(torch.tensor(rows)).logits


def test_positions_begin_anew_after_every_eos():
    ids = torch.tensor([[*FIRST, *SECOND, 30], [END, END, 40, 41, END, 42, END, END, 43, 44]])
    assert document_positions(ids).tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 0], [0, 0, 0, 1, 2, 0, 1, 0, 0, 1]]


def test_padding_is_id_0():
    assert padding_mask(torch.tensor([[5, END, 0, 0]])).tolist() == [[1, 1, 0, 0]]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("custom_G_type", ["identity", "random"])
def test_documents_kept_apart_have_the_logits_that_they_have_alone(custom_G_type, attention):
    module = module_of(custom_G_type, attention, document_mask=True)
    together = logits(module, [*FIRST, *SECOND])[0]
    assert torch.allclose(together[:5], logits(module, FIRST)[0], atol=1e-5)
    assert torch.allclose(together[5:], logits(module, SECOND)[0], atol=1e-5)
    mixed = logits(module_of(custom_G_type, attention), [*FIRST, *SECOND])[0]
    assert not torch.allclose(mixed[5:], together[5:], atol=1e-3)


def test_the_gram_of_learned_g_still_sums_over_the_documents_of_a_row():
    module = module_of(document_mask=True)
    one, other = logits(module, [*FIRST, *SECOND]), logits(module, [50, 51, 52, 53, END, *SECOND])
    assert not torch.allclose(one[0, 5:], other[0, 5:], atol=1e-5)


def test_a_padded_document_has_the_logits_that_it_has_alone_with_learned_g():
    module = module_of(packing="pad")
    padded = logits(module, [*FIRST, 0, 0, 0], [*SECOND, 0, 0, 0, 0])
    assert torch.allclose(padded[0, :5], logits(module, FIRST)[0], atol=1e-5)
    assert torch.allclose(padded[1, :4], logits(module, SECOND)[0], atol=1e-5)
