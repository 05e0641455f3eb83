"""The list of a source's files: where a document stands, and the list on the disk."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pldr_train.data.sources.manifest import Manifest, SourceFile, run_lengths
from pldr_train.errors import CheckpointError


def manifest_of(groups_of_files):
    files = tuple(
        SourceFile(f"data/{index:05d}.parquet", 100 + index, None if groups is None else run_lengths(groups))
        for index, groups in enumerate(groups_of_files)
    )
    return Manifest({"kind": "hub", "repository": "a/b"}, "content", files, {"revision": "0" * 40})


@given(st.lists(st.lists(st.integers(0, 5), max_size=5), min_size=1, max_size=8))
def test_every_document_is_found_in_its_file_and_row_group(groups_of_files):
    manifest = manifest_of(groups_of_files)
    expected = [
        (file, group)
        for file, groups in enumerate(groups_of_files)
        for group, rows in enumerate(groups)
        for _ in range(rows)
    ]
    assert manifest.num_documents == len(expected)
    for ordinal, (file, group) in enumerate(expected):
        place = manifest.locate(ordinal)
        assert (place.file, place.group) == (file, group)
        assert place.group_start <= ordinal < place.group_stop
        assert place.group_stop - place.group_start == groups_of_files[file][group]


def test_a_list_survives_the_disk_counted_or_not(tmp_path):
    manifest = manifest_of([[1000] * 174 + [919], [], [3, 3, 4], None, None])
    assert (manifest.num_counted, manifest.num_documents) == (3, 174_929)
    manifest.save(tmp_path / "data.json")
    assert Manifest.load(tmp_path / "data.json") == manifest
    assert len((tmp_path / "data.json").read_text().splitlines()) == 7  # one file a line, for eyes and for diffs


def test_a_damaged_list_is_refused_by_name(tmp_path):
    path = tmp_path / "data.json"
    whole = manifest_of([[1]]).to_json()
    for content in (
        "",
        whole[:-20],
        "[]",
        whole.replace('"name"', '"title"'),
        whole.replace('"format": 1', '"format": 9'),
    ):
        path.write_text(content)
        with pytest.raises(CheckpointError, match=r"data\.json"):
            Manifest.load(path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        Manifest.load(tmp_path / "missing.json")
