"""Calls of one moment share a message to the database, and nothing else: each is done as if it had come alone."""

from __future__ import annotations

import asyncio
import gc
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, ClassVar

import asyncpg
import pytest
from starlette.requests import Request

import service
import sql
from sql import Queries, Refused
from sql.database import Unavailable
from tests.support.batches import (
    NEW,
    USERS,
    Message,
    Spy,
    Task,
    changes_of,
    failures,
    fields,
    make_tasks,
    pool_and_queries,
    sizes,
    values_of,
    whole_list,
)
from tests.support.waiting import wait_in_loop_until

FILL = """
    INSERT INTO task (user_id, title, completed)
    SELECT 'user-' || user_number, 'task ' || number, number % 2 = 0
    FROM generate_series(0, 999) AS user_number, generate_series(1, 1 + user_number % 3) AS number
"""


def in_full_batches(calls: int) -> int:
    """Return how many messages so many calls take that come at once."""
    return -(-calls // sql.MAX_BATCH)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Have each run draw anew, by a seed that a failed test shows."""
    seed = random.randrange(2**32)
    print(f"random.seed({seed})")
    random.seed(seed)


async def get(queries: Queries, user_id: str, task_id: int) -> Task | None:
    return fields(await queries.get_task(user_id, task_id))


@pytest.fixture(scope="module")
def filled_url(new_database: Callable[[], str]) -> str:
    """A database in which a thousand users have one to three tasks each."""
    url = new_database()

    async def fill() -> None:
        async with pool_and_queries(url) as (pool, _):
            await pool.execute(FILL)

    asyncio.run(fill())
    return url


# --- Reads -----------------------------------------------------------------------------------------------------------


def test_what_a_thousand_users_read_at_once_is_what_each_reads_alone(filled_url: str) -> None:
    """Of every kind, of their own tasks and of others', in many different orders."""

    async def check() -> None:
        async with pool_and_queries(filled_url) as (pool, queries):
            everything = [dict(row) for row in await pool.fetch(f"SELECT {', '.join(sql.database.COLUMNS)} FROM task")]
            everything.sort(key=lambda task: (task["created_at"], task["id"]), reverse=True)
            calls: list[tuple[Callable[[], Awaitable[object]], object]] = []  # each with what it is to give
            for task in everything:
                calls.append((partial(get, queries, task["user_id"], task["id"]), task))
                other = random.choice(USERS)
                calls.append((partial(get, queries, other, task["id"]), task if other == task["user_id"] else None))
            for user_id in USERS:
                own = [task for task in everything if task["user_id"] == user_id]
                calls.append((partial(whole_list, queries, user_id), own))
                for status in (True, False):
                    chosen = [task for task in own if task["completed"] == status]
                    calls.append((partial(whole_list, queries, user_id, status), chosen))
            for seed in range(2):
                random.Random(seed).shuffle(calls)
                Spy.sent.clear()
                answers = await asyncio.gather(*(call() for call, _ in calls))
                assert answers == [expected for _, expected in calls]
                assert len(sizes(sql.GET_TASK)) == in_full_batches(2 * len(everything))
                assert len(sizes(sql.LIST_TASKS)) == in_full_batches(1000)
                assert len(sizes(sql.LIST_TASKS_BY_STATUS)) == in_full_batches(2000)
                assert max(sizes()) == sql.MAX_BATCH

    asyncio.run(check())


class Shuffled(Spy):
    """A connection on which the rows of a message come in any order."""

    async def after(self, message: Message, rows: list[Any]) -> list[Any]:
        return random.sample(rows, len(rows))


def test_rows_find_their_calls_by_the_number_alone(filled_url: str) -> None:
    """Not by their order, nor by their user and task, of which a batch may hold several calls."""

    async def check() -> None:
        async with pool_and_queries(filled_url, Shuffled) as (pool, queries):
            rows = await pool.fetch("SELECT user_id, id FROM task WHERE user_id = ANY($1)", USERS[:5])
            calls = [(row["user_id"], row["id"]) for row in rows] * 3 + [("user-0", 2**60)] * 3
            random.shuffle(calls)
            tasks = await asyncio.gather(*(queries.get_task(*call) for call in calls))
            assert sizes() == [len(calls)]
            found = [task and (task["user_id"], task["id"]) for task in tasks]
            assert found == [call if call[1] < 2**60 else None for call in calls]
            assert [task["call"] for task in tasks if task] == [n for n, call in enumerate(calls) if call[1] < 2**60]

    asyncio.run(check())


def test_lists_of_one_user_in_a_batch_are_each_whole(filled_url: str) -> None:
    async def check() -> None:
        async with pool_and_queries(filled_url) as (_, queries):
            lists = await asyncio.gather(*(whole_list(queries, user_id) for user_id in ["user-2", "user-5"] * 10))
            assert sizes() == [20]
            owners = [[task and task["user_id"] for task in each] for each in lists]
            assert owners == [["user-2"] * 3, ["user-5"] * 3] * 10

    asyncio.run(check())


class Row(tuple[Any, ...]):
    """A row of which the columns have names, as a Record has, but which can be made of values."""

    def __getitem__(self, key: Any) -> Any:
        columns = (*sql.database.COLUMNS, "call")
        return super().__getitem__(columns.index(key) if isinstance(key, str) else key)


class Mixed(Spy):
    """A connection on which each row of a message is taken for another call's."""

    async def after(self, message: Message, rows: list[Any]) -> list[Any]:
        return [Row((*tuple(row)[:-1], len(message.calls) - 1 - row[-1])) for row in rows]


def test_a_row_of_somebody_else_is_a_bug_and_never_an_answer(filled_url: str) -> None:
    async def check() -> None:
        async with pool_and_queries(filled_url, Mixed) as (_, queries):
            lists = (whole_list(queries, user_id) for user_id in USERS[:20])
            answers = await asyncio.gather(*lists, return_exceptions=True)
            assert {repr(answer) for answer in answers} == {
                "RuntimeError('a statement has returned a row of somebody else')"
            }

    asyncio.run(check())


def test_a_read_that_fails_fails_alone(filled_url: str) -> None:
    async def check() -> None:
        async with pool_and_queries(filled_url) as (pool, queries):
            row = await pool.fetchrow("SELECT user_id, id FROM task WHERE user_id = 'user-0'")
            assert row
            calls = [(user_id, row["id"]) for user_id in USERS[:15]]
            calls += [("user-0", 2**63), ("NUL\0", 1), *calls]
            reads = (queries.get_task(*call) for call in calls)
            answers = await asyncio.gather(*reads, return_exceptions=True)
            assert [isinstance(answer, Refused) for answer in answers] == [n in (15, 16) for n in range(32)]
            own = [answer for answer in answers if isinstance(answer, asyncpg.Record)]
            assert [fields(answer) for answer in own] == [await get(queries, *row)] * 2
            assert sum(answer is None for answer in answers) == 28

    asyncio.run(check())


class Held(Spy):
    """A connection on which messages wait until they are let go."""

    gate: ClassVar[asyncio.Event]

    async def before(self, message: Message) -> None:
        await self.gate.wait()


@asynccontextmanager
async def held_queries(url: str) -> AsyncIterator[Queries]:
    """Queries of which a message is in flight, of one read, until `Held.gate` is set."""
    Held.gate = asyncio.Event()
    async with pool_and_queries(url, Held) as (_, queries):
        first = asyncio.create_task(queries.get_task("user-1", 1))
        await wait_in_loop_until(lambda: len(Spy.sent) == 1)
        try:
            yield queries
        finally:
            Held.gate.set()
            await first


@pytest.fixture
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have calls wait for a message in flight for as long as it takes."""
    monkeypatch.setattr(sql, "MAX_DELAY", 30.0)


def test_what_comes_while_a_message_takes_long_waits_for_it_only_a_moment(filled_url: str) -> None:
    async def check() -> None:
        async with held_queries(filled_url) as queries:
            reads = [asyncio.create_task(queries.get_task(user_id, 1)) for user_id in USERS[:9]]
            await wait_in_loop_until(lambda: len(Spy.sent) == 2)
            assert sizes(sql.GET_TASK) == [1, 9]
            Held.gate.set()
            await asyncio.gather(*reads)

    asyncio.run(check())


@pytest.mark.usefixtures("_patient")
def test_what_comes_while_a_message_is_in_flight_shares_the_next(filled_url: str) -> None:
    async def check() -> None:
        async with held_queries(filled_url) as queries:
            reads = []
            for user_id in USERS[:40]:  # one after the other, as requests come
                reads.append(asyncio.create_task(queries.get_task(user_id, 1)))
                await asyncio.sleep(0)
            others = asyncio.create_task(whole_list(queries, "user-1"))
            await wait_in_loop_until(lambda: len(Spy.sent) == 2)  # another statement does not wait for it
            assert sizes(sql.GET_TASK) == [1]
            Held.gate.set()
            await asyncio.gather(*reads, others)
            assert sizes(sql.GET_TASK) == [1, 32, 8]

    asyncio.run(check())


@pytest.mark.usefixtures("_patient")
def test_a_user_has_two_lists_in_hand_at_once(filled_url: str) -> None:
    """However many are asked for. Each has a page in memory, and three that are long would leave others no place."""

    async def check() -> None:
        async with held_queries(filled_url) as queries:
            scope = {"type": "http", "method": "GET", "headers": [], "user": "user-1", "state": {"queries": queries}}
            lists = [asyncio.create_task(service.list_response(Request(scope), None)) for _ in range(10)]
            others = asyncio.create_task(whole_list(queries, "user-2"))
            await wait_in_loop_until(lambda: len(Spy.sent) == 2)
            assert sizes(sql.LIST_TASKS) == [3]  # two of the user, and another's
            Held.gate.set()
            assert len({bytes(answer.body) for answer in await asyncio.gather(*lists)}) == 1
            await others

    asyncio.run(check())


@pytest.mark.usefixtures("_patient")
def test_who_no_longer_waits_disturbs_nobody_who_does(filled_url: str) -> None:
    async def check() -> None:
        async with held_queries(filled_url) as queries:
            reads = [asyncio.create_task(queries.get_task(user_id, 1)) for user_id in USERS[:9]]
            await wait_in_loop_until(lambda: len(queries.queues[sql.GET_TASK]) == 9)
            for read in reads[::3]:
                read.cancel()
            Held.gate.set()
            answers = await asyncio.gather(*reads, return_exceptions=True)
            assert [isinstance(answer, asyncio.CancelledError) for answer in answers] == [True, False, False] * 3
            assert sizes() == [1, 6]  # nothing is sent for those who have gone

    asyncio.run(check())


def test_who_no_longer_waits_for_what_is_in_flight_disturbs_nobody(filled_url: str) -> None:
    async def check() -> None:
        Held.gate = asyncio.Event()
        async with pool_and_queries(filled_url, Held) as (_, queries):
            lists = [asyncio.create_task(whole_list(queries, user_id)) for user_id in USERS[:9]]
            await wait_in_loop_until(lambda: sizes() == [9])
            for each in lists[::3]:
                each.cancel()
            Held.gate.set()
            answers = await asyncio.gather(*lists, return_exceptions=True)
            assert [isinstance(answer, asyncio.CancelledError) for answer in answers] == [True, False, False] * 3
            assert [len(answer) for answer in answers if isinstance(answer, list)] == [2, 3] * 3
            assert sizes() == [9]

    asyncio.run(check())


# --- Creations and changes -------------------------------------------------------------------------------------------


def test_what_a_thousand_users_create_at_once_is_what_each_has(database_url: str) -> None:
    """Every third with a key: they share messages with the others."""

    async def check() -> None:
        async with pool_and_queries(database_url) as (pool, queries):
            keys: dict[str, tuple[str | None, str | None]] = {
                user_id: (None, None) if number % 3 else ("key", "hash") for number, user_id in enumerate(USERS)
            }
            created = await asyncio.gather(
                *(queries.create_task(user_id, *key, values_of(f"of {user_id}")) for user_id, key in keys.items())
            )
            assert (max(sizes()), len(sizes())) == (sql.MAX_BATCH, in_full_batches(1000))
            for user_id, row in zip(USERS, created, strict=True):
                task = fields(row)
                assert task
                assert (task["user_id"], task["title"]) == (user_id, f"of {user_id}")
                assert await get(queries, user_id, task["id"]) == task
            rows = await pool.fetch("SELECT user_id, title, idempotency_key, request_hash FROM task")
            assert sorted(map(tuple, rows)) == sorted((user, f"of {user}", *keys[user]) for user in USERS)

    asyncio.run(check())


def test_creations_of_one_user_share_messages_and_each_is_made_once(database_url: str) -> None:
    """With and without keys, of which each names one."""

    async def check() -> None:
        async with pool_and_queries(database_url) as (pool, queries):
            keys = [f"key {number}" if number % 4 else None for number in range(200)]
            created = await asyncio.gather(
                *(queries.create_task("alice", key, key, values_of(f"{n}")) for n, key in enumerate(keys))
            )
            assert len(sizes()) == in_full_batches(200)
            assert [row and row["title"] for row in created] == [f"{n}" for n in range(200)]
            rows = await pool.fetch("SELECT title, idempotency_key FROM task WHERE user_id = 'alice'")
            assert sorted(map(tuple, rows)) == sorted((f"{n}", key) for n, key in enumerate(keys))

    asyncio.run(check())


def test_a_key_makes_one_task_however_often_it_comes_at_once(database_url: str) -> None:
    """And another user's is another key; with another request it makes nothing."""

    async def check() -> None:
        async with pool_and_queries(database_url) as (pool, queries):
            calls = [("alice", "hash")] * 12 + [("alice", "other")] * 3 + [("bob", "other")] * 12
            random.shuffle(calls)
            rows = await asyncio.gather(*(queries.create_task(user, "key", each, NEW) for user, each in calls))
            assert sizes(sql.CREATE_TASK) == [2, *[1] * 25]  # one of each user, and then one by one
            assert sum(sizes(sql.GET_TASK_BY_KEY)) == 25
            ids = {row["user_id"]: row["id"] for row in await pool.fetch("SELECT user_id, id FROM task")}
            first = await pool.fetchval("SELECT request_hash FROM task WHERE user_id = 'alice'")
            assert await pool.fetchval("SELECT count(*) FROM task") == 2
            kept = {("alice", first), ("bob", "other")}
            assert [row and row["id"] for row in rows] == [ids[call[0]] if call in kept else None for call in calls]

    asyncio.run(check())


def test_what_a_thousand_users_change_at_once_is_what_each_has(database_url: str) -> None:
    """With the tasks of others, versions that have moved on, and ids that nobody has among them."""

    async def check() -> None:
        async with pool_and_queries(database_url) as (pool, queries):
            ids = await make_tasks(pool, USERS)
            tasks = {
                row["user_id"]: dict(row)
                for row in await pool.fetch(f"SELECT {', '.join(sql.database.COLUMNS)} FROM task")
            }
            changes: list[tuple[str, Callable[[], Awaitable[Any]], Task | None]] = []  # with what they are to change
            for number, (user_id, task) in enumerate(tasks.items()):
                task_id, now, never = task["id"], [task["updated_at"]], [sql.NEWEST[0]]
                others = ids[USERS[int(user_id.removeprefix("user-")) - 1]]
                put = changes_of(title=f"of {user_id}")
                own: list[tuple[Callable[[], Awaitable[Any]], Task | None]] = [
                    (partial(queries.complete_task, user_id, task_id, None, None), {"completed": True}),
                    (partial(queries.update_task, user_id, task_id, now, put), {"title": f"of {user_id}"}),
                    (partial(queries.delete_task, user_id, task_id, now), {}),
                    (partial(queries.update_task, user_id, task_id, never, put), None),
                    (partial(queries.delete_task, user_id, task_id, []), None),
                ]
                foreign: list[Callable[[], Awaitable[Any]]] = [
                    partial(queries.complete_task, user_id, others, None, True),
                    partial(queries.delete_task, user_id, others, None),
                    partial(queries.update_task, user_id, 2**62, None, put),
                ]
                changes += [(user_id, *own[number % 5]), (user_id, foreign[number % 3], None)]
            random.Random(7).shuffle(changes)
            answers = await asyncio.gather(*(change() for _, change, _ in changes))
            assert failures() == []
            assert max(sizes()) == sql.MAX_BATCH
            assert len(sizes()) <= in_full_batches(2000) + 3  # of three statements
            changed = {}
            for (user_id, _, change), row in zip(changes, answers, strict=True):
                if change is None:
                    assert row is None
                else:
                    changed[user_id] = fields(row)
                    version = row["updated_at"]
                    assert changed[user_id] == tasks[user_id] | change | {"updated_at": version}
                    assert (version > tasks[user_id]["updated_at"]) == bool(change)
            assert len(changed) == 600
            for number, (user_id, task) in enumerate(tasks.items()):
                left = None if number % 5 == 2 else changed.get(user_id, task)
                assert await get(queries, user_id, task["id"]) == left

    asyncio.run(check())


UNSTORABLE = {"user-3": "NUL\0", "user-4": "x" * 201, "user-5": " ", "user-6": "\ud800"}


@pytest.mark.parametrize("kind", ["create", "update"])
def test_a_write_that_is_refused_is_refused_alone_and_the_others_are_made_once(database_url: str, kind: str) -> None:
    async def check() -> None:
        async with pool_and_queries(database_url) as (pool, queries):
            users, writes = USERS[:20], list[Awaitable[object]]()
            ids = await make_tasks(pool, users) if kind == "update" else {}
            for user_id in users:
                title = UNSTORABLE.get(user_id, "new")
                put = changes_of(title=title)
                create = kind == "create"
                writes.append(
                    queries.create_task(user_id, None, None, values_of(title))
                    if create
                    else queries.update_task(user_id, ids[user_id], None, put)
                )
            answers = await asyncio.gather(*writes, return_exceptions=True)
            refused = {
                user: str(answer) for user, answer in zip(users, answers, strict=True) if isinstance(answer, Refused)
            }
            assert [*refused.values()] == ["CharacterNotInRepertoireError", "task_title", "task_title", "DataError"]
            assert refused.keys() == UNSTORABLE.keys()
            assert sizes() == [20] + [1] * 20
            rows = await pool.fetch("SELECT user_id, title FROM task")
            old = dict.fromkeys(ids, "a task")
            new = {user_id: "new" for user_id in users if user_id not in UNSTORABLE}
            assert sorted(map(tuple, rows)) == sorted((old | new).items())

    asyncio.run(check())


# --- What is lost with its connection --------------------------------------------------------------------------------


class Cut(Spy):
    """A connection that the server ends, before or after a message has been carried out, for as many as are to be."""

    left: ClassVar[int] = 0
    moment: ClassVar[str] = ""

    async def end(self, moment: str) -> None:
        if moment == self.moment and Cut.left:
            Cut.left -= 1
            admin = await asyncpg.connect(self.url)
            await admin.execute("SELECT pg_terminate_backend($1, 10000)", self.get_server_pid())
            await admin.close()
            await self.fetchval("SELECT 1")

    async def before(self, message: Message) -> None:
        await self.end("before")

    async def after(self, message: Message, rows: list[Any]) -> list[Any]:
        await self.end("after")
        return rows


class CutInTransaction(Cut):
    """One behind a pooler, on which a message is not done before the transaction around it is."""

    sets_lock_timeout = True


class HangsInTransaction(Spy):
    """One behind a pooler, whose server answers nothing once a transaction has begun."""

    sets_lock_timeout = True
    executed: ClassVar[list[str]] = []

    async def execute(self, query: str, *args: Any, **options: Any) -> Any:
        HangsInTransaction.executed.append(query)
        return await super().execute(query, *args, **options)

    async def before(self, message: Message) -> None:
        await asyncio.Event().wait()


def test_a_transaction_that_takes_too_long_is_not_rolled_back_by_a_statement(
    filled_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody would answer that either, and it would take a time limit of its own. The connection is closed."""
    monkeypatch.setattr(sql, "CALL_TIMEOUT", 0.3)

    async def check() -> None:
        async with pool_and_queries(filled_url, HangsInTransaction) as (pool, queries):
            HangsInTransaction.executed.clear()
            with pytest.raises((Unavailable, TimeoutError)):
                await queries.delete_task("user-1", 1, None)
            assert HangsInTransaction.executed == ["BEGIN; SET LOCAL lock_timeout = '50ms'"]
            await wait_in_loop_until(lambda: pool.get_size() == 0)

    asyncio.run(check())


class Stuck(Spy):
    """A connection that cannot be given back in time, as the database hangs."""

    released: ClassVar[int] = 0

    async def reset(self, *, timeout: float | None = None) -> None:
        if self.sent:  # a call has been sent
            Stuck.released += 1
            await asyncio.sleep(0.05)
            raise TimeoutError


def test_a_connection_that_fails_after_its_call_was_cancelled_is_closed_without_a_traceback(filled_url: str) -> None:
    async def check() -> None:
        Spy.sent.clear()
        complaints: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, complaint: complaints.append(complaint))
        async with pool_and_queries(filled_url, Stuck) as (pool, queries):
            await pool.execute("INSERT INTO task (user_id, title) SELECT 'long', 'x' FROM generate_series(1, 60)")
            reading = asyncio.create_task(whole_list(queries, "long"))
            await wait_in_loop_until(lambda: Stuck.released == 2)  # that of the second page, which goes alone
            reading.cancel()
            await wait_in_loop_until(lambda: pool.get_size() == 0)
            gc.collect()  # asyncio then tells of exceptions that nobody has asked for
            assert complaints == []

    asyncio.run(check())


at_each_moment = pytest.mark.parametrize("moment", ["before", "after"])
on_each_connection = pytest.mark.parametrize("connection_class", [Cut, CutInTransaction])


@at_each_moment
@on_each_connection
def test_a_read_that_is_lost_with_its_connection_is_sent_once_more(
    filled_url: str, connection_class: type[Cut], moment: str
) -> None:
    async def check() -> None:
        Cut.moment = moment
        async with pool_and_queries(filled_url, connection_class) as (_, queries):
            Cut.left = 1
            lists = await asyncio.gather(*(whole_list(queries, user_id) for user_id in USERS[:8]))
            assert [len(each) for each in lists] == [1 + number % 3 for number in range(8)]
            assert sizes() == [8] + [1] * 8

            Cut.left = 10_000
            Spy.sent.clear()
            reads = (whole_list(queries, user_id) for user_id in USERS[:8])
            answers = await asyncio.gather(*reads, return_exceptions=True)
            assert {type(answer) for answer in answers} == {Unavailable}
            assert sizes() == [8] + [1] * 8
            Cut.left = 0

    asyncio.run(check())


@pytest.mark.parametrize(
    ("kind", "connection_class", "moment"),
    [
        *((kind, Cut, "after") for kind in ("create", "create with a key", "update", "toggle", "delete")),
        ("toggle", Cut, "before"),
        ("create", CutInTransaction, "before"),
        ("delete", CutInTransaction, "after"),
    ],
)
def test_a_write_that_is_lost_with_its_connection_is_not_sent_again(
    database_url: str, kind: str, connection_class: type[Cut], moment: str
) -> None:
    """Nobody knows how far it came."""

    async def check() -> None:
        Cut.moment, Cut.left = moment, 0
        async with pool_and_queries(database_url, connection_class) as (pool, queries):
            users = USERS[:20]
            ids = {} if kind.startswith("create") else await make_tasks(pool, users)
            new, put = values_of("changed", completed=True), changes_of(title="changed", completed=True)
            write: dict[str, Callable[[str], Awaitable[object]]] = {
                "create": lambda user_id: queries.create_task(user_id, None, None, new),
                "create with a key": lambda user_id: queries.create_task(user_id, "k", "h", new),
                "update": lambda user_id: queries.update_task(user_id, ids[user_id], None, put),
                "toggle": lambda user_id: queries.complete_task(user_id, ids[user_id], None, None),
                "delete": lambda user_id: queries.delete_task(user_id, ids[user_id], None),
            }
            Cut.left = 10_000
            answers = await asyncio.gather(*(write[kind](user_id) for user_id in users), return_exceptions=True)
            assert {type(answer) for answer in answers} == {Unavailable}
            assert sizes() == [20]
            Cut.left = 0
            done = moment == "after" and connection_class is Cut
            rows = await pool.fetch("SELECT user_id, completed FROM task")
            there = {"delete": not done, "create": done, "create with a key": done}.get(kind, True)
            completed = done  # by each of them but the deletion
            assert sorted(map(tuple, rows)) == sorted((user_id, completed) for user_id in users) * there

    asyncio.run(check())
