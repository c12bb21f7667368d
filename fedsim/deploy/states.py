"""What a client keeps between rounds, in files of its own: the server never sees it."""

import re
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch

from fedsim import runs
from fedsim.params import separate
from fedsim.records import Params

KEPT = 3  # rounds: a server that was resumed asks for a round again, and needs the state from before it


@dataclass(frozen=True)
class States:
    """States of one client of one run, a file for each of the last rounds it trained in."""

    folder: Path

    def before(self, run: str, round: int, since: int = 0) -> Params | None:
        """The state this client had when ``round`` began; None if it has not trained from ``since`` until then."""
        earlier = [found for found in self._rounds(run) if since <= found < round]
        return safetensors.torch.load_file(self._path(run, max(earlier))) if earlier else None

    def keep(self, run: str, round: int, state: Params) -> None:
        """Write the state after ``round``; later ones, from before the server was resumed, are gone with it."""
        if not state:
            return
        tensors = {name: separate(tensor) for name, tensor in state.items()}
        runs.write_bytes(self._path(run, round), safetensors.torch.save(tensors))
        rounds = self._rounds(run)
        kept = sorted(found for found in rounds if found <= round)[-KEPT:]
        for found in rounds:
            if found not in kept:
                self._path(run, found).unlink(missing_ok=True)

    def _rounds(self, run: str) -> list[int]:
        found = [re.fullmatch(r"round-(\d+)\.safetensors", path.name) for path in self._run(run).glob("round-*")]
        return [int(match[1]) for match in found if match]

    def _path(self, run: str, round: int) -> Path:
        return self._run(run) / f"round-{round}.safetensors"

    def _run(self, run: str) -> Path:
        if not re.fullmatch(r"[0-9a-f]{32}", run):  # it comes from the server, and becomes the name of a folder
            raise ValueError(f"the name of a run must be 32 hexadecimal digits, got {run!r:.100}")
        return self.folder / run
