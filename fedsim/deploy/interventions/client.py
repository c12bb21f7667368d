"""What a client uses of Flower that is not public: the tasks of its SuperNode, and saying that its node is gone."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.app import Context, Message
from flwr.app.message import remove_content_from_message
from flwr.common.constant import SubStatus
from flwr.common.serde import context_from_proto, context_to_proto, message_to_proto
from flwr.proto import fleet_pb2, node_pb2, runtime_pb2
from flwr.supercore import heartbeat
from flwr.supercore.constant import TaskType
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.inflatable import inflatable_object, inflatable_utils
from flwr.supercore.inflatable import inflatable_protobuf_utils as calls
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from fedsim.deploy.address import Address
from fedsim.deploy.certificates import ClientFiles

NAMES = (
    "flwr.supercore.heartbeat:HeartbeatSender.is_running",
    "flwr.supercore.inflatable.inflatable_utils:push_objects",
    "flwr.supercore.runtime:RuntimeHttpClient.AcquireTask",
    "flwr.supercore.runtime:RuntimeHttpClient.from_server_address",
    "flwr.supernode.fleet_http_client:FleetHttpClient.DeactivateNode",
)  # the imports above are checked by being imported
HEARTBEAT_S = 10  # of a node that is there for a moment; the least that a server takes
BACKOFF_S = 0.05
MESSAGE_S = 10.0  # a task may be seen before its message


def deactivate(server: str, ca: bytes, key: bytes, node: int) -> bool:
    """Tell the server that a node is gone: it would else find out by waiting, and a node that seems online cannot join.

    Args:
        server: HOST:PORT.
        ca: certificate of the CA, PEM.
        key: the node's private key, OpenSSH.
        node: its id.

    Returns:
        Whether the server took note. Nothing is raised if the server cannot be reached or refuses.
    """
    try:
        with _fleet(server, ca, key) as fleet:
            fleet.DeactivateNode(fleet_pb2.DeactivateNodeRequest(node_id=node))
    except (httpx.HTTPError, OSError, ValueError):
        return False
    return True


def registered(server: Address, files: ClientFiles) -> str:
    """Whether the server takes a client with these keys: "", or why not. It is online for a moment."""
    key = files.key.read_bytes()
    public = public_key_to_bytes(_private(key).public_key())
    try:
        with _fleet(str(server), files.ca.read_bytes(), key) as fleet:
            request = fleet_pb2.ActivateNodeRequest(public_key=public, heartbeat_interval=HEARTBEAT_S)
            node = fleet.ActivateNode(request).node_id
            fleet.DeactivateNode(fleet_pb2.DeactivateNodeRequest(node_id=node))
    except httpx.HTTPStatusError as error:
        refusal = FlowerError.from_json(error.response.text)
        if refusal is not None and refusal.code == ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED:
            return "the key is not registered there, or a client with this key is connected"
        return f"the server refuses the key ({error.response.status_code})"
    except (httpx.HTTPError, OSError, ValueError) as error:
        return f"the server does not answer: {error}"
    return ""


def _fleet(server: str, ca: bytes, key: bytes) -> FleetHttpClient:
    """What a node says to a server, signed."""
    private = _private(key)
    signing = NodeAuthHttpInterceptor(private, private.public_key())
    version = RuntimeVersionHttpInterceptor(component_name="SuperNode")
    return FleetHttpClient.from_server_address(server, False, ca, interceptors=[version, signing])


def _private(key: bytes) -> EllipticCurvePrivateKey:
    private = load_ssh_private_key(key, None)
    if not isinstance(private, EllipticCurvePrivateKey):
        raise ValueError("the key of a node must be one of an elliptic curve")
    return private


class Task:
    """A message that waits for its reply at the SuperNode. Heartbeats are sent while it is open."""

    def __init__(self, client: RuntimeHttpClient) -> None:
        self._client = client
        self._context: Context | None = None

    def pull(self) -> tuple[Message, Context]:
        """The message, and its context; what is made from now on bears the identity of this task."""
        got = self._client.PullTaskInput(runtime_pb2.PullTaskInputRequest())
        context = self._context = context_from_proto(got.context)
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = got.task_id, got.run.run_id, context.node_id
        tree = self._tree()
        node, run = node_pb2.Node(node_id=context.node_id), context.run_id
        message = inflatable_utils.pull_and_inflate_object_from_tree(
            tree,
            calls.make_pull_object_fn_protobuf(self._client.PullObject, node, run),
            calls.make_confirm_message_received_fn_protobuf(self._client.ConfirmMessageReceived, node, run),
            return_type=Message,
            initial_backoff=BACKOFF_S,
        )
        message.metadata.__dict__["_message_id"] = tree.object_id  # Flower has no setter
        return message, context

    def push(self, reply: Message, failure: str = "") -> None:
        """Hand over the reply, and end the task."""
        assert self._context is not None, "a task is pulled before it is answered"
        reply.metadata.__dict__["_message_id"] = reply.object_id
        with inflatable_object.no_object_id_recompute():
            head = message_to_proto(remove_content_from_message(reply))
            tree = inflatable_object.get_object_tree(reply)
            request = runtime_pb2.PushAppMessagesRequest(messages_list=[head], message_object_trees=[tree])
            got = self._client.PushMessages(request)
            node, run = node_pb2.Node(node_id=self._context.node_id), self._context.run_id
            push = calls.make_push_object_fn_protobuf(
                self._client.PushObject, node, run_id=run, session_id=got.session_id
            )
            wanted = set(got.objects_to_push)
            inflatable_utils.push_objects(
                inflatable_object.get_all_nested_objects(reply), push, object_ids_to_push=wanted
            )
        status, state = SubStatus.FAILED if failure else SubStatus.COMPLETED, context_to_proto(self._context)
        output = runtime_pb2.PushTaskOutputRequest(context=state, sub_status=status, details=failure)
        self._client.PushTaskOutput(output)

    def _tree(self) -> Any:
        end = time.monotonic() + MESSAGE_S
        while not (got := self._client.PullMessages(runtime_pb2.PullAppMessagesRequest())).messages_list:
            if time.monotonic() > end:
                raise RuntimeError(f"a task without a message for {MESSAGE_S:g} s")
            time.sleep(BACKOFF_S)
        return got.message_object_trees[0]


class Runtime:
    """The interface of a SuperNode of this machine for whoever does its tasks.

    Args:
        address: HOST:PORT.
        secret: that the SuperNode was started with; nobody else on this machine can take its tasks.
    """

    def __init__(self, address: str, secret: bytes) -> None:
        method = "/flwr.proto.Runtime/AcquireTask"
        self._address = address
        self._client = _client(address, SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods={method}))

    @contextmanager
    def task(self) -> Iterator[Task | None]:
        """The next task, None if there is none now."""
        request = runtime_pb2.AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP])
        got = self._client.AcquireTask(request)
        if not got.token:
            yield None
            return
        with _client(self._address, RuntimeTokenHttpInterceptor(got.token)) as client, _beating(client):
            yield Task(client)

    def close(self) -> None:
        """Close connections."""
        self._client.close()


@contextmanager
def _beating(client: RuntimeHttpClient) -> Iterator[None]:
    """Say now and then that the task is being worked on."""

    def beat() -> bool:  # Flower's own interrupts the process if the SuperNode has given the task up
        try:
            client.SendTaskHeartbeat(runtime_pb2.SendTaskHeartbeatRequest())
        except httpx.HTTPError:
            return False
        return True

    sender = heartbeat.HeartbeatSender(beat)
    sender.start()
    try:
        yield
    finally:
        if sender.is_running:
            sender.stop()


def _client(address: str, signing: Any) -> RuntimeHttpClient:
    version = RuntimeVersionHttpInterceptor(component_name="SuperExec")
    client = RuntimeHttpClient.from_server_address(address, True, None, interceptors=[version, signing])
    client._client.close()
    client._client = httpx.Client(timeout=30, trust_env=False)  # a proxy must not stand between two processes
    return client
