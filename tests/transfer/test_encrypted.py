"""The homomorphic end: products against exact integers, and the layouts both parties must find alike."""

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transfer_runs import Heard

from fedsim.transfer import ciphertexts as c
from fedsim.transfer.channel import Channel
from fedsim.transfer.encrypted import Paillier, ciphertexts_of, result_layout, source_layouts
from fedsim.transfer.fixed import decode, encode_coefficients, encode_secrets
from fedsim.transfer.links import pair
from fedsim.transfer.pool import Pool
from fedsim.transfer.terms import Plan, plan

NOTHING = Plan((), (), 0, 0, True)
PLANS = {
    "rows": plan("a", 6, 4, 5, 0),
    "rows in groups": plan("b", 3, 17, 4, 0),
    "entries": plan("a", 6, 3, 5, 11),
    "no head": plan("b", 4, 3, 0, 20),
}


def both_ways(own, other, draw, times=1):
    """A exchanges ``own`` for ``other`` with B, so many times: pairs of what A found and what it must find."""
    ends, record = pair(), Heard()
    given = {
        role: [draw.uniform(-60, 60, size) for size in wanted.sources] for role, wanted in (("a", other), ("b", own))
    }
    mine = {
        role: [draw.normal(size=product.shape[:3]) for product in wanted.products]
        for role, wanted in (("a", own), ("b", other))
    }
    found, multipliers = {}, {}

    def act(role, end, plan_of_role, plan_of_other):
        channel = Channel(end, "other", timeout_s=30, record=record if role == "a" else None)
        multipliers[role] = Paillier(1024, insecure=True, pool=Pool(1))
        multipliers[role].begin(channel, role, plan_of_role, plan_of_other, times)
        found[role] = [
            multipliers[role].exchange(
                channel, role, plan_of_role, mine[role], other=plan_of_other, secrets=given[role]
            )
            for _ in range(times)
        ]

    threads = [
        threading.Thread(target=act, args=("a", ends[0], own, other)),
        threading.Thread(target=act, args=("b", ends[1], other, own)),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found, mine, given, record, multipliers


def exact(wanted, coefficients, sources):
    """By Python's integers, from the same two encodings."""
    found = []
    for product, values in zip(wanted.products, coefficients, strict=True):
        batches, _, terms, columns = product.shape
        x, y = encode_coefficients(values), encode_secrets(sources[product.source])
        y = y.reshape(batches, terms, columns).astype(object)
        whole = np.stack([x.values[b].astype(object) @ y[b] for b in range(batches)]).astype(np.int64)
        found.append(decode(whole, x.fraction))
    return found


@pytest.mark.parametrize("theirs", PLANS)
@pytest.mark.parametrize("ours", PLANS)
def test_both_find_the_exact_products_of_both_encodings(ours, theirs):
    own, other = PLANS[ours], PLANS[theirs]
    found, mine, given, _, _ = both_ways(own, other, np.random.default_rng(1), times=2)
    for role, wanted, sources in (("a", own, given["b"]), ("b", other, given["a"])):
        expected = exact(wanted, mine[role], sources)
        for again in found[role]:
            for one, value in zip(again, expected, strict=True):
                assert np.array_equal(one, value)


def test_one_may_give_nothing_and_learn_nothing():
    found, mine, given, record, multipliers = both_ways(PLANS["rows"], NOTHING, np.random.default_rng(2))
    for one, expected in zip(found["a"][0], exact(PLANS["rows"], mine["a"], given["b"]), strict=True):
        assert np.array_equal(one, expected)
    assert found["b"] == [[]]
    assert record.of("sent", "secrets") == [b""]
    assert multipliers["a"].describe()["ciphertexts"] == {
        "secrets": 0,
        "masked": ciphertexts_of(PLANS["rows"], 1024)[1],
    }


sizes = st.integers(1, 40)


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from("ab"),
    st.tuples(sizes, sizes),
    st.tuples(st.integers(0, 20), st.integers(0, 30)).filter(any),
    st.sampled_from([1024, 2048, 3072]),
)
def test_layouts_hold_every_number_in_as_few_ciphertexts_as_slots_allow(role, hidden_values, net, bits):
    wanted, slots = plan(role, *hidden_values, *net), (bits - 2) // 64
    for layout, size in zip(source_layouts(wanted, bits), wanted.sources, strict=True):
        assert np.prod(layout.shape) == size
        assert layout.slots <= slots
    for product in wanted.products:
        layout, shape = result_layout(product, bits), product.shape
        assert np.prod(layout.shape) == shape.batches * shape.rows * shape.columns
        assert layout.slots <= slots
        assert layout.count <= shape.batches * shape.rows * -(-shape.columns // slots)
    assert ciphertexts_of(wanted, bits)[0] == sum(one.count for one in source_layouts(wanted, bits))


def test_seconds_are_counted_where_they_are_spent():
    _, _, _, _, multipliers = both_ways(PLANS["rows"], PLANS["rows"], np.random.default_rng(3))
    assert all(seconds > 0 for seconds in multipliers["a"].describe()["seconds"].values())
    assert c.most_slots(1024) == 15
