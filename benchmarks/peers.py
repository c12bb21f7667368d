"""Who is timed, in which environment, and in which ways each can use the machine's cores."""

import os
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
CORES = len(os.sched_getaffinity(0))


class Peer(NamedTuple):
    """One contestant.

    environment: folder under .envs.
    variants: ways of using the cores; the fastest in a trial is timed. The first is the default.
    others: variants that a runner knows but that no trial tries.
    slow: gets fewer rounds and fewer repeats, because it would take hours otherwise.
    """

    name: str
    environment: str
    variants: tuple[str, ...]
    others: tuple[str, ...] = ()
    slow: bool = False

    def command(self, variant: str) -> list[str]:
        """How to start its runner, without the arguments that say what to run."""
        module = ["-m", f"runners.{self.name}"]
        if variant == "processes":
            module = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={CORES}", *module]
        return [str(HERE / ".envs" / self.environment / "bin" / "python"), *module, "--variant", variant]


PEERS = {
    peer.name: peer
    for peer in (
        Peer("fedsim", "fedsim", ("local",), ("reference",)),
        Peer("bare", "fedsim", ("one-thread", "all-threads")),
        Peer("pfl", "pfl", ("processes", "one-thread", "all-threads")),
        Peer("fedjax", "fedjax", ("jit", "pmap")),
        Peer("flower", "flower", ("ray",), slow=True),
    )
}
LIBRARIES = ("pfl", "fedjax", "flower")  # the others' libraries; bare is none
