"""Making the components that a config names; what their factories refuse is a problem of the config."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from fedsim.config import components
from fedsim.config.components import Component, is_foreign
from fedsim.config.load import component_at
from fedsim.config.problems import refused
from fedsim.config.schema import Config
from fedsim.config.tables import KINDS
from fedsim.errors import ConfigError, FedsimError

T = TypeVar("T")


def make(config: Config, kind: str, **context: Any) -> Any:
    """Call the factory of the component of this kind; its ValueError becomes a ConfigError at its dotted key.

    Raises:
        ConfigError: the factory refuses a value.
        FedsimError: whatever else it says itself.
    """
    slot = KINDS[kind]
    component = component_at(config, slot.path)
    with blamed_on(slot.path, component):
        return components.call(components.factory_of(component.name, slot), component, slot, **context)


@contextmanager
def blamed_on(path: str, component: Component) -> Iterator[None]:
    """Turn what a factory raises into a ConfigError, unless it is a fault of ours."""
    name, foreign = component.name, is_foreign(component.name)
    try:
        yield
    except FedsimError:
        raise
    except (Exception, SystemExit) as error:
        if foreign:
            raise ConfigError(f"{path}.name: {name} raised {type(error).__name__}: {error}") from error
        if isinstance(error, ValueError):
            raise ConfigError(refused(error, path, component.params())) from error
        if path == "model" and isinstance(error, MemoryError | RuntimeError | TypeError):  # torch, of huge layers
            raise ConfigError(f"{path}: {name} cannot be made: {str(error).partition(chr(10))[0]}") from error
        raise


def of_type(wanted: type[T], made: object, path: str, component: Component, what: str = "") -> T:
    """What a factory made, if it is of the type that is wanted; ``what``: that type in words."""
    if not isinstance(made, wanted):
        raise wrong(made, path, component, what or f"fedsim's {wanted.__name__}")
    return made


def wrong(made: object, path: str, component: Component, what: str) -> ConfigError:
    """What to say of a factory that made something else."""
    return ConfigError(f"{path}.name: must make {what}, but {component.name} made {type(made).__name__}")
