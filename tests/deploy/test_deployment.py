"""Federations of real processes over TLS with keys: the numbers of ``reference``, and what happens when one dies."""

import contextlib
import json
import os
import signal
import socket
import subprocess
from pathlib import Path

import pytest
import slow_network
from deployment import Deployment, wait

import fedsim
from fedsim import params as p
from fedsim import runs
from fedsim.deploy import authority

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc"),
]

EXACT = ("round", "loss", "accuracy", "train_loss", "clients", "cohort", "skipped")


@pytest.fixture
def deploy(tmp_path):
    made = []

    def start(**more):
        made.append(Deployment(tmp_path, **more))
        return made[-1]

    yield start
    for one in made:
        one.close()


def all_gone(one, seconds=15):
    wait(lambda: not one.left(), seconds, lambda: f"still there: {one.left()}\n{one.told()}")
    host, _, port = one.address.rpartition(":")
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind((host, int(port)))


def equal_to_reference(one):
    """The lines of the run, of which all are those of the same config in one process."""
    found = fedsim.run(one.folder / "config.yaml", {"engine": "reference", "output": str(one.folder / "reference")})
    lines, rounds = one.lines(), found.rounds
    assert [[line[key] for key in EXACT] for line in lines] == [
        [list(getattr(r, key)) if isinstance(getattr(r, key), tuple) else getattr(r, key) for key in EXACT]
        for r in rounds
    ]
    assert fedsim.verify(one.run(), "all").status == "equal"
    return found


def test_three_clients_and_a_server_give_the_numbers_of_reference(deploy):
    one = deploy()
    for k in range(3):
        one.client(k)
    one.server()
    assert one.ends("server") == 0, one.told()
    assert [one.ends(f"client-{k}") for k in range(3)] == [0, 0, 0], one.told()
    all_gone(one)
    found = equal_to_reference(one)
    assert (one.run() / "report.html").exists()
    clients = [json.loads(line) for line in (one.run() / "clients.jsonl").read_text().splitlines()]
    expected = [(e.round, e.client, e.num_examples, e.accuracy) for e in found.clients]
    assert [(e["round"], e["client"], e["num_examples"], e["accuracy"]) for e in clients] == expected
    assert "joined as client 1" in one.said("client-1") and "Traceback" not in one.told()


def test_clients_keep_their_batch_norm_and_the_loss_is_that_of_their_own_models(deploy):
    one = deploy(rounds=3)
    config = one.folder / "config.yaml"
    text = config.read_text().replace("hidden: [16]", "hidden: [16], norm: batch")
    config.write_text(text.replace("batch_size: 32", "batch_size: 32, batch_norm: local"))
    one.server()
    for k in range(3):
        one.client(k)
    assert one.ends("server") == 0, one.told()
    found = fedsim.run(config, {"engine": "reference", "output": str(one.folder / "reference")})
    for line, record in zip(one.lines(), found.rounds, strict=True):
        assert (line["train_loss"], line["cohort"]) == (record.train_loss, list(record.cohort))
        assert line["loss"] == pytest.approx(record.loss, rel=1e-6)
        assert line["accuracy"] == pytest.approx(record.accuracy)
    ours, theirs = (runs.load_checkpoint(folder) for folder in (one.run(), found.folder))
    assert not ours.clients and set(theirs.clients) == {0, 1, 2}
    assert p.same_bits(ours.params, theirs.params) and p.same_bits(ours.buffers, theirs.buffers)
    assert fedsim.verify(one.run(), "all").status == "equal"


def test_the_supported_way_gives_the_same_numbers(deploy):
    one = deploy(clients=2, rounds=2, stock=True)
    one.server()
    for k in range(2):
        one.client(k)
    assert one.ends("server", 180) == 0, one.told()
    assert [one.ends(f"client-{k}", 60) for k in range(2)] == [0, 0], one.told()
    all_gone(one)
    equal_to_reference(one)


def test_without_certificates_on_loopback(deploy):
    one = deploy(clients=2, rounds=2, secure=False)
    one.server()
    for k in range(2):
        one.client(k)
    assert one.ends("server") == 0, one.told()
    equal_to_reference(one)


def test_a_client_killed_in_mid_run_is_named_and_comes_back(deploy):
    one = deploy(rounds=60)
    one.server("--min-clients", 2)
    for k in range(3):
        one.client(k)
    one.until_round(2)
    os.killpg(one.processes["client-1"].pid, signal.SIGKILL)
    wait(lambda: any("1" in line["failed"] for line in one.lines()), 60, one.told)
    missed = next(line for line in one.lines() if "1" in line["failed"])
    assert missed["clients"] == 2 and list(missed["failed"]) == ["1"]
    one.client(1)
    after = len(one.lines())
    wait(lambda: any(1 in line["cohort"] for line in one.lines()[after:]), 60, one.told)
    one.processes["server"].send_signal(signal.SIGINT)
    assert one.ends("server") == 130
    assert "go on with: fedsim server --listen" in one.said("server")


@pytest.mark.parametrize("victim", ["server", "superlink"])
def test_a_server_killed_and_resumed_gives_the_same_numbers_and_clients_reconnect(victim, deploy):
    one = deploy(clients=2, rounds=8)
    for k in range(2):
        one.client(k)
    one.server()
    one.until_round(3)
    if victim == "server":
        one.processes["server"].kill()
        one.ends("server")
    else:
        for pid, command in one.left():
            if b"superlink" in command:
                os.kill(pid, signal.SIGKILL)
        assert one.ends("server") == 4, one.told()
        assert "SuperLink" in one.said("server") and "Traceback" not in one.said("server")
    done = len(one.lines())
    assert done < 8
    one.resume(one.run())
    assert one.ends("server") == 0, one.told()
    assert [one.ends(f"client-{k}") for k in range(2)] == [0, 0], one.told()
    equal_to_reference(one)
    all_gone(one)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_any_process_ends_with_its_children(number, deploy):
    one = deploy(clients=2, rounds=200)
    one.server()
    for k in range(2):
        one.client(k)
    one.until_round(1)
    for name in ("client-0", "client-1", "server"):
        one.processes[name].send_signal(number)
    codes = [one.ends(name, 15) for name in ("client-0", "client-1", "server")]
    assert codes == [-9 if number == signal.SIGKILL else 130] * 3, one.told()
    all_gone(one)
    assert "Traceback" not in one.told()


def test_too_few_clients(deploy):
    one = deploy(clients=2)
    one.client(1)
    one.server("--wait", 8)
    assert one.ends("server") == 4
    assert "waiting for client 0: 1 of 2 needed are here" in one.said("server"), one.told()
    assert "error: gave up after 8 s, still missing client 0: 1 of 2 needed are here" in one.said("server")


def test_a_client_with_another_config_or_an_unregistered_key_is_told(deploy):
    one = deploy(clients=2, rounds=2)
    one.server("--wait", 60)
    one.client(0, "train.optimizer.lr=0.2")
    one.until("client-0", "cannot take part: train.optimizer.lr is 0.2 here, 0.1 at the server")
    one.until("server", "refused client 0: train.optimizer.lr is 0.2 here, 0.1 at the server")
    (one.folder / "strange").mkdir()
    authority.make(one.folder / "strange", ["127.0.0.1"], 2)
    (one.folder / "strange" / "client-1" / "ca.crt").write_bytes((one.folder / "certs" / "ca.crt").read_bytes())
    fixed = ("--server", one.address, "--partition", 1, "--state", one.folder / "strange-state", "--certs", "strange")
    stranger = one.start("stranger", "client", "config.yaml", *fixed)
    assert stranger.wait(60) == 4, one.told()
    assert "key" in one.said("stranger") and "Traceback" not in one.said("stranger")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MB."""
    place = tmp_path / "small"
    place.mkdir()
    if run("mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", place).returncode:
        pytest.skip("may not mount a file system here")
    yield place
    run("umount", "--lazy", place)


def test_a_full_disk_leaves_the_last_round_and_exit_code_4(deploy, small_disk):
    one = deploy(clients=2, rounds=200)
    one.server("output=small")
    for k in range(2):
        one.client(k)
    wait(
        lambda: list(small_disk.glob("*/rounds.jsonl")) and list(small_disk.glob("*/checkpoint/state.json")),
        60,
        one.told,
    )
    one.until("server", "round 2/200")
    full = os.open(small_disk / "full", os.O_WRONLY | os.O_CREAT)
    with contextlib.suppress(OSError):
        while True:
            os.write(full, bytes(4096))
    os.close(full)
    assert one.ends("server") == 4, one.told()
    assert "cannot be written: No space left on device" in one.said("server"), one.told()
    assert "Traceback" not in one.said("server")
    (made,) = small_disk.glob("apart-*")
    state = runs.load_checkpoint(made)  # whole, by its length and hash
    assert state.round >= 1
    (small_disk / "full").unlink()
    one.resume(made)
    one.until("server", f"round {state.round + 2}/200")


def run(*command):
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)


@pytest.fixture
def far_apart():
    """A server's host and two clients', 50 ms there and back, where one packet in a hundred is lost."""
    with contextlib.ExitStack() as stack:
        try:
            made = stack.enter_context(slow_network.hosts(2, delay_s=0.025, loss=0.01))
        except slow_network.NoNetworksError as error:
            pytest.skip(f"no networks of our own here: {error}")
        yield made


def test_three_hosts_with_a_slow_and_lossy_network_give_the_numbers_of_reference(deploy, far_apart):
    (server, *clients), dropped = far_apart
    names = {"server": server, **{f"client-{k}": name for k, name in enumerate(clients)}}
    one = deploy(clients=2, rounds=5, host="0.0.0.0", names=[f"10.77.{k}.1" for k in range(2)])
    one.prefix = {name: ["ip", "netns", "exec", host] for name, host in names.items()}
    one.server()
    for k in range(2):
        one.client(k, server=f"10.77.{k}.1")
    assert one.ends("server", 180) == 0, one.told()
    assert [one.ends(f"client-{k}") for k in range(2)] == [0, 0], one.told()
    assert dropped
    equal_to_reference(one)
