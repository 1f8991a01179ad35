"""The transactions around messages: none is left open, whatever happens to a call, and none is ended twice."""

from __future__ import annotations

import asyncio
from typing import Any, ClassVar

import asyncpg
import pytest

import sql
from sql import Refused
from sql.database import Unavailable
from tests.support.batches import NEW, Spy, pool_and_queries, sizes, values_of
from tests.support.waiting import wait_in_loop_until


async def state_of(url: str, pid: int) -> object:
    """Return what a connection of the database does."""
    observer = await asyncpg.connect(url)
    state = await observer.fetchval("SELECT state FROM pg_stat_activity WHERE pid = $1", pid)
    await observer.close()
    return state


def test_calls_that_nobody_waits_for_leave_no_transaction_open(database_url: str) -> None:
    """Its locks would keep migrations of the table waiting."""

    async def check() -> None:
        async with pool_and_queries(database_url, size=1) as (pool, queries):
            async with pool.acquire() as connection:
                pid = connection.get_server_pid()
                waiting = asyncio.create_task(queries.create_task("user-1", None, None, NEW))
                await wait_in_loop_until(lambda: bool(queries.senders))
                waiting.cancel()
                await asyncio.wait([waiting])
            await wait_in_loop_until(lambda: not queries.senders)
            assert (await state_of(database_url, pid), sizes(sql.CREATE_TASK)) == ("idle", [])

    asyncio.run(check())


class Interrupted(Spy):
    """A connection that takes its time between the preparation of a deletion and its execution."""

    async def _get_statement(self, query: str, *args: Any, **options: Any) -> Any:
        statement = await super()._get_statement(query, *args, **options)  # type: ignore[misc]  # not in stubs
        if query == sql.DELETE_TASK:
            await asyncio.sleep(0.3)
        return statement


@pytest.mark.parametrize("by", ["a timeout", "a cancellation"])
def test_what_is_interrupted_before_its_execution_leaves_no_transaction_open(
    database_url: str, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    """Its lock would keep migrations waiting, and what is created in it would be as old as it."""

    async def check() -> None:
        async with pool_and_queries(database_url, Interrupted, size=1) as (pool, queries):
            await queries.complete_task("user-1", 1, None, None)  # asyncpg asks for the types of the parameters once
            pid = await pool.fetchval("SELECT pg_backend_pid()")
            monkeypatch.setattr(sql, "CALL_TIMEOUT", 0.2 if by == "a timeout" else 8.0)
            deletion = asyncio.create_task(queries._send(sql.DELETE_TASK, "user-1", 1, None, alone=True))
            await asyncio.sleep(0.15)
            if by == "a cancellation":
                deletion.cancel()
            with pytest.raises((asyncio.CancelledError, Unavailable)):
                await deletion
            await wait_in_loop_until(lambda: pool.get_idle_size() == 1)
            assert await state_of(database_url, pid) == "idle"

    asyncio.run(check())


class Executing(Spy):
    """A connection that notes what it executes besides messages, from the first message on."""

    executed: ClassVar[list[str]] = []

    async def execute(self, query: str, *args: Any, **options: Any) -> Any:
        self.executed.append(query)
        return await super().execute(query, *args, **options)


class ExecutingBehindPooler(Executing):
    sets_lock_timeout = True


@pytest.mark.parametrize(
    ("connection_class", "expected"),
    [(Executing, []), (ExecutingBehindPooler, ["BEGIN; SET LOCAL lock_timeout = '50ms'", "ROLLBACK"])],
    ids=["directly", "behind a pooler"],
)
def test_what_the_database_refuses_has_ended_its_transaction(
    database_url: str, connection_class: type[Executing], expected: list[str]
) -> None:
    """Behind a busy pooler one more statement would wait for a connection of the server, with the refused call."""

    async def check() -> None:
        async with pool_and_queries(database_url, connection_class, size=1) as (pool, queries):
            Executing.executed.clear()
            with pytest.raises(Refused):
                await queries.create_task("user-1", None, None, values_of(" "))
            await wait_in_loop_until(lambda: pool.get_idle_size() == 1)
            assert Executing.executed == expected * 2  # in a batch, and alone

    asyncio.run(check())
