"""A checkpoint's state file: everything but weights and moments, as tensors and plain types."""

from __future__ import annotations

import io
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pldr_train.checkpoint.torch_files import DamagedFileError, ForbiddenContentError, read_torch_file
from pldr_train.errors import CheckpointError, first_line

STATE_KEY = "pldr_train"
"""The entry of ours among Lightning's."""
STATE_FORMAT = 3


def state_bytes(state: Any) -> bytes:
    """Return a state file's content: the state as it is now."""
    content = io.BytesIO()
    torch.save(state, content)
    return content.getvalue()


def save_state(path: Path, state: Any) -> None:
    """Write a state file, or anything else of tensors and plain types.

    Raises:
        OSError: the file cannot be written.
    """
    with path.open("wb") as handle:
        try:
            torch.save(state, handle)
        except RuntimeError as error:
            # torch reports a write that failed (a full disk) as an error of its own.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


class UnsafeStateError(CheckpointError):
    """A state file holds more than tensors and plain types."""


def load_state(path: Path, map_location: Any = None) -> dict[str, Any]:
    """Read a checkpoint's state file; whatever is not a tensor or a plain type is refused, not executed.

    Raises:
        UnsafeStateError: the file holds code.
        CheckpointError: it is no state of ours.
    """
    try:
        state = read_torch_file(path, map_location)
    except ForbiddenContentError as error:
        raise UnsafeStateError(
            f"{path} is refused: it holds more than tensors and plain types ({error}). "
            "Nothing in it was executed; use a checkpoint that this program wrote"
        ) from error
    except (OSError, DamagedFileError) as error:
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {first_line(error)}") from error
    if not isinstance(state, dict) or STATE_KEY not in state:
        raise CheckpointError(f"{path} is no training checkpoint of pldr_train: it has no {STATE_KEY!r} entry")
    return state


def settle_loop_progress(checkpoint: dict[str, Any], step: int) -> None:
    """Make Lightning's saved loop counters say: `step` batches are done, the next one comes.

    Lightning's counters depend on the hook from which a checkpoint is taken, and some of these states run a
    validation twice or not at all on resume. One training batch is one optimizer step here and the data stream is
    endless, so one settled state serves all.
    """
    fit_loop = checkpoint["loops"]["fit_loop"]
    done = {"ready": step, "started": step, "processed": step, "completed": step}
    batches = fit_loop["epoch_loop.batch_progress"]
    batches["total"], batches["current"], batches["is_last_batch"] = dict(done), dict(done), False
    fit_loop["epoch_loop.state_dict"]["_batches_that_stepped"] = step
    stepped = {"ready": step, "completed": step}
    fit_loop["epoch_loop.manual_optimization.optim_step_progress"] = {"total": dict(stepped), "current": dict(stepped)}
    running = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
    fit_loop["epoch_progress"]["total"], fit_loop["epoch_progress"]["current"] = dict(running), dict(running)
    # A validation is never resumed in its midst: it is run again as a whole (see training/step_boundary.py).
    nothing = {"ready": 0, "started": 0, "processed": 0, "completed": 0}
    validation = fit_loop["epoch_loop.val_loop.batch_progress"]
    validation["total"], validation["current"], validation["is_last_batch"] = dict(nothing), dict(nothing), False


def random_state() -> dict[str, Any]:
    """Return the state of this process' random generators (Python, NumPy, torch on CPU and GPU), as tensors and plain
    types.
    """
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": {"version": version, "words": list(words), "gauss": gauss},
        "numpy": {
            "name": str(name),
            "keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Put this process' random generators into a state that `random_state` took."""
    python, numpy = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["words"]), python["gauss"]))
    np.random.set_state((
        numpy["name"],
        numpy["keys"].numpy().astype(np.uint32),
        numpy["position"],
        numpy["has_gauss"],
        numpy["cached"],
    ))  # fmt: skip
    torch.set_rng_state(_on_cpu(state["torch"]))
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([_on_cpu(one) for one in state["cuda"]])


def _on_cpu(state: Tensor) -> Tensor:
    return state.cpu().to(torch.uint8)
