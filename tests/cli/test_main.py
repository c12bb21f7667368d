import subprocess
import sys

import pytest

import fedsim as package
from fedsim import api
from fedsim.errors import ClientError, ConfigError, RunError

COMMANDS = ["run", "resume", "sweep", "baseline", "verify", "bench", "report", "compare", "split", "list", "schema"]


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_help_names_every_command_in_a_whole_sentence(fedsim, arguments):
    result = fedsim(*arguments)
    assert (result.code, result.err, result.new) == (0, "", frozenset())
    lines = {line.split()[0]: line for line in result.out.splitlines() if line.startswith("  ")}
    for command in COMMANDS:
        assert lines[command].endswith(".")
        assert not lines[command].endswith("...")
    assert "--debug" in result.out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(fedsim, command):
    result = fedsim(command, "--help")
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith(f"Usage: fedsim {command} ")


@pytest.mark.parametrize("command", [c for c in COMMANDS if c not in ("compare", "schema")])
def test_help_explains_every_argument_of_a_command(fedsim, command):
    text = fedsim(command, "--help").out
    usage, _, explained = text.partition("\n\n")
    arguments = [word.strip("[].") for word in usage.split()[4:] if word != "[OPTIONS]"]
    assert arguments
    assert all(argument in explained for argument in arguments)
    assert "\\[" not in text


def test_version(fedsim):
    assert fedsim("--version").out == f"fedsim {package.__version__}\n"


def test_help_is_quick_for_it_imports_no_torch():
    code = (
        "import sys; from fedsim.cli import main; sys.argv = ['fedsim', '--help']\n"
        "try: main()\nexcept SystemExit: print([m for m in ('torch', 'numpy', 'flwr') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nosuch"], "error: No such command 'nosuch' (fedsim --help shows how)"),
        (["rnu"], "error: No such command 'rnu'. Did you mean 'run'? (fedsim --help shows how)"),
        (["--nosuch"], "error: No such option '--nosuch' (fedsim --help shows how)"),
        (["run"], "error: Missing argument 'CONFIG' (fedsim run --help shows how)"),
        (["run", "config.yaml", "--fast"], "error: No such option '--fast' (fedsim run --help shows how)"),
        (["resume", "x", "--rounds", "many"], "error: Invalid value for '--rounds': 'many' is not a valid int"),
        (["compare"], "error: Missing argument 'RUN...' (fedsim compare --help shows how)"),
        (["list", "splitz"], "error: KIND: must be one of keys, datasets, splits, models, regularizers, optimizers"),
        (["run", "nowhere.yaml"], "error: nowhere.yaml: no such file"),
        (["run", "config.yaml", "train.rounds"], "error: override train.rounds: must be written key.path=value"),
        (["split", "config.yaml", "--picture", "no/a.png"], "error: --picture: must be a file in a folder that exists"),
        (["split", "config.yaml", "--save", "."], "error: --save: must be a file in a folder that exists, got ."),
    ],
)  # fmt: skip
def test_wrong_usage_is_one_clear_line_and_exit_code_2(fedsim, arguments, message):
    result = fedsim(*arguments)
    assert (result.code, result.out, result.new) == (2, "", frozenset())
    assert result.err.startswith(message)
    assert result.err.count("\n") == 1


def test_several_problems_are_listed_one_a_line(fedsim):
    result = fedsim("run", "config.yaml", "seed=-1", "train.rounds=0", "data.split.alhpa=1")
    assert (result.code, result.out, result.new) == (2, "", frozenset())
    assert result.err.splitlines() == [
        "error: 3 problems:",
        "  seed: must be >= 0, got -1",
        "  data.split.alhpa: unknown key (did you mean alpha?)",
        "  train.rounds: must be >= 1, got 0",
    ]


def test_debug_shows_the_traceback_and_keeps_the_exit_code(fedsim):
    result = fedsim("run", "--debug", "config.yaml", "seed=-1")
    assert result.code == 2
    assert "Traceback" in result.err
    assert result.err.endswith("error: seed: must be >= 0, got -1\n")
    assert "Traceback" not in fedsim("run", "config.yaml", "seed=-1").err


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ClientError(3, 5, "it hurts"), 4, "error: round 3, client 5: it hurts"),
        (RunError("runs/x: cannot be written: No space left"), 4, "error: runs/x: cannot be written: No space"),
        (OSError(28, "No space left", "a.png"), 4, "error: a.png: No space left (--debug shows where)"),
        (ZeroDivisionError("oh"), 4, "error: ZeroDivisionError: oh (a fault in fedsim or in custom code; --debug"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (BrokenPipeError(), 0, ""),
    ],
)  # fmt: skip
def test_every_kind_of_failure_has_its_exit_code(fedsim, monkeypatch, error, code, message):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr(api, "run", fails)
    result = fedsim("run", "config.yaml")
    assert (result.code, result.out) == (code, "")
    assert result.err.startswith(message)
    assert result.err.count("\n") == (1 if message else 0)


def test_the_python_api_raises_what_the_command_line_says():
    with pytest.raises(ConfigError) as caught:
        api.run({"data": {"dataset": "digits", "clients": 0}, "model": "linear", "seed": -1})
    assert caught.value.problems == ["seed: must be >= 0, got -1", "data.clients: must be >= 1, got 0"]
