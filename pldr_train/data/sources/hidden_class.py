"""The hidden-class corpus: documents whose one uncertain word no causal model can predict, and a leaking model can.

A document is four fixed words and then one of eight class words, repeated to the end. The first class word is uniform
given the words before it, so its NLL is at least ln 8. A model that sees later tokens reads the class there.
"""

from __future__ import annotations

from pathlib import Path

from pldr_train.data.files import build_folder_atomically
from pldr_train.data.rows.lanes import permutation, permutation_key
from pldr_train.data.sources.quickstart import Document, write_shards

FIXED_WORDS = ("the", "hidden", "class", "is")
CLASS_WORDS = ("black", "blue", "brown", "green", "grey", "red", "white", "yellow")
CONTEXT_LENGTH = 12
"""Length of rows that hold exactly one document: the fixed words, 8 class words, and EOS as the last target."""
NUM_DOCUMENTS = 8192
_FORMAT_VERSION = 1
HIDDEN_CLASS_CORPUS_NAME = f"hidden-class-v{_FORMAT_VERSION}"
_ORDER_SEED = 1234


def hidden_class_documents() -> list[Document]:
    """Return the corpus' documents. In each block of 8 documents every class occurs once.

    The sample is balanced: no distribution that is the same for all documents has a mean NLL below ln 8, even by
    chance.
    """
    documents = []
    for first in range(0, NUM_DOCUMENTS, len(CLASS_WORDS)):
        order = permutation(len(CLASS_WORDS), permutation_key("hidden class", _ORDER_SEED, first))
        for index, word in enumerate(CLASS_WORDS[place] for place in order):
            text = " ".join((*FIXED_WORDS, *[word] * (CONTEXT_LENGTH - len(FIXED_WORDS))))
            documents.append(Document(f"{first + index}", word, text))
    return documents


def build_hidden_class_corpus(cache_dir: str | Path) -> Path:
    """Return the folder of the corpus' Parquet shards under `cache_dir`. Build it if there is none.

    Raises DataError if the folder cannot be written.
    """
    folder = Path(cache_dir) / HIDDEN_CLASS_CORPUS_NAME
    if not folder.is_dir():
        build_folder_atomically(folder, _write)
    return folder


def _write(folder: Path) -> None:
    write_shards(folder, "hidden-class", hidden_class_documents(), "hidden-class:", HIDDEN_CLASS_CORPUS_NAME)
