"""A private Ray comes and goes with its run; a cluster stays. Neither leaves a trace in the process."""

import os
import signal

import pytest

from fedsim.engines.ray import ray
from fedsim.errors import RunError

pytestmark = pytest.mark.slow
real = pytest.importorskip("ray", reason="needs Ray: pip install 'fedsim-flower[ray]'")
cluster_module = pytest.importorskip("fedsim.engines.ray.cluster")


def test_a_private_ray_is_gone_after_the_run_whatever_happens(monkeypatch, own_raylet):
    """Meanwhile SIGTERM means what it meant before, not what Ray takes it for."""
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # nobody asked for it
    seen = []

    def handler(number, frame):
        seen.append(number)

    before = signal.signal(signal.SIGTERM, handler)
    try:
        with pytest.raises(ZeroDivisionError), cluster_module.attached(None, 3):
            assert cluster_module.cpus() == cluster_module.free_cpus() == 3 and own_raylet()
            os.kill(os.getpid(), signal.SIGTERM)
            1 / 0  # noqa: B018
        assert seen == [signal.SIGTERM] and signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not real.is_initialized() and not own_raylet()


def test_a_client_of_the_cluster_gives_the_same_bits(cluster, same):
    """Ray's client server forks while gRPC is at work, which leaves it hanging or dead at times: asked again then."""
    for attempt in range(3):
        try:
            same(ray(address=f"ray://127.0.0.1:{cluster.client_port}", mode="sequential"))
            return
        except RunError as error:
            failed = ("Starting Ray client server failed", "Initialization failure from server")
            if attempt == 2 or not any(what in str(error) for what in failed):
                raise


def test_an_attached_cluster_stays(cluster, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    for _ in range(2):
        with cluster_module.attached("auto", 9):
            assert cluster_module.cpus() == 1
        assert not real.is_initialized() and cluster.nodes[0].raylet()


def test_a_process_that_is_attached_elsewhere_is_not_attached_again(cluster):
    real.init(cluster.address, log_to_driver=False, logging_level="ERROR")
    try:
        told = "^engine.address: this process is attached to Ray already; use address: auto.*got None$"
        with pytest.raises(RunError, match=told), cluster_module.attached(None, 1):
            pass
        with cluster_module.attached("auto", 1):
            assert cluster_module.cpus() == 1
        assert real.is_initialized()
    finally:
        real.shutdown()


@pytest.mark.parametrize("address", ["auto", "127.0.0.1:1", "ray://127.0.0.1:1", "nonsense"])
def test_where_there_is_no_cluster_the_address_is_named(address, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    told = f"^engine.address: cannot attach to Ray at {address}: [^\n]+$"
    with pytest.raises(RunError, match=told), cluster_module.attached(address, 1):
        pass
    assert not real.is_initialized()
