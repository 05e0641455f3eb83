"""The hidden-class corpus: documents, tokenizer, and the rows that a run makes of them."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from pldr_train.data.datamodule import PldrDataModule
from pldr_train.data.sources.hidden_class import (
    CLASS_WORDS,
    CONTEXT_LENGTH,
    FIXED_WORDS,
    NUM_DOCUMENTS,
    build_hidden_class_corpus,
    hidden_class_documents,
)
from pldr_train.data.sources.quickstart import REFINEDWEB_SCHEMA
from pldr_train.data.tokenizer.automatic import HIDDEN_CLASS_PIECES, hidden_class_tokenizer
from pldr_train.data.tokenizer.pieces import END_ID, PAD_ID
from pldr_train.data.tokenizer.training import load_tokenizer
from pldr_train.doctor.recipes import check_files
from pldr_train.errors import DataError, RecipeError
from pldr_train.recipe import Recipe, recipe_from_dict

CLASS_POSITION = len(FIXED_WORDS)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def recipe(cache: Path, **data: Any) -> Recipe:
    section = {"source": "hidden_class", "packing": "pad", "context_length": CONTEXT_LENGTH, "cache_dir": str(cache)}
    return recipe_from_dict({
        "run": {"name": "x"},
        "model": {"vocab_size": HIDDEN_CLASS_PIECES},
        "trainer": {"batch_size": 64, "validation_rows": 256},
        "data": {**section, "num_workers": 0, "validation_fraction": 0.0625, "validation_choice": "last", **data},
    }).resolved()  # fmt: skip


def opened(wanted: Recipe) -> PldrDataModule:
    data = PldrDataModule(wanted, rank=0, world_size=1)
    data.prepare_data()
    data.setup()
    return data


def test_of_every_eight_documents_each_has_another_class() -> None:
    documents = hidden_class_documents()
    assert len(documents) == NUM_DOCUMENTS
    orders = []
    for first in range(0, NUM_DOCUMENTS, len(CLASS_WORDS)):
        words = [document.content.split() for document in documents[first : first + len(CLASS_WORDS)]]
        assert all(tuple(each[:CLASS_POSITION]) == FIXED_WORDS for each in words)
        assert all(set(each[CLASS_POSITION:]) == {each[CLASS_POSITION]} for each in words)
        orders.append(tuple(each[CLASS_POSITION] for each in words))
        assert sorted(orders[-1]) == sorted(CLASS_WORDS)
    assert len(set(orders)) > 900  # of 1,024
    for place in range(len(CLASS_WORDS)):  # uniform at each place, too
        counts = Counter(order[place] for order in orders)
        assert max(abs(count - 128) for count in counts.values()) < 5 * math.sqrt(128)


def test_the_corpus_is_built_once_the_same_everywhere_in_refinedwebs_schema(cache: Path, tmp_path: Path) -> None:
    folder = build_hidden_class_corpus(cache)
    shards = sorted(folder.iterdir())
    before = {shard.name: (shard.stat().st_mtime_ns, shard.read_bytes()) for shard in shards}
    assert build_hidden_class_corpus(cache) == folder
    assert {shard.name: (shard.stat().st_mtime_ns, shard.read_bytes()) for shard in shards} == before
    again = {shard.name: shard.read_bytes() for shard in build_hidden_class_corpus(tmp_path).iterdir()}
    assert again == {name: content for name, (_, content) in before.items()}
    table = pq.read_table(folder)
    assert table.schema.names == REFINEDWEB_SCHEMA.names
    assert table["content"].to_pylist() == [document.content for document in hidden_class_documents()]
    assert len(table["url"].unique()) == NUM_DOCUMENTS


def test_each_word_is_one_piece_of_the_corpus_tokenizer(cache: Path) -> None:
    path = hidden_class_tokenizer(cache)
    tokenizer = load_tokenizer(path)
    assert tokenizer.get_piece_size() == HIDDEN_CLASS_PIECES
    ids = tokenizer.encode(" ".join(FIXED_WORDS + CLASS_WORDS))
    assert [tokenizer.id_to_piece(each).strip("▁") for each in ids] == [*FIXED_WORDS, *CLASS_WORDS]
    assert len(set(ids)) == len(ids)
    written = path.stat().st_mtime_ns
    assert hidden_class_tokenizer(cache) == path
    assert path.stat().st_mtime_ns == written


def class_ids(rows: torch.Tensor, fixed: list[int]) -> torch.Tensor:
    """The class ids of rows (R, 13), after a look at all of them."""
    assert rows.shape[1] == CONTEXT_LENGTH + 1
    assert bool((rows[:, :CLASS_POSITION] == torch.tensor(fixed)).all())
    classes = rows[:, CLASS_POSITION:-1]
    assert bool((classes == classes[:, :1]).all())
    assert bool((rows[:, -1] == END_ID).all())
    assert not bool((rows == PAD_ID).any())
    return classes[:, 0]


@pytest.mark.parametrize("shuffle", [True, False])
def test_each_row_is_one_document_from_its_beginning_to_its_eos(shuffle: bool, cache: Path) -> None:
    data = opened(recipe(cache, shuffle=shuffle))
    fixed = data.tokenizer.encode(" ".join(FIXED_WORDS))
    batches = iter(data.train_dataloader())
    # More than an epoch: there is no rest of a document anywhere.
    seen = torch.cat([class_ids(next(batches)["input_ids"], fixed) for _ in range(150)])
    classes, counts = seen.unique(return_counts=True)
    assert len(classes) == len(CLASS_WORDS)
    assert int((counts - len(seen) / len(classes)).abs().max()) < 0.1 * len(seen) / len(classes)
    held_out = torch.cat([class_ids(batch["input_ids"], fixed) for batch in data.val_dataloader()])
    assert len(held_out) == 256
    for first in range(0, 256, len(CLASS_WORDS)):
        assert len(held_out[first : first + len(CLASS_WORDS)].unique()) == len(CLASS_WORDS)
    assert data.train_documents == (0, NUM_DOCUMENTS - 512)
    assert data.validation_documents == (NUM_DOCUMENTS - 512, NUM_DOCUMENTS)


def test_a_larger_vocabulary_will_do_and_a_smaller_one_is_refused(cache: Path) -> None:
    for vocab_size in (HIDDEN_CLASS_PIECES - 1, HIDDEN_CLASS_PIECES + 100):
        changed = recipe(cache).replaced({"model.vocab_size": vocab_size})
        data = PldrDataModule(changed, rank=0, world_size=1)
        data.prepare_data()
        if vocab_size < HIDDEN_CLASS_PIECES:
            with pytest.raises(
                DataError, match=rf"model\.vocab_size={vocab_size} is less than .*{HIDDEN_CLASS_PIECES} pieces"
            ):
                data.setup()
        else:
            data.setup()


@pytest.mark.parametrize("key", ["path", "tokenizer"])
def test_files_are_not_used_with_it(key: str, cache: Path) -> None:
    with pytest.raises(RecipeError, match=rf"data\.{key}=x: not used with data\.source=hidden_class, which builds"):
        recipe(cache, **{key: "x"})


def test_the_doctor_knows_it(cache: Path) -> None:
    (about_data,) = [each for each in check_files(recipe(cache)) if each.name == "data"]
    assert (about_data.level, "built at first use" in about_data.text) == ("ok", True)
