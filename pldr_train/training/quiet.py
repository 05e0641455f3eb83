"""Keeps the libraries' chatter off the terminal; warnings about this program's own use of them included."""

from __future__ import annotations

import logging
import os
import sys
import warnings

from huggingface_hub.utils import disable_progress_bars


def quiet_libraries() -> None:
    """Show errors of the libraries only; call before a trainer is built."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    disable_progress_bars()  # transformers reads this when it is imported, which takes a second
    if "transformers" in sys.modules:
        sys.modules["transformers"].utils.logging.disable_progress_bar()
    os.environ.setdefault("WANDB_SILENT", "true")
    for name in ("lightning", "lightning.pytorch", "lightning.fabric", "transformers", "datasets", "torch", "wandb"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for module in ("lightning", "torch", "torchmetrics", "transformers", "wandb", "pydantic"):
        warnings.filterwarnings("ignore", module=rf"{module}(\.|$)")
