"""An existing Flower app: its folder, what its pyproject.toml says, and its two components, imported as they are."""

import contextlib
import importlib
import operator
import re
import sys
import tomllib
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsim.config.spelling import did_you_mean
from fedsim.errors import ConfigError

Value = bool | int | float | str  # what Flower lets a run config hold
COMPONENTS = ("serverapp", "clientapp")


@dataclass(frozen=True)
class FlowerApp:
    """What the pyproject.toml of an app says.

    components: "serverapp" and "clientapp" -> ``package.module:name``.
    config: [tool.flwr.app.config], nested keys joined with dots.
    clients: options.num-supernodes of the default federation, None if it does not say.
    """

    path: Path
    name: str
    components: Mapping[str, str]
    config: Mapping[str, Value]
    clients: int | None


def read(path: Path) -> FlowerApp:
    """Read an app's pyproject.toml.

    Raises:
        ConfigError: it is not there, is no TOML, or lacks what a Flower app needs.
    """
    file = path / "pyproject.toml"
    if not path.is_dir():
        raise ConfigError(f"{path}: no such folder; give the folder of a Flower app")
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: not a Flower app, it has no pyproject.toml") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not valid TOML: {error}") from error
    flwr = _table(content, "tool.flwr", file)
    components = _table(flwr, "app.components", file)
    missing = [key for key in COMPONENTS if not isinstance(components.get(key), str)]
    if missing:
        rule = "a Flower app names its apps there, as package.module:app"
        raise ConfigError(f"{file}: [tool.flwr.app.components] has no {' and no '.join(missing)}; {rule}")
    return FlowerApp(
        path=path.resolve(),
        name=re.sub(r"[^\w.-]+", "-", str(_table(content, "project", file).get("name") or path.resolve().name)),
        components={key: components[key] for key in COMPONENTS},
        config=_flat(_table(flwr, "app.config", file), f"{file}: tool.flwr.app.config"),
        clients=_clients(_table(flwr, "federations", file), file),
    )


def _table(content: Mapping[str, Any], key: str, file: Path) -> dict[str, Any]:
    found: Any = content
    for part in key.split("."):
        found = found.get(part, {})
        if not isinstance(found, dict):
            raise ConfigError(f"{file}: {key} must be a table, got {found!r}")
    return found  # type: ignore[no-any-return]


def _clients(federations: Mapping[str, Any], file: Path) -> int | None:
    """Of the default federation; without a default, of the only one."""
    tables = [name for name, value in federations.items() if isinstance(value, dict)]
    name = federations.get("default") or (tables[0] if len(tables) == 1 else None)
    if name is None:
        return None
    table = federations.get(name) if isinstance(name, str) else None
    if not isinstance(table, dict):
        return None  # a federation of Flower's own configuration, elsewhere
    found = (table.get("options") or {}).get("num-supernodes", table.get("options.num-supernodes"))
    if found is not None and (not isinstance(found, int) or isinstance(found, bool) or found < 1):
        key = f"tool.flwr.federations.{name}.options.num-supernodes"
        raise ConfigError(f"{file}: {key} must be a whole number >= 1, got {found!r}")
    return found


# ---------------------------------------------------------------- run config


def run_config(app: FlowerApp, changes: Sequence[str]) -> dict[str, Value]:
    """The app's config with changes.

    Args:
        app: whose keys may be changed.
        changes: each ``k=v k2='s'``, values as in TOML, or the path of a .toml file, as for ``flwr run --run-config``.

    Raises:
        ConfigError: names every key that the app does not have, or what is not such a list.
    """
    found: dict[str, Value] = {}
    for text in changes:
        found |= _from_file(Path(text)) if text.endswith(".toml") and "=" not in text else _parsed(text)
    unknown = [key for key in found if key not in app.config]
    if unknown:
        where = f"{app.path / 'pyproject.toml'} has no such key in [tool.flwr.app.config]"
        raise ConfigError([f"--run-config: {key}: {where}{did_you_mean(key, app.config)}" for key in unknown])
    return {**app.config, **found}


_PAIR = re.compile(r"""\s*([\w.-]+)\s*=\s*('[^']*'|"[^"]*"|[^\s'"]+)(?=\s|$)""")


def _parsed(text: str) -> dict[str, Value]:
    found: dict[str, Value] = {}
    rest = text
    while rest.strip():
        pair = _PAIR.match(rest)
        if pair is None:
            raise ConfigError(f"--run-config: must be key=value pairs with spaces between them, got {rest.strip()!r}")
        key, value = pair.groups()
        try:
            found |= _flat({key: tomllib.loads(f"value = {value}")["value"]}, "--run-config")
        except tomllib.TOMLDecodeError as error:
            rule = "must be true, false, a number, or text in quotes"
            raise ConfigError(f"--run-config: {key}: {rule}, got {value}") from error
        rest = rest[pair.end() :]
    return found


def _from_file(path: Path) -> dict[str, Value]:
    try:
        return _flat(tomllib.loads(path.expanduser().read_text(encoding="utf-8")), str(path))
    except OSError as error:
        raise ConfigError(f"--run-config: {path}: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--run-config: {path}: not valid TOML: {error}") from error


def _flat(table: Mapping[str, Any], where: str, prefix: str = "") -> dict[str, Value]:
    found: dict[str, Value] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            found |= _flat(value, where, f"{prefix}{key}.")
        elif isinstance(value, bool | int | float | str):
            found[f"{prefix}{key}"] = value
        else:
            rule = "must be true, false, a number or text"
            raise ConfigError(f"{where}: {prefix}{key} {rule}, got {value!r}")
    return found


# ---------------------------------------------------------------- components


@contextlib.contextmanager
def importable(app: FlowerApp) -> Iterator[None]:
    """Let the app's folder come first, as Flower does, while it is imported and while it runs."""
    before = list(sys.path)
    sys.path.insert(0, str(app.path))
    importlib.invalidate_caches()  # a file may have been written since this process last looked
    try:
        yield
    finally:
        sys.path[:] = before


def component(app: FlowerApp, key: str, kind: type) -> Any:
    """Import a component.

    Args:
        app: within :func:`importable`.
        key: "serverapp" or "clientapp".
        kind: what it must be.

    Raises:
        ConfigError: names the component, what failed, and the line of the app where it did.
    """
    reference = app.components[key]
    where = f"{app.path / 'pyproject.toml'}: {key} {reference!r}"
    module, _, attribute = reference.partition(":")
    if not module or not attribute:
        raise ConfigError(f"{where}: must be package.module:name")
    _check_not_another(app, module.partition(".")[0], where)
    try:
        found = importlib.import_module(module)
    except (Exception, SystemExit) as error:  # whatever somebody else's module raises is for its author to read
        raise ConfigError(f"{where}: cannot be imported: {told(error, app)}") from error
    try:
        made = operator.attrgetter(attribute)(found)
    except AttributeError as error:
        raise ConfigError(f"{where}: {module} has no {attribute!r}{did_you_mean(attribute, vars(found))}") from error
    if not isinstance(made, kind):
        raise ConfigError(f"{where}: must be a {kind.__name__}, is of type {type(made).__name__}")
    return made


def told(error: BaseException, app: FlowerApp) -> str:
    """An error in words, with the last line of the app's own that it came through."""
    lines = [frame for frame in traceback.extract_tb(error.__traceback__) if _within(frame.filename, app.path)]
    place = f" ({Path(lines[-1].filename).relative_to(app.path)}, line {lines[-1].lineno})" if lines else ""
    if isinstance(error, SyntaxError) and error.filename and _within(error.filename, app.path):
        return f"SyntaxError: {error.msg} ({Path(error.filename).relative_to(app.path)}, line {error.lineno})"
    return f"{type(error).__name__}: {error}{place}"


def _within(file: str, folder: Path) -> bool:
    return Path(file).is_relative_to(folder)


def _check_not_another(app: FlowerApp, top: str, where: str) -> None:
    """Python keeps the first module of a name. The one of another app must not be mistaken for this app's."""
    loaded = getattr(sys.modules.get(top), "__file__", None)
    own = (app.path / top).is_dir() or (app.path / f"{top}.py").is_file()
    if loaded and own and not _within(str(Path(loaded).resolve()), app.path):
        rule = f"{loaded} has the same name, and this process has imported it before"
        raise ConfigError(f"{where}: cannot be imported: {rule}; run the two in two processes")
