"""Sockets that listen."""

import errno
import socket

from fedsim.deploy.address import Address
from fedsim.errors import ConfigError

_WORDS = {
    errno.EADDRINUSE: "the port is in use",
    errno.EACCES: "this user may not use the port",
    errno.EADDRNOTAVAIL: "this machine does not have the address",
}


def listeners(where: Address) -> list[socket.socket]:
    """Sockets listening at an address: one, or one for IPv4 and one for IPv6 if a name stands for both.

    Args:
        where: ``::`` stands for all addresses of both kinds; port 0 takes any free one.

    Raises:
        ConfigError: nobody can listen there.
    """
    try:
        found = socket.getaddrinfo(where.host, where.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise ConfigError(f"--listen: no machine has the name {where.host}: {error.strerror or error}") from error
    sockets: list[socket.socket] = []
    problem: OSError | None = None
    for family, _, _, _, address in dict.fromkeys(found):
        port = sockets[0].getsockname()[1] if sockets else where.port
        try:
            sockets.append(_listener(family, (address[0], port, *address[2:])))
        except OSError as error:
            problem = error
            if error.errno == errno.EADDRINUSE:
                break
    if sockets and (problem is None or problem.errno != errno.EADDRINUSE):
        return sockets
    for one in sockets:
        one.close()
    words = _WORDS.get(problem.errno or 0, problem.strerror) if problem else "no such address"
    raise ConfigError(f"--listen: cannot listen on {where}: {words}")


def _listener(family: int, address: tuple[object, ...]) -> socket.socket:
    one = socket.socket(family, socket.SOCK_STREAM)
    try:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:  # "::" means IPv4, too; for every other address it changes nothing
            one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(address[0] != "::"))
        one.bind(address)
        one.listen(128)
        one.setblocking(False)
    except OSError:
        one.close()
        raise
    return one
