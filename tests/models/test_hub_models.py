"""`hub:OWNER/NAME[@REVISION]`: models of a Hub on this machine, pinned by commit and SHA-256."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pldr_train.errors import DataError
from pldr_train.models import hub
from pldr_train.models.hub import HubSource, fetch_model
from pldr_train.models.loading import load_model
from tests.distributed.fleet import free_port
from tests.hub_server import HubServer
from tests.messages import collected
from tests.models.conftest import Run, Trained

NAME = "someone/a-model"
MODEL = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.model", "tokenizer.json"}


@pytest.fixture
def files(trained: Trained) -> dict[str, bytes]:
    """Of a published model: an export with its code, and a file of weights that would run code."""
    found = {path.name: path.read_bytes() for path in trained.export.iterdir() if path.is_file()}
    return found | {"pytorch_model.bin": b"\x80\x04", "training_args.bin": b"\x80\x04"}


@pytest.fixture
def server(files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer({NAME: files}) as server:
        server.use(monkeypatch, tmp_path)
        yield server


def test_a_model_is_imported_without_code_and_its_files_are_recorded(
    server: HubServer, files: dict[str, bytes], trained: Trained, tmp_path: Path, run: Run
) -> None:
    target = tmp_path / "imported"
    code, out, err = run("import", f"hub:{NAME}", target)
    assert code == 0, err
    commit = server.repositories[NAME].sha(0)
    assert f"source      hub:{NAME} at commit {commit}" in out
    source = HubSource.read(target)
    assert source is not None
    assert (source.repository, source.revision, source.commit) == (NAME, None, commit)
    assert source.files == {name: hashlib.sha256(files[name]).hexdigest() for name in source.files}
    assert source.files.keys() >= MODEL
    asked = {request.path.rpartition("/")[2] for request in server.requests if "/resolve/" in request.path}
    assert asked == source.files.keys()
    assert not [name for name in asked if name.endswith((".py", ".bin"))]
    state, expected = load_model(target).state_dict(), load_model(trained.export).state_dict()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


@pytest.mark.parametrize("words", [("generate", "{}", "the metric", "--max-new-tokens", "3"), ("audit", "{}")])
def test_a_model_is_used_by_its_name(server: HubServer, words: tuple[str, ...], tmp_path: Path, run: Run) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the metric tensor learns an operator from queries and keys of every head " * 12)
    more = ("--text", text, "--rows", "2", "--context", "16") if words[0] == "audit" else ()
    code, out, err = run(*(word.format(f"hub:{NAME}") for word in words), *more)
    assert code == 0, err
    assert out


def test_models_are_compared_by_their_names(server: HubServer, trained: Trained, tmp_path: Path, run: Run) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the metric tensor learns an operator from queries and keys of every head " * 12)
    options = ("--text", text, "--rows", "2", "--context", "16", "--json", "-")
    code, out, err = run("evaluate", trained.export, *options, "--compare", f"hub:{NAME}")
    assert code == 0, err
    (comparison,) = json.loads(out)["comparisons"]
    differences = [each["mean"] for each in comparison["differences"].values()]
    assert differences
    assert not any(differences)
    assert f"hub:{NAME}: commit {server.repositories[NAME].sha(0)}" in err


def test_a_revision_is_a_branch_a_tag_or_a_commit(server: HubServer, files: dict[str, bytes], tmp_path: Path) -> None:
    first = server.repositories[NAME].sha(0)
    second = server.commit(NAME, files | {"generation_config.json": b"{}"}, tag="v2")
    assert fetch_model(f"hub:{NAME}").source.commit == second
    assert fetch_model(f"hub:{NAME}@v2").source.commit == second
    pinned = fetch_model(f"hub:{NAME}@{first}")
    assert pinned.source.commit == first
    assert (pinned.folder / "generation_config.json").read_bytes() == files["generation_config.json"]


def test_a_tag_that_moved_is_no_import_of_the_same(
    server: HubServer, files: dict[str, bytes], tmp_path: Path, run: Run
) -> None:
    first = server.commit(NAME, files, tag="v1")
    target = tmp_path / "imported"
    assert run("import", f"hub:{NAME}@v1", target)[0] == 0
    assert run("import", f"hub:{NAME}@v1", target, "--overwrite")[0] == 0
    second = server.commit(NAME, files | {"generation_config.json": b"{}"}, tag="v1")
    code, _, err = run("import", f"hub:{NAME}@v1", target, "--overwrite")
    assert code == 2
    assert f"hub:{NAME}@v1: is commit {second} now, and was {first} when {target} was imported" in err
    assert run("import", f"hub:{NAME}@{second}", target, "--overwrite")[0] == 0
    assert run("import", f"hub:{NAME}", target, "--overwrite")[0] == 0  # a branch that moves is none that was named


def test_a_commit_with_other_bytes_than_before_is_refused(
    server: HubServer, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = fetch_model(f"hub:{NAME}").source.commit
    # The same commit says another thing of itself, and no copy of the first is left.
    server.repositories[NAME].commits[0]["tokenizer.model"] += b"\0"
    monkeypatch.setattr(type(server.repositories[NAME]), "sha", lambda *_: commit)
    shutil.rmtree(tmp_path / "hf_home" / "hub")
    code, _, err = run("import", f"hub:{NAME}@{commit}", tmp_path / "imported")
    assert code == 2
    assert f"commit {commit} has another tokenizer.model than before" in err
    assert not (tmp_path / "imported").exists()


def test_a_file_that_is_not_what_the_repository_lists_is_refused(server: HubServer) -> None:
    folder = fetch_model(f"hub:{NAME}").folder
    weights = (folder / "model.safetensors").resolve()
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    with pytest.raises(DataError, match=r"model\.safetensors is not the file that the repository lists .*; remove "):
        fetch_model(f"hub:{NAME}")


def refused(name: str) -> str:
    with pytest.raises(DataError) as error:
        fetch_model(name)
    text = str(error.value)
    assert text.startswith(f"{name}: "), text
    assert "\n" not in text
    return text


def test_what_cannot_be_fetched_is_one_message(
    server: HubServer, files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "no name of a model" in refused("hub:")
    assert "no name of a model" in refused("hub:a/b/c")
    assert "no name of a model" in refused(f"hub:{NAME}@")
    assert "no such model, or a private one" in refused("hub:someone/nothing")
    assert "no such revision" in refused(f"hub:{NAME}@v9")
    server.commit("someone/pickled", {"config.json": b"{}", "pytorch_model.bin": b"x"})
    assert "no model.safetensors there (it has pytorch_model.bin)" in refused("hub:someone/pickled")
    server.commit("someone/bare", {"model.safetensors": b"x"})
    assert "no config.json there" in refused("hub:someone/bare")
    server.commit("someone/gated", files)
    server.repositories["someone/gated"].gated = True
    assert "accept the terms" in refused("hub:someone/gated")
    server.commit("someone/secret", files)
    server.repositories["someone/secret"].private = True
    assert "log in with `hf auth login`, or set HF_TOKEN" in refused("hub:someone/secret")
    monkeypatch.setenv("HF_TOKEN", server.token)
    assert fetch_model("hub:someone/secret").source.repository == "someone/secret"
    with monkeypatch.context() as other:
        other.setattr(type(server.repositories[NAME]), "sha", lambda *_: "../../elsewhere")
        assert "names no commit" in refused(f"hub:{NAME}")
    server.add_fault("*/api/models/*", status=403, times=math.inf)
    assert "HTTP 403" in refused(f"hub:{NAME}")


def test_without_the_hub_a_model_is_what_was_fetched_before(
    server: HubServer, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = fetch_model(f"hub:{NAME}@main").source.commit
    second = server.commit(NAME, {**server.repositories[NAME].commits[0], "README.md": b"new"})
    assert fetch_model(f"hub:{NAME}").source.commit == second
    server.add_fault("*", status=503, times=math.inf)
    for revision, commit in (("", second), ("@main", first), (f"@{first}", first)):
        with collected() as said:
            held = fetch_model(f"hub:{NAME}{revision}")
        assert held.source.commit == commit
        assert held.folder.name == commit
        assert f"commit {commit} is taken, as it was fetched before" in "".join(said)
    assert "HTTP 503" in refused(f"hub:{NAME}@v1")
    asked = len(server.requests)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, _, err = run("import", f"hub:{NAME}", tmp_path / "imported")
    assert code == 0, err
    assert len(server.requests) == asked
    weights = (held.folder / "model.safetensors").resolve()
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + b"\1")
    assert f"model.safetensors in the cache is not the file that was fetched; remove {weights}" in refused(
        f"hub:{NAME}@main"
    )
    weights.unlink()
    assert "HF_HUB_OFFLINE=1 forbids the Hub, and the cache does not have it" in refused(f"hub:{NAME}@main")


def test_without_a_network_or_room_it_says_so(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as offline:
        offline.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        assert "HF_HUB_OFFLINE=1 forbids the Hub" in refused(f"hub:{NAME}")
    with monkeypatch.context() as small:
        small.setattr(hub, "free_bytes", lambda _: 10)
        assert "GB are to be fetched, and 0.00 GB are free" in refused(f"hub:{NAME}")

    def full(*_: Any, **__: Any) -> str:
        raise OSError(errno.ENOSPC, "No space left on device", "blob")

    with monkeypatch.context() as filling:
        filling.setattr(hub, "snapshot_download", full)
        assert "is full; free some space, or set HF_HOME" in refused(f"hub:{NAME}")
    # Nothing listens there.
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{free_port()}")
    assert "when the network and the Hub are up, or name a local folder" in refused(f"hub:{NAME}")
