"""Packing and loading: which tokens stand in which row, for whom, and after which interruption."""

import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pldr_train.data.documents import LiveReader
from pldr_train.data.rows.lanes import Cursor, lane_layout
from pldr_train.data.rows.loader import LaneState, RowSpec, Topology, TrainLoader
from pldr_train.data.rows.packing import RowRules, batch_digest
from pldr_train.errors import CheckpointError, DataError
from tests.unit.token_data import block_of

END = 3


class Letters:
    """A tokenizer of one token a character, ids from 10 on."""

    def encode(self, text, **_):
        return [ord(character) for character in text]


class Texts:
    """Documents in memory."""

    def __init__(self, texts):
        self.texts = texts
        self.num_documents = len(texts)

    def read(self, start, stop):
        assert 0 <= start < stop <= len(self.texts)
        return block_of(start, self.texts[start:stop])

    def leave_out(self, unreadable):
        assert not unreadable

    def fingerprint(self, start, stop):
        return {}


def texts_of(lengths):
    """Documents of the given lengths, each of a letter of its own."""
    return [chr(100 + index) * length for index, length in enumerate(lengths)]


MIXED = texts_of([5, 0, 1, 40, 3, 0, 0, 7, 2, 90, 4, 6, 1, 1, 12, 9, 0, 3, 8, 2])  # empty ones; longer than many rows


def row_spec(texts, num_lanes, context_length, window=4, shuffle=True, seed=1):
    layout = lane_layout(0, len(texts), num_lanes=num_lanes, window=window, seed=seed, shuffle=shuffle)
    return RowSpec(LiveReader(Texts(texts), Letters()), layout, RowRules(context_length))


def naive_stream(spec, lane, num_tokens):
    """The definition: all documents of the lane in order, each followed by EOS, end to end."""
    tokens = []
    for epoch in itertools.count():
        for turn in itertools.count():
            ordinals = spec.layout.block(lane, epoch, turn)
            if ordinals is None:
                break
            for ordinal in ordinals:
                tokens += [*map(ord, spec.reader.source.texts[ordinal]), END]
        if len(tokens) >= num_tokens:
            return tokens[:num_tokens]


def take(loader, steps):
    return list(itertools.islice(iter(loader), steps))


def loader(spec, state=None, *, rank=0, world_size=1, batch_size=4, micro_batch_size=2, num_workers=0):
    topology = Topology(rank, world_size, batch_size, micro_batch_size)
    return TrainLoader(spec, topology, state or LaneState(spec.layout.num_lanes), num_workers)


@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=25),
    num_lanes=st.integers(1, 5),
    context_length=st.integers(1, 12),
    window=st.integers(1, 6),
    shuffle=st.booleans(),
    resume_after=st.integers(0, 20),
)
@settings(max_examples=150, deadline=None)
def test_rows_are_the_naive_stream_cut_with_one_token_overlap(
    lengths, num_lanes, context_length, window, shuffle, resume_after
):
    num_lanes = min(num_lanes, len(lengths))
    spec = row_spec(texts_of(lengths), num_lanes, context_length, window, shuffle)
    for lane in range(num_lanes):
        expected = naive_stream(spec, lane, 25 * context_length + 1)
        stream = spec.stream(lane)
        for number in range(25):
            row = stream.next_row()
            start = number * context_length
            assert row.tokens.tolist() == expected[start : start + context_length + 1]
            if number == resume_after:  # from here on the rows come from a stream that knows the cursor alone
                stream = spec.stream(lane, row.cursor, row.counts)


def test_every_token_but_a_lanes_first_is_a_target_once():
    spec = row_spec(MIXED, num_lanes=1, context_length=7, shuffle=False)
    epoch_tokens = sum(map(len, MIXED)) + len(MIXED)
    targets = np.concatenate([row.tokens[1:] for row in rows_of(spec, 0, epoch_tokens)])
    assert targets[: epoch_tokens - 1].tolist() == naive_stream(spec, 0, epoch_tokens)[1:]


def rows_of(spec, lane, count):
    stream = spec.stream(lane)
    return [stream.next_row() for _ in range(count)]


def test_rows_come_from_lanes_in_turn():
    spec = row_spec(MIXED, num_lanes=4, context_length=5)
    own = {lane: rows_of(spec, lane, 6) for lane in range(4)}
    batches = take(loader(spec, batch_size=6, micro_batch_size=2), 4)
    for number in range(24):
        batch, slot = batches[number // 6], number % 6
        row = own[number % 4][number // 4]
        assert batch["input_ids"][slot].tolist() == row.tokens.tolist()
        assert batch["cursors"][slot].tolist() == [number, number % 4, *row.cursor, *row.counts.tolist()]
        assert batch["input_ids"].dtype == batch["cursors"].dtype == torch.int64


def global_batches(spec, steps, world_size, num_workers, micro_batch_size, batch_size=8, state=None):
    """Play all ranks and put their rows back by row number."""
    shares = [
        take(
            loader(
                spec,
                state,
                rank=rank,
                world_size=world_size,
                num_workers=num_workers,
                micro_batch_size=micro_batch_size,
                batch_size=batch_size,
            ),
            steps,
        )
        for rank in range(world_size)
    ]
    batches = []
    for parts in zip(*shares, strict=True):
        cursors = torch.cat([part["cursors"] for part in parts])
        order = cursors[:, 0].argsort()
        batches.append((torch.cat([part["input_ids"] for part in parts])[order], cursors[order]))
    return batches


@pytest.mark.parametrize(
    ("world_size", "num_workers", "micro_batch_size"),
    [(1, 0, 1), (1, 0, 8), (2, 0, 2), (4, 0, 1), (4, 0, 2), (1, 1, 8), (1, 2, 2), (2, 2, 2)],
)
def test_global_batches_depend_on_no_topology(world_size, num_workers, micro_batch_size):
    spec = row_spec(MIXED, num_lanes=8, context_length=6)
    reference = global_batches(spec, 5, 1, 0, 4)
    for (ids, cursors), (expected_ids, expected_cursors) in zip(
        global_batches(spec, 5, world_size, num_workers, micro_batch_size), reference, strict=True
    ):
        assert torch.equal(ids, expected_ids)
        assert torch.equal(cursors, expected_cursors)
        assert batch_digest(ids) == batch_digest(expected_ids)


def test_resume_at_every_step_continues_the_straight_sequence_through_epochs():
    spec = row_spec(MIXED, num_lanes=4, context_length=5)
    straight = take(loader(spec, batch_size=6), 40)
    assert int(straight[-1]["cursors"][:, 2].min()) >= 2  # every lane of the last batch is in its third epoch
    state = LaneState(4)
    for step, batch in enumerate(straight):
        restored = LaneState.from_state_dict(state.state_dict(), num_lanes=4)
        assert restored.rows_consumed == step * 6
        for got, expected in zip(take(loader(spec, restored, batch_size=6), 3), straight[step:], strict=False):
            assert torch.equal(got["input_ids"], expected["input_ids"])
            assert torch.equal(got["cursors"], expected["cursors"])
        state.update(batch["cursors"])


@given(
    lengths=st.lists(st.integers(0, 60), min_size=4, max_size=30),
    context_length=st.integers(1, 9),
    before=st.integers(0, 12),
    seed=st.integers(0, 5),
)
@settings(max_examples=60, deadline=None)
def test_resume_on_another_topology_continues_any_corpus(lengths, context_length, before, seed):
    spec = row_spec(texts_of(lengths), num_lanes=4, context_length=context_length, seed=seed)
    straight = global_batches(spec, before + 3, 1, 0, 4, batch_size=4)
    state = LaneState(4)
    for _, cursors in straight[:before]:
        state.update(cursors)
    resumed = global_batches(spec, 3, 2, 0, 1, batch_size=4, state=state)
    for (ids, cursors), (expected_ids, expected_cursors) in zip(resumed, straight[before:], strict=True):
        assert torch.equal(ids, expected_ids)
        assert torch.equal(cursors, expected_cursors)


def test_loader_is_not_moved_by_updates_while_it_runs_and_restarts_at_what_was_trained():
    spec = row_spec(MIXED, num_lanes=4, context_length=5)
    expected = take(loader(spec), 6)
    state = LaneState(4)
    running = loader(spec, state)
    got = []
    for batch in itertools.islice(iter(running), 4):
        got.append(batch)
        state.update(batch["cursors"])
    got += take(running, 2)
    for batch, reference in zip(got, expected, strict=True):
        assert torch.equal(batch["input_ids"], reference["input_ids"])


def test_the_loader_leaves_the_runs_random_state_alone():
    spec = row_spec(MIXED, num_lanes=4, context_length=5)
    before = torch.get_rng_state()
    take(loader(spec, num_workers=0), 2)
    take(loader(spec, num_workers=1), 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_lane_state_survives_a_weights_only_checkpoint(tmp_path):
    spec = row_spec(MIXED, num_lanes=4, context_length=5)
    state = LaneState(4)
    for batch in take(loader(spec), 3):
        state.update(batch["cursors"])
    torch.save(state.state_dict(), tmp_path / "state.pt")
    restored = LaneState.from_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert restored.rows_consumed == 12
    assert [restored.cursor(lane) for lane in range(4)] == [state.cursor(lane) for lane in range(4)]
    assert isinstance(restored.cursor(0), Cursor)


def test_states_of_ranks_merge_to_the_state_of_one_process():
    spec = row_spec(MIXED, num_lanes=8, context_length=5)
    whole, ranks = LaneState(8), [LaneState(8), LaneState(8)]
    for batch in take(loader(spec, batch_size=8, micro_batch_size=2), 3):
        whole.update(batch["cursors"])
    for rank, state in enumerate(ranks):
        for batch in take(loader(spec, rank=rank, world_size=2, batch_size=8, micro_batch_size=2), 3):
            state.update(batch["cursors"])
    with pytest.raises(AssertionError):
        ranks[0].state_dict()
    merged = ranks[0].merged(ranks[1:]).state_dict()
    assert merged["rows_consumed"] == 24
    assert torch.equal(merged["lanes"], whole.state_dict()["lanes"])


def test_a_skipped_batch_is_noticed():
    spec = row_spec(MIXED, num_lanes=4, context_length=5)
    first, second = take(loader(spec), 2)
    state = LaneState(4)
    with pytest.raises(AssertionError, match="does not follow"):
        state.update(second["cursors"])
    state.update(first["cursors"])
    with pytest.raises(AssertionError, match="does not follow"):
        state.update(first["cursors"])


def test_malformed_lane_states_are_checkpoint_errors():
    good = LaneState(4).state_dict()
    for bad, message in [
        ({}, "no table of lanes"),
        (good | {"lanes": torch.zeros(4, 3)}, "no table of lanes"),
        (good | {"rows_consumed": 1}, "contradicts itself"),
        (good | {"lanes": torch.eye(2, good["lanes"].shape[1], dtype=torch.int64).flip(0)}, "contradicts itself"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            LaneState.from_state_dict(bad)
    with pytest.raises(CheckpointError, match=r"4 lanes but data\.num_lanes=8"):
        LaneState.from_state_dict(good, num_lanes=8)


def test_indivisible_sizes_name_their_keys():
    spec = row_spec(MIXED, num_lanes=4, context_length=5)
    with pytest.raises(DataError, match=r"data\.num_lanes=4 is not a multiple of 8"):
        loader(spec, micro_batch_size=4, num_workers=2)
    with pytest.raises(DataError, match=r"trainer\.batch_size=5 is not a multiple"):
        loader(spec, batch_size=5, micro_batch_size=2)


class Damaged(Texts):
    def read(self, start, stop):
        raise DataError("x.parquet: not a readable Parquet file")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_data_error_reaches_the_user_without_a_workers_traceback(num_workers):
    spec = row_spec(MIXED, num_lanes=4, context_length=5)
    damaged = RowSpec(LiveReader(Damaged(MIXED), Letters()), spec.layout, spec.rules)
    with pytest.raises(DataError) as caught:
        take(loader(damaged, num_workers=num_workers), 1)
    assert str(caught.value) == "x.parquet: not a readable Parquet file"


def test_workers_end_with_their_loader():
    spec = row_spec(MIXED, num_lanes=4, context_length=5)
    before = set(multiprocessing.active_children())
    batches = iter(loader(spec, num_workers=2))
    next(batches)
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 2
    batches.close()
    del batches
    for worker in workers:
        worker.join(timeout=20)
    assert not any(worker.is_alive() for worker in workers)


SIGNALLED_RUN = """
import signal, sys, time
sys.path.insert(0, sys.argv[1])
from test_data_rows import MIXED, loader, row_spec
batches = iter(loader(row_spec(MIXED, num_lanes=4, context_length=5), num_workers=2))
next(batches)
signal.signal(signal.SIGTERM, lambda *_: None)
print("ready", flush=True)
time.sleep(1)
rows = [next(batches)["cursors"][-1, 0].item() for _ in range(40)]
print(rows[-1], flush=True)
"""


def test_a_signal_to_the_whole_group_neither_stops_the_rows_nor_the_exit():
    command = [sys.executable, "-c", SIGNALLED_RUN, str(Path(__file__).parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as run:
        assert run.stdout.readline() == "ready\n"
        os.killpg(run.pid, signal.SIGTERM)
        assert run.communicate(timeout=40)[0] == "163\n"
    assert run.returncode == 0


def test_digest_depends_on_ids_and_their_order_not_on_the_integer_type():
    ids = torch.tensor([[1, 2], [3, 400]])
    assert batch_digest(ids) == batch_digest(ids.to(torch.int32))
    assert len(batch_digest(ids)) == 32
    assert len({batch_digest(ids), batch_digest(ids.flip(0)), batch_digest(ids.T), batch_digest(ids + 1)}) == 4
