"""What a run does about a step whose loss or gradient is not finite: `trainer.on_nonfinite`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pldr_train.data.datamodule import PldrDataModule
from pldr_train.data.rows.packing import batch_digest
from pldr_train.distributed.world import World
from pldr_train.errors import RecipeError
from pldr_train.recipe import Recipe
from pldr_train.runs.folder import RunFolder
from pldr_train.runs.nonfinite import RAISE, ROLLBACK, NonFiniteRecord, NonFiniteStep, RollbackRequestedError
from pldr_train.training.saving import merge_lanes

_log = logging.getLogger(__name__)

MOST_UNREAD_STEPS = 100
"""Steps whose norms may wait to be read: so many steps a run goes on with NaN at most, and so many batches are kept."""


class NonFinitePolicy:
    """Find steps whose gradient was not finite, and end the run, leave them out or go back, as the recipe says.

    All ranks see the same norms, so they decide alike.

    Args:
        recipe: resolved.
        folder: the run's; rank 0 writes the list there.
        world: the processes.
        record: the list, which is part of every checkpoint.
        publish: waits for the checkpoint that is being written, and calls `saved`.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: RunFolder,
        world: World,
        record: NonFiniteRecord,
        publish: Callable[[], None] = lambda: None,
    ) -> None:
        self._recipe, self._folder, self._world, self._record = recipe, folder, world, record
        self._publish = publish
        self._policy = recipe.trainer.on_nonfinite
        self._pending: list[tuple[int, Tensor, dict[str, Any]]] = []
        """Steps whose norm was not read yet: (step, norm, batch)."""
        self._newest_saved = 0

    def note(self, step: int, norm: Tensor, batch: dict[str, Any]) -> None:
        """Add a step to those that `check` looks at."""
        self._pending.append((step, norm, batch))

    def check(self, datamodule: PldrDataModule, at_once: bool) -> None:
        """Look at the norms of the steps noted so far.

        To read norms the host waits for the device. With `raise` they are left until `at_once`, or until they are
        `MOST_UNREAD_STEPS`. The other policies read each at once.

        Raises:
            RecipeError: the run ends here: there was one with `raise`, or there were too many in a row.
            RollbackRequestedError: the run goes back to its newest checkpoint.
        """
        unread = len(self._pending)
        if unread == 0 or (self._policy == RAISE and not at_once and unread < MOST_UNREAD_STEPS):
            return
        pending, self._pending = self._pending, []
        finite = torch.stack([norm for _, norm, _ in pending]).isfinite().tolist()
        for (step, _, batch), good in zip(pending, finite, strict=True):
            if not good:
                self._act(step, batch, datamodule)
            elif self._policy != ROLLBACK:  # to go back to the same checkpoint again and again is no progress
                self._record.good_step()

    def saves(self, step: int) -> None:
        """Count the steps up to a new checkpoint as good, for they are in it; before it is written."""
        if step > self._newest_saved:
            self._record.good_step()

    def saved(self, step: int) -> None:
        """Note that the checkpoint is there to go back to."""
        self._newest_saved = step

    def starts_at(self, step: int) -> None:
        """Note the step of the checkpoint that the run starts from, and write the list that came with it."""
        self._newest_saved = step
        self._write()

    def _act(self, step: int, batch: dict[str, Any], datamodule: PldrDataModule) -> None:
        self._publish()  # the run may end here, or go back to it
        numbers, rows = global_rows(batch, self._world)
        back_to = self._newest_saved if self._policy == ROLLBACK else None
        event = NonFiniteStep(step, self._policy, (int(numbers[0]), int(numbers[-1]) + 1), batch_digest(rows), back_to)
        try:
            self._record.add(event)
        except RecipeError as error:
            self._write()
            self._world.raise_on_all(error)
        self._write()
        what = "its update is left out" if self._policy != ROLLBACK else f"the run goes back to step {back_to:,}"
        if self._world.is_main:
            _log.warning(f"step {step:,}: the loss or its gradient is not finite; {what}")
        if self._policy == ROLLBACK:
            merge_lanes(datamodule, self._world)
            raise RollbackRequestedError(self._record, datamodule.lane_state.state_dict())

    def _write(self) -> None:
        if self._world.is_main:
            self._folder.write_nonfinite(self._record.as_plain())


def global_rows(batch: dict[str, Any], world: World) -> tuple[Tensor, Tensor]:
    """Return numbers (B,) and tokens (B, S + 1) of the global batch's rows, in their order."""
    share = torch.cat((batch["cursors"][:, :1].cpu(), batch["input_ids"].cpu()), dim=1)
    rows = torch.cat(world.gather_tensors(share))
    rows = rows[rows[:, 0].argsort()]
    return rows[:, 0], rows[:, 1:]
