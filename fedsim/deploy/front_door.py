"""The only public listener of a server: passes what clients need to Flower's SuperLink, and nothing else.

The SuperLink serves everything on one port, and whoever reaches its control interface may run code on every client. So
it listens on loopback, and this reverse proxy stands before it, with TLS. It compares the bytes of a request's target
with a list: there is no path to normalise, decode or trick. A body is read only when it is known to be short enough.
"""

import asyncio
import contextlib
import datetime
import socket
import ssl
import threading
from collections.abc import Collection, Coroutine, Iterator
from dataclasses import dataclass, field
from email.utils import formatdate
from typing import Any, NamedTuple

import h11
import httpx

from fedsim.deploy.address import Address
from fedsim.deploy.certificates import ServerFiles
from fedsim.deploy.listening import listeners
from fedsim.deploy.refusals import Refusals, Say
from fedsim.errors import DataError, RunError

CALLS = (
    "activate-node",
    "deactivate-node",
    "send-node-heartbeat",
    "pull-messages",
    "push-messages",
    "get-run",
    "get-fab",
    "push-object",
    "pull-object",
    "confirm-message-received",
)
KEYLESS_CALLS = ("register-node", "unregister-node")  # a node without a key asks for a number

BODY_BYTES = 16 * 2**20  # the largest real body is a chunk of 5 MiB and its frame
CONNECTIONS, PER_ADDRESS = 512, 256
HANDSHAKE_S, FIRST_S, IDLE_S = 10.0, 10.0, 75.0
TRANSFER_S, BYTES_PER_S = 30.0, 16 * 2**10  # a transfer may take so long, and a second more for so many bytes
LINGER_S = 2.0
UPSTREAM = httpx.Timeout(35.0, connect=5.0)  # clients wait 30 s
UPSTREAM_IDLE_S = 3.0  # the SuperLink closes its side after 5 s
CLOCK_AHEAD_S, CLOCK_BEHIND_S = 5, 305  # what the SuperLink accepts

# what the SuperLink answers to a key that it does not know
_NOT_ACTIVATED = 412, b'{"code":2004,"detail":"Failed to activate SuperNode."}'
_NO_SUCH_NODE = 401, b'{"detail":"Invalid SuperNode authentication"}'

_ALERTS = {
    "HTTP_REQUEST": "plain HTTP where TLS is spoken; is the client started with --insecure?",
    "TLSV1_ALERT_UNKNOWN_CA": "the client does not know the CA of this server's certificate; is its ca.crt another?",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "the client finds this server's certificate expired; is its clock right?",
    "SSLV3_ALERT_BAD_CERTIFICATE": "the client does not accept this server's certificate; does it know the server by "
    "a name that is not in it?",
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": "the client does not accept this server's certificate",
}


class Request(NamedTuple):
    """A request as it came. ``headers`` have lower-case names."""

    method: bytes
    target: bytes
    headers: dict[bytes, bytes]


class Reply(NamedTuple):
    """What to answer. Refusals end the connection."""

    status: int
    headers: list[tuple[bytes, bytes]] = []  # noqa: RUF012  never changed
    body: bytes = b""


class _RefusedError(Exception):
    """The request is answered with ``reply`` and reported as ``kind``."""

    def __init__(self, status: int, kind: str, text: str = "", body: bytes = b"") -> None:
        super().__init__(kind)
        self.reply = Reply(status, [(b"content-type", b"application/json")] if body else [], body)
        self.kind, self.text = kind, text


@dataclass
class Door:
    """A running front door.

    address: where it listens, with the port it really has.
    """

    address: Address
    upstream: str
    tls: ssl.SSLContext | None
    refusals: Refusals
    known: Collection[bytes] | None
    error: BaseException | None = None
    _open: dict[asyncio.Task[None], str] = field(default_factory=dict)  # connection -> its address
    _closing: asyncio.Event = field(default_factory=asyncio.Event)

    def check(self) -> None:
        """Complain if it has stopped.

        Raises:
            RunError: it has.
        """
        if self.error is not None:
            raise RunError(f"the listener on {self.address} has stopped: {self.error!r}") from self.error

    async def serve(self, sockets: list[socket.socket]) -> None:
        """Accept and answer until told to close."""
        limits = httpx.Limits(max_connections=CONNECTIONS, keepalive_expiry=UPSTREAM_IDLE_S)
        own: dict[str, Any] = {"trust_env": False, "timeout": UPSTREAM, "limits": limits}
        async with httpx.AsyncClient(base_url=self.upstream, headers={"accept-encoding": "identity"}, **own) as client:
            accepting = [self._accept(one, client) for one in sockets]
            parts: list[Coroutine[Any, Any, Any]] = [self._tick(), self._closing.wait(), *accepting]
            tasks = [asyncio.ensure_future(part) for part in parts]
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            ending = [*tasks, *self._open]
            for task in ending:
                task.cancel()
            await asyncio.wait(ending, timeout=1)
            for task in done:
                task.result()  # raises what stopped it

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(1)
            self.refusals.tick()

    async def _accept(self, listener: socket.socket, client: httpx.AsyncClient) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                accepted, peer = await loop.sock_accept(listener)
            except OSError as error:  # no file handles left, or the other side has gone already
                self.refusals.note("-", f"cannot accept connections: {error}")
                await asyncio.sleep(0.1)
                continue
            address = str(peer[0]).removeprefix("::ffff:")
            if len(self._open) >= CONNECTIONS or list(self._open.values()).count(address) >= PER_ADDRESS:
                self.refusals.note(address, "too many connections")
                accepted.close()
                continue
            task = loop.create_task(self._connection(accepted, address, client))
            self._open[task] = address
            task.add_done_callback(self._closed)

    def _closed(self, task: "asyncio.Task[None]") -> None:
        del self._open[task]
        if not task.cancelled() and task.exception() is not None:
            self.refusals.note("-", f"connection ended by {task.exception()!r}")

    async def _connection(self, accepted: socket.socket, address: str, client: httpx.AsyncClient) -> None:
        """The whole life of a connection."""
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(limit=2**20)
        protocol = asyncio.StreamReaderProtocol(reader)
        times: dict[str, Any] = {"ssl_handshake_timeout": HANDSHAKE_S, "ssl_shutdown_timeout": 1.0} if self.tls else {}
        try:
            transport, _ = await loop.connect_accepted_socket(lambda: protocol, accepted, ssl=self.tls, **times)
        except OSError as error:  # ssl.SSLError, time-out and reset are among them
            accepted.close()
            self.refusals.note(address, _handshake(error))
            return
        writer = asyncio.StreamWriter(transport, protocol, reader, loop)
        try:
            with contextlib.suppress(OSError, TimeoutError):  # the client has gone, or is too slow
                await self._requests(_Stream(reader, writer), address, client)
        finally:
            writer.close()
            with contextlib.suppress(OSError, TimeoutError, asyncio.CancelledError):
                await asyncio.wait_for(writer.wait_closed(), 1)
            transport.abort()

    async def _requests(self, stream: "_Stream", address: str, client: httpx.AsyncClient) -> None:
        wait = FIRST_S
        while True:
            try:
                request = await stream.request(wait)
                if request is None:
                    return
                reply = await self._answer(request, stream, address, client)
            except h11.RemoteProtocolError as error:
                refused = _RefusedError(error.error_status_hint, "not HTTP", str(error))
            except _RefusedError as error:
                refused = error
            else:
                await stream.send(reply)
                wait = IDLE_S
                if stream.over():
                    return
                continue
            self.refusals.note(address, refused.kind, refused.text)
            await stream.send_last(refused.reply)
            return

    async def _answer(self, request: Request, stream: "_Stream", address: str, client: httpx.AsyncClient) -> Reply:
        call = self._allowed(request)
        body = await stream.body(request, BODY_BYTES)
        passed = [(k, v) for k, v in request.headers.items() if k in (b"content-type", b"accept") or k[:5] == b"flwr-"]
        try:
            got = await client.post(f"/v1/fleet/{call}", content=body, headers=passed)
        except httpx.TimeoutException as error:
            self.refusals.note(address, f"the SuperLink does not answer: {type(error).__name__}", call)
            return Reply(504 if isinstance(error, httpx.ReadTimeout) else 503)
        except httpx.TransportError as error:
            self.refusals.note(address, f"the SuperLink is away: {type(error).__name__}", call)
            return Reply(503 if isinstance(error, httpx.ConnectError) else 502)
        kind = _why(got, request)
        if kind:
            self.refusals.note(address, kind, call)
        kept = [(k, v) for k, v in got.headers.raw if k.lower() == b"content-type" or k.lower()[:5] == b"flwr-"]
        return Reply(got.status_code, kept, got.content)

    def _allowed(self, request: Request) -> str:
        call = request.target.removeprefix(b"/v1/fleet/").decode("latin-1")
        whole = request.target == f"/v1/fleet/{call}".encode("latin-1")
        if whole and call in KEYLESS_CALLS and self.tls is not None:
            raise _RefusedError(404, "a client without a key; is it started without --certs?", call)
        if not whole or call not in (*CALLS, *KEYLESS_CALLS):
            raise _RefusedError(404, "no such path", _line(request))
        if request.method != b"POST":
            raise _RefusedError(404, "not a POST", _line(request))
        if self.known is not None and request.headers.get(b"flwr-public-key") not in self.known:
            status, body = _NOT_ACTIVATED if call == "activate-node" else _NO_SUCH_NODE
            raise _RefusedError(status, "its key is not registered", call, body)
        return call


@dataclass
class _Stream:
    """HTTP/1.1 on an open connection, each step with a time limit."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    http: h11.Connection = field(default_factory=lambda: h11.Connection(h11.SERVER, 32 * 2**10))

    async def request(self, wait: float) -> Request | None:
        """The next request's head; None if there is none within the time, or no more."""
        try:
            async with asyncio.timeout(wait):
                event = await self._event()
        except TimeoutError:
            return None
        if not isinstance(event, h11.Request):
            return None
        return Request(event.method, event.target, dict(event.headers))

    async def body(self, request: Request, limit: int) -> bytes:
        """The request's body, refused as soon as it is known to be too long."""
        declared = int(request.headers.get(b"content-length", b"0"))
        body = bytearray()
        if declared > limit:
            raise _RefusedError(413, f"body above the limit of {limit} bytes", str(declared))
        if self.http.they_are_waiting_for_100_continue:
            self.writer.write(self.http.send(h11.InformationalResponse(status_code=100, headers=[])) or b"")
        try:
            async with asyncio.timeout(TRANSFER_S + (declared or limit) / BYTES_PER_S):
                while isinstance(event := await self._event(), h11.Data):
                    body += event.data
                    if len(body) > limit:
                        raise _RefusedError(413, f"body above the limit of {limit} bytes", "of unknown length")
        except TimeoutError:
            raise _RefusedError(408, "body comes too slowly", f"{len(body)} bytes") from None
        return bytes(body)

    async def send(self, reply: Reply, *more: tuple[bytes, bytes]) -> None:
        """Send an answer."""
        head = [(b"date", formatdate(usegmt=True).encode()), (b"content-length", b"%d" % len(reply.body))]
        event = h11.Response(status_code=reply.status, headers=[*head, *reply.headers, *more])
        parts = self.http.send(event), self.http.send(h11.Data(data=reply.body)), self.http.send(h11.EndOfMessage())
        self.writer.write(b"".join(part or b"" for part in parts))
        async with asyncio.timeout(TRANSFER_S + len(reply.body) / BYTES_PER_S):
            await self.writer.drain()

    async def send_last(self, reply: Reply) -> None:
        """Send an answer and end. What is still coming is thrown away for a moment: closing at once would reset the
        connection, and the client might never see the answer.
        """
        if self.http.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            return
        whole = self._is_whole()
        await self.send(reply, (b"connection", b"close"))
        if not whole:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LINGER_S):
                    while await self.reader.read(2**20):
                        pass

    def over(self) -> bool:
        """Whether no further request can come; if one can, makes ready for it."""
        if self.http.our_state is not h11.DONE or self.http.their_state is not h11.DONE:
            return True
        self.http.start_next_cycle()
        return False

    def _is_whole(self) -> bool:
        """Whether the end of the request has come."""
        with contextlib.suppress(h11.RemoteProtocolError):
            while isinstance(self.http.next_event(), h11.Data):
                pass
        return self.http.their_state in (h11.DONE, h11.MUST_CLOSE)

    async def _event(self) -> Any:
        while (event := self.http.next_event()) is h11.NEED_DATA:
            self.http.receive_data(await self.reader.read(2**20))
        return event


def _line(request: Request) -> str:
    return f"{request.method.decode('latin-1')} {request.target.decode('latin-1')}"


def _why(got: httpx.Response, request: Request) -> str:
    """Why the SuperLink refused a request, in words; "" if it did not, or for the run's own reasons."""
    if got.status_code == 401:
        return _clock(request) or "the signature is not that of the node"
    if got.status_code == 412 and _code(got) == 2004:
        return "its key is not registered, or its node still seems to be online"
    if got.status_code == 412 and request.target.endswith(b"/deactivate-node"):
        return ""  # what every client says first, in case its node still seems to be online; it did not
    return f"the SuperLink answers {got.status_code}" if got.status_code in (400, 404, 412, 415, 422, 500) else ""


def _code(got: httpx.Response) -> object:
    with contextlib.suppress(ValueError):
        found = got.json()
        return found.get("code") if isinstance(found, dict) else None
    return None


def _clock(request: Request) -> str:
    """What is wrong with the clock of whoever signed the request; "" if nothing is."""
    try:
        signed = datetime.datetime.fromisoformat(request.headers.get(b"flwr-timestamp", b"").decode("ascii"))
        age = (datetime.datetime.now(datetime.UTC) - signed).total_seconds()
    except (ValueError, TypeError):  # no time, or one without a zone
        return ""
    if -CLOCK_AHEAD_S < age < CLOCK_BEHIND_S:
        return ""
    off = f"{abs(age):.0f} s {'behind' if age > 0 else 'ahead of'}"
    return f"its clock is {off} this one (at most {CLOCK_AHEAD_S} s ahead, {CLOCK_BEHIND_S} s behind)"


def _handshake(error: OSError) -> str:
    if isinstance(error, ssl.SSLError):
        return _ALERTS.get(error.reason or "", f"no TLS connection, {error.reason or error}")
    if isinstance(error, TimeoutError | ConnectionAbortedError):
        return f"no handshake within {HANDSHAKE_S:g} s"
    return "the connection was closed during the handshake"


def _context(tls: ServerFiles) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(tls.certificate, tls.key)
    except (OSError, ssl.SSLError) as error:
        raise DataError(f"{tls.certificate} and {tls.key} cannot be used for TLS: {error}") from error
    return context


@contextlib.contextmanager
def front_door(
    listen: Address,
    upstream: str,
    tls: ServerFiles | None,
    say: Say,
    *,
    known: Collection[bytes] | None = None,
    sockets: list[socket.socket] | None = None,
) -> Iterator[Door]:
    """Let clients in, in a thread of this process, for as long as the context lasts.

    Args:
        listen: where; port 0 takes any free one.
        upstream: URL of the SuperLink.
        tls: the server's certificate; None: plain, and nodes without keys may register.
        say: gets a line for every refusal, or a count of them.
        known: registered keys as clients send them; others do not get as far as the SuperLink. None: all do.
        sockets: that listen there already; they are closed in the end.

    Yields:
        The open door.

    Raises:
        ConfigError: nobody can listen there. DataError: the certificate cannot be used.
    """
    context = None if tls is None else _context(tls)
    sockets = sockets or listeners(listen)
    address = Address(listen.host, sockets[0].getsockname()[1])
    door = Door(address, upstream, context, Refusals(say), known)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=_run, args=(door, loop, sockets), name="front door", daemon=True)
    thread.start()
    try:
        yield door
    finally:
        with contextlib.suppress(RuntimeError):  # it has ended by itself
            loop.call_soon_threadsafe(door._closing.set)
        thread.join(5)


def _run(door: Door, loop: asyncio.AbstractEventLoop, sockets: list[socket.socket]) -> None:
    try:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(door.serve(sockets))
    except BaseException as error:
        door.error = error
    finally:
        for one in sockets:
            one.close()
