"""What is changed in the process of a SuperNode, with names of Flower that are not public: its waits are shorter."""

import time
from typing import Any

from flwr.supercore import heartbeat
from flwr.supercore.inflatable import inflatable_utils
from flwr.supercore.retry import http_retry
from flwr.supernode import fleet_http_connection, start_client_internal

NAMES = (
    "flwr.supercore.heartbeat:HEARTBEAT_DEFAULT_INTERVAL",
    "flwr.supercore.inflatable.inflatable_utils:pull_objects.__kwdefaults__",
    "flwr.supercore.retry.http_retry:MAX_RETRY_DELAY",
    "flwr.supernode.fleet_http_connection:HEARTBEAT_DEFAULT_INTERVAL",
    "flwr.supernode.start_client_internal:time.sleep",
)
SLEEP_S = 0.1  # Flower: 3 s between looks for messages, 0.5 s for replies
BACKOFF_S = 0.05  # Flower: 1 s after an object that is not there yet; that is usual, messages come before their objects
HEARTBEAT_S = 10  # Flower: 30 s; the least that a server takes. A node is given up after twice the time
RETRY_S = 2  # Flower: 20 s between attempts to reach a server that is away


class _Clock:
    """The module ``time``, but no sleep is long."""

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)

    def sleep(self, seconds: float) -> None:
        time.sleep(min(seconds, SLEEP_S))


def quicken() -> None:
    """Make the SuperNode of this process look oftener, and say oftener that it is alive."""
    changed: list[tuple[Any, str, Any]] = [
        (start_client_internal, "time", _Clock()),
        (fleet_http_connection, "HEARTBEAT_DEFAULT_INTERVAL", HEARTBEAT_S),
        (heartbeat, "HEARTBEAT_DEFAULT_INTERVAL", HEARTBEAT_S),
        (http_retry, "MAX_RETRY_DELAY", RETRY_S),
    ]
    for module, name, value in changed:
        setattr(module, name, value)
    defaults: Any = inflatable_utils.pull_objects.__kwdefaults__
    defaults["initial_backoff"] = BACKOFF_S
