"""The shell of an actor: all that Ray itself has to understand on a node."""

import os
import sys
from typing import Any

import ray


def actor_class() -> Any:
    """The class of actors, each of which takes one CPU.

    A class made inside a function travels by value, so a node can unpack it before it has been told where fedsim and
    the user's modules are. What it is given and answers are bytes and arrays.
    """

    class Actor:
        def __init__(self, path: list[str], folder: str) -> None:
            sys.path[:] = dict.fromkeys([*path, *sys.path])
            if os.path.isdir(folder):  # noqa: PTH112 -- by value, with as little as possible
                os.chdir(folder)

        def begin(self, given: Any) -> Any:
            from fedsim.engines.ray import actor  # noqa: PLC0415

            self.own, hello = actor.begin(given)
            return hello

        def answer(self, sent: Any, order: Any) -> Any:
            from fedsim.engines.ray import actor  # noqa: PLC0415

            return actor.answer(self.own, sent, order)

    return ray.remote(num_cpus=1, scheduling_strategy="SPREAD")(Actor)
