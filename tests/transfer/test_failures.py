"""What goes wrong between two parties: both hear of it, in words, and nothing is left behind."""

import json
import os
import threading
import time
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from transfer_runs import AGREED, PROTOCOLS, both, multiplications, party, small

import fedsim
from fedsim.errors import TransferError
from fedsim.training.optimizers import sgd
from fedsim.transfer import frames, protocols, sharing
from fedsim.transfer.agreement import Agreed
from fedsim.transfer.channel import Channel
from fedsim.transfer.encrypted import Paillier
from fedsim.transfer.links import pair
from fedsim.transfer.multiplication import Clear
from fedsim.transfer.party import take_part
from fedsim.transfer.pool import Pool
from fedsim.transfer.sharing import Helped, SecretSharing, help_both

SHARING = replace(AGREED, protocol="secret-sharing")
PAILLIER = replace(AGREED, protocol="paillier")


class Tampered:
    """A link that changes what is sent. change: of a frame's bytes to others; None: the link is closed instead."""

    def __init__(self, link, change):
        self._link, self._change = link, change

    def put(self, frame):
        changed = self._change(frame)
        if changed is None:
            self._link.close()
        else:
            self._link.put(changed)

    def take(self, timeout_s):
        return self._link.take(timeout_s)

    def close(self):
        self._link.close()


def tampered(change):
    """Links over which what party a sends is changed."""
    one, two = pair()
    return Tampered(one, change), two


def changing(kind, change, nth=0):
    """A change of the payload of the nth message of a kind."""
    seen = []

    def changed(frame):
        header, payload = frames.parse(frame)
        if header.kind == kind:
            seen.append(frame)
            if len(seen) == nth + 1:
                return frames.frame(kind, header.sequence, change(payload))
        return frame

    return changed


def refused(found, *texts):
    """Both parties must have failed; every text must be in what each of them says."""
    for error in found:
        assert isinstance(error, TransferError), repr(error)
        for text in texts:
            assert text in str(error)
    return [str(error) for error in found]


# ---------------------------------------------------------------- the other one goes away, or says nothing


@pytest.mark.parametrize("agreed", [AGREED, PAILLIER, SHARING], ids=PROTOCOLS)
def test_a_party_that_closes_at_any_message_ends_both(agreed):
    agreed = replace(agreed, iterations=2)
    count = []
    whole = both(party("a"), party("b"), agreed, links=tampered(lambda frame: count.append(frame) or frame))
    assert not any(isinstance(one, BaseException) for one in whole)
    for last in range(len(count)):
        left = [last]

        def close_then(frame, left=left):
            left[0] -= 1
            return frame if left[0] >= 0 else None

        found = both(party("a"), party("b"), agreed, links=tampered(close_then))
        if last + 1 < len(count):
            refused(found, "the peer is gone")
        else:  # that was the labels: party a has nothing to wait for any more
            assert not isinstance(found[0], BaseException)
        assert str(found[1]) == "party a: the peer is gone"


def test_a_party_that_says_nothing_is_waited_for_as_long_as_agreed():
    one, _ = pair()
    before = time.monotonic()
    channel = Channel(one, "party b", timeout_s=0.2)
    with pytest.raises(TransferError, match=r"^party b: no message within 0\.2 s$"):
        take_part(party("a"), AGREED, channel, Clear(), lambda *_: None)
    assert 0.2 <= time.monotonic() - before < 20


def test_a_party_that_stops_answering_in_the_middle_is_not_waited_for_for_ever():
    silent = changing("secrets", lambda payload: payload, nth=1)

    def swallowed(frame, seen=[]):  # noqa: B006 -- a memory of its own
        seen.append(frames.parse(frame)[0].kind)
        return silent(frame) if seen.count("secrets") < 2 else b""

    class Swallowing(Tampered):
        def put(self, frame):
            if found := self._change(frame):
                self._link.put(found)

    one, two = pair()
    found = both(
        party("a"), party("b"), replace(AGREED, iterations=3), links=(Swallowing(one, swallowed), two), timeout_s=0.4
    )
    refused(found, "no message within 0.4 s")


def test_a_helper_that_is_gone_ends_both():
    links = [pair(), pair()]
    at_parties = [Channel(mine, "the helper", timeout_s=5) for mine, _ in links]

    def help_twice():
        ends = [Channel(theirs, f"party {role}") for (_, theirs), role in zip(links, "ab", strict=True)]
        for _ in range(2):
            asked = [sharing._asked(json.loads(one.receive("factor"))) for one in ends]
            for one, dealt in zip(ends, sharing._dealt(*asked), strict=True):
                one.send("factor", dealt)
        for one in ends:
            one.close()

    thread = threading.Thread(target=help_twice, daemon=True)
    thread.start()
    ends = tuple(SecretSharing(Helped(channel)) for channel in at_parties)
    found = both(party("a"), party("b"), replace(SHARING, iterations=5), ends=ends)
    thread.join(10)
    refused(found, "the helper", "gone")


def test_a_helper_that_deals_too_little_ends_both():
    links = [pair(), pair()]
    at_parties = [Channel(mine, "the helper", timeout_s=5) for mine, _ in links]
    at_helper = [
        Channel(Tampered(theirs, changing("factor", lambda payload: payload[:-8])), "party") for _, theirs in links
    ]

    def help_until_told():
        with pytest.raises(TransferError):
            help_both(*at_helper)

    thread = threading.Thread(target=help_until_told, daemon=True)
    thread.start()
    ends = tuple(SecretSharing(Helped(channel)) for channel in at_parties)
    found = both(party("a"), party("b"), SHARING, ends=ends)
    for channel in (*at_parties, *at_helper):
        channel.close()
    thread.join(10)
    refused(found, "the helper sent")


# ---------------------------------------------------------------- they were told different things


OTHER = {
    "protocol": "paillier",
    "loss": "exact",
    "alignment": "inner-product",
    "gamma": 0.31,
    "l2": 0.02,
    "hidden": 6,
    "iterations": 2,
    "overlap": 11,
    "labelled": 6,
    "tolerance": 0.0,
    "key_bits": 2048,
    "triples": "paillier",
}


def test_every_key_that_both_need_is_among_those_that_are_tried():
    assert set(OTHER) == {one.name for one in fields(Agreed)}


@pytest.mark.parametrize("key", OTHER)
def test_a_different_config_is_named_at_both_ends_with_both_values(key):
    found = both(party("a"), party("b"), AGREED, replace(AGREED, **{key: OTHER[key]}), ends=(Clear(), Clear()))
    mine, theirs = repr(getattr(AGREED, key)), repr(OTHER[key])
    rule = f"transfer.{key}: must be the same at both parties: "
    told = refused(found, rule)
    assert told[0] == f"{rule}{mine} here, {theirs} at party b"
    assert told[1] == f"{rule}{theirs} here, {mine} at party a"


def test_two_parties_of_one_role():
    found = both(party("a"), party("a"), AGREED, peers=("party b", "party b"))
    refused(found, "both parties are party a; start the other one with --role")
    # two that wait for each other say so when the time is over; over a network they are told when they meet
    refused(both(party("b"), party("b"), AGREED, timeout_s=0.2), "no message within 0.2 s")


def test_another_version_of_the_messages():
    def other(frame):
        return frame[:4] + (frames.VERSION + 1).to_bytes(2, "big") + frame[6:]

    refused(both(party("a"), party("b"), AGREED, links=tampered(other)), "version")


@pytest.mark.parametrize("said", [b"[]", b"{", b"", b'{"role":"a"}', b"\xff" * 9])
def test_another_language(said):
    refused(both(party("a"), party("b"), AGREED, links=tampered(changing("hello", lambda _: said))))


@pytest.mark.parametrize("sizes", [{}, {"head": -1, "body": 3}, {"head": 6.0, "body": 0}, {"head": 7, "body": 2**41}])
def test_a_net_of_no_size(sizes):
    change = changing("hello", lambda _: json.dumps(sizes).encode(), nth=1)
    refused(both(party("a"), party("b"), AGREED, links=tampered(change)), "sent no sizes of its net")


@pytest.mark.parametrize("agreed", [PAILLIER, SHARING], ids=PROTOCOLS[1:])
def test_a_net_of_another_size_than_said(agreed):
    change = changing("hello", lambda _: json.dumps({"head": 5, "body": 0}).encode(), nth=1)
    refused(both(party("a"), party("b"), agreed, links=tampered(change)))


def test_other_common_people():
    for agreed in (AGREED, SHARING):
        flip = changing("aligned", lambda payload: bytes([payload[0] ^ 1]) + payload[1:])
        refused(both(party("a"), party("b"), agreed, links=tampered(flip)), "id order mismatch")


@pytest.mark.parametrize("agreed", [AGREED, SHARING], ids=["plain", "secret-sharing"])
def test_fewer_common_people_than_agreed(agreed):
    found = both(party("a"), party("b"), replace(agreed, overlap=13))
    refused(found, "transfer.overlap: must be at most the number of common ids (12), got 13")
    found = both(party("a"), replace(party("b"), ids=[f"nobody-{i}" for i in range(15)]), replace(agreed, overlap=None))
    refused(found, "transfer.overlap: must be at most the number of common ids (0)")


def test_more_labels_than_people():
    found = both(party("a"), party("b"), replace(AGREED, overlap=None, labelled=13))
    refused(found, "transfer.labelled: must be at most the overlap (12), got 13")


def test_a_net_too_large_for_the_protocol(monkeypatch):
    from fedsim.transfer import party as party_module

    monkeypatch.setitem(party_module.MOST_ENTRIES, "secret-sharing", 1000)
    told = refused(both(party("a", "mlp"), party("b"), SHARING), "model: too large", "transfer.trains: head")
    assert "this party" in told[0]
    assert "party a" in told[1]


# ---------------------------------------------------------------- keys and ciphertexts that are none


def test_a_smaller_key_than_agreed():
    agreed = replace(PAILLIER, key_bits=2048)
    ends = Paillier(1024, insecure=True, pool=Pool(1)), Paillier(2048, insecure=False, pool=Pool(1))
    told = refused(both(party("a"), party("b"), agreed, ends=ends), "a public key that has")
    assert "has 385 bytes where one of 2048 bits has 769" in told[1]


def with_key(change):
    """A change of ciphertexts that knows n; change: (payload, n) -> payload, of the first secrets."""
    known = []

    def changed(frame):
        header, payload = frames.parse(frame)
        if header.kind == "key":
            known.append(int.from_bytes(payload[1 : 1 + 128], "big"))
        if header.kind == "secrets":
            return frames.frame("secrets", header.sequence, change(payload, known[0]))
        return frame

    return changed


BROKEN = {
    "shorter": (lambda payload, n: payload[:-256], "were expected"),
    "longer": (lambda payload, n: payload + payload[:256], "were expected"),
    "empty": (lambda payload, n: b"", "were expected"),
    "zero": (lambda payload, n: bytes(256) + payload[256:], "a ciphertext that is not between 0 and n^2"),
    "n squared": (lambda payload, n: (n * n).to_bytes(256, "big") + payload[256:], "not between 0 and n^2"),
    "n": (lambda payload, n: (n).to_bytes(256, "big") + payload[256:], "a factor in common with n"),
    "last of n": (lambda payload, n: payload[:-256] + (5 * n).to_bytes(256, "big"), "a factor in common with n"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_ciphertexts_that_are_none(how):
    change, text = BROKEN[how]
    refused(both(party("a"), party("b"), PAILLIER, links=tampered(with_key(change))), text)


@pytest.mark.parametrize("kind", ["masked", "opened"])
@pytest.mark.parametrize("change", [lambda payload: payload[:-1], lambda payload: b"\xff" * len(payload)])
def test_masked_products_that_are_none(kind, change):
    refused(both(party("a"), party("b"), PAILLIER, links=tampered(changing(kind, change))))


@pytest.mark.parametrize("kind", ["opened", "answer"])
def test_shares_of_another_size(kind):
    for change in (lambda payload: payload[:-8], lambda payload: payload + bytes(8), lambda _: b""):
        found = both(party("a"), party("b"), SHARING, links=tampered(changing(kind, change)))
        refused(found, "bytes where", "were expected")


def test_a_message_of_another_kind():
    def other(frame):
        header, payload = frames.parse(frame)
        return frames.frame("loss", header.sequence, payload) if header.kind == "secrets" else frame

    refused(both(party("a"), party("b"), AGREED, links=tampered(other)), "'loss' where 'secrets' was expected")


def test_labels_that_are_none():
    change = changing("labels", lambda payload: bytes(len(payload)))
    found = both(party("a"), party("b"), AGREED, links=tampered(change))
    assert str(found[1]) == "party a sent something else than labels"


@pytest.mark.parametrize("said", [b"", b"\2", b"\1\1"])
def test_an_end_that_is_none(said):
    agreed = replace(AGREED, tolerance=0.0, iterations=3)
    refused(both(party("a"), party("b"), agreed, links=tampered(changing("stop", lambda _: said))), "training is over")


# ---------------------------------------------------------------- numbers out of range


def test_a_value_that_is_not_finite():
    a = party("a")
    broken = a.inputs.clone()
    broken[3, 2] = float("nan")
    refused(both(replace(a, inputs=broken), party("b"), AGREED), "not finite")
    for agreed in (SHARING, PAILLIER):
        refused(both(replace(a, inputs=broken), party("b"), agreed), "overflow", "got nan")


@pytest.mark.parametrize("agreed", [PAILLIER, SHARING], ids=PROTOCOLS[1:])
@pytest.mark.parametrize("role", ["a", "b"])
def test_a_hidden_value_beyond_the_fixed_point(agreed, role):
    parties = {one: party(one) for one in "ab"}
    parties[role] = replace(parties[role], inputs=parties[role].inputs * 1e4)
    refused(both(parties["a"], parties["b"], agreed), "overflow", "train.optimizer.lr")


def test_only_the_range_is_refused_and_plain_has_none():
    big = replace(party("a"), inputs=party("a").inputs * 30)
    assert not any(isinstance(one, BaseException) for one in both(big, party("b"), SHARING))
    far = replace(party("a"), inputs=party("a").inputs * 1e4)
    assert not any(isinstance(one, BaseException) for one in both(far, party("b"), AGREED))


def test_training_that_diverges():
    a, b = (party(role, optimizer=sgd(lr=1e100)) for role in "ab")
    refused(both(a, b, replace(AGREED, iterations=20)), "training diverged", "lower train.optimizer.lr")
    refused(both(a, b, replace(SHARING, iterations=20)), "overflow")


def test_an_error_of_another_kind_reaches_the_other_party_by_its_name():
    def fails(*_):
        raise ZeroDivisionError("a secret that is not sent")

    found = both(party("a", schedule=fails), party("b"), AGREED)
    assert isinstance(found[0], ZeroDivisionError)
    assert str(found[1]) == "party a stopped: ZeroDivisionError"


# ---------------------------------------------------------------- through a config: what is left


@pytest.fixture
def config(tmp_path):
    return small(tmp_path / "runs")


def children():
    """Processes that this one has started and that still are."""
    found = set()
    for task in Path("/proc/self/task").iterdir():
        try:
            found |= set((task / "children").read_text().split())
        except OSError:  # a thread that has just ended
            continue
    return found


@pytest.fixture
def nothing_left(monkeypatch):
    """Two processes in each pool, as on a machine of two cores; neither they nor a thread may outlive the test."""
    monkeypatch.setattr(protocols, "workers", lambda: 2)
    before = set(threading.enumerate()), children()
    yield
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and (set(threading.enumerate()) - before[0] or children() - before[1]):
        time.sleep(0.05)
    assert set(threading.enumerate()) <= before[0]
    assert children() <= before[1]


def failed(config, overrides, tmp_path, *texts, status="failed", error=TransferError, **hooks):
    with pytest.raises(error):
        fedsim.run(config, overrides, **hooks)
    (folder,) = (tmp_path / "runs").iterdir()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == status
    for text in texts:
        assert text in summary["error"]
    assert not list(folder.glob("*.safetensors"))
    assert not list(folder.glob("**/*.tmp*"))
    return folder, summary


FAILING = {
    "overflow": ({"train.optimizer.lr": 1e9}, ("overflow",)),
    "too few": ({"transfer.overlap": 25}, ("transfer.overlap: must be at most the number of common ids (20), got 25",)),
}


@pytest.mark.parametrize("protocol", ["paillier", "secret-sharing"])
@pytest.mark.parametrize("how", FAILING)
def test_a_run_that_fails_says_why_and_leaves_no_net_no_thread_no_process(
    protocol, how, config, tmp_path, nothing_left
):
    overrides, texts = FAILING[how]
    failed(config, {"transfer.protocol": protocol, **overrides}, tmp_path, *texts)


@pytest.mark.parametrize("protocol", ["plain", "secret-sharing"])
def test_through_flower_as_well(protocol, config, tmp_path, nothing_left):
    overrides = {"transfer.protocol": protocol, "engine": {"name": "flower"}, "transfer.overlap": 25}
    failed(config, overrides, tmp_path, "transfer.overlap: must be at most the number of common ids (20), got 25")


def test_divergence(config, tmp_path, nothing_left):
    overrides = {"train.optimizer.lr": 1e100, "transfer.iterations": 10}
    folder, summary = failed(config, overrides, tmp_path, "training diverged")
    rounds = (folder / "rounds.jsonl").read_text().splitlines()
    assert 0 < len(rounds) == summary["rounds_done"] < 10  # what was done is there


def test_a_helper_that_dies(config, tmp_path, nothing_left, monkeypatch):
    deal, dealt = sharing._dealt, []

    def dies(*asked):
        dealt.append(1)
        if len(dealt) > 2:
            raise MemoryError
        return deal(*asked)

    monkeypatch.setattr(sharing, "_dealt", dies)
    overrides = {"transfer.protocol": "secret-sharing", "transfer.iterations": 9}
    failed(config, overrides, tmp_path, "the helper stopped: MemoryError")


def test_a_process_that_is_killed(config, tmp_path, nothing_left):
    """What the kernel does when memory runs out."""
    import signal

    before = children()

    def kill(record):
        for pid in children() - before:
            os.kill(int(pid), signal.SIGKILL)

    overrides = {"transfer.protocol": "paillier", "transfer.iterations": 200}
    failed(config, overrides, tmp_path, "a process that calculates ended", on_round=kill)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_an_interrupt(protocol, config, tmp_path, nothing_left):
    def interrupted(record):
        raise KeyboardInterrupt

    overrides = {"transfer.protocol": protocol, "transfer.iterations": 1_000_000}
    _, summary = failed(
        config, overrides, tmp_path, status="interrupted", error=KeyboardInterrupt, on_round=interrupted
    )
    assert summary["error"] is None


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_run_that_ends_well_leaves_both_nets_and_nothing_else(protocol, config, tmp_path, nothing_left):
    """So that what is not found above could have been found."""
    done = fedsim.run(config, {"transfer.protocol": protocol})
    assert sorted(path.name for path in done.folder.glob("*.safetensors")) == [
        "party-a.safetensors",
        "party-b.safetensors",
    ]
    assert done.summary["status"] == "finished"
    assert done.summary["error"] is None
    assert torch.isfinite(torch.tensor(done.rounds[-1].train_loss))


def test_ends_are_ends_of_one_pair():
    """The builder of these tests: without any change both parties finish."""
    with multiplications(SHARING) as ends:
        found = both(party("a"), party("b"), SHARING, ends=ends)
    assert [one.overlap for one in found] == [12, 12]
