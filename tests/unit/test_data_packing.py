"""Rows by their definition: packed and padded, with documents left out, counted and skipped."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pldr_train.data.documents import DocumentBlock, LiveReader, Unreadable
from pldr_train.data.rows.lanes import lane_layout
from pldr_train.data.rows.loader import LaneState, RowSpec, Topology, TrainLoader
from pldr_train.data.rows.packing import COUNTERS, RowRules
from pldr_train.errors import DataError
from tests.unit.token_data import block_of

END = 3


class Letters:
    """A tokenizer of one token a character."""

    def encode(self, text, **_):
        return [ord(character) for character in text]


class Texts:
    """Documents in memory; those in `broken` (start, stop) cannot be read and are skipped."""

    def __init__(self, texts, broken=()):
        self.texts, self.broken, self.left_out = list(texts), list(broken), []
        self.num_documents = len(self.texts)

    def read(self, start, stop):
        parts = [*self.left_out, *(Unreadable(*part, "part", "broken") for part in self.broken)]
        touched = tuple({p.start: p for p in parts if p.start < stop and p.stop > start}.values())
        texts = [
            None if any(p.start <= index < p.stop for p in touched) else self.texts[index]
            for index in range(start, stop)
        ]
        block = block_of(start, texts)
        return DocumentBlock(start, block.raw, touched)

    def leave_out(self, unreadable):
        self.left_out = list(unreadable)

    def fingerprint(self, start, stop):
        return {}


def spec_of(texts, num_lanes=1, context_length=4, window=5, broken=(), shuffle=True, **rules):
    layout = lane_layout(0, len(texts), num_lanes=num_lanes, window=window, seed=1, shuffle=shuffle)
    return RowSpec(LiveReader(Texts(texts, broken), Letters()), layout, RowRules(context_length, **rules))


def epoch_documents(spec, lane, epoch):
    """Ordinals of a lane's documents in an epoch, in order."""
    ordinals = []
    for turn in itertools.count():
        block = spec.layout.block(lane, epoch, turn)
        if block is None:
            return ordinals
        ordinals += block.tolist()


def text_of(raw):
    return (raw or b"").decode(errors="replace") if isinstance(raw, bytes | None) else raw


def definition(spec, lane, epochs):
    """Tokens of the documents that are not left out, in order, each with its EOS, and the epoch of each document."""
    source, rules, documents = spec.reader.source, spec.rules, []
    for epoch in range(epochs):
        for ordinal in epoch_documents(spec, lane, epoch):
            tokens = [ord(character) for character in text_of(source.texts[ordinal])]
            if any(start <= ordinal < stop for start, stop in source.broken):
                continue
            if rules.min_document_tokens is not None and len(tokens) < rules.min_document_tokens:
                continue
            if rules.max_document_tokens is not None and len(tokens) > rules.max_document_tokens:
                continue
            documents.append([*tokens, END])
    return documents


def padded_rows(documents, length):
    rows = []
    for tokens in documents:
        for start in range(0, len(tokens) - 1, length):
            row = tokens[start : start + length + 1]
            rows.append(row + [0] * (length + 1 - len(row)))
    return rows


def packed_rows(documents, length):
    tokens = list(itertools.chain.from_iterable(documents))
    return [tokens[start : start + length + 1] for start in range(0, len(tokens) - length, length)]


texts_strategy = st.lists(st.integers(0, 14).map(lambda n: "abcdefghijklmnop"[:n]), min_size=2, max_size=24)


@given(
    texts=texts_strategy,
    context_length=st.integers(1, 6),
    window=st.integers(1, 6),
    packing=st.sampled_from(["pack", "pad"]),
    shortest=st.none() | st.integers(1, 5),
    longest=st.none() | st.integers(6, 12),
    broken=st.lists(st.integers(0, 23), max_size=3, unique=True),
)
@settings(max_examples=250)
def test_rows_are_those_of_the_definition_and_every_cursor_resumes(
    texts, context_length, window, packing, shortest, longest, broken
):
    texts = [*texts, "usable"]
    spec = spec_of(
        texts,
        context_length=context_length,
        window=window,
        packing=packing,
        broken=[(index, index + 1) for index in broken if index < len(texts) - 1],
        min_document_tokens=shortest,
        max_document_tokens=longest,
    )
    cut = padded_rows if packing == "pad" else packed_rows
    expected = cut(definition(spec, 0, 4), context_length)[:40]
    stream = spec.stream(0)
    straight = [stream.next_row() for _ in expected]
    assert [row.tokens.tolist() for row in straight] == expected
    for stop in range(0, len(straight) - 1, 3):
        resumed = spec.stream(0, straight[stop].cursor, straight[stop].counts)
        for row in straight[stop + 1 : stop + 5]:
            again = resumed.next_row()
            assert again.tokens.tolist() == row.tokens.tolist()
            assert again.position.tolist() == row.position.tolist()


def test_a_padded_document_is_cut_with_one_token_overlap_and_filled_up_with_id_0():
    spec = spec_of(["abcdefg", "", "xy"], packing="pad", shuffle=False)
    stream = spec.stream(0)
    rows = [stream.next_row() for _ in range(3)]
    assert [row.tokens.tolist() for row in rows] == [
        [97, 98, 99, 100, 101],
        [101, 102, 103, END, 0],
        [120, 121, END, 0, 0],
    ]
    assert [tuple(row.cursor) for row in rows] == [(0, 0, 4), (0, 1, 0), (0, 3, 0)]


def test_every_document_is_counted_once_and_as_what_it_is():
    texts = ["word", None, "", b"in\xffvalid", "no", "far too long", "fine", "lost", "gone", "good"]
    spec = spec_of(texts, shuffle=False, broken=[(7, 9)], min_document_tokens=3, max_document_tokens=8)
    stream = spec.stream(0)
    rows = [stream.next_row() for _ in range(30)]
    first_epoch = [row for row in rows if row.cursor.epoch == 0]
    assert dict(zip(COUNTERS, first_epoch[-1].counts.tolist(), strict=True)) == {
        "documents": 10, "null": 1, "empty": 1, "invalid_utf8": 1, "too_short": 3, "too_long": 1, "unreadable": 2,
    }  # fmt: skip
    for row in rows:  # counts go with the cursor: all documents up to the one in which the row ends
        assert row.counts[0] == row.cursor.epoch * 10 + row.cursor.document + 1
    assert text_of(texts[3]) == "in\ufffdvalid"
    assert ord("\ufffd") in np.concatenate([row.tokens for row in rows])


def take(spec, state, steps, rank=0, world_size=1, batch_size=4, num_workers=0):
    topology = Topology(rank, world_size, batch_size, batch_size // world_size // 2)
    return list(itertools.islice(iter(TrainLoader(spec, topology, state, num_workers)), steps))


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_skipped_parts_reach_the_trainer_once_and_stay_skipped_after_a_resume(num_workers):
    texts = ["some words here"] * 40
    broken = [(3, 6), (20, 30)]
    spec = spec_of(texts, num_lanes=4, window=4, broken=broken)
    straight, state, new = take(spec, LaneState(4), 60, num_workers=num_workers), LaneState(4), []
    for batch in straight[:30]:
        new += state.update(batch["cursors"], batch["unreadable"])
    assert sorted((part.start, part.stop, part.place, part.reason) for part in new) == [
        (3, 6, "part", "broken"),
        (20, 30, "part", "broken"),
    ]
    assert state.counts()["unreadable"] >= 13  # every epoch again
    # The parts are whole again meanwhile: the run goes on without them, as it would have without the interruption.
    repaired = spec_of(texts, num_lanes=4, window=4)
    resumed = take(repaired, LaneState.from_state_dict(state.state_dict(), 4), 30, num_workers=num_workers)
    for batch, expected in zip(resumed, straight[30:], strict=True):
        assert batch["input_ids"].equal(expected["input_ids"])
        assert batch["cursors"].equal(expected["cursors"])


@pytest.mark.parametrize("packing", ["pack", "pad"])
def test_a_lane_without_any_usable_document_ends_with_a_message_instead_of_reading_for_ever(packing):
    spec = spec_of(["no", "nor", "oh", "ah"], num_lanes=2, packing=packing, min_document_tokens=4)
    with pytest.raises(DataError, match=r"lane 0 of 2 .*\[0, 4\).*data\.min_document_tokens=4; give more documents"):
        spec.stream(0).next_row()
    only_empty = spec_of(["", None, ""], packing="pad")
    with pytest.raises(DataError, match="finds no usable document"):
        only_empty.stream(0).next_row()


def test_a_document_longer_than_many_pieces_and_one_of_millions_of_tokens_are_packed_whole():
    spec = spec_of(["a" * 3_000_000, "b" * 10], context_length=1000, shuffle=False)
    stream = spec.stream(0)
    rows = [stream.next_row() for _ in range(3001)]
    assert all((row.tokens == ord("a")).all() for row in rows[:2999])
    assert rows[2999].tokens.tolist() == [ord("a")] * 1000 + [END]
    assert rows[3000].tokens[:12].tolist() == [END, *[ord("b")] * 10, END]
    middle = spec.stream(0, rows[1500].cursor, rows[1500].counts)
    assert middle.next_row().tokens.tolist() == rows[1501].tokens.tolist()
