"""Models that are chains of standard layers, trained without autograd, for one client or several stacked.

The same arithmetic as ``client.gradient`` and a step of plain SGD, with what a general machine cannot do: no graph is
built, activations are overwritten where nobody reads them again, and a matrix steps down inside the product that would
have been its gradient.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from fedsim import params as p
from fedsim.records import IGNORED, Params
from fedsim.training.chain_layers import Collect, Descend, Keys, Layer, Sink
from fedsim.training.chain_modules import has_parameters, layers_of, takes_one_client

_MEAN = 1  # of the reductions of nll_loss
_nll_loss, _nll_loss_backward = torch.ops.aten.nll_loss_forward.default, torch.ops.aten.nll_loss_backward.default


@dataclass(frozen=True)
class Chain:
    """A model as a chain of layers, in training.

    head: layers ahead of the first one with parameters; nothing goes back through them.
    layers: the others.
    one_by_one: whether clients are trained one after another, because a layer takes only one.
    """

    head: tuple[Layer, ...]
    layers: tuple[Layer, ...]
    one_by_one: bool

    def gradient(self, local: Params, inputs: Tensor, labels: Tensor, keys: Keys) -> tuple[Params, Tensor]:
        """Gradient and value of each client's mean batch loss at its parameters.

        Args:
            local: parameters (clients, *shape) by name, which require no gradient. Not changed.
            inputs: (clients, batch, *input_shape). Not changed.
            labels: (clients, batch) int64; -100 marks rows that count for nothing. Each client has one that counts.
            keys: int64 (clients,) for each key buffer of the model.

        Returns:
            Gradients (clients, *shape) in the order of ``local``, and losses (clients,).
        """
        gradients = {name: torch.empty_like(tensor) for name, tensor in local.items()}
        return gradients, self._backward(local, inputs, labels, keys, Collect(gradients))

    def step_(
        self, local: Params, inputs: Tensor, labels: Tensor, keys: Keys, *, lr: float, weight_decay: float
    ) -> Tensor:
        """One step of SGD in place: ``w <- (1 - lr * weight_decay) w - lr * gradient``.

        Args:
            local: parameters (clients, *shape) by name, which require no gradient. Changed.
            inputs, labels, keys: as for :meth:`gradient`.
            lr: step size.
            weight_decay: L2 strength, in units of 1 / (loss * parameter^2).

        Returns:
            Losses (clients,) before the step.
        """
        if not torch.is_inference_mode_enabled():
            with torch.inference_mode():  # each call of torch is quicker in it
                losses = self.step_(local, inputs, labels, keys, lr=lr, weight_decay=weight_decay)
            return losses.clone()  # what was made in inference mode may not be changed outside
        return self._backward(local, inputs, labels, keys, Descend(local, lr, 1.0 - lr * weight_decay))

    def stacked(self, params: Params, clients: int) -> Params:
        """``clients`` fresh copies of each tensor, (clients, *shape), in the memory layout that is fastest here."""
        return {name: _copies(tensor, clients) for name, tensor in params.items()}

    def _backward(self, local: Params, inputs: Tensor, labels: Tensor, keys: Keys, sink: Sink) -> Tensor:
        """All clients at once, or each as a stack of one, without the padding at its end; returns the losses."""
        if not self.one_by_one:
            return self._pass(local, inputs, labels, keys, sink)
        losses = []
        for c, counted in enumerate(labels != IGNORED):
            one, rows = slice(c, c + 1), int(counted.nonzero()[-1]) + 1
            own, own_keys = p.lanes(local, one), p.lanes(keys, one)
            losses.append(self._pass(own, inputs[one, :rows], labels[one, :rows], own_keys, sink.of_clients(one)))
        return losses[0] if len(losses) == 1 else torch.cat(losses)

    def _pass(self, local: Params, inputs: Tensor, labels: Tensor, keys: Keys, sink: Sink) -> Tensor:
        """Forward and backward; returns the losses."""
        if labels.dim() > 2:  # one label for each of many rows of an example
            inputs, labels = inputs.flatten(1, -2), labels.flatten(1)
        x, saved = inputs, []
        for layer in self.head:
            x, _ = layer.forward(x, local, keys)
        for layer in self.layers:
            x, kept = layer.forward(x, local, keys)
            saved.append(kept)
        losses, slope = _cross_entropy(x, labels)
        for layer, kept in zip(reversed(self.layers), reversed(saved), strict=True):
            slope = layer.backward(slope, kept, local, sink)
        return losses


def chain_of(model: nn.Module) -> Chain | None:
    """``model`` as a chain, or None if it is not one (see ``chain_modules.layers_of``)."""
    layers = layers_of(model)
    if layers is None:
        return None
    first = next(i for i, layer in enumerate(layers) if has_parameters(layer))
    return Chain(layers[:first], layers[first:], any(map(takes_one_client, layers)))


def _copies(tensor: Tensor, clients: int) -> Tensor:
    stack = tensor.detach().expand(clients, *tensor.shape)
    if tensor.dim() == 4:
        return stack.permute(0, 1, 3, 4, 2).clone(memory_format=torch.contiguous_format).permute(0, 1, 4, 2, 3)
    return stack.clone(memory_format=torch.contiguous_format)


def _cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Each client's mean loss (clients,) over the labels that count, and its slope at the logits.

    ``slope = weight (softmax - one-hot)``. Classes lead, so that rows, which are many, lie side by side in memory.
    """
    clients, batch, classes = logits.shape
    if clients == 1:
        return _cross_entropy_of_one(logits[0], labels[0])
    log_p = torch.log_softmax(logits.flatten(0, 1).t(), 0)
    minus_weight = (labels != IGNORED).to(logits.dtype)
    minus_weight.div_(minus_weight.sum(1, keepdim=True)).neg_()
    row, places = minus_weight.reshape(1, -1), labels.clamp(min=0).reshape(1, -1)
    losses = log_p.gather(0, places).view(clients, batch).mul_(minus_weight).sum(1)
    slope = log_p.exp_().mul_(row).neg_().scatter_add_(0, places, row)
    return losses, slope.view(classes, clients, batch).permute(1, 2, 0)


def _cross_entropy_of_one(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The same for one client, (batch, classes): half as many calls of torch, which few rows are quicker than."""
    log_p = torch.log_softmax(logits, 1)
    loss, counted = _nll_loss(log_p, labels, None, _MEAN, IGNORED)
    to_log_p = _nll_loss_backward(_one(logits.dtype), log_p, labels, None, _MEAN, IGNORED, counted)
    return loss.view(1), torch._log_softmax_backward_data(to_log_p, log_p, 1, logits.dtype).unsqueeze(0)


@cache
def _one(dtype: torch.dtype) -> Tensor:
    return torch.ones((), dtype=dtype)
