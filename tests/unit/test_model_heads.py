"""The heads: losses as written out, padding on either side, loading from a language model, the pipelines."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import Trainer, TrainingArguments, pipeline

from pldr_train.model import (
    PldrllmConfig,
    PldrllmForCausalLM,
    PldrllmForQuestionAnswering,
    PldrllmForSequenceClassification,
    PldrllmForTokenClassification,
    PldrllmTokenizerFast,
)
from tests.tiny import WORDS, write_corpus, write_tokenizer
from tests.unit.model_cases import small_config, token_ids

HEADS = pytest.mark.parametrize(
    "head",
    [PldrllmForSequenceClassification, PldrllmForTokenClassification, PldrllmForQuestionAnswering],
    ids=["sequence", "token", "answer"],
)


def small_head(head: type, **overrides: Any) -> Any:
    torch.manual_seed(0)
    return head(small_config(**({"num_labels": 3} | overrides))).eval()


def scores(outputs: Any) -> Tensor:
    """All scores of a head in one tensor."""
    return torch.stack([outputs.start_logits, outputs.end_logits], -1) if "start_logits" in outputs else outputs.logits


def labels_for(head: type, batch: int, length: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    if head is PldrllmForSequenceClassification:
        return {"labels": torch.randint(3, (batch,), generator=generator)}
    if head is PldrllmForTokenClassification:
        return {"labels": torch.randint(3, (batch, length), generator=generator)}
    start, end = torch.randint(length, (2, batch), generator=generator)
    return {"start_positions": start, "end_positions": end}


def test_losses_are_the_usual_ones() -> None:
    ids = token_ids(4, 7)
    sequence, kind = small_head(PldrllmForSequenceClassification), labels_for(PldrllmForSequenceClassification, 4, 7)
    outputs = sequence(ids, **kind)
    torch.testing.assert_close(outputs.loss, F.cross_entropy(outputs.logits, kind["labels"]))
    several = torch.tensor([[1.0, 0, 1], [0, 0, 0], [0, 1, 0], [1, 1, 1]])
    outputs = small_head(PldrllmForSequenceClassification)(ids, labels=several)
    torch.testing.assert_close(outputs.loss, F.binary_cross_entropy_with_logits(outputs.logits, several))
    number = torch.tensor([0.3, -1.0, 2.0, 0.0])
    outputs = small_head(PldrllmForSequenceClassification, num_labels=1)(ids, labels=number)
    torch.testing.assert_close(outputs.loss, F.mse_loss(outputs.logits[:, 0], number))

    token, tags = small_head(PldrllmForTokenClassification), labels_for(PldrllmForTokenClassification, 4, 7)["labels"]
    tags[0, :3] = -100
    outputs = token(ids, labels=tags)
    torch.testing.assert_close(outputs.loss, F.cross_entropy(outputs.logits.flatten(0, 1), tags.flatten()))

    answer, places = small_head(PldrllmForQuestionAnswering), labels_for(PldrllmForQuestionAnswering, 4, 7)
    outputs = answer(ids, **places)
    start = F.cross_entropy(outputs.start_logits, places["start_positions"])
    end = F.cross_entropy(outputs.end_logits, places["end_positions"])
    torch.testing.assert_close(outputs.loss, (start + end) / 2)


@HEADS
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_on_either_side_changes_nothing(head: type, side: str) -> None:
    model, ids = small_head(head).double(), token_ids(3, 9)
    lengths = (9, 4, 6)
    batch, mask = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        columns = slice(9 - length, 9) if side == "left" else slice(0, length)
        batch[row, columns], mask[row, columns] = ids[row, :length], 1
    padded = scores(model(batch, attention_mask=mask))
    for row, length in enumerate(lengths):
        alone = scores(model(ids[row : row + 1, :length]))[0]
        expected = padded[row] if padded.dim() == 2 else padded[row][mask[row].bool()]
        torch.testing.assert_close(expected, alone, rtol=0, atol=1e-9)


@torch.no_grad()
def test_the_last_token_is_found_without_a_mask_too() -> None:
    model, ids = small_head(PldrllmForSequenceClassification), token_ids(2, 6)
    ids[1, 4:] = 0
    mask = (ids != 0).long()
    # Without a mask padding enters the Gram, but the place that is read is the last token's.
    read = model._last_token(ids, None, None)
    assert read.tolist() == model._last_token(ids, None, mask).tolist() == [5, 3]
    embeds = model.get_input_embeddings()(ids)
    torch.testing.assert_close(
        model(inputs_embeds=embeds, attention_mask=mask).logits, model(ids, attention_mask=mask).logits
    )
    with pytest.raises(ValueError, match="batch of 2 sequences needs an attention_mask"):
        model(inputs_embeds=embeds)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()


@HEADS
def test_gradients_reach_every_parameter_and_outputs_are_passed_on(head: type) -> None:
    model, ids = small_head(head).train(), token_ids(4, 7)
    outputs = model(
        ids,
        output_hidden_states=True,
        output_attentions=True,
        output_pldr_attentions=True,
        output_deductive_outputs=True,
        use_cache=True,
        **labels_for(head, 4, 7),
    )
    outputs.loss.backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == []
    assert len(outputs.hidden_states) == 3
    assert len(outputs.attentions) == len(outputs.pldr_attentions) == len(outputs.deductive_outputs) == 2
    assert outputs.past_key_values.get_seq_length() == 7
    as_tuple = model(ids, use_cache=False, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert len(as_tuple) == (2 if head is PldrllmForQuestionAnswering else 1)


@HEADS
@torch.no_grad()
def test_a_head_saves_loads_and_takes_the_decoder_of_a_language_model(head: type, tmp_path: Path) -> None:
    model, ids = small_head(head), token_ids(2, 7)
    model.save_pretrained(tmp_path / "head")
    names = load_file(tmp_path / "head" / "model.safetensors").keys()
    assert "decoder.dec_layers.0.mha1.plgatt_layer.Wlst" in names
    again, report = head.from_pretrained(tmp_path / "head", output_loading_info=True)
    assert not any(report.values()), report
    assert torch.equal(scores(again(ids)), scores(model(ids)))

    torch.manual_seed(1)
    language = PldrllmForCausalLM(small_config()).eval()
    language.save_pretrained(tmp_path / "language")
    tuned, report = head.from_pretrained(tmp_path / "language", num_labels=3, output_loading_info=True)
    assert {name.split(".")[0] for name in report["missing_keys"]} <= {"score", "qa_outputs"}
    assert {name.split(".")[0] for name in report["unexpected_keys"]} == {"lm_head"}
    for name, tensor in language.decoder.state_dict().items():
        assert torch.equal(tuned.decoder.state_dict()[name], tensor), name
