"""The transactions around messages: none is left open, whatever happens to a call, and none is ended twice."""

from __future__ import annotations

import asyncio
from typing import Any, ClassVar

import asyncpg
import pytest

import sql
from sql import Refused, database
from sql.database import Unavailable
from tests.support.batches import NEW, USERS, Spy, make_tasks, pool_and_queries, sizes, values_of
from tests.support.database import locked
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


# --- Citus -----------------------------------------------------------------------------------------------------------


def test_a_coordinator_of_citus_is_known_by_its_setting(database_url: str) -> None:
    async def check() -> None:
        for options, expected in ("", False), ("?options=-c%20citus.version%3D13.2", True):
            connection = await database.connect(database_url + options, connection_class=database.Connection)
            assert connection.is_citus is expected
            await connection.close()

    asyncio.run(check())


class Coordinator(Spy):
    """A connection that is like one to Citus: without a transaction each statement of a message is one of its own."""

    is_citus = True
    commits: ClassVar[int] = 0

    async def fetchmany(self, query: str, args: Any, **options: Any) -> Any:
        if self.is_in_transaction():
            return await super().fetchmany(query, args, **options)
        rows = []
        for call in args:
            rows += await super().fetchmany(query, [call], **options)
        return rows

    async def execute(self, query: str, *args: Any, **options: Any) -> Any:
        Coordinator.commits += query == "COMMIT"
        return await super().execute(query, *args, **options)


def test_a_lock_on_citus_makes_nobody_write_twice(database_url: str) -> None:
    async def check() -> None:
        async with pool_and_queries(database_url, Coordinator) as (pool, queries):
            ids = await make_tasks(pool, USERS[:20])
            with locked(database_url, "SELECT FROM task WHERE user_id = 'user-7' FOR UPDATE"):
                writes = [
                    asyncio.create_task(queries.complete_task(user_id, ids[user_id], None, None))
                    for user_id in USERS[:20]
                ]
                await asyncio.gather(*writes[:7], *writes[8:])
            await writes[7]
            assert await pool.fetchval("SELECT count(*) FROM task WHERE completed") == 20

    asyncio.run(check())


def test_on_citus_only_several_writes_need_a_transaction(database_url: str) -> None:
    """It costs two more round trips."""

    async def check() -> None:
        async with pool_and_queries(database_url, Coordinator) as (pool, queries):
            ids = await make_tasks(pool, USERS[:2])
            Coordinator.commits = 0
            await asyncio.gather(*(queries.get_task(user_id, task_id) for user_id, task_id in ids.items()))
            await queries.complete_task("user-0", ids["user-0"], None, None)
            assert Coordinator.commits == 0
            await asyncio.gather(*(queries.complete_task(*each, None, None) for each in ids.items()))
            assert Coordinator.commits == 1

    asyncio.run(check())


class LosesWorker(Coordinator):
    """A coordinator that loses its worker once: before a message, after it, or after a commit."""

    when: ClassVar[str] = ""
    error: ClassVar[type[asyncpg.PostgresError]]

    def lose_worker(self, when: str) -> None:
        if LosesWorker.when == when:
            LosesWorker.when = ""
            raise self.error("of the coordinator, about its worker")

    async def fetchmany(self, query: str, args: Any, **options: Any) -> Any:
        self.lose_worker("before a message")
        rows = await super().fetchmany(query, args, **options)
        self.lose_worker("after a message")
        return rows

    async def execute(self, query: str, *args: Any, **options: Any) -> Any:
        status = await super().execute(query, *args, **options)
        if query == "COMMIT":
            self.lose_worker("after a commit")
        return status


@pytest.mark.parametrize(
    "error",
    # Citus says of a commit without an answer: could not commit transaction for shard on at least one active node.
    [asyncpg.ConnectionFailureError, asyncpg.QueryCanceledError, asyncpg.InternalServerError],
)
@pytest.mark.parametrize(
    ("when", "users", "expected"),
    [
        ("before a message", 1, 0),  # it may have been made, for all that the service knows
        ("after a message", 1, 1),
        ("before a message", 9, 9),  # the transaction was rolled back, so they are sent again
        ("after a message", 9, 9),
        ("after a commit", 9, 9),
    ],
)
def test_when_citus_loses_a_worker_nothing_is_written_twice(
    database_url: str, when: str, users: int, expected: int, error: type[asyncpg.PostgresError]
) -> None:
    async def check() -> None:
        async with pool_and_queries(database_url, LosesWorker) as (pool, queries):
            LosesWorker.when, LosesWorker.error = when, error
            creations = (queries.create_task(user_id, None, None, NEW) for user_id in USERS[:users])
            answers = await asyncio.gather(*creations, return_exceptions=True)
            unknown = users == 1 or when == "after a commit"
            assert [isinstance(answer, Unavailable) for answer in answers] == [unknown] * users
            assert await pool.fetchval("SELECT count(*) FROM task") == expected
            assert LosesWorker.when == ""

    asyncio.run(check())


class PoolerLosesServer(LosesWorker):
    """A pooler that goes on after it has lost the server of a transaction, as pgcat does."""

    is_citus = False
    sets_lock_timeout = True


@pytest.mark.parametrize("when", ["before a message", "after a commit"])
def test_when_a_pooler_loses_its_server_nothing_is_written_twice(database_url: str, when: str) -> None:
    async def check() -> None:
        async with pool_and_queries(database_url, PoolerLosesServer) as (pool, queries):
            LosesWorker.when, LosesWorker.error = when, asyncpg.PostgresSystemError
            creations = (queries.create_task(user_id, None, None, NEW) for user_id in USERS[:9])
            answers = await asyncio.gather(*creations, return_exceptions=True)
            assert [isinstance(answer, Unavailable) for answer in answers] == [when == "after a commit"] * 9
            assert await pool.fetchval("SELECT count(*) FROM task") == 9

    asyncio.run(check())


def test_an_error_of_a_trigger_is_nobody_elses(database_url: str) -> None:
    """A trigger may call another server, and lose it, which is an error of class 08. Its message is rolled back."""
    trigger = """
        CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE SQLSTATE '08006'; END $$;
        CREATE TRIGGER fail BEFORE INSERT ON task FOR EACH ROW WHEN (NEW.user_id = 'user-3') EXECUTE FUNCTION fail()
    """

    async def check() -> None:
        async with pool_and_queries(database_url) as (pool, queries):
            await pool.execute(trigger)
            creations = (queries.create_task(user_id, None, None, NEW) for user_id in USERS[:9])
            answers = await asyncio.gather(*creations, return_exceptions=True)
            assert [isinstance(answer, Unavailable) for answer in answers] == [n == 3 for n in range(9)]
            assert await pool.fetchval("SELECT count(*) FROM task") == 8

    asyncio.run(check())
