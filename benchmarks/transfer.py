"""An iteration of two-party transfer learning against the paper's Algorithm 1, written with python-paillier (`phe`).

Two linear nets on 15 + 15 random columns with 16 hidden values train on 500 common rows, all labelled; party A has 69
more. `phe` uses gmpy2. Its iteration (algorithm_1.py) takes most of an hour, so it runs on 10 common rows, end to end,
while every operation is counted and timed. Its seconds are scaled from that: the mean of each kind of operation, the
better of two runs, times how many there are with 500 rows, by a formula that must give what was counted with 10. What
python does between operations is left out, and so is sending. Gradients and loss of the 10 rows must be fedsim's, under
Paillier and in the clear. `phe` has no processes of its own: one core does the work of both parties, one after the
other. fedsim is timed in one process, too, in which both parties take turns on one core, and with a process for each
core at either party.

Run in an environment with requirements/paillier.txt: python transfer.py [--quick] [--ids N ...] [--out FILE]
"""

import argparse
import json
import os
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import phe.util
import torch
from algorithm_1 import GAMMA, L2, Found, Reals, Side, Size, drawn, operations, phe_parts
from torch import nn

from fedsim import params as p
from fedsim import rng
from fedsim.records import Params
from fedsim.training.optimizers import sgd
from fedsim.transfer.agreement import Agreed, Party
from fedsim.transfer.alignment import intersect
from fedsim.transfer.channel import Channel
from fedsim.transfer.encrypted import Paillier
from fedsim.transfer.links import pair
from fedsim.transfer.multiplication import Clear, Multiplication
from fedsim.transfer.nets import net_of
from fedsim.transfer.pool import Pool
from fedsim.transfer.protocols import multiplications, workers
from fedsim.transfer.together import Iteration, run_together

LR = 2.0**-10  # so small that all iterations are alike; the gradient is what a step took off, over this
FULL, QUICK = Size(500), Size(20, alone=5, hidden=3, columns=4, bits=1024)
AT_LEAST = {"Paillier, all cores": 20, "secret sharing, online": 50}
EQUAL = 1e-6


# ---------------------------------------------------------------- fedsim


class Run(NamedTuple):
    """Seconds until the first iteration ended, and of each other; bytes that both send in one; what the first found."""

    first: float
    others: list[float]
    sent: float
    found: Found


def agreed(protocol: str, size: Size, iterations: int) -> Agreed:
    """What both parties have alike."""
    return Agreed(
        protocol=protocol, loss="taylor", alignment="distance", gamma=GAMMA, l2=L2, hidden=size.hidden,
        iterations=iterations, overlap=None, labelled=None, tolerance=None, key_bits=size.bits, triples="helper",
    )  # fmt: skip


def parties(size: Size) -> tuple[Party, Party]:
    """Both, in the room. Their common rows come in the order of a hash of their ids, which changes no sum."""
    a, b = drawn(size)

    def party(role: str, side: Side) -> Party:
        model = nn.Sequential(nn.Linear(size.columns, size.hidden)).double()
        inputs = torch.from_numpy(side.inputs)
        net = net_of(model, inputs[0])
        start = dict(zip(p.of(model)[0], map(torch.from_numpy, (side.weight, side.bias)), strict=True))
        ids = [f"row-{row}" for row in range(len(inputs))]
        labels, asks = (torch.from_numpy(side.labels), None) if role == "a" else (None, inputs[:0])
        key = rng.fold(0, "party", role)
        return Party("a" if role == "a" else "b", ids, inputs, labels, asks, net, start, sgd(lr=LR), key)

    return party("a", a), party("b", b)


def ran(protocol: str, size: Size, iterations: int, ends: tuple[Multiplication, Multiplication]) -> Run:
    """Both parties in this process, a thread each."""
    a, b = parties(size)
    began, seen, times = time.perf_counter(), list[Iteration](), list[float]()

    def on_iteration(iteration: Iteration) -> None:
        times.append(time.perf_counter())
        seen.append(iteration)

    run_together(a, b, agreed(protocol, size, iterations), ends, on_iteration)
    one, last = seen[0], seen[-1]
    assert one.loss is not None
    found = Found(_gradient(a, one.a), _gradient(b, one.b), one.loss)
    sent_in_all = last.sent_a + last.sent_b - one.sent_a - one.sent_b
    return Run(times[0] - began, np.diff(times).tolist(), sent_in_all / max(len(seen) - 1, 1), found)


def _gradient(party: Party, after: Params) -> Reals:
    weight, bias = ((party.params[name] - after[name]) / LR for name in party.params)
    return np.column_stack([weight.numpy(), bias.numpy()])


def paillier(size: Size, iterations: int, processes: int) -> Run:
    """Under Paillier; so many processes for each party, with one none but this."""
    with Pool(processes) as for_a, Pool(processes) as for_b:
        ends = [Paillier(size.bits, insecure=size.bits < 2048, pool=pool) for pool in (for_a, for_b)]
        return ran("paillier", size, iterations, (ends[0], ends[1]))


def secret_shared(size: Size, iterations: int) -> tuple[Run, float]:
    """With secret sharing and a helper; and mean seconds online of an iteration, of the party that took longer."""
    with multiplications(agreed("secret-sharing", size, iterations)) as ends:
        run = ran("secret-sharing", size, iterations, ends)
        online = [float(str(end.describe()["online_seconds"])) for end in ends]
    return run, max(online) / iterations


def intersected(count: int, processes: int) -> float:
    """Seconds in which two parties find that they have half of so many ids each in common."""
    ids = [f"person-{number:09}" for number in range(count + count // 2)]
    mine, theirs = ids[:count], ids[-count:]
    channels = [Channel(link, peer) for link, peer in zip(pair(), ("party b", "party a"), strict=True)]
    found: dict[bool, list[int]] = {}

    def act(first: bool, channel: Channel, own: list[str]) -> None:
        found[first] = intersect(channel, own, first=first, workers=processes)

    began = time.perf_counter()
    other = threading.Thread(target=act, args=(False, channels[1], theirs))
    other.start()
    act(True, channels[0], mine)
    other.join()
    seconds = time.perf_counter() - began
    same = [[own[row] for row in found[first]] for own, first in ((mine, True), (theirs, False))]
    if same[0] != same[1] or set(same[0]) != set(mine) & set(theirs):
        sys.exit("wrong ids")
    return seconds


# ---------------------------------------------------------------- all of it


def differences(one: Found, other: Found) -> float:
    """The largest of gradients and loss."""
    parts = ((one.a, other.a), (one.b, other.b), (np.array(one.loss), np.array(other.loss)))
    return max(float(np.abs(left - right).max()) for left, right in parts)


def phe_numbers(size: Size, few: int, repeats: int) -> tuple[dict[str, float], dict[str, float]]:
    """What was measured with few rows, after its results were compared with fedsim's; and what that comes to."""
    small = size._replace(common=few)
    each, whole, found = phe_parts(small, repeats)
    counted = sum(each[name] * count for name, count in operations(small).items())
    differ = {
        "Paillier": differences(found, paillier(small, 1, 1).found),
        "in the clear": differences(found, ran("plain", small, 1, (Clear(), Clear())).found),
    }
    if not all(value <= EQUAL for value in differ.values()):
        sys.exit(f"gradients or losses differ by {differ}")
    times = {f"largest difference of gradients, {how}": value for how, value in differ.items()}
    times |= {f"phe, {few} rows, s": whole, "of these outside of operations, s": whole - counted}
    times |= {f"phe, {name}, ms": 1e3 * seconds for name, seconds in each.items()}
    scaled = {f"phe, {name}, s": each[name] * count for name, count in operations(size).items()}
    scaled["phe, iteration, s"] = sum(scaled.values())
    return times, scaled


def own_numbers(size: Size, iterations: int) -> dict[str, float]:
    """Medians of fedsim's iterations after the first."""
    found = {}
    for name, processes in {"one process": 1, "all cores": workers()}.items():
        run = paillier(size, 1 + iterations, processes)
        found[f"Paillier, {name}, s"] = statistics.median(run.others)
        found[f"  first iteration with all before it, {name}, s"] = run.first
        found["  bytes sent in an iteration"] = run.sent
    runs = [secret_shared(size, 4 * iterations) for _ in range(3)]
    found["secret sharing, online, s"] = statistics.median(online for _, online in runs)
    found["secret sharing, iteration, s"] = statistics.median(second for run, _ in runs for second in run.others)
    found["  bytes sent in an iteration, secret sharing"] = runs[0][0].sent
    return found


def ratios(times: dict[str, float], scaled: dict[str, float]) -> dict[str, float]:
    """How many times as fast: Paillier as `phe`, secret sharing as Paillier with all cores."""
    own = times["Paillier, all cores, s"]
    return {
        "Paillier, one process": scaled["phe, iteration, s"] / times["Paillier, one process, s"],
        "Paillier, all cores": scaled["phe, iteration, s"] / own,
        "secret sharing, online": own / times["secret sharing, online, s"],
        "secret sharing, iteration": own / times["secret sharing, iteration, s"],
    }


def printed(times: dict[str, float], scaled: dict[str, float], found: dict[str, float], few: int, many: int) -> None:
    """All numbers; those that were scaled say so."""
    for name, value in times.items():
        print(f"{name:55} {value:14.6g}")
    for name, value in scaled.items():
        print(f"{name:55} {value:14.6g}   scaled from {few} rows to {many}, not measured")
    for name, value in found.items():
        print(f"{name:55} x {value:12.1f}" + (f"   (asked: {AT_LEAST[name]})" if name in AT_LEAST else ""))


def main() -> None:
    """Print what was measured, what was scaled, and ratios; exit 1 if something is below what it should be."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few rows, a short key, once: is everything right?")
    parser.add_argument("--ids", type=int, nargs="*", default=[20_000], help="on each side, for their intersection")
    parser.add_argument("--out", type=Path, help="a JSON file for the numbers")
    options = parser.parse_args()
    if not phe.util.HAVE_GMP:
        sys.exit("phe does not find gmpy2, and would be slower than it can be")
    size, few, repeats, iterations = (QUICK, 4, 1, 2) if options.quick else (FULL, 10, 2, 7)
    print(f"{size}, {workers()} cores, load {os.getloadavg()[0]:.1f}")
    times, scaled = phe_numbers(size, few, repeats)
    times |= own_numbers(size, iterations)
    for count in [200] if options.quick else options.ids:
        for name, processes in {"as in a run": 1, "all cores": workers()}.items():
            times[f"{count:,} ids a side, {name}, s"] = intersected(count, processes)
    found = ratios(times, scaled)
    printed(times, scaled, found, few, size.common)
    if options.out:
        written = {"size": size._asdict(), "measured": times, "scaled": scaled, "ratios": found}
        options.out.write_text(json.dumps(written, indent=1) + "\n")
    below = [name for name, least in AT_LEAST.items() if found[name] < least]
    if below and not options.quick:
        sys.exit(f"below what was asked: {', '.join(below)}")


if __name__ == "__main__":
    main()
