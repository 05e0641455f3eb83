"""A run's folder as a run writes it, made by hand, for the tests of what is shown of it on W&B."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pldr_train.recipe import dump_recipe, recipe_from_dict
from tests.tiny import tiny_values

LAYERS, HEADS, WIDTH = 2, 3, 8
TOKENS_PER_STEP = 4 * 32


def write_run(folder: Path, lines: list[dict[str, Any]] | None = None, **sections: dict[str, Any]) -> Path:
    """A run in `folder`/tiny: recipe, environment and metrics; steps 0 to 6 if no lines are given."""
    run = folder / "tiny"
    run.mkdir(parents=True)
    recipe = recipe_from_dict(tiny_values(folder, folder, **sections)).resolved()
    (run / "recipe.yaml").write_text(dump_recipe(recipe))
    (run / "environment.json").write_text(json.dumps({"python": "3.11", "packages": {"torch": "2"}}))
    write_lines(run, [line_of(step) for step in range(7)] if lines is None else lines)
    return run


def line_of(step: int, **values: Any) -> dict[str, Any]:
    """A line of metrics: training's, without the first step's, validation's every third step."""
    line: dict[str, Any] = {"step": step}
    if step:
        line |= {"train/loss": 7.0 / step, "train/accuracy": 0.1 * step, "tokens": step * TOKENS_PER_STEP}
        line |= {"data/batch_digest": f"{step:032x}", "train/lr": 1e-3, "train/dag/layer_0/A_LM": 0.5}
    if step % 3 == 0:
        line |= {"val/loss": 6.0 - step, "leakage/gap": 0.01, "deductive/G_LM/rank": 8.0}
    return line | values


def write_lines(run: Path, lines: list[dict[str, Any]]) -> None:
    """Write the metrics anew."""
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_snapshot(run: Path, step: int, names: tuple[str, ...] = ("A", "A_LM", "A_P", "G_LM")) -> Path:
    """A snapshot of a step."""
    path = run / "snapshots" / f"step-{step:08d}.safetensors"
    path.parent.mkdir(exist_ok=True)
    tensors = {
        f"layer_{layer}/{name}": torch.randn(HEADS, WIDTH, WIDTH) + step for layer in range(LAYERS) for name in names
    }
    save_file(tensors, path, metadata={"format": "1", "step": str(step)})
    return path


def write_samples(run: Path, steps: tuple[int, ...], prompts: tuple[str, ...] = ("The",)) -> None:
    """Samples of several steps."""
    lines = [{"step": step, "prompt": each, "text": f"{each} text of {step}"} for step in steps for each in prompts]
    (run / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_checkpoint(run: Path, step: int) -> Path:
    """A folder that looks like a checkpoint, with the link `last` to it."""
    folder = run / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "weights-00000.safetensors").write_bytes(b"w" * 1000)
    (folder / "state.pt").write_bytes(b"s" * 500)
    files = {
        each.name: {"bytes": each.stat().st_size, "sha256": hashlib.sha256(each.read_bytes()).hexdigest()}
        for each in folder.iterdir()
    }
    (folder / "manifest.json").write_text(json.dumps({"format": 2, "step": step, "files": files, "info": {}}))
    link = run / "checkpoints" / "last"
    link.unlink(missing_ok=True)
    link.symlink_to(folder.name)
    return folder


def isolate_wandb(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """No key, nothing of this machine's settings, and W&B's own files below `folder`."""
    for name in [name for name in os.environ if name.startswith("WANDB_") and name != "WANDB_SERVICE"]:
        monkeypatch.delenv(name)
    home = folder / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    for name in ("DATA", "CACHE", "CONFIG"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(home))
    monkeypatch.setenv("WANDB_SILENT", "true")
