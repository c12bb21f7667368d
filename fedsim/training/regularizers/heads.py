"""Regularisers that train several heads, or several dropout samples, on one trunk.

``train_loss`` of a run is what they make of the loss: with :func:`collaborative` the sum over heads, with its soft
part. What is held out is scored as ever, by the plain cross-entropy of what the model returns in evaluation.
"""

from dataclasses import replace
from functools import partial
from typing import Annotated, Literal

from annotated_types import Ge, Le
from torch import Tensor, nn

from fedsim.models import forks, places
from fedsim.models.layers.attaching import attach_first
from fedsim.models.layers.dropouts import Dropout
from fedsim.models.layers.maxout import Maxout
from fedsim.models.layers.samples import Samples
from fedsim.training import heads as losses
from fedsim.training.objective import Objective
from fedsim.training.regularizers.regularizer import Count, Positive, Rate, Regularizer, unbound

Several = Annotated[int, Ge(2)]
Pattern = Literal["simple", "hierarchical", "multiple-instance"]
Form = Literal["normalised", "sum", "codistillation"]
_Loss = partial[Tensor]  # but for the loss that it makes use of

_ON_THE_LAST_AXIS = (nn.Linear, nn.Identity, nn.LayerNorm, Dropout, Maxout, *places.ACTIVATIONS)


def multi_sample_dropout(*, samples: Count = 8, p: Rate = 0.5, tail: str | None = None) -> Regularizer:
    """Multi-sample dropout: the mean loss of several dropout masks of the features that one pass of the trunk made.

    ``L = mean_m loss(g(x * kept_m / (1 - p)))``, g being the layers from ``tail`` on; in evaluation one pass without
    dropout. Only the part behind the dropout is computed several times. Parameters and payload stay what they were.
    A dropout that the model has already in front of the tail stays too.

    Args:
        samples: masks for each example, >= 1; one is ordinary dropout.
        p: probability of a zero, in [0, 1).
        tail: path of the layer in front of which the dropout is put; null is the last linear layer. From there on a
            model may have linear layers, activations, layer norm and elementwise dropout in an ``nn.Sequential`` only,
            which work on the last axis; in a model of your own so must whatever follows the last linear layer.

    Raises:
        ValueError: when bound, if there is no such layer, or one behind it that would take samples for something else,
            as batch norm would for channels.

    Source: Inoue 2019, "Multi-Sample Dropout for Accelerated Training and Better Generalization", arXiv:1905.09788
        (section unverified). Differs: by default only the last linear layer is repeated, where the paper repeats the
        hidden one before it as well: that is ``tail: fc1`` for ``cnn``.
    """
    return Regularizer("samples", partial(_bind_samples, samples, p, tail) if p else unbound)


def collaborative(
    *,
    heads: Several = 4,
    beta: Annotated[float, Ge(0), Le(1)] = 0.5,
    temperature: Positive = 2.0,
    pattern: Pattern = "simple",
    rescale: bool = True,
    split: list[str] | None = None,
) -> Regularizer:
    """Collaborative learning: several heads learn from labels, and each from the mean logits of the others.

    ``L = sum_h beta * J_hard + (1 - beta) * J_soft``, see :func:`fedsim.training.heads.collaborative`. The loss so far,
    label smoothing for instance, is ``J_hard``. Evaluation asks the first head alone, so that the others cost nothing
    then. In a federation all heads are sent, and averaged one by one; with the defaults four of them are 3.9 times the
    parameters of ``cnn``, and 3.2 times those of ``resnet-8``; with ``split: [head]`` the resnet has 1.03 times.

    Args:
        heads: >= 2; a power of 2 for ``hierarchical``.
        beta: weight of the labels, in [0, 1].
        temperature: T > 0 of the soft part.
        pattern: ``simple`` divides the path once; ``hierarchical`` in two, and each branch again in two at the next
            of ``split``; ``multiple-instance`` shares nothing.
        rescale: send the mean of the branches' gradients into the shared part, instead of their sum. Each branch has
            its own gradient whole either way.
        split: children of the model in front of which paths divide, one for ``simple``, ``log2(heads)`` for
            ``hierarchical``. null takes the last hidden linear layer (the last stage of a resnet) and those before it.
            Where the last linear layer is in no ``nn.Sequential``, as in ``char-lstm``, only it is repeated.

    Raises:
        ValueError: ``split`` does not fit heads and pattern; when bound, if the model has several heads already, or no
            such children.

    Source: Song, Chai 2018, "Collaborative Learning for Deep Neural Networks", arXiv:1805.11761, section 3 (defaults of
        a public re-implementation; the paper's are unverified). Differs: none known.
    """
    loss = partial(losses.collaborative, beta=beta, temperature=temperature)
    manner = forks.Manner(shown=0, rescale=rescale)
    return Regularizer("heads", partial(_bind_heads, _split(heads, pattern, split), manner, loss))


def ensemblenet(
    *,
    heads: Several = 3,
    form: Form = "normalised",
    weight: float | None = None,
    cap: bool = False,
    split: list[str] | None = None,
) -> Regularizer:
    """EnsembleNet: heads on one trunk are trained together with the mean of their logits, which is asked in evaluation.

    With L(mean) the loss of the mean logits, L_i that of head i, and N heads:

    - ``normalised``: ``(1 - mu) L(mean) + mu * mean_i L_i``, ``weight`` being mu >= 0. For cross-entropy this is
      ``L(mean) + mu * mean_i KL(softmax(mean) || p_i)``: 0 trains the ensemble alone, 1 each head alone.
    - ``sum``: ``L(mean) + lambda * sum_i L_i``, ``weight`` being lambda >= -1 / N. That is the first with
      ``mu = lambda N / (1 + lambda N)``, times ``1 + lambda N``. A negative one rewards heads for disagreeing and has
      no minimum, since one head may be wrong without limit while the others make up for it: it needs ``cap``.
    - ``codistillation``: ``mean_i (L_i + g * KL(q_i || p_i))``, ``weight`` being g >= 0 and q_i the softmax of the mean
      logits of the other heads, held fixed.

    Heads are sent, averaged and initialised as for :func:`collaborative`; the gradient is that of the formula.

    Args:
        heads: N >= 2.
        form: see above.
        weight: null is 0.5, 1 / N and 1 for the three forms: in the first two, L(mean) and the mean of L_i weigh the
            same.
        cap: for ``sum``: count at most ln(classes), the loss of a guess, for a head and batch.
        split: as for :func:`collaborative`, one child.

    Raises:
        ValueError: a weight outside its range, ``cap`` with another form, or ``split`` with more than one; when bound,
            as for :func:`collaborative`.

    Source: Li, Ng, Natsev 2019, "EnsembleNet: End-to-End Optimization of Multi-headed Models", arXiv:1905.09979;
        sign and value of lambda, and all defaults, are unverified. ``codistillation``: after Anil et al. 2018,
        arXiv:1804.03235. Differs: branches are not made narrower, so the model grows; teachers are means of logits.
    """
    usual = {"normalised": 0.5, "sum": 1 / heads, "codistillation": 1.0}[form]
    weight = usual if weight is None else weight
    _check_weight(weight, form, heads, cap)
    loss: _Loss = {
        "normalised": partial(losses.interpolated, weight=weight),
        "sum": partial(losses.summed, weight=weight, cap=cap),
        "codistillation": partial(losses.codistillation, weight=weight),
    }[form]
    return Regularizer("heads", partial(_bind_heads, _split(heads, "simple", split), forks.Manner(shown="mean"), loss))


def _split(heads: int, pattern: Pattern, names: list[str] | None) -> forks.Split:
    """Where paths divide."""
    if pattern == "multiple-instance":
        if names is not None:
            raise ValueError("split must be null with pattern: multiple-instance, which shares nothing")
        return forks.Split(None, heads, depth=0)
    tree = pattern == "hierarchical"
    depth = heads.bit_length() - 1 if tree else 1
    if tree and heads != 2**depth:
        raise ValueError(f"heads must be a power of 2 with pattern: hierarchical, got {heads}")
    if names is not None and len(names) != depth:
        raise ValueError(f"split must name {depth} for {heads} heads in the pattern {pattern}, got {len(names)}")
    return forks.Split(None if names is None else tuple(names), 2 if tree else heads, depth)


def _check_weight(weight: float, form: Form, heads: int, cap: bool) -> None:
    if cap and form != "sum":
        raise ValueError(f"cap must be false with form: {form}; it is for the form sum")
    if form != "sum" and weight < 0:
        raise ValueError(f"weight must be >= 0 with form: {form}, got {weight:g}")
    if weight * heads < -1:
        raise ValueError(
            f"weight must be >= -1 / heads ({-1 / heads:.3g}) with form: sum, got {weight:g}; below that even the loss "
            "of the mean logits would be maximised"
        )
    if weight < 0 and not cap:
        raise ValueError(
            f"weight must be >= 0 with form: sum unless cap is true, got {weight:g}; the loss would have no lower "
            "bound, since one head may be wrong without limit while the others make up for it"
        )


def _bind_heads(
    split: forks.Split, manner: forks.Manner, loss: _Loss, model: nn.Module, objective: Objective
) -> Objective:
    """The loss so far becomes that of one head."""
    forks.fork(model, split, manner)
    return replace(objective, loss=partial(loss, base=objective.loss))


def _bind_samples(samples: int, p: float, tail: str | None, model: nn.Module, objective: Objective) -> Objective:
    if any(isinstance(module, Samples) for module in model.modules()):
        raise ValueError("needs a model without several dropout samples; it has them already")
    head = places.head(model)
    start = head if tail is None else tail
    _check_tail(model, start, head)
    attach_first(model.get_submodule(start), "samples", Samples(samples, p))
    return objective


def _check_tail(model: nn.Module, start: str, head: str) -> None:
    """Refuse a tail with something that would take the axis of samples for another."""
    if start == head:
        return
    above, _, last = head.rpartition(".")
    first, parent = start.removeprefix(f"{above}." if above else ""), model.get_submodule(above)
    names = list(parent._modules) if isinstance(parent, nn.Sequential) else [last]
    upto = names[: names.index(last) + 1]
    if first not in upto:
        raise ValueError(
            f"tail must name the last linear layer or one before it beside it, {', '.join(upto)}; got {start}"
        )
    for name in upto[upto.index(first) :]:
        if not isinstance(parent._modules[name], _ON_THE_LAST_AXIS):
            kind = type(parent._modules[name]).__name__
            raise ValueError(
                f"tail must have nothing behind it that works on another axis than the last, got {name} ({kind})"
            )
