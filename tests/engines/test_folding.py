"""How results become a cohort's: in which order, weighted how, and what happens to one that is not finite."""

import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from fedsim import params as p
from fedsim import rng
from fedsim.data.federated import FederatedData
from fedsim.engines.engine import Job
from fedsim.engines.folding import alone, blocks, fold, join
from fedsim.errors import DivergedError, RunError
from fedsim.records import Broadcast, ClientUpdate, Examples, Partition, StackedUpdate
from fedsim.strategies.aggregators import Aggregator
from fedsim.strategies.strategy import fedavg
from fedsim.training.client import LocalWork
from fedsim.training.optimizers import sgd

NAN, INF, HUGE = float("nan"), float("inf"), 3e38  # twice HUGE is infinite in float32
BROADCAST = Broadcast({"w": torch.zeros(2)}, {"mean": torch.ones(1), "count": torch.tensor(41)}, {}, 3)


def job(on_nan="fail", aggregator=None, **options):
    nothing = Examples(torch.zeros(0, 1), torch.zeros(0, dtype=torch.int64))
    nobody = Partition(np.zeros(1, dtype=np.int64), np.zeros(0, dtype=np.int64))
    data, strategy = FederatedData(nothing, nothing, nobody, nobody, nothing, 2, ()), fedavg(**options)
    strategy = replace(strategy, aggregator=aggregator or strategy.aggregator)
    return Job(LocalWork(nn.Linear(1, 1), (), sgd(), strategy.local, 1, None), data, strategy, on_nan, 2, 1)


def update(client, w, *, n, loss=1.0, mean=0.0, state=None):
    buffers = {"mean": torch.tensor([mean]), "count": torch.tensor(99)}
    return ClientUpdate(client, {"w": torch.tensor(w)}, buffers, n, {"train_loss": loss}, state or {})


def stacked(updates, bytes_up=0, clients_last=False):
    """Several results in one record; ``clients_last``: with lanes that are not contiguous in memory."""

    def stack(dicts):
        tensors = p.stack(dicts)
        return {n: t.movedim(0, -1).contiguous().movedim(-1, 0) if clients_last else t for n, t in tensors.items()}

    return StackedUpdate(
        clients=tuple(u.client for u in updates),
        update=stack([u.update for u in updates]),
        buffers=stack([u.buffers for u in updates]),
        num_examples=tuple(u.num_examples for u in updates),
        metrics={name: tuple(u.metrics[name] for u in updates) for name in updates[0].metrics},
        states=stack([u.state for u in updates]),
        bytes_up=(bytes_up, *[0] * (len(updates) - 1)),
    )


def collected(the_job, updates, broadcast=BROADCAST):
    """The cohort of one block, one result after another."""
    part = fold(the_job, broadcast, (alone(u, 17) for u in updates))
    return join(the_job, broadcast, [part], bytes_down=19)


def cut(items, ends):
    """The sequence in pieces, cut at each of ``ends``."""
    inner = sorted({end for end in ends if 0 < end < len(items)})
    return [items[a:b] for a, b in zip([0, *inner], [*inner, len(items)], strict=True)]


def same_cohort(a, b):
    """Bit for bit, the bytes apart."""
    tensors = all(p.same_bits(x, y) for x, y in ((a.update, b.update), (a.buffers, b.buffers)))
    states = a.states.keys() == b.states.keys() and all(p.same_bits(a.states[k], b.states[k]) for k in a.states)
    rest = {"update": None, "buffers": None, "states": {}, "bytes_up": 0, "bytes_down": 0}
    return tensors and states and replace(a, **rest) == replace(b, **rest)


# ---------------------------------------------------------------- means

TWO = [update(2, [1.0, -4.0], n=1, loss=3.0, mean=8.0), update(5, [-3.0, 2.0], n=3, loss=-1.0, mean=-4.0)]


def test_updates_buffers_and_metrics_are_weighted_by_examples():
    result = collected(job(), TWO)
    assert result.update["w"].tolist() == [(1 - 9) / 4, (-4 + 6) / 4]
    assert result.buffers["mean"].tolist() == [(8 - 12) / 4]
    assert result.buffers["count"].item() == 41 and list(result.buffers) == ["mean", "count"]
    assert result.metrics == {"train_loss": (3 - 3) / 4}
    assert (result.clients, result.num_examples, result.skipped) == ((2, 5), (1, 3), ())
    assert (result.bytes_up, result.bytes_down) == (2 * 17, 19)


def test_uniform_weighting_holds_for_updates_and_buffers_but_not_for_metrics():
    result = collected(job(weighting="uniform"), TWO)
    assert result.update["w"].tolist() == [-1.0, -1.0] and result.buffers["mean"].tolist() == [2.0]
    assert result.metrics == {"train_loss": 0.0}


def drawn(sizes, key=0, dtype=torch.float32, states=False):
    """Results of mixed signs, with names in no alphabetical order."""

    def normal(k, name, *shape, dtype=dtype):
        return rng.normal(rng.fold(key, name, k), *shape, dtype=dtype)

    return [
        ClientUpdate(
            client=k,
            update={"w": normal(k, "w", 7, 3), "b": normal(k, "b", 5), "s": normal(k, "s")},
            buffers={"mean": normal(k, "mean", 2, 2), "count": torch.tensor(k)},
            num_examples=n,
            metrics={m: float(normal(k, m, dtype=torch.float64)) for m in ("train_loss", "accuracy")},
            state={"c": normal(k, "c", 3), "n": torch.tensor(k)} if states else {},
        )
        for k, n in enumerate(sizes)
    ]


def broadcast_of(dtype=torch.float32):
    return Broadcast({}, {"mean": rng.normal(8, 2, 2, dtype=dtype), "count": torch.tensor(41)}, {}, 3)


@given(
    st.lists(st.integers(1, 400), min_size=1, max_size=40),
    st.sampled_from(["examples", "uniform"]),
    st.lists(st.integers(1, 2), max_size=2),
    st.integers(0, 99),
)
@settings(deadline=None, max_examples=40)
def test_a_cohort_in_blocks_comes_to_numpys_average(sizes, weighting, ends, key):
    """The whole way of an engine: blocks of a partition, stacks of any length, parts joined."""
    the_job, broadcast = job(weighting=weighting), broadcast_of(torch.float64)
    updates = drawn(sizes, key, torch.float64)
    parts = [
        fold(the_job, broadcast, (stacked([updates[k] for k in piece]) for piece in cut(block, ends)))
        for block in blocks(np.concatenate([[0], np.cumsum(sizes)]), range(len(sizes)))
    ]
    result = join(the_job, broadcast, parts, bytes_down=0)

    def average(numbers, weights):
        return np.average(list(map(np.asarray, numbers)), axis=0, weights=weights)

    weights = sizes if weighting == "examples" else [1] * len(sizes)
    for name, tensor in result.update.items():
        assert np.abs(tensor.numpy() - average((u.update[name] for u in updates), weights)).max() < 1e-12
    assert np.abs(result.buffers["mean"].numpy() - average((u.buffers["mean"] for u in updates), weights)).max() < 1e-12
    for name, mean in result.metrics.items():
        assert mean == pytest.approx(average((u.metrics[name] for u in updates), sizes), abs=1e-12)
    assert len(result.update) == 3 and len(result.metrics) == 2
    assert result.clients == tuple(range(len(sizes))) and result.num_examples == tuple(sizes)


CUTS = st.lists(st.integers(1, 11), max_size=5)
SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=12)


@given(SIZES, CUTS, st.sets(st.integers(0, 11)), st.booleans(), st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_stacking_changes_no_bit(sizes, ends, diverged, clients_last, key):
    """Stacks of any length, some of whose lanes are skipped, against one client after another."""
    the_job, broadcast, updates = job("skip"), broadcast_of(), drawn(sizes, key, states=True)
    for k in diverged & set(range(len(sizes))):
        updates[k].update["w"][k % 7, 1] = NAN
    whole = fold(the_job, broadcast, (alone(u, 5) for u in updates))
    pieces = fold(the_job, broadcast, (stacked(piece, 5 * len(piece), clients_last) for piece in cut(updates, ends)))
    assert pieces.skipped == whole.skipped == tuple(sorted(diverged & set(range(len(sizes)))))
    assert (pieces.done, pieces.metrics, pieces.bytes_up) == (whole.done, whole.metrics, whole.bytes_up)
    assume(whole.done)
    one, other = (join(the_job, broadcast, [part], bytes_down=0) for part in (whole, pieces))
    assert same_cohort(one, other)


def joined(the_job, broadcast, updates, ends):
    parts = (fold(the_job, broadcast, [stacked(piece)]) for piece in cut(updates, ends))
    return join(the_job, broadcast, parts, bytes_down=0)


@given(SIZES, CUTS, st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_joined_parts_are_one_fold_up_to_rounding(sizes, ends, key):
    the_job, broadcast, updates = job(), broadcast_of(torch.float64), drawn(sizes, key, torch.float64, states=True)
    apart, whole = joined(the_job, broadcast, updates, ends), joined(the_job, broadcast, updates, [])
    for a, b in ((apart.update, whole.update), (apart.buffers, whole.buffers)):
        assert list(a) == list(b) and all(torch.allclose(a[n], b[n], rtol=0, atol=1e-13) for n in a)
    assert apart.metrics == pytest.approx(whole.metrics, abs=1e-13) and list(apart.metrics) == list(whole.metrics)
    assert apart.states.keys() == set(range(len(sizes)))
    assert (apart.clients, apart.num_examples) == (whole.clients, whole.num_examples)


@given(SIZES, CUTS, st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_joined_parts_of_whole_numbers_are_exactly_one_fold(sizes, ends, key):
    """Sums of small whole numbers are exact, so that only a part lost, doubled or misweighted can differ."""

    def rounded(update):
        tensors = {n: t.mul(10).round() for n, t in update.update.items()}
        mean = {**update.buffers, "mean": update.buffers["mean"].mul(10).round()}
        return replace(
            update, update=tensors, buffers=mean, metrics={n: round(9 * v) for n, v in update.metrics.items()}
        )

    broadcast = Broadcast({}, {"mean": torch.ones(2, 2), "count": torch.tensor(41)}, {}, 3)
    updates = [rounded(u) for u in drawn(sizes, key, states=True)]
    assert same_cohort(joined(job(), broadcast, updates, ends), joined(job(), broadcast, updates, []))


def test_parts_are_added_in_the_order_given():
    """2^24 + 1 is 2^24 in float32, so each order of these three has its own sum."""
    big = 2.0**24

    def added(*values):
        updates = [update(k, [value, -value], n=1) for k, value in enumerate(values)]
        return joined(job(), BROADCAST, updates, [1, 2]).update["w"].mul(3).tolist()

    assert added(big, 1.0, -big) == [0.0, 0.0]
    assert added(big, -big, 1.0) == [1.0, -1.0]


def test_an_aggregator_that_keeps_single_updates_gets_them_in_order_with_their_weights():
    def keep(kept, tensors, weights):
        assert weights, "asked to add nobody"
        return kept + tuple(zip(tensors["w"][:, 0].tolist(), weights, strict=True)) if tensors else kept

    listing = Aggregator(tuple, keep, lambda a, b: a + b, lambda kept: dict(enumerate(kept)), linear=False)
    updates = [replace(update(k, [float(-k), 0.0], n=9 - k), buffers={}) for k in range(6)]
    updates[3].update["w"][1] = updates[5].update["w"][0] = NAN
    result = joined(job("skip", listing), replace(BROADCAST, buffers={}), updates, [2, 5])
    assert list(result.update.values()) == [(0.0, 9.0), (-1.0, 8.0), (-2.0, 7.0), (-4.0, 5.0)]


def test_clients_and_states_are_listed_ascending_whatever_the_order_of_blocks():
    updates = [update(k, [1.0, 1.0], n=n, state={"c": torch.tensor(k)}) for k, n in ((6, 9), (1, 5), (4, 5), (0, 2))]
    bad = [update(k, [NAN, 1.0], n=1) for k in (8, 3)]
    the_job = job("skip")
    parts = [
        fold(the_job, BROADCAST, (alone(u, 0) for u in part)) for part in (updates[:2], bad[:1], updates[2:], bad[1:])
    ]
    result = join(the_job, BROADCAST, parts, bytes_down=0)
    assert (result.clients, result.num_examples, result.skipped) == ((0, 1, 4, 6), (2, 5, 5, 9), (3, 8))
    assert list(result.states) == [0, 1, 4, 6]
    assert all(state["c"].item() == client for client, state in result.states.items())


def test_updates_are_taken_one_at_a_time():
    """The fold asks for the next update only when it is done with the last: memory holds one at a time."""
    alive = []

    def results():
        for client in range(5):
            one = update(client, [1.0, 1.0], n=1, state={"c": torch.ones(1)})
            alive.append(one.update)
            yield alone(one, 0)
            for tensor in (one.update["w"], one.buffers["mean"], one.state["c"]):
                tensor.fill_(NAN)  # whoever still needs it would show

    the_job = job()
    result = join(the_job, BROADCAST, [fold(the_job, BROADCAST, results())], bytes_down=0)
    assert result.update["w"].tolist() == [1.0, 1.0] and result.buffers["mean"].tolist() == [0.0]
    assert [state["c"].item() for state in result.states.values()] == [1.0] * 5
    assert len(alive) == 5


def test_parts_are_taken_one_at_a_time():
    events = []

    def parts():
        for k in range(3):
            events.append(f"part {k}")
            yield fold(the_job, BROADCAST, [alone(update(k, [1.0, 1.0], n=1), 0)])

    def merge(a, b):
        events.append("merge")
        return b

    noting = Aggregator(lambda: None, lambda acc, tensors, weights: tensors, merge, lambda acc: acc, linear=False)
    the_job = job(aggregator=noting)
    join(the_job, BROADCAST, parts(), bytes_down=0)
    assert events == [event for k in range(3) for event in (f"part {k}", "merge", "merge")]  # updates and buffers


def test_a_part_survives_pickling_with_no_more_than_it_holds():
    """A state that is a view of its stack would be pickled with the whole stack, once for every client."""
    updates = [update(k, [1.0, float(k)], n=k + 1, state={"c": torch.full((1000,), float(k))}) for k in range(32)]
    part = fold(job(), BROADCAST, [stacked(updates, 7)])
    pickled = pickle.dumps(part)
    assert len(pickled) < 2 * 32 * 4 * 1000
    here, there = (join(job(), BROADCAST, [one], bytes_down=0) for one in (pickle.loads(pickled), part))
    assert same_cohort(here, there) and here.bytes_up == 7


# ---------------------------------------------------------------- results that are not finite

BAD = {
    "the update w is not finite": update(4, [1.0, NAN], n=2),
    "the update w is not finite ": update(4, [1.0, -INF], n=2),
    "the update w is not finite  ": update(4, [-INF, INF], n=2),
    "train_loss is nan": update(4, [1.0, 1.0], n=2, loss=NAN),
    "train_loss is inf": update(4, [1.0, 1.0], n=2, loss=INF),
    "the buffer mean is not finite": update(4, [1.0, 1.0], n=2, mean=INF),
    "the state c is not finite": replace(update(4, [1.0, 1.0], n=2), state={"c": torch.tensor(NAN)}),
    "the state c is not finite ": replace(update(4, [1.0, 1.0], n=2), state={"c": torch.tensor([[1.0, -INF]])}),
}


@pytest.mark.parametrize(("what", "bad"), BAD.items(), ids=BAD)
def test_a_result_that_is_not_finite_fails_the_round_by_name(what, bad):
    rule = rf"round 3, client 4: training diverged: {what.strip()} \(lower train.optimizer.lr"
    with pytest.raises(DivergedError, match=rule) as e:
        collected(job(), [TWO[0], bad, TWO[1]])
    assert (e.value.round, e.value.client) == (3, 4)


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_a_skipped_result_leaves_no_trace_but_its_name_and_bytes(bad):
    bad = replace(bad, state={"c": torch.tensor(NAN)})
    result, without = collected(job("skip"), [TWO[0], bad, TWO[1]]), collected(job(), TWO)
    assert result.skipped == (4,)
    assert (result.bytes_up, without.bytes_up) == (3 * 17, 2 * 17)
    assert same_cohort(replace(result, skipped=()), without)


@pytest.mark.parametrize(("what", "bad"), BAD.items(), ids=BAD)
@pytest.mark.parametrize("lane", [0, 1, 2])
def test_of_a_stack_the_error_names_the_client_whose_lane_it_is(what, bad, lane):
    state = next(iter(bad.state.values()), torch.zeros(2))
    others = [replace(u, state={"c": torch.ones_like(state)}) for u in TWO]
    results = [*others[:lane], replace(bad, state={"c": state}), *others[lane:]]
    with pytest.raises(DivergedError, match=f"round 3, client 4: training diverged: {what.strip()} "):
        fold(job(), BROADCAST, [stacked(results)])
    part = fold(job("skip"), BROADCAST, [stacked(results)])
    assert part.skipped == (4,) and part.done == ((2, 1), (5, 3)) and part.states.keys() == {2, 5}


def test_of_several_that_diverged_the_first_of_the_block_is_named_with_the_first_that_is_wrong():
    first = replace(update(9, [NAN, 1.0], n=5, mean=NAN), metrics={"a": 0.0, "b": NAN, "c": INF})
    later = replace(update(1, [1.0, INF], n=2), metrics={"a": 0.0, "b": 0.0, "c": 0.0})
    last = replace(update(0, [1.0, 1.0], n=2), metrics={"a": INF, "b": 0.0, "c": 0.0})
    for results in ([stacked([first, later, last])], (alone(one, 0) for one in (first, later, last))):
        with pytest.raises(DivergedError, match="client 9: training diverged: b is nan"):
            fold(job(), BROADCAST, results)
    without_metrics = [replace(u, metrics={}) for u in (first, later)]
    without_metrics[0].update.update(v=torch.tensor(NAN), u=torch.tensor(NAN))
    without_metrics[1].update.update(v=torch.tensor(NAN), u=torch.tensor(NAN))
    with pytest.raises(DivergedError, match="client 9: training diverged: the update w is not finite"):
        fold(job(), BROADCAST, [stacked(without_metrics)])


@pytest.mark.parametrize("blocks", [[], [[]], [[BAD["train_loss is nan"]]]], ids=["no part", "nobody", "all skipped"])
def test_without_any_contribution_there_is_no_update(blocks):
    result = join(
        job("skip"), BROADCAST, [fold(job("skip"), BROADCAST, (alone(u, 0) for u in b)) for b in blocks], bytes_down=0
    )
    assert result.update is None and result.buffers is None
    assert (result.clients, result.metrics, result.states) == ((), {}, {})


def test_a_part_without_contribution_changes_nothing():
    the_job, bad = job("skip"), BAD["train_loss is nan"]
    owned = ([bad], TWO[:1], [], [replace(bad, client=7)], TWO[1:])
    parts = [fold(the_job, BROADCAST, (alone(u, 17) for u in own)) for own in owned]
    result = join(the_job, BROADCAST, parts, bytes_down=0)
    assert same_cohort(replace(result, skipped=()), joined(job(), BROADCAST, TWO, [1]))
    assert (result.skipped, result.bytes_up) == ((4, 7), 4 * 17)


@pytest.mark.parametrize("lanes_together", [False, True])
def test_large_finite_numbers_are_not_taken_for_infinite(lanes_together):
    """Their sum overflows float32, but each of them is a number."""

    def large(client, sign):
        tensor = torch.full((3,), sign * HUGE)
        return ClientUpdate(client, {"w": tensor}, {"mean": tensor}, 1, {"train_loss": 1e308}, {"c": tensor})

    start = Broadcast({}, {"mean": torch.zeros(3)}, {}, 3)
    assert math.isinf(float(large(0, 1).update["w"].sum()))
    updates = [large(0, 1), large(1, -1)]
    part = fold(job(), start, [stacked(updates)] if lanes_together else (alone(one, 0) for one in updates))
    result = join(job(), start, [part], bytes_down=0)
    assert result.update["w"].tolist() == result.buffers["mean"].tolist() == [0.0] * 3
    assert result.clients == (0, 1) and result.states.keys() == {0, 1}


NUMBERS = st.sampled_from([0.0, -0.0, 1.0, -2.5, HUGE, HUGE, -HUGE, -HUGE, 1e-45, INF, -INF, NAN])
TABLES = st.integers(1, 3).flatmap(lambda n: st.lists(st.tuples(*[NUMBERS] * n), min_size=1, max_size=5))


@given(TABLES, st.sampled_from(["update", "buffers", "state"]), st.sampled_from([torch.float32, torch.float64]))
@settings(deadline=None, max_examples=100)
def test_skipped_are_exactly_those_with_a_number_that_is_not_finite(rows, where, dtype):
    """Against a look at every number."""

    def holding(client, row):
        plain = ClientUpdate(client, {"w": torch.zeros(1)}, {"b": torch.ones(len(row), dtype=dtype)}, 1, {}, {})
        own = {"b" if where == "buffers" else "v": torch.tensor(row, dtype=dtype)}
        counter = {} if where == "update" else {"n": torch.tensor(2**62)}  # of whole numbers nothing is asked
        return replace(plain, **{where: own | counter})

    start = Broadcast({}, {"b": torch.full((len(rows[0]),), 0.5, dtype=dtype), "n": torch.tensor(0)}, {}, 3)
    updates = [holding(k, row) for k, row in enumerate(rows)]
    expected = tuple(k for k, row in enumerate(rows) if not all(math.isfinite(value) for value in row))
    assert fold(job("skip"), start, [stacked(updates)]).skipped == expected
    assert fold(job("skip"), start, (alone(u, 0) for u in updates)).skipped == expected


def test_buffers_that_nobody_moves_stay_bit_for_bit_even_infinite_ones_and_negative_zeros():
    mask = {"mask": torch.tensor([-INF, -0.0, 1.0]), "count": torch.tensor(3)}
    start = Broadcast({"w": torch.zeros(2)}, mask, {}, 3)
    results = [replace(u, buffers={n: b.clone() for n, b in mask.items()}) for u in TWO]
    assert p.same_bits(collected(job(), results, start).buffers, mask)
    assert p.same_bits(joined(job(), start, results, [1]).buffers, mask)
    assert p.same_bits(joined(job(), start, results, []).buffers, mask)


def test_an_infinite_entry_stays_where_others_of_its_buffer_move():
    start = Broadcast({}, {"mask": torch.tensor([-INF, 0.0, 1.0])}, {}, 3)
    moved = [
        replace(u, buffers={"mask": torch.tensor([-INF, to, 1.0])}) for u, to in zip(TWO, (4.0, -8.0), strict=True)
    ]
    assert joined(job(), start, moved, []).buffers["mask"].tolist() == [-INF, (4 - 24) / 4, 1.0]
    gone = replace(TWO[0], buffers={"mask": torch.tensor([INF, 0.0, 1.0])})
    with pytest.raises(DivergedError, match="client 2: training diverged: the buffer mask is not finite"):
        collected(job(), [gone], start)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_buffers_keep_their_dtype(dtype):
    start = Broadcast({}, {"b": torch.tensor([1.0, 2.0], dtype=dtype)}, {}, 3)
    results = [replace(u, buffers={"b": torch.tensor([3.0, 2.0], dtype=dtype)}) for u in TWO]
    moved = joined(job(), start, results, []).buffers["b"]
    assert moved.dtype == dtype and moved.tolist() == [3.0, 2.0]


def test_only_clients_that_keep_a_state_are_listed():
    kept = update(5, [1.0, 1.0], n=1, state={"c": torch.ones(2)})
    assert collected(job(), [TWO[0], kept]).states.keys() == {5}


def test_a_client_alone_is_a_stack_of_one():
    one = update(5, [1.0, -2.0], n=3, loss=0.25, mean=4.0, state={"c": torch.ones(2, 3)})
    result = alone(one, 0)
    assert (result.clients, result.num_examples, result.metrics) == ((5,), (3,), {"train_loss": (0.25,)})
    for tensors, own in ((result.update, one.update), (result.buffers, one.buffers), (result.states, one.state)):
        assert p.same_bits(tensors, {name: tensor.reshape(1, *tensor.shape) for name, tensor in own.items()})


def test_a_client_alone_sends_the_dense_codecs_bytes_unless_told_otherwise():
    one = update(5, [1.0, -2.0], n=3, state={"c": torch.ones(2, 3)})
    assert alone(one, 0).bytes_up == (0,) and alone(one, 12345).bytes_up == (12345,)


def test_clients_that_report_different_metrics_are_refused():
    """A mean over some of the clients under the name of a mean over all would be wrong without a sign."""
    more = replace(TWO[1], metrics={"train_loss": 1.0, "extra": 2.0})
    with pytest.raises(
        RunError, match=r"must report the same metrics, got \['train_loss'\] and \['extra', 'train_loss'\]"
    ):
        collected(job(), [TWO[0], more])
