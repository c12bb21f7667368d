"""The table of pruning methods: what ``pruning`` can name."""

from collections.abc import Callable

from fedsim.pruning.lottery import lottery_ticket
from fedsim.pruning.magnitude import magnitude
from fedsim.pruning.pruning import Pruning

PRUNING: dict[str, Callable[..., Pruning]] = {
    "lottery-ticket": lottery_ticket,
    "magnitude": magnitude,
}
