"""From a factory's signature to the YAML keys it takes: types, ranges, defaults, and how to call it.

A component is named in YAML as ``digits`` or as ``{name: dirichlet, alpha: 0.3}``. Its keys are the parameters of its
factory that fedsim does not supply itself, with the annotated types and ranges; there is no second list to keep.
"""

import inspect
import warnings
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Union, get_type_hints

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, RootModel, Tag, create_model
from pydantic.annotated_handlers import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError

from fedsim.config.foreign import import_named
from fedsim.config.tables import KINDS, Factory, Kind

FOREIGN = "package.module:name"  # tag of somebody else's component, beside the names of a table


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


class Foreign(Component):
    """Somebody else's component; its annotations may be of any type."""

    model_config = ConfigDict(arbitrary_types_allowed=True)


class Open(Foreign):
    """Somebody else's component that takes any key."""

    model_config = ConfigDict(extra="allow")


FOREIGN_FORM = r"^\w[\w.]*:\w+$"
ForeignName = Annotated[str, Field(pattern=FOREIGN_FORM, description="somebody else's component")]


def base_of(kind: Kind) -> type[Component]:
    """What all components of a kind have in common."""
    return ModelComponent if kind is KINDS["models"] else Component  # which is at the end: its field has a Slot


def _with(base: type[Component], kind: Kind) -> tuple[type[Component], ...]:
    """Bases of a foreign component; a later base's model_config wins."""
    return (base,) if base_of(kind) is Component else (base_of(kind), base)


def parameters(factory: Factory, kind: Kind) -> dict[str, inspect.Parameter]:
    """The YAML keys of a factory: its parameters that are not supplied by fedsim."""
    found = inspect.signature(factory).parameters
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    not_keys = kind.context | {"name"}
    return {n: p for n, p in found.items() if p.kind in named and n not in not_keys and not n.startswith("_")}


def fields(factory: Factory, kind: Kind) -> dict[str, Any]:
    """Pydantic fields, name -> (annotated type, default), of a factory's YAML keys."""
    hints = _hints(factory)
    required = inspect.Parameter.empty
    return {
        name: (hints.get(name, Any), ... if parameter.default is required else parameter.default)
        for name, parameter in parameters(factory, kind).items()
    }


def _hints(factory: Factory) -> dict[str, Any]:
    """Types of the parameters; {} where somebody else's annotations cannot be read, which are then not checked."""
    try:
        return get_type_hints(factory.__init__ if inspect.isclass(factory) else factory, include_extras=True)
    except (NameError, TypeError):
        return {}


def model_of(name: str, factory: Factory, kind: Kind) -> type[Component]:
    """A pydantic model of one component's keys, ``name`` first."""
    bases: tuple[type[Component], ...] = (base_of(kind),)
    if is_foreign(name):
        takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in inspect.signature(factory).parameters.values())
        bases = _with(Open if takes_any else Foreign, kind)
    tag: Any = Literal[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a foreign parameter that has the name of a method of pydantic's
        return create_model(f"{kind.path}:{name}", __base__=bases, name=(tag, ...), **fields(factory, kind))


def keys_of(name: str, kind: Kind) -> list[str]:
    """Every key that may stand beside ``name``."""
    return [key for key in model_of(name, factory_of(name, kind), kind).model_fields if key != "name"]


class Slot:
    """Annotation of a config field that holds a component of one kind: ``Annotated[Component, Slot("splits")]``."""

    def __init__(self, kind: str) -> None:
        self.kind = KINDS[kind]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Validate by the table: one model per name, chosen by ``name``."""
        choices = [
            Annotated[model_of(name, factory, self.kind), Tag(name)] for name, factory in self.kind.table.items()
        ]
        foreign: Any = create_model("foreign", __base__=_with(Open, self.kind), name=(ForeignName, ...))
        union = Union[(*choices, Annotated[foreign, Tag(FOREIGN)])]  # type: ignore[valid-type]
        chosen = Annotated[union, Discriminator(_tag), BeforeValidator(_mapping)]
        return handler.generate_schema(chosen)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """In YAML a component without parameters may be just its name."""
        name: JsonSchemaValue = {"type": "string", "examples": list(self.kind.table)}
        return {"anyOf": [name, handler(schema)]}


def _mapping(value: Any) -> Any:
    if isinstance(value, str):
        return {"name": value}
    if not isinstance(value, Mapping | Component):
        raise PydanticCustomError("component", "must be a name, or a section with a name and its parameters")
    return value


def _tag(value: Any) -> Any:
    name = value.get("name") if isinstance(value, Mapping) else getattr(value, "name", None)
    return FOREIGN if is_foreign(name) else name


def is_foreign(name: object) -> bool:
    """Whether a component's name is of the form ``package.module:name``."""
    return isinstance(name, str) and ":" in name


def factory_of(name: str, kind: Kind) -> Factory:
    """The function that makes the component of this name."""
    return import_named(name) if is_foreign(name) else kind.table[name]


def call(factory: Factory, component: Component, kind: Kind, **context: Any) -> Any:
    """Call a factory with its YAML parameters and with those parts of the context that it asks for by name."""
    wanted = inspect.signature(factory).parameters
    supplied = {name: value for name, value in context.items() if name in wanted}
    return factory(**supplied, **component.params())


class Regularizers(RootModel[list[Annotated[Component, Slot("regularizers")]]]):
    """The list of regularisers: a class of its own, so that its schema is made once for all models of the table."""

    model_config = ConfigDict(frozen=True, strict=True)


class Transforms(RootModel[list[Annotated[Component, Slot("transforms")]]]):
    """The list of what happens to updates on their way to the server, in order."""

    model_config = ConfigDict(frozen=True, strict=True)


class ModelComponent(Component):
    """Keys that every model takes beside its own."""

    init: Annotated[Literal["default", "fixup"], Field(description="how parameters start")] = "default"
    regularizers: Regularizers = Regularizers([])

    @classmethod
    def not_params(cls) -> frozenset[str]:
        """See ``Component.not_params``."""
        return frozenset({"name", "init", "regularizers"})
