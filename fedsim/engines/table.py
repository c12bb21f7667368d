"""The table of engines."""

from collections.abc import Callable

from fedsim.engines.engine import Engine
from fedsim.engines.flower import flower
from fedsim.engines.local import local
from fedsim.engines.ray import ray
from fedsim.engines.reference import reference

ENGINES: dict[str, Callable[..., Engine]] = {"local": local, "reference": reference, "flower": flower, "ray": ray}
