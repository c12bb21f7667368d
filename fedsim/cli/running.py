"""Commands that train: run, resume, baseline."""

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from fedsim.cli.arguments import CHANGES, CONFIG, RUN
from fedsim.errors import DivergedError

if TYPE_CHECKING:
    from fedsim.api import Run
    from fedsim.api.transferring import Pair
    from fedsim.federation import Federation


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.command()(run)
    app.command()(resume)
    app.command()(baseline)


def run(config: Path = CONFIG, changes: list[str] = CHANGES) -> None:
    """Run a federation and write its run folder with a report.

    CONFIG is a YAML file. KEY.PATH=VALUE replaces a value in it: train.rounds=5, data.split={name: iid}.
    """
    from fedsim import api
    from fedsim.config.read import parse_overrides

    overrides = parse_overrides(changes or [])
    shown(lambda **hooks: api.run(config, overrides, **hooks))


def resume(
    folder: Path = RUN,
    rounds: int | None = typer.Option(None, help="New total number of rounds."),
) -> None:
    """Go on with a run after its last whole round.

    RUN is the folder of a run that was interrupted or failed, or one to make longer with --rounds. The result is that
    of a run that never stopped.
    """
    from fedsim import api

    shown(lambda **hooks: api.resume(folder, rounds=rounds, **hooks))


def shown(start: Any, again: str = "fedsim resume") -> None:
    """Run with a display; report and result table at the end, or how to go on: ``again`` and the folder."""
    from fedsim.cli import display

    console = display.console()
    with _resumable(again) as begun, display.for_console(console) as shows:

        def on_start(run: "Run", federation: "Federation | Pair") -> None:
            begun.append(run.folder)
            shows.begin("\n".join([_title(run), *federation.draws.told()]), run.rounds, federation.rounds)

        done = start(on_start=on_start, on_round=shows.round, progress=shows.loading)
    finish(console, done)


@contextmanager
def _resumable(again: str) -> Iterator[list[Path]]:
    """Tell whoever sees an error how to go on with the run whose folder is put on the list."""
    begun: list[Path] = []
    try:
        yield begun
    except BaseException as error:
        repeats = isinstance(error, DivergedError)  # draws are keyed: a resumed run would diverge in the same place
        if begun and not repeats and (begun[0] / "checkpoint" / "state.json").exists():
            folder = shlex.quote(str(begun[0]))
            error.add_note(f"the last whole round is saved; go on with: {again} {folder}")
        raise


def _exposed(summary: dict[str, Any]) -> list[str]:
    """Of a transfer: whose hidden values the other party could find out by what it learns."""
    found = summary.get("transfer") or {}
    if found.get("protocol") == "plain":
        return []
    return [
        f"warning: party {other} learns as many numbers in an iteration as party {role} has hidden values, so it can "
        "solve for them: take a narrower net, more common people or trains: head (docs/transfer.md)"
        for role, other in (("a", "b"), ("b", "a"))
        if found.get(f"exposed_{role}")
    ]


def _title(run: "Run") -> str:
    config = run.config
    data, model, transfer = config["data"], config["model"], config["transfer"]
    if transfer is not None:
        told = f"{transfer['protocol']}, {transfer['overlap']} common people, {transfer['labelled']} labelled"
        return f"{config['name']}: {data['dataset']['name']}, two parties, {model['name']}, {told}"
    names = [part["name"] for part in (data["dataset"], data["split"], model, config["strategy"], config["engine"])]
    return "{}: {}, {} split, {}, {}, {} engine".format(config["name"], *names)


def finish(console: Any, done: "Run") -> None:
    """Write the report, and say what came out and where it is."""
    from fedsim.cli.display import result_table

    page = _report(done)
    summary = done.summary
    console.print(result_table(summary))
    for line in _exposed(summary):
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    for name, path in (("run", done.folder), ("report", page)):
        console.print(f"  {name:<8}  {path}", soft_wrap=True, highlight=False, markup=False)


def baseline(config: Path = CONFIG, changes: list[str] = CHANGES) -> None:
    """Run the two baselines: centralised, and each client alone.

    CONFIG and KEY.PATH=VALUE are those of fedsim run. Writes two run folders.
    """
    from fedsim import api
    from fedsim.cli import display
    from fedsim.config.read import parse_overrides
    from fedsim.report.numbers import percent

    console = display.console()
    with display.for_console(console) as shown:
        done = api.baseline(
            config,
            parse_overrides(changes or []),
            on_start=lambda f: shown.begin("\n".join(["centralised", *f.draws.told()]), [], f.rounds),
            on_round=shown.round,
            on_client=lambda done, clients: shown.step("clients alone", done, clients),
            progress=shown.loading,
        )
    console.print(f"{'':14}{'all held-out':>14}{'own held-out, mean over clients':>34}", highlight=False)
    for name, run in (("centralised", done.centralised), ("alone", done.alone)):
        last = run.rounds[-1]
        own = f"{percent(last.client_accuracy_mean)} ± {percent(last.client_accuracy_std)}"
        line = f"  {name:<12}{percent(last.accuracy):>14}{own:>34}  {run.folder}"
        console.print(line, highlight=False, soft_wrap=True)
        _report(run)


def _report(run: "Run") -> Path:
    from fedsim.report import report

    return report.write(run.folder)
