"""Faults under load: clients that note what has been promised to them, and servers as they are in production."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from tests.support.database import UNAVAILABLE, execute
from tests.support.load import Caller, TimedAnswer, percentile
from tests.support.postgres import Postgres
from tests.support.service_process import Service


def durable(standby_of: Postgres | None = None) -> Postgres:
    """Return a server that waits for the disk, as in production."""
    return Postgres(
        standby_of=standby_of, fsync="on", synchronous_commit="on", full_page_writes="on", max_connections="50"
    )


class Promises:
    """What a service has answered under load, and what it has promised thereby."""

    def __init__(self) -> None:
        self.answers: list[tuple[float, TimedAnswer]] = []
        """Each with the time at which it came."""
        self.kept: dict[str, bool] = {}
        """By their titles, the tasks that must be there exactly once, and whether they must be completed."""
        self.deleted: set[str] = set()
        self.unknown: set[str] = set()
        """Titles of tasks that were sent once and got a 503: nobody knows how far they came."""

    def note(self, answer: TimedAnswer, *expected: int) -> bool:
        """Return whether an answer is what was expected; if not, it has to be a 503 as it should be."""
        self.answers.append((time.monotonic(), answer))
        if answer.status in expected:
            return True
        assert (answer.status, answer.json) == (503, UNAVAILABLE), answer
        assert int(answer.headers["retry-after"]) > 0
        return False

    def count(self, status: int) -> int:
        return sum(answer.status == status for _, answer in self.answers)

    def seconds_until_the_last(self, status: int, since: float, until: float) -> float:
        """Return how long after one time, and before another, there still were answers with this status."""
        found = (when - since for when, answer in self.answers if answer.status == status and since < when < until)
        return max(found, default=0.0)

    def broken(self, url: str) -> list[str]:
        """Return the titles of tasks of which the database has not what was promised."""
        rows = execute(url, "SELECT title, count(*), bool_and(completed) FROM task GROUP BY title")
        there = {title: (count, completed) for title, count, completed in rows}
        wrong = [title for title, completed in self.kept.items() if there.get(title) != (1, completed)]
        wrong += [title for title in self.deleted if title in there]
        return wrong + [t for t in there if t not in self.kept and (t not in self.unknown or there[t][0] > 1)]


async def insist(
    caller: Caller, promises: Promises, method: str, path: str, body: object = None, **headers: str
) -> Any:
    """Send a request that may be repeated, until it succeeds, and return what it brings."""
    expected = {"POST": (201,), "DELETE": (204, 404)}.get(method, (200,))
    while not promises.note(answer := await caller.send(method, path, body, **headers), *expected):
        await asyncio.sleep(0.05)
    return answer.json if answer.body else None


async def use(service: Service, promises: Promises, finished: asyncio.Event) -> None:
    """Create, read, complete and delete tasks, as a client does that repeats what may be repeated."""
    async with Caller(service, f"user-{uuid.uuid4().hex}") as caller:
        number = 0
        while not finished.is_set():
            number += 1
            title = f"{caller.user_id}-{number}"
            if number % 2:
                task = await insist(caller, promises, "POST", "/api/tasks", {"title": title}, Idempotency_Key=title)
            else:
                answer = await caller.send("POST", "/api/tasks", {"title": title})
                if not promises.note(answer, 201):
                    promises.unknown.add(title)
                    continue
                task = answer.json
            promises.kept[title] = False
            path = f"/api/tasks/{task['id']}"
            assert await insist(caller, promises, "GET", path) == task
            task = await insist(caller, promises, "PATCH", f"{path}/complete", {"completed": True})
            promises.kept[title] = True
            if number % 5 == 0:
                await insist(caller, promises, "DELETE", path)
                del promises.kept[title]
                promises.deleted.add(title)


@asynccontextmanager
async def load(service: Service, promises: Promises, users: int = 16) -> AsyncIterator[None]:
    """Have users use the service meanwhile."""
    finished = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        for _ in range(users):
            group.create_task(use(service, promises, finished))
        try:
            await asyncio.sleep(1)
            yield
        finally:
            finished.set()


async def browse(service: Service, seconds: float, users: int = 8) -> list[TimedAnswer]:
    """Have some users read and toggle tasks of their own, and return the answers."""
    answers: list[TimedAnswer] = []
    until = time.monotonic() + seconds

    async def work() -> None:
        async with Caller(service, f"user-{uuid.uuid4().hex}") as caller:
            path = f"/api/tasks/{(await caller.send('POST', '/api/tasks', {'title': 'x'})).json['id']}"
            while time.monotonic() < until:
                answers.append(await caller.send("GET", "/api/tasks"))
                answers.append(await caller.send("GET", path))
                answers.append(await caller.send("PATCH", f"{path}/complete"))
                await asyncio.sleep(0.02)

    await asyncio.gather(*(work() for _ in range(users)))
    return answers


def unaffected(others: list[TimedAnswer], usual: list[TimedAnswer]) -> str:
    """Assert that all others have been served, and return how soon. test_locks counts what waits in front of them."""
    assert {answer.status for answer in others} == {200}
    p95, usual_p95 = percentile(others, 95), percentile(usual, 95)
    return f"for everybody else p95 was {p95 * 1000:.0f} ms, as against {usual_p95 * 1000:.0f} ms before"
