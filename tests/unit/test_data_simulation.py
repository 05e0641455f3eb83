"""RefinedWeb at its real size, played in one process: 5,534 shards, up to 1,024 ranks, an interruption on the way.

The documents are made up where they stand: document n has a length drawn from n and consists of tokens that name n, so
that every token of every row says which document it is of.
"""

import numpy as np
import pytest
import torch

from pldr_train.data.documents import EncodedDocuments
from pldr_train.data.rows.lanes import Cursor, lane_layout
from pldr_train.data.rows.loader import LaneState, RowSpec, Topology, TrainLoader
from pldr_train.data.rows.packing import RowRules
from pldr_train.data.rows.split import resolve_intervals
from pldr_train.data.sources.manifest import Manifest, SourceFile

DOCUMENTS, SHARDS = 968_000_015, 5_534
LANES = BATCH = 1024
CONTEXT, STEPS, CHANGE_AT = 64, 200, 27
START = Cursor(0, 0, 0)


def refinedweb():
    """The list of RefinedWeb's shards: documents dealt evenly, row groups of a thousand."""
    files = []
    for index in range(SHARDS):
        rows = DOCUMENTS // SHARDS + (index < DOCUMENTS % SHARDS)
        groups = ((1000, rows // 1000), (rows % 1000, 1))
        files.append(SourceFile(f"data/train-{index:05d}-of-{SHARDS:05d}.parquet", 500_000_000 + index, groups))
    return Manifest({"kind": "hub"}, "content", tuple(files))


def lengths_of(ordinals):
    """1 to 60 tokens, EOS included, from the document's number."""
    return (ordinals * 7919 % 60) + 1


class Numbered:
    """A token reader whose documents consist of their own number; it notes the row groups that are touched."""

    documents_at_once, reading_threads = 64, 0

    def __init__(self, manifest):
        self.manifest = manifest
        self.touched = set()

    def open(self, ordinals):
        for ordinal in (int(ordinals.min()), int(ordinals.max())):
            place = self.manifest.locate(ordinal)
            assert place.group_start <= ordinal < place.group_stop
            self.touched.add((place.file, place.group))
        return _NumberedBlock(ordinals)

    def leave_out(self, unreadable):
        assert not unreadable

    def fingerprint(self, start, stop):
        return self.manifest.fingerprint(start, stop)


class _NumberedBlock:
    unreadable = ()

    def __init__(self, ordinals):
        self._ordinals = ordinals

    def encode(self, first, last):
        ordinals = self._ordinals[first:last]
        lengths = lengths_of(ordinals)
        return EncodedDocuments(
            np.repeat(ordinals, lengths).astype(np.int32), lengths, np.zeros(len(ordinals), np.uint8)
        )


@pytest.fixture(scope="module")
def spec():
    manifest = refinedweb()
    assert manifest.num_documents == DOCUMENTS
    train, _ = resolve_intervals(DOCUMENTS, (16_000_000, 32_000_000), (32_000_000, 32_160_000), 0.01)
    layout = lane_layout(*train, num_lanes=LANES, window=1000, seed=1234, shuffle=True)
    return RowSpec(Numbered(manifest), layout, RowRules(CONTEXT))


def play(spec, ranks, steps, state):
    """(rows, columns) of the global batches of `steps` steps, put together from the shares of all ranks."""
    micro = max(1, BATCH // ranks // 4)
    loaders = [iter(TrainLoader(spec, Topology(rank, ranks, BATCH, micro), state, 0)) for rank in range(ranks)]
    ids = np.empty((steps * BATCH, CONTEXT + 1), np.int32)
    cursors = None
    first = state.rows_consumed
    for _ in range(steps):
        for loader in loaders:
            batch = next(loader)
            numbers = batch["cursors"][:, 0].numpy() - first
            cursors = np.full((steps * BATCH, batch["cursors"].shape[1]), -1) if cursors is None else cursors
            assert (cursors[numbers] == -1).all()  # nobody else has had these rows
            ids[numbers], cursors[numbers] = batch["input_ids"].numpy(), batch["cursors"].numpy()
    assert (cursors >= 0).all()
    return ids, cursors


@pytest.fixture(scope="module")
def alone(spec):
    """All global batches as one process makes them."""
    return play(spec, 1, STEPS, LaneState(LANES))


def test_no_document_is_repeated_and_none_is_lost(spec, alone):
    ids, cursors = alone
    seen = np.bincount(ids[:, 1:].ravel().astype(np.int64) - 16_000_000, minlength=16_000_000)
    expected = np.zeros(16_000_000, np.int64)
    for lane in range(LANES):
        rows = cursors[cursors[:, 1] == lane]
        epoch, document, offset = rows[-1, 2:5]
        assert epoch == 0
        for _, place, ordinals in spec.layout.blocks_from(lane, START):
            whole = ordinals[: max(0, document - place)]
            expected[whole - 16_000_000] += lengths_of(whole)
            if document < place + len(ordinals):
                # The lane has got to this document's token `offset`, which is the last row's last one.
                expected[ordinals[document - place] - 16_000_000] += offset + 1
                break
        expected[int(next(spec.layout.blocks_from(lane, START))[2][0]) - 16_000_000] -= 1  # never a target
    # Every token of every document up to each lane's cursor was a target exactly once, and no other token was.
    assert np.array_equal(seen, expected)
    assert seen.sum() == STEPS * BATCH * CONTEXT
    assert (seen > 0).sum() > 400_000


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "steps"), [(8, STEPS), (64, 50), (1024, 50)])
def test_global_batches_are_the_same_for_any_number_of_ranks(spec, alone, ranks, steps):
    ids, cursors = play(spec, ranks, steps, LaneState(LANES))
    assert np.array_equal(ids, alone[0][: len(ids)])
    assert np.array_equal(cursors, alone[1][: len(cursors)])


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(1024, 8), (1, 64), (64, 1024)])
def test_a_resume_on_another_number_of_ranks_goes_on_with_the_same_batches(spec, alone, before, after):
    state = LaneState(LANES)
    _, cursors = play(spec, before, CHANGE_AT, state.clone())
    state.update(torch.from_numpy(cursors))
    restored = LaneState.from_state_dict(state.state_dict(), LANES)
    ids, cursors = play(spec, after, 20, restored)
    start = CHANGE_AT * BATCH
    assert np.array_equal(ids, alone[0][start : start + len(ids)])
    assert np.array_equal(cursors, alone[1][start : start + len(cursors)])


def test_an_interval_touches_its_own_shards_alone(spec, alone):
    files = {file for file, _ in spec.reader.touched}
    first, last = spec.reader.manifest.locate(16_000_000).file, spec.reader.manifest.locate(31_999_999).file
    assert (first, last) == (91, 182)
    assert files <= set(range(first, last + 1))
    assert len(files) > 80
