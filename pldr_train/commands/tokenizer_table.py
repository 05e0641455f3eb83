"""What `pldr-train tokenizer inspect` prints."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from pldr_train.data.settings import SPECIAL_PIECES
from pldr_train.data.tokenizer_report import TextReport, VocabularyReport

_SHARES = (
    "tokens_per_word",
    "bytes_per_token",
    "characters_per_token",
    "byte_token_share",
    "unknown_token_share",
    "vocabulary_used",
    "round_trip_share",
)


def as_json(path: Path, vocabulary: VocabularyReport, text: TextReport | None) -> str:
    """The reports as JSON: `file`, `vocabulary`, and `text`, null without documents."""
    measured = None if text is None else asdict(text) | {name: getattr(text, name) for name in _SHARES}
    content = {"file": str(path), "vocabulary": asdict(vocabulary), "text": measured}
    return json.dumps(content, indent=1, ensure_ascii=False)


def as_table(path: Path, vocabulary: VocabularyReport, text: TextReport | None) -> str:
    """The reports as lines of a name and a value."""
    special = ", ".join(f"{index} {piece}" for index, piece in enumerate(vocabulary.special_pieces))
    rows = [
        ("file", str(path)),
        ("pieces", f"{vocabulary.num_pieces:,}, of which {vocabulary.num_byte_pieces} bytes"),
        ("model", f"{vocabulary.model_type}, {vocabulary.normalization}{_options(vocabulary)}"),
        ("special", special),
        ("layout", "as published" if not vocabulary.differences else "differs from the published one:"),
        *(("", difference) for difference in vocabulary.differences),
        ("longest", "  ".join(vocabulary.longest_pieces)),
    ]
    if text is not None:
        rows += _text_rows(text)
    return "\n".join(f"{name:<22}{value}" for name, value in rows)


def _options(vocabulary: VocabularyReport) -> str:
    words = {"split_digits": "digits split", "byte_fallback": "byte fallback"}
    return "".join(f", {word}" for name, word in words.items() if getattr(vocabulary, name))


def _text_rows(text: TextReport) -> list[tuple[str, str]]:
    read = f"{text.documents:,} documents, {text.lines:,} lines, {text.words:,} words, {text.bytes / 1e6:,.2f} MB"
    used = f"{text.learned_pieces_used:,} of {text.learned_pieces:,} learned pieces"
    frequent = "  ".join(f"{piece} {count / text.tokens:.1%}" for piece, count in text.frequent_pieces)
    return [
        ("text", read),
        ("tokens", f"{text.tokens:,}"),
        ("tokens per word", f"{text.tokens_per_word:.3f}"),
        ("bytes per token", f"{text.bytes_per_token:.3f}"),
        ("characters per token", f"{text.characters_per_token:.3f}"),
        ("byte tokens", f"{text.byte_tokens:,}, {text.byte_token_share:.3%} of all"),
        (SPECIAL_PIECES[1], f"{text.unknown_tokens:,}, {text.unknown_token_share:.3%} of all"),
        ("vocabulary used", f"{text.vocabulary_used:.1%}, {used}"),
        ("lines that come back", f"{text.round_trip_share:.3%}, {text.round_trip_lines:,} of {text.lines:,}"),
        ("most frequent", frequent),
    ]
