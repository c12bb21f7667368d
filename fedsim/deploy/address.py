"""A host and a port, as they are given on the command line."""

import ipaddress
import re
import socket
from dataclasses import dataclass

from fedsim.errors import ConfigError

_LABEL = r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_NAME = re.compile(rf"(?=.{{1,253}}$){_LABEL}(\.{_LABEL})*")


@dataclass(frozen=True)
class Address:
    """host: a name, an IPv4 address, or an IPv6 address without brackets. port: 0 to 65535; 0 is any free one."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str, option: str) -> "Address":
        """From ``HOST:PORT`` or ``[IPv6]:PORT``.

        Args:
            text: what was given.
            option: by which option, for the message.

        Raises:
            ConfigError: it is not an address.
        """
        host, colon, port = text.rpartition(":")
        bracketed = host.startswith("[") and host.endswith("]")
        bare = host[1:-1] if bracketed else host
        if not colon or not re.fullmatch(r"[0-9]{1,5}", port, re.ASCII) or int(port) > 65535:
            raise ConfigError(f"{option}: must be HOST:PORT with a port up to 65535, got {text}")
        if not (_is_ip(bare, 6) if bracketed else _is_ip(bare, 4) or is_name(bare)):
            raise ConfigError(f"{option}: {host!r} is no host name or address (IPv6 is written [::1]:{port})")
        return cls(bare, int(port))

    @property
    def is_loopback(self) -> bool:
        """Whether it can be reached from this machine alone."""
        return self.host.lower() == "localhost" or (is_ip(self.host) and ipaddress.ip_address(self.host).is_loopback)

    def __str__(self) -> str:
        """As :meth:`parse` reads it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def is_ip(text: str) -> bool:
    """Whether it is an IPv4 or IPv6 address."""
    return _is_ip(text, 4) or _is_ip(text, 6)


def is_name(text: str) -> bool:
    """Whether it can be a host name. Four numbers are not: they are a mistyped address."""
    return bool(_NAME.fullmatch(text)) and not re.fullmatch(r"[0-9.]+", text)


def _is_ip(text: str, version: int) -> bool:
    try:
        return "%" not in text and ipaddress.ip_address(text).version == version
    except ValueError:
        return False


def free_port() -> int:
    """A port of 127.0.0.1 at which nobody listens now."""
    with socket.create_server(("127.0.0.1", 0)) as one:
        return int(one.getsockname()[1])
