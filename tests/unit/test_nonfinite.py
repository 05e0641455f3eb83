"""The record of steps that were not finite: what it bears, what it says, and that a checkpoint keeps it."""

from __future__ import annotations

import json

import pytest

from pldr_train.errors import RecipeError
from pldr_train.runs.nonfinite import NonFiniteRecord, NonFiniteStep, RollbackRequestedError


def event(step: int, action: str = "skip", resumed_from: int | None = None) -> NonFiniteStep:
    return NonFiniteStep(step, action, (4096 * (step - 1), 4096 * step), f"digest-{step}", resumed_from)


def test_the_first_ends_a_run_that_is_to_stop() -> None:
    record = NonFiniteRecord(most_in_a_row=100)
    with pytest.raises(RecipeError) as raised:
        record.add(event(12, "raise"))
    told = str(raised.value)
    assert told.startswith("step 12: the loss or its gradient is NaN or infinite (rows [45,056, 49,152), batch digest ")
    assert "digest-12" in told
    assert "optim.lr" in told
    assert "trainer.on_nonfinite=skip or rollback" in told
    assert "in a row" not in told
    assert record.events == [event(12, "raise")]


@pytest.mark.parametrize("action", ["skip", "rollback"])
def test_so_many_in_a_row_pass_and_one_more_ends_the_run(action: str) -> None:
    record = NonFiniteRecord(most_in_a_row=2)
    record.add(event(7, action))
    record.add(event(8, action))
    with pytest.raises(RecipeError) as raised:
        record.add(event(9, action))
    assert "step 9: " in str(raised.value)
    assert "digest-9" in str(raised.value)
    assert "number 3 in a row, more than trainer.max_nonfinite_steps=2" in str(raised.value)
    assert [each.step for each in record.events] == [7, 8, 9]


def test_a_good_step_begins_the_count_anew() -> None:
    record = NonFiniteRecord(most_in_a_row=1)
    for step in range(1, 20, 2):
        record.add(event(step))
        record.good_step()
    assert len(record.events) == 10


def test_the_first_ends_the_run_where_none_may_pass() -> None:
    with pytest.raises(RecipeError, match=r"number 1 in a row, more than trainer\.max_nonfinite_steps=0"):
        NonFiniteRecord(most_in_a_row=0).add(event(3))


def test_a_checkpoint_keeps_the_events_and_the_count() -> None:
    record = NonFiniteRecord(most_in_a_row=2)
    for each in (event(3), event(9, "rollback", resumed_from=5)):
        record.add(each)
    again = NonFiniteRecord(most_in_a_row=2)
    again.load_state_dict(json.loads(json.dumps(record.state_dict())))  # plain types: tuples come back as lists
    assert again.events == [event(3), event(9, "rollback", resumed_from=5)]
    assert again.state_dict() == record.state_dict()
    with pytest.raises(RecipeError, match="number 3 in a row"):
        again.add(event(10))


def test_the_users_list_has_all_that_the_events_have() -> None:
    record = NonFiniteRecord(most_in_a_row=9)
    record.add(event(9, "rollback", resumed_from=5))
    assert record.as_plain() == [
        {"step": 9, "action": "rollback", "rows": (32768, 36864), "batch_digest": "digest-9", "resumed_from": 5}
    ]


def test_a_rollback_carries_the_record_and_the_lanes() -> None:
    record = NonFiniteRecord(most_in_a_row=9)
    record.add(event(9, "rollback", resumed_from=5))
    request = RollbackRequestedError(record, {"cursors": [1]})
    assert (request.record, request.lanes, str(request)) == (record, {"cursors": [1]}, "rollback after step 9")
