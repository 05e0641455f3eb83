"""Sweeps: many runs of one recipe that differ along axes. Nothing here imports torch.

`spec` has the file's keys and its checks, `axes` the cells and their names, `records` what lies in a trial's folder,
`sweep` the object `Sweep` that reads all of it, `study` Optuna's part, `runner` the processes.
"""

from pldr_train.sweeps.sweep import Cell, Sweep, Trial

__all__ = ["Cell", "Sweep", "Trial"]
