"""The timetable of several clients against the plain loop's batches, client by client and step by step."""

import numpy as np
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fedsim import rng
from fedsim.training.client import batches
from fedsim.training.timetable import Timetable, timetable

SIZES = st.lists(st.integers(1, 14), min_size=1, max_size=6).map(lambda sizes: sorted(sizes, reverse=True))
BATCH_SIZES = st.none() | st.integers(1, 20)  # 20 is more than any client has
CASES = (SIZES, BATCH_SIZES, st.integers(1, 3), st.integers(0, 2**64 - 1))


def keys_of(key, clients):
    return [rng.fold(key, "client", k) for k in range(clients)]


def table_of(sizes, batch_size, epochs, key) -> Timetable:
    keys = torch.stack([rng.as_tensor(own) for own in keys_of(key, len(sizes))])
    return timetable(sizes, batch_size, epochs, keys)


def steps_of(sizes, batch_size, epochs, key):
    """Of each client its batches, as lists."""
    keys = keys_of(key, len(sizes))
    return [[b.tolist() for b in batches(n, batch_size, epochs, own)] for n, own in zip(sizes, keys, strict=True)]


@given(*CASES)
@example([7, 7, 7], 3, 2, 1)  # all alike
@example([7, 6, 5, 4], 4, 3, 2)  # as many steps each, of unequal batches
@example([9, 4, 1], 2, 3, 3)  # fewer steps each, whose epochs close up
@example([5, 2], 20, 2, 4)
@example([5, 2], None, 2, 5)
@settings(deadline=None, max_examples=150)
def test_positions_are_the_plain_loops_batches_and_minus_one_where_it_has_none(sizes, batch_size, epochs, key):
    table, steps = table_of(sizes, batch_size, epochs, key), steps_of(sizes, batch_size, epochs, key)
    longest, width = max(map(len, steps)), min(batch_size or sizes[0], sizes[0])
    expected = torch.full((len(sizes), longest, width), -1)
    for client, own in enumerate(steps):
        for step, batch in enumerate(own):
            for place, position in enumerate(batch):
                expected[client, step, place] = position
    assert table.positions.dtype == torch.int64 and torch.equal(table.positions, expected)


@given(*CASES)
@settings(deadline=None, max_examples=100)
def test_what_it_says_of_each_step_is_counted_from_the_plain_loops_batches(sizes, batch_size, epochs, key):
    table, steps = table_of(sizes, batch_size, epochs, key), steps_of(sizes, batch_size, epochs, key)
    longest = max(map(len, steps))
    assert table.counts.shape == (len(sizes), longest) and table.counts.dtype == np.int64
    assert len(table.active) == len(table.width) == len(table.full) == longest
    for step in range(longest):
        training = [client for client, own in enumerate(steps) if step < len(own)]
        lengths = [len(steps[client][step]) for client in training]
        assert training == list(range(table.active[step]))  # those still training come first
        assert table.counts[:, step].tolist() == lengths + [0] * (len(sizes) - len(training))
        assert table.width[step] == max(lengths)
        assert table.full[step] is (min(lengths) == max(lengths))


def test_a_timetable_by_hand():
    table = table_of([3, 1], 2, 2, 9)
    assert (table.active, table.width) == ((2, 2, 1, 1), (2, 1, 2, 1))
    assert table.counts.tolist() == [[2, 1, 2, 1], [1, 1, 0, 0]]
    assert table.full == (False, True, True, True)
    assert table.positions[1].tolist() == [[0, -1], [0, -1], [-1, -1], [-1, -1]]


@given(*CASES, st.data())
@settings(deadline=None, max_examples=100)
def test_lanes_are_the_timetable_of_these_clients_alone(sizes, batch_size, epochs, key, data):
    """So a client has the same batches whoever trains beside it; only its rows may be wider."""
    start = data.draw(st.integers(0, len(sizes) - 1))
    end = data.draw(st.integers(start + 1, len(sizes)))
    table, keys = table_of(sizes, batch_size, epochs, key), keys_of(key, len(sizes))
    own = torch.stack([rng.as_tensor(one) for one in keys[start:end]])
    lanes, alone = table.lanes(start, end), timetable(sizes[start:end], batch_size, epochs, own)
    width = alone.positions.shape[2]
    assert torch.equal(lanes.positions[:, :, :width], alone.positions)
    assert bool((lanes.positions[:, :, width:] == -1).all())
    assert lanes.counts.tolist() == alone.counts.tolist()
    assert (lanes.active, lanes.width, lanes.full) == (alone.active, alone.width, alone.full)


def test_clients_and_epochs_have_orders_of_their_own():
    orders = table_of([40, 40], None, 2, 3).positions
    assert len({tuple(order) for client in orders.tolist() for order in client}) == 4
