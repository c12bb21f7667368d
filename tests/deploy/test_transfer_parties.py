"""Parties as their users start them: real processes, TLS with certificates, and Flower's SuperLink in between."""

import json
import time
from pathlib import Path

import pytest
from deployment import Deployment, wait
from safetensors.torch import load_file

import fedsim
from fedsim.deploy.party_certificates import write_party_certificates
from fedsim.params import same_bits

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc"),
]

CONFIG = """
name: two
seed: 5
data: {dataset: breast-cancer}
model: {name: mlp, hidden: [5]}
train: {optimizer: {name: adam, lr: 0.02}}
transfer: {protocol: secret-sharing, overlap: 30, labelled: 20, hidden: 4, iterations: 3}
"""


@pytest.fixture
def parties(tmp_path):
    one = Deployment(tmp_path, clients=3)
    (tmp_path / "config.yaml").write_text(CONFIG)
    write_party_certificates(tmp_path / "pki")
    yield one
    one.close()


def start(parties, role, *arguments):
    given = ("transfer-party", "config.yaml", "--role", role, "--certs", "pki", "--wait", "60")
    return parties.start(role, *given, *arguments)


def folder_of(parties, role):
    """The folder of the run of a party."""
    found = []
    for path in (parties.folder / "runs").glob("*/summary.json"):
        if json.loads(path.read_text())["transfer"].get("role") == role:
            found.append(path.parent)
    (only,) = found
    return only


def equal_to_one_process(parties, *overrides):
    """Both parties' nets are, bit for bit, those of a run in one process; B's accuracy is, too."""
    changes = dict(one.split("=") for one in overrides)
    here = fedsim.run(parties.folder / "config.yaml", {"output": str(parties.folder / "here"), **changes})
    for role in "ab":
        name = f"party-{role}.safetensors"
        assert same_bits(load_file(folder_of(parties, role) / name), load_file(here.folder / name))
    summary = json.loads((folder_of(parties, "b") / "summary.json").read_text())
    assert summary["accuracy"] == here.summary["accuracy"]
    assert (folder_of(parties, "a") / "report.html").exists()


@pytest.mark.parametrize("protocol", ["paillier", "plain"])
def test_two_parties_over_tls_train_the_nets_of_one_process(parties, protocol):
    override = f"transfer.protocol={protocol}"
    start(parties, "a", override, "--listen", parties.address)
    start(parties, "b", override, "--connect", parties.address)
    assert parties.ends("a") == parties.ends("b") == 0, parties.told()
    equal_to_one_process(parties, override)
    assert not parties.left()


def test_a_helper_deals_triples_over_tls(parties):
    helper = f"127.0.0.1:{int(parties.address.rpartition(':')[2]) - 1}"
    start(parties, "helper", "--listen", helper)
    start(parties, "b", "--listen", parties.address, "--helper", helper)
    start(parties, "a", "--connect", parties.address, "--helper", helper)
    assert [parties.ends(name) for name in ("a", "b", "helper")] == [0, 0, 0], parties.told()
    assert "dealt triples 4 times" in parties.said("helper")  # three iterations and the predictions
    equal_to_one_process(parties)


def test_parties_behind_flowers_superlink_train_the_nets_of_one_process(parties):
    parties.server("--wait", "60")
    for client in range(3):
        parties.client(client)
    assert [parties.ends(name, 120) for name in ("server", "client-0", "client-1", "client-2")] == [0] * 4, (
        parties.told()
    )
    assert "bytes that only the parties can read" in parties.said("server")
    assert "accuracy" in parties.said("client-1")
    equal_to_one_process(parties)
    assert not parties.left()


def test_other_configs_are_named_at_both_ends(parties):
    start(parties, "a", "transfer.triples=paillier", "--listen", parties.address)
    start(parties, "b", "transfer.triples=paillier", "transfer.gamma=0.5", "--connect", parties.address)
    assert parties.ends("a") == parties.ends("b") == 4
    for role in "ab":
        assert "transfer.gamma: must be the same at both parties" in parties.said(role)
        assert "Traceback" not in parties.said(role)
    assert not list((parties.folder / "runs").glob("*/party-*.safetensors"))


def test_a_killed_party_is_noticed_and_no_net_is_left(parties):
    many = ("transfer.protocol=paillier", "transfer.iterations=10000")
    start(parties, "a", *many, "--listen", parties.address)
    start(parties, "b", *many, "--connect", parties.address)
    wait(lambda: "iteration 1 " in parties.said("a"), 60, parties.told)
    parties.processes["b"].kill()
    began = time.monotonic()
    assert parties.ends("a", 60) == 4
    assert time.monotonic() - began < 30
    assert "party b" in parties.said("a").splitlines()[-1]
    assert "Traceback" not in parties.said("a")
    assert not list((parties.folder / "runs").glob("*/party-*.safetensors"))
    summaries = [json.loads(path.read_text()) for path in (parties.folder / "runs").glob("*/summary.json")]
    (summary,) = [one for one in summaries if one["status"] == "failed"]
    assert "party b" in summary["error"]


def test_wrong_arguments_are_one_line(parties):
    for arguments, said in [
        (("--role", "c", "--listen", parties.address), "--role: must be a, b or helper, got c"),
        (("--role", "a"), "--listen: give either --listen or --connect"),
        (("--role", "a", "--listen", parties.address), "--helper: needed, this protocol's triples come from one"),
    ]:
        parties.start("wrong", "transfer-party", "config.yaml", "--certs", "pki", *arguments)
        assert parties.ends("wrong") == 2
        assert said in parties.said("wrong").splitlines()[-1]
