"""A party's net while it learns: one iteration after the other, with what the other party sends."""

import math
from typing import Any

import numpy as np
import torch

from fedsim import params as p
from fedsim import rng
from fedsim.errors import TransferError
from fedsim.pruning.pruning import Moment, masks_of
from fedsim.records import Params
from fedsim.transfer import objective as o
from fedsim.transfer import step, terms
from fedsim.transfer.agreement import Agreed, Party
from fedsim.transfer.channel import Channel, array, of_array
from fedsim.transfer.fixed import Reals
from fedsim.transfer.multiplication import Multiplication
from fedsim.transfer.terms import Plan


class Learner:
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
        if not bool(torch.isfinite(hidden).all() & torch.isfinite(ahead.own)):
            raise TransferError("training diverged: a hidden value is not finite; lower train.optimizer.lr")
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
        received = torch.from_numpy(
            array(channel.receive("secrets"), np.float64, (size + data.labelled + count * size,))
        )
        phi, labels, theirs = torch.split(received, [size, data.labelled, count * size])
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
        products = multiplication.exchange(channel, role, self.own, coefficients, other=self.other, secrets=secrets)
        found = terms.gradient(role, products, self.own, self._head())
        loss = None if found.loss is None else found.loss + math.log(2) + float(ahead.own.detach())
        return step.joined(net, ahead, found), loss

    def _head(self) -> Reals:
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
        moment = Moment(
            round=iteration,
            rounds=self.agreed.iterations,
            params=self.params,
            buffers={},
            memory=self.memory,
            key=rng.fold(self.party.key, "prune", iteration),
            probe=_not_here,
            product=_not_here,
            fresh=self.party.fresh or _not_here,
            model=self.party.net.model,
            input_shape=tuple(self.data.inputs.shape[1:]),
            examples=_not_here,
        )
        change = pruning.before(moment)
        if change is None:
            return
        self.params = {name: tensor.double() for name, tensor in change.params.items()}
        self.memory = {**self.memory, **change.memory}
        if change.restarted:
            self.state, self.steps = self.party.optimizer.init(self._trained(self.params)), 0


def _not_here(*_: object) -> Any:
    raise TransferError("pruning: asks for what a party of a transfer does not have")
