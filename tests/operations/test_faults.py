"""Nothing is lost, whatever dies: load on a real service, a fault, and the count of what has been promised.

`uv run pytest -m fault` runs these and the smaller ones of other files, and prints what was seen of each fault.
"""

from __future__ import annotations

import asyncio
import re
import socket
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import psycopg
import pytest

from tests.support.database import UNAVAILABLE, execute
from tests.support.deployment import workers_of
from tests.support.fixtures import Figures, StartService
from tests.support.load import Caller, TimedAnswer, percentile
from tests.support.postgres import Postgres
from tests.support.service_process import Service
from tests.support.waiting import wait_in_loop_until, wait_until

pytestmark = [pytest.mark.long, pytest.mark.fault, pytest.mark.anyio]

LIBFAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def durable(standby_of: Postgres | None = None) -> Postgres:
    """Return a server that waits for the disk, as in production."""
    return Postgres(
        standby_of=standby_of, fsync="on", synchronous_commit="on", full_page_writes="on", max_connections="50"
    )


@pytest.fixture
def postgres() -> Iterator[Postgres]:
    """A server of the test's own."""
    postgres = durable()
    yield postgres
    postgres.remove()


@pytest.fixture
def service(postgres: Postgres, start_service: StartService) -> Iterator[Service]:
    service = start_service(postgres.url())
    service.wait_until_ready()
    yield service
    assert not re.search("Traceback|status=500", service.log), service.log


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


async def heal(promises: Promises) -> float:
    """Return after how many seconds the last 503 came of a database that is back now."""
    back, before = time.monotonic(), len(promises.answers)
    await asyncio.sleep(4)
    assert len(promises.answers) > before + 100
    return promises.seconds_until_the_last(503, back, back + 4)


# --- The database ----------------------------------------------------------------------------------------------------


async def test_a_database_that_restarts_or_is_killed_loses_nothing(
    postgres: Postgres, service: Service, figures: Figures
) -> None:
    promises = Promises()
    healed = []
    async with load(service, promises):
        for fault in [postgres.stop] * 2 + [postgres.kill] * 5:
            await asyncio.to_thread(fault)
            await asyncio.sleep(0.5)
            await asyncio.to_thread(postgres.start)
            healed.append(await heal(promises))
    assert promises.count(503) > 7
    assert promises.broken(postgres.url()) == []
    assert max(healed) < 3
    creations = len(promises.kept) + len(promises.deleted)
    figures(
        "PostgreSQL restarts twice and is killed five times, under load",
        f"{creations:,} creations, none lost, none doubled; {promises.count(503):,} of {len(promises.answers):,}"
        f" answers were 503, the last one {max(healed):.1f} s after the database took connections again",
    )


async def test_a_failover_to_a_synchronous_standby_loses_nothing(
    postgres: Postgres, start_service: StartService, figures: Figures
) -> None:
    standby = durable(standby_of=postgres)
    try:
        execute(postgres.url(), "ALTER SYSTEM SET synchronous_standby_names = '*'")
        execute(postgres.url(), "SELECT pg_reload_conf()")
        following = "SELECT pid FROM pg_stat_replication WHERE sync_state = 'sync'"
        wait_until(lambda: len(execute(postgres.url(), following)) == 1)
        hosts = f"127.0.0.1:{postgres.port},127.0.0.1:{standby.port}"
        service = start_service(f"postgresql://postgres@{hosts}/postgres?target_session_attrs=read-write")
        service.wait_until_ready()
        promises = Promises()
        async with load(service, promises):
            created = len(promises.kept)
            killed = time.monotonic()
            await asyncio.to_thread(postgres.kill)
            await asyncio.to_thread(execute, standby.url(), "SELECT pg_promote()")
            await asyncio.sleep(15)
            recovered = promises.seconds_until_the_last(503, killed, killed + 15)
        assert recovered < 14
        assert 0 < created < len(promises.kept)
        assert promises.count(503) > 0
        assert promises.broken(standby.url()) == []
        assert not re.search("Traceback|status=500", service.log), service.log
    finally:
        standby.remove()
    figures(
        "The primary is killed under load and its synchronous standby promoted",
        f"{len(promises.kept) + len(promises.deleted):,} creations, none lost, none doubled; the last 503"
        f" {recovered:.1f} s after the kill",
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


# --- The processes ---------------------------------------------------------------------------------------------------


async def test_eight_processes_start_at_once_on_an_empty_database(
    new_database: Callable[[], str], start_service: StartService, figures: Figures
) -> None:
    for _ in range(20):
        url = new_database()
        services = [start_service(url, wait=False) for _ in range(8)]
        for service in services:
            service.wait_until_ready(60)
            assert not re.search("waiting for the database|error|traceback", service.log, re.IGNORECASE), service.log
        assert execute(url, "SELECT count(*) FROM task") == [(0,)]
        for service in services:
            service.process.terminate()
        for service in services:
            service.remove()
    figures("Eight processes start at once on an empty database", "20 times, without a complaint in any log")


async def test_a_killed_worker_is_replaced_while_the_other_one_serves(
    database_url: str, start_service: StartService, figures: Figures
) -> None:
    service = start_service(database_url, WEB_CONCURRENCY="2")
    service.wait_until_ready()
    created: list[int] = []
    lost = 0
    finished = asyncio.Event()

    async def create(number: int) -> None:
        nonlocal lost
        async with Caller(service, f"user-{number}") as caller:
            while not finished.is_set():
                try:
                    answer = await caller.send("POST", "/api/tasks", {"title": "x"})
                except ConnectionError:  # it was the killed worker's
                    lost += 1
                else:
                    assert answer.status == 201, answer
                    created.append(answer.json["id"])

    async with asyncio.TaskGroup() as group:
        for number in range(16):
            group.create_task(create(number))
        await asyncio.sleep(1)
        assert len(workers_of(service)) == 2
        victim = max(workers_of(service), key=lambda worker: len(worker.net_connections("tcp")))
        victim.kill()
        killed = time.monotonic()
        await wait_in_loop_until(lambda: len(workers_of(service)) == 2 and victim not in workers_of(service))
        replaced, before = time.monotonic() - killed, len(created)
        await asyncio.sleep(2)
        finished.set()
    assert len(created) > before
    assert 0 < lost <= 16
    assert replaced < 5
    assert {row for (row,) in execute(database_url, "SELECT id FROM task")} >= set(created)
    assert "Traceback" not in service.log
    figures(
        "One of two workers is killed under load",
        f"{lost} of 16 connections ended, {len(created):,} creations, none lost; a new worker {replaced:.1f} s later",
    )


# --- Locks and queues ------------------------------------------------------------------------------------------------


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
    """Assert that others have been served about as usual, and return how."""
    assert {answer.status for answer in others} == {200}
    p95, usual_p95 = percentile(others, 95), percentile(usual, 95)
    assert p95 < 3 * max(usual_p95, 0.01)  # below that it is the machine's noise
    return f"for everybody else p95 was {p95 * 1000:.0f} ms, as against {usual_p95 * 1000:.0f} ms before"


async def test_a_locked_row_starves_nobody(postgres: Postgres, service: Service, figures: Figures) -> None:
    usual = await browse(service, 5)
    async with Caller(service, "alice") as alice:
        task = (await alice.send("POST", "/api/tasks", {"title": "x"})).json
    path, refused = f"/api/tasks/{task['id']}/complete", []
    finished = asyncio.Event()

    async def hammer() -> None:
        async with Caller(service, "alice") as alice:
            while not finished.is_set():
                answer = await alice.send("PATCH", path, {"completed": True})
                if not finished.is_set():
                    refused.append(answer)

    async with asyncio.TaskGroup() as group:
        with psycopg.connect(postgres.url()) as lock:
            lock.execute("SELECT FROM task WHERE id = %s FOR UPDATE", [task["id"]])
            for _ in range(30):
                group.create_task(hammer())
            others = await browse(service, 60)
            finished.set()
        released = time.monotonic()
    assert {answer.status for answer in refused} == {503}
    slowest = max(answer.seconds for answer in refused)
    assert slowest < 12
    assert time.monotonic() - released < 2
    figures(
        "A row is locked for 60 s, and 30 clients want to change it",
        f"their {len(refused)} requests got 503 after at most {slowest:.1f} s; {unaffected(others, usual)}",
    )


async def flood(service: Service, seconds: float, callers: list[Caller]) -> tuple[list[TimedAnswer], list[TimedAnswer]]:
    """Have all callers create and list tasks without a pause; return the answers to the creations and to the lists."""
    created: list[TimedAnswer] = []
    listed: list[TimedAnswer] = []
    until = time.monotonic() + seconds

    async def work(caller: Caller) -> None:
        while time.monotonic() < until:
            created.append(await caller.send("POST", "/api/tasks", {"title": "x"}))
            listed.append(await caller.send("GET", "/api/tasks?status=completed"))

    await asyncio.gather(*map(work, callers))
    return created, listed


async def test_a_flood_of_requests_is_answered_or_refused_and_leaves_nothing_behind(
    postgres: Postgres, start_service: StartService, figures: Figures
) -> None:
    service = start_service(postgres.url(), DATABASE_POOL_SIZE="2")
    service.wait_until_ready()
    async with AsyncExitStack() as stack:
        callers = [await stack.enter_async_context(Caller(service, f"user-{number}")) for number in range(300)]
        await flood(service, 3, callers)
        memory = service.memory
        created, listed = await flood(service, 5, callers)
        # And now the database cannot keep up: two connections make 20 tasks a second.
        slow = "BEGIN PERFORM pg_sleep(0.1); RETURN new; END"
        execute(postgres.url(), f"CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS '{slow}'")
        execute(postgres.url(), "CREATE TRIGGER slow BEFORE INSERT ON task FOR EACH ROW EXECUTE FUNCTION slow()")
        held_up, listed_meanwhile = await flood(service, 10, callers)
        execute(postgres.url(), "DROP TRIGGER slow ON task")
        after = time.monotonic()
        again, listed_again = await flood(service, 1, callers[:8])
    for answers, success in ((created + held_up, 201), (listed + listed_meanwhile, 200)):
        refused = [answer for answer in answers if answer.status != success]
        assert {(answer.status, *answer.json.values()) for answer in refused} <= {(503, *UNAVAILABLE.values())}
        assert all(answer.headers["retry-after"] == "2" for answer in refused)
    slowest = max(answer.seconds for answer in held_up + listed_meanwhile)
    assert slowest < 15
    assert {answer.status for answer in again + listed_again} == {200, 201}
    assert time.monotonic() - after < 2
    grown = service.memory - memory
    assert grown < 10
    assert not re.search("Traceback|status=500", service.log)
    refused = [answer for answer in held_up + listed_meanwhile if answer.status == 503]
    assert refused
    figures(
        "300 clients without a pause on a pool of two connections, and then on a slow database too",
        f"{len(created) + len(listed):,} answers, p99 {percentile(created, 99):.1f} s; slow, {len(refused)} of"
        f" {len(held_up) + len(listed_meanwhile)} were 503, after at most {slowest:.1f} s; memory grew by"
        f" {grown:.1f} MB; as usual at once afterwards",
    )


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
    usual = await browse(service, 5)
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


# --- Time ------------------------------------------------------------------------------------------------------------


async def live(service: Service, rounds: int) -> int:
    """Use tasks from their creation to their end, so that nothing stays; return how many requests that took."""
    sent = 0
    async with Caller(service, f"user-{uuid.uuid4().hex}") as caller:

        async def expect(status: int, method: str, path: str, body: object = None, **headers: str) -> TimedAnswer:
            nonlocal sent
            sent += 1
            answer = await caller.send(method, path, body, **headers)
            assert answer.status == status, answer
            return answer

        for number in range(rounds):
            key = f"{caller.user_id}-{number}"
            task = (await expect(201, "POST", "/api/tasks", {"title": key}, Idempotency_Key=key)).json
            path, tag = f"/api/tasks/{task['id']}", f'"{task["updated_at"]}"'
            assert (await expect(200, "GET", path)).json == task
            assert (await expect(200, "GET", "/api/tasks")).json == {"items": [task]}
            await expect(304, "GET", path, If_None_Match=tag)
            assert (await expect(200, "PATCH", f"{path}/complete")).json["completed"] is True
            assert (await expect(200, "PUT", path, {"description": "y"})).json["description"] == "y"
            await expect(412, "DELETE", path, If_Match=tag)
            await expect(422, "PUT", path, {"title": ""})
            await expect(204, "DELETE", path)
            await expect(404, "GET", path)
    return sent


async def test_two_hundred_thousand_requests_leave_nothing_behind(
    postgres: Postgres, service: Service, figures: Figures
) -> None:
    process = psutil.Process(service.process.pid)
    await asyncio.gather(*(live(service, 60) for _ in range(32)))
    memory, files = service.memory, process.num_fds()
    sent = sum(await asyncio.gather(*(live(service, 625) for _ in range(32))))
    grown = service.memory - memory
    [(connections,)] = execute(postgres.url(), "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%task%'")
    assert sent == 200_000
    assert grown < 10
    assert connections - 1 <= 8  # and this one
    assert process.num_fds() <= files + 8
    figures(
        "200,000 mixed requests",
        f"no error; memory grew by {grown:.1f} MB, {connections - 1} connections to the database",
    )


async def test_versions_go_forward_while_the_clock_of_the_database_does_not(
    start_service: StartService, figures: Figures
) -> None:
    if not LIBFAKETIME:
        pytest.skip("libfaketime is not installed")
    clock = Path(tempfile.mkstemp(prefix="tasks-clock-")[1])
    clock.write_text("+0")
    clock.chmod(0o644)  # PostgreSQL may run as another user
    postgres = Postgres(
        environment={
            "LD_PRELOAD": str(LIBFAKETIME),
            "FAKETIME_TIMESTAMP_FILE": str(clock),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }
    )
    try:
        service = start_service(postgres.url())
        service.wait_until_ready()
        async with Caller(service, "alice") as alice:
            task = (await alice.send("POST", "/api/tasks", {"title": "x"})).json
            path, versions = f"/api/tasks/{task['id']}", [task["updated_at"]]
            for time_of_day in ("+0", "-1h", "2020-01-01 00:00:00", "+0"):  # set back, and standing still
                clock.write_text(time_of_day)
                for _ in range(20):
                    changed = await alice.send("PATCH", f"{path}/complete", If_Match=f'"{versions[-1]}"')
                    assert changed.status == 200, changed
                    versions.append(changed.json["updated_at"])
            clock.write_text("2020-01-01 00:00:00")
            [(now, later)] = execute(postgres.url(), "SELECT now()::text, clock_timestamp()::text")
            assert now == later == "2020-01-01 00:00:00+00"  # it does
    finally:
        postgres.remove()
        clock.unlink()
    assert versions == sorted(set(versions))
    figures(
        "The clock of the database is set back by an hour, and stands still",
        f"{len(versions)} versions of a task, each later than the one before",
    )
