"""Hosts with networks of their own, joined by slow and lossy links.

A host is a network namespace. A link is two TUN devices, one in each namespace, between which a thread of this process
carries packets: late, and not all of them. (The kernel's own netem is not in every kernel.)
"""

import asyncio
import contextlib
import fcntl
import os
import random
import struct
import subprocess
import threading

TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000


class NoNetworksError(Exception):
    """They cannot be made here."""


def ip(*words):
    try:
        done = subprocess.run(["ip", *map(str, words)], capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise NoNetworksError("iproute2 is not there") from error
    if done.returncode:
        raise NoNetworksError(f"ip {' '.join(map(str, words))}: {done.stderr.strip()}")


def _tun(name):
    try:
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22s", name.encode(), IFF_TUN | IFF_NO_PI, b""))
    except OSError as error:
        raise NoNetworksError(f"/dev/net/tun: {error}") from error
    return fd


def _link(number, server, client):
    """A TUN device in each of two namespaces; the descriptors of both."""
    ends = []
    for end, (host, own, other) in enumerate(
        [(server, f"10.77.{number}.1", f"10.77.{number}.2"), (client, f"10.77.{number}.2", f"10.77.{number}.1")]
    ):
        name = f"fs{os.getpid() % 100000}{number}{end}"
        ends.append(_tun(name))
        ip("link", "set", name, "netns", host)
        ip("-n", host, "addr", "add", own, "peer", other, "dev", name)
        ip("-n", host, "link", "set", name, "up")
    return ends


@contextlib.contextmanager
def hosts(clients, *, delay_s, loss):
    """A server's host and hosts of clients; the server is 10.77.K.1 for client K. Names of the namespaces."""
    names = [f"fedsim{os.getpid()}{letter}" for letter in ["s", *map(str, range(clients))]]
    ends = []
    try:
        for name in names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ends = [_link(k, names[0], names[k + 1]) for k in range(clients)]
        with _carried(ends, delay_s, loss) as dropped:
            yield names, dropped
    finally:
        for fd in [fd for pair in ends for fd in pair]:
            os.close(fd)
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


@contextlib.contextmanager
def _carried(links, delay_s, loss):
    loop, chance, dropped = asyncio.new_event_loop(), random.Random(7), []

    def deliver(fd, packet):
        with contextlib.suppress(OSError):
            os.write(fd, packet)

    def carry(source, target):
        with contextlib.suppress(BlockingIOError):
            while True:
                packet = os.read(source, 65536)
                if chance.random() < loss:
                    dropped.append(len(packet))
                else:
                    loop.call_later(delay_s, deliver, target, packet)

    for one, other in links:
        loop.add_reader(one, carry, one, other)
        loop.add_reader(other, carry, other, one)
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield dropped
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
