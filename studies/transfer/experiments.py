"""What is run: each experiment makes rows of numbers at a place, which is a data set and a seed."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from tables import HERE, MOST, Place, Tables, alone, majority, reference, tables

import fedsim
from fedsim.config import parties
from fedsim.transfer.protocols import multiplications
from fedsim.transfer.scoring import accuracy
from fedsim.transfer.together import Ends, run_together

Row = dict[str, Any]
OVERLAPS = (20, 50, 100, 200)
LABELLED = (10, 20, 50, 100)
NETS: dict[str, dict[str, Any]] = {
    "plain": {},
    "magnitude 50 %": {"pruning": {"name": "magnitude", "sparsity": 0.5}},
    "magnitude 80 %": {"pruning": {"name": "magnitude", "sparsity": 0.8}},
    "dropout 0.5": {"model__dropout": 0.5},
}


def overlap(place: Place) -> Iterator[Row]:
    """Accuracy by the number of common rows; 20 of them labelled, or all."""
    found = tables(place)
    for count in OVERLAPS:
        for labelled in dict.fromkeys((20, count)):
            told = {"overlap": count, "accuracy": _accuracy(place, found, overlap=count, labelled=labelled)}
            if labelled == 20:
                yield {"arm": "20 labelled", **told}
            if labelled == count:
                yield {"arm": "all labelled", **told}


def labelled(place: Place) -> Iterator[Row]:
    """Accuracy by the number of labelled rows, beside what either party could do alone."""
    found = tables(place)
    for count in LABELLED:
        yield {"arm": "transfer", "labelled": count, "accuracy": _accuracy(place, found, labelled=count)}
        yield {"arm": "B alone", "labelled": count, "accuracy": alone(found, count)}
        yield {"arm": "B alone, a net", "labelled": count, "accuracy": alone(found, count, net_of_seed=place.seed)}
        yield {"arm": "A's columns", "labelled": count, "accuracy": reference(found)}
        yield {"arm": "one answer", "labelled": count, "accuracy": majority(found)}


def loss(place: Place) -> Iterator[Row]:
    """The Taylor loss beside the exact one."""
    found = tables(place)
    for form in ("taylor", "exact"):
        yield {"arm": form, "accuracy": _accuracy(place, found, loss=form)}


def nets(place: Place) -> Iterator[Row]:
    """Pruned and regularised nets, at both parties, beside plain ones."""
    found = tables(place)
    for arm, changes in NETS.items():
        done = _trained(place, found, **changes)
        weights = torch.cat([p.flatten() for one in (done.a, done.b) for p in one.params.values() if p.ndim > 1])
        zeros = float((weights == 0).double().mean())
        yield {"arm": arm, "accuracy": _score(done, found), "zeros": zeros, "loss": done.a.losses[-1]}


def start(place: Place) -> Iterator[Row]:
    """Party A's net from a federation on A's columns, beside a newly drawn one; of the digits only."""
    if place.data != "digits":
        return
    found = tables(place)
    where = {"seed": place.seed, "output": str(place.out)} | ({"train.rounds": 2} if place.changes else {})
    source = fedsim.run(HERE / "source.yaml", where)
    for trains in ("all", "head"):
        for begins, run in (("new", None), ("source run", str(source.folder))):
            told = {"trains": trains, "source_accuracy": source.rounds[-1].accuracy}
            yield {"arm": begins, **told, "accuracy": _accuracy(place, found, trains=trains, source_run=run)}


def same(place: Place) -> Iterator[Row]:
    """Whether B is told under secret sharing what it is told in the clear; with plain SGD, of one seed, as well."""
    found = tables(place)
    few = {"transfer__overlap": 50, "transfer__labelled": 20}
    for arm, optimizer in (("adam", None), ("sgd", {"name": "sgd", "lr": 0.2})):
        if arm == "sgd" and place.seed != 1:
            continue
        changes = few if optimizer is None else {**few, "train__optimizer": optimizer}
        plain, shared = (
            _trained(place, found, **changes, transfer__protocol=name) for name in ("plain", "secret-sharing")
        )
        assert plain.b.predicted is not None and shared.b.predicted is not None
        told = {
            "different": float((plain.b.predicted != shared.b.predicted).double().mean()),
            "apart": _apart(plain, shared),
        }
        for protocol, done in (("plain", plain), ("secret-sharing", shared)):
            yield {"arm": f"{arm}, {protocol}", "accuracy": _score(done, found), **told}


def _apart(one: Ends, two: Ends) -> float:
    """Largest difference of a parameter of either party."""
    pairs = ((one.a.params, two.a.params), (one.b.params, two.b.params))
    return max(float((left[name] - right[name]).abs().max()) for left, right in pairs for name in left)


def _accuracy(place: Place, found: Tables, **transfer: Any) -> float:
    return _score(_trained(place, found, **{f"transfer__{key}": value for key, value in transfer.items()}), found)


def _trained(place: Place, found: Tables, **changes: Any) -> Ends:
    """Both parties of a config, on tables that do not depend on it."""
    config = place.config(**changes)
    agreed = parties.agreed(config)
    a, b = (parties.party(config, role, found.sides) for role in ("a", "b"))
    with multiplications(agreed) as ends:
        return run_together(a, b, agreed, ends, lambda _: None)


def _score(done: Ends, found: Tables) -> float:
    """Of what party B was told about the rows that are held out."""
    held_out = found.sides.held_out
    assert done.b.predicted is not None and held_out is not None and held_out.labels is not None
    return accuracy(done.b.predicted, held_out.labels)


EXPERIMENTS: dict[str, Callable[[Place], Iterator[Row]]] = {
    "overlap": overlap,
    "labelled": labelled,
    "loss": loss,
    "nets": nets,
    "start": start,
    "same": same,
}
assert max(OVERLAPS) == MOST
