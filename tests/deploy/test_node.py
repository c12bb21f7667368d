"""What a SuperNode's log says, the id that is remembered, and that nothing outlives whoever started it."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from fedsim.deploy.address import Address
from fedsim.deploy.node import KEPT_LINES, Log, Remembered, Setup, SuperNode

ONLINE = "\x1b[92mINFO \x1b[0m:      SuperNode ID: 123456789"
MESSAGE = "\x1b[92mINFO \x1b[0m:      Receiving: {} message (ID: abc)"
SENT = "\x1b[92mINFO \x1b[0m:      Sent successfully"


def read(*lines):
    log = Log()
    return log, [told for line in lines if (told := log.read(line + "\n")) is not None]


def test_the_log_says_which_node_it_is():
    log, told = read("INFO :      Starting Flower SuperNode", ONLINE)
    assert (log.node, log.code, told) == (123456789, 0, [])


def test_a_message_is_under_way_until_its_reply_is_sent():
    log, _ = read(ONLINE, MESSAGE.format("train"))
    assert not log.idle.is_set()
    log.read(SENT)
    assert log.idle.is_set()
    assert not log.over.is_set()


@pytest.mark.parametrize(
    "line",
    [
        "ERROR :     Failed to send message abc: no",
        "INFO :      Run ID 5 is not in `RUNNING` status. Ignoring reply message abc.",
        "ERROR :     Failed to receive message abc: no",
    ],
)
def test_a_message_that_cannot_be_answered_is_not_waited_for(line):
    log, _ = read(ONLINE, MESSAGE.format("query.end"), line)
    assert log.idle.is_set()
    assert not log.over.is_set()


def test_the_run_is_over_when_the_reply_to_the_last_message_is_sent():
    log, _ = read(MESSAGE.format("train"), SENT, MESSAGE.format("query.end"), "INFO :      Received successfully")
    assert not log.over.is_set()
    log.read(SENT)
    assert log.over.is_set()


def test_the_server_is_away_from_the_first_failure_to_the_first_success():
    log, _ = read(ONLINE, "WARNING :   Connection attempt failed, retrying in 0.31 seconds")
    since = log.away
    assert since is not None
    log.read("WARNING :   Connection attempt failed, retrying in 1.31 seconds")
    assert log.away == since
    log.read("INFO :      Connection successful after 1.50 seconds and 3 tries.")
    assert log.away is None


def test_what_it_says_when_it_ends_is_kept_without_its_advertisement():
    log, told = read(
        "INFO :      Starting Flower SuperNode",
        "\x1b[91mERROR \x1b[0m:     Exit Code: 305",
        "Failed to initialize the connection to the SuperLink.",
        "[code: 2004] Failed to activate SuperNode",
        "",
        "For more information, visit: <https://flower.ai/docs>",
        "INFO:     Shutting down",
    )
    assert (log.code, told) == (305, [])
    end = "Failed to initialize the connection to the SuperLink.; [code: 2004] Failed to activate SuperNode"
    assert log.told() == end


def test_lines_of_an_app_are_passed_on():
    _, told = read("INFO :      x", "round 3: trained", "INFO:     Started server process [5]", "Traceback (most")
    assert told == ["round 3: trained", "Traceback (most"]


def test_the_log_does_not_grow():
    log, _ = read(*(f"INFO :      {i}" for i in range(3 * KEPT_LINES)))
    assert len(log.lines) == KEPT_LINES
    assert log.told() == f"{3 * KEPT_LINES - 3}; {3 * KEPT_LINES - 2}; {3 * KEPT_LINES - 1}"


@pytest.fixture
def remembered(tmp_path):
    public = tmp_path / "client.pub"
    public.write_text("ecdsa AAAA")
    return Remembered(tmp_path / "state" / "node.json", public)


def test_the_id_of_a_node_is_remembered(remembered):
    assert remembered.read() is None
    remembered.write(2**63 + 5)
    assert remembered.read() == 2**63 + 5
    remembered.write(7)
    assert remembered.read() == 7


def test_the_id_of_another_keys_node_is_of_no_use(remembered):
    remembered.write(7)
    remembered.public.write_text("ecdsa BBBB")
    assert remembered.read() is None


@pytest.mark.parametrize("content", ["", "5", "[]", '{"node": 5}', '{"node": "x", "key": 1}', "\x00"])
def test_a_damaged_file_is_as_none(remembered, content):
    remembered.write(7)
    remembered.path.write_text(content)
    assert remembered.read() is None


def test_a_folder_that_cannot_be_written_is_no_mistake(remembered):
    remembered.path.parent.write_text("a file where the folder should be")
    remembered.write(7)
    assert remembered.read() is None


def gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def wait_for(what, seconds=15.0):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.02)


def nowhere():
    return Setup(Address("127.0.0.1", 1), None, 0, quick=True)


@pytest.mark.slow
def test_a_supernode_is_stopped_and_leaves_nothing():
    node = SuperNode(nowhere(), print)
    wait_for(lambda: node.log.away is not None)
    assert node.folder.stat().st_mode & 0o077 == 0
    assert node.stop()
    assert gone(node.pid)
    assert not node.folder.exists()
    assert node.clear().status == 0  # again, and nothing happens


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_a_supernode_ends_with_its_parent(end):
    code = """
        import sys, time
        from fedsim.deploy.address import Address
        from fedsim.deploy.node import Setup, SuperNode
        node = SuperNode(Setup(Address("127.0.0.1", 1), None, 0, True), print)
        print(node.pid, node.folder, flush=True)
        time.sleep(60)
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    with parent, parent.stdout:
        pid, folder = parent.stdout.readline().split()
        time.sleep(0.5)
        os.kill(parent.pid, end)
        parent.wait()
        wait_for(lambda: gone(int(pid)))
        assert not Path(folder).exists()


INTERRUPTED = """
import os, sys, threading, time, types

from fedsim.deploy import supernode_process


def flower_supernode():
    threading.Thread(target=time.sleep, args=(600,)).start()
    raise KeyboardInterrupt


fake = types.ModuleType("flwr.supernode.cli.flower_supernode")
fake.flower_supernode = flower_supernode
sys.modules[fake.__name__] = fake
sys.argv = ["supernode_process", str(os.getppid()), sys.argv[1], "stock"]
supernode_process.main()
"""


def test_a_supernode_that_interrupts_itself_ends_whatever_threads_are_left(tmp_path):
    command = [sys.executable, "-c", INTERRUPTED, str(tmp_path)]
    done = subprocess.run(command, start_new_session=True, timeout=60, check=False)
    assert done.returncode == 1
