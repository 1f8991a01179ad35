"""Locks, floods, and very many requests: who is not their cause is served as usual, and nothing is left behind."""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from contextlib import AsyncExitStack

import psutil
import psycopg
import pytest

from tests.support.database import UNAVAILABLE, execute
from tests.support.faults import browse, unaffected
from tests.support.fixtures import Figures, StartService
from tests.support.load import Caller, TimedAnswer, percentile
from tests.support.postgres import Postgres
from tests.support.service_process import Service

pytestmark = [pytest.mark.long, pytest.mark.fault, pytest.mark.anyio]


async def test_a_locked_row_starves_nobody(postgres: Postgres, service: Service, figures: Figures) -> None:
    usual = await browse(service, 3)
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
            others = await browse(service, 20)
            finished.set()
        released = time.monotonic()
    assert {answer.status for answer in refused} == {503}
    slowest = max(answer.seconds for answer in refused)
    assert slowest < 12
    assert time.monotonic() - released < 2
    figures(
        "A row is locked for 20 s, and 30 clients want to change it",
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


async def test_fifty_thousand_requests_leave_nothing_behind(
    postgres: Postgres, service: Service, figures: Figures
) -> None:
    process = psutil.Process(service.process.pid)
    await asyncio.gather(*(live(service, 40) for _ in range(32)))
    memory, files = service.memory, process.num_fds()
    sent = sum(await asyncio.gather(*(live(service, 156) for _ in range(32))))
    grown = service.memory - memory
    [(connections,)] = execute(postgres.url(), "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%task%'")
    assert sent == 49_920
    assert grown < 10
    assert connections - 1 <= 8  # and this one
    assert process.num_fds() <= files + 8
    figures(
        "50,000 mixed requests",
        f"no error; memory grew by {grown:.1f} MB, {connections - 1} connections to the database",
    )
