"""Where a model's random numbers come from, and how that is told to whoever runs it."""

from dataclasses import dataclass
from typing import Any

NAMED = 5  # layers that a line names; the run folder lists all


@dataclass(frozen=True)
class Draws:
    """Where a model draws while it is trained.

    keyed: paths of torch's dropout layers that keyed ones have replaced.
    seeded: where it draws from torch's global generator, in words; "" if nowhere.
    """

    keyed: tuple[str, ...] = ()
    seeded: str = ""

    def told(self) -> tuple[str, ...]:
        """What a user should know before the first round, a line each.

        >>> Draws(keyed=("body.2", "drop")).told()
        ('model: replaced dropout layers body.2, drop by keyed ones',)
        """
        return tuple(line for line in (self._keyed_line(), self._seeded_line()) if line)

    def record(self) -> dict[str, Any]:
        """What environment.json says of it."""
        return {"keyed": list(self.keyed), "seeded": self._seeded_line() or None}

    def _keyed_line(self) -> str:
        if not self.keyed:
            return ""
        more = f" and {len(self.keyed) - NAMED} more" * (len(self.keyed) > NAMED)
        layers, new = ("layers", "keyed ones") if len(self.keyed) > 1 else ("layer", "a keyed one")
        return f"model: replaced dropout {layers} {', '.join(self.keyed[:NAMED])}{more} by {new}"

    def _seeded_line(self) -> str:
        if not self.seeded:
            return ""
        return (
            f"model: draws from torch's global generator ({self.seeded}); its draws are seeded per client and round, "
            "so the run repeats with the same torch version, but each client is trained by itself"
        )


UNTOLD = Draws()
