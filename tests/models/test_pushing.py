"""`pldr-train export --push`: private unless it is confirmed, with a card that names no path of the machine."""

from __future__ import annotations

import builtins
import io
import json
import math
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from pldr_train.models.hub import fetch_model
from pldr_train.models.loading import load_model
from tests.hub_server import HubServer
from tests.models.conftest import Run, Trained

NAME = "me/a-model"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer({}) as server:
        server.use(monkeypatch, tmp_path)
        monkeypatch.setenv("HF_TOKEN", server.token)
        yield server


def test_a_run_is_pushed_as_a_private_model_that_comes_back_the_same(
    server: HubServer, trained: Trained, tmp_path: Path, run: Run
) -> None:
    code, out, err = run("export", trained.run, tmp_path / "out", "--push", NAME, "--license", "apache-2.0")
    assert code == 0, err
    assert f"pushed      {server.endpoint}/{NAME} (private)" in out
    repository = server.repositories[NAME]
    assert repository.private
    files = repository.commits[-1]
    assert {"config.json", "model.safetensors", "README.md", "tokenizer.model", "modeling_pldrllm.py"} <= files.keys()
    # No byte of it names the machine.
    for name, content in files.items():
        for path in (tmp_path, trained.folder, Path(__file__).parents[2]):
            assert str(path).encode() not in content, name
    fetched = load_model(fetch_model(f"hub:{NAME}").folder).state_dict()
    expected = load_model(trained.export).state_dict()
    assert all(torch.equal(fetched[name], expected[name]) for name in expected)


def test_the_card_has_license_data_and_results_for_the_hub(
    server: HubServer, trained: Trained, tmp_path: Path, run: Run
) -> None:
    assert run("export", trained.run, tmp_path / "out", "--push", NAME, "--license", "mit")[0] == 0
    text = server.repositories[NAME].commits[-1]["README.md"].decode()
    card = ModelCard(text)
    assert card.data.license == "mit"
    assert {"pldr-llm", "pldr_train"} <= {*card.data.tags}
    lines = [json.loads(line) for line in (trained.run / "metrics.jsonl").read_text().splitlines()]
    last = next(line["val/perplexity"] for line in reversed(lines) if "val/perplexity" in line)
    results = {each.metric_name: each for each in card.data.eval_results or ()}
    assert results["val/perplexity"].metric_value == last
    assert results["val/perplexity"].dataset_type == "parquet"
    assert card.data.model_name == "a-model"
    assert "tokens of files of the machine that trained it (parquet)" in text
    recipe = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert recipe["optim"]["lr"] == 2e-3
    assert (recipe["data"]["path"], recipe["run"]["dir"]) == (None, "runs")
    assert f'folder = "{NAME}"  # on the Hub' in text


def test_a_public_model_is_confirmed(
    server: HubServer, trained: Trained, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("export", trained.run, tmp_path / "out", "--push", NAME, "--public")
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    code, _, err = run(*words)
    assert code == 2
    assert f"{NAME} would be there for all to see, and there is no terminal to ask in; pass --yes" in err
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr(builtins, "input", lambda _: "n")
    assert "--public: not confirmed; nothing was exported" in run(*words)[2]
    assert not (tmp_path / "out").exists()
    assert not server.requests
    monkeypatch.setattr(builtins, "input", lambda _: "yes")
    code, out, err = run(*words)
    assert code == 0, err
    assert "(public)" in out
    assert "license     unknown" in out
    assert not server.repositories[NAME].private
    # It is public now, which a push without --public does not count on.
    code, _, err = run(*words[:-1], "--overwrite")
    assert code == 2
    assert f"--push {NAME}: is public, so that all would see this model; pass --public" in err
    assert run(*words, "--yes", "--overwrite")[0] == 0


def test_a_private_model_is_pushed_again_and_stays_so(
    server: HubServer, trained: Trained, tmp_path: Path, run: Run
) -> None:
    words = ("export", trained.run, tmp_path / "out", "--push", NAME)
    assert run(*words)[0] == 0
    assert run(*words, "--overwrite")[0] == 0
    assert server.repositories[NAME].private
    assert len(server.repositories[NAME].commits) == 3  # made, and pushed twice
    assert f"--push {NAME}: is private, and --public was given" in run(*words, "--overwrite", "--public", "--yes")[2]


def test_what_cannot_be_pushed_is_one_message_before_the_export(
    server: HubServer, trained: Trained, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"

    def refused(*words: str, push: tuple[str, ...] = ("--push", NAME)) -> str:
        code, _, err = run("export", trained.run, target, *push, *words)
        assert code == 2
        assert not target.exists()
        return err

    assert "--public is for --push OWNER/NAME" in refused("--public", push=())
    assert "--push a-model: no name of a model; write OWNER/NAME" in refused(push=("--push", "a-model"))
    assert "no short name of a license" in refused("--license", "Apache License 2.0")
    with monkeypatch.context() as other:
        other.setenv("HF_TOKEN", "hf_wrong")
        assert f"--push {NAME}: HTTP 401: the token may not write there" in refused()
        other.delenv("HF_TOKEN")
        assert f"--push {NAME}: no token for the Hub; log in with `hf auth login`" in refused()
    with monkeypatch.context() as offline:
        offline.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        assert "HF_HUB_OFFLINE=1 forbids the Hub" in refused()
    server.add_fault("*whoami*", status=503, times=math.inf)
    assert "try again when the network and the Hub are up" in refused()


def test_a_refusal_after_the_export_leaves_the_folder_and_says_so(
    server: HubServer, trained: Trained, tmp_path: Path, run: Run
) -> None:
    target = tmp_path / "out"
    code, _, err = run("export", trained.run, target, "--push", "others/a-model")
    assert code == 2
    assert "--push others/a-model: HTTP 403: the token may not write there" in err
    assert f"{target} is written; once this is corrected, add --overwrite" in err
    assert (target / "model.safetensors").is_file()


def test_a_folder_with_a_path_of_the_machine_is_not_pushed(
    server: HubServer, trained: Trained, tmp_path: Path, run: Run
) -> None:
    source = tmp_path / "run"
    shutil.copytree(trained.run, source, symlinks=True)
    environment = json.loads((source / "environment.json").read_text())
    environment["python"] = str(source)
    (source / "environment.json").write_text(json.dumps(environment))
    code, _, err = run("export", source, tmp_path / "out", "--push", NAME)
    assert code == 2
    assert f"README.md: names {source}, a path of this machine" in err
    assert NAME not in server.repositories
