"""The spread choice of validation documents: disjoint, even, fixed, and the same whatever reads the documents."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pldr_train.commands.data_actions import inspection_text
from pldr_train.data.datamodule import PldrDataModule
from pldr_train.data.documents import LiveReader
from pldr_train.data.inspection import open_data, summary, take_sample
from pldr_train.data.rows.lanes import lane_layout
from pldr_train.data.rows.split import MAX_PLACES, Spread, SpreadNumbering
from pldr_train.data.tokenizer.automatic import automatic_tokenizer
from pldr_train.data.tokenizer.line_sample import LineSample
from pldr_train.data.tokenizer.training import train_tokenizer
from pldr_train.data.tokens.tokenize_ahead import tokenize_ahead
from pldr_train.errors import DataError, RecipeError
from pldr_train.fit import fit
from pldr_train.recipe import Recipe, recipe_from_dict, recipe_to_dict
from pldr_train.recipe.yaml_text import parse_yaml
from pldr_train.training import saving
from tests.tiny import changed, data_recipe, metric_lines, tiny_values

CASES = [
    (0, 2, 1), (7, 10, 1), (0, 10, 9), (5, 105, 10), (0, 301, 300), (0, 1000, 257), (3, 100_003, 1000),
    (0, 100_000, 50_000), (10, 20_010, 19_999),
]  # fmt: skip


@pytest.mark.parametrize(("start", "stop", "held_out"), CASES)
def test_every_document_trains_or_validates(start: int, stop: int, held_out: int) -> None:
    spread = Spread(start, stop, held_out)
    train = spread.training_numbers(np.arange(spread.num_training))
    validation = spread.validation_numbers(np.arange(held_out))
    assert len(train) + len(validation) == stop - start
    assert sorted([*train.tolist(), *validation.tolist()]) == list(range(start, stop))
    assert (np.diff(train) > 0).all()
    everything = np.arange(start, stop)
    np.testing.assert_array_equal(everything[spread.is_held_out(everything)], np.sort(validation))


def test_the_choice_is_even_over_the_corpus_and_so_are_its_first_documents() -> None:
    spread = Spread(0, 1_000_000, 10_000)
    chosen = spread.validation_numbers(np.arange(10_000))
    per_tenth = np.bincount(chosen // 100_000, minlength=10)
    assert per_tenth.min() > 900
    assert per_tenth.max() < 1100
    first = np.bincount(chosen[:1000] // 100_000, minlength=10)  # a tenth of the documents, in 25 places
    assert (first > 0).sum() >= 8
    assert len(np.unique(np.flatnonzero(np.diff(np.sort(chosen)) > 1))) == MAX_PLACES - 1
    alone = Spread(0, 20_000, 200).validation_numbers(np.arange(200))
    assert np.diff(np.sort(alone)).min() >= 1
    assert len(set(alone // 100)) == 200  # one of each hundred


def test_the_choice_of_the_largest_corpus_is_at_hand_at_once() -> None:
    spread = Spread(0, 968_000_015, 9_680_001)
    ends = np.array([0, 1, spread.num_training - 1])
    numbers = spread.training_numbers(ends)
    assert 0 <= numbers[0] < numbers[1] < numbers[2] < 968_000_015
    assert not spread.is_held_out(numbers).any()
    assert spread.is_held_out(spread.validation_numbers(np.array([0, 4_000_000, 9_680_000]))).all()
    assert pickle.loads(pickle.dumps(spread)) == spread


def test_the_choice_is_fixed() -> None:
    """Runs go on with it: these numbers must never change."""
    assert Spread(0, 100, 10).validation_numbers(np.arange(10)).tolist() == [87, 5, 34, 25, 12, 66, 72, 90, 48, 51]


def test_lanes_take_every_training_document_once_an_epoch() -> None:
    part = SpreadNumbering(Spread(10, 1010, 100), validates=False)
    layout = lane_layout(10, 1010, num_lanes=4, window=8, seed=3, shuffle=True, numbering=part)
    taken = [layout.block(lane, 1, turn) for lane in range(4) for turn in range(100)]
    numbers = np.concatenate([block for block in taken if block is not None])
    np.testing.assert_array_equal(np.sort(numbers), part.numbers(np.arange(900)))
    few = SpreadNumbering(Spread(0, 20, 10), validates=False)
    with pytest.raises(DataError, match=r"data\.num_lanes=64 exceeds the 10 training documents"):
        lane_layout(0, 20, num_lanes=64, window=8, seed=3, shuffle=True, numbering=few)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Settings over 3,000 documents that hold their numbers in letters."""
    folder = tmp_path_factory.mktemp("spread")
    write_numbered(folder / "corpus", 3000)
    tokenizer = train_tokenizer(numbered(3000), folder / "t.model", 280)
    return data_recipe(
        source="parquet", path=str(folder / "corpus"), text_column="content", train_documents=None,
        validation_documents=None, validation_fraction=0.01, tokenizer=str(tokenizer),
        cache_dir=str(folder / "cache"), context_length=16, num_lanes=8, shuffle=True, shuffle_window_documents=40,
        num_workers=0, seed=5, vocab_size=280, batch_size=8, micro_batch_size=4, validation_rows=1000,
        validation_choice="spread",
    )  # fmt: skip


def numbered(documents: int) -> list[str]:
    return [" ".join(["learns", *("abcdefghij"[int(digit)] for digit in str(n))]) for n in range(documents)]


def write_numbered(folder: Path, documents: int) -> None:
    folder.mkdir()
    pq.write_table(pa.table({"content": numbered(documents)}), folder / "x.parquet", row_group_size=100)


def opened(settings: Recipe, **changes: Any) -> PldrDataModule:
    data = PldrDataModule(changed(settings, **changes), rank=0, world_size=1)
    data.prepare_data()
    data.setup()
    return data


def documents_in(data: PldrDataModule, rows: Sequence[torch.Tensor]) -> list[int]:
    """Numbers of the whole documents in rows that follow each other."""
    tokens = torch.cat([row[:-1] for row in rows]).tolist()
    found, current = [], list[int]()
    for token in tokens:
        if token == 3:
            text = data.tokenizer.decode(current)
            found.append(int("".join(str("abcdefghij".index(letter)) for letter in text.split()[1:])))
            current = []
        else:
            current.append(token)
    return found


def validation_rows(data: PldrDataModule) -> list[torch.Tensor]:
    return [row for batch in data.val_dataloader() for row in batch["input_ids"]]


def test_a_run_validates_on_documents_of_the_whole_corpus_and_trains_on_the_others(base: Recipe) -> None:
    data = opened(base)
    spread = data.split.spread
    assert spread is not None
    chosen = spread.validation_numbers(np.arange(30)).tolist()
    validated = documents_in(data, validation_rows(data))
    assert validated == chosen[: len(validated)]
    assert len(validated) >= 28  # the last row may cut some off
    assert len({number // 500 for number in validated}) == 6
    assert "30 documents, spread over [0, 3,000)" in data.split.validation_text()
    lanes: list[list[torch.Tensor]] = [[] for _ in range(8)]
    for batch, _ in zip(data.train_dataloader(), range(500), strict=False):
        for row, cursor in zip(batch["input_ids"], batch["cursors"], strict=True):
            lanes[int(cursor[1])].append(row)
    trained = {number for rows in lanes for number in documents_in(data, rows)}
    assert trained == set(range(3000)) - set(chosen)  # in more than an epoch


def test_seed_lanes_and_workers_do_not_change_what_validates(base: Recipe) -> None:
    rows = torch.stack(validation_rows(opened(base)))
    for changes in ({"seed": 99}, {"num_lanes": 4}, {"num_workers": 1}, {"micro_batch_size": 1}):
        assert torch.equal(rows, torch.stack(validation_rows(opened(base, **changes)))), changes
    with_last = torch.stack(validation_rows(opened(base, validation_choice="last")))
    assert not torch.equal(rows[: len(with_last)], with_last[: len(rows)])


def test_tokens_made_ahead_give_the_same_rows(base: Recipe, tmp_path: Path) -> None:
    tokenize_ahead(base, tmp_path / "tokens", documents_per_shard=500)
    live, stored = opened(base), opened(base, source="tokens", path=str(tmp_path / "tokens"), tokenizer=None)
    assert torch.equal(torch.stack(validation_rows(live)), torch.stack(validation_rows(stored)))
    assert live.train_source_fingerprint() == stored.train_source_fingerprint()
    assert live.train_source_fingerprint()["held_out_documents"] == 30
    for one, other, _ in zip(live.train_dataloader(), stored.train_dataloader(), range(60), strict=False):
        assert torch.equal(one["input_ids"], other["input_ids"])
        assert torch.equal(one["cursors"], other["cursors"])


def test_an_automatic_tokenizer_reads_no_validation_document(base: Recipe, tmp_path: Path, said: list[str]) -> None:
    data = opened(base)
    spread = data.split.spread
    assert spread is not None
    seen: list[int] = []
    add = LineSample.add

    def watch(self: LineSample, first: int, texts: list[str]) -> None:
        seen.extend(number_of(text) for text in texts)
        add(self, first, texts)

    assert isinstance(data.reader, LiveReader)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LineSample, "add", watch)
        automatic_tokenizer(data.reader.source, (0, 3000), 280, tmp_path, spread)
    assert sorted(seen) == spread.training_numbers(np.arange(2970)).tolist()
    assert "on 2,970 of 2,970 documents" in said[0]


def number_of(text: str) -> int:
    return int("".join(str("abcdefghij".index(letter)) for letter in text.split()[1:]))


@pytest.mark.parametrize(("fraction", "told"), [(0.0001, "1 document only"), (0.003, "9 documents only")])
def test_few_validation_documents_are_warned_of(base: Recipe, fraction: float, told: str, said: list[str]) -> None:
    for choice in ("spread", "last"):
        said.clear()
        opened(base, validation_fraction=fraction, validation_choice=choice)
        assert len(said) == 1
        assert f"validation has {told}" in said[0]
    said.clear()
    opened(base, validation_fraction=0.0033)  # 10 documents
    assert said == []


def test_an_interval_leaves_nothing_to_choose(base: Recipe) -> None:
    data = opened(base, validation_documents=(100, 200), train_documents=(200, 3000))
    assert data.split.spread is None
    assert (data.train_documents, data.validation_documents) == ((200, 3000), (100, 200))


def test_a_run_that_was_saved_without_the_key_goes_on_with_the_last_documents(tiny_data: Path, tmp_path: Path) -> None:
    def trained(name: str, stop: int | None = None, **section: Any) -> list[dict[str, Any]]:
        section = {"validation_choice": None} | section
        values = tiny_values(tiny_data, tmp_path, name, data=section, checkpoint={"every_steps": 12, "keep_last": 9})
        outcome = fit(recipe_from_dict(values))
        if stop is not None:
            for later in (outcome.folder / "checkpoints").glob("step-*"):
                if int(later.name.removeprefix("step-")) > stop:
                    shutil.rmtree(later)
            outcome = fit(recipe_from_dict(values))
        return metric_lines(outcome.folder)

    straight, spread = trained("last", validation_choice="last"), trained("spread")
    assert spread != straight
    assert trained("spread-resumed", stop=12) == spread
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving, "recipe_to_dict", without_the_key)
        # The first start is of the earlier version: it has the key as null, which meant the last documents.
        patch.setattr(Recipe, "going_on", lambda chosen, saved: old_choice(chosen))
        null = {"validation_choice": None}
        values = tiny_values(tiny_data, tmp_path, "old", data=null, checkpoint={"every_steps": 12, "keep_last": 9})
        folder = fit(recipe_from_dict(values)).folder
    assert metric_lines(folder) == straight
    shutil.rmtree(folder / "checkpoints" / "step-00000024")
    fit(recipe_from_dict(values))
    assert metric_lines(folder) == straight
    assert parse_yaml((folder / "recipe.yaml").read_text())["data"]["validation_choice"] == "last"
    values["data"]["validation_choice"] = "spread"
    with pytest.raises(RecipeError, match=r"data\.validation_choice=spread: the saved run has last"):
        fit(recipe_from_dict(values))


def without_the_key(chosen: Recipe) -> dict[str, Any]:
    values = recipe_to_dict(chosen)
    del values["data"]["validation_choice"]
    values["trainer"]["validation_batches"] = values["trainer"].pop("validation_rows") // 4
    return values


def old_choice(chosen: Recipe) -> Recipe:
    return chosen.model_copy(update={"data": chosen.data.model_copy(update={"validation_choice": "last"})})


@pytest.mark.parametrize(("choice", "told"), [("last", 1), ("spread", 0)])
def test_a_large_gap_between_training_and_validation_is_reported_once(
    tmp_path: Path, choice: str, told: int, said: list[str]
) -> None:
    """Ten documents of another kind stand at the end, in a corpus of one word."""
    (tmp_path / "corpus").mkdir()
    texts = ["the metric tensor " * 20] * 190 + ["9 7 5 3 1 8 6 4 2 0 " * 6] * 10
    pq.write_table(pa.table({"content": texts}), tmp_path / "corpus" / "x.parquet")
    train_tokenizer([*numbered(3000), "the metric tensor 0123456789"], tmp_path / "tokenizer.model", 280)
    values = tiny_values(
        tmp_path, tmp_path / "runs", data={"validation_fraction": 0.05, "validation_choice": choice},
        trainer={"max_steps": 40, "validation_rows": 40}, model={"vocab_size": 280}, sample={"prompts": []},
    )  # fmt: skip
    fit(recipe_from_dict(values))
    warnings = [line for line in said if "exceeds that of the last training steps" in line]
    assert len(warnings) == told, said
    for line in warnings:
        assert "[190, 200), 10 documents" in line
        assert "data.validation_choice=spread" in line


def test_inspection_says_how_many_documents_train_and_validate(base: Recipe) -> None:
    data = open_data(base)
    text = inspection_text(summary(data, base, take_sample(data, base.data, data.train, 40), []), 10)
    assert "train       [0, 3,000), 2,970 documents\n" in text
    assert "validation  [0, 3,000), 30 documents spread over it\n" in text
