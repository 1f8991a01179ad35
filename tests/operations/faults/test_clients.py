"""Clients that are slow, or very many at once."""

from __future__ import annotations

import asyncio
import socket
import time
from collections import Counter
from contextlib import AsyncExitStack

import pytest

from tests.support.faults import browse, unaffected
from tests.support.fixtures import Figures, StartService
from tests.support.load import Caller
from tests.support.postgres import Postgres
from tests.support.service_process import Service

pytestmark = [pytest.mark.long, pytest.mark.fault, pytest.mark.anyio]


async def drip(service: Service, answers: list[bytes]) -> None:
    """Send a body one byte at a time until there is an answer."""
    async with Caller(service, "dripping") as caller:
        reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
        head = (
            f"POST /api/tasks HTTP/1.1\r\nHost: x\r\nAuthorization: {caller.authorization}\r\nContent-Length: 9000\r\n"
        )
        writer.write(head.encode() + b"\r\n")
        answer = asyncio.create_task(reader.readline())
        while not answer.done():
            writer.write(b" ")
            await asyncio.sleep(0.2)
        answers.append(await answer)
        writer.close()


async def test_slow_and_half_open_clients_hold_up_nobody(service: Service, figures: Figures) -> None:
    usual = await browse(service, 3)
    answers: list[bytes] = []
    idle = [socket.create_connection(("127.0.0.1", service.port)) for _ in range(500)]
    for number, connection in enumerate(idle):
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n"[: number % 40])  # some in the middle of a line
    async with asyncio.TaskGroup() as group:
        for _ in range(100):
            group.create_task(drip(service, answers))
        others = await browse(service, 20)
    for number, connection in enumerate(idle):
        connection.setblocking(False)
        if number % 40:
            assert connection.recv(1000).startswith(b"HTTP/1.1 408 ")
        connection.close()
    assert Counter(answers) == {b"HTTP/1.1 408 Request Timeout\r\n": 100}
    figures(
        "100 clients send a byte at a time, 500 connections send nothing or half a request",
        f"408 after 15 s; {unaffected(others, usual)}",
    )


async def test_two_thousand_requests_at_once_get_through_a_pooler_with_two_connections(
    postgres: Postgres,
    pgbouncer: int,
    start_service: StartService,
    figures: Figures,
) -> None:
    service = start_service(f"postgresql://postgres@127.0.0.1:{pgbouncer}/postgres?pgbouncer=true")
    service.wait_until_ready()
    requests = [
        ("GET", "", None),
        ("GET", "/{id}", None),
        ("PUT", "/{id}", {"title": "y"}),
        ("PATCH", "/{id}/complete", None),
        ("POST", "", {"title": "z"}),
    ]
    async with AsyncExitStack() as stack:
        callers = [await stack.enter_async_context(Caller(service, f"user-{number}")) for number in range(2000)]
        tasks = []
        for start in range(0, len(callers), 50):
            created = (caller.send("POST", "/api/tasks", {"title": "x"}) for caller in callers[start : start + 50])
            tasks += [answer.json for answer in await asyncio.gather(*created)]
        sent = []
        for number, (caller, task) in enumerate(zip(callers, tasks, strict=True)):
            method, path, body = requests[number % len(requests)]
            sent.append(caller.send(method, "/api/tasks" + path.format(**task), body))
        started = time.monotonic()
        answers = await asyncio.gather(*sent)
        seconds = time.monotonic() - started
    assert Counter(answer.status for answer in answers) == {200: 1600, 201: 400}
    for caller, answer in zip(callers, answers, strict=True):
        items = answer.json.get("items", [answer.json])
        assert [item["user_id"] for item in items] == [caller.user_id]
    figures(
        "2,000 requests at once through PgBouncer with two connections",
        f"all of them successes, in {seconds:.1f} s",
    )
