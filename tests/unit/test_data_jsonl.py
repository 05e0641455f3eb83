"""JSON lines files as numbered documents: exact texts, one conversion each, and what is wrong with a line."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import struct
import threading
import time
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pldr_train.data.documents import INVALID_UTF8, NULL, LiveReader, decode
from pldr_train.data.sources import converted_files, text_formats
from pldr_train.data.sources.converted_files import ConvertedFiles
from pldr_train.data.sources.manifest import SourceFile
from pldr_train.data.sources.opening import open_source
from pldr_train.data.sources.text_formats import Block, UnusableFileError, texts_of
from pldr_train.errors import DataError
from pldr_train.printing import log_to_terminal
from pldr_train.recipe import DataSection
from tests.processes import SERVER
from tests.tiny import data_recipe

TEXTS = ["one", "", "zwei\nZeilen", "三 \U0001f600", 'a "quoted" \\ text', "\x00 and \x7f", "tail "]


def zstd(content: bytes) -> bytes:
    return pa.compress(content, codec="zstd", asbytes=True)


COMPRESSED = {".jsonl": bytes, ".jsonl.gz": gzip.compress, ".jsonl.zst": zstd}


def lines_of(texts, key="text", ensure_ascii=False, **others):
    return "".join(json.dumps(others | {key: text}, ensure_ascii=ensure_ascii) + "\n" for text in texts).encode()


def settings(path: Path, cache: Path, **changes) -> DataSection:
    values = {
        "source": "jsonl", "path": str(path), "text_column": "text", "train_documents": None,
        "validation_documents": None, "validation_fraction": 0.01, "tokenizer": None, "cache_dir": str(cache),
        "context_length": 16, "num_lanes": 1, "shuffle": True, "shuffle_window_documents": 10, "num_workers": 0,
        "seed": 1, "vocab_size": 300, "batch_size": 1, "micro_batch_size": 1, "validation_rows": 1,
    }  # fmt: skip
    return data_recipe(**values | changes).data


def read(path: Path, cache: Path, **changes) -> list[bytes | None]:
    source = open_source(settings(path, cache, **changes))
    return source.read(0, source.num_documents).raw.to_pylist()


def read_content(tmp_path: Path, content: bytes, name="x.jsonl", **changes) -> list[bytes | None]:
    (tmp_path / name).write_bytes(content)
    return read(tmp_path / name, tmp_path / "cache", **changes)


def copies(cache: Path) -> list[Path]:
    return sorted(cache.glob("jsonl/[!.]*/*.parquet"))


@pytest.mark.parametrize("suffix", COMPRESSED)
@pytest.mark.parametrize("ensure_ascii", [False, True])
def test_each_line_is_a_document_with_its_exact_text(suffix, ensure_ascii, tmp_path):
    content = lines_of(TEXTS, ensure_ascii=ensure_ascii, id=7, meta={"text": 1, "tags": ["a"]})
    assert read_content(tmp_path, COMPRESSED[suffix](content), "x" + suffix) == [text.encode() for text in TEXTS]
    (copy,) = copies(tmp_path / "cache")
    assert copy.name == f"x{suffix}.parquet"
    assert pq.read_schema(copy).names == ["text"]
    assert pa.types.is_large_string(pq.read_schema(copy).field("text").type)


def test_files_of_a_folder_are_read_in_order_of_their_names(tmp_path):
    for index, (suffix, compress) in enumerate(COMPRESSED.items()):
        (tmp_path / f"part-{index}{suffix}").write_bytes(compress(lines_of([f"{index} {row}" for row in range(3)])))
    (tmp_path / "readme.txt").write_text("no lines")
    expected = [f"{index} {row}".encode() for index in range(3) for row in range(3)]
    assert read(tmp_path, tmp_path / "cache") == expected


def test_streams_of_several_members_and_frames_are_read_whole(tmp_path):
    first, second = lines_of(["a", "b"]), lines_of(["c"])
    halves = first[:5], first[5:] + second
    skippable = struct.pack("<II", 0x184D2A53, 3) + b"xyz"
    expected = [b"a", b"b", b"c"]
    assert read_content(tmp_path, b"".join(map(gzip.compress, halves)), "a.jsonl.gz") == expected
    assert (
        read_content(tmp_path, b"".join([skippable, *map(zstd, (halves[0], b"", halves[1]))]), "b.jsonl.zst")
        == expected
    )


def test_the_bytes_tell_what_a_file_is_compressed_with_whatever_its_name(tmp_path):
    assert read_content(tmp_path, gzip.compress(lines_of(["a"])), "a.jsonl") == [b"a"]
    assert read_content(tmp_path, lines_of(["b"]), "b.jsonl.gz") == [b"b"]
    assert read_content(tmp_path, zstd(lines_of(["c"])), "c.dump") == [b"c"]


def test_documents_of_many_blocks_keep_order_and_fill_row_groups_of_a_thousand(tmp_path, monkeypatch):
    monkeypatch.setattr(text_formats, "_BLOCK_BYTES", 10_000)
    texts = [f"document {index} " + "x" * (index % 50) for index in range(4321)]
    content = bytearray(lines_of(texts))
    content[len(content) // 2 :] = content[len(content) // 2 :].replace(b"\n", b"\r\n  \n")  # blank lines do not count
    content = b"\xef\xbb\xbf" + bytes(content).removesuffix(b"\r\n  \n")  # a byte order mark, no line feed at the end
    assert read_content(tmp_path, content) == [text.encode() for text in texts]
    metadata = pq.read_metadata(copies(tmp_path / "cache")[0])
    groups = [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]
    assert groups == [1000, 1000, 1000, 1000, 321]


def test_row_groups_of_large_documents_are_short(tmp_path, monkeypatch):
    monkeypatch.setattr(text_formats, "_BLOCK_BYTES", 10_000)
    monkeypatch.setattr(converted_files, "MAX_GROUP_BYTES", 50_000)
    texts = [str(index) * 20_000 for index in range(10)]
    assert read_content(tmp_path, lines_of(texts)) == [text.encode() for text in texts]
    assert pq.read_metadata(copies(tmp_path / "cache")[0]).num_row_groups == 4


def test_a_line_of_fifty_megabytes_is_a_document(tmp_path):
    huge = "word " * 10_000_000
    assert read_content(tmp_path, lines_of(["before", huge, "after"])) == [b"before", huge.encode(), b"after"]


def test_a_line_without_end_is_refused_before_memory_is(tmp_path, monkeypatch):
    monkeypatch.setattr(text_formats, "_BLOCK_BYTES", 1000)
    monkeypatch.setattr(text_formats, "MAX_LINE_BYTES", 10_000)
    fails(tmp_path, lines_of(["a" * 12_000]), r"bad\.jsonl: line 1 is longer than the limit of 10,000 bytes")


def test_null_and_missing_values_are_null_documents(tmp_path):
    content = b'{"text": null}\n{"id": 3}\n{}\n{"text": "x"}\n'
    assert read_content(tmp_path, content) == [None, None, None, b"x"]
    assert read_content(tmp_path, b'{"text": null}\n{"text": null}\n', "nulls.jsonl") == [None, None]


def test_bytes_that_are_no_utf8_arrive_as_they_are_and_are_counted(tmp_path):
    content = b'{"text": "good"}\n{"text": "bad \xff\xc3 \\u00e9 \\ud83d\\ude00"}\n{"id": "\xfe", "text": "x"}\n{}\n'
    documents = read_content(tmp_path, content)
    assert documents == [b"good", b"bad \xff\xc3 \xc3\xa9 \xf0\x9f\x98\x80", b"x", None]
    assert [decode(raw)[1] for raw in documents] == [0, INVALID_UTF8, 0, NULL]


def test_escapes_of_lone_surrogates_become_the_replacement_character(tmp_path):
    lines = [r"a\ud800b", r"\udc80", r"\ud83d\ude00 \\ud800 \\\ud800", r"\uDBFFx\uDFFF", r"\ud800\u0041"]
    content = "".join(f'{{"text": "{line}"}}\n' for line in lines).encode() + b'{"text": "\xff\\udcff"}\n'
    assert read_content(tmp_path, content) == [
        "a\ufffdb".encode(), "\ufffd".encode(), "\U0001f600 \\ud800 \\\ufffd".encode(), "\ufffdx\ufffd".encode(),
        "\ufffdA".encode(), b"\xff" + "\ufffd".encode(),
    ]  # fmt: skip


ODD = [
    b'{"x": NaN, "y": -Infinity, "z": 1e999, "text": "a"}', b'{"x": ' + b"9" * 6000 + b', "text": "a"}',
    b' \t{"text": "a"} \r', b'{"text": "b", "text": "a"}', b'{"\\u0074ext": "a"}', b'{"t": {"text": 1}, "text": "a"}',
    b'{"x": ' + b"[" * 500 + b"]" * 500 + b', "text": "a"}',
]  # fmt: skip


@pytest.mark.parametrize("line", ODD)
def test_odd_lines_are_read_as_json_says_alone_and_among_others(line, tmp_path):
    assert read_content(tmp_path, line) == [b"a"]
    assert read_content(tmp_path, lines_of(["x"]) + line + b"\n" + lines_of(["y"]), "y.jsonl") == [b"x", b"a", b"y"]


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=5)
OBJECTS = st.tuples(st.dictionaries(st.text(), VALUES, max_size=3), st.none() | st.text())


@given(st.lists(OBJECTS, min_size=1, max_size=5), st.booleans())
def test_both_parsers_find_what_was_written(objects, ensure_ascii):
    lines = [json.dumps(others | {"text": text}, ensure_ascii=ensure_ascii) for others, text in objects]
    expected = [None if text is None else text.encode() for _, text in objects]
    content = "".join(f"{line}\n" for line in lines).encode()
    for given_lines in (content, b"\n" + content):
        assert texts_of(Block(1, given_lines, 0), "text").to_pylist() == expected


def fails(tmp_path, content, pattern, name="bad.jsonl", **changes):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=pattern) as caught:
        open_source(settings(tmp_path / name, tmp_path / "cache", **changes))
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)
    assert copies(tmp_path / "cache") == []
    assert list((tmp_path / "cache").glob("jsonl/.building*")) == []


GOOD = b'{"text": "a"}\n'


@pytest.mark.parametrize(
    ("content", "pattern"),
    [
        (GOOD * 16 + b'{"text": "a"\n' + GOOD, r"line 17 is no JSON \(Expecting ',' delimiter, column 13\); write one"),
        (GOOD + b"\n\nno json\n", r"line 4 is no JSON \(Expecting value, column 1\)"),
        (GOOD + b'{"text": "a"} {"text": "b"}\n', r"line 2 is no JSON \(Extra data, column 15\)"),
        (b'{"text":\n"a"}\n', r"line 1 is no JSON"),
        (GOOD + b'{"text": "a"}null\n', r"line 2 is no JSON"),
        (b"null\n" + GOOD, r"line 1 is null, not an object"),
        (b'[{"text": "a"}, {"text": "b"}]', r"line 1 is a list, not an object; write one JSON object on each line"),
        (GOOD + b'{"id": 1, "text": ["a"]}\n', r"line 2: 'text' \(data\.text_column\) is a list, .* has id, text\)"),
        (b'{"text": 5}\n', r"line 1: 'text' .* is a number"),
        (b'{"text": false}\n', r"line 1: 'text' .* is true or false"),
        (b'{"text": {}}\n', r"line 1: 'text' .* is an object"),
        (b'{"id": 1, "body": "a"}\n{"url": ""}\n', r"no line has the key 'text' .*; there are id, body, url; set"),
        (b'{"x": ' + b"[" * 10**5 + b"]" * 10**5 + b"}\n\n", r"line 1 is nested too deeply"),
        ("\ufeff{}".encode("utf-16-le"), r"UTF-16, not UTF-8"),
        (GOOD + b'{"text": "a\x01"}\n', r"line 2 is no JSON \(Invalid control character"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_line_is_said_with_its_number(content, pattern, tmp_path):
    fails(tmp_path, content, pattern)


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_streams_that_are_cut_short_or_damaged_are_said_to_be(suffix, tmp_path):
    whole = COMPRESSED[suffix](lines_of([os.urandom(100).hex() for _ in range(200)]))
    kind = "gzip" if suffix == ".jsonl.gz" else "zstd"
    for cut in (len(whole) - 1, len(whole) // 2, 5):
        fails(tmp_path, whole[:cut], rf"its {kind} stream ends too early; fetch", "bad" + suffix)
    fails(tmp_path, whole + b"more", rf"its {kind} stream is damaged", "bad" + suffix)
    fails(tmp_path, b"", "it is empty, not even compressed", "bad" + suffix)


def test_a_zstd_window_beyond_what_is_read_is_named(tmp_path):
    fails(
        tmp_path,
        b"\x28\xb5\x2f\xfd\x00\xa8\x01\x00\x00",
        r"window is larger than .* without --long=31",
        "long.jsonl.zst",
    )


def test_a_bad_file_can_be_left_out_whole(tmp_path, said):
    (tmp_path / "a.jsonl").write_bytes(lines_of(["a"]))
    (tmp_path / "b.jsonl").write_bytes(b"{]\n")
    (tmp_path / "c.jsonl").write_bytes(lines_of(["c"]))
    source = open_source(settings(tmp_path, tmp_path / "cache", on_bad_shard="skip"))
    assert source.read(0, 2).texts() == ["a", "c"]
    assert len(said) == 1
    assert "line 1 is no JSON" in said[0]


def test_an_empty_file_holds_no_documents(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\n \n")
    (tmp_path / "b.jsonl").write_bytes(lines_of(["b"]))
    assert read(tmp_path, tmp_path / "cache") == [b"b"]
    with pytest.raises(DataError, match="empty corpus"):
        read(tmp_path / "a.jsonl", tmp_path / "cache")


def test_a_file_is_converted_once_and_again_when_it_or_the_key_changes(tmp_path, monkeypatch):
    conversions = []
    convert = converted_files.convert
    monkeypatch.setattr(converted_files, "convert", lambda *given: (conversions.append(given[2]), convert(*given))[1])
    file, cache = tmp_path / "x.jsonl", tmp_path / "cache"
    file.write_bytes(b'{"text": "a", "other": "A"}\n')
    assert read(file, cache) == read(file, cache) == [b"a"]
    assert conversions == ["text"]
    assert read(file, cache, text_column="other") == [b"A"]
    assert conversions == ["text", "other"]
    file.write_bytes(b'{"text": "b", "other": "B"}\n')  # of the same size
    os.utime(file, ns=(1, file.stat().st_mtime_ns + 1))
    assert read(file, cache) == [b"b"]
    file.write_bytes(b'{"text": "longer"}\n')
    assert read(file, cache) == [b"longer"]
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x.jsonl").write_bytes(lines_of(["e"]))
    assert read(tmp_path / "elsewhere" / "x.jsonl", cache) == [b"e"]
    assert len(conversions) == len(copies(cache)) == 5


def test_a_file_that_changes_under_a_run_is_noticed(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_bytes(lines_of(["a", "b"]))
    source = open_source(settings(file, tmp_path / "cache"))
    file.write_bytes(lines_of(["a", "b", "c"]))
    with pytest.raises(DataError, match=r"it has 42 bytes, not 28 as at the run's start"):
        source.read(0, 1)
    file.unlink()
    with pytest.raises(DataError, match="no such file"):
        source.read(0, 1)


def test_a_digest_finds_the_copy_without_fetching_the_file(tmp_path):
    fetched = []
    original = tmp_path / "x.jsonl"
    original.write_bytes(lines_of(["a"]))

    def fetch(file):
        fetched.append(file.name)
        return original

    def files(digest):
        file = SourceFile("data/x.jsonl", original.stat().st_size, digest=digest)
        access = ConvertedFiles(fetch, "text", tmp_path / "cache", describe=lambda each: f"hub {each.name}")
        return access.footer(file).num_rows, access.describe(file)

    assert files("abc") == files("abc") == (1, "hub data/x.jsonl")
    assert fetched == ["data/x.jsonl"]
    original.write_bytes(lines_of(["a", "b"]))
    assert files("def") == (2, "hub data/x.jsonl")
    assert len(fetched) == len(copies(tmp_path / "cache")) == 2


def test_a_damaged_copy_is_made_anew(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_bytes(lines_of(["a"]))
    source = open_source(settings(file, tmp_path / "cache"))
    copies(tmp_path / "cache")[0].write_bytes(b"nothing that Parquet would know")
    assert source.read(0, 1).texts() == ["a"]


def test_a_full_or_forbidden_cache_is_no_fault_of_the_file(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_bytes(lines_of(["a"]))
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DataError, match=r"cannot write .*cache/jsonl/.* data\.cache_dir"):
        open_source(settings(file, tmp_path / "cache", on_bad_shard="skip"))


def test_the_source_reads_in_a_copy_and_through_a_token_reader(tmp_path):
    original = tmp_path / "x.jsonl"
    original.write_bytes(lines_of(["ab", "c"]))
    access = pickle.loads(pickle.dumps(ConvertedFiles(Fetch(original), "text", tmp_path / "cache")))
    source = open_source(settings(original, tmp_path / "cache"))
    source.access = access
    piece = LiveReader(source, Letters()).open(np.array([1, 0])).encode(0, 2)
    assert piece.tokens.tolist() == [ord("c"), 3, ord("a"), ord("b"), 3]


class Fetch:
    def __init__(self, path):
        self.path = path

    def __call__(self, file):
        return self.path


class Letters:
    def encode(self, text, **_):
        return [ord(character) for character in text]


def convert_in_a_process(path: Path, cache: Path, output: Path) -> None:
    with output.open("a", buffering=1) as lines, redirect_stdout(lines):
        log_to_terminal()
        files = ConvertedFiles(lambda _: path, "text", cache)
        print("rows", files.footer(SourceFile(path.name, path.stat().st_size)).num_rows)


def start(path: Path, cache: Path, output: Path):
    process = SERVER.Process(target=convert_in_a_process, args=(path, cache, output))
    process.start()
    return process


@pytest.fixture
def large_file(tmp_path):
    path = tmp_path / "large.jsonl"
    path.write_bytes(lines_of([f"document {index} " * 20 for index in range(1000)]) * 300)
    return path


def partial_copy(cache: Path) -> Path | None:
    return next((path for path in cache.glob("jsonl/.building-*/*.parquet") if path.stat().st_size), None)


def test_a_conversion_that_is_killed_leaves_nothing_that_is_used_and_the_next_one_clears_up(large_file, tmp_path):
    cache, output = tmp_path / "cache", tmp_path / "output"
    process = start(large_file, cache, output)
    while partial_copy(cache) is None:
        assert process.is_alive()
        time.sleep(0.001)
    process.kill()
    process.join()
    assert copies(cache) == []
    assert partial_copy(cache) is not None
    start(large_file, cache, output).join()
    assert "rows 300000" in output.read_text()
    (copy,) = copies(cache)
    assert pq.read_metadata(copy).num_rows == 300_000
    assert [path.name for path in (cache / "jsonl").iterdir()] == [copy.parent.name]


def test_processes_that_convert_at_once_make_one_copy(large_file, tmp_path):
    outputs = [tmp_path / f"output-{index}" for index in range(3)]
    processes = [start(large_file, tmp_path / "cache", output) for output in outputs]
    for process in processes:
        process.join()
    texts = [output.read_text() for output in outputs]
    assert all("rows 300000" in text for text in texts)
    assert sum("converted large.jsonl" in text for text in texts) == len(copies(tmp_path / "cache")) == 1


def test_threads_that_convert_at_once_make_one_copy(large_file, tmp_path, said):
    rows = []
    files = ConvertedFiles(lambda _: large_file, "text", tmp_path / "other")
    file = SourceFile(large_file.name, large_file.stat().st_size)
    threads = [threading.Thread(target=lambda: rows.append(files.footer(file).num_rows)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert rows == [300_000] * 4
    assert sum("converted large.jsonl: 300,000 documents" in line for line in said) == 1
    assert len(copies(tmp_path / "other")) == 1


def test_progress_of_a_large_file_is_said(tmp_path, said):
    file = tmp_path / "x.jsonl"
    file.write_bytes(b"x" * 1000)
    now = [0.0]
    progress = converted_files._Progress(file, clock=lambda: now[0])
    progress.advance(100, 5)
    now[0] = 6.0
    progress.advance(600, 30)
    progress.end()
    assert said == ["converting x.jsonl: 60%, 30 documents, 0 MB/s", "converted x.jsonl: 30 documents"]


def test_the_error_is_the_files_fault_for_whoever_counts_rows():
    assert issubclass(UnusableFileError, pa.ArrowException)
    assert not issubclass(UnusableFileError, OSError)


@pytest.mark.parametrize("compress", [bytes, gzip.compress, zstd])
def test_a_small_file_of_one_huge_line_is_refused_and_can_be_left_out(tmp_path, compress):
    """Some kB of zstd can hold a line of any length: it is refused as soon as it is longer than the limit."""
    content = compress(b'{"text": "first"}\n{"text": "' + b" " * (80 * 2**20) + b'"}\n')
    fails(tmp_path, content, r"bad\.jsonl: line 2 is longer than the limit of 67,108,864 bytes")
    (tmp_path / "good.jsonl").write_bytes(lines_of(["good"]))
    assert read(tmp_path, tmp_path / "cache", on_bad_shard="skip") == [b"good"]
