"""The format of documents tokenised ahead: shards of tokens, and the manifest of a folder of shards.

A shard is a safetensors file of three tensors, for a fixed number of consecutive documents:

    ends    uint64 (documents,)  number of the shard's tokens up to each document's end
    tokens  uint16 or uint32     ids of all documents end to end, each document followed by EOS
    flags   uint8 (documents,)   see `documents.py`; an UNREADABLE document has no token

Its header has a fixed length, so that tokens can be written before it. It depends on the numbers of documents and
tokens alone: a file with another header is no shard of this manifest.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pldr_train.data.documents import Unreadable
from pldr_train.data.rows.split import Interval
from pldr_train.data.sources.manifest import Manifest
from pldr_train.errors import CheckpointError, DataError
from pldr_train.untrusted import read_json

MANIFEST_FILE, UNFINISHED_FILE, TOKENIZER_FILE = "manifest.json", "unfinished.json", "tokenizer.model"
DOCUMENTS_PER_SHARD = 20_000
"""The default: about 20 MB of the papers' web pages, ten seconds of work."""
WRITE_AGAIN = "remove it, and run the same `pldr-train data tokenize` again: it writes what is missing"

_FORMAT = 1
_MOST_MANIFEST_BYTES = 2**30
_HEADER_BYTES = 384
_MAX_UINT16_VOCABULARY = 1 << 16
_DTYPES = {"uint16": ("<u2", "U16"), "uint32": ("<u4", "U32")}


def dtype_name(vocab_size: int) -> str:
    """Return the smallest type of ids below `vocab_size`."""
    return "uint16" if vocab_size <= _MAX_UINT16_VOCABULARY else "uint32"


def tokenizer_digest(model: bytes) -> str:
    """Return what identifies a tokenizer: BLAKE2b (16 bytes) of its file, in hex."""
    return hashlib.blake2b(model, digest_size=16).hexdigest()


@dataclass(frozen=True)
class ShardLayout:
    """Places of a shard's tensors in its file, in bytes."""

    documents: int
    tokens: int
    dtype_name: str
    ends_at: int = _HEADER_BYTES

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the tokens, little-endian."""
        return np.dtype(_DTYPES[self.dtype_name][0])

    @property
    def tokens_at(self) -> int:
        """Place of the first token."""
        return self.ends_at + 8 * self.documents

    @property
    def flags_at(self) -> int:
        """Place of the first flag."""
        return self.tokens_at + self.dtype.itemsize * self.tokens

    @property
    def num_bytes(self) -> int:
        """Size of the file."""
        return self.flags_at + self.documents


@lru_cache(maxsize=1024)
def header(layout: ShardLayout) -> bytes:
    """Return the first `ends_at` bytes of a shard's file."""
    parts = {
        "ends": ("U64", layout.documents, layout.ends_at, layout.tokens_at),
        "tokens": (_DTYPES[layout.dtype_name][1], layout.tokens, layout.tokens_at, layout.flags_at),
        "flags": ("U8", layout.documents, layout.flags_at, layout.num_bytes),
    }
    content = {
        name: {"dtype": kind, "shape": [size], "data_offsets": [start - layout.ends_at, stop - layout.ends_at]}
        for name, (kind, size, start, stop) in parts.items()
    }
    length = layout.ends_at - 8
    return length.to_bytes(8, "little") + json.dumps(content, separators=(",", ":")).encode().ljust(length)


@dataclass(frozen=True)
class Shard:
    """A finished shard."""

    name: str
    first: int
    """Number of its first document."""
    stop: int
    """Number after its last document."""
    tokens: int
    num_bytes: int
    """Size of its file."""
    sha256: str
    null: int
    empty: int
    invalid_utf8: int
    unreadable: int
    """Numbers of such documents, as the three before."""

    @property
    def documents(self) -> int:
        """Number of its documents."""
        return self.stop - self.first

    @classmethod
    def from_plain(cls, values: Any) -> Shard:
        """Rebuild a shard from `dataclasses.asdict`. Raises ValueError, KeyError or TypeError for anything else."""
        numbers = {key: values[key] for key in cls.__dataclass_fields__ if key not in ("name", "sha256")}
        if any(type(number) is not int or number < 0 for number in numbers.values()) or len(values) != len(numbers) + 2:
            raise ValueError(f"no description of a shard: {values}")
        return cls(name=str(values["name"]), sha256=str(values["sha256"]), **numbers)


@dataclass(frozen=True)
class StoreManifest:
    """The content of a folder of tokens and its source. Without shards it is the content to be written."""

    documents: Interval
    """[start, stop) in the source's numbering."""
    documents_per_shard: int
    tokenizer_blake2b: str
    vocab_size: int
    source: Manifest
    """The source's list of files, counted at least up to the last of the documents."""
    shards: tuple[Shard, ...] = ()
    unreadable_parts: tuple[Unreadable, ...] = ()

    @property
    def dtype_name(self) -> str:
        """Name of the tokens' type."""
        return dtype_name(self.vocab_size)

    @property
    def num_shards(self) -> int:
        """Number of shards of the finished folder."""
        start, stop = self.documents
        return -(-(stop - start) // self.documents_per_shard)

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """The source's fingerprint of the documents."""
        return self.source.fingerprint(*self.documents)

    @cached_property
    def totals(self) -> dict[str, int]:
        """Sums over the shards: documents, tokens, and documents that are null, empty and so on."""
        names = ("documents", "tokens", "null", "empty", "invalid_utf8", "unreadable")
        return {name: sum(getattr(shard, name) for shard in self.shards) for name in names}

    def shard_name(self, index: int) -> str:
        """Return the file name of a shard."""
        return f"tokens-{index:05d}.safetensors"

    def shard_documents(self, index: int) -> Interval:
        """Return the documents [first, stop) of a shard."""
        first = self.documents[0] + index * self.documents_per_shard
        return first, min(first + self.documents_per_shard, self.documents[1])

    def shards_of(self, start: int, stop: int) -> tuple[Shard, ...]:
        """Return the shards that hold the documents [start, stop)."""
        first, last = start - self.documents[0], stop - 1 - self.documents[0]
        return self.shards[first // self.documents_per_shard : last // self.documents_per_shard + 1]

    def layout(self, shard: Shard) -> ShardLayout:
        """Return the places of a shard's tensors in its file."""
        return ShardLayout(shard.documents, shard.tokens, self.dtype_name)

    def to_json(self) -> str:
        """Return the manifest as text, with a line for each shard."""
        content = {
            "format": _FORMAT,
            "documents": list(self.documents),
            "documents_per_shard": self.documents_per_shard,
            "tokenizer_blake2b": self.tokenizer_blake2b,
            "vocab_size": self.vocab_size,
            "dtype": self.dtype_name,
            "totals": self.totals,
            "unreadable_parts": [asdict(part) for part in self.unreadable_parts],
        }
        shards = ",\n".join(json.dumps(asdict(shard)) for shard in self.shards)
        head = json.dumps(content, ensure_ascii=False)[:-1]
        return f'{head},\n"shards": [\n{shards}\n],\n"source": {self.source.to_json().rstrip()}}}\n'

    @classmethod
    def load(cls, path: Path) -> StoreManifest:
        """Read what `to_json` wrote.

        Raises FileNotFoundError, or DataError naming a file that is damaged or of another format.
        """
        try:
            content = read_json(path, _MOST_MANIFEST_BYTES)
            if content["format"] != _FORMAT:
                raise DataError(f"{path}: its format is {content['format']}, this version reads {_FORMAT}")
            start, stop = map(int, content["documents"])
            found = cls(
                (start, stop),
                int(content["documents_per_shard"]),
                str(content["tokenizer_blake2b"]),
                int(content["vocab_size"]),
                Manifest.from_json(json.dumps(content["source"]), str(path)),
                tuple(map(Shard.from_plain, content["shards"])),
                tuple(Unreadable(**part) for part in content["unreadable_parts"]),
            )
            found._check()
        except FileNotFoundError:
            raise
        except DataError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, CheckpointError) as error:
            raise DataError(
                f"{path}: not a whole manifest of tokens ({error}); copy it anew from where it was written, or run "
                "`pldr-train data tokenize` into another folder"
            ) from error
        return found

    def _check(self) -> None:
        """Raise ValueError unless the numbers are consistent."""
        start, stop = self.documents
        if not (0 <= start < stop <= self.source.num_documents and self.documents_per_shard > 0):
            raise ValueError(f"documents {list(self.documents)} of {self.source.num_documents}")
        if self.shards and len(self.shards) != self.num_shards:
            raise ValueError(f"{len(self.shards)} shards, not {self.num_shards}")
        for index, shard in enumerate(self.shards):
            self.check_shard(index, shard)

    def check_shard(self, index: int, shard: Shard) -> None:
        """Raise ValueError unless this can be the shard `index`."""
        expected = (self.shard_name(index), *self.shard_documents(index), self.layout(shard).num_bytes)
        if (shard.name, shard.first, shard.stop, shard.num_bytes) != expected:
            raise ValueError(
                f"shard {index} is {(shard.name, shard.first, shard.stop, shard.num_bytes)}, not {expected}"
            )


class ShardFile:
    """An open shard. It is read, not mapped: a truncated file raises an error, where a map would end the process.

    Indices of documents and places of tokens count from the shard's first one.
    """

    def __init__(self, path: Path, descriptor: int, layout: ShardLayout) -> None:
        self._path, self._descriptor, self._layout = path, descriptor, layout

    def ends(self, first: int, last: int) -> NDArray[np.int64]:
        """Return (last - first + 1,) places of the documents' first tokens, and the place after the last document."""
        found = np.zeros(last - first + 1, "<u8")
        skip = int(first == 0)  # no token is before the first document's
        self._read_into(found[skip:], self._layout.ends_at + 8 * (first - 1 + skip))
        ends = found.astype(np.int64)
        if ends[0] < 0 or ends[-1] > self._layout.tokens or (ends[1:] < ends[:-1]).any():
            raise DataError(f"{self._path}: damaged, its documents' ends do not ascend; {WRITE_AGAIN}")
        return ends

    def flags(self, first: int, last: int) -> NDArray[np.uint8]:
        """Return (last - first,) flags of documents."""
        found = np.empty(last - first, np.uint8)
        self._read_into(found, self._layout.flags_at + first)
        return found

    def tokens_into(self, target: NDArray[Any], start: int) -> None:
        """Fill `target`, of the layout's type, with the tokens from place `start` on."""
        self._read_into(target, self._layout.tokens_at + self._layout.dtype.itemsize * start)

    def documents_into(
        self, target: NDArray[Any], starts: NDArray[np.int64], lengths: NDArray[np.int64], places: NDArray[np.int64]
    ) -> None:
        """Fill `target` from each of `starts` on with `lengths` tokens from `places` on, as `tokens_into` does."""
        width = self._layout.dtype.itemsize
        view = target.data.cast("B") if target.size else memoryview(b"")
        froms = places * width + self._layout.tokens_at
        triples = zip((starts * width).tolist(), ((starts + lengths) * width).tolist(), froms.tolist(), strict=True)
        for start, stop, place in triples:
            self._read(view[start:stop], place)

    def _read_into(self, target: NDArray[Any], place: int) -> None:
        if target.size:
            self._read(target.data.cast("B"), place)

    def _read(self, view: memoryview, place: int) -> None:
        while view:
            done = os.preadv(self._descriptor, [view], place)
            if done == 0:
                raise DataError(f"{self._path}: ends too early, it was cut short; {WRITE_AGAIN}")
            view, place = view[done:], place + done


@contextmanager
def open_shard(path: Path, layout: ShardLayout) -> Iterator[ShardFile]:
    """Open a shard. Raises DataError naming it if it is missing, damaged or cannot be read."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            check_header(path, descriptor, layout)
            yield ShardFile(path, descriptor, layout)
        finally:
            os.close(descriptor)
    except FileNotFoundError as error:
        raise DataError(f"{path}: missing; put it back, or {_write_anew()}") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); repair the disk, or {WRITE_AGAIN}") from error


def check_header(path: Path, descriptor: int, layout: ShardLayout) -> None:
    """Raise DataError unless an open file has the size and the header of such a shard."""
    size = os.fstat(descriptor).st_size
    if size != layout.num_bytes:
        raise DataError(f"{path}: has {size:,} bytes, not the {layout.num_bytes:,} of the manifest; {WRITE_AGAIN}")
    if os.pread(descriptor, layout.ends_at, 0) != header(layout):
        raise DataError(f"{path}: its header is not that of {layout.documents:,} documents; {WRITE_AGAIN}")


def _write_anew() -> str:
    return WRITE_AGAIN.removeprefix("remove it, and ")


def merged(parts: Sequence[Unreadable]) -> tuple[Unreadable, ...]:
    """Join the unreadable parts that the shards' bounds have cut."""
    found: list[Unreadable] = []
    for part in sorted(parts, key=lambda part: part.start):
        last = found[-1] if found else None
        if last is not None and (last.stop, last.place, last.reason) == (part.start, part.place, part.reason):
            found[-1] = Unreadable(last.start, part.stop, part.place, part.reason)
        else:
            found.append(part)
    return tuple(found)
