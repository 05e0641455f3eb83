"""Plain text files as documents: each file is one, or it is cut at a separator."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from pldr_train.data import json_lines
from pldr_train.data.json_lines import UnusableFileError, opened_file


@dataclass(frozen=True)
class PlainText:
    """How files of plain text are cut into documents."""

    separator: str | None
    """None: each file is one document."""

    def read(self, path: Path) -> Iterator[tuple[int, pa.LargeBinaryArray]]:
        """Read with `read_texts` and this separator."""
        return read_texts(path, self.separator)


def read_texts(path: Path, separator: str | None) -> Iterator[tuple[int, pa.LargeBinaryArray]]:
    """The documents of a plain, gzip or zstd text file, some MB at a time, with the bytes of the file read for them.

    Line ends of Windows become those of Unix, and a leading byte order mark is dropped. With a separator, what stands
    between two of them is a document, without the line ends around it; blank ones are left out. Without one the file
    is a document as it is, unless it is empty. Bytes that are no UTF-8 stay as they are.

    Raises FileNotFoundError, and UnusableFileError for any other fault of the file.
    """
    mark = None if separator is None else separator.replace("\r\n", "\n").encode()
    line, rest = 1, b""
    with opened_file(path) as (chunks, tell):
        for chunk in _unix_lines(chunks):
            parts = [rest + chunk] if mark is None else (rest + chunk).split(mark)
            rest = parts.pop()
            documents, line = _documents(parts, mark or b"", line)
            if documents:
                yield tell(), pa.array(documents, pa.large_binary())
            _check_length(rest, line, separator)
        if mark is not None:
            rest = rest.strip(b"\n")
        if rest.strip() if mark is not None else rest:
            yield tell(), pa.array([rest], pa.large_binary())


def _documents(parts: list[bytes], mark: bytes, line: int) -> tuple[list[bytes], int]:
    """The parts that are not blank, without line ends around them; and the line where the next part begins."""
    documents = []
    for part in parts:
        _check_length(part, line, mark.decode())
        line += part.count(b"\n") + mark.count(b"\n")
        if part.strip():
            documents.append(part.strip(b"\n"))
    return documents, line


def _check_length(part: bytes, line: int, separator: str | None) -> None:
    if len(part) <= json_lines.MAX_LINE_BYTES:
        return
    limit = f"longer than the limit of {json_lines.MAX_LINE_BYTES:,} bytes"
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
    """The chunks with line feeds alone at the ends of lines, also where a line's end is cut in two."""
    held = b""
    for chunk in chunks:
        whole = held + chunk
        held = b"\r" if whole.endswith(b"\r") else b""
        yield whole.removesuffix(held).replace(b"\r\n", b"\n")
    if held:
        yield held
