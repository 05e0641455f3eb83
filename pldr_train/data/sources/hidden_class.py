"""The hidden-class task: rows whose one uncertain token no causal model can predict, and a leaking model can.

A row is four fixed tokens and then one of several class tokens, repeated to the end. The first class token is uniform
given what comes before it, so its NLL is at least ln(number of classes); a model that sees later tokens reads it off.

There are rows of bare ids, and a corpus of words with its tokenizer, for runs (data.source=hidden_class).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pldr_train.data.files import build_folder_atomically, write_file_atomically
from pldr_train.data.rows.lanes import permutation, permutation_key
from pldr_train.data.sources.quickstart import Document, write_shards
from pldr_train.data.tokenizer.pieces import NUM_FIXED_PIECES
from pldr_train.data.tokenizer.training import train_model

if TYPE_CHECKING:
    import torch

FIXED_IDS = (6, 7, 8, 9)
FIRST_CLASS_ID = 10
CLASS_POSITION = len(FIXED_IDS)
"""Position of the first class token in a row."""

FIXED_WORDS = ("the", "hidden", "class", "is")
CLASS_WORDS = ("black", "blue", "brown", "green", "grey", "red", "white", "yellow")
CONTEXT_LENGTH = 12
"""Of rows that hold a document of the corpus exactly: the fixed words, 8 class words, and the EOS, the last target."""
NUM_DOCUMENTS = 8192
NUM_PIECES = NUM_FIXED_PIECES + len(FIXED_WORDS + CLASS_WORDS) + len({*"▁".join(FIXED_WORDS + CLASS_WORDS)})
"""Of the corpus' tokenizer: the words, and the characters that SentencePiece always keeps."""

_FORMAT_VERSION = 1
_CORPUS_NAME = f"hidden-class-v{_FORMAT_VERSION}"
_ORDER_SEED = 1234


def hidden_class_rows(
    num_rows: int, context_length: int, generator: torch.Generator, num_classes: int = 8
) -> torch.Tensor:
    """Rows (num_rows, context_length + 1) int64 of the task; the vocabulary needs FIRST_CLASS_ID + num_classes ids.

    Args:
        num_rows: how many.
        context_length: at least 5, so that the class comes again after its first token.
        generator: of the classes, on the CPU.
        num_classes: how many there are, equally likely.
    """
    import torch  # noqa: PLC0415 - what opens a corpus does without

    assert context_length > CLASS_POSITION
    classes = FIRST_CLASS_ID + torch.randint(num_classes, (num_rows, 1), generator=generator)
    fixed = torch.tensor(FIXED_IDS).expand(num_rows, -1)
    return torch.cat((fixed, classes.expand(-1, context_length + 1 - CLASS_POSITION)), dim=1)


def hidden_class_documents() -> list[Document]:
    """The corpus' documents: of every 8 that follow each other from a multiple of 8 on, each has another class.

    On so balanced a sample no distribution that is the same for all has a mean NLL below ln 8, not even by chance.
    """
    documents = []
    for first in range(0, NUM_DOCUMENTS, len(CLASS_WORDS)):
        order = permutation(len(CLASS_WORDS), permutation_key("hidden class", _ORDER_SEED, first))
        for index, word in enumerate(CLASS_WORDS[place] for place in order):
            text = " ".join((*FIXED_WORDS, *[word] * (CONTEXT_LENGTH - len(FIXED_WORDS))))
            documents.append(Document(f"{first + index}", word, text))
    return documents


def build_hidden_class_corpus(cache_dir: str | Path) -> Path:
    """Folder of the corpus' Parquet shards under `cache_dir`, built if it is not there yet.

    Raises DataError when the folder cannot be written.
    """
    folder = Path(cache_dir) / _CORPUS_NAME
    if not folder.is_dir():
        build_folder_atomically(folder, _write)
    return folder


def hidden_class_tokenizer(cache_dir: str | Path) -> Path:
    """Path of the corpus' tokenizer, NUM_PIECES pieces of which each word is one, trained if it is not there yet.

    Raises DataError when it cannot be written.
    """
    path = Path(cache_dir) / f"{_CORPUS_NAME}-tokenizers" / f"unigram{NUM_PIECES}.model"
    if not path.is_file():
        # The corpus' own lines would not do: only what is followed by different things becomes a piece, and the fixed
        # words always follow each other.
        lines = [f"{word} {word}" for word in FIXED_WORDS + CLASS_WORDS]
        write_file_atomically(path, train_model(lines, NUM_PIECES))
    return path


def _write(folder: Path) -> None:
    write_shards(folder, "hidden-class", hidden_class_documents(), "hidden-class:", _CORPUS_NAME)
