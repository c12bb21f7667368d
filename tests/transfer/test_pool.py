"""Work shared out over processes: the same results, and nobody left behind."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from fedsim.errors import TransferError
from fedsim.transfer.pool import Pool

WORK = """
import os, sys, time
from fedsim.errors import TransferError

def scaled(items, factor):
    return [item * factor for item in items]

def processes(items):
    time.sleep(0.05)
    return [os.getpid()] * len(items)

def loaded(items):
    return [sorted({"torch", "flwr"} & set(sys.modules))] * len(items)

def commands(items, secret):
    return [open("/proc/self/cmdline").read() + open("/proc/self/environ").read() for _ in items]

def refused(items):
    if 5 in items:
        raise TransferError("overflow: five")
    time.sleep(0.02)
    return items

def dies(items):
    os._exit(9) if 5 in items else time.sleep(0.02)
    return items

def sleeps(items):
    time.sleep(60)
    return items
"""


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A module that processes can import, too."""
    (tmp_path / "pool_work.py").write_text(WORK)
    monkeypatch.syspath_prepend(str(tmp_path))
    import pool_work

    yield pool_work
    del sys.modules["pool_work"]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_results_are_in_order_whatever_the_number_of_processes(workers: int, work: ModuleType) -> None:
    with Pool(workers) as pool:
        for count in (0, 1, 2, 7, 100):
            assert pool.map(work.scaled, range(count), 3) == [3 * item for item in range(count)]
            assert pool.map(work.scaled, range(count), -1) == [-item for item in range(count)]


def test_one_worker_is_this_process_and_two_are_others_that_stay(work: ModuleType) -> None:
    assert set(Pool(1).map(work.processes, range(9))) == {os.getpid()}
    with Pool(2) as pool:
        first = set(pool.map(work.processes, range(16)))
        assert len(first) == 2 and os.getpid() not in first
        assert set(pool.map(work.processes, range(16))) == first
        assert all(map(alive, first))
    assert not any(map(alive, first))


def test_processes_import_only_what_they_call(work: ModuleType) -> None:
    with Pool(2) as pool:
        assert pool.map(work.loaded, range(4)) == [[]] * 4


def test_what_is_shared_is_in_no_command_line_or_environment(work: ModuleType) -> None:
    with Pool(2) as pool:
        for text in pool.map(work.commands, range(2), "a secret of 2048 bits"):
            assert "secret" not in text and "python" in text


def test_large_items_and_results_do_not_block_the_pipe(work: ModuleType) -> None:
    with Pool(2) as pool:
        found = pool.map(work.scaled, [b"x" * 2**20] * 24, 2)
    assert [len(one) for one in found] == [2**21] * 24


def test_an_error_is_raised_here_and_ends_the_processes(work: ModuleType) -> None:
    with Pool(2) as pool:
        before = set(pool.map(work.processes, range(16)))
        with pytest.raises(TransferError, match=r"^overflow: five$"):
            pool.map(work.refused, range(40))
        assert not any(map(alive, before))
        assert pool.map(work.scaled, range(9), 2) == list(range(0, 18, 2))
        assert not set(pool.map(work.processes, range(16))) & before


def test_a_process_that_dies_is_an_error(work: ModuleType) -> None:
    with Pool(2) as pool:
        before = set(pool.map(work.processes, range(16)))
        with pytest.raises(TransferError, match="a process that calculates ended"):
            pool.map(work.dies, range(40))
        assert not any(map(alive, before))


def test_fewer_than_one_worker_is_refused() -> None:
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        Pool(0)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_no_process_outlives_an_interrupt_or_a_kill(how: signal.Signals, work: ModuleType, tmp_path: Path) -> None:
    script = tmp_path / "main.py"
    script.write_text(
        textwrap.dedent(f"""
        import sys
        sys.path[:] = [{str(tmp_path)!r}] + {sys.path!r}
        from fedsim.transfer.pool import Pool
        import pool_work
        with Pool(2) as pool:
            print(*set(pool.map(pool_work.processes, range(16))), flush=True)
            pool.map(pool_work.{"sleeps" if how == signal.SIGINT else "processes"}, range(2000))
        """)
    )
    process = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert process.stdout is not None
        pids = [int(word) for word in process.stdout.readline().split()]
        assert len(pids) == 2 and all(map(alive, pids))
        time.sleep(0.2)
        if how == signal.SIGINT:
            os.killpg(process.pid, how)  # as the terminal does, to all
        else:
            process.kill()
        _, told = process.communicate(timeout=20)
        if how == signal.SIGINT:
            assert told.count("KeyboardInterrupt") == 1  # from the script; the processes say nothing
        deadline = time.monotonic() + 20
        while any(map(alive, pids)) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not any(map(alive, pids))
    finally:
        process.kill()
        process.wait()
