"""The front door from outside: what it passes, what it refuses, and what it says about it."""

import datetime
import json
import socket

import httpx
import pytest
from doors import HERE, KEY, PATHS, PULL, line, raw, trusting

from fedsim.deploy import front_door as fd
from fedsim.deploy.certificates import server_files


def test_a_call_of_the_fleet_passes_with_the_headers_that_matter(client, upstream, said):
    headers = {**KEY, "content-type": "application/x-protobuf", "cookie": "c", "x-forwarded-for": "1.2.3.4"}
    for call in fd.CALLS:
        reply = client.post(f"/v1/fleet/{call}", content=b"\x00body", headers=headers)
        assert (reply.status_code, reply.content) == (200, b"yes")
        assert reply.headers["content-type"] == "application/x-protobuf"
        assert reply.headers["flwr-note"] == "n"
        assert "x" not in reply.headers and "server" not in reply.headers
    assert [path for path, _, _ in upstream.asked] == [f"/v1/fleet/{call}" for call in fd.CALLS]
    names = {name.lower() for name in upstream.asked[0][1]}
    assert {"flwr-public-key", "content-type"} <= names
    assert not {"cookie", "x-forwarded-for"} & names
    assert upstream.asked[0][2] == b"\x00body"
    assert said == []


def test_many_calls_share_a_connection_on_both_sides(client, door, upstream):
    for _ in range(5):
        client.post(PULL, headers=KEY)
    assert len(door._open) == 1
    assert len({headers["Host"] for _, headers, _ in upstream.asked}) == 1


@pytest.mark.parametrize("path", PATHS)
def test_every_other_path_is_not_there(path, door, certs, upstream, said):
    request = f"POST {path} HTTP/1.1\r\nhost: x\r\nflwr-public-key: known\r\ncontent-length: 0\r\n\r\n"
    head, _, body = raw(door, certs, request.encode()).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 404") and body == b""
    assert upstream.asked == []
    word = "without a key" if "register-node" in path and "control" not in path else "no such path"
    assert line(said, word).startswith("refused 127.0.0.1: ")


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "OPTIONS", "HEAD", "PATCH"])
def test_only_post_passes(method, client, upstream, said):
    reply = client.request(method, PULL, headers=KEY)
    assert (reply.status_code, reply.content) == (404, b"")
    assert upstream.asked == []
    assert f"{method} {PULL}" in line(said, "not a POST")


def test_without_tls_keyless_nodes_may_register(upstream, said):
    with fd.front_door(HERE, upstream.url, None, said.append) as door:
        reply = httpx.post(f"http://{door.address}/v1/fleet/register-node", content=b"k", trust_env=False)
    assert reply.status_code == 200
    assert [path for path, _, _ in upstream.asked] == ["/v1/fleet/register-node"]


def test_an_unregistered_key_gets_flowers_own_answer_and_no_further(client, upstream, said):
    other = {"flwr-public-key": "other", "flwr-signature": "secret-signature"}
    reply = client.post("/v1/fleet/activate-node", content=b"x", headers=other)
    assert (reply.status_code, reply.json()["code"]) == (412, 2004)
    for headers in (other, {}):
        assert client.post("/v1/fleet/push-object", content=b"x" * 10**6, headers=headers).status_code == 401
    assert upstream.asked == []
    assert "activate-node" in line(said, "not registered")
    assert not any("other" in one or "secret" in one for one in said)


def test_a_key_that_the_superlink_does_not_take(client, upstream, said):
    upstream.answer = 412, json.dumps({"code": 2004, "detail": "no"}).encode(), "application/json"
    reply = client.post("/v1/fleet/activate-node", headers=KEY)
    assert (reply.status_code, reply.json()["code"]) == (412, 2004)
    assert "still seems to be online" in line(said, "activate-node")


@pytest.mark.parametrize(
    ("offset", "words"), [(60, "60 s ahead of"), (-400, "400 s behind"), (0, "signature is not that of the node")]
)
def test_a_wrong_clock_is_told_from_a_wrong_signature(offset, words, client, upstream, said):
    upstream.answer = 401, b'{"detail":"Invalid SuperNode authentication"}', "application/json"
    signed = (datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=offset)).isoformat()
    assert client.post(PULL, headers={**KEY, "flwr-timestamp": signed, "flwr-signature": "s"}).status_code == 401
    assert words in line(said, "refused")
    assert signed not in said[0]


@pytest.mark.parametrize("signed", ["", "yesterday", "2020-01-01T00:00:00", "\u00e9"])
def test_a_time_that_is_none_is_a_wrong_signature(signed, client, upstream, said):
    upstream.answer = 401, b"{}", "application/json"
    client.post(PULL, headers={**KEY, "flwr-timestamp": signed.encode("latin-1")})
    line(said, "signature is not that of the node")


def test_a_body_of_the_limit_passes_and_one_byte_more_does_not(client, upstream, said, monkeypatch):
    monkeypatch.setattr(fd, "BODY_BYTES", 100_000)
    assert client.post(PULL, content=b"x" * 100_000, headers=KEY).status_code == 200
    assert client.post(PULL, content=b"x" * 100_001, headers=KEY).status_code == 413
    assert "100001" in line(said, "above the limit")
    assert client.post(PULL, content=iter([b"x" * 50_000] * 2), headers=KEY).status_code == 200
    assert client.post(PULL, content=iter([b"x" * 50_000] * 3), headers=KEY).status_code == 413
    assert [len(body) for _, _, body in upstream.asked] == [100_000, 100_000]


def test_the_limit_leaves_room_for_flowers_largest_chunk():
    from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE as CHUNK

    assert 2 * CHUNK < fd.BODY_BYTES <= 2**24


@pytest.fixture
def brief(monkeypatch):
    monkeypatch.setattr(fd, "LINGER_S", 0.05)


@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize(
    "data",
    [
        b"\x00\x01\x02\r\n\r\n",
        b"POST /v1/fleet/pull-messages HTTP/1.1\r\n\r\n",
        b"POST /v1/fleet/pull-messages HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n",
        b"POST /v1/fleet/pull-messages HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n",
        b"POST /" + b"a" * 100_000,
        b"POST /v1/fleet/pull-messages HTTP/1.1\r\nhost: x\r\nflwr-public-key: known\r\n"
        b"transfer-encoding: chunked\r\n\r\nnot a chunk\r\n\r\n",
    ],
)
def test_what_is_not_http_is_answered_and_ended(data, door, certs, upstream, said):
    assert raw(door, certs, data)[9:12] in (b"400", b"431")
    assert upstream.asked == []
    assert all(one.isascii() and one.isprintable() for one in said)
    line(said, "not HTTP")


def test_a_client_that_wants_leave_to_send_gets_it(door, certs, upstream):
    head = (
        "host: x\r\nflwr-public-key: known\r\nexpect: 100-continue\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok"
    )
    got = raw(door, certs, f"POST {PULL} HTTP/1.1\r\n{head}".encode())
    assert got.startswith(b"HTTP/1.1 100") and b"HTTP/1.1 200" in got
    assert upstream.asked[0][2] == b"ok"


def test_a_body_that_comes_too_slowly_is_not_waited_for(door, certs, said, monkeypatch):
    monkeypatch.setattr(fd, "TRANSFER_S", 0.1)
    monkeypatch.setattr(fd, "LINGER_S", 0.1)
    head = f"POST {PULL} HTTP/1.1\r\nhost: x\r\nflwr-public-key: known\r\ncontent-length: 9\r\n\r\nslow"
    assert raw(door, certs, head.encode()).startswith(b"HTTP/1.1 408")
    line(said, "too slowly")


def test_one_who_says_nothing_is_not_waited_for(door, certs, monkeypatch):
    monkeypatch.setattr(fd, "FIRST_S", 0.1)
    assert raw(door, certs, b"") == b""
    assert raw(door, certs, b"POST /v1") == b""


def test_connections_are_bounded(door, said, monkeypatch):
    monkeypatch.setattr(fd, "PER_ADDRESS", 3)
    sockets = [socket.create_connection(("127.0.0.1", door.address.port), 5) for _ in range(4)]
    try:
        line(said, "too many connections")
        assert len(door._open) == 3
    finally:
        for one in sockets:
            one.close()


def test_an_upstream_that_is_away_is_503_and_one_that_breaks_off_502(client, upstream, said, door):
    upstream.answer = 0, b"", ""
    assert client.post(PULL, headers=KEY).status_code == 502
    assert len(upstream.asked) == 1  # never again by itself
    upstream.shutdown()
    upstream.server_close()
    assert client.post(PULL, headers=KEY).status_code == 503
    line(said, "SuperLink is away")
    door.check()


def test_an_upstream_that_hangs_is_504(certs, upstream, said, monkeypatch):
    monkeypatch.setattr(fd, "UPSTREAM", httpx.Timeout(0.2))
    upstream.waits = 0.5
    with (
        fd.front_door(HERE, upstream.url, server_files(certs), said.append) as door,
        httpx.Client(base_url=f"https://{door.address}", verify=trusting(certs / "ca.crt"), trust_env=False) as client,
    ):
        assert client.post(PULL).status_code == 504
    assert len(upstream.asked) == 1


def test_a_redirect_is_handed_on_and_not_followed(client, upstream):
    upstream.answer = 307, b"", "text/plain"
    assert client.post(PULL, headers=KEY).status_code == 307
    assert len(upstream.asked) == 1
