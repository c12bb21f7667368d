"""From a factory's signature to the YAML keys it takes: types, ranges, defaults, and how to call it.

A component is named in YAML as ``digits`` or as ``{name: dirichlet, alpha: 0.3}``. Its keys are the parameters of its
factory that fedsim does not supply itself, with the annotated types and ranges; there is no second list to keep.
"""

import importlib
import inspect
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Union, get_type_hints

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, create_model
from pydantic.annotated_handlers import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from fedsim.config.tables import KINDS, Factory, Kind

CUSTOM = "package.module:name"  # tag of somebody else's component, beside the names of a table


class Component(BaseModel):
    """A named component with its parameters. Subclasses, one per factory, are made by :func:`model_of`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
    name: str

    def params(self) -> dict[str, Any]:
        """What to call the factory with."""
        return {key: value for key, value in self.model_dump().items() if key not in self.not_params()}

    @classmethod
    def not_params(cls) -> frozenset[str]:
        """Keys that stand beside the parameters without being any."""
        return frozenset({"name"})


class CustomComponent(Component):
    """``name: "package.module:name"``; its parameters are checked once the module is imported."""

    model_config = ConfigDict(extra="allow")
    name: Annotated[str, Field(pattern=r"^[^:\s]+:[^:\s]+$", description="somebody else's component")]


def parameters(factory: Factory, kind: Kind) -> dict[str, inspect.Parameter]:
    """The YAML keys of a factory: its parameters that are not supplied by fedsim."""
    found = inspect.signature(factory).parameters
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {n: p for n, p in found.items() if p.kind in named and n not in kind.context}


def fields(factory: Factory, kind: Kind) -> dict[str, Any]:
    """Pydantic fields, name -> (annotated type, default), of a factory's YAML keys."""
    target = factory.__init__ if inspect.isclass(factory) else factory
    hints = get_type_hints(target, include_extras=True)
    required = inspect.Parameter.empty
    return {
        name: (hints.get(name, Any), ... if parameter.default is required else parameter.default)
        for name, parameter in parameters(factory, kind).items()
    }


def model_of(name: str, factory: Factory, kind: Kind, base: type[Component] = Component) -> type[Component]:
    """A pydantic model of one component's keys, ``name`` first."""
    tag: Any = Literal[name]
    return create_model(f"{kind.path}:{name}", __base__=base, name=(tag, ...), **fields(factory, kind))


class Slot:
    """Annotation of a config field that holds a component of one kind: ``Annotated[Component, Slot("splits")]``."""

    def __init__(self, kind: str, base: type[Component] = Component) -> None:
        self.kind, self.base = KINDS[kind], base

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Validate by the table: one model per name, chosen by ``name``."""
        choices = [
            Annotated[model_of(name, factory, self.kind, self.base), Tag(name)]
            for name, factory in self.kind.table.items()
        ]
        custom: Any = create_model("custom", __base__=(CustomComponent, self.base))
        union = Union[(*choices, Annotated[custom, Tag(CUSTOM)])]  # type: ignore[valid-type]
        chosen = Annotated[union, Discriminator(_tag), BeforeValidator(_mapping)]
        return handler.generate_schema(chosen)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """In YAML a component without parameters may be just its name."""
        name: JsonSchemaValue = {"type": "string", "examples": list(self.kind.table)}
        return {"anyOf": [name, handler(schema)]}


def _mapping(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


def _tag(value: Any) -> Any:
    name = value.get("name") if isinstance(value, Mapping) else getattr(value, "name", None)
    return CUSTOM if isinstance(name, str) and ":" in name else name


def import_named(name: str) -> Any:
    """The object that ``package.module:name`` names.

    Raises:
        ValueError: it does not import, or the module has no such name; says why.
    """
    module, _, attribute = name.partition(":")
    try:
        found = importlib.import_module(module)
    except Exception as error:  # whatever somebody else's module raises is for its author to read
        raise ValueError(f"cannot import {module!r}: {type(error).__name__}: {error}") from error
    if not hasattr(found, attribute):
        raise ValueError(f"module {module!r} has no {attribute!r}")
    factory = getattr(found, attribute)
    if not callable(factory):
        raise ValueError(f"{name!r} is a {type(factory).__name__}, not something to call")
    return factory


def factory_of(component: Component, kind: Kind) -> Factory:
    """The function that makes this component."""
    return import_named(component.name) if ":" in component.name else kind.table[component.name]


def call(factory: Factory, component: Component, kind: Kind, **context: Any) -> Any:
    """Call a factory with its YAML parameters and with those parts of the context that it asks for by name."""
    wanted = inspect.signature(factory).parameters
    supplied = {name: value for name, value in context.items() if name in wanted}
    return factory(**supplied, **component.params())
