"""Connections to the service for what no HTTP client would send."""

from __future__ import annotations

import json
import socket
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self

import psutil

from tests.support.service_process import Client, Service
from tests.support.waiting import wait_until

CHUNKED = "Transfer-Encoding: chunked"
EXPECT = "Expect: 100-continue"
WRITE_REQUESTS = [
    ("POST", "/api/tasks"), ("PUT", "/api/tasks/{id}"), ("PATCH", "/api/tasks/{id}/complete"),
    ("DELETE", "/api/tasks/{id}"),
]  # fmt: skip


class RawAnswer(NamedTuple):
    status: int
    headers: dict[str, str]
    content: bytes

    def json(self) -> Any:
        return json.loads(self.content)


class HasPort(Protocol):
    port: int


class Raw:
    """A connection to the service or what stands before it, for what no HTTP client would send."""

    def __init__(self, service: HasPort) -> None:
        self.socket = socket.create_connection(("127.0.0.1", service.port), timeout=15)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.file = self.socket.makefile("rb")
        self.port: int = self.socket.getsockname()[1]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.file.close()
        self.socket.close()

    def send(self, line: str | bytes, *headers: str, content: bytes = b"") -> None:
        """Send a request line without its version, header lines, and whatever is to follow them."""
        self.socket.sendall(request(line, *headers, content=content))

    def answer(self, *, to_head: bool = False) -> RawAnswer:
        line = self.file.readline()
        assert line.startswith(b"HTTP/1.1 "), line
        headers = {}
        while field := self.file.readline().strip():
            name, _, value = field.decode("latin-1").partition(":")
            headers[name.lower()] = value.strip()
        content = b"" if to_head else self.content(headers)
        return RawAnswer(int(line.split()[1]), headers, content)

    def content(self, headers: dict[str, str]) -> bytes:
        if headers.get("transfer-encoding") != "chunked":
            return self.file.read(int(headers.get("content-length", "0")))
        content = b""
        while size := int(self.file.readline(), 16):
            content += self.file.read(size + 2).removesuffix(b"\r\n")
        assert self.file.readline() == b"\r\n"
        return content

    def is_closed(self) -> bool:
        """Return whether the service closes the connection, with nothing more to say, rather than wait for more."""
        try:
            return self.file.read(1) == b""
        except ConnectionError:
            return True


def request(line: str | bytes, *headers: str, content: bytes = b"") -> bytes:
    start = line.encode() if isinstance(line, str) else line
    lines = [start + b" HTTP/1.1", b"Host: localhost", *(header.encode("latin-1") for header in headers)]
    return b"\r\n".join(lines) + b"\r\n\r\n" + content


def bearer(client: Client) -> str:
    return f"Authorization: {client.headers['authorization']}"


def ask(service: HasPort, line: str | bytes, *headers: str, content: bytes = b"") -> RawAnswer:
    with Raw(service) as connection:
        connection.send(line, *headers, content=content)
        return connection.answer(to_head=line[:4] in ("HEAD", b"HEAD"))


def exchange(service: HasPort, method: str, path: str, headers: dict[str, str], body: bytes = b"") -> RawAnswer:
    """Ask with headers that are a dict, as those of HTTP clients. It adds no Content-Length."""
    return ask(service, f"{method} {path}", *map(": ".join, headers.items()), content=body)


def all_that_comes(service: HasPort, line: str, *headers: str) -> bytes:
    """Send a request that asks for the connection's end, and return all the bytes that come back."""
    with Raw(service) as connection:
        connection.send(line, "Connection: close", *headers)
        return connection.file.read()


def wait_until_read(service: Service) -> None:
    """Wait until the service has read what has been sent: it has when it answers what was sent after that."""
    for _ in range(2):
        assert ask(service, "GET /health").status == 200


def remote_ports(service: Service) -> set[int]:
    """Return the ports from which there are connections to the service."""
    connections = psutil.Process(service.process.pid).net_connections("tcp")
    return {each.raddr.port for each in connections if each.laddr.port == service.port and each.raddr}


def wait_until_gone(service: Service, connection: Raw) -> None:
    """Wait until the service has noticed the end of a connection."""
    wait_until(lambda: connection.port not in remote_ports(service))
