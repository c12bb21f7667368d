"""The table of pruning methods: what ``pruning`` can name."""

from collections.abc import Callable

from fedsim.pruning.fbs import fbs
from fedsim.pruning.lottery import lottery_ticket
from fedsim.pruning.magnitude import magnitude
from fedsim.pruning.pruning import Pruning
from fedsim.pruning.rebuilding import channel_reconstruction, thinet
from fedsim.pruning.rigl import rigl
from fedsim.pruning.saliency import grasp, snip
from fedsim.pruning.structured import l1_filter, network_slimming, soft_filter
from fedsim.pruning.tickets import personal_tickets

PRUNING: dict[str, Callable[..., Pruning]] = {
    "lottery-ticket": lottery_ticket,
    "magnitude": magnitude,
    "personal-tickets": personal_tickets,
    "snip": snip,
    "grasp": grasp,
    "rigl": rigl,
    "l1-filter": l1_filter,
    "network-slimming": network_slimming,
    "soft-filter": soft_filter,
    "thinet": thinet,
    "reconstruction": channel_reconstruction,
    "fbs": fbs,
}
