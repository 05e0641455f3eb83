"""The command as a user meets it: a real process, its output and its exit code."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from ruamel.yaml import YAML

from pldr_train import __version__
from pldr_train.checkpoint.manifest import manifest_text
from pldr_train.cli import main
from pldr_train.commands.fit import next_experiment
from pldr_train.recipe import load_recipe, recipe_keys, recipe_to_dict
from pldr_train.recipe.schema import entry_keys
from tests.processes import HOSTILE, ROOT, run_cli
from tests.tiny import metric_lines, tiny_values, write_corpus

RECIPES = ROOT / "recipes"


def assert_user_error(result: subprocess.CompletedProcess[str], *parts: str) -> None:
    """One message on stderr that holds the parts, exit code 2, no traceback."""
    assert result.returncode == 2, result.stderr + result.stdout
    assert "Traceback" not in result.stderr + result.stdout
    for part in parts:
        assert part in result.stderr, result.stderr
    assert result.stderr.count("error:") == 1


def write_recipe(path: Path, values: dict[str, Any]) -> Path:
    with path.open("w") as handle:
        YAML(typ="safe").dump(values, handle)
    return path


@pytest.fixture
def recipe(tiny_data: Path, tmp_path: Path) -> Path:
    return write_recipe(tmp_path / "tiny.yaml", tiny_values(tiny_data, tmp_path / "runs"))


def test_print_recipe_prints_one_that_loads_back(tmp_path: Path) -> None:
    result = run_cli("fit", RECIPES / "soc-110m-2.yaml", "optim.lr=5e-4", "--print-recipe")
    assert result.returncode == 0, result.stderr
    printed = tmp_path / "printed.yaml"
    printed.write_text(result.stdout)
    assert load_recipe(printed) == load_recipe(RECIPES / "soc-110m-2.yaml", ["optim.lr=5e-4"]).resolved()


@pytest.mark.parametrize("name", ["soc-110m-2", "v51-dag-110m"])
def test_dry_run_says_what_the_papers_run_takes(name: str, tmp_path: Path) -> None:
    result = run_cli("fit", RECIPES / f"{name}.yaml", "--dry-run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for fact in ("109,689,362", "32,768", "250,000 (8.19 B tokens)", "FLOPs per token", "memory estimate"):
        assert fact in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_schema_is_json_schema_of_recipes() -> None:
    schema = json.loads(run_cli("schema").stdout)
    assert {"run", "model", "dag", "data", "optim", "trainer"} <= schema["properties"].keys()


def test_a_run_trains_then_says_it_is_complete_then_trains_on(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "tiny"
    first = run_cli("fit", recipe, "logging.progress=true", "logging.every_steps=4")
    assert first.returncode == 0, first.stderr
    assert first.stderr == ""
    assert "step     24/24" in first.stdout
    assert "validation at step 0" in first.stdout
    assert "sample: the metric" in first.stdout
    for place in (run, run / "checkpoints" / "last", run / "metrics.jsonl"):
        assert str(place) in first.stdout
        assert place.exists()
    lines = metric_lines(run)
    expected = {
        "train/loss", "train/cross_entropy", "train/accuracy", "train/dag/A_LM", "train/dag/A_P", "train/dag/G_LM",
        "val/loss", "val/cross_entropy", "val/accuracy", "train/lr", "tokens", "data/batch_digest",
    }  # fmt: skip
    assert expected <= lines[-1].keys()
    assert lines[-1]["tokens"] == 24 * 4 * 32
    assert load_recipe(run / "recipe.yaml").run.name == "tiny"

    again = run_cli("fit", recipe)
    assert again.returncode == 0
    assert "complete (step 24 of 24)" in again.stdout
    assert metric_lines(run) == lines

    further = run_cli("fit", recipe, "trainer.max_steps=30")
    assert further.returncode == 0, further.stderr
    assert [line["step"] for line in metric_lines(run)][-1] == 30


def test_resume_refuses_another_recipe_unless_forced_and_never_keeps_the_old_run(recipe: Path, tmp_path: Path) -> None:
    assert run_cli("fit", recipe, "trainer.max_steps=5").returncode == 0
    assert_user_error(
        run_cli("fit", recipe, "optim.lr=1e-3"), "optim.lr", "0.002", "0.001", "--force", "--resume never"
    )
    assert run_cli("fit", recipe, "optim.lr=1e-3", "trainer.max_steps=6", "--force").returncode == 0
    result = run_cli("fit", recipe, "trainer.max_steps=5", "--resume", "never")
    assert result.returncode == 0
    kept = list((tmp_path / "runs").glob("tiny.before-*"))
    assert len(kept) == 1
    assert str(kept[0]) in result.stdout
    assert [line["step"] for line in metric_lines(kept[0])][-1] == 6
    assert [line["step"] for line in metric_lines(tmp_path / "runs" / "tiny")][-1] == 5


@pytest.mark.parametrize("devices", [1, 2])
def test_another_recipe_is_refused_before_anything_heavy_is_imported(
    recipe: Path, tmp_path: Path, devices: int
) -> None:
    saved = recipe_to_dict(load_recipe(recipe).resolved())
    folder = tmp_path / "runs" / "tiny" / "checkpoints" / "step-00000005"
    folder.mkdir(parents=True)
    files = {"state.pt": {"bytes": 1, "sha256": "0" * 64}}
    (folder / "manifest.json").write_text(manifest_text(5, files, {"recipe": saved}))
    arguments = ["fit", str(recipe), "optim.lr=1e-3", f"trainer.devices={devices}", "data.num_workers=0"]
    program = (
        "import sys; from pldr_train.cli import main\n"
        f"print(main({arguments!r}), [name for name in ('torch', 'lightning', 'transformers') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout == "2 []\n"
    assert f"the recipe differs from that of {folder}:\n  optim.lr=0.001: the saved run has 0.002" in result.stderr


def test_resume_from_a_named_checkpoint_sets_newer_ones_aside(recipe: Path, tmp_path: Path) -> None:
    assert run_cli("fit", recipe, "trainer.max_steps=12").returncode == 0
    run = tmp_path / "runs" / "tiny"
    before = metric_lines(run)
    named = run / "checkpoints" / "step-00000010"
    result = run_cli("fit", recipe, "trainer.max_steps=12", "--resume", named)
    assert result.returncode == 0, result.stderr
    assert "superseded-step-00000012" in result.stdout
    assert "resuming after step 10" in result.stdout
    assert metric_lines(run) == before


def test_resume_from_nothing_is_an_error(recipe: Path, tmp_path: Path) -> None:
    assert_user_error(run_cli("fit", recipe, "--resume", tmp_path / "nowhere"), "nowhere", "no checkpoint there")


def test_a_malicious_checkpoint_stops_the_resume(recipe: Path, tmp_path: Path) -> None:
    assert run_cli("fit", recipe, "trainer.max_steps=5").returncode == 0
    proof = tmp_path / "executed"

    class Malicious:
        def __reduce__(self) -> Any:
            return (os.system, (f"touch {proof}",))

    last = (tmp_path / "runs" / "tiny" / "checkpoints" / "last").resolve()
    torch.save({"pldr_train": Malicious()}, last / "state.pt")
    from pldr_train.checkpoint.manifest import describe_file

    manifest = json.loads((last / "manifest.json").read_text())
    manifest["files"]["state.pt"] = describe_file(last / "state.pt")
    del manifest["sha256"]
    (last / "manifest.json").write_text(json.dumps(manifest))
    assert_user_error(
        run_cli("fit", recipe, "trainer.max_steps=6"), "state.pt is refused", "Nothing in it was executed"
    )
    assert not proof.exists()


def test_a_run_in_use_is_not_touched(recipe: Path, tmp_path: Path) -> None:
    from pldr_train.runs.folder import RunFolder

    folder = RunFolder(tmp_path / "runs" / "tiny")
    folder.acquire()
    try:
        assert_user_error(run_cli("fit", recipe), "is in use by process", "run.name")
    finally:
        folder.release()


BAD_RECIPES = {
    "unknown key": (["optim.learning_rate=1e-3"], ["optim.learning_rate", "did you mean optim.lr"]),
    "wrong type": (["trainer.max_steps=many"], ["trainer.max_steps", "many"]),
    "sizes that do not fit": (["model.hidden_size=17"], ["model.hidden_size=17", "16"]),
    "batch that does not divide": (["trainer.micro_batch_size=3"], ["trainer.batch_size", "3"]),
    "missing tokenizer": (["data.tokenizer=nowhere.model"], ["data.tokenizer", "nowhere.model"]),
    "missing data": (["data.path=nowhere"], ["data.path", "nowhere"]),
    "missing column": (["data.text_column=body"], ["body", "content"]),
    "vocabulary smaller than the tokenizer's": (["model.vocab_size=300"], ["model.vocab_size=300", "320"]),
    "interval beyond the corpus": (["data.train_documents=[0, 9999]"], ["train_documents", "120"]),
    "missing external G": (
        [
            "model.custom_G_type=external",
            "model.custom_G_path=nowhere.safetensors",
            "dag.A_LM=0",
            "dag.A_P=0",
            "dag.G_LM=0",
        ],
        ["model.custom_G_path", "nowhere.safetensors"],
    ),
    "missing initial weights": (["model.init_from=nowhere"], ["model.init_from", "nowhere"]),
    "no such device": (["trainer.accelerator=cuda"], ["trainer.accelerator=cuda"]),
}


@pytest.mark.parametrize("case", BAD_RECIPES)
def test_a_mistake_in_the_recipe_is_one_clear_message(case: str, recipe: Path, tmp_path: Path) -> None:
    if case == "no such device" and torch.cuda.is_available():
        pytest.skip("this machine has one")
    overrides, parts = BAD_RECIPES[case]
    assert_user_error(run_cli("fit", recipe, *overrides), *parts)


def empty_corpus(folder: Path) -> None:
    pq.write_table(pa.table({"content": pa.array([], pa.string())}), folder / "part.parquet")


def truncated_corpus(folder: Path) -> None:
    write_corpus(folder)
    file = folder / "part-1.parquet"
    file.write_bytes(file.read_bytes()[:200])


def blank_corpus(folder: Path) -> None:
    pq.write_table(pa.table({"content": [""] * 50}), folder / "part.parquet")


BAD_DATA: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "empty": (empty_corpus, ["data.path"]),
    "truncated": (truncated_corpus, ["part-1.parquet"]),
    "blank": (blank_corpus, ["validation"]),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_unusable_documents_are_one_clear_message(case: str, recipe: Path, tmp_path: Path) -> None:
    make, parts = BAD_DATA[case]
    folder = tmp_path / "documents"
    folder.mkdir()
    make(folder)
    assert_user_error(run_cli("fit", recipe, f"data.path={folder}"), *parts)


def test_a_vocabulary_larger_than_the_corpus_allows_names_the_fix(tmp_path: Path) -> None:
    result = run_cli(
        "fit", RECIPES / "quickstart.yaml", f"run.dir={tmp_path}", "model.vocab_size=200000", "logging.wandb=disabled"
    )
    assert_user_error(result, "model.vocab_size=200000")


def test_a_full_disk_while_saving_loses_nothing(recipe: Path, tmp_path: Path) -> None:
    assert run_cli("fit", recipe, "trainer.max_steps=6", "monitor.deductive=false").returncode == 0
    # The metrics fit into 60 kB, a checkpoint does not.
    result = run_cli("fit", recipe, "monitor.deductive=false", file_size_limit=60_000)
    assert_user_error(result, "could not be written", "step-00000006", "Free some space")
    assert run_cli("fit", recipe).returncode == 0
    assert [line["step"] for line in metric_lines(tmp_path / "runs" / "tiny")] == list(range(25))


def test_the_installed_command_reports_a_missing_recipe() -> None:
    command = Path(sys.executable).with_name("pldr-train")
    result = subprocess.run([command, "fit", "nowhere.yaml"], capture_output=True, text=True, timeout=60, check=False)
    assert_user_error(result, "nowhere.yaml")


def test_files_of_the_working_directory_are_not_taken_for_modules(tmp_path: Path) -> None:
    # The folder that a checkout lies in has a plain folder named pldr_train, too.
    (tmp_path / "pldr_train").mkdir()
    (tmp_path / "pydantic.py").write_text(HOSTILE)
    version = [sys.executable, "-c", "import pldr_train; print(pldr_train.__version__)"]
    for command, expected in ((version, f"{__version__}\n"), ([sys.executable, "-m", "pldr_train", "schema"], "{\n")):
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
        assert result.returncode == 0, result.stderr
        assert result.stdout.startswith(expected)


@pytest.mark.slow
def test_the_quickstart_recipe_learns_english_from_nothing(tmp_path: Path) -> None:
    result = run_cli(
        "fit", RECIPES / "quickstart.yaml", "trainer.max_steps=30", "optim.warmup_steps=6",
        f"run.dir={tmp_path / 'runs'}", f"data.cache_dir={tmp_path / 'cache'}", "logging.wandb=offline",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    run = tmp_path / "runs" / "quickstart"
    losses = [line["val/loss"] for line in metric_lines(run) if "val/loss" in line]
    assert losses[-1] < 0.85 * losses[0]
    assert len((run / "samples.jsonl").read_text().splitlines()) == 3
    # It is told whether the model reads the future, and ends with a page that shows all of it.
    assert re.search(r"^validation at step 30: .* gap -?0\.\d{3} \[", result.stdout, re.MULTILINE)
    assert f"report      {run / 'report.html'}\n" in result.stdout
    assert "no leakage" in (run / "report.html").read_text()
    # W&B's mirror lies beside it, under the id that a resumed run keeps.
    run_id = json.loads((run / "wandb.json").read_text())["id"]
    (record,) = run.glob(f"wandb/offline-run-*-{run_id}/run-{run_id}.wandb")
    assert record.stat().st_size > 0


def test_help_and_unknown_commands() -> None:
    assert "fit" in run_cli("--help").stdout
    assert "key=value" in run_cli("fit", "--help").stdout
    assert run_cli("fly").returncode == 2


def said_by(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 2) -> str:
    assert main([str(each) for each in arguments]) == code
    captured = capsys.readouterr()
    return captured.err if code else captured.out


def test_without_a_command_there_is_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert "commands:\n  init " in said_by(capsys, code=0)


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["--lr", "1e-3"], "--lr: no such option; a recipe's keys are set without dashes: optim.lr=1e-3"),
        (
            ["--max-steps=5"],
            "--max-steps=5: no such option; a recipe's keys are set without dashes: trainer.max_steps=5",
        ),
        (["optim.lr=1", "--optim.lr"], "a recipe's keys are set without dashes: optim.lr=..."),
        (["optim.lr=1e-3", "optim.lr=2e-3"], "optim.lr=2e-3: set before, by optim.lr=1e-3; keep one of them"),
    ],
)
def test_a_key_written_as_an_option_or_twice_is_answered_with_the_right_way(
    capsys: pytest.CaptureFixture[str], words: list[str], answer: str
) -> None:
    for command in (["fit"], ["plan", "--gpus", "1"], ["doctor"]):
        assert answer in said_by(capsys, *command, RECIPES / "quickstart.yaml", *words)


def test_gpu_means_cuda(capsys: pytest.CaptureFixture[str]) -> None:
    printed = said_by(capsys, "fit", RECIPES / "quickstart.yaml", "trainer.accelerator=gpu", "--print-recipe", code=0)
    assert "accelerator: cuda\n" in printed


def test_a_dry_run_of_what_no_device_holds_fails_and_names_the_keys(capsys: pytest.CaptureFixture[str]) -> None:
    huge = ["model.num_attention_heads=1400", "model.vocab_size=320000"]
    text = said_by(capsys, "fit", RECIPES / "quickstart.yaml", *huge, "--dry-run")
    assert re.search(
        r"quickstart needs about 1,\d{3}\.\d GiB, and this machine has .*trainer.micro_batch_size=16", text
    )
    papers = ["model.num_attention_heads=1400", "--dry-run"]
    assert "has " in said_by(capsys, "fit", RECIPES / "soc-110m-2.yaml", *papers)
    # What several devices share is `pldr-train plan`'s to judge.
    shared = [*huge, "parallel.strategy=fsdp", "trainer.devices=16", "data.num_workers=0", "--dry-run"]
    assert "the devices share the model" in said_by(capsys, "fit", RECIPES / "quickstart.yaml", *shared, code=0)


def test_a_dry_run_needs_the_files_that_the_model_is_made_of(capsys: pytest.CaptureFixture[str]) -> None:
    external = ["model.custom_G_type=external", "model.custom_G_path=no.safetensors", "--dry-run"]
    text = said_by(capsys, "fit", RECIPES / "soc-110m-2.yaml", *external)
    assert "model.custom_G_path=no.safetensors: no such file; give a file with G" in text
    text = said_by(capsys, "fit", RECIPES / "soc-110m-2.yaml", "model.init_from=no", "--dry-run")
    assert "model.init_from=no: no such folder; name a run, a checkpoint or a model's folder" in text


def test_a_dry_run_says_where_the_initial_weights_come_from(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    paper = (RECIPES / "soc-110m-2.yaml", "--dry-run")
    assert re.search(r"initial weights +law hf_port\n", said_by(capsys, "fit", *paper, "model.init=hf_port", code=0))
    assert "initial weights" not in said_by(capsys, "fit", *paper, code=0)
    source = f"model.init_from={tmp_path}"
    shown = said_by(capsys, "fit", *paper, source, "model.init_from_only=power_law", "model.init=legacy", code=0)
    assert f"1,433,600 parameters (power_law) of {tmp_path}, the others by the law legacy" in shown
    assert re.search(rf"initial weights +{tmp_path}\n", said_by(capsys, "fit", *paper, source, code=0))
    text = said_by(capsys, "fit", *paper, source, "model.init_from_only=[body, bodies]")
    assert "model.init_from_only: 'bodies' matches no parameter of this recipe's model" in text


@pytest.mark.parametrize(
    ("overrides", "proposed"),
    [
        ([], "run.name=quickstart-no-dag dag.A_LM=0 dag.A_P=0 dag.G_LM=0"),
        (["dag.A_LM=0", "dag.A_P=0", "dag.G_LM=0", "run.name=quickstart-no-dag", "optim.lr=1e-3"],
         "optim.lr=1e-3 run.name=quickstart-dag dag.A_LM=0.005 dag.A_P=0.005 dag.G_LM=0.005"),
        (["dag.A_P_schedule=decay", "dag.A_P_steps=[0,9]", "dag.reduce=max", "dag.layer_factors=[1,0]"],
         "dag.reduce=max 'dag.layer_factors=[1,0]' run.name=quickstart-no-dag dag.A_LM=0 dag.A_P=0 dag.G_LM=0 "
         "dag.A_P_schedule=constant dag.A_P_steps=null"),
        (["dag.A_LM=0", "dag.A_P=0", "dag.G_LM=0", "model.custom_G_type=random", "model.random_distribution=normal"],
         "dag.A_LM=0 dag.A_P=0 dag.G_LM=0 run.name=quickstart-learned model.custom_G_type=learned "
         "model.random_distribution=uniform"),
    ],
)  # fmt: skip
def test_the_next_experiment_is_another_one_and_its_command_works(overrides: list[str], proposed: str) -> None:
    path = str(RECIPES / "quickstart.yaml")
    recipe = load_recipe(path, overrides)
    command = next_experiment(recipe, argparse.Namespace(recipe=path, overrides=overrides))
    assert command == f"pldr-train fit {path} {proposed}"
    after = load_recipe(path, shlex.split(command)[3:])
    assert (after.dag, after.model) != (recipe.dag, recipe.model)
    assert after.run.name != recipe.run.name


def test_every_key_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    page = said_by(capsys, "explain", "--markdown", code=0)
    assert page == (RECIPES.parent / "docs" / "recipe-keys.md").read_text(), "pldr-train explain --markdown writes it"
    rows = re.findall(r"^\| `([\w.\[\]]+)`.*? \| (.+) \| (.+) \| `(.+)` \|$", page, re.MULTILINE)
    assert [name for name, *_ in rows if name.count(".") == 1 and "[]" not in name] == recipe_keys()
    entries = {
        key: [name.rpartition(".")[2] for name, *_ in rows if name.startswith((f"{key}[].", f"{key}."))]
        for key in entry_keys()
    }
    assert entries == entry_keys()
    assert all(len(meaning) > 8 and values and default for _, meaning, values, default in rows)
    text = said_by(capsys, "explain", "lr", code=0)
    assert text.splitlines()[:3] == ["optim.lr", "  Peak learning rate.", "  values   number > 0 and <= 100"]
    assert "trainer.max_steps\n" in said_by(capsys, "explain", "trainer", code=0)
    assert "optim.rl: unknown key; did you mean optim.lr?" in said_by(capsys, "explain", "optim.rl")


def test_the_shell_completes_commands_options_and_keys(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    script = said_by(capsys, "completion", code=0)

    def completed(*words: str) -> set[str]:
        line = " ".join(map(shlex.quote, words))
        asked = f"COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _pldr_train"
        ask = f'{script}\n{asked}; printf "%s\\n" "${{COMPREPLY[@]}}"'
        result = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, cwd=tmp_path, check=True)
        return set(result.stdout.split())

    (tmp_path / "recipe.yaml").touch()
    assert completed("pldr-train", "ex") == {"export", "explain", "extract-g"}
    assert completed("pldr-train", "fit", "optim.w") == {"optim.weight_decay=", "optim.warmup_steps="}
    assert completed("pldr-train", "fit", "rec") == {"recipe.yaml"}
    assert completed("pldr-train", "fit", "r.yaml", "--re") == {"--resume"}
    assert completed("pldr-train", "data", "toke") == {"tokenize"}
    assert completed("pldr-train", "explain", "optim.l") == {"optim.lr"}
