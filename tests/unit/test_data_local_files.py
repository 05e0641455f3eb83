"""Which files a path means: folders with links, hidden files, formats side by side; and plain text as documents."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pldr_train.data.sources import text_formats
from pldr_train.data.sources.local_files import SUFFIXES, local_manifest
from pldr_train.data.sources.manifest import Manifest, SourceFile
from pldr_train.data.sources.opening import open_source, resolve_files
from pldr_train.data.tokens.tokenize_ahead import tokenize_ahead
from pldr_train.data.verification import verify_source
from pldr_train.errors import CheckpointError, DataError
from pldr_train.fit import fit
from pldr_train.recipe import DataSection, recipe_from_dict
from tests.tiny import data_recipe, metric_lines, tiny_values


def settings(path: Path, cache: Path, **changes: Any) -> DataSection:
    values: dict[str, Any] = {
        "source": "text", "path": str(path), "text_column": "content", "train_documents": None,
        "validation_documents": None, "validation_fraction": 0.01, "tokenizer": None, "cache_dir": str(cache),
        "context_length": 16, "num_lanes": 1, "shuffle": True, "shuffle_window_documents": 10, "num_workers": 0,
        "seed": 1, "vocab_size": 300, "batch_size": 1, "micro_batch_size": 1, "validation_rows": 1,
    }  # fmt: skip
    return data_recipe(**values | changes).data


def texts(path: Path, cache: Path, **changes: Any) -> list[bytes | None]:
    source = open_source(settings(path, cache, **changes))
    found: list[bytes | None] = source.read(0, source.num_documents).raw.to_pylist()
    return found


def zstd(content: bytes) -> bytes:
    compressed: bytes = pa.compress(content, codec="zstd", asbytes=True)
    return compressed


def names_of(path: Path | str, source: str = "parquet", like: Manifest | None = None) -> list[str]:
    manifest, _ = local_manifest(str(path), "content", SUFFIXES[source], source, like)
    return [file.name for file in manifest.files]


def put(path: Path, content: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"content": [content]}), path)
    else:
        path.write_text(json.dumps({"content": content}) + "\n" if path.suffix == ".jsonl" else content)
    return path


# ---------------------------------------------------------------------------------------------- folders and their files


def test_linked_subfolders_are_read_and_cycles_entered_once(tmp_path: Path) -> None:
    folder, disk = tmp_path / "corpus", tmp_path / "disk"
    put(folder / "a.parquet")
    put(folder / "real" / "b.parquet")
    put(disk / "part" / "c.parquet")
    put(disk / "deep" / "d.parquet")
    (folder / "linked").symlink_to(disk / "part")
    (folder / "real" / "again").symlink_to(folder)  # a cycle
    (disk / "part" / "up").symlink_to(disk)  # a cycle through two links
    (folder / "also").symlink_to(folder / "real")  # what is read already
    (folder / "gone").symlink_to(tmp_path / "nowhere")
    (folder / "z.parquet").symlink_to(disk / "part" / "c.parquet")
    assert names_of(folder) == [
        "a.parquet",
        "linked/c.parquet",
        "linked/up/deep/d.parquet",
        "real/b.parquet",
        "z.parquet",
    ]
    assert names_of(f"{folder}/*/*.parquet") == ["also/b.parquet", "linked/c.parquet", "real/b.parquet"]
    (tmp_path / "whole").symlink_to(folder)
    assert names_of(tmp_path / "whole") == names_of(folder)


@pytest.mark.parametrize(("source", "suffix"), [("parquet", ".parquet"), ("jsonl", ".jsonl"), ("text", ".txt")])
def test_hidden_files_and_folders_are_left_out(tmp_path: Path, source: str, suffix: str) -> None:
    put(tmp_path / f"x{suffix}")
    (tmp_path / f"._x{suffix}").write_bytes(b"\x00\x05\x16\x07\x00Mac OS X")
    put(tmp_path / ".ipynb_checkpoints" / f"x-checkpoint{suffix}")
    put(tmp_path / "sub" / f".hidden{suffix}")
    put(tmp_path / ".building-copy" / "sub" / f"y{suffix}")
    assert names_of(tmp_path, source) == [f"x{suffix}"]
    for pattern in ("**/*", "*", "[._x]*"):
        assert names_of(f"{tmp_path}/{pattern}{suffix}", source) == [f"x{suffix}"]
    assert len(texts(tmp_path, tmp_path.parent / "cache", source=source)) == 1


def test_a_run_that_began_before_keeps_the_files_that_it_began_with(tmp_path: Path) -> None:
    """Before, hidden files were read and linked folders were not."""
    folder, cache = tmp_path / "corpus", tmp_path / "cache"
    sizes = {name: put(folder / name).stat().st_size for name in ("a.parquet", ".ipynb_checkpoints/a.parquet")}
    put(folder / "beside.jsonl")
    put(tmp_path / "disk" / "new.parquet")
    (folder / "linked").symlink_to(tmp_path / "disk")
    files = tuple(SourceFile(name, sizes[name], ((1, 1),)) for name in sorted(sizes))
    kept = Manifest({"kind": "parquet", "path": str(folder)}, "content", files)
    chosen = settings(folder, cache, source="parquet")
    manifest, _ = resolve_files(chosen, kept)
    assert manifest == kept
    assert verify_source(chosen, kept=kept).problems == ()
    (folder / "beside.jsonl").unlink()
    begun = resolve_files(chosen)[0]
    assert [file.name for file in begun.files] == ["a.parquet", "linked/new.parquet"]
    assert Manifest.from_json(begun.to_json(), "x").origin["listing"] == 2
    assert resolve_files(chosen, begun)[0] == begun
    put(tmp_path / "disk" / "later.parquet")
    with pytest.raises(CheckpointError, match="linked/later.parquet is new"):
        resolve_files(chosen, begun)


@pytest.mark.parametrize(
    ("source", "other", "told"),
    [
        ("parquet", "more/x.jsonl", "1 file of data.source=jsonl (more/x.jsonl)"),
        ("jsonl", "x.parquet", "1 file of data.source=parquet (x.parquet)"),
        ("parquet", "book.txt", "1 file of data.source=text (book.txt)"),
        ("jsonl", "book.md", "1 file of data.source=text (book.md)"),
        ("text", "x.jsonl", "1 file of data.source=jsonl (x.jsonl)"),
    ],
)
def test_a_folder_of_two_formats_is_refused(tmp_path: Path, source: str, other: str, told: str) -> None:
    own = put(tmp_path / f"own{SUFFIXES[source][0]}")
    put(tmp_path / other)
    with pytest.raises(DataError, match=re.escape(told)) as caught:
        names_of(tmp_path, source)
    pattern = re.search(r"data\.path='(.*)'", str(caught.value))
    assert pattern is not None
    assert names_of(pattern[1], source) == [own.name]
    own.unlink()
    with pytest.raises(DataError, match=r"no files of data\.source=\w+ in this folder, but 1 file of") as caught:
        names_of(tmp_path, source)
    assert re.search(r"set data\.source=(\w+)$", str(caught.value))


def test_what_stands_beside_a_data_set_is_no_document(tmp_path: Path) -> None:
    put(tmp_path / "x.parquet")
    for name in ("README.md", "LICENSE.txt", "dataset_info.json", "notes.csv"):
        put(tmp_path / name)
    assert names_of(tmp_path) == ["x.parquet"]


def test_a_file_of_another_source_is_reported(tmp_path: Path) -> None:
    file = put(tmp_path / "x.jsonl")
    with pytest.raises(DataError, match=r"data\.source=parquet does not read such files; set data\.source=jsonl"):
        names_of(file)
    odd = file.rename(tmp_path / "documents.dump")
    assert names_of(odd, "jsonl") == ["documents.dump"]


# ----------------------------------------------------------------------------------------------------------- plain text


@pytest.mark.parametrize("compress", [bytes, gzip.compress, zstd])
def test_a_text_file_is_one_document(tmp_path: Path, compress: Callable[[bytes], bytes]) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.txt").write_bytes(compress(b"\xef\xbb\xbfone\n\n two\n"))
    (folder / "b.md").write_bytes(compress("# zwölf\r\nlines\r\n".encode()))
    (folder / "c.txt").write_bytes(b"")
    (folder / "d.txt").write_bytes(compress(b"bad \xff\xc3 and \x00"))
    expected = [b"one\n\n two\n", "# zwölf\nlines\n".encode(), b"bad \xff\xc3 and \x00"]
    assert texts(folder, tmp_path / "cache") == expected
    assert texts(folder, tmp_path / "cache") == expected  # out of the cache
    assert texts(folder / "a.txt", tmp_path / "cache") == expected[:1]


@pytest.mark.parametrize("block", [1, 2, 3, 7, 4096])
@pytest.mark.parametrize(
    ("separator", "expected"),
    [
        ("\n\n", [b"one\nmore", b"two", b"  three\r."]),
        ("\n", [b"one", b"more", b"two", b"  three\r."]),
        ("\r\n\r\n", [b"one\nmore", b"two", b"  three\r."]),
        ("two", [b"one\nmore", b" \n\n  three\r."]),
        ("<|end|>", [b"one\nmore\n\ntwo\n\n\n \n\n  three\r."]),
    ],
)
def test_a_separator_cuts_documents_wherever_blocks_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, separator: str, expected: list[bytes]
) -> None:
    monkeypatch.setattr(text_formats, "_BLOCK_BYTES", block)
    (tmp_path / "a.txt").write_bytes(b"one\r\nmore\r\n\r\ntwo\n\n\n \n\n  three\r.\n")
    assert texts(tmp_path / "a.txt", tmp_path / "cache", document_separator=separator) == expected


def test_a_changed_separator_is_another_copy(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a\nb")
    assert texts(tmp_path / "a.txt", tmp_path / "cache") == [b"a\nb"]
    assert texts(tmp_path / "a.txt", tmp_path / "cache", document_separator="\n") == [b"a", b"b"]


def test_a_text_document_beyond_the_limit_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_formats, "_BLOCK_BYTES", 100)
    monkeypatch.setattr(text_formats, "MAX_LINE_BYTES", 1000)
    (tmp_path / "a.txt").write_bytes(b"short\n\nalso\n\n" + b"x" * 2000 + b"\n\nend\n")
    (tmp_path / "b.txt").write_bytes(zstd(b"y" * 5000))
    path, cache = tmp_path / "a.txt", tmp_path / "cache"
    with pytest.raises(DataError, match=r"a\.txt: as one document it is longer than the limit of 1,000 bytes; "):
        texts(path, cache)
    with pytest.raises(DataError, match=r"a\.txt: the document that begins in line 5 is longer than the limit"):
        texts(path, cache, document_separator="\n\n")
    put(tmp_path / "c.txt", "whole")
    assert texts(tmp_path, cache, document_separator="\n\n", on_bad_shard="skip") == [b"whole"]


def test_utf16_and_damaged_text_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("text".encode("utf-16"))
    with pytest.raises(DataError, match=r"a\.txt: it is UTF-16, not UTF-8"):
        texts(tmp_path / "a.txt", tmp_path / "cache")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(os.urandom(5000))[:-20])
    with pytest.raises(DataError, match=r"b\.txt\.gz: its gzip stream ends too early"):
        texts(tmp_path / "b.txt.gz", tmp_path / "cache")


def test_verify_looks_at_text_files(tmp_path: Path) -> None:
    put(tmp_path / "corpus" / "a.txt", "one\ntwo")
    chosen = settings(tmp_path / "corpus", tmp_path / "cache", document_separator="\n")
    assert verify_source(chosen).problems == ()
    (tmp_path / "corpus" / "b.txt").write_bytes("text".encode("utf-16"))
    (problem,) = verify_source(chosen).problems
    assert "b.txt: it is UTF-16" in problem
    assert texts(tmp_path / "corpus", tmp_path / "cache", on_bad_shard="skip") == [b"one\ntwo"]
    assert chosen.model_copy(update={"document_separator": None}) != chosen


def test_a_run_on_text_files_resumes_exactly_and_from_tokens(tiny_data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    whole = [
        text for file in sorted((tiny_data / "corpus").glob("*")) for text in pq.read_table(file)["content"].to_pylist()
    ]
    (folder / "a.txt").write_text("\n\n".join(whole[:70]) + "\n")
    (folder / "b.md").write_text("\n\n".join(whole[70:]))
    section = {
        "source": "text",
        "path": str(folder),
        "document_separator": "\n\n",
        "cache_dir": str(tmp_path / "cache"),
    }

    def trained(name: str, **data: Any) -> Path:
        values = tiny_values(tiny_data, tmp_path / "runs", name, data=data, checkpoint={"every_steps": 12})
        return fit(recipe_from_dict(values)).folder

    parquet, straight = trained("parquet"), trained("straight", **section)
    assert metric_lines(straight) == metric_lines(parquet)
    shutil.rmtree(straight / "checkpoints" / "step-00000024")
    tokens = tmp_path / "tokens"
    recipe = recipe_from_dict(tiny_values(tiny_data, tmp_path / "runs", "straight", data=section))
    tokenize_ahead(recipe.resolved(), tokens)
    trained("straight", **section | {"source": "tokens", "path": str(tokens)})
    assert metric_lines(straight) == metric_lines(parquet)
