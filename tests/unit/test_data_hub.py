"""Data sets of the Hub, against a server on this machine: which bytes are fetched, every fault, and whole files."""

import gzip
import io
import json
import math
import multiprocessing
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pyarrow.parquet as pq
import pytest
import torch
from huggingface_hub import constants

from pldr_train.data.downloading import download
from pldr_train.data.sources import converted_files, hub_files
from pldr_train.data.sources.file_source import FileSource, count_rows
from pldr_train.data.sources.hub_files import HubFiles
from pldr_train.data.sources.opening import open_source
from pldr_train.errors import DataError
from tests.hub_server import HubServer
from tests.tiny import data_recipe
from tests.unit.hub_data import ALL, FILES, NAMES, OTHERS, REPOSITORY, listed, opened, retries


@pytest.fixture
def server(monkeypatch, tmp_path):
    with HubServer({REPOSITORY: FILES | OTHERS}) as started:
        started.use(monkeypatch, tmp_path)
        yield started


# --- which bytes


def test_counting_reads_one_tail_of_each_file_it_needs_and_keeps_the_footers(server, tmp_path, monkeypatch):
    monkeypatch.setattr(hub_files, "_TAIL_BYTES", 8000)
    manifest = listed()
    server.requests.clear()
    source, access = opened(tmp_path, manifest, until=15)
    assert source.manifest.num_counted == 2
    sizes = [len(FILES[name]) for name in NAMES]
    assert [(request.method, request.range) for request in server.requests] == [
        ("GET", (sizes[0] - 8000, sizes[0])), ("GET", (sizes[1] - 8000, sizes[1])),
    ]  # fmt: skip
    again, _ = opened(tmp_path, manifest, until=15)
    assert again.manifest == source.manifest
    assert len(server.requests) == 2
    for name, file in zip(NAMES[:2], manifest.files, strict=False):
        assert access.footer(file).equals(pq.read_metadata(io.BytesIO(FILES[name])))
    assert len(server.requests) == 2
    (kept,) = tmp_path.rglob("train-00000*.footer")
    kept.write_bytes(b"spoilt on this disk")
    assert access.footer(manifest.files[0]).num_rows == 10
    assert len(server.requests) == 3


def test_a_footer_larger_than_the_tail_takes_one_more_request_for_the_rest(server, tmp_path, monkeypatch):
    monkeypatch.setattr(hub_files, "_TAIL_BYTES", 100)
    manifest = listed()
    access = HubFiles(manifest, tmp_path, retries=0)
    size = len(FILES[NAMES[0]])
    assert access.footer(manifest.files[0]).equals(pq.read_metadata(io.BytesIO(FILES[NAMES[0]])))
    footer = pq.read_metadata(io.BytesIO(FILES[NAMES[0]])).serialized_size + 8
    assert server.reads(NAMES[0]) == [(size - 100, size), (size - footer, size - 100)]


def test_the_thread_that_reads_makes_the_requests(server, tmp_path, monkeypatch):
    """A thread of Arrow's would hold memory of Python's when the process ends, which aborts it."""
    threads, read = [], HubFiles.read
    monkeypatch.setattr(HubFiles, "read", lambda *wanted: (threads.append(threading.get_ident()), read(*wanted))[1])
    source, _ = opened(tmp_path)
    threads.clear()
    assert source.read(0, 30).texts() == ALL
    assert set(threads) == {threading.get_ident()}


def test_a_read_fetches_the_text_columns_bytes_of_the_row_groups_it_touches(server, tmp_path):
    source, _ = opened(tmp_path)
    server.requests.clear()
    assert source.read(2, 5).texts() == ALL[2:5]
    assert source.read(21, 22).texts() == ALL[21:22]

    def chunk(name, group):
        column = pq.read_metadata(io.BytesIO(FILES[name])).row_group(group).column(1)
        start = column.dictionary_page_offset or column.data_page_offset
        return start, start + column.total_compressed_size

    assert server.reads(NAMES[0]) == [chunk(NAMES[0], 0), chunk(NAMES[0], 1)]
    assert server.reads(NAMES[2]) == [chunk(NAMES[2], 0)]
    assert len(server.requests) == 3
    assert all(request.sent_bytes == request.range[1] - request.range[0] for request in server.requests)


def test_any_interval_reads_as_from_the_files_themselves_also_where_the_hub_redirects(server, tmp_path):
    source, _ = opened(tmp_path)
    for start in range(0, 31, 3):
        for stop in range(start, 31, 3):
            assert source.read(start, stop).texts() == ALL[start:stop]
    server.redirect = True
    server.requests.clear()
    assert FileSource(source.manifest, source.access).read(0, 4).texts() == ALL[:4]
    assert [request.path.startswith("/cdn/") for request in server.requests] == [False, True]


def _read_in_child(source, sender):
    sender.send(source.read(0, 30).texts())


def test_forked_processes_and_copies_share_footers_but_no_connection(server, tmp_path):
    source, access = opened(tmp_path)
    assert source.read(0, 4).texts() == ALL[:4]  # opens a connection here, before the fork
    server.requests.clear()
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe(duplex=False) for _ in range(3)]
    children = [context.Process(target=_read_in_child, args=(source, sender)) for _, sender in pipes]
    for child in children:
        child.start()
    fresh = FileSource(source.manifest, access)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda i: fresh.read(i, i + 1).texts()[0], range(30))) == ALL
    assert [receiver.recv() for receiver, _ in pipes] == [ALL] * 3
    for child in children:
        child.join(240)
    copy = pickle.loads(pickle.dumps(source))
    assert copy.read(0, 30).texts() == ALL
    tails = [request for request in server.requests if request.range[1] == len(FILES[NAMES[0]])]
    assert tails == []


class Documents(torch.utils.data.IterableDataset):
    def __init__(self, source):
        self.source = source

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        for start in range(worker.id * 5, 30, worker.num_workers * 5):
            with ThreadPoolExecutor(4) as pool:
                texts = list(pool.map(lambda i: self.source.read(i, i + 1).texts()[0], range(start, start + 5)))
            yield start, texts


def test_forked_loader_workers_read_with_threads_while_the_hub_fails_at_times(server, tmp_path):
    source, _ = opened(tmp_path, retries=8)
    source.read(0, 30)
    for fault in ({"status": 503}, {"cut_after": 50}, {"cut_after": 10, "cut": "short"}):
        server.add_fault("*/resolve/*.parquet", times=3, **fault)
    loader = torch.utils.data.DataLoader(
        Documents(FileSource(source.manifest, source.access)),
        batch_size=None,
        num_workers=2,
        multiprocessing_context="fork",
    )
    parts = dict(iter(loader))
    assert [text for start in sorted(parts) for text in parts[start]] == ALL


# --- faults


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ({"status": 503}, "HTTP 503"),
        ({"status": 500}, "HTTP 500"),
        ({"status": 429, "headers": {"Retry-After": "0"}}, "HTTP 429"),
        ({"delay_s": 3.0}, "timed out"),
        ({"cut_after": 30}, "connection lost"),
        ({"cut_after": 30, "cut": "close"}, "connection lost"),
        ({"cut_after": 30, "cut": "short"}, " bytes arrived"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value)),
)
def test_a_fault_is_recovered_from_counted_and_said(server, monkeypatch, tmp_path, fault, reason, said):
    if "delay_s" in fault:
        server.use(monkeypatch, tmp_path, timeout_s=1.0)
    manifest = listed()
    server.add_fault(f"*/{NAMES[1]}", **fault)
    source, access = opened(tmp_path, manifest, retries=1)
    assert source.manifest.num_documents == 30
    server.add_fault(f"*/{NAMES[1]}", **fault)
    assert source.read(0, 30).texts() == ALL
    server.add_fault(f"*/{NAMES[1]}", **fault)
    assert access.local_copy(manifest.files[1]).read_bytes() == FILES[NAMES[1]]
    assert len(retries(said)) == 3
    for line in retries(said):
        assert line.startswith(f"{REPOSITORY}: {NAMES[1]}: ")
        assert reason in line
        assert line.endswith("(1 of 1)")
    server.add_fault(f"*/{NAMES[0]}", times=math.inf, **fault)
    fresh = FileSource(source.manifest, source.access, "skip")
    with pytest.raises(DataError) as caught:  # also where what cannot be read is skipped: the file is not at fault
        fresh.read(0, 1)
    message = str(caught.value)
    assert message.startswith(f"{REPOSITORY}: {NAMES[0]}: ")
    assert reason in message
    assert f"({access.describe(manifest.files[0])})" in message
    assert "at the last of 2 tries" in message
    assert "it goes on from the last checkpoint" in message


def test_a_file_that_vanishes_is_its_own_fault_and_not_tried_again(server, tmp_path, said):
    source, access = opened(tmp_path, retries=8)
    server.add_fault(f"*/{NAMES[1]}", times=math.inf, status=404)
    with pytest.raises(DataError, match=r"train-00001-of-00003\.parquet, row group 0: not a readable .*no such file"):
        source.read(9, 11)
    block = FileSource(source.manifest, access, "skip").read(9, 21)
    assert block.texts() == [ALL[9], *[""] * 10, ALL[20]]
    assert [(part.start, part.stop) for part in block.unreadable] == [(10, 14), (14, 18), (18, 20)]
    with pytest.raises(FileNotFoundError):
        access.local_copy(source.manifest.files[1])
    assert retries(said) == []
    manifest = listed()
    with pytest.raises(DataError, match=r"train-00001-of-00003\.parquet: not a readable Parquet file"):
        count_rows(manifest, HubFiles(manifest, tmp_path / "other", retries=8))
    counted = count_rows(manifest, HubFiles(manifest, tmp_path / "other", retries=8), on_bad="skip")
    assert [file.rows for file in counted.files] == [10, 0, 10]


@pytest.mark.parametrize("status", [401, 403])
def test_a_refusal_stops_even_where_bad_files_are_skipped(server, tmp_path, status, said):
    source, _ = opened(tmp_path, retries=8, on_bad="skip")
    server.add_fault("*.parquet", times=math.inf, status=status)
    with pytest.raises(DataError, match=rf"owner/corpus: {NAMES[0]}: HTTP {status} .*set HF_TOKEN"):
        source.read(0, 1)
    assert retries(said) == []


def test_files_that_are_no_parquet_are_named_and_their_footers_not_kept(server, tmp_path):
    for content in (
        b"",
        b"short",
        b"no Parquet at all, but long",
        FILES[NAMES[0]][:-20],
        b"x" * 50 + b"\xff\xff\0\0PAR1",
    ):
        server.commit("owner/bad", {"train.parquet": content})
        manifest = listed("owner/bad")
        with pytest.raises(DataError, match=r"train\.parquet: not a readable Parquet file \("):
            count_rows(manifest, HubFiles(manifest, tmp_path, retries=0))
    assert list(tmp_path.rglob("*.footer")) == []


def test_a_server_that_knows_no_ranges_is_refused(server, tmp_path, monkeypatch):
    monkeypatch.setattr(hub_files, "_TAIL_BYTES", 100)
    manifest = listed()
    server.ranges = False
    with pytest.raises(DataError, match=r"sends the whole file where a part is asked for; fetch the files ahead"):
        count_rows(manifest, HubFiles(manifest, tmp_path, retries=8))


# --- whole files


def test_a_local_copy_is_read_without_any_request(server, tmp_path, monkeypatch):
    manifest = listed()
    access = HubFiles(manifest, tmp_path / "cache", retries=0)
    paths = [access.local_copy(file) for file in manifest.files]
    commit = manifest.identity["revision"]
    assert paths == [tmp_path / "cache" / "hub" / "owner--corpus" / commit / name for name in NAMES]
    assert [path.read_bytes() for path in paths] == [FILES[name] for name in NAMES]
    server.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    source, access = opened(tmp_path, manifest)
    assert source.read(0, 30).texts() == ALL
    assert [access.local_copy(file) for file in manifest.files] == paths
    assert server.requests == []
    paths[0].write_bytes(b"cut short")
    assert not access.has_local_copy(manifest.files[0])
    with pytest.raises(DataError, match="HF_HUB_OFFLINE=1 forbids"):
        access.local_copy(manifest.files[0])


def test_an_interrupted_fetch_goes_on_where_it_stopped(server, tmp_path, said):
    manifest = listed()
    access, file, content = HubFiles(manifest, tmp_path, retries=3), manifest.files[0], FILES[NAMES[0]]
    server.add_fault(f"*/{NAMES[0]}", cut_after=1000)
    server.add_fault(f"*/{NAMES[0]}", cut_after=500)
    assert access.local_copy(file).read_bytes() == content
    assert [request.range for request in server.requests[-3:]] == [None, (1000, len(content)), (1500, len(content))]
    assert len(retries(said)) == 2
    path = access.local_copy(file)
    assert [each.name for each in path.parent.iterdir() if not each.name.startswith(".")] == [path.name]
    path.rename(path.with_name(path.name + ".incomplete"))  # as if killed before it was renamed
    server.requests.clear()
    assert access.local_copy(file).read_bytes() == content
    assert server.requests == []


def test_content_with_another_digest_is_refused_and_a_spoilt_beginning_fetched_anew(server, tmp_path, said):
    manifest = listed()
    access, file, content = HubFiles(manifest, tmp_path, retries=3), manifest.files[0], FILES[NAMES[0]]
    partial = tmp_path / "hub" / "owner--corpus" / manifest.identity["revision"] / (NAMES[0] + ".incomplete")
    for spoilt in (b"\0" * 100, b"\0" * len(content), b"\0" * (len(content) + 1)):
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(spoilt)
        assert access.local_copy(file).read_bytes() == content
        access.local_copy(file).unlink()
    assert len([line for line in retries(said) if "arrived with SHA-256" in line]) == 2
    commit = server.repositories[REPOSITORY].commits[0]
    commit[NAMES[0]] = content[:-1] + b"x"
    manifest_of_other = server.repositories[REPOSITORY].sha(0)
    access._commit = manifest_of_other  # the same name and size, other bytes
    with pytest.raises(DataError, match=rf"SHA-256 \w+, not {file.digest}; run the same command again"):
        access.local_copy(file)
    assert not partial.exists()


def test_several_fetch_one_file_once(server, tmp_path):
    manifest = listed()
    access = HubFiles(manifest, tmp_path, retries=0)
    server.add_fault("*.parquet", delay_s=0.2)
    server.requests.clear()
    with ThreadPoolExecutor(6) as pool:
        paths = set(pool.map(lambda _: access.local_copy(manifest.files[0]), range(6)))
    assert len(paths) == len(server.requests) == 1


def test_download_fetches_what_is_missing_and_says_how_far_it_is(server, tmp_path, said):
    manifest = listed()
    HubFiles(manifest, tmp_path, retries=0).local_copy(manifest.files[1])
    server.requests.clear()
    said.clear()
    done = download(manifest, manifest.files, tmp_path, retries=0)
    assert (done.fetched, done.kept, done.problems) == (2, 1, ())
    assert done.fetched_bytes == len(FILES[NAMES[0]]) + len(FILES[NAMES[2]])
    assert sorted(line.split(": ")[0] for line in said) == [NAMES[0], NAMES[2]]
    assert said[-1].split("; ")[1].startswith("2 of 2 files")
    assert len(server.requests) == 2
    assert download(manifest, manifest.files, tmp_path, retries=0).kept == 3


def test_download_names_files_that_are_gone_and_stops_where_all_is_in_vain(server, tmp_path):
    manifest = listed()
    server.add_fault(f"*/{NAMES[1]}", times=math.inf, status=404)
    done = download(manifest, manifest.files, tmp_path, retries=0)
    assert (done.fetched, len(done.problems)) == (2, 1)
    assert NAMES[1] in done.problems[0]
    server.add_fault("*.parquet", times=math.inf, status=403)
    with pytest.raises(DataError, match="HTTP 403"):
        download(manifest, manifest.files, tmp_path / "other", retries=0, at_once=1)


def test_a_fetch_that_is_reported_to_stop_ends_and_keeps_what_it_has(server, tmp_path):
    stop, manifest = threading.Event(), listed()
    stop.set()
    access = HubFiles(manifest, tmp_path, retries=8)
    with pytest.raises(DataError, match=r"interrupted; run the same command again: it goes on from here"):
        access.local_copy(manifest.files[0], stop)
    (partial,) = tmp_path.rglob("*.incomplete")
    assert FILES[NAMES[0]].startswith(partial.read_bytes())
    server.requests.clear()
    server.add_fault("*.parquet", times=math.inf, status=503)
    with pytest.raises(DataError, match="interrupted"):
        access.local_copy(manifest.files[1], stop)
    assert len(server.requests) == 1


def test_a_cache_that_cannot_be_written_is_named(server, tmp_path):
    (tmp_path / "file").write_text("")
    manifest = listed()
    access = HubFiles(manifest, tmp_path / "file", retries=0)
    with pytest.raises(DataError, match=r"cannot write .*set data\.cache_dir"):
        access.local_copy(manifest.files[0])
    with pytest.raises(DataError, match=r"cannot write .*set data\.cache_dir"):
        access.footer(manifest.files[0])


# --- through the recipe's settings


def settings(tmp_path, **changes):
    values = {
        "source": "hub", "path": None, "text_column": "content", "train_documents": None, "validation_documents": None,
        "validation_fraction": 0.1, "tokenizer": None, "cache_dir": str(tmp_path / "cache"), "context_length": 8,
        "num_lanes": 2, "shuffle": True, "shuffle_window_documents": 4, "num_workers": 0, "seed": 0, "vocab_size": 300,
        "batch_size": 2, "micro_batch_size": 2, "validation_rows": 2, "repository": REPOSITORY,
    }  # fmt: skip
    return data_recipe(**values | changes).data


def test_documents_are_read_by_number_as_from_local_files(server, tmp_path):
    for name, content in FILES.items():
        path = tmp_path / "local" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    local = open_source(settings(tmp_path, source="parquet", path=str(tmp_path / "local" / "data")))
    remote = open_source(settings(tmp_path))
    assert remote.num_documents == local.num_documents == 30
    for start, stop in ((0, 30), (3, 4), (8, 23), (30, 30)):
        assert remote.read(start, stop).texts() == local.read(start, stop).texts() == ALL[start:stop]
    partly = open_source(settings(tmp_path), until=11)
    assert partly.manifest.num_counted == 2
    kept = open_source(settings(tmp_path), manifest=partly.manifest)
    assert kept.manifest == remote.manifest


@pytest.mark.skipif(not hasattr(converted_files.ConvertedFiles, "footer"), reason="JSON lines are not converted yet")
def test_json_lines_are_fetched_whole_and_read_by_number(server, tmp_path):
    lines = "".join(json.dumps({"content": text}) + "\n" for text in ALL[:10]).encode()
    server.commit("owner/lines", {"train/a.jsonl.gz": gzip.compress(lines), "train/b.jsonl": lines})
    source = open_source(settings(tmp_path, repository="owner/lines"))
    assert source.read(0, 20).texts() == ALL[:10] * 2
    server.requests.clear()
    again = open_source(settings(tmp_path, repository="owner/lines"), manifest=source.manifest)
    assert again.read(5, 15).texts() == [*ALL[5:10], *ALL[:5]]
    assert server.requests == []
