"""The command line. Commands import what they need when they are called, so that ``fedsim --help`` is quick."""

import os
import signal
import sys
from types import FrameType
from typing import NoReturn

import click
import typer

from fedsim import __version__
from fedsim.cli import looking, running
from fedsim.errors import ConfigError, FedsimError

INTERRUPTED = 130

app = typer.Typer(
    name="fedsim",
    help="Federated-learning simulation: one YAML, from a laptop to separate machines.",
    epilog="Add --debug to any command to see the traceback of an error.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
running.add_to(app)
looking.add_to(app)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fedsim {__version__}")
        raise typer.Exit


@app.callback()
def _root(version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Show it.")) -> None:
    pass


def main() -> NoReturn:
    """Entry point: run a command, turn errors into one clear message and an exit code.

    0 ok, 2 bad config or usage, 3 bad or missing data, 4 the run failed, 130 interrupted.
    """
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        sys.exit(app(arguments, standalone_mode=False) or 0)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (KeyboardInterrupt, click.Abort):
        if debug:
            raise
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # the reader of our output, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        if debug:
            raise
        sys.exit(_explain(error))


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    """SIGTERM saves and ends as Ctrl-C does."""
    raise KeyboardInterrupt


def _explain(error: Exception) -> int:
    """Print what went wrong; the exit code."""
    if isinstance(error, ConfigError) and len(error.problems) > 1:
        text = f"{len(error.problems)} problems:\n" + "\n".join(f"  {problem}" for problem in error.problems)
    elif isinstance(error, FedsimError):
        text = str(error)
    else:
        text = f"{type(error).__name__}: {error} (a fault in fedsim or in custom code; --debug shows where)"
    typer.echo(f"error: {text}", err=True)
    return error.exit_code if isinstance(error, FedsimError) else FedsimError.exit_code
