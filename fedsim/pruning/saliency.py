"""Pruning before training, by what gradients at the initial weights say of each connection: SNIP and GraSP."""

from collections.abc import Callable
from typing import Annotated

from annotated_types import Gt, Lt

from fedsim import params as p
from fedsim.errors import RunError
from fedsim.pruning import criteria, masks
from fedsim.pruning.pruning import Change, Moment, Pruning, with_masks
from fedsim.records import Params

Sparsity = Annotated[float, Gt(0), Lt(1)]


def snip(*, sparsity: Sparsity = 0.9) -> Pruning:
    """SNIP: before the first round, keep the weights whose removal would change the loss most.

    By the gradient g of the mean loss of the first cohort, at the initial weights w, the server keeps the highest
    ``|g * w|`` of all layers in one ranking. It costs one pass over the cohort's data, and its dense gradients.

    Args:
        sparsity: in (0, 1), the share of prunable weights (all of two axes or more) that is 0; of each layer one stays.

    Source: Lee, Ajanthan, Torr 2019, "SNIP: Single-shot network pruning based on connection sensitivity",
        arXiv:1810.02340, algorithm 1. Differs: the batch is all examples of the cohort, each client with the weight
        that the strategy gives it; penalties of ``model.regularizers`` belong to the loss.
    """

    def scores(moment: Moment, grads: Params, names: tuple[str, ...]) -> Params:
        return criteria.snip(moment.params, {name: grads[name] for name in names})

    return _before_training(scores, sparsity)


def grasp(*, sparsity: Sparsity = 0.9) -> Pruning:
    """GraSP: before the first round, remove the weights without which gradients flow best.

    By the gradient g and the Hessian H of the mean loss of the first cohort, at the initial weights w, the server
    removes the lowest ``w * (H g)`` of all layers in one ranking. Clients are asked twice, for g and then for H g, with
    the same batches and draws.

    Args:
        sparsity: in (0, 1), the share of prunable weights (all of two axes or more) that is 0; of each layer one stays.

    Source: Wang, Zhang, Grosse 2020, "Picking winning tickets before training by preserving gradient flow",
        arXiv:2002.07376, algorithm 1 and eq. 8. Differs: g is that of all parameters, biases too; the batch is
        all examples of the cohort, as for ``snip``; logits are not divided by a temperature.
    """

    def scores(moment: Moment, grads: Params, names: tuple[str, ...]) -> Params:
        product = moment.product(moment.params, grads)
        return criteria.grasp(moment.params, {name: product[name] for name in names})

    return _before_training(scores, sparsity)


def _before_training(scores: Callable[[Moment, Params, tuple[str, ...]], Params], sparsity: float) -> Pruning:
    """Removes the lowest scores once, before the first round. Tensors that stay with clients have no gradient here."""

    def before(moment: Moment) -> Change | None:
        if moment.round > 1:
            return None
        grads = moment.probe(moment.params)
        names = masks.prunable({name: moment.params[name] for name in grads})
        kept = masks.ones(moment.params, names)
        try:
            found = scores(moment, grads, names)
            remove = criteria.globally(found, kept, criteria.to_overall(kept, sparsity))
        except ValueError as error:
            raise RunError(f"pruning before the first round: {error}") from error
        kept = criteria.lowest(found, kept, remove)
        return Change(p.masked(moment.params, kept), moment.buffers, with_masks(moment.memory, kept))

    return Pruning(before, probes=True)
