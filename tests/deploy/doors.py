"""A stand-in for a SuperLink, and what a client of the front door does."""

import socket
import ssl
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from fedsim.deploy.address import Address

HERE = Address("127.0.0.1", 0)
KEY = {"flwr-public-key": "known"}
PULL = "/v1/fleet/pull-messages"
PATHS = [
    "/",
    "/health",
    "/docs",
    "/openapi.json",
    "/v1/control/start-run",
    "/v1/control/register-node",
    "/v1/runtime/acquire-task",
    "//v1/control/start-run",
    "//v1/fleet/pull-messages",
    "/v1/fleet/../control/start-run",
    "/v1/fleet/%2e%2e/control/start-run",
    "/v1/fleet/..%2fcontrol%2fstart-run",
    "/v1/fleet/pull-messages/",
    "/v1/fleet/pull-messages?x=1",
    "/v1/fleet/pull-messages#x",
    "/v1/fleet/pull%2dmessages",
    "/V1/fleet/pull-messages",
    "/v1/fleet/",
    "/v1/fleet/register-node",
    "/v1/fleet/unregister-node",
    "http://127.0.0.1/v1/control/start-run",
    "http://127.0.0.1/v1/fleet/pull-messages",
    "*",
    "pull-messages",
]


class Fake(ThreadingHTTPServer):
    """A SuperLink that answers as it is told and remembers what it was asked."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked, self.answer, self.waits = [], (200, b"yes", "application/x-protobuf"), 0.0


class Handler(BaseHTTPRequestHandler):
    protocol_version, wbufsize = "HTTP/1.1", 2**16

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.asked.append((self.path, dict(self.headers.items()), body))
        time.sleep(self.server.waits)
        status, content, kind = self.server.answer
        if status == 0:
            self.close_connection = True
            return
        self.send_response(status)
        for name, value in (("content-length", len(content)), ("content-type", kind), ("flwr-note", "n"), ("x", "y")):
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


def trusting(ca):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(ca)
    return context


def raw(door, certs, data, host="127.0.0.1"):
    """What comes back for these bytes, until the connection ends."""
    with (
        socket.create_connection((host, door.address.port), 5) as plain_socket,
        trusting(certs / "ca.crt").wrap_socket(plain_socket, server_hostname=host) as stream,
    ):
        stream.sendall(data)
        got = b""
        while part := stream.recv(65536):
            got += part
        return got


def line(said, word, wait=3.0):
    """The line with a word in it, once it is there."""
    end = time.monotonic() + wait
    while time.monotonic() < end:
        found = [one for one in said if word in one]
        if found:
            return found[0]
        time.sleep(0.01)
    raise AssertionError(f"no line with {word!r} in {said}")
