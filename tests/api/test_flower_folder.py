"""What is wrong with an app's folder is said in one line that names the file, the key or the module."""

import sys

import pytest

from fedsim.api import flower_folder
from fedsim.errors import ConfigError

GOOD = """
[project]
name = "my app"
[tool.flwr.app.components]
serverapp = "pkg.server:app"
clientapp = "pkg.client:app"
[tool.flwr.app.config]
lr = 0.1
name = "a b"
model.depth = 2
model.wide = true
"""


def folder(tmp_path, text=GOOD):
    (tmp_path / "pyproject.toml").write_text(text)
    return tmp_path


def test_a_good_app_is_read(tmp_path):
    app = flower_folder.read(folder(tmp_path))
    assert (app.name, app.clients) == ("my-app", None)
    assert app.components == {"serverapp": "pkg.server:app", "clientapp": "pkg.client:app"}
    assert app.config == {"lr": 0.1, "name": "a b", "model.depth": 2, "model.wide": True}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[project", "pyproject.toml: not valid TOML: "),
        ("[project]", "has no serverapp and no clientapp; a Flower app names its apps there"),
        ('[tool.flwr.app.components]\nserverapp = "a:b"', "has no clientapp;"),
        ("tool = 3", "tool.flwr must be a table, got 3"),
        (GOOD + "\nbad = [1]", r"tool.flwr.app.config: bad must be true, false, a number or text, got \[1\]"),
        (
            GOOD + "\n[tool.flwr.federations.a]\noptions.num-supernodes = 0",
            "num-supernodes must be a whole number >= 1",
        ),
    ],
)
def test_a_folder_that_is_no_app_is_refused(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        flower_folder.read(folder(tmp_path, text))


def test_a_folder_without_pyproject_or_none_at_all_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"not a Flower app, it has no pyproject\.toml"):
        flower_folder.read(tmp_path)
    with pytest.raises(ConfigError, match="nowhere: no such folder"):
        flower_folder.read(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("federations", "clients"),
    [
        (
            'default = "b"\n[tool.flwr.federations.a]\noptions.num-supernodes = 3\n'
            "[tool.flwr.federations.b]\noptions.num-supernodes = 7",
            7,
        ),
        ("[tool.flwr.federations.only]\noptions.num-supernodes = 5", 5),
        ("[tool.flwr.federations.a]\noptions.num-supernodes = 5\n[tool.flwr.federations.b]", None),
        ('default = "elsewhere"', None),
        ('[tool.flwr.federations.remote]\naddress = "127.0.0.1:9"', None),
    ],
)
def test_clients_of_the_default_federation(tmp_path, federations, clients):
    assert flower_folder.read(folder(tmp_path, f"{GOOD}\n[tool.flwr.federations]\n{federations}")).clients == clients


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ([], {}),
        (["lr=1e-3 name='x = y'"], {"lr": 0.001, "name": "x = y"}),
        (
            ["lr=1", 'name="q"', "  model.depth = 5  model.wide=false "],
            {"lr": 1, "name": "q", "model.depth": 5, "model.wide": False},
        ),
        (["lr=0.5", "lr=0.25"], {"lr": 0.25}),
    ],
)
def test_pairs_change_the_run_config(tmp_path, changes, expected):
    app = flower_folder.read(folder(tmp_path))
    assert flower_folder.run_config(app, changes) == {**app.config, **expected}


def test_a_toml_file_changes_the_run_config(tmp_path):
    app = flower_folder.read(folder(tmp_path))
    (tmp_path / "run.toml").write_text("lr = 2\n[model]\ndepth = 9")
    assert flower_folder.run_config(app, [str(tmp_path / "run.toml")]) == {**app.config, "lr": 2, "model.depth": 9}
    (tmp_path / "run.toml").write_text("lr = ")
    with pytest.raises(ConfigError, match=r"run\.toml: not valid TOML"):
        flower_folder.run_config(app, [str(tmp_path / "run.toml")])
    with pytest.raises(ConfigError, match=r"nothing\.toml: No such file"):
        flower_folder.run_config(app, ["nothing.toml"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lrr=1", r"--run-config: lrr: .* has no such key in \[tool.flwr.app.config\] \(did you mean lr\?\)"),
        ("model.dept=1", r"did you mean model.depth\?"),
        ("lr", "must be key=value pairs with spaces between them, got 'lr'"),
        ("lr=1,name='x'", "must be key=value pairs"),
        ("name=abc", "name: must be true, false, a number, or text in quotes, got abc"),
        ("name=[1]", "name must be true, false, a number or text"),
        ("config.yaml", "must be key=value pairs"),
    ],
)
def test_what_is_no_change_is_refused(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        flower_folder.run_config(flower_folder.read(folder(tmp_path)), [text])


def test_every_unknown_key_is_reported(tmp_path):
    with pytest.raises(ConfigError) as caught:
        flower_folder.run_config(flower_folder.read(folder(tmp_path)), ["a=1 b=2"])
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (
            "import not_installed_here",
            r"cannot be imported: ModuleNotFoundError: No module named 'not_installed_here' "
            r"\(appimp0/server.py, line 1\)",
        ),
        ("x = 1\nraise OSError('no disk')", r"cannot be imported: OSError: no disk \(appimp1/server.py, line 2\)"),
        ("def (", r"cannot be imported: SyntaxError: .* \(appimp2/server.py, line 1\)"),
        ("exit(0)", "cannot be imported: SystemExit: 0"),
        ("apps = 1", r"appimp4.server has no 'app' \(did you mean apps\?\)"),
        ("app = {}", "must be a str, is of type dict"),
        (None, r"cannot be imported: ModuleNotFoundError: No module named 'appimp6.server'"),
    ],
)
def test_a_component_that_does_not_import_is_named_with_the_reason(tmp_path, code, message, request):
    package = f"appimp{request.node.callspec.indices['code']}"
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").touch()
    if code is not None:
        (tmp_path / package / "server.py").write_text(code)
    app = flower_folder.read(folder(tmp_path, GOOD.replace("pkg", package)))
    with flower_folder.importable(app), pytest.raises(ConfigError, match=message) as caught:
        flower_folder.component(app, "serverapp", str)
    assert f"serverapp '{package}.server:app'" in str(caught.value)


def test_nested_names_are_found_and_two_apps_of_one_name_are_kept_apart(tmp_path):
    apps = []
    for name, value in (("one", "first"), ("two", "second")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "appname.py").write_text(f"class wrapper:\n    app = {value!r}")
        text = GOOD.replace("pkg.server:app", "appname:wrapper.app")
        apps.append(flower_folder.read(folder(tmp_path / name, text)))
    with flower_folder.importable(apps[0]):
        assert flower_folder.component(apps[0], "serverapp", str) == "first"
    with flower_folder.importable(apps[1]), pytest.raises(ConfigError, match=r"one/appname.py has the same name"):
        flower_folder.component(apps[1], "serverapp", str)
    assert str(apps[0].path) not in sys.path
