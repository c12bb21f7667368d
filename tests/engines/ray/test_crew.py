"""Actors on two nodes give the bits of one process, whoever does what, and whoever is lost on the way."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from fedsim.engines.ray import ray
from fedsim.errors import ClientError, DivergedError, RunError
from fedsim.federation import job

pytestmark = pytest.mark.slow
crew = pytest.importorskip("fedsim.engines.ray.crew", reason="needs Ray: pip install 'fedsim-flower[ray]'")


def killed_when_there(marker: Path, pid_of):
    """A thread that waits for an actor to say that it is in the middle of its work, and then kills."""

    def wait():
        while not (marker.exists() and marker.read_text()):
            time.sleep(0.02)
        os.kill(pid_of(int(marker.read_text())), signal.SIGKILL)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "sequential", "precision": "bf16"},
        {"mode": "vectorised", "chunk": 5, "actors": 3},
        {"mode": "fused", "chunk": 3, "actors": 1, "plain": True},
    ],
    ids=lambda options: options["mode"],
)
def test_bits_and_numbers_are_those_of_one_process(cluster, second, same, options):
    """Three actors are one more than the cluster has CPUs for: it never starts, and nobody waits for it."""
    how = {key: options[key] for key in ("chunk", "plain") if key in options}
    same(ray(address=cluster.address, **{key: options[key] for key in options if key not in how}), **how)


def test_every_node_takes_part(cluster, second, same, rules, tmp_path):
    same(ray(address=cluster.address, mode="sequential"), rules.telling(tmp_path, 2))
    assert {int(file.name) for file in tmp_path.iterdir()} == {cluster.nodes[0].raylet(), second.raylet()}


def test_an_actor_that_is_killed_is_replaced_and_its_clients_are_trained_again(cluster, same, rules, tmp_path, capfd):
    marker = tmp_path / "marker"
    killer = killed_when_there(marker, lambda pid: pid)
    lost = r"was lost \(its worker process has died\); clients \d+ to \d+ \(2 of them\) are done again$"
    with pytest.warns(UserWarning, match=r"^round 2: an actor on node [\d.]+ " + lost):
        same(ray(address=cluster.address, mode="sequential"), rules.halting(marker))
    killer.join()
    assert capfd.readouterr() == ("", "")


def test_a_node_that_is_lost_is_done_without(cluster, second, same, rules, tmp_path):
    marker, raylet = tmp_path / "marker", second.raylet()
    killer = killed_when_there(marker, lambda pid: raylet)
    with pytest.warns(UserWarning, match=r"^round 2: an actor on node [\d.]+ was lost \(it[^\n]+\); clients"):
        same(ray(address=cluster.address, mode="sequential"), rules.halting(marker, raylet))
    killer.join()
    assert second.raylet() == 0 and cluster.nodes[0].raylet()


@pytest.mark.filterwarnings("ignore:round 2. an actor")
def test_clients_that_end_three_actors_end_the_run(cluster, federation, outcome, rules, tmp_path):
    made = federation(rule=rules.deadly(tmp_path))
    engine = ray(address=cluster.address, mode="sequential", actors=1)
    engine = engine.prepared(job(made), {"path": "sequential", "chunk": 1})
    with pytest.raises(RunError, match=r"^round 2: 3 actors were lost over clients \d+ to \d+ \(1 of them\)"):
        outcome(made, engine)
    assert len(list(tmp_path.iterdir())) == 3


def test_what_goes_wrong_in_training_comes_out_as_it_would_elsewhere(cluster, federation, outcome, rules):
    engine = ray(address=cluster.address, mode="sequential", actors=1)
    broken = federation()
    broken.data.train.inputs[broken.data.partition.client(3)] = float("inf")
    with pytest.raises(DivergedError, match=r"^round 1, client 3: training diverged: .*lower train.optimizer.lr"):
        outcome(broken, engine)
    with pytest.raises(ClientError, match=r"^round 2, client \d+: ZeroDivisionError: of the rule$") as error:
        outcome(federation(rule=rules.raising()), engine)
    assert type(error.value) is ClientError


def test_an_actor_without_room_is_not_waited_for_forever(cluster, federation, outcome, monkeypatch):
    monkeypatch.setattr(crew, "START_S", 3.0)
    import ray as real

    real.init(cluster.address, log_to_driver=False, logging_level="ERROR")
    try:
        holder = real.remote(num_cpus=1)(type("Holder", (), {"there": lambda self: True})).remote()
        assert real.get(holder.there.remote())
        with pytest.raises(RunError, match="round 0: no actor could start within 3 s; the cluster has 1 CPUs, 0 of"):
            outcome(federation(), ray(address="auto", mode="sequential"))
        assert real.is_initialized() and real.get(holder.there.remote())
    finally:
        real.shutdown()


def test_a_node_with_something_else_is_refused(cluster, federation, outcome, monkeypatch):
    monkeypatch.setattr(crew, "versions", lambda: {"fedsim": "9.9", "python": "3", "torch": "2"})
    with pytest.raises(RunError, match=r"^node [\d.]+ has fedsim 0.1.0, but this machine 9.9; they must be the same$"):
        outcome(federation(), ray(address=cluster.address, mode="sequential"))


def test_a_module_that_a_node_lacks_is_named(cluster, federation, outcome, rules, monkeypatch):
    monkeypatch.setattr(crew.sys, "path", [folder for folder in crew.sys.path if not folder.endswith("engines/ray")])
    with pytest.raises(RunError, match=r"node [\d.]+ cannot take the job: ModuleNotFoundError: No module .*ray_rules"):
        outcome(federation(), ray(address=cluster.address, mode="sequential"))


def test_nodes_of_several_kinds_are_warned_of():
    hello = ("10.0.0.2", crew.versions(), "one kind")
    assert crew.introduced(hello, set()) == crew.introduced(hello, {"one kind"}) == ("10.0.0.2", "one kind")
    with pytest.warns(UserWarning, match=r"^node 10.0.0.2 has another processor \(one kind, those before it other\)"):
        assert crew.introduced(hello, {"other"}) == ("10.0.0.2", "one kind")
