"""One runner of a sweep against two that share it, each with a trial at a time and one thread a trial.

Both sides run the same trials as `pldr-train sweep run SPEC --workers 1` does, in folders of their own, one after the
other; corpus and tokenizer are prepared before. Bar: two take at most 0.65 of the time of one, and no trial runs twice.

    python benchmarks/bench_sweep_runners.py [--trials 8] [--steps 150] [--repeats 1] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pldr_train.recipe.yaml_text import to_yaml
from pldr_train.sweeps import Sweep

ROOT = Path(__file__).resolve().parent.parent
BAR = 0.65


def write_spec(folder: Path, name: str, trials: int, steps: int) -> Path:
    """Write a sweep of `trials` learning rates over the row study's recipe."""
    spec: dict[str, Any] = {
        "name": name,
        "recipe": "row-study-cpu",
        "set": {
            "run.dir": str(folder / "runs"),
            "data.cache_dir": str(folder / "data"),
            "data.num_workers": 0,
            "trainer.max_steps": steps,
            "trainer.threads": 1,
            "trainer.validate_every_steps": steps,
            "trainer.validation_rows": 64,
            "optim.warmup_steps": 10,
            "monitor.snapshots": 0,
            "sample.prompts": [],
        },
        "axes": {"optim.lr": [round(1e-4 * (1 + place), 6) for place in range(trials)]},
        "seeds": [1],
    }
    path = folder / f"{name}.yaml"
    path.write_text(to_yaml(spec))
    return path


def run(spec: Path, runners: int) -> float:
    """Return the seconds until all runners have ended."""
    command = [sys.executable, "-m", "pldr_train", "sweep", "run", str(spec), "--workers", "1"]
    variables = {**os.environ, "WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    start = time.perf_counter()
    processes = [
        subprocess.Popen(command, env=variables, stdout=subprocess.DEVNULL, cwd=spec.parent) for _ in range(runners)
    ]
    codes = [process.wait() for process in processes]
    taken_s = time.perf_counter() - start
    trials = Sweep(spec).trials
    if any(codes) or any(trial.state != "done" or trial.record.starts != 1 for trial in trials):
        raise SystemExit(f"{spec}: codes {codes}, {trials}")
    return taken_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    times: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run(write_spec(folder, "prepare", 1, 20), 1)
        for repeat in range(options.repeats):
            for runners, taken_s in times.items():
                spec = write_spec(folder, f"runners-{runners}-{repeat}", options.trials, options.steps)
                taken_s.append(run(spec, runners))
                print(f"{runners} runners: {taken_s[-1]:.1f} s", flush=True)
    one, two = (statistics.median(each) for each in times.values())
    print(
        f"\n{options.trials} trials of {options.steps} steps: {one:.1f} s and {two:.1f} s, ratio {two / one:.2f}, ",
        end="",
    )
    print(f"bar {BAR}: {'reached' if two / one <= BAR else 'missed'}")
    if options.json is not None:
        options.json.write_text(json.dumps({"one_s": times[1], "two_s": times[2], "ratio": two / one}, indent=1) + "\n")


if __name__ == "__main__":
    main()
