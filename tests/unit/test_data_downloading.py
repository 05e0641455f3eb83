"""Files of the Hub fetched ahead, checked, and tokenised, against a server on this machine."""

import json

import numpy as np
import pytest

from pldr_train.data import downloading
from pldr_train.data.downloading import fetch, free_bytes, wanted_files
from pldr_train.data.tokens.store import TokenStore
from pldr_train.data.verification import verify_source
from pldr_train.errors import DataError
from tests.hub_server import HubServer
from tests.tiny import changed
from tests.unit.hub_data import FILES, NAMES, OTHERS, REPOSITORY
from tests.unit.token_data import contents, live_reader, read, settings, tokenize


@pytest.fixture
def server(monkeypatch, tmp_path):
    with HubServer({REPOSITORY: FILES | OTHERS}) as started:
        started.use(monkeypatch, tmp_path)
        yield started


@pytest.fixture
def base(tmp_path, tiny_data):
    """The second file's documents train, one of the third's validates."""
    wish = {"source": "hub", "repository": REPOSITORY, "path": None, "retries": 0}
    intervals = {"train_documents": (12, 18), "validation_documents": (20, 21)}
    return settings(tmp_path / "corpus", tiny_data / "tokenizer.model", **wish, **intervals)


def test_only_the_files_that_the_intervals_touch_are_wanted_and_fetched_once(server, base):
    wanted = wanted_files(base.data)
    assert [file.name for file in wanted.files] == NAMES[1:]
    assert wanted.missing_bytes == sum(len(FILES[name]) for name in NAMES[1:])
    assert fetch(base.data, wanted).fetched == 2
    wanted = wanted_files(base.data)
    assert (wanted.missing, fetch(base.data, wanted).fetched) == ((), 0)
    server.requests.clear()
    assert len(read(live_reader(base), np.arange(12, 18), 3)[0]) == 6
    assert server.reads() == []
    everything = changed(base, train_documents=None, validation_documents=None)
    assert [file.name for file in wanted_files(everything.data).missing] == NAMES[:1]


def test_a_disk_that_is_too_small_is_refused_before_anything_is_fetched_unless_forced(server, base, monkeypatch):
    monkeypatch.setattr(downloading, "free_bytes", lambda _: 100)
    wanted = wanted_files(base.data)
    server.requests.clear()
    with pytest.raises(DataError, match=r"data\.cache_dir=.* GB are to be fetched and 0\.00 GB are free; .*--force"):
        fetch(base.data, wanted)
    assert server.requests == []
    assert fetch(base.data, wanted, force=True).fetched == 2


def test_free_space_is_that_of_the_place_where_a_folder_would_be(tmp_path):
    assert free_bytes(tmp_path / "not" / "there" / "yet") > 0


def test_json_lines_are_fetched_until_the_intervals_are_covered(monkeypatch, tmp_path, base):
    lines = {f"train-{index}.jsonl": b"".join(
        json.dumps({"content": f"the metric {index} {row}"}).encode() + b"\n" for row in range(10)
    ) for index in range(3)}  # fmt: skip
    with HubServer({REPOSITORY: lines}) as server:
        server.use(monkeypatch, tmp_path)
        some = changed(base, train_documents=(0, 8), validation_documents=(9, 12))
        wanted = wanted_files(some.data)
        assert ([file.name for file in wanted.files], wanted.missing) == (["train-0.jsonl", "train-1.jsonl"], ())
        assert server.reads("train-2.jsonl") == []
        everything = changed(base, train_documents=None, validation_documents=None)
        assert [file.name for file in wanted_files(everything.data).missing] == ["train-2.jsonl"]


def test_copies_are_verified_by_their_digest_and_what_is_not_copied_is_noted(server, base, tmp_path):
    found = verify_source(base.data)
    assert (found.files, found.problems) == (2, ())
    assert "2 of 2 files have no copy in" in found.notes[0]
    fetch(base.data, wanted_files(base.data))
    whole = verify_source(base.data)
    assert (whole.problems, whole.notes) == ((), ())
    (copy,) = tmp_path.glob(f"cache/hub/**/{NAMES[1].rpartition('/')[2]}")
    content = bytearray(copy.read_bytes())
    content[6] ^= 1  # of a column that is not read
    copy.write_bytes(content)
    (problem,) = verify_source(base.data).problems
    assert f"{copy}: has SHA-256" in problem
    assert "remove it, and fetch it again" in problem
    assert verify_source(base.data, quick=True).problems == ()


def test_tokens_of_the_hub_stay_with_the_commit_they_began_with(server, base, tmp_path):
    straight = tokenize(base, tmp_path / "straight").manifest
    assert read(TokenStore(tmp_path / "straight"), np.arange(12, 21), 5) == read(
        live_reader(base), np.arange(12, 21), 5
    )
    server.commit(REPOSITORY, FILES | {NAMES[1]: FILES[NAMES[2]]})  # `main` is something else now
    before = contents(tmp_path / "straight")
    (tmp_path / "straight" / straight.shards[0].name).unlink()
    assert tokenize(base, tmp_path / "straight").written_shards == 1
    assert contents(tmp_path / "straight") == before
    with pytest.raises(DataError, match=r"the source's revision was \w{40} and is \w{40} now"):
        tokenize(changed(base, revision="main"), tmp_path / "straight")
