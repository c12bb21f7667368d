"""What engines share: the key of a client."""

from fedsim.engines.engine import client_key
from fedsim.rng import fold


def test_the_key_of_a_client_is_below_that_of_the_round():
    assert client_key(77, 5) == fold(77, "client", 5)
