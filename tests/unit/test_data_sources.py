"""Parquet files as numbered documents: which files, how many documents, what is read, and what is wrong."""

import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pldr_train.data.documents import NULL, UNREADABLE, LiveReader
from pldr_train.data.sources import file_source
from pldr_train.data.sources.file_source import FileSource, count_rows
from pldr_train.data.sources.local_files import LocalFiles, local_manifest
from pldr_train.data.verification import row_group_problems
from pldr_train.errors import DataError
from tests.tiny import damage_row_group


def write(path, texts, rows_per_group=3, column="content", column_type=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"url": ["u"] * len(texts), column: pa.array(texts, type=column_type or pa.string())})
    pq.write_table(table, path, row_group_size=rows_per_group)


def open_files(path, column="content", until=None, on_bad="raise", **options):
    manifest, root = local_manifest(str(path), column)
    access = LocalFiles(root)
    return FileSource(count_rows(manifest, access, until, on_bad), access, on_bad, **options)


def texts(source, start, stop):
    return source.read(start, stop).texts()


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "data" / "b.parquet", [f"b{i}" for i in range(7)])
    write(tmp_path / "data" / "a.parquet", [f"a{i}" for i in range(5)], rows_per_group=2)
    write(tmp_path / "data" / "c.parquet", [])
    write(tmp_path / "data" / "d.parquet", ["d0", None, ""])
    return tmp_path / "data"


ALL = [f"a{i}" for i in range(5)] + [f"b{i}" for i in range(7)] + ["d0", "", ""]


def test_any_interval_reads_the_documents_in_order_of_file_names(folder):
    source = open_files(folder)
    assert source.num_documents == 15
    for start in range(16):
        for stop in range(start, 16):
            assert texts(source, start, stop) == ALL[start:stop]


def test_reading_with_a_full_cache_and_in_a_copy_gives_the_same(folder):
    source = open_files(folder, cache_bytes=1)
    assert texts(source, 0, 15) == texts(source, 0, 15) == ALL
    assert texts(pickle.loads(pickle.dumps(source)), 0, 15) == ALL


def test_path_may_be_folder_file_or_glob(folder):
    assert open_files(folder / "b.parquet").num_documents == 7
    assert texts(open_files(folder / "[ab].parquet"), 0, 12) == ALL[:12]
    assert open_files(folder.parent).num_documents == 15


def test_only_the_text_column_is_decoded(folder, monkeypatch):
    asked = []
    original = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile,
        "read_row_group",
        lambda self, i, **kw: asked.append((i, kw["columns"])) or original(self, i, **kw),
    )
    open_files(folder).read(6, 9)  # b1, b2, b3: the row groups [b0 b1 b2] and [b3 b4 b5]
    assert asked == [(0, ["content"]), (1, ["content"])]


class Counting(LocalFiles):
    """Local files that note whose footer was read."""

    def __init__(self, root):
        super().__init__(root)
        self.footers = []

    def footer(self, file):
        self.footers.append(file.name)
        return super().footer(file)


def test_rows_are_counted_only_as_far_as_they_are_needed_and_never_twice(tmp_path):
    for index in range(40):
        write(tmp_path / f"part-{index:02d}.parquet", [f"{index} {row}" for row in range(10)])
    manifest, root = local_manifest(str(tmp_path), "content")
    access = Counting(root)
    partly = count_rows(manifest, access, until=95)
    assert (partly.num_counted, partly.num_documents) == (10, 100)
    assert sorted(access.footers) == [f"part-{index:02d}.parquet" for index in range(10)]
    further = count_rows(partly, access, until=300)
    assert (further.num_counted, sorted(access.footers)) == (30, [f"part-{index:02d}.parquet" for index in range(30)])
    assert count_rows(further, access, until=10) == further
    whole = count_rows(further, access)
    assert (whole.num_counted, whole.num_documents, len(access.footers)) == (40, 400, 40)
    assert count_rows(manifest, access, until=10**9).num_documents == 400


def test_fingerprint_tells_changed_documents_and_neither_a_move_nor_files_beyond_them(folder, tmp_path):
    before = open_files(folder).fingerprint(0, 10)
    assert [file["name"] for file in before["files"]] == ["a.parquet", "b.parquet"]
    moved = folder.rename(tmp_path / "moved")
    write(moved / "e.parquet", ["another"])
    assert open_files(moved).fingerprint(0, 10) == open_files(moved, until=10).fingerprint(0, 10) == before
    assert open_files(moved).fingerprint(0, 13) != before
    only_b = open_files(moved).fingerprint(6, 7)
    assert only_b["files"] == [
        {"name": "b.parquet", "size_bytes": (moved / "b.parquet").stat().st_size, "rows": 7, "first_document": 5}
    ]
    write(moved / "b.parquet", [f"b{i}" for i in range(8)])
    assert open_files(moved).fingerprint(0, 10) != before


def test_errors_name_the_file_and_the_fix(folder, tmp_path):
    def fails(pattern, path, column="content"):
        with pytest.raises(DataError, match=pattern):
            open_files(path, column)

    fails(r"data\.path=/nowhere/x: no such file or folder; give", "/nowhere/x")
    fails(r"the glob matches no file", str(tmp_path / "*.nothing"))
    (tmp_path / "empty").mkdir()
    fails(r"empty: no \.parquet files in this folder; give", tmp_path / "empty")
    fails(r"a\.parquet: no column 'text' \(data\.text_column\); its columns are url, content; set", folder, "text")
    write(tmp_path / "numbers.parquet", [1, 2], column_type=pa.int64())
    fails(r"numbers\.parquet: column 'content' .* has type int64, not string", tmp_path / "numbers.parquet")


def test_truncated_and_foreign_files_are_refused_by_name_or_left_out_whole(folder, said):
    whole = (folder / "b.parquet").read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"no parquet at all, but long enough to be asked"):
        (folder / "b.parquet").write_bytes(content)
        with pytest.raises(DataError, match=r"b\.parquet: not a readable Parquet file .* truncated"):
            open_files(folder)
        said.clear()
        source = open_files(folder, on_bad="skip")
        assert texts(source, 0, source.num_documents) == ALL[:5] + ALL[12:]
        assert len(said) == 1
        assert "b.parquet: not a readable Parquet file" in said[0]
        assert "b.parquet" in source.manifest.files[1].problem


def test_a_damaged_row_group_is_named_or_its_documents_alone_are_skipped(folder):
    source = open_files(folder)
    damage_row_group(folder / "b.parquet", 1)  # b3 b4 b5
    assert texts(source, 0, 8) == ALL[:8]
    with pytest.raises(DataError, match=r"b\.parquet, row group 1: not a readable .* set data\.on_bad_shard=skip"):
        source.read(5, 9)
    block = open_files(folder, on_bad="skip").read(4, 13)
    assert block.texts() == ALL[4:8] + [""] * 3 + ALL[11:13]
    (part,) = block.unreadable
    assert (part.start, part.stop, part.place) == (8, 11, "b.parquet, row group 1")
    assert part.reason


def test_a_file_that_vanishes_is_named_when_it_is_read_and_its_row_groups_can_be_skipped(folder):
    source, skipping = open_files(folder), open_files(folder, on_bad="skip")
    (folder / "b.parquet").unlink()
    assert texts(source, 0, 5) == ALL[:5]
    with pytest.raises(DataError, match=r"b\.parquet, row group 0: not a readable Parquet file \(no such file\)"):
        source.read(5, 6)
    block = skipping.read(0, 15)
    assert block.texts() == ALL[:5] + [""] * 7 + ALL[12:]
    assert [(part.start, part.stop) for part in block.unreadable] == [(5, 8), (8, 11), (11, 12)]


def test_a_file_that_has_other_rows_by_now_is_unreadable(folder):
    source = open_files(folder)
    write(folder / "b.parquet", [f"x{i}" for i in range(4)], rows_per_group=2)
    with pytest.raises(DataError, match=r"row group 0: .*holds 2 rows, not 3"):
        source.read(5, 6)
    with pytest.raises(DataError, match="row group 2: "):
        source.read(11, 12)


def test_what_was_left_out_once_is_not_read_again(folder):
    skipping = open_files(folder, on_bad="skip")
    whole = (folder / "b.parquet").read_bytes()
    (folder / "b.parquet").unlink()
    parts = skipping.read(5, 8).unreadable
    (folder / "b.parquet").write_bytes(whole)
    again = open_files(folder)  # even where what cannot be read stops a run
    again.leave_out(parts)
    block = again.read(4, 9)
    assert block.unreadable == parts
    assert block.texts() == ["a4", "", "", "", "b3"]


class Letters:
    def encode(self, text, **_):
        return [ord(character) for character in text]


def test_the_reader_gives_tokens_in_the_order_asked_for_with_flags(tmp_path):
    column = pa.array([b"ab", None, b"", b"\xffz", b"cd"], pa.binary()).cast(pa.string(), safe=False)
    pq.write_table(pa.table({"content": column}), tmp_path / "x.parquet", row_group_size=2)
    reader = LiveReader(open_files(tmp_path), Letters())
    piece = reader.open(np.array([4, 1, 3, 0, 2])).encode(1, 5)
    assert piece.tokens.tolist() == [3, 0xFFFD, ord("z"), 3, ord("a"), ord("b"), 3, 3]
    assert piece.lengths.tolist() == [1, 3, 3, 1]
    assert piece.flags.tolist() == [NULL, 2, 0, 0]
    (tmp_path / "x.parquet").unlink()
    skipping = LiveReader(open_files_of(reader.source), Letters())
    piece = skipping.open(np.array([1, 0])).encode(0, 2)
    assert (piece.tokens.tolist(), piece.lengths.tolist(), piece.flags.tolist()) == ([], [0, 0], [UNREADABLE] * 2)


def open_files_of(source):
    return FileSource(source.manifest, source.access, "skip")


def test_a_column_of_large_strings_is_read(tmp_path):
    write(tmp_path / "large.parquet", ["one", "two"], column_type=pa.large_string())
    assert texts(open_files(tmp_path), 0, 2) == ["one", "two"]


TYPES = {
    "large string": pa.large_string(),
    "string view": pa.string_view(),
    "categories": pa.dictionary(pa.int32(), pa.string()),
    "categories of large strings": pa.dictionary(pa.uint32(), pa.large_string()),
    "binary": pa.binary(),
    "large binary": pa.large_binary(),
}


@pytest.mark.parametrize("name", TYPES)
def test_a_column_of_text_is_read_however_it_is_kept(name, tmp_path):
    values = ["one", None, "zwölf", "one", ""]
    column = pa.array(values, pa.string()).cast(TYPES[name])
    pq.write_table(pa.table({"id": [1, 2, 3, 4, 5], "content": column}), tmp_path / "x.parquet", row_group_size=3)
    source = open_files(tmp_path)
    kept = pq.read_schema(tmp_path / "x.parquet").field("content").type
    assert kept == TYPES[name] or pa.types.is_dictionary(kept)  # of large strings Parquet keeps strings
    assert source.read(0, 5).raw.to_pylist() == [None if text is None else text.encode() for text in values]
    assert row_group_problems(source, source.manifest.files[0]) == []


def test_categories_of_pandas_are_read(tmp_path):
    pandas = pytest.importorskip("pandas")
    pandas.DataFrame({"content": pandas.Categorical(["b", "a", None, "b"])}).to_parquet(tmp_path / "x.parquet")
    assert open_files(tmp_path).read(0, 4).raw.to_pylist() == [b"b", b"a", None, b"b"]


def test_a_shard_without_any_text_holds_nulls_beside_others(tmp_path):
    pq.write_table(pa.table({"content": pa.nulls(3)}), tmp_path / "a.parquet")
    write(tmp_path / "b.parquet", ["one", "two"])
    source = open_files(tmp_path)
    assert source.read(1, 5).raw.to_pylist() == [None, None, b"one", b"two"]
    piece = LiveReader(source, Letters()).open(np.array([0, 3])).encode(0, 2)
    assert (piece.tokens.tolist(), piece.flags.tolist()) == ([3, *map(ord, "one"), 3], [NULL, 0])


@pytest.mark.parametrize("column_type", [pa.int64(), pa.list_(pa.string()), pa.dictionary(pa.int8(), pa.int64())])
def test_columns_of_something_else_are_refused(column_type, tmp_path):
    pq.write_table(pa.table({"content": pa.nulls(2, column_type)}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"x\.parquet: column 'content' .* has type .*, not string"):
        open_files(tmp_path)


def test_a_row_group_that_is_too_large_for_the_memory_is_named_or_left_out(tmp_path, monkeypatch):
    write(tmp_path / "x.parquet", ["short", "x" * 5000])
    monkeypatch.setattr(file_source, "MAX_GROUP_BYTES", 4000)
    source = open_files(tmp_path)
    with pytest.raises(DataError, match=r"x\.parquet, row group 0: .* bytes, more than 4,000 can be read at once"):
        source.read(0, 2)
    block = open_files_of(source).read(0, 2)
    assert block.raw.to_pylist() == [None, None]
    assert "more than 4,000" in block.unreadable[0].reason
