"""Steps whose loss or gradient was not finite: what was done about them, and with which rows.

The list is part of the run's state: it is saved with it, goes back with it on a resume, and stands in
`nonfinite.json` for the user.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pldr_train.errors import RecipeError

RAISE, SKIP, ROLLBACK = "raise", "skip", "rollback"


@dataclass(frozen=True)
class NonFiniteStep:
    """One such step."""

    step: int
    """The optimizer step, counted from 1."""
    action: str
    """skip: its update was left out; rollback: the run went back to `resumed_from`; raise: the run stopped."""
    rows: tuple[int, int]
    """[start, stop) of the numbers of the rows of its global batch."""
    batch_digest: str
    """As `data/batch_digest`."""
    resumed_from: int | None = None


class RollbackRequestedError(Exception):
    """The run goes back to its newest checkpoint and on from there with the documents after the bad step's."""

    def __init__(self, record: NonFiniteRecord, lanes: dict[str, Any]) -> None:
        super().__init__(f"rollback after step {record.events[-1].step}")
        self.record = record
        self.lanes = lanes
        """State of the lanes after the bad step."""


class NonFiniteRecord:
    """All non-finite steps of a run so far.

    Args:
        most_in_a_row: trainer.max_nonfinite_steps; the run ends at one more in a row.
    """

    def __init__(self, most_in_a_row: int) -> None:
        self.events: list[NonFiniteStep] = []
        self._most, self._in_a_row = most_in_a_row, 0

    def good_step(self) -> None:
        """A step was taken."""
        self._in_a_row = 0

    def add(self, event: NonFiniteStep) -> None:
        """Note another one.

        Raises:
            RecipeError: the run is to stop at the first, or there were too many in a row.
        """
        self.events.append(event)
        self._in_a_row += 1
        if event.action == RAISE:
            raise RecipeError(_text(event))
        if self._in_a_row > self._most:
            raise RecipeError(
                f"{_text(event)}\nIt is number {self._in_a_row} in a row, more than trainer.max_nonfinite_steps="
                f"{self._most}"
            )

    def state_dict(self) -> dict[str, Any]:
        """Plain types for a checkpoint."""
        return {"events": [asdict(event) for event in self.events], "in_a_row": self._in_a_row}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.events = [NonFiniteStep(**{**each, "rows": tuple(each["rows"])}) for each in state["events"]]
        self._in_a_row = state["in_a_row"]

    def as_plain(self) -> Sequence[Mapping[str, Any]]:
        """Return the list for `nonfinite.json`."""
        return [asdict(event) for event in self.events]


def _text(event: NonFiniteStep) -> str:
    first, stop = event.rows
    return (
        f"step {event.step}: the loss or its gradient is NaN or infinite (rows [{first:,}, {stop:,}), batch digest "
        f"{event.batch_digest}). The last checkpoint from before is kept; resume from it with a lower optim.lr, a "
        "longer optim.warmup_steps, precision fp32, or trainer.on_nonfinite=skip or rollback"
    )


def check_finite(values: Mapping[str, float], step: int) -> None:
    """Stop a run whose loss is no number any more, before it overwrites its good checkpoints.

    Raises:
        RecipeError: a value of `values` is NaN or infinite.
    """
    broken = {name: value for name, value in values.items() if not math.isfinite(value)}
    if broken:
        listing = ", ".join(f"{name}={value}" for name, value in broken.items())
        raise RecipeError(
            f"step {step}: {listing}. The last checkpoint from before is kept; resume from it with a lower optim.lr, "
            "a longer optim.warmup_steps, or precision fp32"
        )
