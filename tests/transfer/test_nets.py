import pytest
import torch
from torch import nn
from torch.func import functional_call
from transfer_pairs import HIDDEN, NETS, normal, side

from fedsim import params as p
from fedsim import rng
from fedsim.models.zoo import MODELS
from fedsim.training.regularizers import REGULARIZERS, bind
from fedsim.transfer.nets import jacobian, net_of, rows


@pytest.mark.parametrize("kind", list(NETS))
def test_in_prediction_rows_are_the_models_outputs(kind):
    one = side("a", kind)
    found = rows(one.net, one.params, one.rows.inputs, key=None)
    expected = functional_call(one.net.model.eval(), one.params, (one.rows.inputs,))
    torch.testing.assert_close(found.values, expected, rtol=1e-12, atol=1e-12)


def test_hidden_values_are_linear_in_what_the_head_is_given():
    one = side("b", "dropout")
    found = rows(one.net, one.params, one.rows.inputs, key=5)
    weight, bias = (one.params[name] for name in one.net.head_names)
    torch.testing.assert_close(found.features @ weight.T + bias, found.values, rtol=1e-12, atol=1e-12)


def test_rows_draw_each_their_own_units_and_the_same_again():
    one = side("b", "dropout")
    same = one.rows.inputs[:1].expand(40, -1)
    first, again, other = (rows(one.net, one.params, same, key=key).features for key in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len({tuple(row.tolist()) for row in (first == 0)}) > 5
    torch.testing.assert_close(rows(one.net, one.params, same[:7], key=1).features, first[:7])


@pytest.mark.parametrize("kind", ["mlp", "deep", "dropout"])
def test_the_jacobian_is_that_of_finite_differences(kind):
    one, step = side("a", kind), 1e-6
    found = jacobian(one.net, one.params, one.rows.inputs, key=9)
    at = 0
    for name in one.net.body_names(one.params):
        for entry in range(one.params[name].numel()):
            moved = []
            for sign in (1, -1):
                changed = one.params[name].clone()
                changed.view(-1)[entry] += sign * step
                moved.append(rows(one.net, {**one.params, name: changed}, one.rows.inputs, key=9).values)
            torch.testing.assert_close(found[:, :, at], (moved[0] - moved[1]) / (2 * step), rtol=1e-6, atol=1e-7)
            at += 1
    assert at == found.shape[2]


def test_a_head_that_is_not_plain_is_no_head():
    with rng.torch_seeded(1):
        model = MODELS["mlp"]((6,), HIDDEN, hidden=[4])
    bind(model, [REGULARIZERS["dropconnect"]()])
    net = net_of(model, normal(1, 6))
    found = rows(net, p.of(model)[0], normal(2, 3, 6), key=1)
    if net.head is not None:  # dropconnect has left the last layer alone
        assert found.features.shape == (3, 4)
    bounded = nn.Sequential(nn.Linear(6, HIDDEN), nn.Tanh())
    assert net_of(bounded, normal(1, 6)).head is None
    with pytest.raises(ValueError, match="trains: head needs a model that ends in a plain linear layer"):
        net_of(bounded, normal(1, 6), only_head=True)


def test_convolutions_go_row_by_row_as_well():
    with rng.torch_seeded(1):
        model = MODELS["cnn"]((1, 8, 4), HIDDEN)
    inputs = normal(2, 3, 1, 8, 4)
    net = net_of(model, inputs[0])
    found = rows(net, p.of(model)[0], inputs, key=None).values
    torch.testing.assert_close(found, model.eval()(inputs), rtol=1e-10, atol=1e-10)
