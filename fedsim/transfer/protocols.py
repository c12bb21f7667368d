"""The protocols by name, for both parties in one process."""

import contextlib
import os
import threading
from collections.abc import Iterator

from fedsim.transfer.agreement import Agreed
from fedsim.transfer.channel import Channel
from fedsim.transfer.links import pair
from fedsim.transfer.multiplication import Clear, Multiplication
from fedsim.transfer.sharing import Helped, SecretSharing, help_both


@contextlib.contextmanager
def multiplications(agreed: Agreed) -> Iterator[tuple[Multiplication, Multiplication]]:
    """Both parties' ends in one process, with a helper in a thread where one deals triples."""
    if agreed.protocol == "secret-sharing" and agreed.triples == "helper":
        with _helped() as (a, b):
            yield SecretSharing(a), SecretSharing(b)
    else:
        with multiplication_of(agreed, None) as a, multiplication_of(agreed, None) as b:
            yield a, b


@contextlib.contextmanager
def multiplication_of(agreed: Agreed, helper: Channel | None) -> Iterator[Multiplication]:
    """One party's end.

    helper: channel to whoever deals triples; None where nobody does.
    """
    if agreed.protocol == "plain":
        yield Clear()
    elif agreed.protocol == "secret-sharing" and agreed.triples == "helper":
        assert helper is not None
        yield SecretSharing(Helped(helper))
    else:
        from fedsim.transfer.encrypted import Paillier  # noqa: PLC0415  needs gmpy2
        from fedsim.transfer.made import Made  # noqa: PLC0415
        from fedsim.transfer.pool import Pool  # noqa: PLC0415

        insecure = agreed.key_bits < 2048  # which a config allows only where it says so
        with Pool(workers()) as pool:
            if agreed.protocol == "secret-sharing":
                yield SecretSharing(Made(agreed.key_bits, insecure=insecure, pool=pool))
            else:
                yield Paillier(agreed.key_bits, insecure=insecure, pool=pool)


@contextlib.contextmanager
def _helped() -> Iterator[tuple[Helped, Helped]]:
    links = [pair(), pair()]
    at_helper = [Channel(mine, name) for (mine, _), name in zip(links, ("party a", "party b"), strict=True)]
    at_parties = [Channel(theirs, "the helper") for _, theirs in links]
    thread = threading.Thread(target=_quietly, args=at_helper, daemon=True)
    thread.start()
    try:
        yield Helped(at_parties[0]), Helped(at_parties[1])
    finally:
        for channel in (*at_helper, *at_parties):
            channel.close()
        thread.join(30)


def _quietly(a: Channel, b: Channel) -> None:
    """A helper whose failure the parties hear of, and tell."""
    with contextlib.suppress(Exception):
        help_both(a, b)


def workers() -> int:
    """Processes for big numbers: one for each core that this process may use."""
    return len(os.sched_getaffinity(0))
