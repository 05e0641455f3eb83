"""The random states of a process, as a checkpoint keeps them."""

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
