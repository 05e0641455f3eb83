"""Which tokenizer a recipe means."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pldr_train.data import tokenizer_training
from pldr_train.data.documents import DocumentSource
from pldr_train.data.held_out import Spread
from pldr_train.data.hidden_class import hidden_class_tokenizer
from pldr_train.data.intervals import Interval
from pldr_train.data.settings import HIDDEN_CLASS, QUICKSTART, DataSettings


def is_given(settings: DataSettings) -> bool:
    """Whether the recipe names a tokenizer, so that none depends on the training documents."""
    return settings.tokenizer is not None


def recipe_tokenizer(
    settings: DataSettings,
    source: DocumentSource,
    train: Interval,
    spread: Spread | None,
    say: Callable[[str], None] = print,
) -> Path:
    """Path of the SentencePiece model that a recipe's run reads its documents with, built first if it has none.

    It is built of the documents of `train` that `spread` does not hold out.

    Not for data.source=tokens, which has its own. Raises DataError.
    """
    if settings.tokenizer is not None:
        return Path(settings.tokenizer)
    if settings.source == QUICKSTART:
        return tokenizer_training.quickstart_tokenizer(settings.cache_dir, settings.vocab_size, train, spread)
    if settings.source == HIDDEN_CLASS:
        return hidden_class_tokenizer(settings.cache_dir)
    cache = Path(settings.cache_dir)
    return tokenizer_training.automatic_tokenizer(source, train, settings.vocab_size, cache, say, spread)
