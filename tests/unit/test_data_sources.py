"""Local Parquet files as numbered documents."""

import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pldr_train.data.sources import ParquetSource
from pldr_train.errors import DataError


def write(path, texts, rows_per_group=3, column="content", column_type=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"url": ["u"] * len(texts), column: pa.array(texts, type=column_type or pa.string())})
    pq.write_table(table, path, row_group_size=rows_per_group)


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "data" / "b.parquet", [f"b{i}" for i in range(7)])
    write(tmp_path / "data" / "a.parquet", [f"a{i}" for i in range(5)], rows_per_group=2)
    write(tmp_path / "data" / "c.parquet", [])
    write(tmp_path / "data" / "d.parquet", ["d0", None, ""])
    return tmp_path / "data"


ALL = [f"a{i}" for i in range(5)] + [f"b{i}" for i in range(7)] + ["d0", "", ""]


def test_any_interval_reads_the_documents_in_order_of_file_names(folder):
    source = ParquetSource(folder)
    assert source.num_documents == 15
    for start in range(16):
        for stop in range(start, 16):
            assert source.read(start, stop) == ALL[start:stop]


def test_reading_with_a_full_cache_and_in_a_copy_gives_the_same(folder):
    source = ParquetSource(folder, cache_bytes=1)
    assert source.read(0, 15) == source.read(0, 15) == ALL
    assert pickle.loads(pickle.dumps(source)).read(0, 15) == ALL


def test_path_may_be_folder_file_or_glob(folder):
    assert ParquetSource(folder / "b.parquet").num_documents == 7
    assert ParquetSource(str(folder / "[ab].parquet")).read(0, 12) == ALL[:12]
    assert ParquetSource(folder.parent).num_documents == 15


def test_only_the_text_column_is_decoded(folder, monkeypatch):
    asked = []
    original = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile,
        "read_row_group",
        lambda self, i, **kw: asked.append((i, kw["columns"])) or original(self, i, **kw),
    )
    ParquetSource(folder).read(6, 9)  # b1, b2, b3: the row groups [b0 b1 b2] and [b3 b4 b5]
    assert asked == [(0, ["content"]), (1, ["content"])]


def test_fingerprint_tells_a_changed_corpus_and_not_a_moved_one(folder, tmp_path):
    before = ParquetSource(folder).fingerprint()
    moved = folder.rename(tmp_path / "moved")
    assert ParquetSource(moved).fingerprint() == before
    write(moved / "b.parquet", [f"b{i}" for i in range(8)])
    assert ParquetSource(moved).fingerprint() != before


def test_errors_name_the_file_and_the_fix(folder, tmp_path):
    def fails(pattern, path, column="content"):
        with pytest.raises(DataError, match=pattern):
            ParquetSource(path, column)

    fails(r"data\.path=/nowhere/x: no such file or folder; give", "/nowhere/x")
    fails(r"the glob matches no file", str(tmp_path / "*.nothing"))
    (tmp_path / "empty").mkdir()
    fails(r"empty: no \.parquet files in this folder; give", tmp_path / "empty")
    fails(r"a\.parquet: no column 'text' \(data\.text_column\); its columns are url, content; set", folder, "text")
    write(tmp_path / "numbers.parquet", [1, 2], column_type=pa.int64())
    fails(r"numbers\.parquet: column 'content' .* has type int64, not string", tmp_path / "numbers.parquet")
    fails(r"c\.parquet: empty corpus", folder / "c.parquet")


def test_truncated_and_foreign_files_are_refused_by_name(folder):
    whole = (folder / "b.parquet").read_bytes()
    (folder / "b.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"b\.parquet: not a readable Parquet file .* truncated"):
        ParquetSource(folder)
    (folder / "b.parquet").write_bytes(b"")
    with pytest.raises(DataError, match=r"b\.parquet: not a readable Parquet file"):
        ParquetSource(folder)


def test_a_file_damaged_after_the_start_is_named_when_read(folder):
    source = ParquetSource(folder)
    (folder / "b.parquet").unlink()
    assert source.read(0, 5) == ALL[:5]
    with pytest.raises(DataError, match=r"b\.parquet: not a readable Parquet file"):
        source.read(5, 6)
