"""Texts in files of JSON lines and of plain text, plain, gzip or zstd.

Arrow parses a block of plain JSON lines several times as fast as Python, and without its lock. Python parses a block
with blank lines, errors or bytes that are no UTF-8, line by line.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.json as pj

MAX_LINE_BYTES = 64 * 1024**2
"""Longest line, or document of a plain text. Reading one takes several times as much memory, and a few kB of a
compressed file can hold a line of any length."""

_BLOCK_BYTES = 4 * 1024**2
_GZIP = b"\x1f\x8b"
_ZSTD = b"\x28\xb5\x2f\xfd"
_ZSTD_SKIPPABLE = re.compile(rb"[\x50-\x5f]\x2a\x4d\x18")
_UTF8_MARK, _UTF16_MARKS = b"\xef\xbb\xbf", (b"\xff\xfe", b"\xfe\xff")
# int() refuses numbers of thousands of digits, which are valid JSON.
_DECODER = json.JSONDecoder(parse_int=float)
_ESCAPE = re.compile(r"\\(?:u[dD][89abAB]\w\w\\u[dD][c-fC-F]\w\w|(u[dD][89a-fA-F]\w\w)|.)", re.DOTALL)
_MAX_SHOWN_KEYS = 20
_KINDS = ((bool, "true or false"), ((int, float), "a number"), (str, "a text"), (list, "a list"), (dict, "an object"))


class UnusableFileError(pa.ArrowInvalid):  # type: ignore[misc]
    """A file with a fault. The message, one line, names the place in the file, and the fix.

    It is an error of Arrow's, so that it counts as a fault of the file and not of the disk.
    """


class Block(NamedTuple):
    """Whole lines of a file."""

    first_line: int
    """Number of the first one, from 1."""
    content: bytes
    """The lines, each with its line feed."""
    read_bytes: int
    """Bytes of the stored file that were read up to its end."""


def read_blocks(path: Path) -> Iterator[Block]:
    """Yield the lines of a plain, gzip or zstd file in order, some MB at a time.

    The first bytes decide the compression. A leading byte order mark is dropped. Raises FileNotFoundError, and
    UnusableFileError for any other fault.
    """
    with opened_file(path) as (chunks, tell):
        for line, content in _whole_lines(chunks):
            yield Block(line, content, tell())


@contextmanager
def opened_file(path: Path) -> Iterator[tuple[Iterator[bytes], Callable[[], int]]]:
    """Open a plain, gzip or zstd file: its decompressed content in chunks of some MB, and a call for the bytes read.

    A leading byte order mark is dropped. Raises as `read_blocks`, also while it is read.
    """
    try:
        with _opened(path) as (read, tell):
            yield _chunks(read), tell
    except FileNotFoundError:
        raise
    except EOFError as error:
        raise UnusableFileError("its gzip stream ends too early; fetch the file again") from error
    except (zlib.error, gzip.BadGzipFile) as error:
        raise UnusableFileError(f"its gzip stream is damaged ({error}); fetch the file again") from error
    except OSError as error:
        raise UnusableFileError(_reason(error)) from error


def _reason(error: OSError) -> str:
    text = str(error)
    if "requires too much memory" in text:
        return (
            "its zstd window is larger than the 128 MiB that can be read; compress it again without --long=31 (zstd -d "
            "--long=31, then zstd)"
        )
    if "Truncated" in text:
        return "its zstd stream ends too early; fetch the file again"
    if "ZSTD" in text:
        return f"its zstd stream is damaged ({text}); fetch the file again"
    return f"it cannot be read ({error.strerror or text}); check the disk and the file's permissions"


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Callable[[int], bytes], Callable[[], int]]]:
    """Open a file: a call that reads decompressed bytes, and one for the place in the stored file."""
    with open(path, "rb") as raw:
        magic = raw.read(4)
        raw.seek(0)
        is_gzip, is_zstd = magic.startswith(_GZIP), magic == _ZSTD or _ZSTD_SKIPPABLE.fullmatch(magic) is not None
        if not magic and path.name.endswith((".gz", ".zst")):
            raise UnusableFileError("it is empty, not even compressed; fetch the file again")
        if is_gzip:
            with gzip.GzipFile(fileobj=raw) as file:
                yield file.read, raw.tell
        elif is_zstd:
            with pa.CompressedInputStream(pa.PythonFile(raw), "zstd") as file:
                yield file.read, raw.tell
        else:
            yield raw.read, raw.tell


def _chunks(read: Callable[[int], bytes]) -> Iterator[bytes]:
    first = read(_BLOCK_BYTES)
    if first.startswith(_UTF16_MARKS):
        raise UnusableFileError("it is UTF-16, not UTF-8; convert it, for instance with iconv")
    if first:
        yield first.removeprefix(_UTF8_MARK)
    while chunk := read(_BLOCK_BYTES):
        yield chunk


def _whole_lines(chunks: Iterator[bytes]) -> Iterator[tuple[int, bytes]]:
    """Yield blocks of whole lines, each with the number of its first line."""
    pieces: list[bytes] = []
    line, num_pending = 1, 0
    for chunk in chunks:
        cut = chunk.rfind(b"\n") + 1
        if num_pending + (chunk.find(b"\n") if cut else len(chunk)) > MAX_LINE_BYTES:
            raise UnusableFileError(
                f"line {line} is longer than the limit of {MAX_LINE_BYTES:,} bytes; write one document on each line, "
                "and split such a document"
            )
        if cut:
            content = b"".join([*pieces, chunk[:cut]])
            yield line, content
            line += content.count(b"\n")
            pieces, num_pending = [], 0
        pieces.append(chunk[cut:])
        num_pending += len(chunk) - cut
    if num_pending:
        yield line, b"".join([*pieces, b"\n"])


def texts_of(block: Block, key: str) -> pa.LargeBinaryArray:
    """Return the bytes of the key's text in each line that is not blank; null if the value is null or missing.

    Bytes that are no UTF-8 stay as they are. Raises UnusableFileError naming the line.
    """
    num_lines = block.content.count(b"\n")
    # Arrow knows values, not lines. If each line begins an object, both are the same.
    if block.content.startswith(b"{") + block.content.count(b"\n{") == num_lines:
        texts = _parsed_by_arrow(block.content, key)
        if texts is not None and len(texts) == num_lines:
            return texts
    found = []
    for number, line in enumerate(block.content.split(b"\n"), block.first_line):
        if line.strip():
            found.append(_text_of(_object_of(line, number), number, key))
    return pa.array(found, pa.large_binary())


def _parsed_by_arrow(content: bytes, key: str) -> pa.LargeBinaryArray | None:
    schema = pa.schema([(key, pa.large_string())])
    try:
        table = pj.read_json(
            pa.BufferReader(content),
            read_options=pj.ReadOptions(use_threads=False, block_size=len(content) + 1),
            parse_options=pj.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore"),
        )
        texts = table.column(0).combine_chunks()
        texts.validate(full=True)
    except pa.ArrowException:
        return None
    return texts.view(pa.large_binary())


def _object_of(line: bytes, number: int) -> dict[str, Any]:
    # Bytes that are no UTF-8 become lone surrogates, which are written back as the same bytes. An escape of a lone
    # surrogate is no such byte.
    text = line.decode("utf-8", errors="surrogateescape")
    if "\\u" in text:
        text = _ESCAPE.sub(lambda found: "\\ufffd" if found[1] else found[0], text)
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise UnusableFileError(
            f"line {number} is no JSON ({error.msg}, column {error.pos + 1}); write one JSON object on each line"
        ) from error
    except RecursionError as error:
        raise UnusableFileError(f"line {number} is nested too deeply to be read; correct or remove it") from error
    if not isinstance(value, dict):
        raise UnusableFileError(f"line {number} is {_kind(value)}, not an object; write one JSON object on each line")
    return value


def _text_of(value: dict[str, Any], number: int, key: str) -> bytes | None:
    text = value.get(key)
    if text is None:
        return None
    if not isinstance(text, str):
        raise UnusableFileError(
            f"line {number}: {key!r} (data.text_column) is {_kind(text)}, not a text; correct or remove the line, or "
            f"set data.text_column to another key (this line has {_listed(value)})"
        )
    return text.encode("utf-8", errors="surrogateescape")


def check_key_occurs(path: Path, key: str) -> None:
    """Raise UnusableFileError with the keys of the file if no line has the key. Stop reading at the first that has."""
    keys: dict[str, None] = {}
    for block in read_blocks(path):
        for number, line in enumerate(block.content.split(b"\n"), block.first_line):
            if line.strip():
                keys.update(dict.fromkeys(_object_of(line, number)))
                if key in keys:
                    return
    if keys:
        raise UnusableFileError(
            f"no line has the key {key!r} (data.text_column); there are {_listed(keys)}; set data.text_column to the "
            "one that holds the text"
        )


def _listed(keys: dict[str, Any]) -> str:
    more = f" and {len(keys) - _MAX_SHOWN_KEYS} more" if len(keys) > _MAX_SHOWN_KEYS else ""
    return ", ".join(list(keys)[:_MAX_SHOWN_KEYS]) + more


def _kind(value: object) -> str:
    return next((words for types, words in _KINDS if isinstance(value, types)), "null")


@dataclass(frozen=True)
class PlainText:
    """How files of plain text are cut into documents."""

    separator: str | None
    """None: each file is one document."""

    def read(self, path: Path) -> Iterator[tuple[int, pa.LargeBinaryArray]]:
        """Yield the documents of a plain, gzip or zstd file, some MB at a time, and how many bytes of it were read.

        Line ends of Windows become those of Unix. A leading byte order mark is dropped. Bytes that are no UTF-8 stay.
        With a separator, each text between two separators is a document, without the line ends around it; blank ones
        are dropped. Without a separator the whole file is one document, unless it is empty.

        Raises FileNotFoundError, and UnusableFileError for any other fault of the file.
        """
        separator = self.separator
        mark = None if separator is None else separator.replace("\r\n", "\n").encode()
        line, rest = 1, b""
        with opened_file(path) as (chunks, tell):
            for chunk in _unix_lines(chunks):
                parts = [rest + chunk] if mark is None else (rest + chunk).split(mark)
                rest = parts.pop()
                documents, line = _not_blank(parts, mark or b"", line)
                if documents:
                    yield tell(), pa.array(documents, pa.large_binary())
                _check_length(rest, line, separator)
            if mark is not None:
                rest = rest.strip(b"\n")
            if rest.strip() if mark is not None else rest:
                yield tell(), pa.array([rest], pa.large_binary())


def _not_blank(parts: list[bytes], mark: bytes, line: int) -> tuple[list[bytes], int]:
    """Return the parts that are not blank, without line ends around them, and the line where the next part begins."""
    documents = []
    for part in parts:
        _check_length(part, line, mark.decode())
        line += part.count(b"\n") + mark.count(b"\n")
        if part.strip():
            documents.append(part.strip(b"\n"))
    return documents, line


def _check_length(part: bytes, line: int, separator: str | None) -> None:
    if len(part) <= MAX_LINE_BYTES:
        return
    limit = f"longer than the limit of {MAX_LINE_BYTES:,} bytes"
    if separator is None:
        raise UnusableFileError(
            f"as one document it is {limit}; set data.document_separator, for instance to a blank line "
            "(data.document_separator='\"\\n\\n\"'), or make several files of it"
        )
    raise UnusableFileError(
        f"the document that begins in line {line} is {limit}; set data.document_separator to something that occurs "
        "more often"
    )


def _unix_lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Replace the line ends of Windows by line feeds, also where two chunks share one."""
    held = b""
    for chunk in chunks:
        whole = held + chunk
        held = b"\r" if whole.endswith(b"\r") else b""
        yield whole.removesuffix(held).replace(b"\r\n", b"\n")
    if held:
        yield held
