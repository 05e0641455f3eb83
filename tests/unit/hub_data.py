"""A data set of the Hub that the tests of it list and read."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pldr_train.data.sources.file_source import FileSource, count_rows
from pldr_train.data.sources.hub_files import HubFiles
from pldr_train.data.sources.hub_listing import hub_manifest
from tests.tiny import data_recipe

REPOSITORY = "owner/corpus"


def parquet(texts, rows_per_group=4):
    """A Parquet file with RefinedWeb's columns; the text is random, so that it takes room."""
    content = io.BytesIO()
    table = pa.table(
        {"url": [f"http://example/{i}" for i in range(len(texts))], "content": texts, "n": range(len(texts))}
    )
    pq.write_table(table, content, row_group_size=rows_per_group)
    return content.getvalue()


def texts_of(index, documents=10):
    generator = np.random.default_rng(index)
    return [f"{index}/{row} {generator.integers(0, 2**62, 40).tolist()}" for row in range(documents)]


ALL = [text for index in range(3) for text in texts_of(index)]
FILES = {f"data/train-{index:05d}-of-00003.parquet": parquet(texts_of(index)) for index in range(3)}
NAMES = sorted(FILES)
OTHERS = {"data/test-00000-of-00001.parquet": parquet(["a test"]), "README.md": b"# A corpus\n", "notes/a.txt": b"x"}


def retries(said):
    return [line for line in said if "trying again" in line]


def listed(repository=REPOSITORY, retries=0, **section):
    return hub_manifest(data_recipe(source="hub", repository=repository, retries=retries, **section).data)


def opened(tmp_path, manifest=None, retries=0, on_bad="raise", until=None):
    """A counted source, and what its files are read with."""
    manifest = manifest or listed()
    access = HubFiles(manifest, tmp_path / "cache", retries=retries)
    return FileSource(count_rows(manifest, access, until, on_bad), access, on_bad), access
