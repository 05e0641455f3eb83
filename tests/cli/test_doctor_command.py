"""`pldr-train doctor` as a user meets it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.processes import ROOT, run_cli
from tests.tiny import tiny_values

SECRETS = {"HF_TOKEN": "hf_s3cr3tOfTheHub", "WANDB_API_KEY": "s3cr3tOfWandb0123456789012345678901234567"}
PROGRAM = "import sys; from pldr_train.cli import main; sys.exit(main())"


def test_a_machine_is_looked_at_and_only_a_stale_lock_is_touched(tmp_path: Path) -> None:
    lock = tmp_path / "extensions" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (time.time() - 7200,) * 2)
    runs = tmp_path / "runs"
    runs.mkdir()
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, "doctor", "--json", "--fix", "--run-dir", str(runs)],
        env={
            **os.environ,
            **SECRETS,
            "HOME": str(tmp_path),
            "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"),
            "GLOO_SOCKET_IFNAME": "nosuch0",
        },
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    values = json.loads(result.stdout)
    found: dict[str, Any] = {each["name"]: each for each in values["findings"]}
    assert values["failed"] is False
    assert not [each for each in SECRETS.values() if each in result.stdout + result.stderr]
    assert found["hugging face"]["figures"]["token_in"] == "HF_TOKEN"
    assert found["wandb"]["figures"] == {"mode": "online", "key_in": "the variable WANDB_API_KEY"}
    assert found["build locks"]["figures"]["removed"] is True
    assert not lock.exists()
    assert found["all-reduce"]["level"] == "warn"  # no run was named that needs it
    assert "nosuch0" in found["all-reduce"]["text"]
    assert "GLOO_SOCKET_IFNAME=nosuch0 is set" in found["all-reduce"]["advice"]
    assert found["disk speed"]["figures"]["folder"] == str(runs)
    assert list(runs.iterdir()) == []
    page = (ROOT / "docs" / "doctor.md").read_text()
    assert not [name for name in found if f"| {name.split()[0] if name.startswith('gpu ') else name} |" not in page]


def test_what_would_stop_a_run_is_reported_first_and_is_exit_code_1(tiny_data: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(tiny_values(tiny_data, tmp_path / "runs")))
    result = run_cli("doctor", path, "data.tokenizer=no.model", "trainer.devices=2", file_size_limit=2**20)
    assert result.returncode == 1, result.stdout + result.stderr
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    failed = [line for line in lines if line.startswith("FAIL")]
    assert lines[:2] == failed
    assert "cannot be written" in failed[0]
    assert "data.tokenizer=no.model: no such file or folder" in failed[1]
    assert "set data.tokenizer to what is there" in result.stdout
    assert re.search(r"^ok +all-reduce +gloo, 2 processes: [0-9.]+ GB/s bus bandwidth", result.stdout, re.MULTILINE)
    assert "3 checkpoints of " in result.stdout
    assert not (tmp_path / "runs").exists()


MISTAKES = {
    "no such recipe": (["no.yaml"], ["no.yaml", "no such recipe file"]),
    "typo in the recipe": (["recipes/quickstart.yaml", "trainer.device=2"], ["trainer.device", "did you mean"]),
    "run folder is a file": (["--run-dir", "README.md"], ["--run-dir README.md: is a file; name a folder"]),
    "no processes": (["--processes", "0"], ["--processes", "0 must be from 1 to 64"]),
    "too many processes": (["--processes", "65"], ["--processes", "65 must be from 1 to 64"]),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_clear_message(case: str) -> None:
    arguments, parts_of_message = MISTAKES[case]
    result = run_cli("doctor", *arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.count("error:") == 1
    assert "Traceback" not in result.stderr
    for part in parts_of_message:
        assert part in result.stderr, result.stderr
