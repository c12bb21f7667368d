"""Flower's Simulation Runtime gives the numbers of the plain loop. Tests that start Ray take ten seconds and more."""

import importlib.util
import pickle
import threading
from dataclasses import replace
from importlib.metadata import version

import federations
import flwr
import pytest
import torch
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.supercore.logger import FLOWER_LOGGER
from flwr.supercore.task_identity import TaskIdentity

from fedsim import federation as f
from fedsim import params as p
from fedsim.engines.flower import flower
from fedsim.engines.flower.apps import GridCohorts
from fedsim.engines.flower.grid import InProcessGrid
from fedsim.engines.flower.process import task_identity
from fedsim.engines.flower.simulation import Rides, riding_app
from fedsim.engines.reference import reference
from fedsim.errors import DivergedError, MissingDependencyError, RunError


def small(case="states", rounds=2):
    """Three clients of unequal sizes, two in a round."""
    made = federations.federation(case)
    kept = made.data.partition
    partition = type(kept)(kept.offsets[:4], kept.indices[: kept.offsets[3]])
    nobody = type(kept)(kept.offsets[:4] * 0, kept.indices[:0])
    data = replace(made.data, partition=partition, test_partition=nobody)
    return replace(made, data=data, clients_per_round=2, rounds=rounds)


def assert_equal(a, b):
    assert a[1] == b[1]
    assert p.same_bits(federations.tensors(a[0]), federations.tensors(b[0]))
    assert a[0].clients.keys() == b[0].clients.keys()


def without_bytes(found):
    return found[0], [replace(record, bytes_up=0, bytes_down=0) for record in found[1]], found[2]


@pytest.mark.slow
def test_two_rounds_equal_the_reference_bit_for_bit_in_one_go_and_resumed(capfd):
    before = FLOWER_LOGGER.level, vars(TaskIdentity).get("_task_id"), torch.get_num_threads()
    simulation, made = flower(runtime="simulation"), small()
    whole = federations.result(made, simulation)
    assert_equal(whole, federations.result(made, flower()))  # bytes, too: a state is not among them
    assert_equal(without_bytes(whole), without_bytes(federations.result(made, reference())))
    assert whole[0].clients
    first = federations.result(replace(made, rounds=1), reference())
    rest = federations.result(made, simulation, first[0])
    assert_equal(rest, (whole[0], whole[1][-1:], None))
    assert (FLOWER_LOGGER.level, vars(TaskIdentity).get("_task_id"), torch.get_num_threads()) == before
    assert [t.name for t in threading.enumerate() if not t.daemon] == ["MainThread"]
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_a_client_that_diverges_in_an_actor_fails_the_run_by_name(capfd):
    made = small()
    made.data.train.inputs[torch.from_numpy(made.data.partition.client(1))] = torch.inf
    with pytest.raises(DivergedError, match="round 1, client 1: training diverged"):
        federations.result(made, flower(runtime="simulation"))
    assert [t.name for t in threading.enumerate() if not t.daemon] == ["MainThread"]
    assert capfd.readouterr() == ("", "")


class Scattered(InProcessGrid):
    """Nodes in an order of their own, not all there at first, replies in reverse: what another grid may do."""

    looked = 0

    def get_node_ids(self):
        self.looked += 1
        return [4, 2, 3][: self.looked]


def riding(made, tmp_path, stop=None):
    """fedsim's loop over riding states, without Ray."""
    job = f.job(made)
    path = tmp_path / "job"
    path.write_bytes(pickle.dumps(([], pickle.dumps(job))))

    class Engine:
        def drive(self, job, loop):
            grid = Scattered(riding_app(str(path)), 3)
            rides = Rides(grid, stop or threading.Event())
            grid.send_and_receive = rides.exchange
            with task_identity():
                loop(GridCohorts(grid, job, rides.nodes(3), rides.states))
            self.grid, self.rides = grid, rides

    return Engine()


def test_states_ride_in_messages_and_leave_nothing_on_the_nodes(tmp_path):
    made = small(rounds=3)
    engine = riding(made, tmp_path)
    assert_equal(federations.result(made, engine), federations.result(made, flower()))
    assert engine.grid.states == engine.rides.states == {}


def test_a_node_is_found_by_its_partition(tmp_path):
    rides = Rides(Scattered(riding_app("nowhere"), 3), threading.Event())
    with task_identity():
        assert rides.nodes(3) == [2, 3, 4]


def test_a_client_that_raises_in_an_actor_is_told_in_one_line(tmp_path):
    grid = InProcessGrid(riding_app(str(tmp_path / "nothing")), 1)
    with task_identity():
        (reply,) = grid.send_and_receive([Message(RecordDict({"c": ConfigRecord()}), 2, "train")])
    assert reply.error.reason.startswith("FileNotFoundError: ")
    assert "\n" not in reply.error.reason


def test_waiting_ends_with_the_runtime(tmp_path):
    stop = threading.Event()
    stop.set()
    with task_identity(), pytest.raises(RunError, match="has ended"):
        Rides(Scattered(riding_app("nowhere"), 3), stop).nodes(3)


def test_nodes_that_do_not_come_are_an_error(monkeypatch):
    monkeypatch.setattr("fedsim.engines.flower.simulation.NODES_S", 0.0)
    with pytest.raises(RunError, match="has 1 of 4 nodes after 0 s"):
        Rides(Scattered(riding_app("nowhere"), 4), threading.Event()).nodes(4)


def test_the_engine_of_the_config_is_the_simulation():
    said = flower(runtime="simulation").describe()
    assert said == {"name": "flower", "runtime": "simulation", "flwr": flwr.__version__, "ray": version("ray")}


def test_without_ray_the_extra_is_named_before_anything_runs(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"engine: runtime: simulation needs .*fedsim-flower\[ray\]"):
        flower(runtime="simulation").prepared(f.job(small()), {})
