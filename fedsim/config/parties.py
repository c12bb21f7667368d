"""From a checked config with a ``transfer`` section to what each of the two parties brings."""

from functools import partial
from pathlib import Path

import torch

from fedsim import params as p
from fedsim import rng, runs
from fedsim.config import build, pruned
from fedsim.config.making import blamed_on, make, of_type, wrong
from fedsim.config.schema import Config, Transfer
from fedsim.data.sides import Sides, Table, from_dataset
from fedsim.errors import ConfigError, DataError
from fedsim.models import batch_norm
from fedsim.models.fixup import scalar_rates
from fedsim.models.layers.keyed import adds_axis, mixes_examples
from fedsim.pruning.pruning import Pruning
from fedsim.records import Params
from fedsim.training.losses import cross_entropy
from fedsim.training.optimizers import Optimizer
from fedsim.training.scaled import scaled
from fedsim.training.schedules import Schedule
from fedsim.transfer.agreement import Agreed, Party
from fedsim.transfer.nets import Net, net_of
from fedsim.transfer.terms import Role


def section(config: Config) -> Transfer:
    """The config's ``transfer`` section.

    Raises:
        ConfigError: it has none.
    """
    if config.transfer is None:
        raise ConfigError("transfer: needed, but not given")
    return config.transfer


def agreed(config: Config) -> Agreed:
    """What both parties must have alike."""
    found = section(config)
    return Agreed(
        protocol=found.protocol,
        loss=found.loss,
        alignment=found.alignment,
        gamma=found.gamma,
        l2=found.l2,
        hidden=found.hidden,
        iterations=found.iterations,
        overlap=None if found.overlap == "all" else found.overlap,
        labelled=None if found.labelled == "all" else found.labelled,
        tolerance=found.tolerance,
        key_bits=found.key_bits,
        triples=found.triples,
    )


def sides(config: Config, progress: build.Progress = build.silent) -> Sides:
    """The tables of both parties: the dataset's own, or those that a dataset is cut into.

    Raises:
        ConfigError: the dataset cannot be cut as asked.
        DataError: the data is missing or damaged.
    """
    found, asked = build.dataset_or_sides(config, progress), section(config)
    if isinstance(found, Sides):
        return found
    assert found.test is not None
    count = asked.overlap if isinstance(asked.overlap, int) else len(found.train)
    return from_dataset(
        found.train,
        found.test,
        found.num_classes,
        overlap=count,
        share=asked.share,
        positive=None if asked.positive is None else tuple(asked.positive),
        key=rng.fold(build.data_seed(config), "sides"),
    )


def party(config: Config, role: Role, found: Sides) -> Party:
    """What a party brings.

    Raises:
        ConfigError: the model or what is done to it has no place here.
        DataError: the party's table is missing, or the source run does not fit.
    """
    asked, table = section(config), found.a if role == "a" else found.b
    if table is None:
        raise DataError(f"data.dataset: party {role} has no table; name its file")
    pruning = _pruning(config)
    shape = build.ModelShape(tuple(table.inputs.shape[1:]), asked.hidden)
    key = rng.fold(config.seed, "party", role)
    net, params = _net(config, shape, table, pruning, key)
    if role == "a" and asked.source_run is not None:
        params = _started(net, params, Path(asked.source_run).expanduser())
    optimizer = of_type(Optimizer, make(config, "optimizers"), "train.optimizer", config.train.optimizer)
    schedule: Schedule = make(config, "schedules", rounds=asked.iterations)
    if not callable(schedule):
        raise wrong(schedule, "train.schedule", config.train.schedule, "a function of the iteration")
    return Party(
        role=role,
        ids=table.ids,
        inputs=table.inputs.double(),
        labels=None if role == "b" else _labels(table),
        asks=None if role == "a" else _asks(found, table),
        net=net,
        params=params,
        optimizer=scaled(optimizer, scalar_rates(net.model)),
        key=key,
        schedule=schedule,
        pruning=pruning,
        fresh=partial(_fresh, config, shape),
    )


def _labels(table: Table) -> torch.Tensor:
    assert table.labels is not None
    return table.labels.double()


def _asks(found: Sides, table: Table) -> torch.Tensor:
    return table.inputs[:0].double() if found.held_out is None else found.held_out.inputs.double()


def _net(
    config: Config, shape: build.ModelShape, table: Table, pruning: Pruning | None, key: int
) -> tuple[Net, Params]:
    """The net of a party, and its first parameters."""
    example = table.inputs[0].float()
    made = build.made_model(config, shape, example, pruning, key=rng.fold(key, "model"))
    if made.draws.seeded:
        rule = "draws from torch's global generator, which a row by row pass cannot follow; use keyed layers"
        raise ConfigError(f"model.name: {config.model.name} {rule}")
    objective = made.objective
    if objective.loss is not cross_entropy or objective.maps or objective.mixing or adds_axis(made.model):
        rule = "those that change the loss, the labels or the head have no place in front of hidden values"
        raise ConfigError(f"model.regularizers: {rule}")
    if mixes_examples(made.model) or (_has_batch_norm(made.model) and config.train.batch_norm != "freeze"):
        rule = "a party's net must treat every row by itself, this one mixes rows (norm: group or layer does not)"
        raise ConfigError(f"model: {rule}")
    params = {name: tensor.detach().double().clone() for name, tensor in p.of(made.model)[0].items()}
    with blamed_on("model", config.model):
        try:
            net = net_of(
                made.model,
                example.double(),
                only_head=section(config).trains == "head",
                penalties=objective.penalties,
            )
        except ValueError as error:
            raise ConfigError(f"transfer.{error}") from error
    return net, params


def _has_batch_norm(model: torch.nn.Module) -> bool:
    try:
        return bool(batch_norm.tensors(model))
    except ValueError:
        return False


def _pruning(config: Config) -> Pruning | None:
    found = pruned.pruning(config)
    if found is None:
        return None
    asks = {"gradients of clients": found.probes, "examples of clients": found.looks}
    does = {"removes channels": found.removes, "gives clients masks of their own": found.tickets is not None}
    why = [f"asks for {what}" for what, it in asks.items() if it] + [what for what, it in does.items() if it]
    if why:
        assert config.pruning is not None
        raise ConfigError(f"pruning: {config.pruning.name} {why[0]}, which two parties cannot do")
    return found


def _fresh(config: Config, shape: build.ModelShape, key: int) -> tuple[Params, Params]:
    """First parameters and buffers as another seed would have them."""
    return p.of(build.made_model(config, shape, None, pruned.pruning(config), key=key).model)


def _started(net: Net, params: Params, folder: Path) -> Params:
    """The parameters with those of a finished run in place of all but the last layer's.

    Raises:
        ConfigError: there is no last layer to leave out, or the run's model is another one.
        DataError: not a run folder, or it has no model.
    """
    if net.head is None:
        raise ConfigError("transfer.source_run: needs a model that ends in a plain linear layer, which starts anew")
    run = runs.open_run(folder)
    if run.summary().get("status") != "finished":
        raise DataError(f"transfer.source_run: {folder} is not finished")
    found = run.model()
    body = [name for name in params if name not in net.head_names]
    if not body:
        raise ConfigError("transfer.source_run: needs a model with layers before the last, which starts anew")
    for name in body:
        if name not in found or found[name].shape != params[name].shape:
            has = f"shape {tuple(found[name].shape)}" if name in found else "no such parameter"
            rule = f"must have {name} of shape {tuple(params[name].shape)}, as party A's net has it; it has {has}"
            raise ConfigError(f"transfer.source_run: {folder} {rule}")
    return {**params, **{name: found[name].double() for name in body}}
