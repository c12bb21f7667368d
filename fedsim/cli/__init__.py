"""The command line. Commands import what they need when they are called, so that ``fedsim --help`` is quick."""

import os
import signal
import sys
import traceback
import warnings
from types import FrameType
from typing import NoReturn

import click
import typer

from fedsim import __version__
from fedsim.cli import (
    certifying,
    checking,
    deploying,
    flower_running,
    inspecting,
    looking,
    pruning,
    running,
    sweeping,
    transferring,
)
from fedsim.errors import ConfigError, FedsimError

INTERRUPTED = 130

app = typer.Typer(
    name="fedsim",
    help="Federated learning, simulated from one YAML file, exactly repeatable.",
    epilog="Add --debug to any command to see the traceback of an error.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
running.add_to(app)
sweeping.add_to(app)
checking.add_to(app)
inspecting.add_to(app)
pruning.add_to(app)
looking.add_to(app)
certifying.add_to(app)
deploying.add_to(app)
transferring.add_to(app)
flower_running.add_to(app)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fedsim {__version__}")
        raise typer.Exit


@app.callback()
def _root(version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Show it.")) -> None:
    pass


def main() -> NoReturn:
    """Entry point: run a command, turn errors into one clear message and an exit code.

    0 ok, 1 a run that does not verify, 2 bad config or usage, 3 bad or missing data, 4 the run failed, 130 interrupted.
    """
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    signal.signal(signal.SIGTERM, _interrupt)
    warnings.showwarning = lambda message, category, *_, **__: _warn(message, category)
    try:
        code = _call(arguments or ["--help"])
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output, `head` say, has seen enough
        code = 0
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            traceback.print_exception(error)
        code = _explain(error)
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush when Python ends
    sys.exit(code)


def _call(arguments: list[str]) -> int:
    """Run a command. typer's own way of calling it has its own ideas of Ctrl-C and of closed pipes."""
    command = typer.main.get_command(app)
    try:
        with command.make_context("fedsim", arguments) as context:
            command.invoke(context)
    except click.exceptions.Exit as error:
        return error.exit_code
    return 0


def _warn(message: Warning | str, category: type[Warning]) -> None:
    """Python's other warnings are for developers and stay where Python puts them: out of sight."""
    if category is UserWarning:
        typer.echo(f"warning: {message}", err=True)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    """SIGTERM saves and ends as Ctrl-C does."""
    raise KeyboardInterrupt


def _explain(error: BaseException) -> int:
    """Print what went wrong and what to do next; the exit code."""
    text, code = _told(error)
    typer.echo(text, err=True)
    for note in getattr(error, "__notes__", []):
        typer.echo(note, err=True)
    return code


def _told(error: BaseException) -> tuple[str, int]:
    match error:
        case KeyboardInterrupt() | click.Abort():
            return "interrupted", INTERRUPTED
        case ConfigError(problems=problems) if len(problems) > 1:
            return "\n".join([f"error: {len(problems)} problems:", *(f"  {line}" for line in problems)]), 2
        case FedsimError():
            return f"error: {error}", error.exit_code
        case click.ClickException():
            path = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "fedsim"
            parts = error.format_message().rstrip(".").split(" Did you mean ")  # typer and click both suggest a command
            return f"error: {' Did you mean '.join(dict.fromkeys(parts))} ({path} --help shows how)", 2
        case OSError(strerror=reason) if reason:
            return f"error: {error.filename or 'files'}: {reason} (--debug shows where)", FedsimError.exit_code
    what = f"{type(error).__name__}: {error}"
    return f"error: {what} (a fault in fedsim or in custom code; --debug shows where)", FedsimError.exit_code
