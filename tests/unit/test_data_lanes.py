"""The order of documents and rows as pure functions."""

from itertools import chain, islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pldr_train.data.rows.lanes import Cursor, lane_layout, micro_batch_rows, permutation, permutation_key, permuted
from pldr_train.errors import DataError


@given(size=st.integers(1, 400), key=st.integers(0, 2**64 - 1))
@settings(max_examples=60, deadline=None)
def test_both_permutations_reach_every_number_once(size, key):
    assert sorted(permuted(index, size, key) for index in range(size)) == list(range(size))
    assert sorted(permutation(size, key).tolist()) == list(range(size))


def test_permutations_are_even_over_keys():
    keys, size = 4000, 5
    for images in (
        [permuted(0, size, permutation_key("test", key)) for key in range(keys)],
        [int(permutation(size, permutation_key("test", key))[0]) for key in range(keys)],
    ):
        counts = [images.count(value) for value in range(size)]
        assert sum((count - keys / size) ** 2 / (keys / size) for count in counts) < 18.5  # chi-square, 4 df, p = 0.001


def test_permutations_keep_their_values_for_ever():
    """A checkpoint's cursors mean these very orders: a change here makes every earlier run unresumable."""
    key = permutation_key("blocks", 1234, 7)
    assert key == 10975061521977736297
    assert permutation(8, key).tolist() == [0, 6, 3, 5, 2, 7, 4, 1]
    assert [permuted(index, 10**9, key) for index in range(3)] == [20181461, 726011787, 670138769]


def documents_of_epoch(layout, lane, epoch):
    turn = 0
    while (ordinals := layout.block(lane, epoch, turn)) is not None:
        yield from ordinals.tolist()
        turn += 1


@given(
    documents=st.integers(1, 500),
    num_lanes=st.integers(1, 16),
    window=st.integers(1, 60),
    seed=st.integers(0, 9),
    epoch=st.integers(0, 3),
    shuffle=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_every_document_is_dealt_exactly_once_an_epoch(documents, num_lanes, window, seed, epoch, shuffle):
    if documents < num_lanes:
        return
    layout = lane_layout(100, 100 + documents, num_lanes=num_lanes, window=window, seed=seed, shuffle=shuffle)
    lanes = [list(documents_of_epoch(layout, lane, epoch)) for lane in range(num_lanes)]
    assert all(lanes)
    assert sorted(chain.from_iterable(lanes)) == list(range(100, 100 + documents))


def test_order_depends_on_seed_and_epoch_and_stays_in_blocks():
    def order(seed, epoch):
        layout = lane_layout(0, 6400, num_lanes=4, window=50, seed=seed, shuffle=True)
        return list(documents_of_epoch(layout, 0, epoch))

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(2, 0)
    assert order(1, 0) != order(1, 1)
    first_block = order(1, 0)[:50]
    assert max(first_block) - min(first_block) == 49
    assert first_block != sorted(first_block)


def test_without_shuffle_one_lane_reads_straight_on_and_wraps():
    layout = lane_layout(5, 12, num_lanes=1, window=3, seed=0, shuffle=False)
    assert layout.window == 1  # few documents: small blocks
    blocks = list(islice(layout.blocks_from(0, Cursor(0, 0, 0)), 9))
    assert [int(ordinals[0]) for _, _, ordinals in blocks] == [5, 6, 7, 8, 9, 10, 11, 5, 6]
    assert [epoch for epoch, _, _ in blocks] == [0] * 7 + [1, 1]


def test_a_lane_is_entered_at_the_cursors_block():
    layout = lane_layout(0, 1600, num_lanes=2, window=20, seed=3, shuffle=True)
    straight = list(islice(layout.blocks_from(1, Cursor(0, 0, 0)), 90))
    epoch, place, ordinals = straight[70]
    entered = next(layout.blocks_from(1, Cursor(epoch, place + 7, 3)))
    assert entered[:2] == (epoch, place)
    assert entered[2].tolist() == ordinals.tolist()


def test_fewer_documents_than_lanes_is_an_error_that_names_key_and_fix():
    with pytest.raises(DataError, match=r"data\.num_lanes=64 exceeds the 10 .* lower data\.num_lanes to 10"):
        lane_layout(0, 10, num_lanes=64, window=1000, seed=0, shuffle=True)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_cut_the_rows_of_a_step_without_gap_or_overlap(world_size):
    micro, steps = 2, 3
    taken = sorted(
        row
        for rank in range(world_size)
        for index in range(steps * 8 // (world_size * micro))
        for row in micro_batch_rows(40, index, rank=rank, world_size=world_size, micro_batch_size=micro)
    )
    assert taken == list(range(40, 40 + steps * 8))
