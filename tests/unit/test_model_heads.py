"""The heads: losses as written out, padding on either side, accumulated batches, loading from a language model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import Trainer, TrainingArguments

from pldr_train.model import (
    PldrllmForCausalLM,
    PldrllmForQuestionAnswering,
    PldrllmForSequenceClassification,
    PldrllmForTokenClassification,
)
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


PROBLEMS = pytest.mark.parametrize(
    "problem", ["single_label_classification", "multi_label_classification", "regression"]
)


def sequence_labels(problem: str, batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    if problem == "single_label_classification":
        return torch.randint(3, (batch,), generator=generator)
    if problem == "multi_label_classification":
        return torch.randint(2, (batch, 3), generator=generator).float()
    return torch.randn(batch, 3, generator=generator)


@PROBLEMS
@pytest.mark.parametrize("stated", [True, False])
def test_sequence_losses_are_the_usual_ones(problem: str, stated: bool) -> None:
    if problem == "regression" and not stated:
        model, labels = small_head(PldrllmForSequenceClassification, num_labels=1), torch.tensor([0.3, -1.0, 2.0, 0.0])
    else:
        overrides = {"problem_type": problem} if stated else {}
        model, labels = small_head(PldrllmForSequenceClassification, **overrides), sequence_labels(problem, 4)
    outputs = model(token_ids(4, 7), labels=labels)
    assert model.config.problem_type == problem
    if problem == "single_label_classification":
        expected = -outputs.logits.log_softmax(-1)[torch.arange(4), labels].mean()
    elif problem == "multi_label_classification":
        chance = outputs.logits.sigmoid()
        expected = -(labels * chance.log() + (1 - labels) * (1 - chance).log()).mean()
    else:
        expected = (outputs.logits.view_as(labels) - labels).square().mean()
    torch.testing.assert_close(outputs.loss, expected)


def test_token_and_answer_losses_are_the_usual_ones() -> None:
    ids = token_ids(4, 7)
    token, tags = small_head(PldrllmForTokenClassification), labels_for(PldrllmForTokenClassification, 4, 7)["labels"]
    tags[0, :3] = -100
    outputs = token(ids, labels=tags)
    counted = tags != -100
    nll = -outputs.logits.log_softmax(-1)[counted].gather(-1, tags[counted, None])
    torch.testing.assert_close(outputs.loss, nll.mean())

    answer, places = small_head(PldrllmForQuestionAnswering), labels_for(PldrllmForQuestionAnswering, 4, 7)
    outputs = answer(ids, **places)
    with torch.no_grad():
        by_place = answer.qa_outputs(answer.decoder(ids).last_hidden_state)
    torch.testing.assert_close(scores(outputs), by_place)  # the start's scores come first
    start = F.cross_entropy(outputs.start_logits, places["start_positions"])
    end = F.cross_entropy(outputs.end_logits, places["end_positions"])
    torch.testing.assert_close(outputs.loss, (start + end) / 2)
    # An answer that truncation cut off is beyond the sequence and does not count.
    places["start_positions"][0], places["end_positions"][0] = 9, 12
    rest = answer(ids[1:], **{name: tensor[1:] for name, tensor in places.items()}).loss
    torch.testing.assert_close(answer(ids, **places).loss, rest)
    assert answer(ids, start_positions=places["start_positions"]).loss is None


class Rows(torch.utils.data.Dataset):
    def __init__(self, columns: dict[str, Tensor]) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(self.columns["input_ids"])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: column[index] for name, column in self.columns.items()}


def gradient_after_a_step(model: Any, columns: dict[str, Tensor], folder: Path, **settings: Any) -> dict[str, Tensor]:
    """What one step of plain gradient descent at rate 1 by the stock `Trainer` takes off each weight."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=1, learning_rate=1.0, optim="sgd", lr_scheduler_type="constant",
        max_grad_norm=0.0, report_to=[], disable_tqdm=True, use_cpu=True, save_strategy="no", **settings,
    )  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=Rows(columns)).train()
    return {name: before[name] - parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    ("head", "problem"),
    [
        (PldrllmForSequenceClassification, "single_label_classification"),
        (PldrllmForSequenceClassification, "multi_label_classification"),
        (PldrllmForSequenceClassification, "regression"),
        (PldrllmForTokenClassification, None),
        (PldrllmForQuestionAnswering, None),
    ],
)
def test_accumulated_micro_batches_train_as_one_batch(head: type, problem: str | None, tmp_path: Path) -> None:
    ids = token_ids(8, 7)
    labels = labels_for(head, 8, 7) if problem is None else {"labels": sequence_labels(problem, 8)}
    if head is PldrllmForTokenClassification:
        labels["labels"][:3, 1:] = -100  # micro-batches then hold different numbers of labels
    gradients = [
        gradient_after_a_step(
            small_head(head, problem_type=problem),
            {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | labels,
            tmp_path,
            per_device_train_batch_size=8 // parts,
            gradient_accumulation_steps=parts,
        )
        for parts in (1, 4)
    ]
    assert max(float(gradient.abs().max()) for gradient in gradients[0].values()) > 1e-2
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("use_reentrant", [False, True])
@HEADS
def test_checkpointed_heads_have_the_same_loss_and_gradients(head: type, use_reentrant: bool) -> None:
    model, ids, labels = small_head(head).train(), token_ids(4, 7), labels_for(head, 4, 7)
    results = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.zero_grad()
        loss = model(ids, **labels).loss
        loss.backward()
        results.append([loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_tokens_are_dropped_out_in_training_only() -> None:
    model, ids = small_head(PldrllmForTokenClassification, classifier_dropout=0.5), token_ids(2, 7)
    assert model.dropout.p == 0.5
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)
    assert small_head(PldrllmForTokenClassification).dropout.p == 0.0


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


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", [None, "random"], ids=["learned", "random"])
@torch.no_grad()
def test_without_a_mask_the_pad_token_tells_padding_from_tokens(side: str, kind: str | None) -> None:
    model, ids = small_head(PldrllmForSequenceClassification, custom_G_type=kind).double(), token_ids(2, 6)
    alone = model(ids[1:, :4]).logits[0]
    padding, tokens = torch.zeros_like(ids[1, :2]), ids[1, :4]
    ids[1] = torch.cat((padding, tokens) if side == "left" else (tokens, padding))
    logits = model(ids).logits
    torch.testing.assert_close(logits[1], alone, rtol=0, atol=1e-9)
    assert torch.equal(model(ids, attention_mask=(ids != 0).long()).logits, logits)


@torch.no_grad()
def test_the_last_token_is_found_among_embeddings_and_after_a_cache() -> None:
    model, ids = small_head(PldrllmForSequenceClassification), token_ids(2, 6)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    embeds = model.get_input_embeddings()(ids)
    logits = model(ids, attention_mask=mask).logits
    assert torch.equal(model(inputs_embeds=embeds, attention_mask=mask).logits, logits)
    assert torch.equal(model(inputs_embeds=embeds[:1]).logits, model(ids[:1]).logits)
    # A mask over cached and new positions.
    identity, mask = small_head(PldrllmForSequenceClassification, custom_G_type="identity"), torch.ones_like(ids)
    mask[1, :2] = 0
    whole = identity(ids, attention_mask=mask).logits
    cache = identity(ids[:, :4], attention_mask=mask[:, :4], use_cache=True).past_key_values
    torch.testing.assert_close(identity(ids[:, 4:], attention_mask=mask, past_key_values=cache).logits, whole)


def test_sequences_whose_end_nothing_tells_are_refused() -> None:
    model, ids = small_head(PldrllmForSequenceClassification), token_ids(2, 6)
    with pytest.raises(ValueError, match="batch of 2 sequences needs an attention_mask"):
        model(inputs_embeds=model.get_input_embeddings()(ids))
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()
    unpadded = small_head(PldrllmForSequenceClassification, pad_token_id=None)
    with pytest.raises(ValueError, match=r"batch of 2 sequences needs .*config.pad_token_id"):
        unpadded(ids)
    assert unpadded(ids[:1]).logits.shape == (1, 3)


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
    assert bool(torch.cat([p.flatten() for name, p in tuned.named_parameters() if "decoder" not in name]).any())


@torch.no_grad()
def test_a_head_for_other_labels_is_made_anew_only_on_request(tmp_path: Path) -> None:
    model = small_head(PldrllmForSequenceClassification)
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match=r"(?s)score\.weight.*size mismatch|ignore_mismatched_sizes"):
        PldrllmForSequenceClassification.from_pretrained(tmp_path, num_labels=5)
    other, report = PldrllmForSequenceClassification.from_pretrained(
        tmp_path, num_labels=5, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert [mismatch[0] for mismatch in report["mismatched_keys"]] == ["score.weight"]
    assert other.score.weight.shape == (5, 16)
    assert bool(other.score.weight.isfinite().all())
    assert bool(other.score.weight.any())
    assert torch.equal(other.decoder.embed_tokens.weight, model.decoder.embed_tokens.weight)
