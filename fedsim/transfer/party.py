"""One party from its first message to its last: agree, find the people both know, train, predict.

The same function is a party in a thread, in a process on another machine, and behind a relay; only its channel differs.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from fedsim import params as p
from fedsim import rng
from fedsim.errors import TransferError
from fedsim.pruning.pruning import Fresh, Moment, Pruning, masks_of
from fedsim.records import Params
from fedsim.training.optimizers import Optimizer
from fedsim.training.schedules import Schedule, unchanged
from fedsim.transfer import objective as o
from fedsim.transfer import step, terms
from fedsim.transfer.alignment import disclosed, intersect
from fedsim.transfer.channel import Channel, array, facts, of_array, of_facts
from fedsim.transfer.multiplication import Multiplication, swap
from fedsim.transfer.nets import Net, rows
from fedsim.transfer.terms import Plan, Product, Role, Shape

MOST_ENTRIES = 200_000_000  # of the coefficients of one product
OnIteration = Callable[[int, Params, float | None], None]  # iteration, parameters, loss (at A)


@dataclass(frozen=True)
class Agreed:
    """What both parties must have in their configs alike.

    overlap, labelled: how many common rows train, at most, and how many of them with their label; null: all.
    tolerance: training ends when the loss falls by no more; None: after all ``iterations``.
    """

    protocol: str
    loss: o.Form
    alignment: o.Alignment
    gamma: float
    l2: float
    hidden: int
    iterations: int
    overlap: int | None
    labelled: int | None
    tolerance: float | None
    key_bits: int
    triples: str

    def objective(self) -> o.Objective:
        """What is minimised."""
        return o.Objective(self.loss, self.alignment, self.gamma, self.l2)


@dataclass(frozen=True)
class Party:
    """What a party brings.

    ids: of its rows, one each. inputs: float64 (n, *shape). labels: (n,) of +1 and -1 at A, None at B.
    asks: rows of which B wants the labels; None at A.
    params: the first ones of ``net``. pruning, fresh: how the net is pruned between iterations, if it is.
    key: of all its draws.
    """

    role: Role
    ids: Sequence[str]
    inputs: Tensor
    labels: Tensor | None
    asks: Tensor | None
    net: Net
    params: Params
    optimizer: Optimizer
    key: int
    schedule: Schedule = unchanged
    pruning: Pruning | None = None
    fresh: Fresh | None = None


@dataclass(frozen=True)
class Outcome:
    """What a party has in the end.

    losses: of each iteration, at A; [] at B. predicted: (asks,) of +1 and -1, at B; None at A.
    overlap: number of common rows that trained.
    """

    params: Params
    losses: list[float]
    predicted: Tensor | None
    overlap: int


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
    learner = _Learner(party, agreed, data, own, other)
    losses: list[float] = []
    for iteration in range(1, agreed.iterations + 1):
        loss = learner.iterate(iteration, channel, multiplication)
        on_iteration(iteration, learner.params, loss)
        if loss is not None:
            losses.append(loss)
        if _over(party.role, agreed, channel, losses):
            break
    predicted = _predict(party, learner.params, data, channel, multiplication)
    multiplication.end(channel)
    return Outcome(learner.params, losses, predicted, data.overlap)


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
    find = disclosed if agreed.protocol == "plain" else intersect
    common = find(channel, party.ids, first=party.role == "a")
    count = len(common) if agreed.overlap is None else agreed.overlap
    if not 1 <= count <= len(common):
        raise TransferError(f"transfer.overlap: must be at most the number of common ids ({len(common)}), got {count}")
    labelled = count if agreed.labelled is None else agreed.labelled
    if not 1 <= labelled <= count:
        raise TransferError(f"transfer.labelled: must be at most the overlap ({count}), got {labelled}")
    first = torch.tensor(common[:count])
    if party.labels is None:
        return step.Rows(party.inputs[first], count, labelled)
    rest = torch.ones(len(party.inputs), dtype=torch.bool)
    rest[first] = False
    order = torch.cat([first, rest.nonzero()[:, 0]])
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
        if max(math.prod(product.shape[:3]) for product in plan.products) > MOST_ENTRIES:
            rule = f"{plan.body} parameters before the last layer, times {agreed.hidden} hidden values, times the overlap"
            raise TransferError(f"model: too large at {whose} ({rule}); train only the last layer (transfer.trains: head)")
    return own, other


# ---------------------------------------------------------------- training


class _Learner:
    """A party's net while it learns."""

    def __init__(self, party: Party, agreed: Agreed, data: step.Rows, own: Plan, other: Plan) -> None:
        self.party, self.agreed, self.data, self.own, self.other = party, agreed, data, own, other
        self.objective = agreed.objective()
        self.params = party.params
        self.state = party.optimizer.init(self._trained(party.params))
        self.memory: Params = {} if party.pruning is None else party.pruning.start(party.params, {})
        self.steps = 0

    def iterate(self, iteration: int, channel: Channel, multiplication: Multiplication) -> float | None:
        """One step of the parameters; returns the loss before it, at party A."""
        self._prune(iteration)
        key, progress = rng.fold(self.party.key, "step", iteration), iteration / self.agreed.iterations
        ahead = step.forward(
            self.party.net, self.params, self.data, self.objective, key=key, progress=progress, start=self.party.params
        )
        if self.agreed.protocol == "plain":
            gradient, loss = self._in_the_clear(ahead, channel)
        else:
            gradient, loss = self._multiplied(ahead, channel, multiplication, key, progress)
        self._step(gradient, iteration)
        return loss

    def _in_the_clear(self, ahead: step.Forward, channel: Channel) -> tuple[Params, float | None]:
        """The gradient by differentiating the whole loss, of which the other party's values are constants."""
        data, role = self.data, self.party.role
        hidden = ahead.hidden.values[: data.overlap]
        count, size = hidden.shape
        if role == "a":
            assert ahead.phi is not None and data.labels is not None
            labels = data.labels[: data.labelled]
            given = [ahead.phi, labels, hidden.reshape(-1)]
            channel.send("secrets", of_array(torch.cat(given).detach().numpy()))
            received = torch.from_numpy(array(channel.receive("secrets"), np.float64, (count * size + 1,)))
            theirs, their_part = received[:-1].reshape(count, size), float(received[-1])
            value = o.cross(self.objective, ahead.phi, labels, hidden, theirs)
            loss = float(value.detach()) + float(ahead.own.detach()) + their_part
            return step.finite(step.derivatives(ahead, value + ahead.own)), loss
        received = torch.from_numpy(array(channel.receive("secrets"), np.float64, (size + data.labelled + count * size,)))
        phi, labels, theirs = received.split([size, data.labelled, count * size])
        own_part = ahead.own.detach().reshape(1)
        channel.send("secrets", of_array(torch.cat([hidden.detach().reshape(-1), own_part]).numpy()))
        value = o.cross(self.objective, phi, labels, theirs.reshape(count, size), hidden)
        return step.finite(step.derivatives(ahead, value + ahead.own)), None

    def _multiplied(
        self, ahead: step.Forward, channel: Channel, multiplication: Multiplication, key: int, progress: float
    ) -> tuple[Params, float | None]:
        """The gradient from products of which each party has one factor."""
        net, data, role = self.party.net, self.data, self.party.role
        mine = step.view(net, ahead, data, key=key, progress=progress)
        if role == "a":
            source = step.source(net, ahead, data)
            secrets = terms.laid_out(terms.secrets_of_a(self.objective, mine, source), self.other, None)
            coefficients = terms.coefficients_of_a(self.objective, mine, source, self.own)
        else:
            secrets = terms.laid_out(terms.secrets_of_b(mine, data.labelled), self.other, float(ahead.own.detach()))
            coefficients = terms.coefficients_of_b(mine, data.labelled, self.own)
        products = multiplication.exchange(channel, role, self.own, coefficients, self.other, secrets)
        found = terms.gradient(role, products, self.own, self._head())
        loss = None if found.loss is None else found.loss + math.log(2) + float(ahead.own.detach())
        return step.joined(net, ahead, found), loss

    def _head(self) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
        """Weights and bias of the last layer, (d, width + 1); (d, 0) without one."""
        if not self.party.net.head:
            return np.zeros((self.agreed.hidden, 0))
        weight, bias = (self.params[name] for name in self.party.net.head_names)
        return torch.cat([weight, bias.unsqueeze(1)], 1).numpy()

    def _trained(self, params: Params) -> Params:
        return {name: tensor for name, tensor in params.items() if name not in self.party.net.frozen}

    def _step(self, gradient: Params, iteration: int) -> None:
        masks = masks_of(self.memory)
        kept = {} if masks is None else {name: mask for name, mask in masks.kept.items() if name in gradient}
        gradient = p.masked(gradient, kept)
        self.steps += 1
        factor = self.party.schedule(iteration)
        stepped, self.state = self.party.optimizer.step(
            self._trained(self.params), gradient, self.state, self.steps, factor
        )
        self.params = {**self.params, **p.masked(stepped, kept)}

    def _prune(self, iteration: int) -> None:
        """What pruning does before this iteration; the other party does not hear of it."""
        pruning = self.party.pruning
        if pruning is None:
            return
        shape = tuple(self.data.inputs.shape[1:])
        moment = Moment(
            iteration, self.agreed.iterations, self.params, {}, self.memory, rng.fold(self.party.key, "prune", iteration),
            _not_here, _not_here, self.party.fresh or _not_here, self.party.net.model, shape, _not_here,
        )  # fmt: skip
        change = pruning.before(moment)
        if change is None:
            return
        self.params = {name: tensor.double() for name, tensor in change.params.items()}
        self.memory = {**self.memory, **change.memory}
        if change.restarted:
            self.state, self.steps = self.party.optimizer.init(self._trained(self.params)), 0


def _not_here(*_: object) -> Params:  # type: ignore[misc]
    raise TransferError("pruning: asks for what a party of a transfer does not have")


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


# ---------------------------------------------------------------- prediction


def _predict(
    party: Party, params: Params, data: step.Rows, channel: Channel, multiplication: Multiplication
) -> Tensor | None:
    """Labels for B's rows. A learns the scores, of rows it does not know; B learns the labels, not the scores.

    Source: Liu et al. 2018, arXiv:1812.03337, Algorithm 2.
    """
    with torch.no_grad():
        if party.role == "b":
            assert party.asks is not None
            return _ask(party, params, party.asks, channel, multiplication)
        assert data.labels is not None
        phi = o.predictor(rows(party.net, params, data.inputs, key=None).values, data.labels)
        count = facts(channel.receive("predict")).get("rows")
        if type(count) is not int or not 0 <= count < 2**31:
            raise TransferError(f"{channel.peer} did not say how many rows it asks about")
        if not count:
            return None
        own = Plan((len(phi) * count,), (Product(0, Shape(1, 1, len(phi), count)),), 0, 0, True)
        scores = multiplication.exchange(channel, "a", own, [phi.numpy().reshape(1, 1, -1)], _NOTHING, [])[0]
        channel.send("labels", of_array(np.where(scores.ravel() > 0, 1.0, -1.0)))
        return None


_NOTHING = Plan((), (), 0, 0, True)


def _ask(party: Party, params: Params, asks: Tensor, channel: Channel, multiplication: Multiplication) -> Tensor:
    channel.send("predict", of_facts({"rows": len(asks)}))
    if not len(asks):
        return asks.new_zeros(0)
    hidden = rows(party.net, params, asks, key=None).values
    other = Plan((hidden.numel(),), (Product(0, Shape(1, 1, hidden.shape[1], len(asks))),), 0, 0, True)
    multiplication.exchange(channel, "b", _NOTHING, [], other, [hidden.T.contiguous().numpy().ravel()])
    found = torch.from_numpy(array(channel.receive("labels"), np.float64, (len(asks),)).copy())
    if not bool((found.abs() == 1).all()):
        raise TransferError(f"{channel.peer} sent something else than labels")
    return found
