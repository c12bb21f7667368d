"""Flower's names on the server that are not public: registering keys, starting the run, being its ServerApp."""

import concurrent.futures
import contextlib
import hashlib
import threading
import time
import warnings
from base64 import b64encode
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import httpx
from cryptography.hazmat.primitives import serialization
from flwr.app import Error, Message, Metadata
from flwr.app.message import make_message
from flwr.cli.build import build_fab_from_files
from flwr.common.constant import ErrorCode, SubStatus
from flwr.common.serde import fab_to_proto, run_from_proto
from flwr.proto.control_pb2 import RegisterNodeRequest, StartRunRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullAppMessagesRequest,
    PullTaskInputRequest,
    PushTaskOutputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.serverapp import Grid
from flwr.supercore.constant import SYSTEM_MESSAGE_TYPE, TaskType
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_pull_object_fn_protobuf
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, inflate_object_from_contents, pull_objects
from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor, RuntimeVersionHttpInterceptor
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid

from fedsim.errors import RunError

NAMES = (
    "flwr.common.constant:SubStatus.COMPLETED",
    "flwr.common.constant:ErrorCode.MESSAGE_UNAVAILABLE",
    "flwr.supercore.constant:TaskType.SERVER_APP",
    "flwr.supercore.control:ControlHttpClient.RegisterNode",
    "flwr.supercore.control:ControlHttpClient.StartRun",
    "flwr.supercore.control:ControlHttpClient.from_server_address",
    "flwr.supercore.runtime:RuntimeHttpClient.AcquireTask",
    "flwr.supercore.runtime:RuntimeHttpClient.ConfirmMessageReceived",
    "flwr.supercore.runtime:RuntimeHttpClient.PullMessages",
    "flwr.supercore.runtime:RuntimeHttpClient.PullObject",
    "flwr.supercore.runtime:RuntimeHttpClient.PullTaskInput",
    "flwr.supercore.runtime:RuntimeHttpClient.PushTaskOutput",
    "flwr.supercore.runtime:RuntimeHttpClient.SendTaskHeartbeat",
    "flwr.supercore.task_identity:TaskIdentity._task_id",
    "flwr.superlink.grid:HttpGrid._runtime_client",
)  # the imports above are checked by being imported
TASK_S = 20.0  # in which a started run must give its task
POLL_S, HEARTBEAT_S = 0.1, 10.0  # the SuperLink gives a task up after 60 s without a heartbeat
PATIENCE_S = 60.0  # with a SuperLink that runs and does not answer
BACKOFF_S, BACKOFF_CAP_S = 0.05, 0.5  # between looks for a part of a reply that its sender has not sent yet
SENDERS = 32  # replies that may be on their way at the same time
WAIT_S = 0.2  # for replies that are on their way, in each look for others

Check = Callable[[], None]


def header(public: Path) -> bytes:
    """How a client with this public key names itself in its requests."""
    return b64encode(_pem(public))


def register(address: str, keys: Mapping[int, Path]) -> dict[int, int]:
    """Make clients' keys known to the SuperLink; the node id of each."""
    with contextlib.closing(_client(ControlHttpClient, address, "flwr CLI")) as control:
        return {
            client: int(control.RegisterNode(RegisterNodeRequest(public_key=_pem(path))).node_id)
            for client, path in keys.items()
        }


def start(address: str, app: Mapping[str, bytes]) -> int:
    """Start a run of an app, given as its files; the run's id."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a package that Flower uses
        content, _ = build_fab_from_files(app)
    fab = Fab(hashlib.sha256(content).hexdigest(), content, {})
    with contextlib.closing(_client(ControlHttpClient, address, "flwr CLI")) as control:
        return int(control.StartRun(StartRunRequest(fab=fab_to_proto(fab))).run_id)


@contextlib.contextmanager
def serverapp(address: str, check: Check) -> Iterator[Grid]:
    """Be the ServerApp of the run that was started, in this process.

    Args:
        address: of the SuperLink.
        check: raises if the SuperLink is gone.

    Yields:
        The grid. The run is completed if the context ends well, and failed if it does not.

    Raises:
        RunError: the SuperLink does not answer, or has given the run up.
    """
    patience = _Patience(check)
    token = _token(address, patience)
    grid = _Grid(address, insecure=True, token=token)
    grid._retry_invoker = cast(Any, patience)
    found = grid._runtime_client.PullTaskInput(PullTaskInputRequest())
    grid.set_run(run_from_proto(found.run))
    before = TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id
    TaskIdentity._task_id, TaskIdentity._run_id = found.task_id, found.run.run_id
    TaskIdentity._node_id = found.context.node_id
    beating = threading.Event()
    threading.Thread(target=_beat, args=(address, token, patience, beating), daemon=True).start()
    status, details = SubStatus.FAILED, ""
    try:
        yield grid
        status = SubStatus.COMPLETED
    except BaseException as error:
        details = str(error) or repr(error)
        raise
    finally:
        beating.set()
        patience.limit_s = 0
        with contextlib.suppress(httpx.HTTPError, RunError):
            grid._runtime_client.PushTaskOutput(PushTaskOutputRequest(sub_status=status, details=details))
        grid.close()
        TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id = before


class _Patience:
    """Stands where Flower's clients keep their retry policy, which for a run that has ended kills the process."""

    def __init__(self, check: Check) -> None:
        self.check, self.limit_s, self.lost = check, PATIENCE_S, ""

    def invoke(self, call: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
        """Call, again if the SuperLink did not answer, for as long as it runs and patience lasts."""
        end = time.monotonic() + self.limit_s
        while True:
            if self.lost:
                raise RunError(self.lost)
            try:
                return call(*arguments, **more)
            except httpx.TransportError as error:
                self.check()
                if time.monotonic() >= end:
                    raise RunError(f"Flower's SuperLink does not answer: {error!r}") from error
            except httpx.HTTPStatusError as error:
                if error.response.status_code in (401, 403):
                    raise RunError(f"Flower's SuperLink has given this run up: {error.response.text}") from error
                raise RunError(f"Flower's SuperLink fails: {error}: {error.response.text}") from error
            time.sleep(POLL_S)


class _Grid(HttpGrid):
    """Flower's grid, but it polls quickly, and nobody waits for a client that sends its reply slowly."""

    def __init__(self, address: str, *, insecure: bool, token: str) -> None:
        super().__init__(address, insecure, None, token=token)
        self._senders = concurrent.futures.ThreadPoolExecutor(SENDERS, "replies")
        self._coming: dict[concurrent.futures.Future[Message], str] = {}
        self._closed = False

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Replies to these messages that have wholly come.

        A reply is known to the SuperLink before its parts are there, so each is fetched in a thread of its own. It is
        not asked for again meanwhile: the SuperLink forgets it once it was fetched, and would answer with an error.
        """
        wanted = set(message_ids)
        asked = wanted.difference(self._coming.values())
        found = self._runtime_client.PullMessages(PullAppMessagesRequest(message_ids=asked))
        for message, tree in zip(found.messages_list, found.message_object_trees, strict=True):
            self._coming[self._senders.submit(self._fetch, message, tree)] = message.metadata.reply_to_message_id
        done, _ = concurrent.futures.wait(self._coming, timeout=WAIT_S)
        whole = [(one.result(), self._coming.pop(one)) for one in done]
        return [message for message, reply_to in whole if reply_to in wanted]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Send messages and wait for the replies."""
        waiting = {sent for sent in self.push_messages(list(messages)) if sent}
        replies: list[Message] = []
        end = time.monotonic() + (float("inf") if timeout is None else timeout)
        while waiting:
            new = self.pull_messages(waiting)
            replies += new
            waiting -= {one.metadata.reply_to_message_id for one in new}
            if not waiting or time.monotonic() >= end:
                break
            time.sleep(POLL_S)
        return replies

    def close(self) -> None:
        """Disconnect, and let go of what is still coming."""
        self._closed = True
        self._senders.shutdown(wait=False, cancel_futures=True)
        super().close()

    def _fetch(self, message: Any, tree: Any) -> Message:
        client, run_id, message_id = self._runtime_client, self.run.run_id, message.metadata.message_id
        pull = make_pull_object_fn_protobuf(pull_object_protobuf=client.PullObject, node=self.node, run_id=run_id)

        def part(object_id: str) -> bytes:
            if self._closed:
                raise RunError("the run has ended")
            return bytes(pull(object_id))

        try:
            parts = pull_objects(
                [one.object_id for one in iterate_object_tree(tree)],
                part,
                max_tries_per_object=None,
                initial_backoff=BACKOFF_S,
                backoff_cap=BACKOFF_CAP_S,
            )
        except ObjectPullError as error:
            return _unavailable(message, run_id, f"its reply has not wholly come: {error}")
        client.ConfirmMessageReceived(
            ConfirmMessageReceivedRequest(node=self.node, run_id=run_id, message_object_id=message_id)
        )
        try:
            return _whole(message, parts)
        except Exception as error:  # whatever a client may send
            return _unavailable(message, run_id, f"its reply is not valid: {error!r}")


def _whole(message: Any, parts: dict[str, bytes]) -> Message:
    """A reply made of its parts; what it says of itself must be what the SuperLink was told."""
    whole, said = inflate_object_from_contents(message.metadata.message_id, parts), message.metadata
    if not isinstance(whole, Message):
        raise ValueError(f"it is {type(whole).__name__}")
    found = whole.metadata
    if (found.reply_to_message_id, found.src_node_id) != (said.reply_to_message_id, said.src_node_id):
        raise ValueError("it answers another message than it should, or is of another node")
    whole.metadata.__dict__["_message_id"] = said.message_id
    return whole


def _unavailable(message: Any, run_id: int, reason: str) -> Message:
    """An error in the place of a reply that cannot be had."""
    metadata = Metadata(
        run_id=run_id,
        message_id="",
        src_node_id=message.metadata.src_node_id,
        dst_node_id=message.metadata.dst_node_id,
        message_type=SYSTEM_MESSAGE_TYPE,
        group_id="",
        ttl=0,
        reply_to_message_id=message.metadata.reply_to_message_id,
        created_at=time.time(),
    )
    return make_message(metadata=metadata, error=Error(code=ErrorCode.MESSAGE_UNAVAILABLE, reason=reason))


def _token(address: str, patience: _Patience) -> str:
    """What lets this process act for the task of the run."""
    end = time.monotonic() + TASK_S
    request = AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP])
    with contextlib.closing(_client(RuntimeHttpClient, address, "SuperExec")) as runtime:
        while not (token := patience.invoke(runtime.AcquireTask, request).token):
            if time.monotonic() >= end:
                raise RunError(f"Flower's SuperLink has no task for the run that it started {TASK_S:g} s ago")
            time.sleep(0.05)
    return str(token)


def _beat(address: str, token: str, patience: _Patience, stop: threading.Event) -> None:
    """Tell the SuperLink again and again that the task is alive."""
    more = RuntimeTokenHttpInterceptor(token=token)
    with contextlib.closing(_client(RuntimeHttpClient, address, "flwr-serverapp", more)) as runtime:
        while not stop.wait(HEARTBEAT_S):
            with contextlib.suppress(httpx.TransportError, httpx.HTTPStatusError):  # whoever asks next will see it
                if not runtime.SendTaskHeartbeat(SendTaskHeartbeatRequest()).success:
                    patience.lost = "Flower's SuperLink has given this run up: it had no sign of life from it"
                    return


def _client(kind: Any, address: str, component: str, *more: Any) -> Any:
    version = RuntimeVersionHttpInterceptor(component_name=component)
    return kind.from_server_address(address, True, None, [version, *more])


def _pem(public: Path) -> bytes:
    key = serialization.load_ssh_public_key(public.read_bytes())
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
