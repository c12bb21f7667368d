"""An LSTM of plain cells, a loop over time, with room for what torch's own has none for: masks tied over time, zoneout.

torch's LSTM is one opaque operation: nothing can be put between two of its steps, and ``torch.func.vmap`` has no rule
for it. Here each step is a handful of ordinary operations. That is slower for one client, so a model keeps torch's
until something needs the inside: :func:`plain_cells` then changes it in place, and no name changes.
"""

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsim import rng
from fedsim.models.layers.keyed import Keyed

State = tuple[Tensor, Tensor]  # hidden and cell
Zone = Tensor | float | None  # of one step: which units keep their old value, how much of it they keep, or nothing


class Rates(NamedTuple):
    """Probabilities in [0, 1): of a dropped entry of a layer's input and of its recurrent input, and of a cell or a
    hidden unit that keeps its old value.
    """

    p_input: float = 0.0
    p_hidden: float = 0.0
    zone_cell: float = 0.0
    zone_hidden: float = 0.0


class Lstm(nn.LSTM, Keyed):
    """``nn.LSTM`` as a loop over time; with rates all 0 it returns the same up to rounding.

    ``i, f, o = sigmoid, g = tanh of W (x_t * z_x) + U (h_{t-1} * z_h) + b``; ``c' = f * c_{t-1} + i * g``;
    ``h' = o * tanh(c')``. A zoned unit has ``c_t = c_{t-1}`` and all others ``c_t = c'``; the same for h.

    In training ``z`` is 0 or ``1 / (1 - p)``, drawn once for each layer, sequence and feature, and used at every step.
    Who is zoned is drawn for each layer, sequence, step and unit, for c and h apart, and nothing is scaled. In
    evaluation nothing is dropped, and all units mix: ``c_t = p * c_{t-1} + (1 - p) * c'``.

    Draws have the batch axis first, so rows added at the end of a batch change no other row.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first: as for ``nn.LSTM``, whose parameter names it has.

    Source: Hochreiter, Schmidhuber 1997, with the forget gate of Gers et al. 2000; masks: Gal, Ghahramani 2016;
        zoneout: Krueger et al. 2017. Differs: two bias vectors, as in torch. The mask on h is not applied to what a
        zoned unit keeps.
    """

    rates = Rates()

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, bias: bool = True, batch_first: bool = False
    ) -> None:
        super().__init__(input_size, hidden_size, num_layers, bias, batch_first)

    def forward(self, input: Tensor, hx: State | None = None) -> tuple[Tensor, State]:  # type: ignore[override]
        """Outputs of the last layer at every step, and the last hidden and cell state of every layer.

        Args:
            input: (time, batch, features); (batch, time, features) with ``batch_first``; or (time, features).
            hx: first states, each (layers, batch, hidden), or (layers, hidden) for an input without a batch; None: 0.

        Raises:
            ValueError: another kind of input, such as a packed sequence.
        """
        if not isinstance(input, Tensor) or input.dim() not in (2, 3):
            got = f"shape {tuple(input.shape)}" if isinstance(input, Tensor) else type(input).__name__
            raise ValueError(f"Lstm needs a tensor of 2 or 3 axes, got {got}")
        alone, first = input.dim() == 2, self.batch_first and input.dim() == 3
        steps = input.unsqueeze(1) if alone else input.transpose(0, 1) if first else input
        if hx is not None and alone:
            hx = (hx[0].unsqueeze(1), hx[1].unsqueeze(1))
        steps, (h, c) = self._stacked(steps, hx)
        if alone:
            return steps.squeeze(1), (h.squeeze(1), c.squeeze(1))
        return (steps.transpose(0, 1) if first else steps), (h, c)

    def _stacked(self, steps: Tensor, hx: State | None) -> tuple[Tensor, State]:
        """All layers, on (time, batch, features)."""
        states = []
        for layer in range(self.num_layers):
            if hx is None:
                h = c = steps.new_zeros(steps.shape[1], self.hidden_size)
            else:
                h, c = hx[0][layer], hx[1][layer]
            steps, last = self._layer(layer, steps, (h, c))
            states.append(last)
        return steps, (torch.stack([h for h, _ in states]), torch.stack([c for _, c in states]))

    def _layer(self, layer: int, steps: Tensor, state: State) -> tuple[Tensor, State]:
        time, batch, features = steps.shape
        rates, hidden = self.rates, self.hidden_size
        key = rng.fold_tensor(self.key, layer)
        dropped = self._mask(rng.fold_tensor(key, "input"), rates.p_input, batch, features, steps.dtype)
        mask = self._mask(rng.fold_tensor(key, "hidden"), rates.p_hidden, batch, hidden, steps.dtype)
        shape = (batch, time, hidden)
        cells = self._zones(rng.fold_tensor(key, "zone cell"), rates.zone_cell, *shape)
        hiddens = self._zones(rng.fold_tensor(key, "zone hidden"), rates.zone_hidden, *shape)
        zones = list(zip(cells, hiddens, strict=True))
        w_ih, w_hh, bias = self._weights(layer)
        inputs = F.linear(steps if dropped is None else steps * dropped, w_ih, bias)  # of all steps at once
        return _loop(inputs, w_hh.mT, state, mask, zones)

    def _weights(self, layer: int) -> tuple[Tensor, Tensor, Tensor | None]:
        w_ih, w_hh = (cast(Tensor, getattr(self, f"weight_{kind}_l{layer}")) for kind in ("ih", "hh"))
        if not self.bias:
            return w_ih, w_hh, None
        return w_ih, w_hh, getattr(self, f"bias_ih_l{layer}") + getattr(self, f"bias_hh_l{layer}")

    def _mask(self, key: Tensor, p: float, batch: int, features: int, dtype: torch.dtype) -> Tensor | None:
        if not self.training or p == 0.0:
            return None
        return (rng.uniform(key, batch, features) >= p).to(dtype) / (1.0 - p)

    def _zones(self, key: Tensor, p: float, batch: int, time: int, hidden: int) -> Sequence[Zone]:
        """One for each step."""
        if p == 0.0 or not self.training:
            return [p or None] * time
        return rng.bernoulli(key, p, batch, time, hidden).unbind(1)

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        strengths = (f", {name}={rate}" for name, rate in self.rates._asdict().items() if rate)
        return super().extra_repr() + "".join(strengths)


def _loop(
    inputs: Tensor, w_hh: Tensor, state: State, mask: Tensor | None, zones: Sequence[tuple[Zone, Zone]]
) -> tuple[Tensor, State]:
    """One layer over time.

    Args:
        inputs: what enters the gates from below, (time, batch, 4 * hidden), in torch's order i, f, g, o.
        w_hh: (hidden, 4 * hidden).
        state: first h and c, (batch, hidden).
        mask: on h where it enters the gates, (batch, hidden), or None.
        zones: of c and h at each step.
    """
    (h, c), outputs = state, []
    width = w_hh.shape[0]
    for entering, (cell, hidden) in zip(inputs.unbind(0), zones, strict=True):
        gates = torch.addmm(entering, h if mask is None else h * mask, w_hh)
        opened, new, out = torch.split(gates, [2 * width, width, width], 1)  # three calls in the place of four
        i, f = opened.sigmoid().chunk(2, 1)
        fresh = torch.addcmul(f * c, i, new.tanh())
        h = _zoned(out.sigmoid() * fresh.tanh(), h, hidden)
        c = _zoned(fresh, c, cell)
        outputs.append(h)
    return torch.stack(outputs), (h, c)


def _zoned(new: Tensor, old: Tensor, zone: Zone) -> Tensor:
    if zone is None:
        return new
    return torch.where(zone, old, new) if isinstance(zone, Tensor) else torch.lerp(new, old, zone)


class TypeDropout(nn.Embedding, Keyed):
    """``nn.Embedding`` that drops whole types of tokens: in a sequence, all places of a dropped type are 0.

    The others are scaled by ``1 / (1 - p)``. Whether a type is dropped is drawn from the key, the place of the sequence
    in the batch and the type alone, so neither more rows nor longer ones change it. No draws in evaluation.

    p: probability of a dropped type, in [0, 1).

    Source: Gal, Ghahramani 2016, section 4.2 (unverified). Differs: scaled in training rather than in testing.
    """

    p = 0.0

    def forward(self, input: Tensor) -> Tensor:
        """Tokens (batch, ...) to vectors (batch, ..., features)."""
        vectors = super().forward(input)
        if not self.training or self.p == 0.0:
            return vectors
        rows = rng.fold_tensor(self.key, torch.arange(len(input), device=self.key.device))
        keys = rng.fold_tensor(rows.view(-1, *[1] * (input.dim() - 1)), input.long())
        kept = rng.uniforms(keys.flatten(), 1).reshape(*input.shape, 1) >= self.p
        return torch.where(kept, vectors / (1.0 - self.p), 0.0)

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"{super().extra_repr()}, p={self.p}"


def plain_cells(lstm: nn.LSTM) -> Lstm:
    """Make an ``nn.LSTM`` an :class:`Lstm`, in place: the same object, parameters and hooks.

    Raises:
        ValueError: it is a subclass of somebody's, bidirectional, or has projections or dropout between its layers.
    """
    if isinstance(lstm, Lstm):
        return lstm
    if type(lstm) is not nn.LSTM:
        raise ValueError(
            f"needs nn.LSTM itself, since a subclass may compute something else; got {type(lstm).__name__}"
        )
    having = {"bidirectional": lstm.bidirectional, "proj_size": lstm.proj_size, "dropout": lstm.dropout}
    if unknown := [f"{name}={value}" for name, value in having.items() if value]:
        raise ValueError(f"needs an nn.LSTM in one direction, without projections or dropout; got {', '.join(unknown)}")
    return cast(Lstm, _keyed(lstm, Lstm))


def type_dropout(embedding: nn.Embedding, p: float) -> None:
    """Make an ``nn.Embedding`` a :class:`TypeDropout`, in place.

    Raises:
        ValueError: it is a subclass of somebody's, or drops types already.
    """
    if isinstance(embedding, TypeDropout):
        raise ValueError("the model drops types of tokens already")
    if type(embedding) is not nn.Embedding:
        kind = type(embedding).__name__
        raise ValueError(f"needs nn.Embedding itself, since a subclass may compute something else; got {kind}")
    cast(TypeDropout, _keyed(embedding, TypeDropout)).p = p


def _keyed(module: nn.Module, kind: type[Keyed]) -> Keyed:
    module.__class__ = kind
    module.register_buffer("key", rng.as_tensor(0), persistent=False)
    return cast(Keyed, module)
