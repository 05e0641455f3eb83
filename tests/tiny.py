"""A corpus, a tokenizer and a recipe small enough that a whole run takes about a second."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pldr_train.data.tokenizer.training import train_tokenizer
from pldr_train.metrics.catalog import TIMINGS
from pldr_train.recipe import Recipe, recipe_from_dict

WORDS = (
    "the a metric tensor learns an operator from queries and keys of every head while curvature bends attention toward "
    "tokens that matter most for what comes next in this sentence about models data loss gradients steps and lanes"
).split()
VOCAB_SIZE = 320
MONITORED = {"deductive": True}
"""The section monitor of a recipe that measures everything."""


def write_corpus(folder: Path, documents: int = 120, seed: int = 0) -> Path:
    """Parquet shards in RefinedWeb's text column, of random sentences."""
    generator = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    texts = [" ".join(generator.choices(WORDS, k=generator.randint(5, 60))) + "." for _ in range(documents)]
    half = documents // 2
    for index, part in enumerate((texts[:half], texts[half:])):
        pq.write_table(pa.table({"content": part}), folder / f"part-{index}.parquet", row_group_size=16)
    return folder


def damage_row_group(path: Path, group: int) -> None:
    """Overwrite the pages of a row group's text column; the footer and the file's size stay."""
    footer = pq.read_metadata(path)
    column = footer.row_group(group).column(footer.schema.names.index("content"))
    start = column.dictionary_page_offset or column.data_page_offset
    content = bytearray(path.read_bytes())
    content[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(content)


def write_tokenizer(path: Path, corpus: Path) -> Path:
    """A SentencePiece model of VOCAB_SIZE pieces trained on the corpus."""
    texts = [text for file in sorted(corpus.glob("*.parquet")) for text in pq.read_table(file)["content"].to_pylist()]
    train_tokenizer(texts, path, VOCAB_SIZE)
    return path


def tiny_values(folder: Path, runs: Path, name: str = "tiny", **sections: dict[str, Any]) -> dict[str, Any]:
    """Values of a recipe over the corpus and tokenizer in `folder`; `sections` replace single keys."""
    values: dict[str, Any] = {
        "run": {"name": name, "dir": str(runs), "seed": 5},
        "model": {
            "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8, "A_dff": 21, "vocab_size": VOCAB_SIZE,
            "num_reslayerA": 2,
        },
        "dag": {"A_LM": 0.01, "A_P": 0.01, "G_LM": 0.01},
        "data": {
            "source": "parquet", "path": str(folder / "corpus"), "tokenizer": str(folder / "tokenizer.model"),
            "context_length": 32, "num_lanes": 8, "num_workers": 0, "validation_fraction": 0.1,
            "shuffle_window_documents": 4, "validation_choice": "last",
        },
        "optim": {"lr": 2e-3, "warmup_steps": 4},
        "trainer": {
            "max_steps": 24, "batch_size": 4, "precision": "fp32", "accelerator": "cpu", "validate_every_steps": 8,
            "validation_rows": 8, "threads": 1,
        },
        "checkpoint": {"every_steps": 5, "every_s": None, "keep_last": 2, "also_keep_steps": []},
        "logging": {"every_steps": 1, "batch_digest": True, "wandb": "disabled", "progress": False},
        # In so small a run the deductive metrics would take half of the time; tests of them put them on.
        "monitor": {"rows": 6, "targets": 3, "prompts": 3, "new_tokens": 2, "snapshots": 3, "deductive": False},
        "sample": {"prompts": ["the metric"], "max_new_tokens": 4},
    }  # fmt: skip
    for section, changes in sections.items():
        values[section] = values[section] | changes
    return values


def metric_lines(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics without the timings, exactly as they were written; one being written is none."""
    *whole, _ = (run / "metrics.jsonl").read_text().split("\n")
    lines = [json.loads(line) for line in whole]
    return [{key: value for key, value in line.items() if key not in TIMINGS} for line in lines]


def data_recipe(**values: Any) -> Recipe:
    """A recipe with these values, by the last word of their keys, and `last` as the choice of validation documents."""
    recipe = recipe_from_dict({"run": {"name": "data"}, "data": {"path": "corpus", "validation_choice": "last"}})
    return changed(recipe.resolved(), **values)


def changed(recipe: Recipe, **values: Any) -> Recipe:
    """The recipe with other values, by the last word of their keys; no check looks at them."""
    sections = {"seed": "run", "vocab_size": "model"}
    sections |= dict.fromkeys(("batch_size", "micro_batch_size", "validation_rows", "max_steps"), "trainer")
    return recipe.replaced({f"{sections.get(key, 'data')}.{key}": value for key, value in values.items()})
