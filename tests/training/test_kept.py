"""Tensors that stay with a client, in its state beside what the strategy keeps there."""

import torch
from torch import nn

from fedsim.training import kept


def model():
    made = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    made[0].bias.requires_grad_(False)
    return made


NAMES = ("1.weight", "1.running_mean", "0.bias")


def test_what_never_took_part_has_the_models_first_values_parameters_apart_from_the_rest():
    made = model()
    own = kept.own(made, NAMES, {"1.weight": torch.tensor(9.0)})  # of the rule, which has names of its own
    assert list(own.params) == ["1.weight"] and list(own.buffers) == ["1.running_mean", "0.bias"]
    assert torch.equal(own.params["1.weight"], torch.ones(3)) and torch.equal(own.buffers["0.bias"], made[0].bias)
    assert not own.params["1.weight"].requires_grad


def test_what_was_put_into_a_state_comes_out_of_it_beside_the_rules():
    tensors = {name: torch.full((3,), float(i)) for i, name in enumerate(NAMES)}
    rule = {"1.weight": torch.tensor(9.0), "control": torch.tensor(8.0)}
    state = rule | kept.as_state({**tensors, "0.weight": torch.zeros(1)}, NAMES)
    own = kept.own(model(), NAMES, state)
    assert {**own.params, **own.buffers} == tensors
    assert kept.rule_state(state) == rule


def test_a_clients_whole_model_is_what_is_sent_with_what_it_keeps_under_its_own_masks():
    sent = kept.Own({"0.weight": torch.tensor([[1.0, -2.0], [3.0, 4.0], [-5.0, 6.0]])}, {"n": torch.tensor(7)})
    ticket = {"ticket/0.weight": torch.tensor([[True, False], [False, True], [True, True]])}
    state = {**ticket, "kept/1.weight": torch.tensor([8.0, 9.0, 10.0]), "control": torch.ones(1)}
    found = kept.whole(model(), ("1.weight",), sent, state)
    assert found.params["0.weight"].tolist() == [[1, 0], [0, 4], [-5, 6]]
    assert found.params["1.weight"].tolist() == [8, 9, 10] and found.buffers == sent.buffers
    assert kept.whole(model(), (), sent, {}) == sent


def test_what_is_sent_is_the_rest_and_everything_where_nothing_is_kept():
    tensors = {"0.weight": torch.zeros(1), **dict.fromkeys(NAMES, torch.ones(1))}
    assert list(kept.shared(tensors, NAMES)) == ["0.weight"]
    assert kept.shared(tensors, ()) is tensors
    assert kept.own(model(), (), {}) == ({}, {})
