"""Others in the database: their locks, their triggers, a pooler. Whom they hinder is hindered alone."""

from __future__ import annotations

import asyncio
import gc
import re
import subprocess
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, ClassVar

import asyncpg
import psycopg
import pytest

import sql
from sql import Refused
from sql.database import Unavailable
from tests.support.batches import (
    NEW,
    USERS,
    Message,
    Spy,
    changes_of,
    failures,
    make_tasks,
    pool_and_queries,
    sizes,
    whole_list,
)
from tests.support.database import locked
from tests.support.fixtures import StartService
from tests.support.load import Caller
from tests.support.postgres import PGBOUNCER, Postgres, held_port
from tests.support.service_process import Service, run_command
from tests.support.waiting import wait_in_loop_until

CHANGE_STATEMENTS = (sql.UPDATE_TASK, sql.COMPLETE_TASK, sql.DELETE_TASK)


def locked_tasks(url: str, *users: str) -> Any:
    return locked(url, "SELECT FROM task WHERE user_id = ANY(%s) FOR UPDATE", [*users])


# --- Rows that are locked --------------------------------------------------------------------------------------------


def test_a_change_of_a_locked_row_holds_nobody_up_and_is_made_when_it_is_let_go(database_url: str) -> None:
    async def check() -> None:
        async with pool_and_queries(database_url) as (pool, queries):
            ids = await make_tasks(pool, USERS[:20])
            with locked_tasks(database_url, "user-7"):
                toggles = [
                    asyncio.create_task(queries.complete_task(user_id, ids[user_id], None, None))
                    for user_id in USERS[:20]
                ]
                await asyncio.gather(*toggles[:7], *toggles[8:])
                # It has been tried with the others, and alone again and again.
                await wait_in_loop_until(lambda: len(failures()) == 4)
                assert not toggles[7].done()
            changed = await toggles[7]
            assert changed
            assert changed["completed"] is True
            assert {*failures()} == {"LockNotAvailableError"}
            assert sizes() == [20] + [1] * (len(sizes()) - 1)
            done = Counter(call[0] for message in Spy.sent if not message.error for call in message.calls)
            assert done == dict.fromkeys(USERS[:20], 1)
            assert await pool.fetchval("SELECT count(*) FROM task WHERE completed") == 20

    asyncio.run(check())


LOCKED = {"a row": "SELECT FROM task FOR UPDATE", "the table": "LOCK TABLE task IN ACCESS EXCLUSIVE MODE"}


@pytest.mark.parametrize("lock", LOCKED.values(), ids=LOCKED)
def test_what_waits_for_a_lock_beyond_the_time_limit_is_unavailable(
    database_url: str, monkeypatch: pytest.MonkeyPatch, lock: str
) -> None:
    """And is not done after that."""
    monkeypatch.setattr(sql, "CALL_TIMEOUT", 0.5)

    async def check() -> None:
        async with pool_and_queries(database_url) as (pool, queries):
            [(user_id, task_id)] = (await make_tasks(pool, ["alice"])).items()
            calls: list[Callable[[], Any]] = [
                lambda: queries.complete_task(user_id, task_id, None, None),
                lambda: queries.update_task(user_id, task_id, None, changes_of(title="x", completed=True)),
                lambda: queries.delete_task(user_id, task_id, None),
            ]
            if "TABLE" in lock:
                calls += [
                    lambda: queries.create_task(user_id, None, None, NEW),
                    lambda: queries.create_task(user_id, "key", "hash", NEW),
                    lambda: queries.get_task(user_id, task_id),
                    lambda: whole_list(queries, user_id),
                    lambda: whole_list(queries, user_id, False),
                ]
            with locked(database_url, lock):
                async with asyncio.timeout(10):
                    answers = await asyncio.gather(*(call() for call in calls), return_exceptions=True)
                assert all(isinstance(answer, (Unavailable, TimeoutError)) for answer in answers), answers
                tries = len(Spy.sent)
                assert tries >= 2 * len({message.statement for message in Spy.sent})
            assert asyncio.all_tasks() == {asyncio.current_task()}  # nobody is left who could send it again
            assert len(Spy.sent) == tries
            rows = await pool.fetch("SELECT title, completed FROM task")
            assert [tuple(row) for row in rows] == [("a task", False)]

    asyncio.run(check())


class Counted(Spy):
    """A connection that counts how many messages of one write are in flight, and of which tasks."""

    alone: ClassVar[int] = 0
    most_alone: ClassVar[int] = 0
    in_flight: ClassVar[Counter[tuple[str, int]]] = Counter()
    most_of_one_task: ClassVar[int] = 0

    async def fetchmany(self, query: str, args: Any, **options: Any) -> Any:
        calls = list(args)
        tasks = [(user_id, parameters[0]) for user_id, _, *parameters in calls if query in CHANGE_STATEMENTS]
        goes_alone = len(calls) == 1 and query not in sql.READS
        Counted.alone += goes_alone
        self.in_flight.update(tasks)
        Counted.most_alone = max(self.most_alone, self.alone)
        Counted.most_of_one_task = max(self.most_of_one_task, *self.in_flight.values(), 0)
        try:
            return await super().fetchmany(query, calls, **options)
        finally:
            Counted.alone -= goes_alone
            self.in_flight.subtract(tasks)


@pytest.fixture(autouse=True)
def _forget_what_was_counted() -> None:
    Counted.alone = Counted.most_alone = Counted.most_of_one_task = 0
    Counted.in_flight.clear()


def test_changes_of_locked_rows_take_at_most_a_quarter_of_the_pool(database_url: str) -> None:
    """So that a connection is there for everybody else."""

    async def check() -> None:
        async with pool_and_queries(database_url, Counted, size=8) as (pool, queries):
            ids = await make_tasks(pool, USERS[:40])
            with locked_tasks(database_url, *USERS[:30]):
                toggles = [
                    asyncio.create_task(queries.complete_task(user_id, ids[user_id], None, None))
                    for user_id in USERS[:30]
                ]
                await wait_in_loop_until(lambda: len(failures()) > 20)
                for user_id in USERS[30:40]:
                    assert await queries.get_task(user_id, ids[user_id])
                    assert len(await whole_list(queries, user_id)) == 1
                await wait_in_loop_until(lambda: len(failures()) > 60)
                assert Counted.most_alone == 2
                assert not any(toggle.done() for toggle in toggles)
            await asyncio.gather(*toggles)
            assert Counted.most_alone == 2
            assert await pool.fetchval("SELECT count(*) FROM task WHERE completed") == 30

    asyncio.run(check())


def test_changes_of_a_user_who_waits_for_a_lock_are_in_no_batch(database_url: str) -> None:
    """Whoever has many locked tasks could send one after the other, and each would hold up the others in its batch."""

    async def check() -> None:
        async with pool_and_queries(database_url, size=6) as (pool, queries):
            ids = await make_tasks(pool, USERS[:10])
            insertion = "INSERT INTO task (user_id, title) SELECT 'alice', 'x' FROM generate_series(1, 9) RETURNING id"
            more = [row["id"] for row in await pool.fetch(insertion)]
            with locked_tasks(database_url, "alice"):
                changes = [asyncio.create_task(queries.complete_task("alice", more[0], None, None))]
                await wait_in_loop_until(lambda: len(failures()) > 1)
                Spy.sent.clear()
                changes += [asyncio.create_task(queries.complete_task("alice", id, None, None)) for id in more[1:]]
                await asyncio.gather(*(queries.complete_task(user, ids[user], None, None) for user in USERS[:10]))
                await wait_in_loop_until(lambda: len(failures()) > 4)
                assert sorted(sizes())[-2:] == [1, 10]
            assert all(await asyncio.gather(*changes))

    asyncio.run(check())


@pytest.mark.parametrize("kind", ["changes", "creations"])
def test_of_a_user_one_call_waits_for_locks_at_a_time(database_url: str, kind: str) -> None:
    """So that whoever has many of them takes the connections, and the turns of long lists, from nobody else."""

    async def check() -> None:
        async with pool_and_queries(database_url, Counted, size=6) as (pool, queries):
            insertion = "INSERT INTO task (user_id, title) SELECT 'alice', 'x' FROM generate_series(1, 30) RETURNING id"
            ids = [row["id"] for row in await pool.fetch(insertion)]
            await pool.execute("INSERT INTO task (user_id, title) SELECT 'bob', 'x' FROM generate_series(1, 400)")
            key = "INSERT INTO task (user_id, title, idempotency_key, request_hash) VALUES (%s, 'x', 'key', 'hash')"
            lock = locked_tasks(database_url, "alice") if kind == "changes" else locked(database_url, key, "alice")
            with lock:
                calls = [
                    asyncio.create_task(
                        queries.complete_task("alice", id, None, None)
                        if kind == "changes"
                        else queries.create_task("alice", "key", "hash", NEW)
                    )
                    for id in ids
                ]
                await wait_in_loop_until(lambda: len(failures()) > 4)
                Counted.most_alone = 0
                assert len(await whole_list(queries, "bob")) == 400
                await wait_in_loop_until(lambda: len(failures()) > 8)
                assert not any(call.done() for call in calls)
                assert Counted.most_alone == 1
            await asyncio.gather(*calls)

    asyncio.run(check())


@pytest.mark.parametrize("is_locked", [False, True], ids=["free", "locked for a while"])
def test_changes_of_one_task_go_one_at_a_time(database_url: str, is_locked: bool) -> None:
    """And others' beside them: they do not wait in the database for one another."""

    async def check() -> None:
        async with pool_and_queries(database_url, Counted) as (pool, queries):
            ids = await make_tasks(pool, ["alice", "bob"])
            put = changes_of(title="changed")
            with locked_tasks(database_url, *["alice"] * is_locked):
                changes = [
                    asyncio.create_task(queries.complete_task("alice", ids["alice"], None, None)) for _ in range(19)
                ]
                changes.append(asyncio.create_task(queries.update_task("alice", ids["alice"], None, put)))
                for _ in range(5):
                    assert await queries.complete_task("bob", ids["bob"], None, None)
                if is_locked:
                    await wait_in_loop_until(lambda: len(failures()) > 2)
            versions = [change["updated_at"] for change in await asyncio.gather(*changes) if change]
            assert len({*versions}) == 20
            assert Counted.most_of_one_task == 1
            tasks = {row["user_id"]: (row["title"], row["completed"]) for row in await pool.fetch("SELECT * FROM task")}
            assert tasks == {"alice": ("changed", True), "bob": ("a task", True)}
            gc.collect()
            assert not queries.semaphores  # nothing is kept of it

    asyncio.run(check())


class SlowCommit(Spy):
    """A connection on which the end of a message takes its time, as with a standby far away."""

    async def after(self, message: Message, rows: list[Any]) -> list[Any]:
        await asyncio.sleep(0.3)
        return rows


@pytest.mark.parametrize("kind", ["change", "create"])
def test_after_a_hang_up_the_next_write_of_the_same_disturbs_no_batch(database_url: str, kind: str) -> None:
    """The first one is still being made, and would keep all of them waiting for its lock."""

    async def check() -> None:
        async with pool_and_queries(database_url, SlowCommit) as (pool, queries):
            ids = await make_tasks(pool, USERS[:9])

            def write(user_id: str) -> asyncio.Task[object]:
                change = queries.complete_task(user_id, ids[user_id], None, None)
                create = queries.create_task(user_id, "key", "hash", NEW)
                chosen, other = (change, create) if kind == "change" else (create, change)
                other.close()
                return asyncio.create_task(chosen)

            abandoned = write("user-0")
            await wait_in_loop_until(lambda: len(Spy.sent) == 1)
            abandoned.cancel()
            await asyncio.wait([abandoned])
            await asyncio.gather(*map(write, USERS[:9]))
            together = [{call[0] for call in message.calls} for message in Spy.sent if len(message.calls) > 1]
            assert together == [{*USERS[1:9]}]
            del abandoned  # and the frames of its error
            await wait_in_loop_until(lambda: gc.collect() >= 0 and not queries.semaphores)  # nothing is kept of it

    asyncio.run(check())


def test_who_meets_a_lock_and_hangs_up_has_nobody_go_alone(database_url: str) -> None:
    async def check() -> None:
        async with pool_and_queries(database_url, lock_timeout="500ms") as (pool, queries):
            ids = await make_tasks(pool, USERS[:20])
            with locked_tasks(database_url, "user-7"):
                toggles = [
                    asyncio.create_task(queries.complete_task(user_id, ids[user_id], None, None))
                    for user_id in USERS[:20]
                ]
                await wait_in_loop_until(lambda: sizes() == [20])
                toggles[7].cancel()
                await asyncio.gather(*toggles[:7], *toggles[8:])
            assert sizes() == [20, 19]
            assert await pool.fetchval("SELECT count(*) FROM task WHERE completed") == 19

    asyncio.run(check())


PATIENT: dict[str, Any] = {"lock_timeout": "20s", "deadlock_timeout": "10ms"}
"""With these a deadlock is seen as what it is, before a wait for a lock has ended."""


@pytest.mark.parametrize("kind", ["toggle", "create with a key"])
def test_processes_that_write_the_same_in_opposite_orders_never_deadlock(database_url: str, kind: str) -> None:
    async def check() -> None:
        async with (
            pool_and_queries(database_url, **PATIENT) as (pool, one),
            pool_and_queries(database_url, **PATIENT) as (_, other),
        ):
            users = USERS[:30]
            ids = await make_tasks(pool, users) if kind == "toggle" else {}
            for number in range(25):
                calls = [(one, user_id) for user_id in users] + [(other, user_id) for user_id in users[::-1]]
                assert all(
                    await asyncio.gather(
                        *(
                            queries.complete_task(user_id, ids[user_id], None, None)
                            if kind == "toggle"
                            else queries.create_task(user_id, f"key {number}", "hash", NEW)
                            for queries, user_id in calls
                        )
                    )
                )
            assert failures() == []
            if kind == "toggle":
                assert await pool.fetchval("SELECT count(*) FROM task WHERE completed") == 0
            else:
                assert await pool.fetchval("SELECT count(*) FROM task") == 25 * 30

    asyncio.run(check())


# --- Triggers, foreign keys and a restored sequence ------------------------------------------------------------------

SWALLOW = """
    CREATE FUNCTION swallow() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
    CREATE TRIGGER swallow BEFORE INSERT ON task FOR EACH ROW WHEN (new.user_id = 'user-7') EXECUTE FUNCTION swallow();
"""
REFUSE = """
    CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE ''not on a Sunday''; END';
    CREATE TRIGGER refuse BEFORE INSERT ON task FOR EACH ROW WHEN (new.user_id = 'user-7') EXECUTE FUNCTION refuse();
"""
GIVE_AWAY = """
    CREATE FUNCTION give_away() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN new.user_id := ''bob''; RETURN new; END';
    CREATE TRIGGER give_away BEFORE INSERT ON task FOR EACH ROW WHEN (new.user_id = 'user-7')
    EXECUTE FUNCTION give_away();
"""


@pytest.mark.parametrize("trigger", [SWALLOW, REFUSE], ids=["swallows", "refuses"])
def test_a_trigger_for_one_user_does_nothing_to_the_writes_of_others(database_url: str, trigger: str) -> None:
    async def check() -> None:
        async with pool_and_queries(database_url) as (pool, queries):
            await pool.execute(trigger)
            answers = await asyncio.gather(
                *(queries.create_task(user_id, None, None, NEW) for user_id in USERS[:30]), return_exceptions=True
            )
            assert [type(answer) for answer in answers if not isinstance(answer, asyncpg.Record)] == [Refused]
            assert isinstance(answers[7], Refused)
            rows = await pool.fetch("SELECT user_id FROM task")
            assert sorted(row[0] for row in rows) == sorted({*USERS[:30]} - {"user-7"})

    asyncio.run(check())


class Outdated(Spy):
    """A connection that fails as asyncpg does if columns get another type each time that it prepares a statement."""

    times: ClassVar[int] = 0

    async def before(self, message: Message) -> None:
        if Outdated.times:
            Outdated.times -= 1
            raise asyncpg.InvalidCachedStatementError("cached statement plan is invalid")


def test_a_statement_is_prepared_again_however_often_somebody_alters_its_columns(database_url: str) -> None:
    async def check() -> None:
        async with pool_and_queries(database_url, Outdated) as (_, queries):
            Outdated.times = 3
            assert await queries.create_task("alice", None, None, NEW) is not None
            assert len(Spy.sent) == 4

    asyncio.run(check())


def test_a_row_that_a_trigger_has_given_to_somebody_else_is_a_bug(database_url: str) -> None:
    async def check() -> None:
        async with pool_and_queries(database_url) as (pool, queries):
            await pool.execute(GIVE_AWAY)
            with pytest.raises(RuntimeError, match="a row of somebody else"):
                await queries.create_task("user-7", None, None, NEW)

    asyncio.run(check())


FOREIGN_KEY = """
    CREATE TABLE owner (id text PRIMARY KEY);
    INSERT INTO owner SELECT 'user-' || number FROM generate_series(0, 999) AS number;
    ALTER TABLE task ADD FOREIGN KEY (user_id) REFERENCES owner;
"""


def test_a_foreign_key_to_a_locked_row_does_nothing_to_the_creations_of_others(database_url: str) -> None:
    async def check() -> None:
        async with pool_and_queries(database_url) as (pool, queries):
            await pool.execute(FOREIGN_KEY)
            with locked(database_url, "SELECT FROM owner WHERE id = 'user-7' FOR UPDATE"):
                creations = [
                    asyncio.create_task(queries.create_task(user_id, None, None, NEW)) for user_id in USERS[:30]
                ]
                assert all(await asyncio.gather(*creations[:7], *creations[8:]))
                assert not creations[7].done()
            assert await creations[7]
            rows = await pool.fetch("SELECT user_id FROM task")
            assert sorted(row[0] for row in rows) == sorted(USERS[:30])

    asyncio.run(check())


BEHIND = "SELECT setval(pg_get_serial_sequence('task', 'id'), 1)"
"""What a restore may do: the sequence gives ids again that the table has."""


@pytest.mark.parametrize("keyed", [False, True], ids=["without keys", "with keys"])
def test_an_id_that_is_taken_is_a_bug_and_no_creation_vanishes(database_url: str, keyed: bool) -> None:
    async def check() -> None:
        async with pool_and_queries(database_url) as (pool, queries):
            for _ in range(6):
                await queries.create_task("alice", None, None, NEW)
            await pool.execute(BEHIND)
            keys = [f"key {number}" if keyed else None for number in range(7)]
            answers = await asyncio.gather(
                *(queries.create_task("alice", key, key, NEW) for key in keys), return_exceptions=True
            )
            created = [answer["id"] for answer in answers if isinstance(answer, asyncpg.Record)]
            failed = [answer for answer in answers if not isinstance(answer, asyncpg.Record)]
            assert {type(answer) for answer in failed} == {asyncpg.UniqueViolationError}
            assert 0 < len(created) < 7
            rows = [row[0] for row in await pool.fetch("SELECT id FROM task")]
            assert sorted(rows) == sorted([1, 2, 3, 4, 5, 6, *created])

            again = await asyncio.gather(*(queries.create_task("alice", key, key, NEW) for key in keys))  # all is well
            if keyed:  # what has failed has used no key up
                assert {row and row["id"] for row in again} >= {*created}
            assert await pool.fetchval("SELECT count(*) FROM task") == 6 + (7 if keyed else 7 + len(created))

    asyncio.run(check())


def test_an_id_that_is_taken_is_a_500_and_in_the_log(database_url: str, start_service: StartService) -> None:
    service = start_service(database_url)
    service.wait_until_ready()
    with service.client("alice") as alice:
        there = [alice.create()["id"] for _ in range(6)]
        service.sql(BEHIND)
        responses = [alice.post("/api/tasks", json={"title": "x"}) for _ in range(8)]
        created = [response.json()["id"] for response in responses if response.status_code == 201]
        failed = [response for response in responses if response.status_code != 201]
        assert {(response.status_code, response.text) for response in failed} == {
            (500, '{"detail":"Internal Server Error"}')
        }
        assert created
        assert {task["id"] for task in alice.tasks()} == {*there, *created}
        for response in failed:
            assert "status=500" in service.log_line(response.headers["X-Request-ID"])
    assert service.log.count("asyncpg.exceptions.UniqueViolationError") == len(failed)
    assert service.log.count("Traceback") >= len(failed)


# --- A pooler --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    """The server that `pgbouncer` has two connections to."""
    postgres = Postgres()
    yield postgres
    postgres.remove()


@pytest.fixture(params=["refuses startup parameters", "drops startup parameters"])
def pooler(request: pytest.FixtureRequest, pgbouncer: int, tmp_path: Path) -> Iterator[int]:
    """The port of that PgBouncer, or of one that takes the startup parameters without a word and lets go of them."""
    if request.param.startswith("refuses"):
        yield pgbouncer
        return
    port, ini = held_port(), tmp_path / "dropping.ini"
    settings = (tmp_path / "pgbouncer.ini").read_text().replace(f"listen_port = {pgbouncer}", f"listen_port = {port}")
    ini.write_text(f"{settings}ignore_startup_parameters = lock_timeout,plan_cache_mode\n")
    with subprocess.Popen([str(PGBOUNCER), str(ini)], stderr=subprocess.DEVNULL) as process:
        yield port
        process.terminate()


def tracks_statements() -> bool:
    """Return whether this PgBouncer keeps prepared statements as it comes, so that the URL need not tell of it."""
    version = run_command([str(PGBOUNCER), "--version"]).stdout
    found = re.search(r"PgBouncer (\d+)\.(\d+)", version)
    return found is not None and (int(found[1]), int(found[2])) >= (1, 24)


@pytest.fixture(params=["?pgbouncer=true", *[""] * bool(PGBOUNCER and tracks_statements())])
def behind_pooler(
    request: pytest.FixtureRequest, postgres: Postgres, pooler: int, start_service: StartService
) -> Service:
    """A service that reaches its database through the pooler; `database_url` is for the tests, and straight."""
    database = f"tasks_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(postgres.url(), autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {database}")
    url = f"postgresql://postgres@127.0.0.1:{pooler}/{database}{request.param}"
    service = start_service(url, DATABASE_POOL_SIZE="6")
    service.wait_until_ready()
    service.database_url = postgres.url(database)
    return service


@asynccontextmanager
async def callers_with_a_task(service: Service, count: int) -> AsyncIterator[list[tuple[Caller, str]]]:
    """Users of a service, each with the path of a task of their own."""
    async with AsyncExitStack() as stack:
        callers = [await stack.enter_async_context(Caller(service, user_id)) for user_id in USERS[:count]]
        answers = await asyncio.gather(*(caller.send("POST", "/api/tasks", {"title": "x"}) for caller in callers))
        yield [(caller, f"/api/tasks/{answer.json['id']}") for caller, answer in zip(callers, answers, strict=True)]


async def use(caller: Caller, path: str) -> None:
    """Send each of the statements once or twice."""
    assert (await caller.send("GET", path)).status == 200
    assert (await caller.send("PUT", path, {"title": "y"})).status == 200
    assert (await caller.send("PATCH", f"{path}/complete")).json["completed"] is True
    for _ in range(2):
        assert (await caller.send("POST", "/api/tasks", {"title": "z"}, Idempotency_Key="key")).status == 201
    assert len((await caller.send("GET", "/api/tasks")).json["items"]) == 2
    assert len((await caller.send("GET", "/api/tasks?status=completed")).json["items"]) == 1
    assert (await caller.send("DELETE", path)).status == 204


def test_nothing_is_left_in_the_sessions_of_a_pooler(behind_pooler: Service, pooler: int) -> None:
    """Another client of the pooler would wait for no lock, or have its statements planned in another way."""
    database = behind_pooler.database_url.rpartition("/")[2]
    url = f"postgresql://postgres@127.0.0.1:{pooler}/{database}"
    settings = "SELECT pg_backend_pid(), current_setting('lock_timeout'), current_setting('plan_cache_mode')"

    async def check() -> None:
        async with callers_with_a_task(behind_pooler, 60) as callers:
            await asyncio.gather(*(use(caller, path) for caller, path in callers))
        async with AsyncExitStack() as stack:
            found = []
            for _ in range(2):  # each keeps its server connection until the other has one too
                other = await asyncpg.connect(url, statement_cache_size=0)
                stack.push_async_callback(other.close)
                await stack.enter_async_context(other.transaction())
                found.append(await other.fetchrow(settings))
        assert [row and tuple(row)[1:] for row in found] == [("0", "auto")] * 2
        backends = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        assert {row[0] for row in behind_pooler.sql(backends)} == {row[0] for row in found if row}

    asyncio.run(check())


def test_locked_rows_hold_up_nobody_else_behind_a_pooler(behind_pooler: Service) -> None:
    """Though two statements wait for them, which could keep both connections to the server."""

    async def check() -> None:
        async with callers_with_a_task(behind_pooler, 7) as callers:
            *hindered, (other, others) = callers
            with locked_tasks(behind_pooler.database_url, *USERS[:6]):
                changes = [
                    asyncio.create_task(
                        caller.send("PUT", path, {"completed": True})
                        if number % 2
                        else caller.send("PATCH", f"{path}/complete")
                    )
                    for number, (caller, path) in enumerate(hindered)
                ]
                waiting = "SELECT pid FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
                await wait_in_loop_until(lambda: bool(behind_pooler.sql(waiting)))
                for _ in range(20):
                    assert (await other.send("GET", "/api/tasks")).status == 200
                    assert (await other.send("PATCH", f"{others}/complete")).status == 200
                assert not any(change.done() for change in changes)
            assert [answer.json["completed"] for answer in await asyncio.gather(*changes)] == [True] * 6

    asyncio.run(check())
