"""What a client sends, and what the server reads: values by other means, memory, masks, lengths, lies."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim import params as p
from fedsim import rng, wire
from fedsim.engines.flower import messages as m
from fedsim.records import Broadcast, ClientUpdate, Masks
from fedsim.strategies.strategy import fedavg
from fedsim.training.kept import RESIDUAL, rule_state
from fedsim.transforms import compression as c
from fedsim.transforms.outgoing import outgoing, reading
from fedsim.transforms.transform import compose
from fedsim.wire.messages import _pack

SHAPES = {"w": (6, 7), "b": (9,), "s": ()}
KEY = 11
EVERY = {
    "top-k": [c.top_k(fraction=0.3)],
    "top-k, forgetful": [c.top_k(fraction=0.3, error_feedback=False)],
    "random-k": [c.random_k(fraction=0.3)],
    "random-k, remembered": [c.random_k(fraction=0.3, error_feedback=True)],
    "qsgd": [c.qsgd(bits=4)],
    "quantise": [c.quantise(bits=4, error_feedback=True)],
    "sign": [c.sign()],
    "half": [c.half(dtype="bf16")],
    "sparse": [c.sparse()],
    "top-k, 8 bit": [c.top_k(fraction=0.3), c.quantise()],
    "random-k, qsgd": [c.random_k(fraction=0.3), c.qsgd(bits=2)],
}


NUMBERS = {"client": torch.tensor(3), "num_examples": torch.tensor(5), "metrics": torch.ones(1).double()}


def params_of(key, dtype=torch.float32, shapes=SHAPES):
    return {name: rng.normal(rng.fold(key, name), *shape, dtype=dtype) for name, shape in shapes.items()}


def broadcast_of(params, masks=None, **changes):
    return Broadcast(p.zeros_like(params), {"n": torch.tensor(3)}, {}, 1, masks, **changes)


def result_of(params, **changes):
    return ClientUpdate(3, params, {"n": torch.tensor(4)}, 5, {"train_loss": 0.5}, {"c": torch.ones(2)}, **changes)


def flat(tensors):
    return torch.cat([t.reshape(-1) for t in tensors.values()])


def sent(transforms, params, state=None, key=KEY, masks=None, **changes):
    """What a client sends of this update, and the broadcast that it answers."""
    asked = broadcast_of(params, masks)
    version = 0 if masks is None else masks.version
    result = result_of(params, mask_version=version, **changes)
    return outgoing(compose(transforms), asked, result, state or {}, key), asked


# ---------------------------------------------------------------- what is sent


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", EVERY)
def test_the_server_reads_what_the_client_says_it_reads(name, dtype):
    made, asked = sent(EVERY[name], params_of(1, dtype))
    read = reading(compose(EVERY[name]), asked, KEY)
    got = wire.decode_update(wire.encode_update(made), None, read)
    assert list(got.update) == list(SHAPES) and p.same_bits(got.update, made.update)
    assert p.same_bits(got.buffers, made.buffers) and (got.client, got.num_examples, got.state) == (3, 5, {})
    assert torch.equal(made.state["c"], torch.ones(2))
    p.check_alike(made.update, params_of(1, dtype))


def test_of_the_largest_the_values_and_of_all_others_zeros():
    update = params_of(2)
    made, _ = sent([c.top_k(fraction=0.25)], update)
    numbers = flat(update).tolist()
    largest = sorted(range(len(numbers)), key=lambda i: -abs(numbers[i]))[: round(0.25 * len(numbers))]
    assert flat(made.update).tolist() == [x if i in largest else 0.0 for i, x in enumerate(numbers)]


def test_what_is_drawn_is_scaled_up_unless_it_is_remembered():
    update = params_of(3)
    for made, factor in (([c.random_k(fraction=0.5)], 52 / 26), ([c.random_k(fraction=0.5, error_feedback=True)], 1.0)):
        read, whole = flat(sent(made, update)[0].update), flat(update)
        assert int((read != 0).sum()) == 26
        assert torch.allclose(read[read != 0], factor * whole[read != 0], rtol=1e-6)


def test_selected_values_are_coded_on_the_grid_of_their_own_tensor():
    update = params_of(4)
    chosen, read = (
        sent(made, update)[0].update for made in ([c.top_k(fraction=0.5)], [c.top_k(fraction=0.5), c.quantise()])
    )
    for name, values in chosen.items():
        largest = float(values.abs().max())
        expected = [largest * round(127 * x / largest) / 127 for x in values.double().reshape(-1).tolist()]
        assert read[name].reshape(-1).tolist() == pytest.approx(expected, rel=1e-5, abs=1e-7)
        assert bool((read[name][values == 0] == 0).all())


def test_signs_have_the_mean_magnitude_of_their_tensor():
    update = params_of(5, torch.float64)
    read = sent([c.sign()], update)[0].update
    for name, values in update.items():
        assert torch.allclose(read[name], values.sign() * values.abs().mean(), rtol=1e-12)


def test_without_loss_nothing_is_changed_and_what_has_not_moved_costs_little():
    update = {"w": torch.zeros(4000).index_fill_(0, torch.tensor([7, 2500]), -1.5)}
    made, _ = sent([c.sparse()], update)
    assert p.same_bits(made.update, update) and len(made.coded) < 40
    assert not any(name.startswith(RESIDUAL) for name in made.state)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", EVERY)
def test_what_is_not_finite_is_never_hidden(name, wrong):
    """It is in the update as the server reads it, or stays with the client, which is checked as well."""
    update = params_of(6)
    update["w"][2, 3] = wrong
    made, _ = sent(EVERY[name], update)
    seen = {**made.update, **made.state}
    drawn_away = name in ("random-k", "random-k, qsgd") and bool(torch.isfinite(flat(made.update)).all())
    assert drawn_away or not p.all_finite(seen)
    assert name != "sign" or not p.all_finite(made.update)


def test_a_probe_and_no_compression_leave_the_result_alone():
    result = result_of(params_of(7))
    assert outgoing(None, broadcast_of(result.update), result, {}, KEY) is result
    asked = broadcast_of(result.update, probe=True)
    assert outgoing(compose([c.sign()]), asked, result, {}, KEY) is result
    assert reading(compose([c.sign()]), asked, KEY) is None and reading(None, asked, KEY) is None


# ---------------------------------------------------------------- memory

grid = st.integers(-(2**20), 2**20).map(lambda i: i / 2**10)  # sums of a few are exact in float64


@settings(deadline=None, max_examples=40)
@given(st.lists(st.lists(grid, min_size=12, max_size=12), min_size=1, max_size=6), st.booleans())
def test_what_was_read_and_what_is_remembered_are_all_updates_exactly(rounds, drawn):
    made = [(c.random_k if drawn else c.top_k)(fraction=0.3, error_feedback=True)]
    total, read, state = torch.zeros(12).double(), torch.zeros(12).double(), {}
    for round, values in enumerate(rounds):
        update = {"a": torch.tensor(values[:8]).double().view(2, 4), "b": torch.tensor(values[8:]).double()}
        one, _ = sent(made, update, state, key=round)
        total, read, state = total + flat(update), read + flat(one.update), one.state
        assert int((flat(one.update) != 0).sum()) <= 4
    left = torch.cat([state[RESIDUAL + "a"].reshape(-1), state[RESIDUAL + "b"]])
    assert torch.equal(read + left, total)


@pytest.mark.parametrize(
    "made", [[c.sign()], [c.top_k(fraction=0.2), c.quantise(bits=4)], [c.half(error_feedback=True)]]
)
def test_nothing_is_lost_of_what_is_coded_either(made):
    total, read, state = 0.0, 0.0, {}
    for round in range(30):
        update = params_of(100 + round, torch.float64)
        one, _ = sent(made, update, state, key=round)
        total, read, state = total + flat(update), read + flat(one.update), one.state
    left = torch.cat([state[RESIDUAL + name].reshape(-1) for name in SHAPES])
    assert torch.allclose(read + left, total, rtol=0, atol=1e-11)
    assert float(left.norm()) < 0.9 * float(total.norm())  # and it does not pile up


def test_without_error_feedback_nothing_is_remembered():
    made, _ = sent([c.top_k(error_feedback=False), c.quantise()], params_of(1), {RESIDUAL + "w": torch.ones(6, 7)})
    assert list(made.state) == ["c"]


def test_the_memory_is_none_of_the_strategys_business():
    made, _ = sent([c.top_k()], params_of(1))
    assert list(rule_state(made.state)) == ["c"] and len(made.state) == 4


def test_a_model_of_other_shapes_begins_with_no_memory():
    large, small = params_of(1), params_of(2, shapes={"w": (5, 7), "b": (9,), "s": ()})
    state = sent([c.top_k(fraction=0.1)], large)[0].state
    after, fresh = (sent([c.top_k(fraction=0.1)], small, own)[0] for own in (state, {}))
    assert p.same_bits(after.update, fresh.update) and p.same_bits(after.state, fresh.state)
    again = sent([c.top_k(fraction=0.1)], params_of(3), state)[0]
    assert not p.same_bits(again.update, sent([c.top_k(fraction=0.1)], params_of(3))[0].update)


# ---------------------------------------------------------------- means


@pytest.mark.parametrize(
    ("made", "span"),
    [
        ([c.random_k(fraction=0.25)], lambda u: 4 * u.abs()),
        ([c.qsgd(bits=2)], lambda u: u.norm().expand(u.shape)),
        ([c.qsgd(bits=4)], lambda u: u.norm().expand(u.shape) / 7),
    ],
)
def test_the_mean_over_clients_is_the_update(made, span):
    """Hoeffding, for n = 1000 clients of one update: an entry's mean is off by more than
    ``span sqrt(ln(2 m / a) / (2 n))`` with probability a / m at most, its values lying within ``span``; with m = 40
    entries the test raises a false alarm for one choice of keys in 10^9. Doing without the factor n / k, or rounding
    to the nearest, is off by more."""
    n, m_entries, alarm = 1000, 40, 1e-9
    update = {"w": rng.normal(8, m_entries, dtype=torch.float64)}
    aggregator = fedavg().aggregator
    reads = [sent(made, update, key=rng.fold(5, "client", client))[0].update for client in range(n)]
    mean = aggregator.finish(aggregator.add(aggregator.start(), p.stack(reads), [1.0] * n))["w"]
    allowed = span(update["w"]) * math.sqrt(math.log(2 * m_entries / alarm) / (2 * n))
    assert bool(((mean - update["w"]).abs() <= allowed).all())


# ---------------------------------------------------------------- masks


def masks_of(key):
    return {"w": rng.uniform(key, 6, 7) < 0.4}


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("name", EVERY)
def test_only_what_remains_is_selected_and_coded(name, own):
    kept = masks_of(9)
    update, masks = p.masked(params_of(1), kept), None if own else Masks(kept, 4)
    made, asked = sent(EVERY[name], update, masks=masks, kept=kept if own else {})
    read = wire.decode_update(wire.encode_update(made, masks), masks, reading(compose(EVERY[name]), asked, KEY))
    assert p.same_bits(read.update, made.update) and p.same_bits(read.kept, kept if own else {})
    assert bool((made.update["w"][~kept["w"]] == 0).all())
    small = {"w": update["w"][kept["w"]], "b": update["b"], "s": update["s"]}  # as if there were no other entries
    alone, _ = sent(EVERY[name], small)
    assert alone.coded == made.coded and torch.equal(alone.update["w"], made.update["w"][kept["w"]])


def test_memory_of_what_is_pruned_by_now_is_dropped():
    state = sent([c.top_k(fraction=0.05)], params_of(1))[0].state
    kept = masks_of(9)
    made, _ = sent([c.top_k(fraction=0.05)], p.masked(params_of(2), kept), state, masks=Masks(kept, 1))
    assert bool((made.update["w"][~kept["w"]] == 0).all()) and bool((made.state[RESIDUAL + "w"][~kept["w"]] == 0).all())
    assert bool((made.state[RESIDUAL + "w"][kept["w"]] != 0).any())


# ---------------------------------------------------------------- lengths


def test_drawn_entries_cost_their_codes_and_nothing_for_positions():
    update = {"w": rng.normal(1, 700), "b": rng.normal(2, 300)}
    made, _ = sent([c.random_k(fraction=0.1), c.quantise()], update)
    assert len(made.coded) == 8 + 2 * (1 + 4) + 100  # fingerprint; a form and a scale for each tensor; a byte a value
    assert len(sent([c.random_k(fraction=0.1)], update)[0].coded) == 8 + 2 + 400
    assert len(sent([c.half()], update)[0].coded) == 8 + 2 + 2000
    assert len(sent([c.sign()], update)[0].coded) == 8 + 2 * (1 + 4) + 88 + 38
    assert len(sent([c.qsgd()], update)[0].coded) == 8 + 2 + 4 * (2 + 1) + 1000


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", EVERY)
def test_bytes_are_those_of_flowers_blob(name, masked):
    masks = Masks(masks_of(9), 2) if masked else None
    update = p.masked(params_of(1), masks.kept) if masks else params_of(1)
    made, asked = sent(EVERY[name], update, masks=masks)
    content = m.update_content(made, masks)
    blob = content["fedsim.tensors"]["blob"].data
    assert wire.sent_up(made, asked) == len(blob) and made.coded in blob
    got = m.read_update(content, asked, 3, reading=reading(compose(EVERY[name]), asked, KEY))
    assert p.same_bits(got.update, made.update)


# ---------------------------------------------------------------- lies


def test_what_was_not_agreed_on_is_refused():
    made, asked = sent([c.sign()], params_of(1))
    read = reading(compose([c.sign()]), asked, KEY)
    with pytest.raises(ValueError, match="the update is coded, which was not agreed on"):
        wire.decode_update(wire.encode_update(made))
    with pytest.raises(ValueError, match="the update must be coded"):
        wire.decode_update(wire.encode_update(replace(made, coded=b"")), None, read)
    groups = {"update": {"w": torch.ones(2)}, "coded": {"update": torch.zeros(9, dtype=torch.uint8)}}
    with pytest.raises(ValueError, match="the update must be coded: one vector of bytes, and nothing else"):
        wire.decode_update(_pack({**groups, "numbers": NUMBERS}, ("loss",)), None, read)
    with pytest.raises(ValueError, match="written for other names, shapes, dtypes, known masks or another coding"):
        wire.decode_update(wire.encode_update(made), None, reading(compose([c.half()]), asked, KEY))
    drawn, asked = sent([c.random_k(fraction=0.3)], params_of(1))
    with pytest.raises(ValueError, match=r"written for other .* known masks"):
        wire.decode_update(
            wire.encode_update(drawn), None, reading(compose([c.random_k(fraction=0.3)]), asked, KEY + 1)
        )


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(sorted(EVERY)), st.data())
def test_hostile_bytes_are_refused_or_make_an_update_of_the_right_shapes(name, data):
    made, asked = sent(EVERY[name], params_of(1))
    coded = bytearray(made.coded)
    for _ in range(data.draw(st.integers(1, 3))):
        coded[data.draw(st.integers(0, len(coded) - 1))] = data.draw(st.integers(0, 255))
    coded = bytes(coded)[: data.draw(st.integers(1, len(coded)))] + data.draw(st.binary(max_size=3))
    content = m.update_content(replace(made, coded=coded))
    try:
        got = m.read_update(content, asked, 3, reading=reading(compose(EVERY[name]), asked, KEY))
    except ValueError:
        return
    p.check_alike(got.update, asked.params)


@pytest.mark.parametrize("kept", [{"w": torch.ones(5, 7, dtype=torch.bool)}, {"x": torch.ones(3, dtype=torch.bool)}])
def test_masks_of_another_model_are_refused(kept):
    made, asked = sent([c.top_k()], params_of(1))
    content = m.update_content(replace(made, kept=kept))
    with pytest.raises(ValueError):
        m.read_update(content, asked, 3, tickets=True, reading=reading(compose([c.top_k()]), asked, KEY))


def test_a_round_draws_with_its_own_key():
    update = params_of(1)
    for made in ([c.random_k(fraction=0.3)], [c.qsgd(bits=2)]):
        one, again, other = (sent(made, update, key=key)[0].coded for key in (1, 1, 2))
        assert one == again != other
    numbers = np.array(
        [flat(sent([c.random_k(fraction=0.5)], update, key=key)[0].update).numpy() != 0 for key in range(50)]
    )
    assert numbers.mean(0).min() > 0 and numbers.mean(0).max() < 1
