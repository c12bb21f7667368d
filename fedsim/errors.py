"""Every error class of fedsim, with the exit code the command line gives it.

A ``FedsimError`` is something its reader can act on: its message names the key or file, the rule and the value,
and no traceback is shown for it. A wrong argument to a Python function is a plain ``ValueError``.
"""

from collections.abc import Sequence


class FedsimError(Exception):
    """Root of all errors a user can act on."""

    exit_code = 4


class ConfigError(FedsimError):
    """The config or the command line asks for something that cannot be. Carries every problem found, not the first."""

    exit_code = 2

    def __init__(self, problems: Sequence[str] | str) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class DataError(FedsimError):
    """Data, a run folder or another input file is missing, damaged or unusable."""

    exit_code = 3


class MissingDependencyError(FedsimError):
    """An optional package is needed; the message names the extra that installs it."""

    exit_code = 2


class ClientError(FedsimError):
    """A client's work failed. Names the round and the client."""

    def __init__(self, round: int, client: int, what: str) -> None:
        self.round, self.client, self.what = round, client, what
        super().__init__(f"round {round}, client {client}: {what}")

    def __reduce__(self) -> tuple[type["ClientError"], tuple[int, int, str]]:
        return type(self), (self.round, self.client, self.what)  # the default would call __init__ with one string


class DivergedError(ClientError):
    """A client's training gave NaN or infinity. Running it again would give the same."""


class RunError(FedsimError):
    """The run itself failed (disk, engine, aggregate). The state of the last whole round is in the run folder."""


class TransferError(RunError):
    """A party of a transfer cannot go on: its peer is gone or says something else than agreed, or a value overflows."""
