"""Describe a SentencePiece tokenizer, and measure it on documents."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from numpy.typing import NDArray

from pldr_train.data.tokenizer.pieces import (
    END_ID,
    NUM_BYTE_PIECES,
    NUM_FIXED_PIECES,
    PAD_ID,
    SPECIAL_PIECES,
    START_ID,
    UNK_ID,
)
from pldr_train.data.tokenizer.settings import PAPER_SETTINGS
from pldr_train.errors import DataError

_MODEL_TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}
_SPACE = "▁"
_SHOWN_PIECES = 10


@dataclass(frozen=True)
class VocabularyReport:
    """The settings in a model's file."""

    num_pieces: int
    model_type: str
    normalization: str
    """Name of the rule."""
    split_digits: bool
    byte_fallback: bool
    special_pieces: tuple[str, ...]
    """Pieces 0 to 5."""
    pad_id: int
    unk_id: int
    bos_id: int
    eos_id: int
    num_byte_pieces: int
    longest_pieces: tuple[str, ...]
    """Learned pieces, the longest first."""
    differences: tuple[str, ...]
    """Differences from the published layout and the papers' settings, in words."""


@dataclass(frozen=True)
class TextReport:
    """Measurements of a tokenizer on documents. EOS is not counted."""

    documents: int
    lines: int
    """Lines that are not blank."""
    words: int
    """Runs of characters that are no whitespace."""
    characters: int
    bytes: int
    """Of UTF-8."""
    tokens: int
    byte_tokens: int
    """Tokens that are byte pieces."""
    unknown_tokens: int
    learned_pieces: int
    """Pieces of the vocabulary that are neither special nor bytes."""
    learned_pieces_used: int
    round_trip_lines: int
    """Lines that decode to their normalised text."""
    frequent_pieces: tuple[tuple[str, int], ...]
    """Most frequent pieces, with their numbers of tokens."""

    @property
    def tokens_per_word(self) -> float:
        """Fertility: tokens of a word."""
        return self.tokens / self.words if self.words else 0.0

    @property
    def bytes_per_token(self) -> float:
        """Compression."""
        return self.bytes / self.tokens if self.tokens else 0.0

    @property
    def characters_per_token(self) -> float:
        """Compression."""
        return self.characters / self.tokens if self.tokens else 0.0

    @property
    def byte_token_share(self) -> float:
        """Share of tokens that are byte pieces."""
        return self.byte_tokens / self.tokens if self.tokens else 0.0

    @property
    def unknown_token_share(self) -> float:
        """Share of tokens that are [UNK]."""
        return self.unknown_tokens / self.tokens if self.tokens else 0.0

    @property
    def vocabulary_used(self) -> float:
        """Share of the learned pieces that occur."""
        return self.learned_pieces_used / self.learned_pieces if self.learned_pieces else 0.0

    @property
    def round_trip_share(self) -> float:
        """Share of lines that decode to their normalised text."""
        return self.round_trip_lines / self.lines if self.lines else 1.0


def open_model(path: Path) -> sentencepiece.SentencePieceProcessor:
    """Load a SentencePiece model with any special pieces. Raises DataError."""
    if not path.is_file():
        raise DataError(f"{path}: no such file; give a SentencePiece .model, or a run's or exported model's folder")
    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError, ValueError) as error:
        raise DataError(f"{path}: not a SentencePiece model ({error}); give a .model file") from error


def describe_vocabulary(tokenizer: sentencepiece.SentencePieceProcessor) -> VocabularyReport:
    """Read a model's settings and compare its layout with the published one."""
    proto_module: Any = importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    proto: Any = proto_module.ModelProto.FromString(tokenizer.serialized_model_proto())
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    pieces = [piece.piece for piece in proto.pieces]
    kinds = [piece.type for piece in proto.pieces]
    kind = type(proto.pieces[0]) if pieces else proto_module.ModelProto.SentencePiece
    learned = [piece for piece, its_kind in zip(pieces, kinds, strict=True) if its_kind == kind.NORMAL]
    report = VocabularyReport(
        num_pieces=len(pieces),
        model_type=_MODEL_TYPES.get(trainer.model_type, str(trainer.model_type)),
        normalization=normalizer.name or "none",
        split_digits=trainer.split_digits,
        byte_fallback=trainer.byte_fallback,
        special_pieces=tuple(pieces[: len(SPECIAL_PIECES)]),
        pad_id=tokenizer.pad_id(),
        unk_id=tokenizer.unk_id(),
        bos_id=tokenizer.bos_id(),
        eos_id=tokenizer.eos_id(),
        num_byte_pieces=sum(its_kind == kind.BYTE for its_kind in kinds),
        longest_pieces=tuple(sorted(learned, key=lambda piece: (-len(piece), piece))[:_SHOWN_PIECES]),
        differences=(),
    )
    differences = [*_setting_differences(report), *_layout_differences(report, pieces, kinds, kind)]
    spaces = ("add_dummy_prefix", "remove_extra_whitespaces", "escape_whitespaces")
    differences += [f"{name} is false, published true" for name in spaces if not getattr(normalizer, name)]
    return VocabularyReport(**(vars(report) | {"differences": tuple(differences)}))


def _setting_differences(report: VocabularyReport) -> list[str]:
    published = {
        "model_type": PAPER_SETTINGS["model_type"],
        "normalization": PAPER_SETTINGS["normalization_rule_name"],
        "split_digits": PAPER_SETTINGS["split_digits"],
        "byte_fallback": PAPER_SETTINGS["byte_fallback"],
        "pad_id": PAD_ID,
        "unk_id": UNK_ID,
        "bos_id": START_ID,
        "eos_id": END_ID,
    }
    found = {name: getattr(report, name) for name in published}
    return [f"{name} is {found[name]}, published {value}" for name, value in published.items() if found[name] != value]


def _layout_differences(report: VocabularyReport, pieces: list[str], kinds: list[int], kind: Any) -> list[str]:
    published_kinds = [kind.CONTROL, kind.UNKNOWN, kind.CONTROL, kind.CONTROL, kind.USER_DEFINED, kind.USER_DEFINED]
    differences = []
    for index, (piece, its_kind) in enumerate(zip(SPECIAL_PIECES, published_kinds, strict=True)):
        if pieces[index : index + 1] != [piece]:
            differences.append(f"piece {index} is {''.join(pieces[index : index + 1]) or 'missing'}, published {piece}")
        elif kinds[index] != its_kind:
            names = [str(kind.Type.Name(value)).lower() for value in (kinds[index], its_kind)]
            differences.append(f"piece {index}, {piece}, is of kind {names[0]}, published {names[1]}")
    first = len(SPECIAL_PIECES)
    if pieces[first:NUM_FIXED_PIECES] != [f"<0x{byte:02X}>" for byte in range(NUM_BYTE_PIECES)]:
        differences.append(f"pieces {first} to {NUM_FIXED_PIECES - 1} are not the bytes 00 to FF in order")
    elif report.num_byte_pieces != NUM_BYTE_PIECES:
        differences.append(f"{report.num_byte_pieces} pieces are of kind byte, published {NUM_BYTE_PIECES}")
    return differences


def measure(tokenizer: sentencepiece.SentencePieceProcessor, texts: Iterable[str]) -> TextReport:
    """Tokenise documents, and measure the tokenizer on them."""
    size = tokenizer.get_piece_size()
    counts: NDArray[np.int64] = np.zeros(size, np.int64)
    documents = lines = words = characters = num_bytes = round_trips = 0
    for text in texts:
        ids = np.asarray(tokenizer.encode(text, return_type="numpy", add_bos=False, add_eos=False), np.int64)
        counts += np.bincount(ids, minlength=size)
        documents += 1
        words += len(text.split())
        characters += len(text)
        num_bytes += len(text.encode())
        for line in text.split("\n"):
            if line.strip():
                lines += 1
                round_trips += _decodes_to_itself(tokenizer, line)
    of_kind = [(tokenizer.is_byte(i), tokenizer.is_control(i) or tokenizer.is_unknown(i)) for i in range(size)]
    is_byte, is_special = (np.array(flags, dtype=bool) for flags in zip(*of_kind, strict=True))
    is_special[: len(SPECIAL_PIECES)] |= [
        tokenizer.id_to_piece(i) == piece for i, piece in enumerate(SPECIAL_PIECES[:size])
    ]
    learned = ~is_byte & ~is_special
    most = np.argsort(-counts, kind="stable")[:_SHOWN_PIECES]
    return TextReport(
        documents=documents,
        lines=lines,
        words=words,
        characters=characters,
        bytes=num_bytes,
        tokens=int(counts.sum()),
        byte_tokens=int(counts[is_byte].sum()),
        unknown_tokens=int(counts[tokenizer.unk_id()]),
        learned_pieces=int(learned.sum()),
        learned_pieces_used=int((counts[learned] > 0).sum()),
        round_trip_lines=round_trips,
        frequent_pieces=tuple((tokenizer.id_to_piece(int(i)), int(counts[i])) for i in most if counts[i]),
    )


def _decodes_to_itself(tokenizer: sentencepiece.SentencePieceProcessor, line: str) -> bool:
    """Tell whether a line's ids decode to its normalised text, without the space before its first word."""
    normalized = str(tokenizer.normalize(line)).replace(_SPACE, " ").removeprefix(" ")
    return bool(tokenizer.decode(tokenizer.encode(line, add_bos=False, add_eos=False)) == normalized)
