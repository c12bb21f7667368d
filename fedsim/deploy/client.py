"""One client machine: keeps a SuperNode running, and answers what comes through it, until the run is over."""

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import filelock
import httpx
from flwr.clientapp import ClientApp

from fedsim.deploy import interventions, reaching, worker
from fedsim.deploy.address import Address
from fedsim.deploy.certificates import ClientFiles
from fedsim.deploy.node import Ended, Remembered, Setup, SuperNode
from fedsim.deploy.refusals import Say
from fedsim.engines.flower.process import quiet_log
from fedsim.errors import RunError

POLL_S = 0.05
FIRST_S, LAST_S = 1.0, 30.0  # before a SuperNode is started again: doubled each time
STEADY_S = 60.0  # one that was online so long is no reason to wait longer
RETRY_S = 1.0  # between attempts to reach the server
SAY_AGAIN_S = 60.0
REPLY_S = 30.0  # for the last reply to reach the server


def run_client(
    app: ClientApp,
    server: Address,
    files: ClientFiles | None,
    *,
    partition: int,
    say: Say,
    state: Path,
    until: threading.Event,
    stock: bool = False,
    wait_s: float | None = None,
) -> None:
    """Be a client of a server until it says that the run is over.

    Args:
        app: answers messages, in this thread.
        server: where the server is.
        files: CA and keys; None: neither TLS nor keys.
        partition: the node's partition-id.
        say: prints a line for a person.
        state: folder for the id of the node. That it cannot be written to is no mistake.
        until: set by the app when the server has said that the run is over; its reply is still sent.
        stock: only supported ways: Flower starts ``fedsim.deploy.apps:client_app`` in a process for each message.
        wait_s: for the server while it is away, in seconds; None: for ever.

    Raises:
        RunError: the server does not take this client, or stayed away for ``wait_s``.
        KeyboardInterrupt: as ever; the server knows that this client is gone.
    """
    quick = not stock and interventions.fits("client")
    if not (stock or quick):
        say(f"warning: made for Flower {interventions.MADE_FOR}; with another one rounds are slower")
    setup = Setup(server, files, partition, quick)
    with _alone(state), quiet_log(), _supervised(Supervisor(setup, say, state, wait_s)) as supervisor:
        if quick:
            _work(app, supervisor, until, say)
        else:
            supervisor.wait_for_end()


def _work(app: ClientApp, supervisor: "Supervisor", until: threading.Event, say: Say) -> None:
    """Take tasks from whichever SuperNode is there."""
    from fedsim.deploy.interventions import client as flower  # noqa: PLC0415  only where it fits

    runtime: flower.Runtime | None = None
    of: SuperNode | None = None
    while not until.is_set():
        supervisor.check()
        node = supervisor.online()
        if node is not of:
            runtime = flower.Runtime(str(node.runtime), node.secret) if node else None
            of = node
        worked = False
        if node is not None and runtime is not None:
            try:
                worked = worker.step(runtime, app, say)
            except (httpx.HTTPError, RuntimeError, OSError) as error:
                supervisor.lost(node, error)
        if not worked:
            time.sleep(POLL_S)
    supervisor.wait_for_reply()


@contextlib.contextmanager
def _alone(state: Path) -> Iterator[None]:
    """Two clients with one folder would each say that the other is gone."""
    lock = filelock.FileLock(state / "client.lock")
    try:
        state.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise RunError(f"{state}: another fedsim client is using this folder; two need two, see --state") from error
    except OSError:
        pass  # a folder that cannot be written to
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _supervised(supervisor: "Supervisor") -> Iterator["Supervisor"]:
    thread = threading.Thread(target=supervisor.run, name="supervisor", daemon=True)
    thread.start()
    try:
        yield supervisor
    finally:
        supervisor.stop.set()
        thread.join()


class Supervisor:
    """Keeps a SuperNode running, in a thread of its own.

    node: the one that is running now, if any.
    """

    def __init__(self, setup: Setup, say: Say, state: Path, wait_s: float | None) -> None:
        self.node: SuperNode | None = None
        self.stop = threading.Event()
        self._setup, self._say, self._wait_s = setup, say, wait_s
        self._remembered = Remembered(state / "node.json", setup.files.public) if setup.files else None
        self._failure: Exception | None = None
        self._joined = self._remembered is not None and self._remembered.read() is not None  # this key was taken once
        self._met = False  # by this process
        self._told: dict[str, float] = {}
        self._away: float | None = None

    def run(self) -> None:
        """Start, watch, start again, until told to stop or it makes no sense."""
        try:
            self._run()
        except Exception as error:
            self._failure = error

    def online(self) -> SuperNode | None:
        """The SuperNode, once it is with the server."""
        node = self.node
        return node if node is not None and node.log.node is not None else None

    def check(self) -> None:
        """Raise what ended it, if anything did."""
        if self._failure is not None:
            raise self._failure

    def lost(self, node: SuperNode, error: Exception) -> None:
        """A task could not be taken from a SuperNode, or its reply not given to it: end it, if it has not ended."""
        if not node.wait(1.0):
            self._say(f"cannot work with Flower's SuperNode ({error!r}); starting it again")
            node.stop()

    def wait_for_reply(self) -> None:
        """Wait until the reply of the message that is being answered is with the server, or cannot be sent."""
        if self.node is not None:
            self.node.log.idle.wait(REPLY_S)

    def wait_for_end(self) -> None:
        """Wait until the server has said that the run is over, going by the SuperNode's log."""
        while not (self.node is not None and self.node.log.over.is_set()):
            self.check()
            time.sleep(POLL_S)

    def _run(self) -> None:
        delay, again = FIRST_S, False
        while self._reach():
            self._deactivate()
            if again and self.stop.wait(delay):
                return
            since, ended = time.monotonic(), self._watch()
            if ended is None:
                return
            if ended.online and time.monotonic() - since > STEADY_S:
                delay = FIRST_S
            elif again:
                delay = min(2 * delay, LAST_S)
            self._judge(ended, delay)
            again = True

    def _reach(self) -> bool:
        """Wait until the server answers; False if told to stop."""
        server, files = self._setup.server, self._setup.files
        while not self.stop.is_set():
            try:
                missing = reaching.reach(server, files)
            except RunError as error:
                if not self._met:
                    raise
                missing = str(error)
            if missing is None:
                return True
            self._since_away(time.monotonic())
            self._say_now_and_then(f"waiting for the server at {server}: {missing}")
            self.stop.wait(RETRY_S)
        return False

    def _since_away(self, moment: float | None) -> None:
        """Take note that the server is away since a moment, or is there (None)."""
        self._away = None if moment is None else min(moment, self._away or moment)
        if self._away is not None and self._wait_s is not None and time.monotonic() - self._away > self._wait_s:
            raise RunError(f"the server at {self._setup.server} stayed away for {self._wait_s:g} s")

    def _deactivate(self) -> None:
        """Say that the former SuperNode is gone: as long as it seems to be there no other is let in."""
        if self._remembered is None or not self._setup.quick or (node := self._remembered.read()) is None:
            return
        from fedsim.deploy.interventions import client as flower  # noqa: PLC0415  only where it fits

        files = self._setup.files
        assert files is not None, "only nodes with keys are remembered"
        flower.deactivate(str(self._setup.server), files.ca.read_bytes(), files.key.read_bytes(), node)

    def _watch(self) -> Ended | None:
        """Run a SuperNode: how it ended by itself, or None if told to stop."""
        node = self.node = SuperNode(self._setup, self._say)
        online = False
        try:
            while not node.wait(POLL_S):
                if self.stop.is_set():
                    return None
                online = online or self._connected(node)
                self._look_away(node)
            ended = node.clear()
            if not online:
                self._connected(node)  # for less than a poll
            return ended
        finally:
            self.node = None
            if not node.stop():
                self._deactivate()

    def _connected(self, node: SuperNode) -> bool:
        """Whether it is; if so, take note."""
        if node.log.node is None:
            return False
        self._joined = self._met = True
        self._away = None
        self._told.clear()
        self._say(f"connected to the server at {self._setup.server}")
        if self._remembered is not None:
            self._remembered.write(node.log.node)
        return True

    def _look_away(self, node: SuperNode) -> None:
        away = node.log.away
        if away is None and self._away is not None and node.log.node is not None:
            self._say("the server answers again")
            self._told.clear()
        if away is not None:
            server = self._setup.server
            if self._away is None and not self._joined and self._setup.files is None and reaching.speaks_tls(server):
                raise RunError(f"the server at {server} speaks TLS: use --certs instead of --insecure")
            self._say_now_and_then(f"waiting for the server at {server}: it does not answer")
        if node.log.node is not None or away is not None:
            self._since_away(away)

    def _judge(self, ended: Ended, delay: float) -> None:
        why, again = reaching.explained(ended, self._setup.server, self._setup.files)
        if not (again or self._joined):
            raise RunError(why)
        self._say_now_and_then(f"{why}; trying again in {delay:.0f} s")

    def _say_now_and_then(self, line: str) -> None:
        """Say a line, unless it was said a short while ago."""
        now = time.monotonic()
        if now - self._told.get(line, -SAY_AGAIN_S) >= SAY_AGAIN_S:
            self._told[line] = now
            self._say(line)
