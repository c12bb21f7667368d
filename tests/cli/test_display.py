import contextlib
import io
import os
import pty
import re
import subprocess
import sys

import pytest
from rich.console import Console

from fedsim.cli import display
from fedsim.records import RoundRecord


def record(round, **changes):
    facts = {"loss": 0.5, "accuracy": 0.25, "train_loss": 1.0, "clients": 3, "seconds": 0.125}
    return RoundRecord(**{"round": round, "bytes_up": 1_000, "bytes_down": 2_000, **facts, **changes})


def test_lines_are_one_a_round_without_escapes_however_narrow():
    out = io.StringIO()
    with display.for_console(Console(file=out, width=20)) as shown:
        shown.loading("a.gz", 0, 5_000)
        shown.loading("a.gz", 5_000, 5_000)
        shown.loading("b.gz", 0, None)
        shown.begin("title [bold]", [], 2)
        shown.round(record(1))
        shown.round(record(2, loss=None, accuracy=None))
    assert out.getvalue().splitlines() == [
        "fetching a.gz (5.00 kB)",
        "fetching b.gz (size unknown)",
        "title [bold]",
        "round 1/2  accuracy 25.00 %  loss 0.5000  clients 3  sent 3.00 kB  0.12 s",
        "round 2/2  accuracy –  loss –  clients 3  sent 6.00 kB  0.12 s",
    ]


def test_a_run_that_goes_on_counts_what_was_sent_before():
    out = io.StringIO()
    with display.for_console(Console(file=out, width=200)) as shown:
        shown.begin("title", [record(1), record(2)], 3)
        shown.round(record(3))
    assert "sent 9.00 kB" in out.getvalue()


def test_a_pruned_round_tells_its_sparsity_and_the_table_what_is_gone():
    out = io.StringIO()
    with display.for_console(Console(file=out, width=200)) as shown:
        shown.begin("title", [], 1)
        shown.round(record(1, sparsity=0.4876))
    assert "loss 0.5000  sparsity 48.8 %  clients 3" in out.getvalue()
    summary = {
        "status": "finished", "rounds_done": 2, "rounds": 3, "final": None, "best": None, "sparsity": 0.6,
        "remaining": {"a.weight": 0.25, "b.weight": 1.0}, "totals": {"bytes_up": 10, "bytes_down": 20, "seconds": 3},
        "model": {"weights": {"a.weight": {"shape": [20, 80]}, "b.weight": {"shape": [4, 100]}, "c": {"shape": [9]}}},
    }  # fmt: skip
    Console(file=out, width=200).print(display.result_table(summary))
    assert re.search(r"pruned\s+1,200 of 2,000 weights \(60.00 %\)", out.getvalue())
    Console(file=out, width=200).print(display.result_table({**summary, "model": {}}))
    assert "60.00 % of weights" in out.getvalue()


class Closed(io.StringIO):
    def write(self, text):
        raise BrokenPipeError


def test_a_closed_pipe_interrupts_a_run_and_ends_a_table(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Closed())
    console = display.console()
    with pytest.raises(KeyboardInterrupt), display.Lines(console) as shown:
        shown.begin("title", [record(1)], 2)
    with pytest.raises(BrokenPipeError):
        console.print("x")


def test_a_table_tells_what_became_of_a_run():
    summary = {
        "status": "finished", "rounds_done": 2, "rounds": 3, "final": {"accuracy": 0.5, "loss": 1.25}, "best": None,
        "target_accuracy": 0.9, "rounds_to_target": 1.5, "totals": {"bytes_up": 10, "bytes_down": 2000, "seconds": 3},
    }  # fmt: skip
    out = io.StringIO()
    Console(file=out, width=200).print(display.result_table(summary))
    lines = [re.split(r"\s{2,}", line.strip()) for line in out.getvalue().splitlines()]
    assert lines == [
        ["status", "finished"], ["rounds", "2 of 3"], ["accuracy", "50.00 % final, – best"], ["loss", "1.2500"],
        ["90.00 % accuracy", "after 1.50 rounds, interpolated"], ["sent", "10 B up, 2.00 kB down"], ["time", "3.0 s"],
    ]  # fmt: skip


def test_a_terminal_gets_bars_that_move(folder, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    code = "import sys; from fedsim.cli import main; sys.argv = ['fedsim', 'run', 'config.yaml']; main()"
    try:
        ours, theirs = pty.openpty()
    except OSError as error:
        pytest.skip(f"this machine gives no terminals: {error}")
    running = subprocess.Popen([sys.executable, "-c", code], cwd=folder, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    seen = bytearray()
    with contextlib.suppress(OSError):  # how Linux says that the other side is gone
        while data := os.read(ours, 4096):
            seen.extend(data)
    os.close(ours)
    text = seen.decode()
    assert running.wait(timeout=30) == 0, text
    assert "\x1b[" in text
    assert re.search(r"rounds .*2/2", text)
    assert "round 1/2" not in text
    assert "finished" in text
