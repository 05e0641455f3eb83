"""What the data rooms need of a recipe."""

from __future__ import annotations

from dataclasses import dataclass

from pldr_train.recipe import Recipe

QUICKSTART, HIDDEN_CLASS = "quickstart", "hidden_class"
"""Corpora that are built at first use, tokenizer included."""
PARQUET, JSONL, TEXT, HUB, TOKENS = "parquet", "jsonl", "text", "hub", "tokens"
SPREAD, LAST = "spread", "last"
PACK, PAD = "pack", "pad"


@dataclass(frozen=True)
class DataSettings:
    """What the datamodule needs of a recipe; fields are named and mean as the recipe's, lengths in tokens or rows."""

    source: str
    """"quickstart", "hidden_class", "parquet", "jsonl", "text", "hub" or "tokens"."""
    path: str | None
    text_column: str
    train_documents: tuple[int, int] | None
    validation_documents: tuple[int, int] | None
    validation_fraction: float
    tokenizer: str | None
    cache_dir: str
    context_length: int
    num_lanes: int
    shuffle: bool
    shuffle_window_documents: int
    num_workers: int
    seed: int
    vocab_size: int
    batch_size: int
    micro_batch_size: int
    validation_rows: int
    repository: str = "tiiuae/falcon-refinedweb"
    revision: str | None = None
    config: str | None = None
    split: str = "train"
    data_files: str | None = None
    packing: str = PACK
    min_document_tokens: int | None = None
    max_document_tokens: int | None = None
    on_bad_shard: str = "raise"
    retries: int = 8
    validation_choice: str = LAST
    """"spread" or "last": which documents validate without `validation_documents`."""
    document_separator: str | None = None
    manifest_path: str | None = None
    """Where the run keeps the list of its files; None: nowhere."""


def data_settings(recipe: Recipe) -> DataSettings:
    """Return what the data rooms need of a resolved recipe."""
    data, trainer = recipe.data, recipe.trainer
    assert trainer.micro_batch_size is not None
    return DataSettings(
        source=data.source,
        path=data.path,
        text_column=data.text_column,
        train_documents=data.train_documents,
        validation_documents=data.validation_documents,
        validation_fraction=data.validation_fraction,
        tokenizer=data.tokenizer,
        cache_dir=data.cache_dir,
        context_length=data.context_length,
        num_lanes=data.num_lanes,
        shuffle=data.shuffle,
        shuffle_window_documents=data.shuffle_window_documents,
        num_workers=data.num_workers,
        seed=recipe.run.seed,
        vocab_size=recipe.model.vocab_size,
        batch_size=trainer.batch_size,
        micro_batch_size=trainer.micro_batch_size,
        validation_rows=trainer.validation_rows,
        repository=data.repository,
        revision=data.revision,
        config=data.config,
        split=data.split,
        data_files=data.data_files,
        packing=data.packing,
        min_document_tokens=data.min_document_tokens,
        max_document_tokens=data.max_document_tokens,
        on_bad_shard=data.on_bad_shard,
        retries=data.retries,
        document_separator=data.document_separator,
        validation_choice=data.validation_choice or SPREAD,
    )
