"""What a config says of pruning, and what does not go with it."""

from fedsim.config.making import make, of_type
from fedsim.config.schema import Config
from fedsim.data.federated import FederatedData
from fedsim.errors import ConfigError
from fedsim.pruning.pruning import Pruning
from fedsim.strategies.strategy import Strategy
from fedsim.training.local_rule import no_state, same_state
from fedsim.training.masking import Tickets


def pruning(config: Config) -> Pruning | None:
    """The pruning method that the config names, if it does."""
    if config.pruning is None:
        return None
    return of_type(Pruning, make(config, "pruning"), "pruning", config.pruning)


def tickets(config: Config, data: FederatedData, pruning: Pruning | None) -> Tickets | None:
    """How clients come by masks of their own.

    Raises:
        ConfigError: nobody could be tested with them.
    """
    if pruning is None or pruning.tickets is None:
        return None
    if not len(data.test_partition.indices):
        raise _refused(config, "needs clients with held-out examples: there is no model to test but each client's own")
    return pruning.tickets


def check_tickets(config: Config, strategy: Strategy) -> None:
    """Refuse what clients with masks of their own cannot be joined with.

    Raises:
        ConfigError: says why.
    """
    name = config.strategy.name
    if not strategy.aggregator.linear:
        rule = "each entry moves by the mean over the clients that hold it"
        raise _refused(config, f"needs a strategy that takes means, which {name} does not: {rule}")
    if strategy.local.init is not no_state or strategy.local.finish is not same_state:
        rule = "a client that rewinds does not start from the model that it was sent"
        raise _refused(config, f"needs a strategy of which clients keep nothing, unlike {name}: {rule}")
    if config.train.early_stopping is not None:
        rule = "both hold examples out to judge by, each its own share of them"
        raise _refused(config, f"goes with no train.early_stopping: {rule}")


def check_removal(config: Config) -> None:
    """Refuse what cannot go on once channels have been removed.

    Raises:
        ConfigError: says why.
    """
    assert config.pruning is not None  # which removes them
    if config.train.batch_norm == "local":
        rule = "the server cannot remove channels of what stays with clients"
        raise _refused(config, f"goes with no train.batch_norm: local: {rule}")
    if config.pruning.params().get("then") == "scratch" and getattr(config.model, "init", None) == "fixup":
        rule = "the small model would be drawn as its layers are, without it"
        raise _refused(
            config, f"cannot train from scratch with model.init: fixup: {rule}; set pruning.then to fine-tune"
        )


def _refused(config: Config, why: str) -> ConfigError:
    assert config.pruning is not None  # which refuses
    return ConfigError(f"pruning: {config.pruning.name} {why}")


def removes_channels(config: Config) -> bool:
    """Whether pruning makes the model smaller than the config says."""
    made = pruning(config)
    return made is not None and made.removes


def check_apart(config: Config) -> None:
    """Refuse what no server can do whose clients are on machines of their own.

    Raises:
        ConfigError: says why.
    """
    made = pruning(config)
    if made is not None and made.looks:
        raise _refused(config, "looks at training examples of clients, which a server does not have: simulate it")
