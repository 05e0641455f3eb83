"""What a checkpoint holds beside weights and optimizer, so that a run goes on exactly where it stopped."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def random_state() -> dict[str, Any]:
    """State of this process' random generators (Python, NumPy, torch on CPU and GPU), as tensors and plain types."""
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
    # A validation is never resumed in its midst: it is run again as a whole (see callbacks.py).
    nothing = {"ready": 0, "started": 0, "processed": 0, "completed": 0}
    validation = fit_loop["epoch_loop.val_loop.batch_progress"]
    validation["total"], validation["current"], validation["is_last_batch"] = dict(nothing), dict(nothing), False
