import socket

import pytest

from fedsim.deploy import authority, checks


@pytest.fixture
def certs(folder):
    authority.make(folder / "certs", ["localhost"], 2)
    return folder / "certs"


def test_certificates_are_made_and_what_to_do_with_them_is_told(fedsim, folder):
    result = fedsim("certs", "certs", "--host", "fl.example.org", "--clients", "12")
    assert (result.code, result.err) == (0, "")
    made, names, copy, keep = result.out.splitlines()
    assert made.startswith("made 40 files in certs; good: ca.crt until ")
    assert names == "the server's names: fl.example.org, localhost, 127.0.0.1, ::1"
    assert copy.endswith("and nothing else: client-0, client-1, client-2 to client-11 in certs")
    assert keep == "keep certs/ca.key somewhere else; only fedsim certs needs it"
    (folder / "certs" / "ca.key").unlink()
    more = fedsim("certs", "certs", "--clients", "13")
    assert more.out.startswith("made 3 files in certs") and "client-12 in certs" in more.out
    assert "ca.key" not in more.out
    again = fedsim("certs", "certs", "--clients", "13")
    assert (again.code, again.out, again.new) == (0, "certs: nothing was missing\n", frozenset())


def test_renewing_tells_what_to_do(fedsim, certs):
    key = (certs / "server.key").read_bytes()
    result = fedsim("certs", "certs", "--host", "new.example.org", "--clients", "2", "--days", "30", "--renew")
    assert (result.code, result.err, result.new) == (0, "", frozenset())
    assert result.out.startswith("made 1 file in certs") and "new.example.org, localhost" in result.out
    assert "start fedsim server again" in result.out.splitlines()[-1]
    assert (certs / "server.key").read_bytes() == key
    assert "(29 days)" in fedsim("certs", "check", certs).out


def test_the_check_shows_every_file_and_ends_with_3_if_one_is_wrong(fedsim, certs):
    result = fedsim("certs", "check", certs)
    assert (result.code, result.err) == (0, "")
    assert [line.split()[0] for line in result.out.splitlines()[1:]] == [
        *("ca.crt", "ca.key", "server.crt", "server.key", "client-0/client.pub", "client-1/client.pub")
    ]
    assert all(line.split()[-1] == "ok" for line in result.out.splitlines()[1:])
    assert checks.check(certs)[0].fingerprint in result.out and "(364 days)" in result.out
    (certs / "client-1" / "client.key").chmod(0o644)
    (certs / "server.key").unlink()
    result = fedsim("certs", "check", certs)
    assert (result.code, result.err) == (3, f"error: {certs}: 2 problems, see above\n")
    assert "must not be readable by others" in result.out and "server.key: missing" in result.out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["certs", "certs"], 2, "--clients: needed"),
        (["certs", "certs", "--clients", "2"], 2, "--host: needed"),
        (["certs", "a", "b", "--clients", "2"], 2, "certs: takes one folder, got a b"),
        (["certs", "check", "nothing"], 3, "nothing: no such folder"),
        (["certs", "check"], 2, "certs check: takes one folder, and no options"),
        (["certs", "check", "certs", "--clients", "2"], 2, "certs check: takes one folder, and no options"),
        (["certs", "certs", "--host", "0.0.0.0", "--clients", "2"], 2, "--host: 0.0.0.0 is no address that a client"),
        (["doctor", "config.yaml", "--server", "a.invalid:1", "--insecure", "--partition", "0"], 2, "got a.invalid:1"),
        (
            ["doctor", "config.yaml", "--server", "localhost:1", "--partition", "0"],
            2,
            "--certs: give either the folder",
        ),
        (["doctor", "config.yaml", "--server", "localhost", "--insecure", "--partition", "0"], 2, "must be HOST:PORT"),
        (["doctor", "config.yaml", "--server", "localhost:1", "--insecure"], 2, "--partition: needed"),
        (["server", "config.yaml", "--insecure"], 2, "--listen: needed"),
        (["server", "config.yaml", "--listen", "localhost"], 2, "--listen: must be HOST:PORT"),
        (["server", "config.yaml", "--listen", "localhost:0"], 2, "--certs: give either the folder"),
        (["server", "config.yaml", "--listen", "0.0.0.0:0", "--insecure"], 2, "loopback address only, got 0.0.0.0:0"),
        (["server", "--listen", "localhost:0", "--insecure"], 2, "CONFIG: give either a config or --resume RUN"),
        (["server", "config.yaml", "--listen", "localhost:0", "--certs", "no"], 3, "no/ca.crt: missing"),
        (
            ["server", "config.yaml", "--listen", "localhost:0", "--insecure", "--clients", "7", "--wait", "-1"],
            2,
            "--wait: must be >= 0, got -1\n  --clients: must be between 1 and 6, got 7",
        ),
        (["server", "config.yaml", "--listen", "localhost:0", "--insecure", "--min-clients", "4"], 2, "1 and 3, got 4"),
        (["server", "--resume", "no", "--listen", "localhost:0", "--insecure"], 3, "no: no such run folder"),
        (["client", "config.yaml", "--partition", "0", "--insecure"], 2, "--server: needed"),
        (["client", "config.yaml", "--server", "localhost:1", "--insecure"], 2, "--partition: needed"),
        (["client", "config.yaml", "--server", "a.org:1", "--insecure", "--partition", "0"], 2, "got a.org:1"),
        (
            ["client", "config.yaml", "--server", "localhost:1", "--insecure", "--partition", "6"],
            2,
            "below data.clients",
        ),
        (["client", "none.yaml", "--server", "localhost:1", "--insecure", "--partition", "0"], 2, "none.yaml"),
        (["run", "config.yaml", "engine={name: flower, runtime: deployment}"], 2, "start it with fedsim server CONFIG"),
    ],
)
def test_what_is_refused_leaves_nothing(fedsim, arguments, code, message):
    result = fedsim(*arguments)
    assert (result.code, result.out) == (code, "") and message in result.err, result.err
    assert not result.new or arguments[0] == "run"


def diagnosed(out):
    """What the lines of the doctor say: name -> state."""
    lines = [line.split() for line in out.splitlines() if line[:1].strip() and not line.startswith("all is")]
    return {line[1]: line[0] for line in lines}


@pytest.fixture
def nobody():
    """An address at which nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{taken.getsockname()[1]}"


def test_the_doctor_names_what_is_wrong_and_what_to_do(fedsim, certs, nobody):
    arguments = ["doctor", "config.yaml", "--partition", "1", "--server", nobody, "--state", "state"]
    result = fedsim(*arguments, "--certs", certs)
    assert (result.code, result.new) == (3, frozenset())
    assert diagnosed(result.out) == {
        **dict.fromkeys(("versions", "config", "data", "disk", "certificates", "name"), "ok"),
        "connection": "problem",
        **dict.fromkeys(("TLS", "clock", "key"), "skipped"),
    }
    assert "is fedsim server running there, and does a firewall let this machine in?" in result.out
    assert result.err == "error: 1 problem, see above\n"


def test_a_mistake_in_the_config_ends_the_doctor_with_2(fedsim, certs, nobody):
    arguments = ["doctor", "config.yaml", "--partition", "1", "--server", nobody, "--state", "state", "--certs", certs]
    result = fedsim(*arguments, "model.hiden=[3]", "train.round=2")
    assert (result.code, result.err) == (2, "error: 2 problems, see above\n")
    first, second = [line for line in result.out.splitlines() if "unknown key" in line]
    assert first.startswith("problem   config        ") and second.startswith(" " * 24) and second[24] != " "
    assert fedsim(*arguments, "data.clients=1").code == 2


def test_the_doctor_is_content_with_a_server_that_is_there(fedsim, folder, monkeypatch):
    monkeypatch.setattr("fedsim.deploy.reaching.speaks_tls", lambda _: False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr("fedsim.deploy.reaching.clock_ahead", lambda *_: 0.2)
        address = f"127.0.0.1:{server.getsockname()[1]}"
        result = fedsim("doctor", "config.yaml", "--partition", "1", "--server", address, "--insecure")
    assert (result.code, result.err) == (0, "")
    assert result.out.splitlines()[-1] == "all is in place"
    assert diagnosed(result.out)["certificates"] == diagnosed(result.out)["key"] == "skipped"
