"""The quickstart corpus: the running Python's own documentation, as Parquet shards in RefinedWeb's schema.

Nothing is downloaded. Docstrings come from the standard library's source files, which are parsed, not imported.
"""

from __future__ import annotations

import ast
import platform
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pldr_train.data.files import build_folder_atomically
from pldr_train.data.rows.lanes import permutation, permutation_key
from pldr_train.errors import DataError

CORPUS_FORMAT_VERSION = 1
REFINEDWEB_SCHEMA = pa.schema(
    [
        ("content", pa.string()),
        ("url", pa.string()),
        ("timestamp", pa.timestamp("s")),
        ("dump", pa.string()),
        ("segment", pa.string()),
        ("image_urls", pa.list_(pa.list_(pa.string()))),
    ]
)
"""Parquet has no seconds: files hold milliseconds, which `datasets` casts to a dataset card's features."""

_NUM_SHARDS = 4
_ROWS_PER_GROUP = 128
_MIN_DOCUMENT_CHARS = 80
_MIN_CORPUS_CHARS = 1_000_000
_ORDER_SEED = 1234
# Tests, third-party packages and code that only serves other tools: no prose worth reading.
_SKIPPED_FOLDERS = frozenset(
    "test tests idle_test idlelib lib2to3 ensurepip turtledemo pydoc_data".split()
    + "site-packages dist-packages lib-dynload".split()
)


class Document(NamedTuple):
    """One text of the corpus. `name` is unique, and sorts the documents before the permutation."""

    name: str
    segment: str
    content: str


def quickstart_corpus_name() -> str:
    """Return the name of the corpus' folder, with the Python release of the texts and the version of the layout."""
    return f"quickstart-python{platform.python_version()}-v{CORPUS_FORMAT_VERSION}"


def build_quickstart_corpus(cache_dir: str | Path) -> Path:
    """Return the folder of the corpus' Parquet shards under `cache_dir`. Build it if there is none (some seconds).

    The documents are in a fixed random order, so any interval is a fair sample. Raises DataError if the running Python
    lacks its documentation or sources, or if the folder cannot be written.
    """
    folder = Path(cache_dir) / quickstart_corpus_name()
    if not folder.is_dir():
        build_folder_atomically(folder, _write_shards)
    return folder


def collect_documents() -> list[Document]:
    """Return the corpus' documents in order, without duplicates and short ones. Raises DataError if too few."""
    by_content: dict[str, Document] = {}
    for document in sorted([*_topics(), *_docstrings(Path(sysconfig.get_path("stdlib")))]):
        if len(document.content) >= _MIN_DOCUMENT_CHARS:
            by_content.setdefault(" ".join(document.content.split()), document)
    documents = list(by_content.values())
    chars = sum(len(document.content) for document in documents)
    if chars < _MIN_CORPUS_CHARS:
        raise DataError(
            f"data.source=quickstart: this Python's documentation has {chars} characters, {_MIN_CORPUS_CHARS} are "
            f"needed; its standard library at {sysconfig.get_path('stdlib')} seems to lack sources: use a complete "
            "Python installation, or data.source=parquet with your own files"
        )
    order = permutation(len(documents), permutation_key("quickstart corpus", _ORDER_SEED))
    return [documents[index] for index in order]


def _topics() -> Iterator[Document]:
    try:
        from pydoc_data.topics import topics  # noqa: PLC0415 - half a megabyte, for a build only
    except ImportError:
        return  # missing in some distributions; the docstrings may suffice
    for name, text in topics.items():
        yield Document(f"topics/{name}", "topics", text.strip())


def _docstrings(library: Path) -> Iterator[Document]:
    for path in library.rglob("*.py"):
        parts = path.relative_to(library).parts
        if _SKIPPED_FOLDERS.isdisjoint(parts):
            yield from _docstrings_of_file(path, ".".join(parts).removesuffix(".py").removesuffix(".__init__"))


def _docstrings_of_file(path: Path, module: str) -> Iterator[Document]:
    try:
        with tokenize.open(path) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old modules
            tree = ast.parse(file.read())
    except (OSError, SyntaxError, UnicodeDecodeError):
        return  # distributions have dangling links; a corpus that lacks too much is refused
    yield from _docstrings_of_node(tree, f"docstrings/{module}")


def _docstrings_of_node(node: ast.AST, name: str) -> Iterator[Document]:
    """Yield the docstrings of a module, class or function and of all definitions inside it."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    if isinstance(node, documented) and (text := ast.get_docstring(node)):
        yield Document(name, "docstrings", text.strip())
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.expr):
            continue  # holds no definition, and may nest deeper than Python's stack
        # Definitions repeat under `if`; their line number tells them apart.
        inner = f"{name}.{child.name}:{child.lineno}" if isinstance(child, documented[1:]) else name
        yield from _docstrings_of_node(child, inner)


def _write_shards(folder: Path) -> None:
    version = platform.python_version()
    write_shards(folder, "quickstart", collect_documents(), f"python://{version}/", f"python-{version}")


def write_shards(folder: Path, prefix: str, documents: list[Document], origin: str, dump: str) -> None:
    """Write documents, in their order, as Parquet shards in RefinedWeb's schema.

    Args:
        folder: an existing one.
        prefix: of the files' names.
        documents: what is written.
        origin: beginning of each document's `url`; its name is the end.
        dump: value of that column.
    """
    for shard in range(_NUM_SHARDS):
        start, stop = (len(documents) * bound // _NUM_SHARDS for bound in (shard, shard + 1))
        table = _table(documents[start:stop], origin, dump)
        name = f"{prefix}-{shard:05d}-of-{_NUM_SHARDS:05d}.parquet"
        pq.write_table(table, folder / name, row_group_size=_ROWS_PER_GROUP, compression="zstd")


def _table(documents: list[Document], origin: str, dump: str) -> pa.Table:
    columns = {
        "content": [document.content for document in documents],
        "url": [f"{origin}{document.name}" for document in documents],
        "timestamp": [None for _ in documents],  # nothing was crawled
        "dump": [dump for _ in documents],
        "segment": [document.segment for document in documents],
        "image_urls": [[] for _ in documents],
    }
    return pa.Table.from_pydict(columns, schema=REFINEDWEB_SCHEMA)
