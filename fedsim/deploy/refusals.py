"""Lines about requests and connections that were refused: few enough that a stranger cannot fill a disk with them."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

WINDOW_S = 10.0
LINES = 20  # in a window, of one kind and address each

Say = Callable[[str], None]


@dataclass
class Refusals:
    """Says the first refusal of an address and a kind in a window at once, and how many followed when it ends."""

    say: Say
    clock: Callable[[], float] = time.monotonic
    ends: float = float("-inf")
    more: dict[tuple[str, str], int] = field(default_factory=dict)  # refusals after the one that was said
    unsaid: int = 0  # refusals of addresses and kinds that no line was left for

    def note(self, address: str, kind: str, text: str = "") -> None:
        """Take note of a refusal.

        Args:
            address: whose request it was.
            kind: why, in words; of a small number of kinds.
            text: what else to say, such as the path. Anything in it that is not printable ASCII is escaped.
        """
        self.tick()
        key = address, kind
        if key in self.more:
            self.more[key] += 1
        elif len(self.more) < LINES:
            self.more[key] = 0
            self.say(f"refused {address}: {kind}{f' ({plain(text)})' if text else ''}")
        else:
            self.unsaid += 1

    def tick(self) -> None:
        """Say what is due. To be called every few seconds."""
        now = self.clock()
        if now < self.ends:
            return
        for (address, kind), count in self.more.items():
            if count:
                self.say(f"refused {address}: {kind}, {count} more times")
        if self.unsaid:
            self.say(f"refused {self.unsaid} more requests, of other addresses or for other reasons")
        self.more, self.unsaid, self.ends = {}, 0, now + WINDOW_S


def plain(text: str, length: int = 80) -> str:
    """Text of a stranger, such that it can do nothing to a terminal or a log."""
    escaped = ascii(text[: length + 1])[1:-1]
    return escaped if len(escaped) <= length else f"{escaped[:length]}..."
