"""Labels for party B's rows: B asks, A helps.

A learns the scores, of rows it does not know, and so the labels; B learns the labels, not the scores.

Source: Liu et al. 2018, arXiv:1812.03337, Algorithm 2. Differs: A removes its own mask, so nobody else sees a score.
"""

import numpy as np
import torch
from torch import Tensor

from fedsim.errors import TransferError
from fedsim.records import Params
from fedsim.transfer import objective as o
from fedsim.transfer import step
from fedsim.transfer.agreement import Party
from fedsim.transfer.channel import Channel, array, facts, of_array, of_facts
from fedsim.transfer.multiplication import Multiplication
from fedsim.transfer.nets import rows
from fedsim.transfer.terms import Plan, Product, Shape


def predict(
    party: Party, params: Params, data: step.Rows, channel: Channel, multiplication: Multiplication
) -> Tensor | None:
    """Labels for party B's rows, (asks,) of +1 and -1: at B; None at A."""
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
        scores = multiplication.exchange(
            channel, "a", own, [phi.numpy().reshape(1, 1, -1)], other=_NOTHING, secrets=[]
        )[0]
        channel.send("labels", of_array(np.where(scores.ravel() > 0, 1.0, -1.0)))
        return None


_NOTHING = Plan((), (), 0, 0, True)


def _ask(party: Party, params: Params, asks: Tensor, channel: Channel, multiplication: Multiplication) -> Tensor:
    channel.send("predict", of_facts({"rows": len(asks)}))
    if not len(asks):
        return asks.new_zeros(0)
    hidden = rows(party.net, params, asks, key=None).values
    other = Plan((hidden.numel(),), (Product(0, Shape(1, 1, hidden.shape[1], len(asks))),), 0, 0, True)
    multiplication.exchange(channel, "b", _NOTHING, [], other=other, secrets=[hidden.T.contiguous().numpy().ravel()])
    found = torch.from_numpy(array(channel.receive("labels"), np.float64, (len(asks),)).copy())
    if not bool((found.abs() == 1).all()):
        raise TransferError(f"{channel.peer} sent something else than labels")
    return found
