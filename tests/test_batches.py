"""What comes in the same moment shares a message to the database, and nothing else."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, ClassVar

import asyncpg
import pytest

import sql
from sql import Connection, Queries

USERS = [f"user-{number}" for number in range(1000)]
FILL = """
    INSERT INTO task (user_id, title, completed)
    SELECT 'user-' || user_number, 'task ' || number, number % 2 = 0
    FROM generate_series(0, 999) AS user_number, generate_series(1, 1 + user_number % 3) AS number
"""


@pytest.fixture(scope="module")
def filled_url(new_database: Callable[[], str]) -> str:
    """A database in which a thousand users have one to three tasks each."""
    url = new_database()

    async def fill() -> None:
        connection = await asyncpg.connect(url)
        await connection.execute(sql.SCHEMA)
        await connection.execute(FILL)
        await connection.close()

    asyncio.run(fill())
    return url


@asynccontextmanager
async def locked(url: str, *users: str) -> AsyncIterator[None]:
    """Hold the locks of all tasks of some users, as somebody else does."""
    connection = await asyncpg.connect(url)
    try:
        async with connection.transaction():
            await connection.execute("SELECT FROM task WHERE user_id = ANY($1) FOR UPDATE", users)
            yield
    finally:
        await connection.close()


@asynccontextmanager
async def pool_and_queries(
    url: str, connection_class: type[Connection] = Connection
) -> AsyncIterator[tuple[asyncpg.Pool, Queries]]:
    async with asyncpg.create_pool(url, min_size=0, max_size=4, connection_class=connection_class) as pool:
        queries = Queries(pool)
        await queries.apply_schema()
        yield pool, queries


def test_what_a_thousand_users_read_at_once_is_what_each_reads_alone(filled_url: str) -> None:
    """Of every kind, of their own tasks and of others', in many different orders."""

    async def check() -> None:
        async with pool_and_queries(filled_url) as (pool, queries):
            tasks = await pool.fetch("SELECT user_id, id FROM task")
            reads: list[tuple[Callable[..., object], str, object]] = []
            for user_id, task_id in tasks:
                reads += [(queries.get_task, user_id, task_id), (queries.get_task, random.choice(USERS), task_id)]
            for user_id in USERS:
                reads += [(queries.list_tasks, user_id, which) for which in sql.STATUSES]
            alone = {}
            for read, user_id, what in reads:
                if read == queries.get_task:
                    alone[str((read, user_id, what))] = await pool.fetchval(sql.GET_TASK, user_id, what)
                else:
                    items = await pool.fetchval(sql.LIST_TASKS[str(what)], user_id)
                    alone[str((read, user_id, what))] = b'{"items": [%b]}' % (items or b"")
            for seed in range(3):
                random.Random(seed).shuffle(reads)
                together = await asyncio.gather(*(read(user_id, what) for read, user_id, what in reads))  # type: ignore[call-overload]
                assert together == [alone[str(each)] for each in reads]
            for (_, user_id, _), text in zip(reads, together, strict=True):
                found = json.loads(text) if text else {"items": []}
                assert {task["user_id"] for task in found.get("items", [found])} <= {user_id}

    asyncio.run(check())


def test_reads_of_one_moment_take_one_connection_and_later_ones_another(filled_url: str) -> None:
    async def check() -> None:
        async with pool_and_queries(filled_url) as (pool, queries):
            await asyncio.gather(*(queries.get_task(user_id, 1) for user_id in USERS[:30]))
            assert pool.get_size() == 1
            await asyncio.gather(*(queries.get_task(user_id, 1) for user_id in USERS[:96]))
            assert pool.get_size() == 3

    asyncio.run(check())


class Spy(Connection):
    """A connection that notes how many calls shared a message, and why it failed if so."""

    sent: ClassVar[list[int]] = []
    failed: ClassVar[list[str]] = []

    async def fetchmany(self, query: str, args: Any, **options: Any) -> Any:
        self.sent.append(len(args))
        try:
            return await super().fetchmany(query, args, **options)
        except Exception as error:
            self.failed.append(type(error).__name__)
            raise


@pytest.fixture(autouse=True)
def _forget_what_was_seen() -> None:
    for seen in (Spy.sent, Spy.failed):
        seen.clear()


class Slow(Spy):
    """One whose first message takes long."""

    async def fetchmany(self, query: str, args: Any, **options: Any) -> Any:
        rows = await super().fetchmany(query, args, **options)
        if len(self.sent) == 1:
            await asyncio.sleep(0.6)
        return rows


def test_what_comes_while_a_message_is_under_way_waits_for_it_but_not_for_long(
    filled_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def check() -> None:
        async with pool_and_queries(filled_url, connection_class=Slow) as (_, queries):

            async def come(*numbers: int) -> None:
                """Read for as many users as each number says, a moment after the others."""
                moments = []
                for number in numbers:
                    moments.append(asyncio.gather(*(queries.get_task(user_id, 1) for user_id in USERS[:number])))
                    await asyncio.sleep(0.005)
                await asyncio.gather(*moments)

            monkeypatch.setattr(sql, "PATIENCE", 10.0)
            Slow.sent.clear()
            await come(1, 1, 2, 1)
            assert Slow.sent == [1, 4]
            Slow.sent.clear()
            await come(1, 10, 6, 20, 3)  # sixteen do not wait
            assert sorted(Slow.sent) == [1, 3, 16, 20]
            Slow.sent.clear()
            await come(40)
            assert Slow.sent == [32, 8]

            monkeypatch.setattr(sql, "PATIENCE", 0.05)
            started = asyncio.get_running_loop().time()
            Slow.sent.clear()
            first = asyncio.create_task(queries.get_task("user-1", 1))
            await asyncio.sleep(0.005)
            await asyncio.gather(*(queries.get_task(user_id, 1) for user_id in USERS[:3]))
            assert 0.04 < asyncio.get_running_loop().time() - started < 0.5
            assert (Slow.sent, first.done()) == ([1, 3], False)
            await first

    asyncio.run(check())


def test_a_list_shares_its_message_once_it_is_known_to_be_short(filled_url: str) -> None:
    """With a long one in it, the others would wait."""

    async def check() -> None:
        async with pool_and_queries(filled_url, connection_class=Spy) as (pool, queries):
            titles = ["x" * 200] * 100
            await pool.execute("INSERT INTO task (user_id, title) SELECT 'long', unnest($1::text[])", titles)
            users = [*USERS[:29], "long"]
            for expected in ([1] * 30, [29, 1], [29, 1]):
                Spy.sent.clear()
                lists = await asyncio.gather(*(queries.list_tasks(user_id, "pending") for user_id in users))
                assert sorted(Spy.sent, reverse=True) == expected
                assert [len(json.loads(text)["items"]) for text in lists] == [
                    1 + n % 3 - (n % 3 > 0) for n in range(29)
                ] + [100]
            await pool.execute("INSERT INTO task (user_id, title) SELECT 'user-0', unnest($1::text[])", titles)
            for expected in ([29, 1], [28, 1, 1]):  # one that has become long holds the others up once
                Spy.sent.clear()
                await asyncio.gather(*(queries.list_tasks(user_id, "pending") for user_id in users))
                assert sorted(Spy.sent, reverse=True) == expected
            await pool.execute("DELETE FROM task WHERE title LIKE 'xx%'")

    asyncio.run(check())


class Troubled(Spy):
    """One on which the lists of a user take long, or fail."""

    trouble: ClassVar[str] = ""
    at_once: ClassVar[list[int]] = [0]

    async def fetchmany(self, query: str, args: Any, **options: Any) -> Any:
        if query in sql.LIST_TASKS.values() and "user-1" in [user_id for user_id, *_ in args]:
            if self.trouble == "failing":
                raise asyncpg.QueryCanceledError
            if self.trouble == "slow":
                self.at_once.append(self.at_once[-1] + 1)
                await asyncio.sleep(0.1)
                self.at_once.append(self.at_once[-1] - 1)
        return await super().fetchmany(query, args, **options)


def test_long_lists_of_a_user_leave_connections_to_others(filled_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def check() -> None:
        async with pool_and_queries(filled_url, connection_class=Troubled) as (_, queries):
            monkeypatch.setattr(Troubled, "trouble", "slow")
            monkeypatch.setattr(sql, "SHORT_LIST", 10)
            lists = [asyncio.create_task(queries.list_tasks("user-1", "all")) for _ in range(12)]
            await asyncio.sleep(0)
            async with asyncio.timeout(0.5):
                for number in range(10):
                    await queries.get_task("user-2", 1)
                    await queries.list_tasks(f"user-{2 + number}", "all")
            assert [each.done() for each in lists].count(True) < 8
            await asyncio.gather(*lists)
            assert max(Troubled.at_once) == 2  # of the four connections

    asyncio.run(check())


def test_a_list_that_has_failed_is_not_taken_for_a_short_one(filled_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when it has grown so long that it fails each time."""

    async def check() -> None:
        async with pool_and_queries(filled_url, connection_class=Troubled) as (_, queries):
            for trouble, expected in (("", [1] * 30), ("", [30]), ("failing", [1] * 29), ("", [29, 1]), ("", [30])):
                monkeypatch.setattr(Troubled, "trouble", trouble)
                Troubled.sent.clear()
                lists = (queries.list_tasks(user_id, "pending") for user_id in USERS[:30])
                answers = await asyncio.gather(*lists, return_exceptions=True)
                assert sum(isinstance(answer, Exception) for answer in answers) == (trouble == "failing")
                assert sorted(Troubled.sent, reverse=True) == expected

    asyncio.run(check())


def test_what_is_remembered_of_lists_is_bounded(filled_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sql, "KNOWN_LISTS", 10)

    async def check() -> None:
        async with pool_and_queries(filled_url) as (_, queries):
            for user_id in USERS[:35]:
                await queries.list_tasks(user_id, "completed")
                assert (user_id, "completed") in queries.short_lists
                assert len(queries.short_lists) <= 10

    asyncio.run(check())


def test_a_read_that_fails_fails_alone(filled_url: str) -> None:
    async def check() -> None:
        async with pool_and_queries(filled_url) as (_, queries):
            reads = [queries.get_task(user_id, 1) for user_id in USERS[:20]]
            reads += [queries.get_task("user-0", 2**63), queries.get_task("NUL\0", 1)]
            reads += [queries.get_task(user_id, 1) for user_id in USERS[:20]]
            answers = await asyncio.gather(*reads, return_exceptions=True)
            assert [type(answer) for answer in answers[20:22]] == [
                asyncpg.DataError,
                asyncpg.CharacterNotInRepertoireError,
            ]
            own = [json.loads(answer)["user_id"] for answer in answers[:20] + answers[22:] if isinstance(answer, str)]
            assert own == ["user-0", "user-0"]
            assert sum(answer is None for answer in answers) == 38

    asyncio.run(check())


def test_reads_survive_the_loss_of_their_connections(filled_url: str) -> None:
    async def check() -> None:
        async with pool_and_queries(filled_url) as (_, queries):
            admin = await asyncpg.connect(filled_url)
            for _ in range(5):
                await asyncio.gather(*(queries.list_tasks(user_id, "completed") for user_id in USERS[:100]))
                await admin.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                    " WHERE datname = current_database() AND pid <> pg_backend_pid()"
                )
            lists = await asyncio.gather(*(queries.list_tasks(user_id, "all") for user_id in USERS[:100]))
            assert [len(json.loads(text)["items"]) for text in lists] == [1 + number % 3 for number in range(100)]
            await admin.close()

    asyncio.run(check())


def test_who_no_longer_waits_is_not_sent(filled_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sql, "PATIENCE", 10.0)

    async def check() -> None:
        async with pool_and_queries(filled_url, connection_class=Slow) as (_, queries):
            Slow.sent.clear()
            first = asyncio.create_task(queries.get_task("user-1", 1))
            await asyncio.sleep(0.005)
            reads = [asyncio.create_task(queries.get_task(user_id, 1)) for user_id in USERS[:9]]
            await asyncio.sleep(0.005)
            for read in reads[::3]:
                read.cancel()
            answers = await asyncio.gather(first, *reads, return_exceptions=True)
            assert [isinstance(answer, asyncio.CancelledError) for answer in answers[1:]] == [True, False, False] * 3
            assert Slow.sent == [1, 6]

    asyncio.run(check())


def test_who_no_longer_waits_for_a_read_disturbs_nobody(filled_url: str) -> None:
    async def check() -> None:
        async with pool_and_queries(filled_url) as (_, queries):
            reads = [asyncio.create_task(queries.get_task(user_id, 1)) for user_id in USERS[:9]]
            await asyncio.sleep(0)
            for read in reads[::3]:
                read.cancel()
            answers = await asyncio.gather(*reads, return_exceptions=True)
            assert [isinstance(answer, asyncio.CancelledError) for answer in answers] == [True, False, False] * 3

    asyncio.run(check())


# --- Creations and changes


@pytest.fixture
def empty_url(new_database: Callable[[], str]) -> str:
    return new_database()


def test_what_a_thousand_users_create_at_once_is_what_each_has(empty_url: str) -> None:
    async def check() -> None:
        async with pool_and_queries(empty_url, connection_class=Spy) as (pool, queries):
            made = await asyncio.gather(
                *(queries.create_task(user_id, None, [f"of {user_id}", None, False]) for user_id in USERS)
            )
            assert max(Spy.sent) == 32
            for user_id, created in zip(USERS, made, strict=True):
                assert created
                task, task_id = created
                assert (json.loads(task)["id"], json.loads(task)["user_id"]) == (task_id, user_id)
                assert await queries.get_task(user_id, task_id) == task
            rows = await pool.fetch("SELECT user_id, title FROM task")
            assert sorted(map(tuple, rows)) == sorted((user_id, f"of {user_id}") for user_id in USERS)

    asyncio.run(check())


def test_a_creation_that_fails_fails_alone(empty_url: str) -> None:
    async def check() -> None:
        async with pool_and_queries(empty_url) as (pool, queries):
            titles = {"of NUL": "NUL\0", "too long": "x" * 201, "blank": " ", "a surrogate": "\ud800"}
            users = [*USERS[:20], *titles, *USERS[20:25]]
            made = await asyncio.gather(
                *(queries.create_task(user_id, None, [titles.get(user_id, "x"), None, False]) for user_id in users),
                return_exceptions=True,
            )
            failed = {user_id for user_id, answer in zip(users, made, strict=True) if isinstance(answer, Exception)}
            assert failed == set(titles)
            rows = await pool.fetch("SELECT user_id FROM task")
            assert sorted(row[0] for row in rows) == sorted(USERS[:25])

    asyncio.run(check())


async def make_tasks(pool: asyncpg.Pool, users: list[str]) -> dict[str, int]:
    """Give each of the users a task; return their ids."""
    made = "INSERT INTO task (user_id, title) SELECT unnest($1::text[]), 'a task' RETURNING user_id, id"
    return {row[0]: row[1] for row in await pool.fetch(made, users)}


def test_what_a_thousand_users_change_at_once_is_what_each_has(empty_url: str) -> None:
    """With the tasks of others, versions that have moved on, and ids that nobody has among them."""

    async def check() -> None:
        async with pool_and_queries(empty_url, connection_class=Spy) as (pool, queries):
            ids = await make_tasks(pool, USERS)
            tasks = {user_id: json.loads(str(await queries.get_task(user_id, ids[user_id]))) for user_id in USERS}
            Spy.sent.clear()
            changes: list[tuple[Callable[[], Any], object]] = []  # each with the fields that it is to give, or not
            for number, (user_id, task) in enumerate(tasks.items()):
                others, now, never = ids[USERS[number - 1]], [task["updated_at"]], ["never"]
                fields = [(True, f"of {user_id}"), (False, None), (False, None)]
                own: list[tuple[Callable[[], Any], object]] = [
                    (partial(queries.complete_task, user_id, task["id"], None, None), {"completed": True}),
                    (partial(queries.update_task, user_id, task["id"], now, fields), {"title": f"of {user_id}"}),
                    (partial(queries.delete_task, user_id, task["id"], now), True),
                    (partial(queries.update_task, user_id, task["id"], never, fields), None),
                    (partial(queries.delete_task, user_id, task["id"], never), False),
                ]
                foreign: list[tuple[Callable[[], Any], object]] = [
                    (partial(queries.complete_task, user_id, others, None, True), None),
                    (partial(queries.delete_task, user_id, others, None), False),
                    (partial(queries.update_task, user_id, 2**62, None, fields), None),
                ]
                changes += [own[number % 5], foreign[number % 3]]
            random.Random(7).shuffle(changes)
            answers = await asyncio.gather(*(change() for change, _ in changes))
            assert max(Spy.sent) == 32
            assert Spy.failed == []
            changed = {}
            for (change, expected), answer in zip(changes, answers, strict=True):
                if isinstance(expected, dict):
                    user_id = change.args[0]  # type: ignore[attr-defined]
                    changed[user_id] = json.loads(answer)
                    assert changed[user_id] == tasks[user_id] | expected | {
                        "updated_at": changed[user_id]["updated_at"]
                    }
                else:
                    assert answer is expected
            settings = await asyncio.gather(*(pool.fetchval("SHOW lock_timeout") for _ in range(4)))
            assert settings == ["0"] * 4  # nothing is left in a session
            for number, (user_id, task) in enumerate(tasks.items()):
                found = await queries.get_task(user_id, task["id"])
                left = None if number % 5 == 2 else changed.get(user_id, task)
                assert (json.loads(found) if found else None) == left

    asyncio.run(check())


def test_a_change_that_fails_fails_alone_and_the_others_are_made_once(empty_url: str) -> None:
    async def check() -> None:
        async with pool_and_queries(empty_url, connection_class=Spy) as (pool, queries):
            ids = await make_tasks(pool, USERS[:20])
            titles = {"user-3": "NUL\0", "user-4": "x" * 201, "user-5": " ", "user-6": "\ud800"}
            puts = [
                queries.update_task(
                    user_id, ids[user_id], None, [(True, titles.get(user_id, "new")), (False, None), (False, None)]
                )
                for user_id in USERS[:20]
            ]
            answers = await asyncio.gather(*puts, return_exceptions=True)
            assert [isinstance(answer, Exception) for answer in answers] == [3 <= n <= 6 for n in range(20)]
            await pool.execute("ALTER TABLE task ADD CONSTRAINT own CHECK (user_id <> 'user-9' OR NOT completed)")
            toggles = [queries.complete_task(user_id, ids[user_id], None, None) for user_id in USERS[:20]]
            answers = await asyncio.gather(*toggles, return_exceptions=True)
            assert [isinstance(answer, asyncpg.CheckViolationError) for answer in answers] == [
                n == 9 for n in range(20)
            ]
            rows = await pool.fetch("SELECT user_id, completed FROM task")
            assert {row[0]: row[1] for row in rows} == {user_id: user_id != "user-9" for user_id in USERS[:20]}
            assert len(Spy.failed) == 4 + 1 + 2  # each message that they were in, and then they alone

    asyncio.run(check())


def test_changes_do_not_wait_for_the_lock_that_one_of_them_waits_for(empty_url: str) -> None:
    async def check() -> None:
        async with pool_and_queries(empty_url, connection_class=Spy) as (pool, queries):
            ids = await make_tasks(pool, USERS[:20])
            async with locked(empty_url, "user-7"):
                toggles = [
                    asyncio.create_task(queries.complete_task(user_id, ids[user_id], None, None))
                    for user_id in USERS[:20]
                ]
                async with asyncio.timeout(1):
                    await asyncio.gather(*toggles[:7], *toggles[8:])
                await asyncio.sleep(0.5)
                assert not toggles[7].done()  # it waits for as long as it takes
            await toggles[7]
            assert Spy.failed == ["LockNotAvailableError"] * 2  # with the others, and alone
            assert await pool.fetchval("SELECT count(*) FROM task WHERE completed") == 20

    asyncio.run(check())


def test_changes_that_wait_for_a_lock_leave_connections_to_others(empty_url: str) -> None:
    async def check() -> None:
        async with pool_and_queries(empty_url, connection_class=Spy) as (pool, queries):
            ids = await make_tasks(pool, USERS[:20])
            async with locked(empty_url, *USERS[:10]):
                toggles = [
                    asyncio.create_task(queries.complete_task(user_id, ids[user_id], None, None))
                    for user_id in USERS[:10]
                ]
                await asyncio.sleep(0.7)
                async with asyncio.timeout(0.3):
                    for user_id in USERS[10:20]:
                        await queries.get_task(user_id, 1)
                        await queries.complete_task(user_id, ids[user_id], None, None)
                assert not any(toggle.done() for toggle in toggles)
            await asyncio.gather(*toggles)
            assert await pool.fetchval("SELECT count(*) FROM task WHERE completed") == 20

    asyncio.run(check())


def test_creations_with_one_key_leave_connections_to_others(empty_url: str) -> None:
    async def check() -> None:
        async with pool_and_queries(empty_url) as (_, queries):
            first = await queries.create_task("alice", "key hash", ["x", None, False])
            assert first
            async with locked(empty_url, "alice"):
                keys = ["key hash"] * 8 + ["key other"]
                again = [asyncio.create_task(queries.create_task("alice", key, ["x", None, False])) for key in keys]
                await asyncio.sleep(0.2)
                async with asyncio.timeout(0.5):
                    assert await queries.get_task("bob", 1) is None
                assert not any(each.done() for each in again)
            assert await asyncio.gather(*again) == [first] * 8 + [None]

    asyncio.run(check())


def test_processes_that_change_the_same_tasks_do_not_wait_for_each_other(empty_url: str) -> None:
    async def check() -> None:
        async with (
            pool_and_queries(empty_url, connection_class=Spy) as (pool, one),
            pool_and_queries(empty_url, connection_class=Spy) as (_, other),
        ):
            ids = await make_tasks(pool, USERS[:30])
            for _ in range(50):
                toggles = [one.complete_task(user_id, ids[user_id], None, None) for user_id in USERS[:30]]
                toggles += [other.complete_task(user_id, ids[user_id], None, None) for user_id in USERS[29::-1]]
                assert all(await asyncio.gather(*toggles))
            assert Spy.failed == []
            assert await pool.fetchval("SELECT count(*) FROM task WHERE completed") == 0

    asyncio.run(check())


@pytest.mark.parametrize("kind", ["create", "toggle"])
def test_writes_that_are_lost_with_their_connection_are_not_sent_again(empty_url: str, kind: str) -> None:
    async def check() -> None:
        async with pool_and_queries(empty_url) as (pool, queries):
            users = USERS[:20]
            ids = await make_tasks(pool, users)
            admin = await asyncpg.connect(empty_url)
            lock = admin.transaction()
            await lock.start()
            await admin.execute("LOCK TABLE task IN SHARE MODE")
            writes: list[asyncio.Task[object]] = [
                asyncio.create_task(queries.create_task(user_id, None, ["x", None, False]))
                if kind == "create"
                else asyncio.create_task(queries.complete_task(user_id, ids[user_id], None, None))
                for user_id in users
            ]
            ended = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
            while not await admin.fetch(ended):
                await asyncio.sleep(0.02)
            try:
                async with asyncio.timeout(5):  # what is sent again waits for the lock again
                    answers = await asyncio.gather(*writes, return_exceptions=True)
            finally:
                await lock.rollback()
            assert all(isinstance(answer, sql.CONNECTION_LOST) for answer in answers)
            assert await admin.fetchval("SELECT count(*) FROM task") == 20
            assert await admin.fetchval("SELECT count(*) FROM task WHERE completed") == 0
            await admin.close()

    asyncio.run(check())


TRIGGERS = {
    "a trigger that swallows rows": """
        CREATE FUNCTION swallow() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
        CREATE TRIGGER swallow BEFORE INSERT ON task FOR EACH ROW WHEN (new.user_id = 'user-7')
        EXECUTE FUNCTION swallow();
    """,
    "a foreign key to a row that is locked": """
        CREATE TABLE owner (id text PRIMARY KEY);
        INSERT INTO owner SELECT 'user-' || number FROM generate_series(0, 999) AS number;
        ALTER TABLE task ADD FOREIGN KEY (user_id) REFERENCES owner;
    """,
}


@pytest.mark.parametrize("trigger", TRIGGERS.values(), ids=TRIGGERS)
def test_a_trigger_for_one_user_does_nothing_to_the_writes_of_others(empty_url: str, trigger: str) -> None:
    async def check() -> None:
        async with pool_and_queries(empty_url, connection_class=Spy) as (pool, queries):
            admin = await asyncpg.connect(empty_url)
            await admin.execute(trigger)
            await queries.apply_schema()  # as every start does
            lock = admin.transaction()
            await lock.start()
            if "owner" in trigger:
                await admin.execute("SELECT FROM owner WHERE id = 'user-7' FOR UPDATE")
            of_one = asyncio.create_task(queries.create_task("user-7", None, ["x", None, False]))
            others = [queries.create_task(user_id, None, ["x", None, False]) for user_id in USERS[8:30]]
            async with asyncio.timeout(5):
                assert all(await asyncio.gather(*others))
            await lock.rollback()
            assert (await of_one is None) == ("swallow" in trigger)

            ids = await make_tasks(pool, USERS[8:30])
            Spy.sent.clear()
            await asyncio.gather(*(queries.complete_task(user_id, ids[user_id], None, None) for user_id in ids))
            assert set(Spy.sent) == {1}
            await admin.close()

    asyncio.run(check())
