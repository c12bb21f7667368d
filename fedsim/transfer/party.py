"""One party from its first message to its last: agree, find the people both know, train, predict.

The same function is a party in a thread, in a process on another machine, and behind a relay; only its channel differs.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from fedsim.errors import TransferError
from fedsim.records import Params
from fedsim.transfer import step, terms
from fedsim.transfer.agreement import Agreed, Party
from fedsim.transfer.alignment import disclosed, intersect
from fedsim.transfer.channel import Channel, facts, of_facts
from fedsim.transfer.learner import Learner
from fedsim.transfer.multiplication import Multiplication, swap
from fedsim.transfer.prediction import predict
from fedsim.transfer.protocols import workers
from fedsim.transfer.terms import Plan, Role

MOST_ENTRIES = {"paillier": 10_000_000, "secret-sharing": 50_000_000}  # of the coefficients of one product
MANY_IDS = 50_000
OnIteration = Callable[[int, Params, float | None], None]  # iteration, parameters, loss (at A)


@dataclass(frozen=True)
class Outcome:
    """What a party has in the end.

    exposed: whether the other party's gradients can determine this one's hidden values, see ``terms.determines``.
    losses: of each iteration, at A; [] at B. predicted: (asks,) of +1 and -1, at B; None at A.
    overlap: number of common rows that trained.
    """

    params: Params
    losses: list[float]
    predicted: Tensor | None
    overlap: int
    exposed: bool = False


def take_part(
    party: Party, agreed: Agreed, channel: Channel, multiplication: Multiplication, on_iteration: OnIteration
) -> Outcome:
    """Be a party, until both are done.

    Raises:
        TransferError: the other party is gone, was configured otherwise, or says something else than agreed; a value
            left the range of the fixed point; training diverged. The other party is told.
    """
    try:
        return _take_part(party, agreed, channel, multiplication, on_iteration)
    except BaseException as error:
        channel.abort(str(error) if isinstance(error, TransferError) else type(error).__name__)
        raise


def _take_part(
    party: Party, agreed: Agreed, channel: Channel, multiplication: Multiplication, on_iteration: OnIteration
) -> Outcome:
    _agree(party, agreed, channel)
    data = _aligned(party, agreed, channel)
    own, other = _plans(party, agreed, data, channel)
    multiplication.begin(channel, party.role, own, other, agreed.iterations)
    learner = Learner(party, agreed, data, own, other)
    losses: list[float] = []
    for iteration in range(1, agreed.iterations + 1):
        loss = learner.iterate(iteration, channel, multiplication)
        on_iteration(iteration, learner.params, loss)
        if loss is not None:
            losses.append(loss)
        if _over(party.role, agreed, channel, losses):
            break
    predicted = predict(party, learner.params, data, channel, multiplication)
    multiplication.end(channel)
    exposed = agreed.protocol == "plain" or terms.determines(other, data.overlap, agreed.hidden)
    return Outcome(learner.params, losses, predicted, data.overlap, exposed)


# ---------------------------------------------------------------- before


def _agree(party: Party, agreed: Agreed, channel: Channel) -> None:
    """Compare configs, so that a difference is named before it does harm."""
    mine = {"role": party.role, **asdict(agreed)}
    theirs = facts(swap(channel, party.role, "hello", of_facts(mine)))
    if theirs.get("role") == party.role:
        raise TransferError(f"both parties are party {party.role}; start the other one with --role")
    for name, value in asdict(agreed).items():
        if theirs.get(name) != value:
            rule = f"must be the same at both parties: {value!r} here, {theirs.get(name)!r} at {channel.peer}"
            raise TransferError(f"transfer.{name}: {rule}")


def _aligned(party: Party, agreed: Agreed, channel: Channel) -> step.Rows:
    """The party's rows of training, those of common people first, in the order that both have."""
    first = party.role == "a"
    if agreed.protocol == "plain":
        common = disclosed(channel, party.ids, first=first)
    else:
        several = workers() if len(party.ids) > MANY_IDS else 1  # processes take a while to start
        common = intersect(channel, party.ids, first=first, workers=several)
    count = len(common) if agreed.overlap is None else agreed.overlap
    if not 1 <= count <= len(common):
        raise TransferError(f"transfer.overlap: must be at most the number of common ids ({len(common)}), got {count}")
    labelled = count if agreed.labelled is None else agreed.labelled
    if not 1 <= labelled <= count:
        raise TransferError(f"transfer.labelled: must be at most the overlap ({count}), got {labelled}")
    shared = torch.tensor(common[:count])
    if party.labels is None:
        return step.Rows(party.inputs[shared], count, labelled)
    rest = torch.ones(len(party.inputs), dtype=torch.bool)
    rest[shared] = False
    order = torch.cat([shared, rest.nonzero()[:, 0]])
    return step.Rows(party.inputs[order], count, labelled, party.labels[order])


def _plans(party: Party, agreed: Agreed, data: step.Rows, channel: Channel) -> tuple[Plan, Plan]:
    """What either party learns in an iteration. How large a net is gets known by this."""
    net = party.net
    body = sum(party.params[name].numel() for name in net.body_names(party.params))
    head = party.params[net.head_names[0]].shape[1] + 1 if net.head else 0
    theirs = facts(swap(channel, party.role, "hello", of_facts({"head": head, "body": body})))
    sizes = [theirs.get("head"), theirs.get("body")]
    if not all(type(size) is int and 0 <= size < 2**40 for size in sizes):
        raise TransferError(f"{channel.peer} sent no sizes of its net")
    other_role: Role = "b" if party.role == "a" else "a"
    own = terms.plan(party.role, data.overlap, agreed.hidden, head, body)
    other = terms.plan(other_role, data.overlap, agreed.hidden, int(sizes[0]), int(sizes[1]))  # type: ignore[arg-type]
    for plan, whose in ((own, "this party"), (other, channel.peer)):
        entries = max(math.prod(product.shape[:3]) for product in plan.products)
        if entries > MOST_ENTRIES.get(agreed.protocol, entries):
            rule = (
                f"{plan.body} parameters before the last layer, times {agreed.hidden} hidden values, times the overlap"
            )
            raise TransferError(
                f"model: too large at {whose} ({rule}); train only the last layer (transfer.trains: head)"
            )
    return own, other


def _over(role: Role, agreed: Agreed, channel: Channel, losses: list[float]) -> bool:
    """Whether party A, which alone knows the loss, says that training is over."""
    if agreed.tolerance is None:
        return False
    if role == "a":
        over = len(losses) > 1 and losses[-2] - losses[-1] <= agreed.tolerance
        channel.send("stop", b"\1" if over else b"\0")
        return over
    said = channel.receive("stop")
    if said not in (b"\0", b"\1"):
        raise TransferError(f"{channel.peer} did not say whether training is over")
    return said == b"\1"
