"""The LSTM of plain cells: torch's own where nothing is drawn, a slow loop in numpy where something is."""

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit
from torch import nn
from torch.autograd import gradcheck
from torch.func import functional_call, grad, vmap

from fedsim import params as p
from fedsim import rng
from fedsim.models.layers.keyed import key_names
from fedsim.models.layers.lstm import Lstm, Rates, TypeDropout, plain_cells, type_dropout

NONE, ALL = Rates(), Rates(0.3, 0.4, 0.5, 0.2)


def made(*sizes, rates=NONE, **options):
    """An Lstm, and the nn.LSTM of the same parameters."""
    with rng.torch_seeded(2):
        original = nn.LSTM(*sizes, **options).double()
    lstm = plain_cells(copy.deepcopy(original))
    lstm.rates = rates
    return lstm, original


def keyed(lstm, key, x, hx=None):
    return functional_call(lstm, {"key": rng.as_tensor(key)}, (x, hx))


def normal(seed, *shape):
    return rng.normal(seed, *shape, dtype=torch.float64)


@pytest.mark.parametrize("states", [False, True])
@pytest.mark.parametrize(
    ("shape", "layers", "bias", "batch_first"),
    [((6, 2, 3), 1, True, False), ((2, 6, 3), 3, True, True), ((4, 5, 3), 2, False, True), ((6, 3), 2, True, True)],
)
def test_without_rates_it_is_torchs_lstm_values_and_gradients(shape, layers, bias, batch_first, states):
    lstm, original = made(3, 4, layers, bias=bias, batch_first=batch_first)
    batch = () if len(shape) == 2 else (shape[0] if batch_first else shape[1],)
    found = []
    for one in (lstm, original):
        x, h, c = (
            normal(seed, *size).requires_grad_() for seed, size in enumerate([shape, *[(layers, *batch, 4)] * 2])
        )
        y, last = one(x, (h, c)) if states else one(x)
        weighted = sum((t * normal(7 + i, *t.shape)).sum() for i, t in enumerate((y, *last)))
        leaves = [x, *([h, c] if states else []), *one.parameters()]
        found.append([y, *last, *torch.autograd.grad(weighted, leaves)])
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in zip(*found, strict=True))
    assert [a.shape for a in found[0]] == [b.shape for b in found[1]]


def slow(weights, x, key, rates, training):
    """Two layers on (batch, time, features): the outputs, and the last sequence's last states."""
    batch, time, _ = x.shape
    hidden = weights["weight_hh_l0"].shape[1]
    for k in range(2):
        own = rng.fold(key, k)
        draws = {
            "input": rng.uniform(rng.fold(own, "input"), batch, x.shape[2]).numpy(),
            "hidden": rng.uniform(rng.fold(own, "hidden"), batch, hidden).numpy(),
            "zone cell": rng.uniform(rng.fold(own, "zone cell"), batch, time, hidden).numpy(),
            "zone hidden": rng.uniform(rng.fold(own, "zone hidden"), batch, time, hidden).numpy(),
        }
        w_ih, w_hh = weights[f"weight_ih_l{k}"], weights[f"weight_hh_l{k}"]
        bias = weights[f"bias_ih_l{k}"] + weights[f"bias_hh_l{k}"]
        out = np.zeros((batch, time, hidden))
        for n in range(batch):
            h, c = np.zeros(hidden), np.zeros(hidden)
            z_x = (draws["input"][n] >= np.float32(rates.p_input)) / (1 - rates.p_input) if training else 1.0
            z_h = (draws["hidden"][n] >= np.float32(rates.p_hidden)) / (1 - rates.p_hidden) if training else 1.0
            for t in range(time):
                i, f, g, o = (w_ih @ (x[n, t] * z_x) + w_hh @ (h * z_h) + bias).reshape(4, hidden)
                new_c = expit(f) * c + expit(i) * np.tanh(g)
                new_h = expit(o) * np.tanh(new_c)
                for unit in range(hidden):
                    if training:
                        keep_c = float(draws["zone cell"][n, t, unit] < np.float32(rates.zone_cell))
                        keep_h = float(draws["zone hidden"][n, t, unit] < np.float32(rates.zone_hidden))
                    else:
                        keep_c, keep_h = rates.zone_cell, rates.zone_hidden
                    c[unit] = keep_c * c[unit] + (1 - keep_c) * new_c[unit]
                    h[unit] = keep_h * h[unit] + (1 - keep_h) * new_h[unit]
                out[n, t] = h
        x = out
    return x, h, c


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("rates", [ALL, Rates(0.3), Rates(p_hidden=0.4), Rates(zone_cell=0.5), Rates(zone_hidden=0.2)])
def test_masks_and_zones_are_those_of_a_slow_loop(rates, training):
    lstm, _ = made(3, 4, 2, batch_first=True, rates=rates)
    x = 2 * normal(5, 3, 6, 3)
    y, (h, c) = keyed(lstm.train(training), 9, x)
    weights = {name: tensor.detach().numpy() for name, tensor in lstm.named_parameters()}
    expected, last_h, last_c = slow(weights, x.numpy(), 9, rates, training)
    np.testing.assert_allclose(y.detach(), expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(h.detach()[-1, -1], last_h, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(c.detach()[-1, -1], last_c, rtol=1e-12, atol=1e-12)
    plain = made(3, 4, 2, batch_first=True)[0](x)[0]
    changes = training or bool(rates.zone_cell or rates.zone_hidden)
    assert torch.allclose(y, plain) != changes


def test_gradients_are_those_of_finite_differences_while_it_draws():
    lstm, _ = made(2, 3, 2, batch_first=True, rates=ALL)
    names = [name for name, _ in lstm.named_parameters()]

    def output(x, *values):
        given = {**dict(zip(names, values, strict=True)), "key": rng.as_tensor(4)}
        return functional_call(lstm, given, (x,))[0]

    leaves = [t.detach().requires_grad_() for t in (normal(1, 2, 4, 2), *lstm.parameters())]
    assert gradcheck(output, leaves)


def test_a_mask_is_the_same_at_every_step_and_another_for_each_sequence_and_layer():
    lstm = plain_cells(nn.LSTM(50, 50, 2))
    one, other = rng.as_tensor(1), rng.as_tensor(2)
    mask = lstm._mask(one, 0.4, 30, 50, torch.float64)
    assert sorted(mask.unique().tolist()) == [0.0, 1 / 0.6]
    assert not torch.equal(mask[0], mask[1])
    assert not torch.equal(mask, lstm._mask(other, 0.4, 30, 50, torch.float64))
    # 1,500 entries; four standard deviations of the mean: 1 in 16,000 alarms falsely
    assert abs((mask == 0).double().mean().item() - 0.4) < 4 * (0.24 / 1500) ** 0.5


def test_what_a_zoned_unit_keeps_is_copied_bit_for_bit():
    lstm, _ = made(3, 40, batch_first=True, rates=Rates(zone_hidden=0.5))
    y, _ = keyed(lstm, 3, normal(1, 4, 20, 3))
    kept = (y[:, 1:] == y[:, :-1]).double()
    # 4 * 19 * 40 = 3,040 draws of 0.5
    assert abs(kept.mean().item() - 0.5) < 4 * (0.25 / 3040) ** 0.5
    per_sequence = [tuple(row.flatten().tolist()) for row in kept]
    assert len(set(per_sequence)) == 4


def test_cell_and_hidden_zones_are_drawn_apart():
    lstm = made(3, 40, batch_first=True, rates=Rates(zone_cell=0.5, zone_hidden=0.5))[0]
    key = rng.fold_tensor(rng.as_tensor(3), 0)
    cells, hiddens = (
        torch.stack([*lstm._zones(rng.fold_tensor(key, n), 0.5, 4, 20, 40)]) for n in ("zone cell", "zone hidden")
    )
    agree = (cells == hiddens).double().mean().item()
    assert abs(agree - 0.5) < 4 * (0.25 / 3200) ** 0.5  # 3,200 entries


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 5), st.integers(0, 2**64 - 1))
@settings(deadline=None, max_examples=30)
def test_rows_added_at_the_end_of_a_batch_change_no_other(rows, more, time, key):
    lstm, _ = made(3, 4, 2, batch_first=True, rates=ALL)
    x = normal(5, rows + more, time, 3)
    assert torch.allclose(keyed(lstm, key, x)[0][:rows], keyed(lstm, key, x[:rows])[0], rtol=1e-12, atol=1e-14)


def test_it_can_be_mapped_over_clients():
    lstm, _ = made(3, 4, 2, batch_first=True, rates=ALL)
    embedding = nn.Embedding(7, 3).double()
    type_dropout(embedding, 0.3)
    model = nn.ModuleDict({"embedding": embedding, "lstm": lstm})

    def loss(params, keys, tokens):
        vectors = functional_call(
            embedding, {"weight": params["embedding.weight"], "key": keys["embedding.key"]}, tokens
        )
        own = {name.removeprefix("lstm."): t for name, t in {**params, **keys}.items() if name.startswith("lstm.")}
        return functional_call(lstm, own, (vectors,))[0].square().sum()

    clients = [p.of(model)[0]]
    clients += [{n: t + 0.1 * normal(rng.fold(s, n), *t.shape) for n, t in clients[0].items()} for s in (1, 2)]
    keys = {name: torch.arange(3) for name in key_names(model)}
    assert len(keys) == 2
    tokens = rng.bits(1, 3, 4, 5) % 7
    found = vmap(grad(loss))(p.stack(clients), keys, tokens)
    for lane, params in enumerate(clients):
        alone = grad(loss)(params, {name: key[lane] for name, key in keys.items()}, tokens[lane])
        assert all(torch.allclose(found[n][lane], g, rtol=1e-11, atol=1e-13) for n, g in alone.items())
    assert not torch.allclose(found["lstm.weight_hh_l0"][0], found["lstm.weight_hh_l0"][1])


def test_it_runs_under_autocast():
    lstm = plain_cells(nn.LSTM(3, 4, 2, batch_first=True)).train()
    x = rng.normal(1, 2, 5, 3)
    exact = lstm(x)[0]
    lstm.rates = Rates(zone_cell=0.1, p_hidden=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        assert bool(lstm(x)[0].isfinite().all())
        lstm.rates = Rates()
        assert torch.allclose(lstm(x)[0].float(), exact, atol=0.02)


def test_zoneout_carries_gradients_further_than_recurrent_dropout():
    """Of the last output with respect to the first input, over 20 keys: what zoneout is for."""

    def reach(rates):
        lstm, _ = made(3, 8, batch_first=True, rates=rates)
        norms = []
        for key in range(20):
            x = normal(key, 1, 12, 3).requires_grad_()
            keyed(lstm, key, x)[0][:, -1].sum().backward()
            norms.append(x.grad[0, 0].norm().item())
        return np.mean(norms)

    assert reach(Rates(zone_cell=0.5, zone_hidden=0.5)) > 3 * reach(Rates(p_hidden=0.5))


def test_conversion_keeps_the_object_its_names_hooks_and_bits():
    original = nn.LSTM(3, 4, 2)
    before, seen = {n: t.clone() for n, t in original.state_dict().items()}, []
    original.register_forward_hook(lambda *_: seen.append(1))
    lstm = plain_cells(original)
    assert lstm is original and type(lstm) is Lstm and plain_cells(lstm) is lstm
    assert p.same_bits(lstm.state_dict(), before)
    lstm(torch.zeros(2, 1, 3))
    assert seen == [1]


def test_one_that_is_built_has_torchs_names_and_first_weights():
    with rng.torch_seeded(3):
        own = Lstm(3, 4, 2, batch_first=True)
    with rng.torch_seeded(3):
        torchs = nn.LSTM(3, 4, 2, batch_first=True)
    assert p.same_bits(own.state_dict(), torchs.state_dict())
    assert key_names(own) == ("key",)


def test_it_can_be_copied_and_pickled():
    lstm, _ = made(3, 4, rates=ALL)
    x = normal(1, 5, 2, 3)
    for other in (copy.deepcopy(lstm), pickle.loads(pickle.dumps(lstm))):
        assert torch.equal(other(x)[0], lstm(x)[0]) and other.rates == ALL
        assert str(other) == "Lstm(3, 4, p_input=0.3, p_hidden=0.4, zone_cell=0.5, zone_hidden=0.2)"


class Somebodys(nn.LSTM):
    pass


@pytest.mark.parametrize(
    ("lstm", "named"),
    [
        (Somebodys(3, 4), "Somebodys"),
        (nn.LSTM(3, 4, bidirectional=True), "bidirectional=True"),
        (nn.LSTM(3, 4, proj_size=2), "proj_size=2"),
        (nn.LSTM(3, 4, 2, dropout=0.3), r"dropout=0\.3"),
    ],
)
def test_others_are_refused_and_left_as_they_are(lstm, named):
    kind = type(lstm)
    with pytest.raises(ValueError, match=f"needs .*got {named}"):
        plain_cells(lstm)
    assert type(lstm) is kind


def test_an_input_that_is_no_tensor_of_its_axes_is_refused():
    lstm = Lstm(3, 4)
    with pytest.raises(ValueError, match="got PackedSequence"):
        lstm(nn.utils.rnn.pack_sequence([torch.zeros(2, 3)]))
    with pytest.raises(ValueError, match=r"got shape \(1, 2, 2, 3\)"):
        lstm(torch.zeros(1, 2, 2, 3))


def dropped_types(embedding, tokens, key):
    vectors = functional_call(embedding, {"key": rng.as_tensor(key)}, (tokens,))
    return vectors, (vectors == 0).all(-1)


def test_a_dropped_type_is_dropped_everywhere_in_its_sequence():
    embedding = nn.Embedding(40, 3).double()
    original = copy.deepcopy(embedding)
    type_dropout(embedding, 0.3)
    tokens = rng.bits(3, 50, 80) % 40
    vectors, zero = dropped_types(embedding, tokens, 5)
    seen = []
    for row in range(50):
        for kind in range(40):
            own = zero[row][tokens[row] == kind]
            if len(own):
                assert bool(own.all()) or not bool(own.any())
                seen.append(float(own[0]))
    # types of one sequence each: four standard deviations
    assert abs(np.mean(seen) - 0.3) < 4 * (0.21 / len(seen)) ** 0.5
    assert torch.allclose(vectors[~zero], original(tokens)[~zero] / 0.7, rtol=1e-12)
    assert len({tuple(zero[row][:20].tolist()) for row in range(50)}) > 40  # each sequence has its own
    assert not torch.equal(zero, dropped_types(embedding, tokens, 6)[1])


def test_more_rows_and_longer_ones_change_no_type():
    embedding = nn.Embedding(9, 3)
    type_dropout(embedding, 0.5)
    tokens = rng.bits(3, 6, 8) % 9
    whole = dropped_types(embedding, tokens, 5)[0]
    assert torch.equal(dropped_types(embedding, tokens[:4, :5], 5)[0], whole[:4, :5])


def test_in_evaluation_no_type_is_dropped():
    embedding = nn.Embedding(9, 3)
    tokens = torch.arange(9)[None]
    before = embedding(tokens)
    type_dropout(embedding, 0.9)
    assert torch.equal(embedding.eval()(tokens), before)
    assert str(embedding) == "TypeDropout(9, 3, p=0.9)"


def test_types_are_dropped_once_and_by_nobody_elses_class():
    embedding = nn.Embedding(9, 3)
    type_dropout(embedding, 0.5)
    assert type(embedding) is TypeDropout
    with pytest.raises(ValueError, match="already"):
        type_dropout(embedding, 0.5)

    class Own(nn.Embedding):
        pass

    with pytest.raises(ValueError, match=r"needs nn.Embedding itself.*got Own"):
        type_dropout(Own(2, 2), 0.5)
