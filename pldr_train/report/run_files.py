"""What lies in a run's folder, as plain values; a file that cannot be read is noted and the rest is shown."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from stat import S_ISREG
from typing import Any

from pldr_train.errors import UserError
from pldr_train.recipe.yaml_text import read_recipe_file
from pldr_train.runs.layout import (
    CHECKPOINTS_FOLDER,
    ENVIRONMENT_FILE,
    MANIFEST_FILE,
    METRICS_FILE,
    RECIPE_FILE,
    SAMPLES_FILE,
    STOPPED_FILE,
    checkpoint_folders,
    linked_last,
    named_step,
)
from pldr_train.runs.lines import read_samples

METRICS, RECIPE, ENVIRONMENT, CHECKPOINTS = METRICS_FILE, RECIPE_FILE, ENVIRONMENT_FILE, CHECKPOINTS_FOLDER
MOST_TEXT = 4000
"""Characters of one text."""
MOST_ENTRIES = 200
"""Of a list: samples, events, checkpoints."""
_MOST_BYTES = 20_000_000
_MOST_LINES_NAMED = 5


@dataclass
class RunFiles:
    """Everything but the metrics."""

    recipe: dict[str, str] = field(default_factory=dict)
    """Dotted key -> its value as text."""
    recipe_text: str = ""
    max_steps: int | None = None
    environment: dict[str, str] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    """`kind` nonfinite or unreadable, `text`, and for nonfinite `step`."""
    samples: list[dict[str, Any]] = field(default_factory=list)
    """`step`, `prompt`, `text`."""
    checkpoints: list[dict[str, Any]] = field(default_factory=list)
    """Newest first: `name`, `step`, `bytes`, `written_s`, `is_last`, `problem`."""
    stopped: str | None = None
    """Why the last training ended before its last step; None of one that goes on, is done, or was killed."""
    ended_early: bool = False
    """Whether the run came to its end by that."""
    notes: list[str] = field(default_factory=list)


def read_run_files(folder: Path) -> RunFiles:
    """Read all but the metrics."""
    files = RunFiles()
    readers: tuple[tuple[str, Callable[[Path, RunFiles], None]], ...] = (
        (RECIPE, _read_recipe),
        (ENVIRONMENT, _read_environment),
        ("nonfinite.json", _read_nonfinite),
        ("unreadable.json", _read_unreadable),
        (STOPPED_FILE, _read_stopped),
        (SAMPLES_FILE, _read_samples),
        (CHECKPOINTS, _read_checkpoints),
    )
    for name, read in readers:
        try:
            read(folder / name, files)
        except FileNotFoundError:
            if name in (RECIPE, ENVIRONMENT):
                files.notes.append(f"there is no {name}")
        except UserError as error:
            files.notes.append(str(error))
        except OSError as error:
            files.notes.append(f"{name} cannot be read ({error.strerror})")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            files.notes.append(f"{name} is not what a run writes ({type(error).__name__}: {error}); it is left out")
    return files


def shortened(text: Any, most: int = MOST_TEXT) -> str:
    """Return a text of bounded length."""
    text = text if isinstance(text, str) else json.dumps(text, ensure_ascii=False, default=str)
    return text if len(text) <= most else f"{text[:most]} ... ({len(text) - most:,} more characters)"


def flatten(values: Any, prefix: str = "") -> Iterable[tuple[str, str]]:
    """Yield (dotted key, value as text) of nested mappings."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", shortened(value, 1000)


def _text_of(path: Path) -> str:
    _check_size(path)
    return path.read_text(encoding="utf-8", errors="replace")


def _check_size(path: Path) -> None:
    status = path.stat()
    if not S_ISREG(status.st_mode):
        raise ValueError("not a regular file")
    if status.st_size > _MOST_BYTES:
        raise ValueError(f"{status.st_size:,} bytes; more than {_MOST_BYTES:,} are not read")


def _read_recipe(path: Path, files: RunFiles) -> None:
    files.recipe_text = shortened(_text_of(path), 100_000)
    files.recipe = dict(flatten(read_recipe_file(path)))
    try:
        files.max_steps = int(files.recipe["trainer.max_steps"])
    except (KeyError, ValueError):
        files.notes.append("recipe.yaml names no trainer.max_steps, so how far the run is cannot be said")


def _read_environment(path: Path, files: RunFiles) -> None:
    values = json.loads(_text_of(path))
    command = values.get("command")
    if isinstance(command, list):
        values["command"] = " ".join(map(str, command))
    packages = values.pop("packages", None)
    files.environment = dict(flatten(values)) | (dict(flatten(packages)) if isinstance(packages, dict) else {})


def _entries(path: Path) -> list[dict[str, Any]]:
    found = json.loads(_text_of(path))
    if not isinstance(found, list):
        raise ValueError("not a list")
    return [each for each in found if isinstance(each, dict)]


def _read_nonfinite(path: Path, files: RunFiles) -> None:
    for each in _take(_entries(path), path, files):
        rows, back = each.get("rows"), each.get("resumed_from")
        text = f"{each.get('action')}; rows {rows}, batch digest {each.get('batch_digest')}"
        files.events.append({
            "kind": "nonfinite",
            "step": whole(each.get("step")),
            "text": shortened(text if back is None else f"{text}; went back to step {back}"),
        })  # fmt: skip


def _read_unreadable(path: Path, files: RunFiles) -> None:
    for each in _take(_entries(path), path, files):
        start, stop = each.get("start"), each.get("stop")
        text = f"documents [{start}, {stop}) in {each.get('place')}: {each.get('reason')}"
        files.events.append({"kind": "unreadable", "step": None, "text": shortened(text)})


def _read_stopped(path: Path, files: RunFiles) -> None:
    values = json.loads(_text_of(path))
    text = values["text"]
    if not isinstance(text, str):
        raise ValueError("not a text")
    files.stopped, files.ended_early = shortened(text), values.get("finished") is True


def _read_samples(path: Path, files: RunFiles) -> None:
    _check_size(path)
    samples, bad = read_samples(path)
    if bad:
        named = ", ".join(f"{number:,}" for number in bad[:_MOST_LINES_NAMED])
        more = f" and {len(bad) - _MOST_LINES_NAMED:,} more" if len(bad) > _MOST_LINES_NAMED else ""
        files.notes.append(f"{SAMPLES_FILE}: line {named}{more} is no whole sample; left out")
    found = [{"step": each.step, "prompt": shortened(each.prompt), "text": shortened(each.text)} for each in samples]
    files.samples = _spread_samples(found, path, files)


def _spread_samples(samples: list[dict[str, Any]], path: Path, files: RunFiles) -> list[dict[str, Any]]:
    """Return where there are too many, those of evenly spread steps, the first and the last among them."""
    steps = list(dict.fromkeys(each["step"] for each in samples))
    if len(samples) <= MOST_ENTRIES or len(steps) < 2:
        return _take(samples, path, files)
    shown = max(2, int(len(steps) * MOST_ENTRIES / len(samples)))
    chosen = {steps[round(place * (len(steps) - 1) / (shown - 1))] for place in range(shown)}
    files.notes.append(
        f"{path.name}: {len(samples):,} entries; those of {len(chosen):,} of {len(steps):,} steps are shown"
    )
    return [each for each in samples if each["step"] in chosen][: 2 * MOST_ENTRIES]


def _read_checkpoints(folder: Path, files: RunFiles) -> None:
    found = checkpoint_folders(folder)
    linked = linked_last(folder)
    # Without the link, or with something else in its place, the newest is what commands take.
    last = linked.name if linked is not None else next((each.name for each in found), None)
    files.checkpoints = [_checkpoint(each, last) for each in _take(found, folder, files)]


def _checkpoint(folder: Path, last: str | None) -> dict[str, Any]:
    shown: dict[str, Any] = {"name": folder.name, "is_last": folder.name == last, "problem": None}
    shown |= {"step": named_step(folder.name), "bytes": None, "written_s": None}
    manifest = folder / MANIFEST_FILE
    try:
        sizes = {each.name: each.stat().st_size for each in folder.iterdir() if each.is_file()}
        shown["bytes"] = sum(sizes.values())
        shown["written_s"] = manifest.stat().st_mtime
        files = json.loads(_text_of(manifest))["files"]
        wrong = [name for name, expected in files.items() if sizes.get(name) != expected["bytes"]]
        if wrong:
            shown["problem"] = f"missing or of another size: {', '.join(map(str, wrong[:3]))}"
    except FileNotFoundError:
        shown["problem"] = "no manifest.json: it was not written to its end"
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        shown["problem"] = f"manifest.json cannot be read ({error})"
    return shown


def _take(entries: list[Any], path: Path, files: RunFiles) -> list[Any]:
    if len(entries) > MOST_ENTRIES:
        files.notes.append(f"{path.name}: {len(entries):,} entries; the first {MOST_ENTRIES} are shown")
    return entries[:MOST_ENTRIES]


def whole(value: Any) -> int | None:
    """Return a whole number, or None."""
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError):
        return None
