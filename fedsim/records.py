"""The small frozen records that travel between layers. No behaviour beyond what follows from the fields."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from torch import Tensor

Params = dict[str, Tensor]
Indices = npt.NDArray[np.int64]

IGNORED = -100  # a label that counts neither in a loss nor in an accuracy: padding of short texts


@dataclass(frozen=True)
class Examples:
    """Inputs and labels with one leading axis.

    inputs: (n, *input_shape), float32 features or images, or int64 tokens.
    labels: (n,) int64 classes, or (n, time) int64 for one class per position.
    """

    inputs: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return int(self.labels.shape[0])

    def take(self, indices: Tensor) -> "Examples":
        """The examples at ``indices`` (int64), copied."""
        return Examples(self.inputs.index_select(0, indices), self.labels.index_select(0, indices))


@dataclass(frozen=True)
class Dataset:
    """Everything one dataset provides.

    train, test: examples; ``test`` is None where the dataset has no test set of its own, and a part of ``train`` is
        then held out.
    num_classes: labels lie in [0, num_classes).
    columns: id columns for the natural split: name -> int64 array (len(train),); ids in [0, number of owners).
    test_columns: the same for ``test``; ids mean the same owners.
    class_names: for tables and plots, in label order; empty if unknown.
    """

    name: str
    train: Examples
    test: Examples | None
    num_classes: int
    columns: Mapping[str, Indices] = field(default_factory=dict)
    test_columns: Mapping[str, Indices] = field(default_factory=dict)
    class_names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Partition:
    """Who holds which example, in compressed rows: client k holds ``indices[offsets[k]:offsets[k + 1]]``.

    offsets: int64 (clients + 1,), ascending from 0.
    indices: int64 (n,), no index twice. A split that uses only a part of the data leaves the rest out.
    noise_std: float32 (clients,) or None: standard deviation of the Gaussian noise on each client's inputs.
    column, owner_ids: of a natural split, the id column and the id, int64 (clients,) ascending, behind each client.
    """

    offsets: Indices
    indices: Indices
    noise_std: npt.NDArray[np.float32] | None = None
    column: str | None = None
    owner_ids: Indices | None = None

    @property
    def num_clients(self) -> int:
        """Number of clients."""
        return len(self.offsets) - 1

    def sizes(self) -> Indices:
        """Examples per client: int64 (clients,)."""
        return np.diff(self.offsets)

    def client(self, k: int) -> Indices:
        """Indices that client k holds (a view)."""
        return self.indices[self.offsets[k] : self.offsets[k + 1]]

    def owners(self) -> Indices:
        """Client of each entry of ``indices``: int64 (n,)."""
        return np.repeat(np.arange(self.num_clients, dtype=np.int64), self.sizes())


@dataclass(frozen=True)
class Masks:
    """Which entries of parameters remain. All others are pruned: exactly 0 for whoever has these masks.

    kept: bool tensors by parameter name, in the parameters' shapes; parameters that are not named are whole.
    version: 1, 2, ...: grows with every change; whoever answers says which version it trained with.
    """

    kept: Params
    version: int


@dataclass(frozen=True)
class Broadcast:
    """Server to client. ``extra`` is what a server rule wants every client to have, empty for most.

    masks: of the server, which owns them; the parameters have been pruned by them already. None: nothing is pruned.
    unaware: clients of this round that have not been sent this version of the masks yet.
    probe: clients are to return the gradient at these parameters, or the Hessian times a direction that ``extra``
        brings, and not to train.
    """

    params: Params
    buffers: Params
    extra: Params
    round: int
    masks: Masks | None = None
    unaware: tuple[int, ...] = ()
    probe: bool = False


@dataclass(frozen=True)
class ServerState:
    """Everything a run needs to go on after ``round`` as if it had never stopped.

    server: the server rule's state. clients: state of each client that keeps one.
    pruning: what pruning remembers: masks, their version, initial weights.
    """

    round: int
    params: Params
    buffers: Params
    server: Params = field(default_factory=dict)
    clients: Mapping[int, Params] = field(default_factory=dict)
    pruning: Params = field(default_factory=dict)


@dataclass(frozen=True)
class ClientUpdate:
    """Client to server. ``update`` = local - global; ``buffers`` are the client's own after training.

    mask_version: of the server's masks that it trained with; 0 if there were none.
    kept: the client's own masks, if it has any: bool tensors by parameter name. The update is 0 elsewhere.
    coded: the update as the bytes that are sent of it, where they are not its tensors as they are; else empty.
    """

    client: int
    update: Params
    buffers: Params
    num_examples: int
    metrics: dict[str, float]
    state: Params
    mask_version: int = 0
    kept: Params = field(default_factory=dict)
    coded: bytes = b""


@dataclass(frozen=True)
class StackedUpdate:
    """What several clients send, in one record: tensors (clients, *shape), one lane for each of ``clients``, in order.

    metrics: one number per client. states: (clients, *shape) as well; {} if they keep none.
    bytes_up: what each of them sends, serialised.
    kept: the clients' own masks, bool (clients, *shape); {} if they have none.
    """

    clients: tuple[int, ...]
    update: Params
    buffers: Params
    num_examples: tuple[int, ...]
    metrics: dict[str, tuple[float, ...]]
    states: Params
    bytes_up: tuple[int, ...]
    kept: Params = field(default_factory=dict)


@dataclass(frozen=True)
class CohortUpdate:
    """What an engine returns for one round: the aggregate, not the single updates.

    update, buffers: the aggregator's result; None when no client contributed.
    clients: who contributed, ascending. num_examples: of each.
    skipped: clients whose update was not finite and that ``on_nan: skip`` left out.
    metrics: means over the contributing clients, weighted by examples.
    states: new state of each client that keeps one.
    bytes_up, bytes_down: serialised by the codec in use, all clients of the round together.
    """

    update: Params | None
    buffers: Params | None
    clients: tuple[int, ...]
    num_examples: tuple[int, ...]
    skipped: tuple[int, ...]
    metrics: dict[str, float]
    states: dict[int, Params]
    bytes_up: int
    bytes_down: int


@dataclass(frozen=True)
class ClientEvaluation:
    """One line of clients.jsonl."""

    round: int
    client: int
    num_examples: int
    loss: float
    accuracy: float


@dataclass(frozen=True)
class RoundRecord:
    """One line of rounds.jsonl. ``loss`` and ``accuracy`` are on held-out data, None in rounds without evaluation.

    clients: number of clients that contributed; ``cohort`` are their ids, ascending.
    seconds: wall time of the round with its evaluation.
    epochs: that clients trained before they stopped early, mean weighted by examples; None where they cannot.
    sparsity: share of prunable weights that was pruned while the clients trained; None without pruning.
    remaining: share of each layer's weights that was not: parameter name -> share.
    overlap: where clients have masks of their own, and the two above are means over them: mean Jaccard index of pairs.
    failed: on separate machines, why a client of the cohort contributed nothing: client -> reason.
    client_accuracy_*: mean, standard deviation and mean of the worst tenth, over clients with held-out examples.
    """

    round: int
    loss: float | None
    accuracy: float | None
    train_loss: float | None
    clients: int
    seconds: float
    bytes_up: int
    bytes_down: int
    epsilon: float | None = None
    epochs: float | None = None
    sparsity: float | None = None
    remaining: Mapping[str, float] = field(default_factory=dict)
    overlap: float | None = None
    client_accuracy_mean: float | None = None
    client_accuracy_std: float | None = None
    client_accuracy_worst_tenth: float | None = None
    cohort: tuple[int, ...] = ()
    skipped: tuple[int, ...] = ()
    failed: Mapping[int, str] = field(default_factory=dict)
