"""Data sets of the Hub, against a server on this machine: which files are listed, at which commit, with what errors."""

import hashlib
import os
import subprocess
import sys

import pytest
from huggingface_hub import constants

from pldr_train.data.sources import hub_http
from pldr_train.errors import DataError
from tests.hub_server import HubServer, readme
from tests.unit.hub_data import ALL, FILES, NAMES, OTHERS, REPOSITORY, listed, opened, parquet, retries


@pytest.fixture
def server(monkeypatch, tmp_path):
    with HubServer({REPOSITORY: FILES | OTHERS}) as started:
        started.use(monkeypatch, tmp_path)
        yield started


def fails(pattern, **wish):
    with pytest.raises(DataError, match=pattern) as caught:
        listed(**wish)
    assert "\n" not in str(caught.value)


def test_a_split_is_listed_with_sizes_and_digests_at_its_commit(server):
    manifest = listed()
    sha = server.repositories[REPOSITORY].sha(0)
    assert [file.name for file in manifest.files] == NAMES
    assert [file.size_bytes for file in manifest.files] == [len(FILES[name]) for name in NAMES]
    assert [file.digest for file in manifest.files] == [hashlib.sha256(FILES[name]).hexdigest() for name in NAMES]
    assert manifest.identity == {"repository": REPOSITORY, "revision": sha}
    assert manifest.origin == {
        "kind": "hub", "repository": REPOSITORY, "revision": None, "commit": sha, "config": "default", "split": "train",
    }  # fmt: skip
    assert (manifest.num_counted, manifest.text_column) == (0, "content")
    assert [file.name for file in listed(split="test").files] == ["data/test-00000-of-00001.parquet"]


def test_configs_and_splits_of_the_readme_are_followed(server):
    files = {f"{lang}/{part}.parquet": parquet([lang + part]) for lang in ("en", "de") for part in ("x", "y", "z")}
    configs = {lang: {"train": f"{lang}/[xy].parquet", "held_out": f"{lang}/z.parquet"} for lang in ("en", "de")}
    server.commit("owner/two", files | {"README.md": readme(configs)})
    server.commit("owner/default", files | {"README.md": readme(configs, default="de")})
    assert [file.name for file in listed("owner/two", config="en").files] == ["en/x.parquet", "en/y.parquet"]
    assert [file.name for file in listed("owner/two", config="de", split="held_out").files] == ["de/z.parquet"]
    assert listed("owner/default").origin["config"] == "de"
    fails(r"data\.config is not set, and owner/two at \w{10} has several: set one of en, de", repository="owner/two")
    fails(r"data\.config=fr: no such config of owner/two at \w{10}; it has en, de", repository="owner/two", config="fr")
    fails(
        r"data\.split=test: no such split .* config en; it has train, held_out",
        repository="owner/two",
        config="en",
        split="test",
    )


def test_a_pattern_of_files_replaces_config_and_split(server):
    assert [file.name for file in listed(data_files="data/train-0000[02]*").files] == [NAMES[0], NAMES[2]]
    assert listed(data_files=NAMES[1]).origin["data_files"] == NAMES[1]
    fails(r"data\.data_files=none/\*: matches no file of owner/corpus at", data_files="none/*")
    fails(r"data\.data_files=/etc/\*: must be a pattern of names within the repository", data_files="/etc/*")
    fails(r"data\.data_files=hf://datasets/x/y: must be", data_files="hf://datasets/x/y")
    fails(r"must all be \.parquet, or all JSON lines .* but it has 4 of \.parquet, 1 of \.txt; set", data_files="**")


def test_json_lines_are_listed_and_other_kinds_are_refused_by_what_was_found(server):
    server.commit("owner/lines", {"train/b.jsonl.gz": b"b", "train/a.json.zst": b"a", "train/c.json": b"c"})
    manifest = listed("owner/lines")
    assert [file.name for file in manifest.files] == ["train/a.json.zst", "train/b.jsonl.gz", "train/c.json"]
    assert [file.digest is None for file in manifest.files] == [False, False, True]
    server.commit("owner/tables", {"train.csv": b"a,b\n"})
    fails(r"data\.split=train: the files of owner/tables .* but it has 1 of \.csv; set", repository="owner/tables")
    server.commit("owner/script", {"script.py": b"import datasets", "train.parquet": parquet(["a"])})
    fails(
        r"data\.repository=owner/script: its files cannot be listed .*set data\.data_files", repository="owner/script"
    )
    assert listed("owner/script", data_files="*.parquet").files[0].name == "train.parquet"
    server.commit("owner/empty", {"README.md": b"nothing"})
    fails(r"data\.repository=owner/empty: its files cannot be listed", repository="owner/empty")


def test_a_later_commit_changes_nothing(server, tmp_path):
    first = listed()
    before, _ = opened(tmp_path, first, until=5)
    second = server.commit(
        REPOSITORY, {NAMES[0]: parquet(["new"] * 9), "data/train-00009-of-00003.parquet": b""}, tag="v2"
    )
    source, _ = opened(tmp_path, first)
    assert source.read(0, 30).texts() == ALL
    assert before.read(0, 5).texts() == ALL[:5]
    assert listed(revision=first.identity["revision"]).files == first.files
    later = listed(revision="v2")
    assert (later.origin["revision"], later.origin["commit"], listed().origin["commit"]) == ("v2", second, second)
    assert opened(tmp_path, later, until=1)[0].read(0, 1).texts() == ["new"]


def test_what_cannot_be_listed_is_named_with_what_there_is(server, monkeypatch):
    server.commit(REPOSITORY, FILES, tag="v1")
    fails(r"data\.repository=owner/none: no such data set on http://127.*set HF_TOKEN", repository="owner/none")
    fails(r"data\.repository=a/b/c: not the name of a data set .* write owner/name", repository="a/b/c")
    fails(r"data\.revision=v3: no such revision of owner/corpus; it has main, v1; or give a commit", revision="v3")
    server.repositories[REPOSITORY].gated = True
    fails(rf"a gated data set; accept its terms on {server.endpoint}/datasets/{REPOSITORY}, then set HF_TOKEN")
    monkeypatch.setenv("HF_TOKEN", server.token)
    assert [file.name for file in listed().files] == NAMES


def test_without_a_network_or_where_it_is_forbidden_the_message_says_so(monkeypatch, tmp_path, said):
    with HubServer({}) as stopped:
        pass
    stopped.use(monkeypatch, tmp_path)
    fails(r"listing owner/corpus: cannot connect .*at the last of 3 tries .*raise data\.retries=2", retries=2)
    assert len(retries(said)) == 2
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    fails(r"HF_HUB_OFFLINE=1 forbids reading from the Hub; unset it, or fetch")


def test_a_long_list_takes_few_requests(server):
    server.page_size = 100
    server.commit("owner/long", {f"data/train-{i:05d}-of-01200.parquet": b"%d" % i for i in range(1200)})
    server.requests.clear()
    assert [file.size_bytes for file in listed("owner/long").files] == [len(str(i)) for i in range(1200)]
    assert len(server.requests) < 30


YAML = {".huggingface.yaml": b"configs:\n- config_name: only\n  data_files: data/train-00001*\n"}


@pytest.mark.parametrize(
    "pattern", ["*/api/datasets/*", "*/revision/*", "*/tree/*", "*/paths-info/*", "*README.md", "*.huggingface.yaml"]
)
@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ({"status": 503}, "HTTP 503"),
        ({"status": 429, "headers": {"Retry-After": "0"}}, "HTTP 429"),
        ({"delay_s": 3.0}, "timed out"),
    ],
    ids=["503", "429", "slow"],
)
def test_every_request_of_a_listing_is_tried_again_and_gives_the_same(
    server, monkeypatch, tmp_path, pattern, fault, reason, said
):
    if "delay_s" in fault:
        server.use(monkeypatch, tmp_path, timeout_s=1.0)
    server.commit("owner/yaml", FILES | OTHERS | YAML)
    server.add_fault(pattern, **fault)
    assert [file.name for file in listed("owner/yaml", retries=8).files] == [NAMES[1]]
    assert [line.split(": ")[1].split(";")[0] for line in retries(said)] == [reason]


def test_the_address_follows_the_environment_also_after_the_library_was_loaded(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://mirror.example/")
    assert hub_http.file_url("a/b", "0" * 40, "data/x y.parquet") == (
        f"http://mirror.example/datasets/a/b/resolve/{'0' * 40}/data/x%20y.parquet"
    )


def test_an_address_that_is_none_or_no_hub_is_named(server, monkeypatch):
    server.is_hub = False
    fails(rf"{server.endpoint}: what answers there is no Hugging Face Hub; check HF_ENDPOINT")
    monkeypatch.setenv("HF_ENDPOINT", "hub.example")
    fails(r"data\.repository=owner/corpus: .*protocol.* \(hub\.example/datasets/owner/corpus\); check HF_ENDPOINT")


PROGRAM = """
import sys
from pathlib import Path
from pldr_train.data.sources.hub_files import HubFiles
from pldr_train.data.sources.hub_listing import hub_manifest
from pldr_train.data.sources.file_source import FileSource, count_rows
from pldr_train.recipe import DataSection
manifest = hub_manifest(DataSection(source="hub", repository="owner/corpus", retries=2))
access = HubFiles(manifest, Path(sys.argv[1]), retries=2)
source = FileSource(count_rows(manifest, access), access)
print(*source.read(0, 30).texts(), sep="\\n")
"""


@pytest.mark.slow
def test_another_process_follows_the_environment(server, tmp_path):
    server.add_fault("*.parquet", status=503)
    environment = os.environ | server.environment(tmp_path)
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, tmp_path], env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines() == ALL
    assert "HTTP 503; trying again" in ran.stderr  # where logging shows warnings by default
