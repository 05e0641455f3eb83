"""A run's folder as an object, for notebooks and scripts: recipe, metrics, samples, snapshots, checkpoints, model."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pldr_train.checkpoint.listing import Listed, find_place, list_checkpoints
from pldr_train.errors import CheckpointError, UserError
from pldr_train.metrics.catalog import VAL_LOSS
from pldr_train.model import PldrllmForCausalLM, PldrllmTokenizer
from pldr_train.models.loading import load_model
from pldr_train.recipe import Recipe, load_recipe
from pldr_train.runs.layout import (
    CHECKPOINTS_FOLDER,
    ENVIRONMENT_FILE,
    METRICS_FILE,
    RECIPE_FILE,
    SAMPLES_FILE,
    STOPPED_FILE,
    TOKENIZER_FILE,
    checkpoint_folders,
    folder_name,
    is_run,
    named_step,
    snapshot_files,
    why_no_run,
)
from pldr_train.runs.lines import Sample, read_samples
from pldr_train.runs.lock import is_held
from pldr_train.runs.metrics import Metrics, read_metrics
from pldr_train.runs.snapshots import Matrices, read_snapshot
from pldr_train.untrusted import read_json


class Run:
    """One run's folder, also while the run goes on: each attribute reads what the folder holds at that moment.

    Keep what is used several times: `metrics = run.metrics`.

    Args:
        folder: the run's folder, like runs/quickstart.

    Raises:
        UserError: the folder holds no run.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        if not (self.folder.is_dir() and is_run(self.folder)):
            raise UserError(why_no_run(self.folder))

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r})"

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.resolve().name

    @property
    def recipe(self) -> Recipe:
        """The resolved recipe of the last start. Raises RecipeError if it cannot be read."""
        return load_recipe(self.folder / RECIPE_FILE, notice=lambda _: None).resolved()

    @property
    def environment(self) -> dict[str, Any]:
        """Versions, commit and command of the last start. Raises UserError if they cannot be read."""
        found: dict[str, Any] = self._read(ENVIRONMENT_FILE)
        return found

    @property
    def is_running(self) -> bool:
        """Whether a process of this machine trains in the folder."""
        return is_held(self.folder)

    @property
    def stopped(self) -> str | None:
        """Why the last training ended before its last step; None of one that goes on, did them all, or was killed."""
        if not (self.folder / STOPPED_FILE).exists():
            return None
        return str(self._read(STOPPED_FILE)["text"])

    @property
    def metrics(self) -> Metrics:
        """All metrics as columns over steps; `.to_pandas()` gives a DataFrame."""
        try:
            return read_metrics(self.folder / METRICS_FILE)
        except OSError as error:
            raise UserError(f"{self.folder / METRICS_FILE}: cannot be read ({error.strerror})") from error

    @property
    def validations(self) -> Metrics:
        """The metrics of the steps that were validated."""
        return self.metrics.with_metric(VAL_LOSS)

    @property
    def samples(self) -> list[Sample]:
        """The texts sampled so far, in the order of steps; lines that are not whole are left out."""
        path = self.folder / SAMPLES_FILE
        if not os.path.lexists(path):
            return []
        try:
            return sorted(read_samples(path)[0], key=lambda sample: sample.step)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from error

    @property
    def snapshots(self) -> Snapshots:
        """The deductive outputs kept at validations: `run.snapshots[400]["G_LM"][0]` is (H, d, d) of layer 0."""
        return Snapshots(self.folder)

    @property
    def checkpoints(self) -> list[Listed]:
        """The checkpoints, newest first; of damaged ones `problem` says what is wrong with their files' sizes."""
        if not (self.folder / CHECKPOINTS_FOLDER).is_dir():
            return []
        return list_checkpoints(find_place(self.folder))

    def model(self, step: int | None = None) -> PldrllmForCausalLM:
        """Return the model of a checkpoint, in fp32 on the CPU, in eval mode.

        Args:
            step: of the checkpoint; None: the newest whole one.

        Raises:
            CheckpointError: there is no such checkpoint, or it is damaged.
        """
        root = self.folder / CHECKPOINTS_FOLDER
        found = [named_step(path.name) for path in checkpoint_folders(root)]
        if not found:
            raise CheckpointError(f"{self.folder}: the run has no checkpoint yet")
        if step is None:
            return load_model(self.folder)
        if step not in found:
            raise CheckpointError(f"{root}: no checkpoint of step {step:,}; there are {_listing(found)}")
        return load_model(root / folder_name(step))

    def tokenizer(self) -> PldrllmTokenizer:
        """Return the run's tokenizer for transformers. Raises CheckpointError if its file is gone."""
        path = self.folder / TOKENIZER_FILE
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file; copy the tokenizer that the run was trained with there")
        return PldrllmTokenizer(str(path))

    def _read(self, name: str) -> Any:
        try:
            return read_json(self.folder / name)
        except (OSError, ValueError) as error:
            raise UserError(f"{self.folder / name}: cannot be read ({error})") from error


class Snapshots(Mapping[int, dict[str, dict[int, Matrices]]]):
    """A run's snapshots by step; each is read when it is asked for: tensor -> layer -> (H, d, d) in fp32.

    Args:
        folder: the run's.
    """

    def __init__(self, folder: Path) -> None:
        self._files = dict(snapshot_files(folder))

    def __iter__(self) -> Iterator[int]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __contains__(self, step: object) -> bool:
        return step in self._files

    def __getitem__(self, step: int) -> dict[str, dict[int, Matrices]]:
        if step not in self._files:
            raise KeyError(f"no snapshot of step {step}; there are {_listing(self)}")
        try:
            return read_snapshot(self._files[step])
        except (OSError, ValueError) as error:
            raise UserError(f"{self._files[step]}: cannot be read ({error})") from error

    def __repr__(self) -> str:
        return f"Snapshots(steps {_listing(self)})"


def _listing(steps: Any) -> str:
    return ", ".join(f"{step:,}" for step in steps) or "none"
