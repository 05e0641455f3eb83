"""Imported by the server of processes before it forks: what a run imports on the way, so that it is imported once.

Nothing here computes, starts a thread or looks for a GPU, so a process forked afterwards is as good as a fresh one.
"""

from __future__ import annotations

import functools
import gc
import importlib
import os
from contextlib import suppress
from pathlib import Path

import pyarrow as pa

from pldr_train.commands import COMMANDS
from pldr_train.runs.notes import environment

_PROGRAM = (
    "pldr_train.cli",
    "pldr_train.fit",
    "pldr_train.plan",
    "pyarrow.compute",
    *(f"pldr_train.commands.{each.module}" for each in COMMANDS.values()),
    "pldr_train.commands.sweep_actions",
    "pldr_train.sweeps.runner",
    "pldr_train.training.wandb_mirror",
)
_LATE = (
    "torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook",
    "torch.profiler._cupti_monitor",
    "torch.utils.serialization.config",
)
_LATE_OF_DEEPSPEED = (
    "deepspeed",
    "deepspeed.ops.op_builder.all_ops",
    "deepspeed.runtime.zero.stage3",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "lightning.pytorch.strategies.deepspeed",
    "torch._inductor.compile_fx",
    "setuptools._distutils.ccompiler",
)


def _import(names: tuple[str, ...]) -> None:
    for name in names:
        with suppress(ImportError):  # other versions have other modules
            importlib.import_module(name)


gc.disable()  # imports leave next to no garbage, and looking for it takes a fifth of their time
for name in _PROGRAM:
    importlib.import_module(name)
pa.array([1])  # imports pandas where it is installed
environment()  # is kept; each run would ask git and read the packages' metadata
_import(_LATE)
if not Path("/dev/nvidiactl").exists():  # DeepSpeed chooses its accelerator when it is imported
    os.environ["DS_ACCELERATOR"] = "cpu"
    _import(_LATE_OF_DEEPSPEED)
    import deepspeed
    from deepspeed.utils import numa

    # Each process would ask a compiler what can be built here, and at each step a command for the processor's cores.
    _ = deepspeed.ops.__compatible_ops__
    numa.get_numa_cores = functools.cache(numa.get_numa_cores)
# Forked processes need not look through all of this for garbage, which also copies the memory that they share.
gc.freeze()
gc.enable()
