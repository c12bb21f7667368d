"""A client's work: one pure function from (broadcast, data, state, key) to an update.

This loop is the definition of correct local training. Faster engines do the same arithmetic in another place or for
many clients at once, and are tested against it.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedsim import params as p
from fedsim import rng
from fedsim.models.layers.keyed import step_keys
from fedsim.records import Broadcast, ClientUpdate, Examples, Params
from fedsim.training import kept, masking
from fedsim.training.clipping import clipped
from fedsim.training.local_rule import LocalRule
from fedsim.training.masking import Opening, Tickets
from fedsim.training.objective import PLAIN, Objective, Start, penalised, watched
from fedsim.training.optimizers import Optimizer
from fedsim.training.schedules import Schedule, unchanged
from fedsim.training.stopping import Reached, Stopping, after_epoch, parted

DIRECTION = "direction/"  # what a probe's ``extra`` calls the direction that it asks the Hessian times


@dataclass(frozen=True)
class LocalWork:
    """What every client of a federation does with its data.

    model: a template; only its structure is used, and its own parameters as first values (``kept``, ``tickets``).
    key_names: names of the model's key buffers (of stochastic layers).
    batch_size: examples per step, >= 1; None takes all of a client's examples in one step.
    autocast: run the forward pass in bfloat16 where torch finds it safe; parameters stay as they are.
    schedule: round -> factor on the optimizer's step size.
    objective: what is minimised.
    progress_names, rounds: names of the buffers of ramped layers that are told round / rounds.
    seeded: the model draws from torch's global generator, so each client is trained by itself, within
        ``rng.torch_seeded`` of its key.
    kept: names of parameters and buffers that stay with each client; the model holds their first values.
    max_grad_norm: longest gradient that the optimizer is given, > 0; None: any.
    stopping: when a client stops before its last epoch, and goes back to its best one; None: never.
    tickets: how clients come by masks of their own; None: they have none.
    """

    model: nn.Module
    key_names: tuple[str, ...]
    optimizer: Optimizer
    rule: LocalRule
    local_epochs: int
    batch_size: int | None
    autocast: bool = False
    schedule: Schedule = unchanged
    seeded: bool = False
    objective: Objective = PLAIN
    progress_names: tuple[str, ...] = ()
    rounds: int = 1
    kept: tuple[str, ...] = ()
    max_grad_norm: float | None = None
    stopping: Stopping | None = None
    tickets: Tickets | None = None

    @property
    def validation(self) -> float:
        """Share of a client's examples that it does not train on, but is judged by."""
        judge = self.stopping or self.tickets
        return judge.validation if judge else 0.0

    @property
    def personal(self) -> bool:
        """Whether clients have models of their own, of which the global one is but a part."""
        return bool(self.kept) or self.tickets is not None


def batches(n: int, batch_size: int | None, local_epochs: int, key: int) -> Iterator[Tensor]:
    """Indices of each step's examples, epoch after epoch, each epoch in its own random order.

    The last batch of an epoch may be smaller; no example is dropped.

    Args:
        n: number of examples, >= 1.
        batch_size: >= 1, or None for one batch of all.
        local_epochs: >= 1.
        key: of this client in this round.

    Returns:
        Iterator over int64 tensors (<= batch_size,).
    """
    for epoch in range(local_epochs):
        yield from torch.split(rng.permutation(rng.fold(key, "epoch", epoch), n), batch_size or n)


def layer_inputs(work: LocalWork, step_key: int | Tensor, round: int) -> Params:
    """What the model's stochastic layers are given for one step: keys, and how far the federation has come.

    Args:
        step_key: as for :func:`fedsim.models.layers.keyed.step_keys`.
        round: 1, 2, ...

    Returns:
        Buffer name -> tensor in the shape of ``step_key``; int64 keys, float32 progress in (0, 1].
    """
    given = step_keys(work.key_names, step_key)
    if work.progress_names:
        like = next(iter(given.values()))
        progress = torch.full(like.shape, round / work.rounds, dtype=torch.float32, device=like.device)
        given.update(dict.fromkeys(work.progress_names, progress))
    return given


def batch_loss(work: LocalWork, params: Params, buffers: Params, batch: Examples, layer_keys: Params) -> Tensor:
    """Mean loss of a batch in training mode, without penalties: scalar tensor (). Batch-norm ``buffers`` are updated
    in place.

    layer_keys: from :func:`layer_inputs`.
    """
    return _losses(work, params, buffers, batch, layer_keys)[0]


def objective_at(
    work: LocalWork, local: Params, buffers: Params, batch: Examples, layer_keys: Params, *, start: Start
) -> tuple[Tensor, Tensor]:
    """What is minimised, at ``local``, and its part without penalties, both scalar tensors ()."""
    loss, with_maps = _losses(work, local, buffers, batch, layer_keys)
    return penalised(work.objective, with_maps, local, start), loss


def _losses(
    work: LocalWork, params: Params, buffers: Params, batch: Examples, layer_keys: Params
) -> tuple[Tensor, Tensor]:
    """The mean loss, without and with the penalties on what layers return."""
    objective, mixed = work.objective, None
    if objective.mixing is not None:
        name, mix = objective.mixing
        mixed = mix(batch.inputs, batch.labels, layer_keys[name])
    inputs = batch.inputs if mixed is None else mixed.inputs
    with (
        torch.autocast(batch.labels.device.type, torch.bfloat16, enabled=work.autocast),
        watched(work.model, objective) as returned,
    ):
        logits = functional_call(work.model, {**params, **buffers, **layer_keys}, (inputs,))
    logits = logits.float() if work.autocast else logits
    loss = objective.loss(logits, batch.labels)
    if mixed is not None:
        loss = mixed.share * loss + (1 - mixed.share) * objective.loss(logits, mixed.partners)
    with_maps = loss
    for path, penalty in objective.maps:
        with_maps = with_maps + penalty(returned[path], batch.labels)
    return loss, with_maps


def gradient(
    work: LocalWork,
    local: Params,
    buffers: Params,
    batch: Examples,
    layer_keys: Params,
    *,
    start: Start | None = None,
) -> tuple[Params, Tensor]:
    """Gradient of the objective at ``local``, and the value of :func:`batch_loss` there.

    start: None: the client starts here, and has this batch.
    """
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in local.items()}
    whole, loss = objective_at(work, leaves, buffers, batch, layer_keys, start=start or Start(local, len(batch)))
    grads = torch.autograd.grad(whole, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, grads, strict=True)), loss.detach()


def product(
    work: LocalWork,
    local: Params,
    buffers: Params,
    batch: Examples,
    layer_keys: Params,
    *,
    direction: Params,
    start: Start | None = None,
) -> tuple[Params, Tensor]:
    """Hessian of the objective at ``local`` times a direction, and the value of :func:`batch_loss` there.

    ``H v = d <g(w), v> / dw``, by differentiating twice; exact but for rounding.

    direction: v; parameters that it does not name do not move in it. Others: as for :func:`gradient`.

    Raises:
        ValueError: an operation of the model has no second derivative.

    Source: Pearlmutter 1994, "Fast exact multiplication by the Hessian", section 3. Differs: reverse mode twice.
    """
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in local.items()}
    with _twice(work.model):
        whole, loss = objective_at(work, leaves, buffers, batch, layer_keys, start=start or Start(local, len(batch)))
        grads = _with_graph(whole, leaves)
        slope = sum((g * direction[name]).sum() for name, g in grads.items() if name in direction)
        if not isinstance(slope, Tensor) or not slope.requires_grad:  # gradients are the same everywhere
            return p.zeros_like(local), loss.detach()
        torch.autograd.backward(
            slope
        )  # ``autograd.grad`` goes around an operation that can be differentiated only once
    return {n: torch.zeros_like(t) if t.grad is None else t.grad for n, t in leaves.items()}, loss.detach()


def _with_graph(whole: Tensor, leaves: Params) -> Params:
    """Gradients that can be differentiated again."""
    own = list(leaves.values())
    grads = torch.autograd.grad(whole, own, create_graph=True, allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, grads, strict=True))


@contextmanager
def _twice(model: nn.Module) -> Iterator[None]:
    """Where derivatives of gradients are taken. cuDNN's recurrent layers have none, those of torch itself have."""
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    try:
        with torch.backends.cudnn.flags(enabled=False) if recurrent else nullcontext():
            yield
    except RuntimeError as error:
        if not any(said in str(error) for said in ("derivative", "differentiate twice")):
            raise
        raise ValueError(f"the model has no second derivatives: {str(error).partition(chr(10))[0]}") from error


def directed(direction: Params) -> Params:
    """What a probe's ``extra`` must be to ask for the Hessian times this direction."""
    return {DIRECTION + name: tensor for name, tensor in direction.items()}


def corrected(
    work: LocalWork, grads: Params, local: Params, broadcast: Broadcast, state: Params, *, remains: Params
) -> Params:
    """What the optimizer is given: what the strategy makes of the gradients, 0 where pruned, clipped. Those of tensors
    that stay with the client are none of the strategy's business.

    state: of the rule alone.
    """
    sent, held = (kept.shared(tensors, work.kept) for tensors in (grads, local))
    made = masking.zeroed({**grads, **work.rule.correct(sent, held, broadcast, state)}, remains)
    return clipped(made, work.max_grad_norm)


def opened(work: LocalWork, broadcast: Broadcast, judged: Examples, state: Params) -> Opening:
    """How a client's turn begins: with the parameters as they came, unless the client rewinds its own ticket.

    judged: examples of the client, see :func:`fedsim.training.stopping.parted`.
    """
    if work.tickets is None:
        return Opening(state, broadcast.params)
    return work.tickets.opened(work.model, work.kept, broadcast, judged, state)


def train_client(
    work: LocalWork, broadcast: Broadcast, client: int, data: Examples, *, state: Params, key: int
) -> ClientUpdate:
    """Train from the global parameters on one client's data.

    ``w <- m * optimizer(w, clip(m * rule.correct(grad objective(w; batch))))`` for every batch of every local epoch,
    from a fresh optimizer state, with the step size that the schedule gives this round; m are the client's masks, if
    any, which :func:`opened` may have changed just before, and then the client starts from other parameters. A
    broadcast that is a probe is answered by :func:`probed`.

    Args:
        work: what to do, the same for all clients.
        broadcast: from the server. Not changed.
        client: id, for the result.
        data: the client's examples, at least one.
        state: of this client: the rule's, and its own tensors. Not changed.
        key: of this client in this round; all its draws come from below it.

    Returns:
        ``update`` = local - global, 0 where pruned, the client's buffers, its next state, and ``train_loss``: mean loss
        over all examples of all epochs, each taken just before the step that used it. With ``work.stopping`` they are
        what the best epoch had reached; ``train_loss`` is still of all epochs, and ``epochs`` tells how many they were.
        ``num_examples`` counts those held out, too.

    Source: McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data",
        algorithm 1, ClientUpdate. Differs: none for plain SGD and the plain rule.
    """
    if broadcast.probe:
        return probed(work, broadcast, client, data, state=state, key=key)
    trained, judged = parted(work.validation, data, client)
    state, began = opened(work, broadcast, judged, state)
    with rng.torch_seeded(key) if work.seeded else nullcontext():
        work.model.train()
        own, ticket, remains = (
            kept.own(work.model, work.kept, state),
            masking.ticket(state),
            masking.remains(broadcast, state),
        )
        state = kept.rule_state(state)
        local = masking.zeroed({**began, **own.params}, remains)
        buffers = {name: b.clone() for name, b in {**broadcast.buffers, **own.buffers}.items()}
        optimizer_state = work.optimizer.init(local)
        factor = work.schedule(broadcast.round)
        best, start = None, Start(broadcast.params, len(trained))
        loss_sum, seen, steps = torch.zeros((), dtype=torch.float64), 0, 0
        for indices in batches(len(trained), work.batch_size, work.local_epochs, key):
            layer_keys = layer_inputs(work, rng.fold(key, "step", steps), broadcast.round)
            grads, loss = gradient(work, local, buffers, trained.take(indices), layer_keys, start=start)
            grads = corrected(work, grads, local, broadcast, state, remains=remains)
            local, optimizer_state = work.optimizer.step(local, grads, optimizer_state, steps + 1, factor)
            local = masking.zeroed(local, remains)
            loss_sum += loss.double() * len(indices)
            seen, steps = seen + len(indices), steps + 1
            if work.stopping is not None and seen % len(trained) == 0:
                reached = Reached(local, buffers, seen // len(trained), steps)
                best = after_epoch(work.stopping, best, work.model, reached, judged)
                if best.since == work.stopping.patience:
                    break
        metrics = {"train_loss": float(loss_sum) / seen}
        if best is not None:
            metrics["epochs"] = seen / len(trained)
            local, buffers, _, steps = best.reached
        held = kept.shared(local, work.kept)
        state = work.rule.finish(held, broadcast, state, steps)
        return ClientUpdate(
            client=client,
            update=masking.zeroed(p.sub(held, broadcast.params), remains),
            buffers=kept.shared(buffers, work.kept),
            num_examples=len(data),
            metrics=metrics,
            state=state | kept.as_state(local | buffers, work.kept) | masking.as_state(ticket),
            mask_version=masking.version(broadcast),
            kept=ticket,
        )


def probed(
    work: LocalWork, broadcast: Broadcast, client: int, data: Examples, *, state: Params, key: int
) -> ClientUpdate:
    """The gradient of the objective at the global parameters, over all of a client's examples; nothing is trained.

    It is what training mode has it be, batch by batch, and it is dense: pruned entries have a gradient, too. A
    broadcast that carries a direction (:func:`directed`) asks for the Hessian times it instead.

    Args, returns: as for :func:`train_client`, but ``update`` = - what was asked; buffers and state stay as they were.
    """
    along = {n.removeprefix(DIRECTION): t for n, t in broadcast.extra.items() if n.startswith(DIRECTION)}
    asked = partial(product, direction=along) if along else gradient
    with rng.torch_seeded(key) if work.seeded else nullcontext():
        work.model.train()
        local = {**broadcast.params, **kept.own(work.model, work.kept, state).params}
        held = kept.own(work.model, work.kept, state).buffers
        start, total = Start(broadcast.params, len(data)), p.zeros_like(broadcast.params)
        loss_sum = torch.zeros((), dtype=torch.float64)
        for step, indices in enumerate(batches(len(data), work.batch_size, 1, key)):
            buffers = {name: b.clone() for name, b in {**broadcast.buffers, **held}.items()}
            layer_keys = layer_inputs(work, rng.fold(key, "step", step), broadcast.round)
            found, loss = asked(work, local, buffers, data.take(indices), layer_keys, start=start)
            total = p.add_scaled(total, kept.shared(found, work.kept), len(indices) / len(data))
            loss_sum += loss.double() * len(indices)
        metrics = {"train_loss": float(loss_sum) / len(data)}
        return ClientUpdate(
            client=client,
            update=p.scale(total, -1.0),
            buffers=broadcast.buffers,
            num_examples=len(data),
            metrics=metrics,
            state=state,
            mask_version=masking.version(broadcast),
        )
