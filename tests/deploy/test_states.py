import pytest
import torch

from fedsim.deploy.states import KEPT, States

RUN, OTHER = "a" * 32, "b" * 32


def state(value):
    return {"w": torch.full((2,), float(value)), "tied": torch.arange(3)}


def test_the_newest_state_from_before_a_round(tmp_path):
    states = States(tmp_path)
    assert states.before(RUN, 1) is None
    for round in (2, 4, 7):
        states.keep(RUN, round, state(round))
    assert states.before(RUN, 2) is None
    found = {round: states.before(RUN, round)["w"][0].item() for round in (3, 4, 5, 7, 8, 100)}
    assert found == {3: 2, 4: 2, 5: 4, 7: 4, 8: 7, 100: 7}
    assert states.before(OTHER, 8) is None
    assert torch.equal(states.before(RUN, 8)["tied"], torch.arange(3))


def test_rounds_after_a_resumed_one_are_forgotten_and_old_ones_are_not_kept(tmp_path):
    states = States(tmp_path)
    for round in (1, 2, 3, 4, 5):
        states.keep(RUN, round, state(round))
    assert len(list((tmp_path / RUN).iterdir())) == KEPT
    states.keep(RUN, 4, state(40))
    assert states.before(RUN, 9)["w"][0] == 40 and states.before(RUN, 4)["w"][0] == 3


def test_a_rule_without_state_writes_nothing(tmp_path):
    States(tmp_path).keep(RUN, 1, {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("run", ["", "../" + "a" * 29, "A" * 32, "a" * 33, "a" * 31 + "\n"])
def test_the_servers_word_for_a_run_is_no_path(run, tmp_path):
    with pytest.raises(ValueError, match="must be 32 hexadecimal digits"):
        States(tmp_path / "in").keep(run, 1, state(1))
    assert not list(tmp_path.iterdir())
