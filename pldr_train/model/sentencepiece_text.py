"""SentencePiece's treatment of text before and after its model, without the sentencepiece package.

A SentencePiece model carries a table of replacements (`precompiled_charsmap`, for instance nmt_nfkc) that is applied by
longest match from left to right. The tokenizers library applies the same table to grapheme clusters, which gives other
text wherever a match and a cluster differ (combining marks, Hangul jamo, long emoji). `CharsMap` applies it as
SentencePiece does; `pieces_to_text` is the way back.

Source of the formats: google/sentencepiece, src/normalizer.cc and src/sentencepiece_processor.cc; the trie is a
double array of darts-clone.
"""

from __future__ import annotations

import array
import re
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

SPECIAL_PIECES = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "bos_token": "[START]",
    "eos_token": "[END]",
    "sep_token": "[SEP]",
    "cls_token": "[CLS]",
}
"""The published special pieces; their ids are 0 to 5 in this order."""
SPACE_PIECE = "▁"
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
_REPLACEMENT = "\ufffd"
_ASCII_TEXT = [chr(code) for code in range(0x20, 0x7F)]


class CharsMap:
    """The replacement table of a SentencePiece model.

    Args:
        blob: `precompiled_charsmap`, little endian: the trie's size in bytes, the trie's 32-bit units, and the
            replacements, each ended by a zero byte.

    Raises:
        ValueError: the blob is not of this form.
    """

    def __init__(self, blob: bytes) -> None:
        size = int.from_bytes(blob[:4], "little")
        if len(blob) < 8 or size % 4 or not 0 < size <= len(blob) - 4:
            raise ValueError("precompiled_charsmap is not whole: its trie is longer than the data")
        self._units = array.array("I", blob[4 : 4 + size])
        if sys.byteorder == "big":
            self._units.byteswap()
        self._texts = blob[4 + size :]
        self._of_char: dict[str, tuple[str | None, bool]] = {}
        plain = [c for c in _ASCII_TEXT if self._single(c)[0] is None and not self._continues_in_ascii(c)]
        self._plain = frozenset(plain)
        self._candidates = re.compile("[^" + re.escape("".join(plain)) + "]") if plain else re.compile("(?s:.)")

    def replacements(self, text: str) -> list[tuple[int, int, str]]:
        """(start, stop, replacement) of every part of the text that changes, from left to right."""
        if self._candidates.search(text) is None:
            return []
        changes, place, length = [], 0, len(text)
        while place < length:
            char = text[place]
            if char in self._plain and (place + 1 == length or text[place + 1] in self._plain):
                place += 1
                continue
            stop, replacement = self._longest(text, place)
            if replacement is not None and replacement != text[place:stop]:
                changes.append((place, stop, replacement))
            place = stop
        return changes

    def _longest(self, text: str, place: int) -> tuple[int, str | None]:
        """End and replacement of the longest match at a place; one character and `None` if nothing matches."""
        replacement, continues = self._single(text[place])
        stop = place + 1
        if not continues:
            return stop, replacement
        node = 0
        for end in range(place, len(text)):
            for byte in text[end].encode("utf-8", "surrogatepass"):
                found = self._child(node, byte)
                if found is None:
                    return stop, replacement
                node = found
            value = self._value(node)
            if value is not None:
                stop, replacement = end + 1, value
        return stop, replacement

    def _single(self, char: str) -> tuple[str | None, bool]:
        """Replacement of a character alone, and whether longer matches begin with it."""
        known = self._of_char.get(char)
        if known is None:
            node: int | None = 0
            for byte in char.encode("utf-8", "surrogatepass"):
                node = None if node is None else self._child(node, byte)
            if node is None:
                known = (None, False)
            else:
                known = (self._value(node), any(self._child(node, byte) is not None for byte in range(1, 256)))
            self._of_char[char] = known
        return known

    def _continues_in_ascii(self, char: str) -> bool:
        node = self._child(0, ord(char))
        return node is not None and any(self._child(node, ord(other)) is not None for other in _ASCII_TEXT)

    # A unit holds a label in its lowest 8 bits (and bit 31, set in values), whether a value hangs below it in bit 8,
    # and the offset to its children in bits 10 to 30, shifted by 8 more if bit 9 is set.

    def _child(self, node: int, byte: int) -> int | None:
        child = self._offset(node) ^ byte
        if child >= len(self._units) or self._units[child] & 0x800000FF != byte:
            return None
        return child

    def _value(self, node: int) -> str | None:
        unit = self._units[node]
        if not unit >> 8 & 1:
            return None
        start = self._units[self._offset(node)] & 0x7FFFFFFF
        return self._texts[start : self._texts.index(0, start)].decode("utf-8")

    def _offset(self, node: int) -> int:
        unit = self._units[node]
        return node ^ (unit >> 10) << ((unit & 0x200) >> 6)


class CharsMapNormalizer:
    """`CharsMap` as a normalizer of the tokenizers library, which keeps track of where each character came from."""

    def __init__(self, charsmap: CharsMap) -> None:
        self._charsmap = charsmap

    def normalize(self, normalized: Any) -> None:
        """Change a `NormalizedString` in place."""
        text: str = normalized.normalized
        changes = self._charsmap.replacements(text)
        if not changes:
            return
        parts, end = [], 0
        for start, stop, replacement in changes:
            parts += [text[end:start], replacement]
            end = stop
        expected = "".join([*parts, text[end:]])
        # The library can only replace every occurrence of a pattern. The longest first is nearly always right.
        for source, replacement in sorted({(text[a:b], r) for a, b, r in changes}, key=lambda pair: -len(pair[0])):
            normalized.replace(source, replacement)
        if normalized.normalized != expected:
            normalized.replace(normalized.normalized, expected)


def pieces_to_text(pieces: Sequence[str], special: Collection[str] = ()) -> str:
    """Return the text of pieces, as SentencePiece decodes them; `special` ones stand as they are.

    Spaces at the beginning are dropped: a model of this kind puts one there itself and removes others. Bytes that are
    no UTF-8 come out as one replacement character each.
    """
    text: list[str] = []
    held = bytearray()

    def release() -> None:
        if held:
            text.append(_decode_bytes(bytes(held)))
            held.clear()

    for piece in pieces:
        if (byte := _BYTE_PIECE.fullmatch(piece)) is not None:
            held.append(int(byte[1], 16))
            continue
        release()
        if piece in special:
            text.append(piece)
            continue
        if not any(text):
            piece = piece.removeprefix(SPACE_PIECE)  # noqa: PLW2901
        text.append(piece.replace(SPACE_PIECE, " "))
    release()
    return "".join(text)


def _decode_bytes(data: bytes) -> str:
    parts = []
    while data:
        try:
            parts.append(data.decode("utf-8"))
            break
        except UnicodeDecodeError as error:
            parts += [data[: error.start].decode("utf-8"), _REPLACEMENT]
            data = data[error.start + 1 :]
    return "".join(parts)


def load_model_file(path: Any) -> Any:
    """Return the `SentencePieceProcessor` of a `.model` file.

    Raises:
        ImportError: sentencepiece is not installed.
        ValueError: the file is missing, is no SentencePiece model, or its pieces 0 to 5 are not the published ones.
    """
    try:
        import sentencepiece  # noqa: PLC0415 - a folder with tokenizer.json does without
    except ImportError as error:
        raise ImportError(
            f"vocab_file={path} needs sentencepiece: pip install sentencepiece, or load a tokenizer.json"
        ) from error
    fix = "give a SentencePiece .model file of a PLDR-LLM"
    if path is None or not Path(path).is_file():
        raise ValueError(f"vocab_file={path}: no such file; {fix}")
    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError, ValueError) as error:
        raise ValueError(f"vocab_file={path} is no SentencePiece model ({error}); {fix}") from error
    expected = list(SPECIAL_PIECES.values())
    found = [model.id_to_piece(index) for index in range(min(len(expected), model.get_piece_size()))]
    if found != expected:
        raise ValueError(f"vocab_file={path}: its pieces 0 to 5 are {' '.join(found)}, not {' '.join(expected)}; {fix}")
    return model
