"""Runs made up for the tests of the report: snapshots like a training run's, healthy, near-critical or damaged."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

SIGNED_AND_NOT = ("A", "A_LM", "A_P", "G_LM")


def matrices(heads: int, side: int, collapse: float, seed: int) -> dict[str, NDArray[np.float32]]:
    """A, A_LM, A_P and G_LM of a layer; the rows of A are alike up to `collapse` of their spread, 0 for equal rows."""
    chance = np.random.default_rng(seed)
    own, shared = chance.normal(size=(heads, side, side)), chance.normal(size=(heads, 1, side))
    metric = collapse * own + (1 - collapse) * shared
    positive = np.exp(metric)
    potential = positive ** chance.normal(size=(heads, side, side))
    curvature = potential * chance.normal(size=(heads, side, side)) * 0.1
    tensors = zip(SIGNED_AND_NOT, (metric, positive, potential, curvature), strict=True)
    return {name: values.astype(np.float32) for name, values in tensors}


def write_snapshot(run: Path, step: int, tensors: dict[str, NDArray[Any]]) -> Path:
    """As training writes it."""
    path = run / "snapshots" / f"step-{step:08d}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata={"format": "1", "step": str(step)})
    return path


def write_snapshots(run: Path, steps: Iterable[int], layers: int = 2, heads: int = 3, side: int = 16) -> None:
    """One for each step; the rows of A become alike from the first to the last."""
    steps = list(steps)
    for place, step in enumerate(steps):
        collapse = 1 - place / max(1, len(steps) - 1)
        write_snapshot(
            run,
            step,
            {
                f"layer_{layer}/{name}": values
                for layer in range(layers)
                for name, values in matrices(heads, side, collapse, seed=layer).items()
            },
        )


def write_metrics(run: Path, *lines: dict[str, Any] | str) -> Path:
    """The metrics.jsonl of a run; a text is a line as it is."""
    run.mkdir(parents=True, exist_ok=True)
    path = run / "metrics.jsonl"
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def validation(step: int, gap: Sequence[float] = (0.0, -0.01, 0.01), collapse: float = 0.9) -> dict[str, Any]:
    """A line with all that the health card reads; `gap` is the gap and its interval's ends."""
    values: dict[str, Any] = {"step": step, "train/loss": 3.0, "val/cross_entropy": 3.1, "train/nonfinite_steps": 0}
    values |= {"leakage/block_nll": 3.0, "leakage/sequential_nll": 3.0 + gap[0], "leakage/targets": 64}
    values |= dict(zip(("leakage/gap", "leakage/gap_low", "leakage/gap_high"), gap, strict=True))
    values |= {"deductive/A/row_map_collapse": collapse, "deductive/G_LM/input_sensitivity": collapse / 10}
    values |= {f"deductive/order_parameter/{name}/bounded": collapse / 5 for name in SIGNED_AND_NOT}
    return values
