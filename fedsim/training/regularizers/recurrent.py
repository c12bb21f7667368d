"""Regularisers that work inside an LSTM. They make torch's one of plain cells, which is slower for one client."""

from functools import partial

from torch import nn

from fedsim.models.layers.lstm import Lstm, Rates, plain_cells, type_dropout
from fedsim.training.objective import Objective
from fedsim.training.regularizers.regularizer import Rate, Regularizer, unbound


def tied_dropout(*, p_input: Rate = 0.2, p_hidden: Rate = 0.2, p_embedding: Rate = 0.1) -> Regularizer:
    """Variational dropout of an LSTM: ``W (x_t * z_x) + U (h_{t-1} * z_h) + b``, one mask for all steps of a sequence.

    ``z_x`` and ``z_h`` are 0 with probability p, else ``1 / (1 - p)``; drawn for each layer and sequence. The embedding
    drops whole types of tokens in the same way.

    Args:
        p_input: probability of a dropped feature of each layer's input, in [0, 1).
        p_hidden: of a dropped hidden unit, where it enters the next step, in [0, 1).
        p_embedding: of a dropped type of tokens, in [0, 1).

    Raises:
        ValueError: when bound, if the model has no LSTM or, with ``p_embedding``, no embedding; if one cannot be
            changed (see :func:`fedsim.models.layers.lstm.plain_cells`); or if it has such masks already.

    Source: Gal, Ghahramani 2016, "A Theoretically Grounded Application of Dropout in Recurrent Neural Networks",
        NeurIPS, section 4 (unverified). Differs: scaled in training rather than in testing; the four gates share a
        mask; none before the last layer; the defaults are ours.
    """
    if not (p_input or p_hidden or p_embedding):
        return Regularizer("layers", unbound)
    return Regularizer("layers", partial(_bind_tied, {"p_input": p_input, "p_hidden": p_hidden}, p_embedding))


def zoneout(*, cell: Rate = 0.5, hidden: Rate = 0.05) -> Regularizer:
    """Zoneout of an LSTM: units keep their old value: ``c_t = d * c_{t-1} + (1 - d) * c'``, the same for h.

    ``d`` is 1 with probability ``cell`` for c, and ``hidden`` for h, drawn for each unit and step; in evaluation it is
    that probability. ``h' = o * tanh(c')`` is made of the cell before it is zoned.

    Args:
        cell: probability that a unit of the cell state keeps its value, in [0, 1).
        hidden: the same for the hidden state.

    Raises:
        ValueError: when bound, if the model has no LSTM, one that cannot be changed, or one with zoneout already.

    Source: Krueger et al. 2017, "Zoneout: Regularizing RNNs by Randomly Preserving Hidden Activations", ICLR, section 3
        (unverified; the defaults too, theirs for characters). Differs: none.
    """
    if not (cell or hidden):
        return Regularizer("layers", unbound)
    return Regularizer("layers", partial(_bind_inside, {"zone_cell": cell, "zone_hidden": hidden}))


def _bind_tied(rates: dict[str, float], p_embedding: float, model: nn.Module, objective: Objective) -> Objective:
    _bind_inside(rates, model, objective)
    if not p_embedding:
        return objective
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    if not embeddings:
        raise ValueError("p_embedding: needs an embedding; char-lstm has one")
    for embedding in embeddings:
        type_dropout(embedding, p_embedding)
    return objective


def _bind_inside(rates: dict[str, float], model: nn.Module, objective: Objective) -> Objective:
    lstms = [module for module in model.modules() if isinstance(module, nn.LSTM)]
    if not lstms:
        raise ValueError("needs an LSTM; char-lstm has one")
    if any(rates.values()):
        for lstm in lstms:
            _set(plain_cells(lstm), rates)
    return objective


def _set(lstm: Lstm, rates: dict[str, float]) -> None:
    if any(getattr(lstm.rates, name) for name in rates):
        raise ValueError(f"the model's LSTM has {' and '.join(rates)} already")
    lstm.rates = Rates(**{**lstm.rates._asdict(), **rates})
