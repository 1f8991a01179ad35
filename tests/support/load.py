"""Clients for the tests that put load on a service: many at once, in one event loop, and quick."""

from __future__ import annotations

import asyncio
import json
import time
from types import TracebackType
from typing import Any, NamedTuple, Self

import httptools

from tests.support.service_process import Service, token


class TimedAnswer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes
    seconds: float
    """How long it took, from the first byte that was sent to the last one that came back."""

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Caller(asyncio.Protocol):
    """A user with one connection to a service, which is kept alive, and has one request on its way at a time."""

    def __init__(self, service: Service, user_id: str) -> None:
        self.port = service.port
        self.user_id = user_id
        self.authorization = f"Bearer {token(user_id)}"
        self.transport: asyncio.Transport | None = None
        self.answer: asyncio.Future[None] = asyncio.Future()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: object, traceback: TracebackType | None) -> None:
        if self.transport:
            self.transport.close()

    async def send(self, method: str, path: str, body: object = None, **headers: str) -> TimedAnswer:
        """Send a request and return its answer; raise ConnectionError if the connection ends before that."""
        content = b"" if body is None else json.dumps(body).encode()
        lines = {"Host": "localhost", "Authorization": self.authorization, "Content-Length": str(len(content))}
        lines |= {name.replace("_", "-"): value for name, value in headers.items()}
        head = f"{method} {path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        if not self.transport or self.transport.is_closing():
            self.transport, _ = await asyncio.get_running_loop().create_connection(lambda: self, "127.0.0.1", self.port)
        self.parser = httptools.HttpResponseParser(self)
        self.headers: dict[str, str] = {}
        self.body = b""
        self.answer = asyncio.get_running_loop().create_future()
        started = time.perf_counter()
        self.transport.write(head.encode() + b"\r\n" + content)
        await self.answer
        return TimedAnswer(self.parser.get_status_code(), self.headers, self.body, time.perf_counter() - started)

    # What asyncio and httptools call.

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.decode().lower()] = value.decode()

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        if not self.answer.done():
            self.answer.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.answer.done():
            self.answer.set_exception(ConnectionError("the connection was closed before the answer was complete"))


def percentile(answers: list[TimedAnswer], percent: int) -> float:
    """Return the time in seconds within which this part of the answers came."""
    times = sorted(answer.seconds for answer in answers)
    return times[min(len(times) * percent // 100, len(times) - 1)]
