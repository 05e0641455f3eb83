"""Each head learns a small task with the stock `Trainer`, and works from its folder, in its pipeline and without.

Accuracies are those of held-out samples.
"""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForQuestionAnswering, AutoTokenizer, Trainer, TrainingArguments, pipeline
from transformers.pipelines import SUPPORTED_TASKS

from pldr_train.model import (
    PldrllmConfig,
    PldrllmForCausalLM,
    PldrllmForQuestionAnswering,
    PldrllmForSequenceClassification,
    PldrllmForTokenClassification,
    PldrllmTokenizer,
    PldrllmTokenizerFast,
)
from tests.tiny import WORDS
from tests.unit.model_cases import small_config

MARKED = ("data", "head", "heads", "loss")
PLAIN = tuple(word for word in WORDS if word not in MARKED)
SAMPLES, HELD_OUT = 1400, 200
QUESTION = "what is it"


@pytest.fixture(scope="module")
def tokenizer(tiny_data: Path) -> PldrllmTokenizerFast:
    return PldrllmTokenizerFast(vocab_file=str(tiny_data / "tokenizer.model"))


def sentences(marked_of_four: int) -> list[str]:
    """Sentences of six words; in so many of four one word is marked, in the others none."""
    generator, texts = random.Random(0), []
    for index in range(SAMPLES):
        words = generator.choices(PLAIN, k=6)
        if index % 4 < marked_of_four:
            words[generator.randrange(6)] = generator.choice(MARKED)
        texts.append(" ".join(words))
    return texts


def marked_span(text: str) -> tuple[int, int] | None:
    """Where the marked word stands in the text."""
    start = 0
    for word in text.split(" "):
        if word in MARKED:
            return start, start + len(word)
        start += len(word) + 1
    return None


def encoded(tokenizer: Any, *texts: str) -> Any:
    return tokenizer(*texts, padding="max_length", max_length=48, return_offsets_mapping=True)


def model_inputs(encoding: Any) -> dict[str, Any]:
    return {name: encoding[name] for name in ("input_ids", "attention_mask")}


def tunable_config(tokenizer: Any, **overrides: Any) -> PldrllmConfig:
    labels = ["plain", "marked"]
    return small_config(
        vocab_size=len(tokenizer), hidden_size=32, num_attention_heads=2, head_dim=16,
        id2label=dict(enumerate(labels)), label2id={label: index for index, label in enumerate(labels)}, **overrides,
    )  # fmt: skip


LONGER: dict[str, Any] = {"max_steps": 300, "lr": 3e-3}


def fine_tune(
    head: type, rows: list[dict[str, Any]], folder: Path, tokenizer: Any, max_steps: int = 150, lr: float = 5e-3,
    **overrides: Any,
) -> Any:  # fmt: skip
    """Train a fresh head on all but the last rows, save it in the folder, and predict the last rows."""
    torch.manual_seed(0)
    arguments = TrainingArguments(
        output_dir=str(folder / "run"), max_steps=max_steps, learning_rate=lr, lr_scheduler_type="constant", seed=0,
        per_device_train_batch_size=32, per_device_eval_batch_size=64, report_to=[], disable_tqdm=True,
        logging_strategy="no", save_strategy="no", use_cpu=True,
    )  # fmt: skip
    trainer = Trainer(
        model=head(tunable_config(tokenizer, **overrides)), args=arguments, train_dataset=rows[:-HELD_OUT],
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    trainer.save_model(str(folder))
    return trainer.predict(rows[-HELD_OUT:])


@pytest.mark.slow
@pytest.mark.parametrize("kind", [None, "identity"], ids=["learned", "identity"])
def test_sequence_classification_learns(kind: str | None, tokenizer: PldrllmTokenizerFast, tmp_path: Path) -> None:
    texts = sentences(marked_of_four=2)
    labels = [int(marked_span(text) is not None) for text in texts]
    rows = [
        model_inputs(encoded(tokenizer, text)) | {"labels": label} for text, label in zip(texts, labels, strict=True)
    ]
    longer = LONGER if kind is None else {}  # a learned G begins to help late
    predicted = fine_tune(PldrllmForSequenceClassification, rows, tmp_path, tokenizer, custom_G_type=kind, **longer)
    assert (predicted.predictions.argmax(-1) == predicted.label_ids).mean() > 0.95
    assert predicted.label_ids.mean() == 0.5

    classify = pipeline("text-classification", model=str(tmp_path), device="cpu")
    found = classify(texts[-HELD_OUT:], batch_size=7)
    expected = [("plain", "marked")[label] for label in labels[-HELD_OUT:]]
    assert np.mean([each["label"] == label for each, label in zip(found, expected, strict=True)]) > 0.95
    # A batch padded to its longest text scores each text as alone, and the other tokenizer gives the same ids.
    slow = PldrllmTokenizer(str(tmp_path / "tokenizer.model"))
    alone = pipeline("text-classification", model=str(tmp_path), tokenizer=slow, device="cpu")(texts[-20:])
    assert [each["label"] for each in alone] == [each["label"] for each in found[-20:]]
    assert [each["score"] for each in alone] == pytest.approx([each["score"] for each in found[-20:]], abs=1e-4)


@pytest.mark.slow
def test_token_classification_learns(tokenizer: PldrllmTokenizerFast, tmp_path: Path) -> None:
    texts, rows = sentences(marked_of_four=3), []
    for text in texts:
        encoding, span = encoded(tokenizer, text), marked_span(text)
        tags = [
            -100 if not is_token else int(span is not None and span[0] < stop <= span[1])
            for (_, stop), is_token in zip(encoding["offset_mapping"], encoding["attention_mask"], strict=True)
        ]
        rows.append(model_inputs(encoding) | {"labels": tags})
    predicted = fine_tune(PldrllmForTokenClassification, rows, tmp_path, tokenizer)
    right = predicted.predictions.argmax(-1) == predicted.label_ids
    for tag in (0, 1):
        assert right[predicted.label_ids == tag].mean() > 0.95

    tags = pipeline("token-classification", model=str(tmp_path), aggregation_strategy="simple", device="cpu")
    found = []
    for text, groups in zip(texts[-HELD_OUT:], tags(texts[-HELD_OUT:], batch_size=7), strict=True):
        marked = [group for group in groups if group["entity_group"] == "marked"]
        found.append("".join(text[group["start"] : group["end"]] for group in marked).strip())
    expected = [text[slice(*(marked_span(text) or (0, 0)))] for text in texts[-HELD_OUT:]]
    assert np.mean([word == right_word for word, right_word in zip(found, expected, strict=True)]) > 0.95


@pytest.fixture(scope="module")
def answering(tokenizer: PldrllmTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder with a model that answers with the marked word, and its predictions of the held-out rows."""
    folder, rows = tmp_path_factory.mktemp("answering"), []
    for text in sentences(marked_of_four=4):
        encoding, span = encoded(tokenizer, QUESTION, text), marked_span(text)
        assert span is not None
        of_answer = [
            place
            for place, (part, (_, stop)) in enumerate(
                zip(encoding.sequence_ids(), encoding["offset_mapping"], strict=True)
            )
            if part == 1 and span[0] < stop <= span[1]
        ]
        rows.append(model_inputs(encoding) | {"start_positions": of_answer[0], "end_positions": of_answer[-1]})
    return folder, fine_tune(PldrllmForQuestionAnswering, rows, folder, tokenizer, **LONGER)


@pytest.mark.slow
def test_question_answering_learns(answering: tuple[Path, Any]) -> None:
    folder, predicted = answering
    right = [
        logits.argmax(-1) == places for logits, places in zip(predicted.predictions, predicted.label_ids, strict=True)
    ]
    assert (right[0] & right[1]).mean() > 0.95

    model, tokenizer = AutoModelForQuestionAnswering.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    texts = sentences(marked_of_four=4)[-HELD_OUT:]
    encoding = tokenizer([QUESTION] * HELD_OUT, texts, padding=True, return_offsets_mapping=True, return_tensors="pt")
    with torch.no_grad():
        outputs = model(**model_inputs(encoding))
    first, last = outputs.start_logits.argmax(-1), outputs.end_logits.argmax(-1)
    offsets, rows = encoding["offset_mapping"], torch.arange(HELD_OUT)
    spans = zip(offsets[rows, first, 0].tolist(), offsets[rows, last, 1].tolist(), strict=True)
    answers = [text[start:stop].strip() for text, (start, stop) in zip(texts, spans, strict=True)]
    assert np.mean([text[slice(*marked_span(text))] == a for text, a in zip(texts, answers, strict=True)]) > 0.95


@pytest.mark.slow
@pytest.mark.skipif(
    "question-answering" not in SUPPORTED_TASKS, reason="this release of transformers has no such pipeline"
)
def test_question_answering_works_in_its_pipeline(answering: tuple[Path, Any]) -> None:
    ask: Any = pipeline("question-answering", model=str(answering[0]), device="cpu")
    texts = sentences(marked_of_four=4)[-20:]
    answers = [ask(question=QUESTION, context=text)["answer"] for text in texts]
    assert np.mean([text[slice(*marked_span(text))] == a for text, a in zip(texts, answers, strict=True)]) > 0.9


def test_the_examples_of_the_documentation_run(
    tokenizer: PldrllmTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    PldrllmForCausalLM(small_config(vocab_size=len(tokenizer))).save_pretrained(tmp_path / "exported")
    tokenizer.save_pretrained(tmp_path / "exported")
    page = (Path(__file__).parents[2] / "docs" / "heads.md").read_text(encoding="utf-8")
    examples = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(examples) == 2
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(examples[0], names)
    assert [each["label"] for each in names["classify"](["a quiet evening", "drums and trumpets"])] == ["calm", "loud"]
    exec(examples[1], names)
    assert capsys.readouterr().out.splitlines()[-1] in names["text"]
