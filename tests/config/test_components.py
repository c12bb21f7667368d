"""Somebody else's components: named ``package.module:name``, checked against their own signatures."""

import itertools
import sys
from typing import Annotated, Any

import pytest
from annotated_types import Ge

from fedsim.config.components import call, fields, keys_of, model_of, parameters
from fedsim.config.foreign import import_named
from fedsim.config.load import load, resolved
from fedsim.config.spelling import did_you_mean
from fedsim.config.tables import KINDS

_numbers = itertools.count()


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write a module of a new name and return that name."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(text: str) -> str:
        name = f"foreign_{next(_numbers)}"
        (tmp_path / f"{name}.py").write_text(text)
        return name

    yield write
    for name in [name for name in sys.modules if name.startswith("foreign_")]:
        del sys.modules[name]


def factory(labels: Any, num_clients: int, *, alpha: Annotated[float, Ge(1)], name: str = "", _x: int = 0, **rest: Any):
    return labels, num_clients, alpha, rest


def test_keys_are_the_parameters_that_fedsim_does_not_supply():
    assert list(parameters(factory, KINDS["splits"])) == ["alpha"]
    assert list(parameters(factory, KINDS["engines"])) == ["labels", "num_clients", "alpha"]
    (annotation, default) = fields(factory, KINDS["splits"])["alpha"]
    assert annotation == Annotated[float, Ge(1)]
    assert default is ...


def test_a_factory_gets_its_keys_and_only_the_context_it_asks_for():
    component = model_of("m:f", factory, KINDS["splits"])(name="m:f", alpha=2.0, beta=3)
    context = {"labels": "L", "num_clients": 4, "key": 9}
    assert call(factory, component, KINDS["splits"], **context) == ("L", 4, 2.0, {"beta": 3})


def test_every_table_entry_has_keys_that_pydantic_understands():
    for kind in KINDS.values():
        for name in kind.table:
            assert "name" not in keys_of(name, kind)


@pytest.mark.parametrize(("word", "hint"), [("alhpa", " (did you mean alpha?)"), ("zzz", "")])
def test_the_nearest_word_is_suggested(word, hint):
    assert did_you_mean(word, ["alpha", "min_examples"]) == hint


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        (None, "nowhere:Net", "cannot import 'nowhere': ModuleNotFoundError: No module named 'nowhere'"),
        ("import nowhere", "{}:Net", "cannot import '{}': ModuleNotFoundError: No module named 'nowhere'"),
        ("raise ValueError('boo')", "{}:Net", "cannot import '{}': ValueError: boo"),
        ("import sys; sys.exit(3)", "{}:Net", "cannot import '{}': SystemExit: 3"),
        ("def f(:", "{}:Net", "cannot import '{}': SyntaxError: invalid syntax"),
        ("class Net: pass", "{}:Nett", "module '{}' has no 'Nett' (did you mean Net?)"),
        ("five = 5", "{}:five", "must be a function or class, '{}:five' is of type int"),
    ],
)  # fmt: skip
def test_what_cannot_be_imported_is_a_problem_at_its_key(problems, module, text, name, message):
    made = module(text) if text else ""
    for kind in KINDS.values():
        (line,) = problems({kind.path: [name.format(made)] if kind.many else name.format(made)})
        assert line.startswith(f"{kind.path}{'.0' * kind.many}.name: {message.format(made)}")


@pytest.mark.parametrize(
    "name", ["m: Net", "m :Net", " m:Net", ":Net", "m:", "m:Net:x", "..:x", ".m:x", "m:a.b", "a/b:c"]
)
def test_names_that_are_not_of_the_form_are_not_imported(problems, name):
    assert problems({"model": name}) == [f"model.name: must be of the form package.module:name, got {name!r}"]


NET = """
from torch import nn
class Net(nn.Module):
    def __init__(self, input_shape, num_classes, width: int, shape: tuple[int, int] = (1, 2), no: "Nowhere" = 1): ...
class Typed(nn.Module):
    def __init__(self, input_shape, *, width: int, act: nn.Module = None, shape: tuple[int, int] = (1, 2)): ...
class Open(nn.Module):
    def __init__(self, *args, width=3, **rest): ...
"""


@pytest.mark.parametrize(
    ("given", "lines"),
    [
        ({"name": "Typed", "width": 3, "shape": [4, 5]}, []),
        ({"name": "Typed"}, ["model.width: needed, but not given"]),
        ({"name": "Typed", "width": "x"}, ["model.width: must be a whole number, got 'x'"]),
        ({"name": "Typed", "width": 3, "widht": 3}, ["model.widht: unknown key (did you mean width?)"]),
        ({"name": "Typed", "width": 3, "input_shape": 3}, ["model.input_shape: unknown key (did you mean shape?)"]),
        ({"name": "Typed", "width": 3, "shape": [4]}, ["model.shape.1: needed, but not given"]),
        ({"name": "Typed", "width": 3, "init": "x"}, ["model.init: must be 'default' or 'fixup', got 'x'"]),
        ({"name": "Net", "width": "unchecked", "shape": 5}, []),  # one annotation that cannot be read frees them all
        ({"name": "Open", "anything": [1, {"x": None}], "params": 3, "copy": 4}, []),
        ({"name": "Open", "x": object()}, ["model.x: must be a number, text, true, false, null, a list or a"]),
    ],
)  # fmt: skip
def test_keys_of_a_foreign_class_are_held_against_its_signature(problems, module, given, lines):
    found = problems({"model": {**given, "name": f"{module(NET)}:{given['name']}"}})
    assert len(found) == len(lines)
    assert all(line.startswith(start) for line, start in zip(found, lines, strict=True))


def test_a_builtin_without_signature_is_a_problem(problems):
    (line,) = problems({"model": "builtins:dict"})
    assert line.startswith("model.name: no signature found for builtin type")


def test_foreign_parameters_reach_the_resolved_config(valid, module):
    component = {"name": f"{module(NET)}:Open", "anything": [1, {"x": None}], "params": 3}
    config = load(valid, {"model": component})
    assert resolved(config)["model"] == {**component, "init": "default", "regularizers": []}
    assert config.model.params() == {"anything": [1, {"x": None}], "params": 3}
    assert load(resolved(config)) == config


def test_a_module_written_after_a_failed_import_is_found(module, tmp_path):
    with pytest.raises(ValueError, match="No module named 'foreign_later'"):
        import_named("foreign_later:f")
    (tmp_path / "foreign_later.py").write_text("def f(): return 1\n")
    assert import_named("foreign_later:f")() == 1
